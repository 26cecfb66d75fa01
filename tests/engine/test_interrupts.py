"""An interrupt at any line of a step leaves the engine as its docstring promises, under every strategy."""

import random
import sys
from pathlib import Path

import pytest
from test_engine import CHUNKED, PHYSICAL, make_engine, run_one_by_one, stream, tight

import hybridcache

PACKAGE = Path(hybridcache.__file__).parent
WATCHED = tuple(str(PACKAGE / name) for name in ("engine", "strategies", "memory", "observe"))
TRIALS = 4


class InterruptAt:
    """Raises KeyboardInterrupt when the ``count``-th line of the package is reached; ``where`` says which one it was."""

    def __init__(self, count: int) -> None:
        self.left, self.where = count, ""

    def __enter__(self) -> "InterruptAt":
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception) -> None:
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(scope="module")
def some_requests():
    requests = stream(random.randrange(2**32), 5)
    return requests, run_one_by_one(requests)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_an_interrupt_at_any_line_of_a_step_loses_nothing(label, overlap, some_requests):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    requests, expected = some_requests
    interrupted = 0
    for _ in range(TRIALS):
        engine = make_engine(label, tight(label, requests), CHUNKED, overlap=overlap)
        seqs = [engine.add_request(prompt, params) for prompt, params in requests]
        for _ in range(rng.randrange(40)):
            if engine.has_work:
                engine.step()
        if not engine.has_work:
            continue
        with InterruptAt(rng.randrange(1, 500)) as at:
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupted += 1
        said = f"seed {seed}, at {at.where}"
        engine.strategy.check_integrity()
        outside = at.where.endswith(" step") and at.where.startswith("engine.py")  # before or after all that it does
        assert not at.where or outside or not engine.strategy.residents, said
        steps = 0
        while engine.has_work:
            engine.step()
            steps += 1
            assert steps < 2000, said
        assert [seq.output_ids for seq in seqs] == expected, said
        assert all(seq.finish_reason == "length" for seq in seqs), said
        assert not engine.strategy.residents, said
        assert engine.strategy.usage().free == engine.strategy.usage().budget - engine.strategy.usage().reserved, said
    assert interrupted, f"seed {seed}"


def test_a_reset_strategy_is_as_it_was_made():
    for label in PHYSICAL:
        engine = make_engine(label)
        strategy = engine.strategy
        fresh, layout = strategy.usage(), strategy.layout
        for seq_id in range(3):
            assert strategy.admit(seq_id, 40 + seq_id)
        strategy.reset()
        strategy.check_integrity()
        assert strategy.usage() == fresh
        assert strategy.layout == layout
        assert not strategy.residents
