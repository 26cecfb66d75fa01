"""Sizes of tiles and grids, worked out on the host at every launch. Triton's own functions take 4 us a call."""


def power_of_2(n: int) -> int:
    """The least power of two that is not below ``n`` (a positive number)."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, size: int) -> int:
    """How many pieces of ``size`` hold ``n``."""
    return -(-n // size)
