"""Builds the wheel. The repository's top level holds folders whose names would be too general among other people's
packages; the wheel holds them inside ``hybridcache``, and imports and dotted names in these copies say so. An editable
install takes the repository as it is.

| in the repository | in the wheel |
|---|---|
| ``models/``, ``experiments/``, ``conf/``, ``run.py`` | the same below ``hybridcache/``, without notebooks |
| ``benchmarks/`` | the same, without ``results/`` |
"""

import ast
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MOVED = ("models", "experiments", "benchmarks", "run")
DATA = (".yaml", ".html", ".json", ".txt")
_NAMES = "|".join(MOVED)
_IN_A_STRING = re.compile(rf"""(?<=["'])(?:{_NAMES})\.(?:(?={{)|[\w.]+(?=(?::\w+)?["']))""")
"""A quoted module (``a.b`` or ``a.b:Name``), or the beginning of an f-string that names one."""


class BuildPy(build_py):
    """Adds what lies beside the package, and renames imports of it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "hybridcache"
        for source in sources():
            target = package / source.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))
        for file in package.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            renamed = rename(text, str(file))
            if renamed != text:
                file.write_text(renamed, encoding="utf-8")


def sources() -> list[Path]:
    """Files of the repository that the wheel holds besides the package's own."""
    found = [ROOT / "run.py"]
    for name in ("models", "experiments", "conf"):
        files = [path for path in sorted((ROOT / name).rglob("*")) if path.suffix in (".py", *DATA)]
        found += [path for path in files if not {"notebooks", "__pycache__"} & set(path.parts)]
    return [*found, *sorted((ROOT / "benchmarks").glob("*.py"))]


def rename(text: str, file: str) -> str:
    """The source with ``models.x`` as ``hybridcache.models.x``, and so on, in imports and in strings that name modules."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] not in MOVED:
                continue
            if isinstance(node, ast.Import) and node.names[0].asname is None:
                raise SystemExit(f"{file}:{node.lineno}: write `import {name} as ...`, which the wheel can rename")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(rf"\b(from|import) {name}\b", rf"\1 hybridcache.{name}", line, count=1)
    return _IN_A_STRING.sub(_renamed_string, "".join(lines))


def _renamed_string(match: re.Match[str]) -> str:
    path = ROOT.joinpath(*match[0].split("."))
    known = match[0].endswith(".") or path.is_dir() or path.with_suffix(".py").is_file()
    return f"hybridcache.{match[0]}" if known else match[0]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
