"""Imports go one way: no module imports itself through others, and the contracts in ``pyproject.toml`` hold."""

import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from limits import SUBPROCESS_S

ROOT = Path(__file__).resolve().parent.parent


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert set(circle({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.fixture
def imports(monkeypatch) -> dict[str, set[str]]:
    """Module -> modules that it imports, also inside functions; not what only type checkers import."""
    monkeypatch.syspath_prepend(str(ROOT))
    graph = grimp.build_graph(
        "hybridcache", "models", "experiments", exclude_type_checking_imports=True, cache_dir=None
    )
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_module_imports_itself_through_others(imports):
    assert len(imports) > 150
    assert circle(imports) == []


def test_the_contracts_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SUBPROCESS_S)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout
