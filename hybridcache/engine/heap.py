"""Heap: Python's garbage collector, kept from looking through everything in the middle of serving."""

import gc


def settle_heap() -> None:
    """Free what is dead, and exempt what is alive from later collections, until this is called again.

    A full collection looks at every object of the process: with PyTorch and Transformers loaded some 400,000, for 150 to 500
    ms, in which no step is launched. What exists before the first request mostly lives as long as the process.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
