"""Garbage: keeps Python's collector from walking every object in the middle of serving."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def settle_heap() -> None:
    """Free what is dead, and exempt what is alive from later collections, until this is called again.

    A full collection looks at every object of the process: with PyTorch and Transformers loaded some 400,000, for 150 to 500
    ms, in which no step is launched. What exists before the first request mostly lives as long as the process.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextmanager
def unswept() -> Iterator[None]:
    """Free what is dead, then let no collection run inside.

    CUDA graphs of an engine that nobody holds any more are freed by a collection, wherever one happens to run; where it runs
    inside the capture of another graph, CUDA refuses the one and voids the other (cudaErrorStreamCaptureInvalidated).
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
