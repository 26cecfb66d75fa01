"""Pool map: which share of every stretch of addresses holds what, in letters."""

import numpy as np

from hybridcache.strategies.base import Strategy

CELLS = 160
KINDS = ("state", "kv", "cached", "reserved")
"""What a map shows; the rest of a slice is free."""
LEVELS = 25
"""Steps between none and all of a slice: letters are ``a`` (none) to ``z`` (all)."""


def pool_map(strategy: Strategy, cells: int = CELLS) -> dict[str, str]:
    """The budget cut into ``cells`` equal slices in address order: for each kind of bytes but the free ones (the rest), a
    letter per slice for its share of the slice, ``a`` (none) to ``z`` (all)."""
    edges = np.linspace(0, strategy.budget_bytes, cells + 1)
    shares = {kind: np.zeros(cells) for kind in KINDS}
    for kind, extents in strategy.extents().items():
        if len(extents):
            starts, lengths = extents[np.argsort(extents[:, 0])].T
            total = np.cumsum(lengths)
            x = np.stack([starts, starts + lengths], axis=1).ravel()
            y = np.stack([total - lengths, total], axis=1).ravel()
            shares[kind.name.lower()] = np.diff(np.interp(edges, x, y)) / np.diff(edges)
    levels = {kind: np.clip(np.rint(share * LEVELS), 0, LEVELS).astype(np.uint8) for kind, share in shares.items()}
    return {kind: (level + ord("a")).tobytes().decode("ascii") for kind, level in levels.items()}


def shares(letters: str) -> np.ndarray:
    """The shares that :func:`pool_map` wrote as letters, as float64 ``[cells]``."""
    return (np.frombuffer(letters.encode("ascii"), dtype=np.uint8) - ord("a")) / LEVELS
