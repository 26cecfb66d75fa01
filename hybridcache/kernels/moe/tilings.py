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
class Tiling:
    """``rows`` assignments of a tile, and its two products."""

    rows: int
    swap: bool
    gate_up: Product
    down: Product


FEW = Tiling(16, True, Product(64, 128, 3, 4), Product(128, 128, 3, 4))
SOME = Tiling(64, False, Product(64, 64, 4, 4), Product(128, 64, 4, 4))
MANY = Tiling(128, False, Product(128, 64, 4, 8), Product(128, 64, 3, 8))

CANDIDATES = {
    "few": FEW,
    "few narrow": Tiling(16, True, Product(64, 128, 4, 4), Product(64, 128, 4, 4)),
    "few wide": Tiling(16, True, Product(128, 128, 3, 8), Product(128, 128, 4, 8)),
    "few unswapped": Tiling(16, False, Product(64, 128, 3, 4), Product(128, 128, 3, 4)),
    "few 32": Tiling(32, True, Product(64, 128, 3, 4), Product(128, 128, 3, 4)),
    "some": SOME,
    "some swapped": Tiling(64, True, Product(64, 64, 4, 4), Product(128, 64, 4, 4)),
    "some wide": Tiling(64, False, Product(128, 64, 4, 8), Product(128, 64, 4, 4)),
    "many": MANY,
    "many wide": Tiling(128, False, Product(128, 64, 4, 8), Product(256, 64, 3, 8)),
    "many deep": Tiling(128, False, Product(128, 64, 3, 8), Product(128, 64, 4, 8)),
    "many narrow": Tiling(128, False, Product(64, 64, 4, 8), Product(64, 64, 4, 4)),
    "many 256": Tiling(256, False, Product(64, 64, 4, 8), Product(128, 64, 4, 8)),
}
"""Cuts to be timed; all compile for Hopper without spills."""


def choose_tiling(assignments: int, experts: int) -> Tiling:
    """By assignments per expert, were they even."""
    if assignments <= 12 * experts:
        return FEW
    return SOME if assignments <= 64 * experts else MANY
