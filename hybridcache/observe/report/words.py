"""Words: values with their units, and who reached them, as titles and tables say it."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

BOUND = "byte_exact"
"""The strategy that is a bound, not a competitor; titles never name it the best."""


def label(name: str) -> str:
    return f"{name} (bound)" if name == BOUND else name


def competitors(names: Sequence[str]) -> list[str]:
    """``names`` without the bound, unless nothing else is there."""
    return [name for name in names if name != BOUND] or list(names)


def byte_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which ``largest`` bytes read well."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return float(1024**power), name
    return 1.0, "B"


def bytes_text(value: float) -> str:
    divisor, name = byte_unit(abs(value))
    return f"{value / divisor:.4g} {name}"


def seconds_text(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def number_text(value: float) -> str:
    """A count or a rate, short enough for the end of a bar."""
    if not np.isfinite(value):
        return "none"
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def contest(values: pd.Series, text: Callable[[float], str], most_first: bool = False) -> str:
    """``values`` by strategy in words: ``3 under a, 9 under b and c``. Values that read alike count as alike; the bound
    takes no part."""
    rivals = values.loc[competitors(list(values.index))]
    texts = rivals.map(text)
    ends = [texts[rivals.idxmin()], texts[rivals.idxmax()]]
    if ends[0] == ends[1]:
        return ends[0] + (f" under {texts.index[0]}" if len(texts) == 1 else " under every strategy")
    if most_first:
        ends.reverse()
    return ", ".join(f"{end} under {join_names(list(texts.index[texts == end]))}" for end in ends)


def join_names(names: Sequence[str]) -> str:
    """Names in words: all of up to three, else the first two and how many more."""
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plural(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}" + ("" if count == 1 else "s")
