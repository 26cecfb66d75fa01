"""Plant faults one at a time, and count those that the tests notice: ``python -m tests.checks.mutants``.

    python -m tests.checks.mutants [--list] [--only NAME]... [--jobs 2] [--out mutants.json]

``planted_faults.yaml`` holds the faults by file: a name that says what is wrong, the text of the source and what is planted
in its place, and the narrow tests that must notice. Every fault is planted in a scratch copy of the tree (what git tracks or
would track), never in the checkout. A fault is

* *killed* where one of its tests fails (or does not end),
* *survived* where all of them pass: a test is missing,
* *stale* where its text does not stand exactly once in its file, or its tests cannot be collected: the list is to be mended.

All these tests must pass in a copy without a fault, too. Exit status 1: they do not, less than 90 % of the faults are killed,
or one is stale.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("planted_faults.yaml")
SHARE = 0.9
"""Of the faults that must be killed."""
LIMIT_S = 300.0
"""Seconds that the tests of one fault may take."""
SECONDS = itertools.count(int(time.time()) + 10)
PRELOADED = ("torch", "transformers", "pandas", "matplotlib.figure", "hydra", "hypothesis", "pytest")
"""Imported once, for every process that runs tests is forked from one that has them."""
OWN = ("hybridcache", "models", "experiments", "benchmarks", "tests")
"""Packages of the tree, which every such process imports anew."""


@dataclass(frozen=True)
class Fault:
    """One fault: ``new`` stands in ``file`` instead of ``old``, and one of ``tests`` (pytest's ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one fault: ``killed``, ``survived`` or ``stale``; ``by`` is the test that failed, or why it is stale."""

    name: str
    file: str
    outcome: str
    by: str = ""


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """The faults of a file.

    Raises:
        ValueError: two have the same name, or one changes nothing or has no test.
    """
    found = [
        Fault(each["fault"], file, each["old"], each["new"], tuple(each["tests"]))
        for file, faults in yaml.safe_load(path.read_text(encoding="utf-8")).items()
        for each in faults
    ]
    counts = Counter(fault.name for fault in found)
    for fault in found:
        if counts[fault.name] > 1 or fault.old == fault.new or not fault.tests:
            raise ValueError(f"{path}: {fault.name!r}: is there twice, changes nothing or has no test")
    return found


def copy_tree(root: Path, to: Path) -> None:
    """Copy what git tracks, or would track, of a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # one that was deleted is listed until the deletion is committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, to / name)


def run_tests(tree: Path, tests: Iterable[str], *options: str, limit_s: float = LIMIT_S) -> tuple[int | None, str]:
    """Pytest's exit status in a tree (None where it did not end in time), and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        arguments = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *options, *tests]
        process = context.Process(target=_pytest, args=(str(tree), arguments, log.name))
        process.start()
        process.join(limit_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None, f"no end within {limit_s:.0f} s"
        return process.exitcode, log.read()


def _pytest(tree: str, arguments: list[str], log: str) -> None:
    """In a process forked from one that has imported what takes seconds, but nothing of the tree."""
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    sys.path[:] = [tree, *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    os.environ.update(PYTHONPATH=tree, OMP_NUM_THREADS="1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.chdir(tree)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        status = int(pytest.main(arguments))
        sys.stdout.flush()
    os._exit(status)


def failed(text: str) -> list[str]:
    """Ids of the tests that failed, as pytest's summary names them."""
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)


def rewrite(path: Path, text: str) -> None:
    """Write a source file in a second of its own: bytecode is told from its source by size and second of the change."""
    path.write_text(text, encoding="utf-8")
    second = next(SECONDS)
    os.utime(path, (second, second))


def try_fault(fault: Fault, tree: Path, limit_s: float = LIMIT_S) -> Outcome:
    """Plant a fault in a scratch tree, run its tests, and take it out again."""

    def outcome(what: str, by: str = "") -> Outcome:
        return Outcome(fault.name, fault.file, what, by)

    path = tree / fault.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if source.count(fault.old) != 1:
        return outcome("stale", f"its text stands {source.count(fault.old)} times in {fault.file}")
    rewrite(path, source.replace(fault.old, fault.new))
    try:
        status, text = run_tests(tree, fault.tests, "-x", limit_s=limit_s)
    finally:
        rewrite(path, source)
    if status is None:
        return outcome("killed", text)
    if status == 1:
        return outcome("killed", next(iter(failed(text)), ""))
    return outcome("survived") if status == 0 else outcome("stale", " ".join(text.split())[-300:])


def try_faults(
    faults: Sequence[Fault], root: Path = ROOT, jobs: int = 1, tell: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Try faults of a checkout, ``jobs`` at a time, each in a scratch copy.

    Args:
        tell: called with every outcome as it comes.

    Raises:
        RuntimeError: a test fails without a fault, or its modules are not the copy's.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            tree = Path(folder) / str(number)
            copy_tree(root, tree)
            trees.put(tree)
        tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))

        def without_fault() -> None:
            tree = trees.get()
            try:
                status, text = run_tests(tree, tests, limit_s=LIMIT_S + 10 * len(tests))
            finally:
                trees.put(tree)
            if status != 0:
                raise RuntimeError(f"without a fault: {', '.join(failed(text)) or ' '.join(text.split())[-600:]}")

        def one(fault: Fault) -> Outcome:
            tree = trees.get()
            try:
                found = try_fault(fault, tree)
            finally:
                trees.put(tree)
            tell(found)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            sound = pool.submit(without_fault)
            outcomes = list(pool.map(one, faults))
            sound.result()
            return outcomes


def passes(outcomes: Sequence[Outcome]) -> bool:
    """Whether enough faults were killed, and none is stale."""
    counts = Counter(each.outcome for each in outcomes)
    return not counts["stale"] and counts["killed"] >= SHARE * len(outcomes)


def as_json(record: dict[str, Any], outcomes: Iterable[Outcome]) -> str:
    """A record with its faults, a line each."""
    rows = ",\n".join(f"  {json.dumps(asdict(each))}" for each in outcomes)
    return f'{json.dumps(record, indent=1)[:-2]},\n "faults": [\n{rows}\n ]\n}}\n'


def show(outcome: Outcome) -> None:
    print(f"{outcome.outcome:9} {outcome.name}{f'  [{outcome.by}]' if outcome.by else ''}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="faults whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    faults = [f for f in read_faults() if not args.only or any(part in f.name or part in f.file for part in args.only)]
    if not faults:
        parser.error(f"--only {' '.join(args.only)}: no fault has such a name or file; --list names them")
    if args.list:
        for fault in faults:
            print(f"{fault.file}: {fault.name}")
        return 0
    from hybridcache.observe.environment import environment  # here: processes that run tests import this module

    where, started = environment(), time.perf_counter()
    try:
        outcomes = try_faults(faults, jobs=args.jobs, tell=show)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - started
    counts = Counter(each.outcome for each in outcomes)
    if args.out is not None:
        record = {
            "environment": where,
            "seconds": round(seconds, 1),
            "planted": len(outcomes),
            **{name: counts[name] for name in ("killed", "survived", "stale")},
        }
        args.out.write_text(as_json(record, outcomes))
    print(f"{len(outcomes)} faults in {seconds:.0f} s: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return 0 if passes(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
