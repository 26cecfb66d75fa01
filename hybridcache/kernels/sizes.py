"""Sizes of tiles, worked out on the host at every launch."""


def power_of_2(n: int) -> int:
    """The least power of two that is not below ``n`` (a positive number). Triton's own takes 4 us a call."""
    return 1 << (n - 1).bit_length()
