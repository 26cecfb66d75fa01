"""How much code one decode step enters: a reader can follow it."""

import sys

from hybridcache import LLM, SamplingParams
from hybridcache.observe.environment import ROOT

FOLDERS = tuple(str(ROOT / name) + "/" for name in ("hybridcache", "models"))
UNNAMED = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Inlined from Python 3.12 on."""


def entered(step) -> set[tuple[str, str]]:
    """File and qualified name of every function of the project that a call enters."""
    found = set()

    def on_call(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDERS) and code.co_name not in UNNAMED:
            found.add((code.co_filename, code.co_qualname))

    sys.setprofile(on_call)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def test_a_decode_step_enters_few_files_and_functions():
    llm = LLM("tiny", cache_bytes=8 << 20, device="cpu")
    for number in range(3):
        llm.engine.add_request([number + 5] * (20 + number), SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(6):
        llm.engine.step()
    steps = [entered(llm.engine.step) for _ in range(20)]
    usual = sorted(steps, key=len)[len(steps) // 2]
    assert 30 < len(usual) <= 80, sorted(usual)
    assert len({file for file, _ in usual}) <= 18, sorted({file for file, _ in usual})
    # A step in which somebody takes a block enters what hands it out, too.
    assert max(map(len, steps)) <= 95
