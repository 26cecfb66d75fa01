"""Compilations: which kernels Triton compiles while something is timed. A timed run should have none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of kernels that this process compiles, or loads from Triton's cache on disk, while the context lasts. Always
    empty where Triton is not installed or interprets."""
    names: list[str] = []
    try:
        from triton import knobs
    except ModuleNotFoundError:
        yield names
        return
    before = knobs.runtime.jit_post_compile_hook

    def compiled(**event: Any) -> bool | None:
        names.append(event["fn"].name.rsplit(".", 1)[-1])
        return None if before is None else before(**event)

    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before
