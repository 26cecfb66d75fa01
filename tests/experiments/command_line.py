"""The entry point, called in this process or in a shell."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``run.py`` in a process of its own; the limit leaves room for a machine that does eight things at once."""
    import os

    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=env)


def error_line(monkeypatch, capsys, *arguments: str) -> str:
    """The one line on stderr with which the entry point must end, called in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    import run as entry

    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stopped.value.code not in (0, None), lines
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]
