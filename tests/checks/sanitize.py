"""Runs the kernels of every cache operation once on small shapes under NVIDIA's compute-sanitizer, and records what it finds.

    python -m tests.checks.sanitize --out benchmarks/results/sanitize-h100.json

Kernels are compiled first, in parallel and without the sanitizer, so that under it they are only launched. Then one process
per tool launches them one after another: ``memcheck`` (accesses out of bounds, each tensor in an allocation of its own) and
``racecheck`` (hazards in shared memory). A clean report of memcheck proves something only if it sees a fault: the last
kernel, ``planted``, writes beyond its tensor; racecheck has no such proof here. Findings belong to the kernel that was
running.

Racecheck reports hazards in what Triton generates for ``gl.warp_specialize``: the dispatching warps' command bytes and captured
arguments in shared memory, between the kernel's ``def`` line and the call. Findings on those lines alone are counted as
``dispatch``. They are no failure where the very PTX that ran proves them false (``tests/dispatch_proof.py``): a barrier of
all threads stands between every such write and read. Any location beside them is a failure, as is a proof that does not hold.

Exit status 1: a finding, a kernel that did not finish, a report without a summary, or a planted fault that was not
found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from dispatch_proof import unordered  # noqa: E402
from kernels_once import PLANTED, here, launch  # noqa: E402

from benchmarks.processes import describe, in_parallel, run_limited  # noqa: E402
from benchmarks.record import arguments, keep  # noqa: E402

TOOLS = ("memcheck", "racecheck")
REST = "(unattributed)"
MARK = "SANITIZE"
SETTLE_S = 0.1
"""Between a kernel's end and the next one's mark, for the sanitizer's report to be written."""
MESSAGES, MESSAGE_CHARS = 3, 300
SUMMARY = {
    "memcheck": re.compile(r"^========= ERROR SUMMARY: (\d+) errors?()", re.MULTILINE),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)"),
}
"""Errors and warnings in all."""
NO_FINDING = (
    "COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application", "Process ID", "Info",
)  # fmt: skip


def launch_all(names: list[str]) -> None:
    """In the process under the sanitizer: a mark before and after every kernel."""
    for name in names:
        print(f"{MARK} begin {name}", flush=True)
        started = time.perf_counter()
        try:
            launch(name)
        except Exception as error:
            print(f"{MARK} error {describe(error)[:MESSAGE_CHARS]}", flush=True)
        time.sleep(SETTLE_S)
        print(f"{MARK} end {time.perf_counter() - started:.3f}", flush=True)


# -- reports -------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one tool finds of one kernel."""

    seconds: float | None = None
    failure: str | None = None
    messages: list[str] = field(default_factory=list)
    """One per finding, its lines joined."""
    more_errors: int = 0
    more_warnings: int = 0
    """Those that the summary counts and no message shows."""

    @property
    def warnings(self) -> int:
        return sum(message.startswith("Warning") for message in self.messages) + self.more_warnings

    @property
    def errors(self) -> int:
        return sum(not message.startswith("Warning") for message in self.messages) + self.more_errors

    @property
    def dispatched(self) -> list[str]:
        """Kernels that findings name of which no location lies outside Triton's dispatch of warps."""
        return sorted({kernel for message in self._dispatch for kernel, *_ in PLACE.findall(message)})

    @property
    def dispatch(self) -> int:
        """Those findings."""
        return len(self._dispatch)

    @property
    def _dispatch(self) -> list[str]:
        return [message for message in self.messages if message.startswith("Error") and is_dispatch(message)]

    def record(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("errors", "warnings", "dispatch", "dispatched")}
        messages = [message[:MESSAGE_CHARS] for message in self.messages[:MESSAGES]]
        return {**counts, "seconds": self.seconds, "failure": self.failure, "messages": messages}


PLACE = re.compile(r"(\w+)\+0x[0-9a-f]+ in (\S+\.py):(\d+)")


def is_dispatch(message: str) -> bool:
    """Whether every location that a finding names is the ``def`` of a kernel or its ``gl.warp_specialize`` call."""
    places = PLACE.findall(message)
    lines = [_line(*place) for place in places]
    return 0 < len(places) == message.count("+0x") and all(re.match(r"def |\s*gl\.warp_specialize\(", x) for x in lines)


def _line(kernel: str, file: str, number: str) -> str:
    lines = source_of(kernel, file).splitlines()
    return lines[int(number) - 1] if int(number) <= len(lines) else ""


@cache
def source_of(kernel: str, file: str = "*.py") -> str:
    """Text of the project's file of that name which defines the kernel; empty where there is none."""
    for path in (ROOT / "hybridcache").rglob(Path(file).name):
        text = path.read_text()
        if f"def {kernel}(" in text:
            return text
    return ""


def disproof(kernel: str, folder: Path) -> list[str]:
    """Why hazards in that kernel's dispatch are not proven false, in lines, from every module that a cache of Triton's in the
    folder holds of it; nothing where they are."""
    modules = sorted(folder.rglob(f"{kernel}.ptx"))
    if not modules:
        return [f"{kernel}: no PTX in {folder}"]
    return [line for path in modules for line in unordered(path.read_text(), kernel, source_of(kernel))]


