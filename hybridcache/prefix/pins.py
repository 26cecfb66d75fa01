"""Pins: prompts whose checkpoints are kept until their user lets them go (``LLM.pin``)."""

from collections.abc import Iterator

import numpy as np

from hybridcache.errors import bad
from hybridcache.prefix.placement import floor_position
from hybridcache.prefix.points import Point


class Pin:
    """One pinned prompt."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        """int32."""
        before = floor_position(len(tokens) - 1)
        self.positions = (before, len(tokens)) if before else (len(tokens),)
        """Where its checkpoints lie: at the last multiple of 64 before its end, and there."""


class Pins:
    """All pinned prompts; there are few."""

    def __init__(self) -> None:
        self._pins: list[Pin] = []

    def add(self, tokens: np.ndarray) -> Pin:
        """Pin a prompt (int32). The same one may be pinned several times."""
        self._pins.append(Pin(tokens))
        return self._pins[-1]

    def remove(self, pin: Pin) -> None:
        """Raises UserError where the pin is none (any more)."""
        if pin not in self._pins:
            raise bad("pin", pin, "is not pinned; give what pin() returned, once")
        self._pins.remove(pin)

    def hold(self, point: Point) -> bool:
        """Whether a checkpoint is one of a pin's."""
        some = [pin for pin in self._pins if point.position in pin.positions]
        return bool(some) and any(_begins(point.node.prefix(), pin.tokens[: point.position]) for pin in some)

    def inside(self, tokens: np.ndarray) -> Iterator[int]:
        """Positions of pins inside a prompt that begins with them, at which a prefill kernel can keep states."""
        for pin in self._pins:
            for position in pin.positions:
                if floor_position(position) == position and _begins(tokens, pin.tokens[:position]):
                    yield position


def _begins(tokens: np.ndarray, head: np.ndarray) -> bool:
    return len(tokens) >= len(head) and np.array_equal(tokens[: len(head)], head)
