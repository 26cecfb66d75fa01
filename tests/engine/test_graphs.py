"""Graphs of steps: which shapes have one, which one a step replays, and what a capture may disturb.

Graphs are replayed on the CPU by running what they would have recorded, from the same static memory.
"""

import gc
import random
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_engine import CHUNKED, make_engine, run_one_by_one

from hybridcache.engine.engine import Engine
from hybridcache.engine.graphs import Shape, StepGraphs, graph_sizes, prefill_shapes, wants_graphs
from hybridcache.engine.sampling import SamplingParams
from hybridcache.errors import UserError
from hybridcache.kernels.backend import make_backend


class Recorded:
    """What a graph does, without a device: the function runs at every replay, and not at its capture."""

    def __init__(self, run) -> None:
        self.replay = run


def with_graphs(engine: Engine) -> Engine:
    engine.runner.graphs = engine.runner._make_graphs(Recorded)
    return engine


def test_the_graph_that_fits_is_replayed_and_launches_are_counted():
    sizes = graph_sizes(29)
    assert sizes == [1, 2, 4, 8, 16, 24, 29]
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(256)[-3:] == [240, 248, 256]
    launches = Counter({"op": 5})
    ran, warmed, order = [], [], []

    def step(shape):
        launches["op"] += 2
        ran.append(shape.decode)

    def warm_up(shape):
        launches["op"] += 100
        warmed.append(shape.decode)

    class Capture:
        def __init__(self, run):
            run()
            order.append(ran[-1])
            self.replay = lambda: None

    graphs = StepGraphs([Shape(size) for size in sizes], step, warm_up, Capture, launches)
    for rows, size in ((1, 1), (3, 4), (8, 8), (9, 16), (25, 29), (29, 29)):
        assert graphs.shape_for(rows) == Shape(size)
    assert graphs.shape_for(3, 64, 1) is None
    graphs.replay(Shape(4))
    assert order == [29, 4], "the largest first"
    assert warmed == order
    assert launches == Counter({"op": 7})
    graphs.capture()
    assert order == [29, 4, *sorted(set(sizes) - {29, 4}, reverse=True)]
    assert launches == Counter({"op": 7})
    graphs.replay(Shape(29))
    graphs.replay(Shape(29))
    assert launches == Counter({"op": 11})
    assert graphs.replays == 3


@pytest.mark.parametrize("fails", [False, True])
def test_no_engine_dies_while_a_graph_is_captured(fails):
    """Freeing a graph inside another's capture voids both."""
    first = with_graphs(make_engine())
    dead = weakref.ref(first)
    first = None
    seen = []

    def capture(run):
        seen.append((gc.isenabled(), dead()))
        if fails:
            raise RuntimeError("no")
        return SimpleNamespace(replay=run)

    graphs = StepGraphs([Shape(1), Shape(2)], *[lambda shape: None] * 2, capture, Counter())
    with pytest.raises(RuntimeError) if fails else nullcontext():
        graphs.capture()
    assert seen == [(False, None)] * (1 if fails else 2)
    assert gc.isenabled()


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(256, 8192), (40, 600), (5, 64), (3, 8192), (20, 63)])
def test_shapes_of_steps_that_prefill(max_rows, max_tokens):
    shapes = prefill_shapes(max_rows, max_tokens)
    assert len(set(shapes)) == len(shapes) <= 80
    for shape in shapes:
        assert shape.rows <= max_rows
        assert shape.total_tokens <= max_tokens
    graphs = StepGraphs([*shapes, *map(Shape, graph_sizes(max_rows))], *[lambda *args: None] * 3, Counter())
    for _ in range(200):
        decode, prefill = random.randrange(max_rows), random.randrange(20)
        tokens = random.randint(prefill, max(prefill, min(max_tokens, 5000))) if prefill else 0
        chosen = graphs.shape_for(decode, tokens, prefill)
        fitting = [s for s in graphs.shapes if s.decode >= decode and s.tokens >= tokens and s.prefill > prefill]
        if prefill == 0 and decode:
            assert chosen == Shape(min(size for size in graph_sizes(max_rows) if size >= decode))
        elif prefill:
            assert (chosen is None) == (not fitting)
            assert chosen is None or chosen.total_tokens == min(shape.total_tokens for shape in fitting)


def test_what_prefills_few_tokens_is_replayed():
    """Beside requests that decode and without any; what fits no graph is launched."""
    engine = with_graphs(make_engine(overlap=True, config=replace(CHUNKED, max_tokens_per_step=400)))
    requests = [([token] * 20, SamplingParams(max_tokens=9)) for token in range(2)]
    requests += [([5] * 300, SamplingParams(max_tokens=2)), ([6] * 30, SamplingParams(max_tokens=2))]
    seqs = []
    for prompt, params in requests:
        seqs.append(engine.add_request(prompt, params))
        engine.step()
        engine.step()
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)
    batches = engine.runner.model.batches
    assert [shape.prefill for shape in batches if shape.prefill] == [4, 4, 1, 4]
    assert [shape.tokens for shape in batches if shape.prefill] == [64, 64, 300, 64]
    assert engine.runner.graphs.replays == len(batches) - 1


def test_graphs_where_they_cannot_be():
    torch_backend = make_backend("torch", "cpu")
    triton_backend = SimpleNamespace(name="triton", capturable=True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not wants_graphs("auto", torch_backend, cpu, None)
    assert not wants_graphs(False, triton_backend, cuda, None)
    assert wants_graphs("auto", triton_backend, cuda, None)
    assert wants_graphs(True, triton_backend, cuda, None)
    assert not wants_graphs("auto", triton_backend, cuda, "it counts")
    with pytest.raises(UserError, match="cuda_graphs=True: needs a CUDA device, not cpu"):
        wants_graphs(True, triton_backend, cpu, None)
    with pytest.raises(UserError, match="cuda_graphs='true': decode of backend=torch reads lengths on the host"):
        wants_graphs("true", torch_backend, cuda, None)
    with pytest.raises(UserError, match="cuda_graphs='true': it counts, or cuda_graphs=false"):
        wants_graphs("true", triton_backend, cuda, "it counts")
    with pytest.raises(UserError, match="cuda_graphs='maybe': choose auto"):
        wants_graphs("maybe", torch_backend, cuda, None)
    with pytest.raises(UserError, match="overlap='maybe': choose auto"):
        make_engine(overlap="maybe")
    with pytest.raises(UserError, match="cuda_graphs='true'"):
        make_engine(cuda_graphs="true")
