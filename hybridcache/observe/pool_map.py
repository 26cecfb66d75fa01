"""Pool map: which share of every stretch of addresses holds what, in letters."""

import numpy as np

from hybridcache.strategies.base import Kind, Strategy

CELLS = 160
LEVELS = 25
"""Steps between none and all of a slice: letters are ``a`` (none) to ``z`` (all)."""


def pool_map(strategy: Strategy, cells: int = CELLS) -> dict[str, str]:
    """The budget cut into ``cells`` equal slices in address order: for each kind of bytes but the free ones (the rest), a
    letter per slice for its share of the slice, ``a`` (none) to ``z`` (all)."""
    edges = np.linspace(0, strategy.budget_bytes, cells + 1)
    shares = {kind.name.lower(): np.zeros(cells) for kind in Kind if kind is not Kind.FREE}
    for kind, extents in strategy.extents().items():
        if len(extents):
            starts, lengths = extents[np.argsort(extents[:, 0])].T
            total = np.cumsum(lengths)
            x = np.stack([starts, starts + lengths], axis=1).ravel()
            y = np.stack([total - lengths, total], axis=1).ravel()
            shares[kind.name.lower()] = np.diff(np.interp(edges, x, y)) / np.diff(edges)
    return {name: _letters(share) for name, share in shares.items()}


def _letters(shares: np.ndarray) -> str:
    return (np.clip(np.rint(shares * LEVELS), 0, LEVELS).astype(np.uint8) + ord("a")).tobytes().decode("ascii")


def shares(letters: str) -> np.ndarray:
    """The shares that :func:`pool_map` wrote as letters, as float64 ``[cells]``."""
    return (np.frombuffer(letters.encode("ascii"), dtype=np.uint8) - ord("a")) / LEVELS
