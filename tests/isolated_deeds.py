"""Work for the tests of isolation; a module of its own that imports little, since every process imports it."""

import os
import time
from collections.abc import Iterator


def deeds(item: str) -> Iterator[dict[str, object]]:
    """Two rows, between which some items raise, die or hang."""
    yield {"item": item, "process": os.getpid()}
    if item == "raises":
        raise ValueError("as told")
    if item == "dies":
        os._exit(7)
    if item == "hangs":
        time.sleep(600)
    yield {"item": item, "process": os.getpid(), "second": True}


def refuse_odd(number: int) -> None:
    if number % 2:
        raise ValueError(f"{number} is odd")
