"""``python -m hybridcache.strategies.check`` passes what is right and names what is wrong with classes broken on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybridcache.strategies.check import PROPERTIES, check, main
from hybridcache.strategies.two_ended import TwoEnded

HEAD = """
from array import array
from hybridcache.strategies.shared_pool import SharedPool
from hybridcache.strategies.two_ended import TwoEnded

class Broken(SharedPool):
    name = "broken"
"""
BROKEN = {
    "hands a block out twice": """
    def _take_kv(self, entries, held):
        taken = super()._take_kv(entries, held)
        self._free.put(taken[0])
        return taken
""",
    "loses a block": """
    def _give_kv(self, units):
        super()._give_kv(units[1:])
""",
    "claims too much free memory": """
    def _free_bytes(self):
        return super()._free_bytes() + 1
""",
    "claims too little reserved memory": """
    def _reserved(self):
        return super()._reserved() - 1
""",
    "takes memory though it refuses": """
    def _admits(self, entries, states=True):
        if super()._admits(entries, states):
            return True
        if len(self._free):
            self._free.pop()
        return False
""",
    "promises a longer request": """
    def _request_limit(self):
        return super()._request_limit() + 1
""",
    "denies the longest request": """
    def _request_limit(self):
        return super()._request_limit() - 1
""",
    "forgets to fill": """
    def fill(self, totals):
        pass
""",
    "forgets to grow": """
    def grow(self, seq_id, num_tokens):
        return True
""",
    "accepts any budget": """
    def request_limit(self):
        return max(super().request_limit(), 1)
""",
    "does not charge block tables": """
    def _reserved(self):
        return super()._reserved() - self.table_bytes
""",
    "writes states that a checkpoint owns": """
    def checkpoint(self, seq_id, key):
        super().checkpoint(seq_id, key)
        self._residents[seq_id].states.owners -= 1
""",
    "lays two layers over each other": """
    def _layout(self):
        from dataclasses import replace
        found = super()._layout()
        return replace(found, attention=replace(found.attention, base=(0,) * len(found.attention.base)))
""",
    "lays states beyond the pool": """
    def _state_table(self, units):
        return array("i", [entry + self.num_blocks for entry in super()._state_table(units)])
""",
    "forgets to copy the tail": """
    def _copy_tail(self, src, dst, tokens):
        pass
""",
    "raises": """
    def _take_states(self):
        raise RuntimeError("not written yet")
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_class_fails(what: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    module = "broken_" + what.replace(" ", "_")
    (folder / f"{module}.py").write_text(HEAD + BROKEN[what])
    assert main([f"{module}.Broken"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok    ", "FAIL  ")) for line in lines)
    assert any(line.startswith("FAIL  ") for line in lines)


def test_a_lost_compaction_move_fails(folder: Path) -> None:
    (folder / "unmoved.py").write_text(
        HEAD + "\nclass Unmoved(TwoEnded):\n    def _relocate(self, moves, place):\n        pass\n"
    )
    found = check("unmoved.Unmoved", page_size=8)
    assert {what for what, why in found if why} == {str(PROPERTIES[-1].__doc__)}
    assert all(why is None for _, why in check("two_ended", page_size=8))


@pytest.mark.parametrize(
    "name",
    ["shared_pool", "shared_pool_carve", "large_block", "padded_page", "static_split", "byte_exact", "lcm_carve"],
)
def test_ours_keep_the_contract(name: str) -> None:
    found = check(name)
    assert len(found) == len(PROPERTIES) - (name in ("byte_exact", "lcm_carve"))
    assert [why for _, why in found] == [None] * len(found)


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert TwoEnded.supports_physical
    assert (
        main(
            [
                "shared_pool",
                "mode=carve",
                "kernel_block_tokens=8",
                "kernel_blocks_per_manager_block=9",
                "states_per_manager_block=2",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == len(PROPERTIES)
    for arguments, words in (
        ([], "usage: "),
        (["shared_pool", "carve"], "usage: "),
        (["no.such.Class"], "cannot be imported"),
        (["shared_pool", "mode=both"], "mode='both'"),
        (["shared_pool", "size=3"], "size=3: strategy shared_pool has no such option"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert words in captured.err


def test_it_runs_as_a_module(folder: Path) -> None:
    (folder / "twice.py").write_text(HEAD + BROKEN["loses a block"])
    ran = subprocess.run(
        [sys.executable, "-m", "hybridcache.strategies.check", "twice.Broken"],
        env={"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "FAIL  bookkeeping adds up" in ran.stdout
