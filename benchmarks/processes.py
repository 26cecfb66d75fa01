"""Processes: items of work in a process of their own, so that one which crashes or never ends costs only itself; and many at
once, so that kernels are compiled side by side before they are timed one after another (Triton keeps what it compiles on disk).
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")
Row = dict[str, Any]
Work = Callable[[Any], Iterator[Row]]

JOIN_S = 10.0


def isolated(
    work: Work, items: Sequence[Any], failed: Callable[[Any, str], Row], *, limit_s: float, start_s: float = 120.0
) -> Iterator[Row]:
    """Rows of ``work(item)`` for every item, as they come. The items share one process until one ends it; then the others
    get a new one.

    Args:
        work: can be pickled (a module's function, a method of a plain object); gives rows that can be.
        failed: the row of an item that raised, crashed its process or was stopped, given why.
        limit_s: seconds that may pass between two rows of an item before its process is stopped.
        start_s: seconds that a process may take to start.
    """
    context = multiprocessing.get_context("spawn")
    left = list(items)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(work, left, theirs), daemon=True)
        process.start()
        theirs.close()
        done, limit = 0, start_s
        try:
            while True:
                if not ours.poll(limit):
                    yield failed(left[done], f"stopped: no answer within {limit:.0f} s")
                    break
                kind, value = ours.recv()
                limit = limit_s
                if kind == "row":
                    yield value
                elif kind == "done":
                    done += 1
                    if done == len(left):
                        return
                elif kind == "failed":
                    yield failed(left[done], value)
                    break
        except EOFError:
            process.join(JOIN_S)
            yield failed(left[done], f"its process ended with status {process.exitcode}")
        finally:
            ours.close()
            if process.is_alive():
                process.join(JOIN_S if done == len(left) else 0)
                process.kill()
                process.join(JOIN_S)
        left = left[done + 1 :]


def _serve(work: Work, items: Sequence[Any], connection: Connection) -> None:
    """In the other process: an exception ends it, since a device that failed once may fail everything after."""
    connection.send(("ready", None))
    for item in items:
        try:
            for row in work(item):
                connection.send(("row", row))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"))
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
    workers = min(workers or max((os.cpu_count() or 1) - 2, 1), len(items))
    if not items:
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(function, item) for item in items]:
            try:
                yield future.result()
            except Exception as error:  # of one item, which must not hide the others
                yield error


def in_parallel(launch: Callable[[Item], None], items: Sequence[Item], workers: int | None = None) -> list[str]:
    """``launch(item)`` for every item, in new processes. Returns what failed, one line each: a kernel that does not build
    fails again where it is measured, and is reported there.

    Args:
        launch: compiles, best by launching on small inputs.
        workers: as of :func:`each_in_parallel`.
    """
    return [
        f"{item}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
        for item, error in zip(items, each_in_parallel(launch, items, workers))
        if isinstance(error, Exception)
    ]
