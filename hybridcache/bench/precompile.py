"""Precompile: kernels compiled by several processes at once, before a benchmark times them one after another.

Triton keeps what it compiles on disk by source, constants and argument types, so a process that launches a kernel on small
inputs of the same kinds spares all others the wait.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def in_parallel(launch: Callable[[Item], None], items: Sequence[Item], workers: int | None = None) -> list[str]:
    """``launch(item)`` for every item, in new processes. Returns what failed, one line each: a kernel that does not build
    fails again where it is measured, and is reported there.

    Args:
        launch: a module's function; compiles, best by launching on small inputs.
        workers: processes; most of the machine's cores where None.
    """
    workers = min(workers or max((os.cpu_count() or 1) - 2, 1), len(items))
    if not items:
        return []
    errors = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for item, future in [(item, pool.submit(launch, item)) for item in items]:
            error = future.exception()
            if error is not None:
                errors.append(f"{item}: {type(error).__name__}: {' '.join(str(error).split())}"[:400])
    return errors
