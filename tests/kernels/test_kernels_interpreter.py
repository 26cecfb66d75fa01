"""Runs each file of ``tests/interpreter`` in a process of its own: Triton decides at import whether kernels are interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import SUBPROCESS_S
from packaging.version import Version

triton = pytest.importorskip("triton")

FILES = sorted((Path(__file__).resolve().parents[1] / "interpreter").glob("test_*.py"))


def functions(file: Path) -> int:
    return len(re.findall(r"^def test_", file.read_text(), re.MULTILINE))


def test_nothing_is_left_out():
    assert len(FILES) >= 10
    assert sum(map(functions, FILES)) >= 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_interpreted_"))
def test_kernels_match_their_references_in_the_interpreter(file):
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=env, cwd=file.parents[2], capture_output=True, text=True, timeout=SUBPROCESS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    skipped = re.search(r"(\d+) skipped", done.stdout)
    if Version(triton.__version__) >= Version("3.7"):
        assert not skipped, done.stdout
    assert int(passed.group(1)) + (int(skipped.group(1)) if skipped else 0) >= functions(file), done.stdout
