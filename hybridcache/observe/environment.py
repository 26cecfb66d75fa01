"""Environment: what a figure was measured with (versions, device, commit, command)."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("hybridcache", "torch", "triton", "transformers", "numpy", "hydra-core", "wandb", "pandas", "pyarrow")
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Everything a reader needs to place a figure. The command comes without the interpreter's path."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(),
        "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(), "device": device_name(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def commit() -> str | None:
    """The checkout's commit, ``-dirty`` where tracked files differ from it; ``HYBRIDCACHE_COMMIT`` where there is no git
    (a copied tree), None where nothing is known."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("HYBRIDCACHE_COMMIT")


def device_name() -> str:
    """The CUDA device's name, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
