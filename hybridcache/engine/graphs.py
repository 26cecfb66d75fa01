"""StepGraphs: steps as CUDA graphs, one for each of a few shapes.

A step replays the smallest graph that holds it; rows and tokens beyond its own are padding, which the kernels skip. Steps that
only decode have graphs for any number of rows. Steps that prefill have graphs up to a few thousand tokens: the device finishes
those before the host could launch their kernels one by one. Larger prefills keep the device busy and have none.

All graphs share one memory pool, and the largest is captured first, so that the others fit into what it left. Before a
capture the same step runs once on inputs that are all padding: kernels are compiled and libraries are initialised there, and
no byte of the cache changes.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from hybridcache.engine.garbage import unswept
from hybridcache.engine.step import Shape
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend

_LOG = logging.getLogger(__name__)

CHOICES = ("auto", "true", "false")
SMALL = (1, 2, 4, 8)
STEP = 8
"""Beyond the sizes in ``SMALL``, every multiple of this number of decoding rows has a graph."""


PREFILL_TOKENS = (64, 256, 512, 1024, 2048, 4096)
PREFILL_ROWS = (4, 16)
"""At least one prefilling row is padding: it owns the padding tokens."""
BESIDE_PREFILL = (0, 16, 64)
"""Decoding rows beside prefilling ones; larger graphs take every multiple of the last."""


class Replayable(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Replayable]
"""Records what a function launches, without running it."""


class CudaCapture:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replayable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that only decode with a graph of their own: 1, 2, 4, 8, 16, 24, 32 and so on, up to ``max_rows``."""
    sizes = [size for size in (*SMALL, *range(2 * STEP, max_rows, STEP)) if size < max_rows]
    return [*sizes, max_rows]


def prefill_shapes(max_rows: int, max_tokens: int) -> list[Shape]:
    """Shapes of steps that prefill, of at most that many rows and tokens in all, which have a graph."""
    found = []
    for prefill in PREFILL_ROWS:
        most = max_rows - prefill
        beside = {*BESIDE_PREFILL, *range(2 * BESIDE_PREFILL[-1], most, BESIDE_PREFILL[-1]), most}
        found += [Shape(n, tokens, prefill) for n in beside if 0 <= n <= most for tokens in PREFILL_TOKENS]
    return [shape for shape in found if shape.total_tokens <= max_tokens]


def wants_graphs(choice: str | bool, backend: Backend, device: torch.device, waits: str | None) -> bool:
    """Whether decode runs under CUDA graphs.

    Args:
        choice: ``true``, ``false``, or ``auto``, which takes graphs wherever it can.
        waits: why the model's forward pass waits for the device; None where it does not.

    Raises:
        UserError: the choice is unknown, or it is ``true`` where no graph can hold a step.
    """
    name = str(choice).lower()
    if name not in CHOICES:
        raise bad("cuda_graphs", choice, f"choose {', '.join(CHOICES)}")
    reason = None
    if device.type != "cuda":
        reason = f"needs a CUDA device, not {device}"
    elif not backend.capturable:
        reason = f"decode of backend={backend.name} reads lengths on the host; choose backend=triton"
    elif waits is not None:
        reason = waits
    if name == "true" and reason is not None:
        raise bad("cuda_graphs", choice, f"{reason}, or cuda_graphs=false")
    return name != "false" and reason is None


class StepGraphs:
    """The graphs of one runner; see the module.

    Args:
        shapes: the shapes to offer, in any order.
        step: runs a step of a shape on the static inputs.
        warm_up: runs a step of a shape that is all padding, on other inputs.
        capture: records a step as a graph.
        launches: the backend's counter. A replay adds what its capture launched; captures and warm-ups add nothing.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        step: Callable[[Shape], None],
        warm_up: Callable[[Shape], None],
        capture: Capture,
        launches: Counter[str],
    ) -> None:
        self.shapes = sorted(shapes, key=lambda shape: (shape.total_tokens, shape.rows))
        """Sorted by size, the largest last."""
        self._step, self._warm_up, self._capture = step, warm_up, capture
        self._launches = launches
        self._graphs: dict[Shape, tuple[Replayable, Counter[str]]] = {}
        self.replays = 0

    def shape_for(self, decode: int, tokens: int = 0, prefill: int = 0) -> Shape | None:
        """The smallest shape that holds such a step; None where none does."""
        return next((shape for shape in self.shapes if shape.holds(decode, tokens, prefill)), None)

    def replay(self, shape: Shape) -> None:
        """Run the step of one of ``shapes``, and capture it first where that has not been done."""
        self.make(shape)
        graph, counts = self._graphs[shape]
        graph.replay()
        self._launches.update(counts)
        self.replays += 1

    def make(self, shape: Shape) -> None:
        """Capture the graph of one of ``shapes`` if that has not been done. The largest is captured first, because the others
        fit into its memory."""
        if shape not in self._graphs:
            self.capture([self.shapes[-1], shape])

    def capture(self, shapes: Sequence[Shape] | None = None) -> None:
        """Capture those of ``shapes`` (None: all) that have no graph yet."""
        asked = {*(self.shapes if shapes is None else shapes)} - self._graphs.keys()
        wanted = [shape for shape in reversed(self.shapes) if shape in asked]
        if not wanted:
            return
        started = time.perf_counter()
        with unswept():
            for shape in wanted:
                self._capture_one(shape)
        _LOG.info("captured %d graphs in %.1f s", len(wanted), time.perf_counter() - started)

    def _capture_one(self, shape: Shape) -> None:
        before = Counter(self._launches)
        self._warm_up(shape)
        self._restore(before)
        graph = self._capture(partial(self._step, shape))
        counts = Counter(self._launches)
        counts.subtract(before)
        self._restore(before)
        self._graphs[shape] = (graph, +counts)

    def _restore(self, counts: Counter[str]) -> None:
        self._launches.clear()
        self._launches.update(counts)
