"""Run the GPU tests and record the outcome: ``python -m tests.checks.gpu_tests --out benchmarks/results/gpu-tests.json``.

The record names device, versions and commit, and holds one line per test. Exit status is pytest's.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import ROOT, arguments, keep


class _Outcomes:
    """pytest plugin: collects the outcome and duration of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            entry: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.user_properties:
                entry["measured"] = [{name: value} for name, value in report.user_properties]
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                entry["reason"] = report.longrepr[2]
            self.tests[report.nodeid] = entry


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the record goes (JSON)")
    parser.add_argument("pytest_args", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    outcomes = _Outcomes()
    parallel = ["--dist", "loadgroup"] if "-n" in args.pytest_args else []
    status = pytest.main(["-m", "gpu", str(ROOT / "tests"), *parallel, *args.pytest_args], plugins=[outcomes])
    counts = Counter(entry["outcome"] for entry in outcomes.tests.values())
    keep(args.out, exit_status=int(status), counts=counts, tests=outcomes.tests)
    print(f"{args.out}: {dict(counts)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
