"""What the code imports is what ``pyproject.toml`` declares."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"hybridcache", "models", "experiments", "benchmarks", "conf", "run"}
ENGINES = {"pyarrow"}
"""Imported by pandas alone, which reads and writes Parquet with it."""
PEERS = {"fla", "flash_attn", "flash_attn_interface", "flashinfer", "vllm"}
"""Compared with where they are there; nobody needs them."""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported(files: Iterable[Path]) -> dict[str, set[str]]:
    """Distributions that the files import, each with the files."""
    distributions, found = packages_distributions(), {}
    for file in files:
        local = OURS | {path.stem for path in file.parent.glob("*.py")}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - local - PEERS:
                for distribution in distributions.get(top, [top]):
                    found.setdefault(normalized(distribution), set()).add(file.relative_to(ROOT).as_posix())
    return found


def product() -> list[Path]:
    """What a wheel may hold; notebooks and tools for developers are not in it."""
    files = [ROOT / "run.py"]
    for folder in ("hybridcache", "models", "experiments"):
        files += (path for path in (ROOT / folder).rglob("*.py") if "notebooks" not in path.parts)
    return files


def test_the_product_imports_what_is_declared_and_nothing_else():
    found = imported(product())
    needed = declared(PROJECT["dependencies"])
    missing = {name: files for name, files in found.items() if name not in needed}
    assert not missing, "imported, not declared"
    assert not needed - found.keys() - ENGINES, "declared, not imported"


def test_benchmarks_and_tests_import_what_the_dev_extra_declares():
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    helpers = {"tests", *(normalized(path.stem) for path in files)}
    found = {name: files for name, files in imported(files).items() if name not in helpers}
    known = declared([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    missing = {name: files for name, files in found.items() if name not in known}
    assert not missing, "imported, not declared"
