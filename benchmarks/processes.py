"""Processes: items of work in a process of their own, so that one which crashes or never ends costs only itself; and many at
once, so that kernels are compiled side by side before they are timed one after another (Triton keeps what it compiles on disk).
"""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")
Row = dict[str, Any]
Work = Callable[[Any], Iterator[Row]]

START_S = 120.0
"""Seconds that a process may take to start."""
JOIN_S = 10.0


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_limited(command: Sequence[str], limit_s: float, **options: Any) -> int:
    """Exit status of a command, 124 where it took longer and was stopped with the processes that it started. ``options``: of
    :class:`subprocess.Popen`."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def isolated(work: Work, items: Sequence[Any], failed: Callable[[Any, str], Row], *, limit_s: float) -> Iterator[Row]:
    """Rows of ``work(item)`` for every item, as they come. The items share one process until one ends it; then the others
    get a new one.

    Args:
        work: can be pickled (a module's function, a method of a plain object); gives rows that can be.
        failed: the row of an item that raised, crashed its process or was stopped, given why.
        limit_s: seconds that may pass between two rows of an item before its process is stopped.
    """
    context, left = multiprocessing.get_context("spawn"), list(items)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(work, left, theirs), daemon=True)
        process.start()
        theirs.close()
        limit, reason = START_S, ""
        try:
            while left and not reason:
                if not ours.poll(limit):
                    reason = f"stopped: no answer within {limit:.0f} s"
                    continue
                kind, value = ours.recv()
                limit = limit_s
                if kind == "row":
                    yield value
                elif kind == "done":
                    left.pop(0)
                elif kind == "failed":
                    reason = value
        except EOFError:
            process.join(JOIN_S)
            reason = f"its process ended with status {process.exitcode}"
        finally:
            ours.close()
            process.join(0 if left else JOIN_S)
            process.kill()
            process.join(JOIN_S)
        if reason:
            yield failed(left.pop(0), reason)


def _serve(work: Work, items: Sequence[Any], connection: Connection) -> None:
    """In the other process: an exception ends it, since a device that failed once may fail everything after."""
    connection.send(("ready", None))
    for item in items:
        try:
            for row in work(item):
                connection.send(("row", row))
        except Exception as error:
            connection.send(("failed", describe(error)))
            return
        connection.send(("done", None))


def each_in_parallel(
    function: Callable[[Item], Found], items: Sequence[Item], workers: int | None = None
) -> Iterator[Found | Exception]:
    """``function(item)`` for every item, in new processes: what it returns or raises, in the items' order.

    Args:
        function: a module's function, or a ``partial`` of one.
        workers: processes; most of the machine's cores where None.
    """
    workers = workers or max((os.cpu_count() or 1) - 2, 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(function, item) for item in items]:
            try:
                yield future.result()
            except Exception as error:  # of one item, which must not hide the others
                yield error


def in_parallel(launch: Callable[[Item], None], items: Sequence[Item], workers: int | None = None) -> list[str]:
    """``launch(item)``, which compiles, for every item in new processes. Returns what failed, one line each: a kernel that
    does not build fails again where it is measured, and is reported there."""
    found = zip(items, each_in_parallel(launch, items, workers))
    return [f"{item}: {describe(error)}"[:400] for item, error in found if isinstance(error, Exception)]
