"""Units: bytes, seconds and counts as titles, tables and axes say them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def byte_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which ``largest`` bytes read well."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return float(1024**power), name
    return 1.0, "B"


def bytes_text(value: float) -> str:
    divisor, name = byte_unit(abs(value))
    return f"{value / divisor:.4g} {name}"


def budget_text(row: Mapping[Any, Any]) -> str:
    """Of a result row: ``5 GiB``, or of several ranks ``5 GiB on each of 4 ranks``."""
    text, ranks = bytes_text(row["budget_bytes"]), row.get("tp_size", 1)
    return f"{text} on each of {ranks:.0f} ranks" if ranks > 1 else text


def time_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which ``largest`` seconds read well on an axis."""
    for seconds, name in ((3600.0, "h"), (60.0, "min")):
        if largest >= 5 * seconds:
            return seconds, name
    return (1.0, "s") if largest >= 1 else (1e-3, "ms")


def seconds_text(value: float) -> str:
    """A duration as people say it: ``35 µs``, ``12.5 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if round(value) >= 7200:
        return f"{round(value / 60) // 60} h {round(value / 60) % 60} min"
    if round(value) >= 120:
        return f"{round(value) // 60} min {round(value) % 60} s"
    if value >= 0.9995:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 0.9995e-3 or value == 0 else f"{value * 1e6:.3g} µs"


def number_text(value: float) -> str:
    """A count or a rate, short enough for the end of a bar."""
    if not np.isfinite(value):
        return "none"
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def percent_text(value: float) -> str:
    return f"{value:.1%}"


def join_names(names: Sequence[str]) -> str:
    """Names in words: all of up to three, else the first two and how many more."""
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plural(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}" + ("" if count == 1 else "s")
