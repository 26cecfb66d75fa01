"""The script that plants faults: it sees one die, one survive and one that is stale, and leaves the checkout alone."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.checks import mutants
from tests.checks.mutants import Fault, Outcome, passes, read_faults, try_fault, try_faults

SOURCE = "def area(width, height):\n    return width * height\n\n\ndef name():\n    return 'a'\n"
TEST = "from shapes import area\n\n\ndef test_area():\n    assert area(2, 3) == 6\n"


def fault(old: str, new: str, *tests: str) -> Fault:
    return Fault(f"{old} is {new}", "shapes.py", old, new, tests or ("test_shapes.py::test_area",))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with a file that git ignores."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for name, text in {"shapes.py": SOURCE, "test_shapes.py": TEST, ".gitignore": "runs/\n", "runs/big": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_fault_dies_survives_or_is_stale(checkout: Path) -> None:
    faults = [
        fault("width * height", "width + height"),
        fault("'a'", "'b'"),
        fault("depth", "width"),
        fault("return", "return 1 +"),  # stands twice
        fault("width * height", "width - height", "test_shapes.py::test_volume"),
        fault("width * height", "width * height\n    ("),
    ]
    told: list[Outcome] = []
    found = try_faults(faults[:2], checkout, jobs=2, tell=told.append)
    assert sorted(told, key=lambda each: each.name) == sorted(found, key=lambda each: each.name)
    assert [(each.outcome, each.by) for each in found] == [("killed", "test_shapes.py::test_area"), ("survived", "")]
    assert [try_fault(each, checkout).outcome for each in faults[2:]] == ["stale"] * 4
    assert (checkout / "shapes.py").read_text() == SOURCE, "a fault was left behind"


def test_faults_of_one_size_planted_within_a_second_are_told_apart(checkout: Path) -> None:
    """Bytecode of the one before would be taken for the next one's."""
    found = [try_fault(fault("width * height", new), checkout).outcome for new in ("height * width", "width + height")]
    found += [try_fault(fault("width * height", new), checkout).outcome for new in ("width - height", "height*width  ")]
    assert found == ["survived", "killed", "killed", "survived"]
    assert list(checkout.rglob("*.pyc"))


def test_a_test_that_does_not_end_notices(checkout: Path) -> None:
    endless = fault("return width * height", "while True: pass")
    assert try_fault(endless, checkout, limit_s=5.0).outcome == "killed"


def test_faults_prove_nothing_where_tests_fail_anyway(checkout: Path) -> None:
    (checkout / "test_shapes.py").write_text(TEST.replace("6", "7"))
    with pytest.raises(RuntimeError, match=r"without a fault: test_shapes.py::test_area"):
        try_faults([fault("width * height", "width + height")], checkout)


def test_what_git_ignores_is_not_copied(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    mutants.copy_tree(checkout, copy)
    assert sorted(path.name for path in copy.iterdir()) == [".gitignore", "shapes.py", "test_shapes.py"]


@pytest.mark.parametrize(
    ("killed", "survived", "stale", "good"), [(9, 1, 0, True), (8, 2, 0, False), (9, 0, 1, False), (1, 0, 0, True)]
)
def test_nine_of_ten_must_die_and_none_may_be_stale(killed: int, survived: int, stale: int, good: bool) -> None:
    counts = {"killed": killed, "survived": survived, "stale": stale}
    assert passes([Outcome("x", "y", what) for what, count in counts.items() for _ in range(count)]) is good


def test_the_list_fits_the_tree() -> None:
    """Every fault's text stands once in its file, and its tests exist; whoever changes either mends the list."""
    faults = read_faults()
    assert len(faults) >= 125
    for each in faults:
        assert (mutants.ROOT / each.file).read_text().count(each.old) == 1, each.name
        for test in each.tests:
            path, _, name = test.partition("::")
            text = (mutants.ROOT / path).read_text()
            assert f"def {name.partition('[')[0]}(" in text or not name, test


def test_a_record_has_a_line_for_each_fault() -> None:
    outcomes = [Outcome("x", "y.py", "killed", "t.py::t"), Outcome('"', "y.py", "survived")]
    text = mutants.as_json({"planted": 2, "environment": {"python": "3"}}, outcomes)
    assert json.loads(text)["faults"] == [vars(each) for each in outcomes]
    assert json.loads(text)["environment"] == {"python": "3"}
    assert sum("y.py" in line for line in text.splitlines()) == 2


def test_a_list_that_plants_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("a.py:\n- {fault: same, old: x, new: x, tests: [t.py]}\n")
    with pytest.raises(ValueError, match="'same'"):
        read_faults(path)


def test_the_command_line(capsys: pytest.CaptureFixture) -> None:
    assert mutants.main(["--list", "--only", "observe/metrics.py"]) == 0
    assert "hybridcache/observe/metrics.py: p99 is p90\n" in capsys.readouterr().out
    for wrong in (["--only", "no such fault"], ["--jobs", "0"]):
        with pytest.raises(SystemExit, match="2"):
            mutants.main(wrong)
