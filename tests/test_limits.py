"""A test that hangs ends by itself, whether Python runs in it or not."""

import os
import subprocess
import sys
from pathlib import Path

from limits import SUBPROCESS_S

TESTS = Path(__file__).resolve().parent
HANGS_IN_PYTHON = """
import time

def test_hangs():
    while True:
        time.sleep(0.1)

def test_after_it():
    pass
"""
HANGS_IN_C = """
import itertools

def test_hangs():
    sum(itertools.repeat(1, 10**15))
"""


def start(file: Path, text: str) -> subprocess.Popen[str]:
    file.write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HYBRIDCACHE_TEST_PATIENCE": "0.002"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.Popen(
        command, cwd=file.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_test_that_hangs_fails_and_the_others_run(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    runs = [start(tmp_path / "test_python.py", HANGS_IN_PYTHON), start(tmp_path / "test_c.py", HANGS_IN_C)]
    (python, _), (c, _) = (run.communicate(timeout=SUBPROCESS_S) for run in runs)
    assert runs[0].returncode == 1
    assert "Timeout (>4.8s) from pytest-timeout" in python
    assert "1 failed, 1 passed" in python
    assert runs[1].returncode == 1
    assert "Timeout (0:00:07" in c, c
    assert "in test_hangs" in c  # the stack of the hanging test
