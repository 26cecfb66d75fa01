"""Runs ``tests/interpreter`` in a process of its own: Triton decides at import whether kernels are interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import SUBPROCESS_S
from packaging.version import Version

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[1] / "interpreter"


def test_kernels_match_their_references_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        command, env=env, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=SUBPROCESS_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    skipped = re.search(r"(\d+) skipped", done.stdout)
    if Version(triton.__version__) >= Version("3.7"):
        assert not skipped, done.stdout
    assert int(passed.group(1)) + (int(skipped.group(1)) if skipped else 0) >= 40, done.stdout
