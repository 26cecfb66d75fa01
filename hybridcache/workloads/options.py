"""Checks of the options that generators and readers share."""

import math

from hybridcache.errors import bad


def whole(field: str, value: object, least: int = 1) -> int:
    """``value`` as an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad(field, value, f"give a whole number of at least {least}")
    return value


def number(field: str, value: object, least: float = 0.0, *, above: bool = False) -> float:
    """``value`` as a finite float of at least (or, with ``above``, greater than) ``least``."""
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value) or value < least or (above and value == least):  # type: ignore[operator,arg-type]
        raise bad(field, value, f"give a finite number {'above' if above else 'of at least'} {least:g}")
    return float(value)  # type: ignore[arg-type]
