"""Two trees against each other: the verdict on made-up samples, and this tree against itself with a tiny model."""

from pathlib import Path

import pytest

from benchmarks.serving_pair import TINY, compare, run_pair

ROOT = Path(__file__).resolve().parents[2]


def test_verdict():
    samples = {
        "chat": {"a": [100.0, 101.0, 99.0], "b": [98.5, 98.0, 120.0]},
        "short": {"a": [100.0], "b": [99.5]},
        "host_ms": {"a": [0.5, 0.6], "b": [0.6, 0.7]},
    }
    found = compare(samples, allowed=0.01)
    assert found["chat"]["ratio"] == pytest.approx(0.985)
    assert found["chat"]["spread"] == pytest.approx({"a": 101 / 99 - 1, "b": 120 / 98 - 1})
    assert {name: line["slower"] for name, line in found.items()} == {"chat": True, "short": False, "host_ms": True}
    assert found["host_ms"]["ratio"] == pytest.approx(0.55 / 0.65)


@pytest.mark.slow
def test_a_tree_against_itself():
    lines: list[str] = []
    found = run_pair({"a": ROOT, "b": ROOT}, rounds=2, tiny=True, fresh=False, report=lines.append)
    assert set(found["equal_tokens"]) == set(TINY)
    assert all(found["equal_tokens"].values())
    assert all(len(found["samples"][name][tree]) == 2 for name in TINY for tree in "ab")
    assert all(value > 0 for value in found["samples"]["host_ms"]["a"])
    served = [line.split(": ")[1].split()[:2] for line in lines if line.startswith("round")]
    assert served[:2] == [["a", "bs1"], ["b", "bs1"]]
    assert served[len(TINY) * 2 :][:2] == [["b", "bs1"], ["a", "bs1"]]


def test_a_tree_that_does_not_start_is_told(tmp_path, capfd):
    (tmp_path / "hybridcache").mkdir()
    (tmp_path / "hybridcache" / "__init__.py").write_text("raise ImportError('hybridcache is broken')")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_pair({"a": tmp_path, "b": ROOT}, rounds=1, tiny=True, fresh=False, report=lambda text: None)
    assert "hybridcache is broken" in capfd.readouterr().err
