"""How the products of experts in tiles are cut, and which cut a call gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """How one of the two products is cut: ``columns`` of the matrix (of gate, and of up) and ``dims`` of what is summed
    over at a time, pipeline stages, warps."""

    columns: int
    dims: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """``rows`` assignments of a tile, and its two products."""

    rows: int
    swap: bool
    gate_up: Product
    down: Product


FEW = Tiles(16, True, Product(64, 128, 3, 4), Product(128, 128, 3, 4))
SOME = Tiles(64, False, Product(64, 64, 4, 4), Product(128, 64, 4, 4))
MANY = Tiles(128, False, Product(128, 64, 4, 8), Product(128, 64, 3, 8))

TILES = {"few": FEW, "some": SOME, "many": MANY}
"""Those that :func:`choose_tiles` takes."""


def choose_tiles(assignments: int, experts: int) -> Tiles:
    """By assignments per expert, were they even (timed at 1 to 8,192 tokens: ``docs/LOG.md``)."""
    if assignments <= 12 * experts:
        return FEW
    return SOME if assignments <= 64 * experts else MANY