def parse(text: str) -> dict[str, Found]:
    """Findings by kernel, from the marks of :func:`launch_all` and the sanitizer's report between them."""
    found: dict[str, Found] = {}
    name = REST
    for line in text.splitlines():
        if mark := re.match(rf"{MARK} (begin|end|error) (.*)", line):
            kind, value = mark.groups()
            if kind == "begin":
                name = value
                found[name] = Found()
            elif kind == "error":
                found[name].failure = value
            else:
                found[name].seconds = float(value)
                name = REST
            continue
        body = line.removeprefix("========= ")
        if body == line or not body.strip() or body.startswith(NO_FINDING):
            continue
        at = found.setdefault(name, Found())
        if not body.startswith(" "):
            at.messages.append(body)
        elif at.messages:
            at.messages[-1] += f" | {body.strip()}"
    return found


def add_rest(found: dict[str, Found], tool: str, text: str) -> None:
    """What the summary counts and no kernel's report shows. Without a summary the report is not whole, which is a failure."""
    rest = found.setdefault(REST, Found())
    summary = SUMMARY[tool].search(text)
    if summary is None:
        rest.failure = rest.failure or "the report has no summary"
        return
    errors, warnings = (int(count or 0) for count in summary.groups())
    rest.more_errors = max(errors - sum(each.errors for each in found.values()), 0)
    rest.more_warnings = max(warnings - sum(each.warnings for each in found.values()), 0)


def find_sanitizer() -> str:
    """Path of compute-sanitizer: on the PATH, or of a CUDA toolkit in its usual place.

    Raises:
        SystemExit: it is nowhere.
    """
    places = [shutil.which("compute-sanitizer"), *sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    for place in places:
        if place and os.access(place, os.X_OK):
            return str(place)
    sys.exit("error: compute-sanitizer is neither on the PATH nor in /usr/local/cuda*/bin; install the CUDA toolkit")


def sanitize(sanitizer: str, tool: str, names: list[str], limit_s: float) -> tuple[dict[str, Found], str]:
    """Findings of one tool by kernel, and its whole report."""
    env = dict(os.environ)
    if tool == "memcheck":
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        names = [*names, PLANTED]
    options = ["--print-limit", "1000", "--report-api-errors", "no", "--target-processes", "application-only"]
    child = [sys.executable, "-m", "tests.checks.sanitize", "--launch", *names]
    with tempfile.TemporaryFile("w+") as report:
        command = [sanitizer, "--tool", tool, *options, *child]
        status = run_limited(command, limit_s, stdout=report, stderr=subprocess.STDOUT, env=env)
        report.seek(0)
        text = report.read()
    failure = {0: None, 124: f"stopped after {limit_s:.0f} s"}.get(status, f"exit status {status}")
    found = parse(text)
    for name in names:
        at = found.setdefault(name, Found(failure="not reached"))
        if at.seconds is None and at.failure is None:
            at.failure = "did not finish"
    add_rest(found, tool, text)
    found[REST].failure = failure or found[REST].failure
    return found, text


def verdict(tool: str, found: dict[str, Found], proven: Container[str] = ()) -> list[str]:
    """What is wrong, in lines; nothing where all is well. Hazards in the dispatch of the kernels that are ``proven`` to have
    none are no fault."""
    wrong = []
    for name, at in found.items():
        if name == PLANTED:
            if not at.errors:
                wrong.append(f"{tool}: the planted fault was not found, so a clean report proves nothing")
            continue
        excused = at.dispatch if all(kernel in proven for kernel in at.dispatched) else 0
        if at.errors - excused or at.warnings:
            wrong.append(f"{tool}: {name}: {at.errors} errors, {at.warnings} warnings: {'; '.join(at.messages)}")
        if at.failure:
            wrong.append(f"{tool}: {name}: {at.failure}")
    return wrong


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--limit-s", type=float, default=50.0, help="seconds for one tool")
    parser.add_argument("--launch", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launch:
        launch_all(args.launch)
        return 0
    if args.out is None:
        parser.error("--out is needed")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to sanitize")
    sanitizer, started = find_sanitizer(), time.perf_counter()
    told = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout
    version = next((line.strip() for line in told.splitlines() if "ersion" in line), told.strip())
    wrong = [f"without a sanitizer: {line}" for line in in_parallel(launch, here())]
    times = {"compile_seconds": time.perf_counter() - started}
    records: list[dict[str, Any]] = []
    proofs: dict[str, list[str]] = {}
    for tool in args.tools:
        found, report = sanitize(sanitizer, tool, here(), args.limit_s)
        kernels = {kernel for at in found.values() for kernel in at.dispatched}
        proofs |= {kernel: disproof(kernel, Path(triton.knobs.cache.dir)) for kernel in sorted(kernels)}
        lines = verdict(tool, found, [kernel for kernel in kernels if not proofs[kernel]])
        wrong += lines
        records += [{"tool": tool, "kernel": name, **at.record(), "version": version} for name, at in found.items()]
        if lines:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(f".{tool}.txt").write_text(report)
    times["seconds"] = time.perf_counter() - started
    keep(args.out, version=version, **times, wrong=wrong, dispatch_not_proven_ordered=proofs, records=records)
    columns = ["tool", "kernel", "errors", "dispatch", "warnings", "failure"]
    print(pd.DataFrame(records)[columns].to_string(index=False))
    print("\n".join([*wrong, f"{version}; {len(wrong)} faults, {len(records)} records: {args.out}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
