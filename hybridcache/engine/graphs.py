"""DecodeGraphs: decode steps as CUDA graphs, one for each of a few numbers of rows.

A step of n rows replays the smallest graph that holds n; the rows behind them are padding, which the kernels skip. All graphs
share one memory pool, and the largest is captured first, so that the others fit into what it left. Before a capture the
same step runs once on inputs that are all padding: kernels are compiled and libraries are initialised there, and no byte of
the cache changes.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend

_LOG = logging.getLogger(__name__)

CHOICES = ("auto", "true", "false")
SMALL = (1, 2, 4, 8)
STEP = 8
"""Beyond the small sizes, every multiple of this."""


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
    """Numbers of rows with a graph of their own: 1, 2, 4, 8, 16, 24, 32 and so on, up to ``max_rows``."""
    sizes = [size for size in (*SMALL, *range(2 * STEP, max_rows, STEP)) if size < max_rows]
    return [*sizes, max_rows]


def wants_graphs(choice: str | bool, backend: Backend, device: torch.device, waits: str | None) -> bool:
    """Whether decode runs under CUDA graphs.

    Args:
        choice: ``true``, ``false``, or ``auto``: wherever it can.
        waits: why the model's forward pass waits for the device; None where it does not.

    Raises:
        UserError: an unknown choice, or ``true`` where it cannot be.
    """
    name = str(choice).lower()
    if name not in CHOICES:
        raise bad("cuda_graphs", choice, f"choose {', '.join(CHOICES)}")
    reason = None
    if device.type != "cuda":
        reason = f"needs a CUDA device, not {device}"
    elif backend.name != "triton":
        reason = f"decode of backend={backend.name} reads lengths on the host; choose backend=triton"
    elif waits is not None:
        reason = waits
    if name == "true" and reason is not None:
        raise bad("cuda_graphs", choice, f"{reason}, or cuda_graphs=false")
    return name != "false" and reason is None


class DecodeGraphs:
    """See the module.

    Args:
        sizes: ascending; the last is the most rows of a step.
        step: runs a step of that many rows on the static inputs.
        warm_up: runs a step of that many padding rows on other inputs.
        capture: how a step is recorded.
        launches: the backend's counter. A replay adds what its capture launched; captures and warm-ups add nothing.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        step: Callable[[int], None],
        warm_up: Callable[[int], None],
        capture: Capture,
        launches: Counter[str],
    ) -> None:
        self.sizes = list(sizes)
        self._step, self._warm_up, self._capture = step, warm_up, capture
        self._launches = launches
        self._graphs: dict[int, tuple[Replayable, Counter[str]]] = {}
        self.replays = 0

    def size_for(self, rows: int) -> int:
        """The smallest size that holds that many rows."""
        return next(size for size in self.sizes if size >= rows)

    def replay(self, size: int) -> None:
        """Run the step of one of ``sizes``; it is captured now if it was not yet."""
        if size not in self._graphs:
            self.capture([self.sizes[-1], size])
        graph, counts = self._graphs[size]
        graph.replay()
        self._launches.update(counts)
        self.replays += 1

    def capture(self, sizes: Sequence[int] | None = None) -> None:
        """Capture these sizes, all by default, those that exist excepted."""
        wanted = sorted({*(self.sizes if sizes is None else sizes)} - self._graphs.keys(), reverse=True)
        started = time.perf_counter()
        for size in wanted:
            before = Counter(self._launches)
            self._warm_up(size)
            self._restore(before)
            graph = self._capture(partial(self._step, size))
            counts = Counter(self._launches)
            counts.subtract(before)
            self._restore(before)
            self._graphs[size] = (graph, +counts)
        if wanted:
            _LOG.info("captured %d decode graphs in %.1f s", len(wanted), time.perf_counter() - started)

    def _restore(self, counts: Counter[str]) -> None:
        self._launches.clear()
        self._launches.update(counts)
