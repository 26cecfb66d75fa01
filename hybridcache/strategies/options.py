"""Options of strategies: what a class takes, and checks of their values, which raise a UserError that names the field."""

from inspect import Parameter, signature
from math import isfinite
from numbers import Real
from typing import Any

from hybridcache.errors import bad


def whole(field: str, value: Any, least: int = 1) -> int:
    """A whole number from ``least``; a boolean is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad(field, value, f"give a whole number from {least}")
    return value


def whole_or_none(field: str, value: Any, least: int = 1) -> int | None:
    """As :func:`whole`, or None."""
    return None if value is None else whole(field, value, least)


def number(field: str, value: Any, fix: str) -> float:
    """A finite number, which is no boolean; ``fix`` says what to give."""
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise bad(field, value, fix)
    return float(value)


def options_of(cls: type) -> list[str]:
    """Names of the keyword options that a class takes, its own first; those that it passes on to its base included."""
    found: dict[str, None] = {}
    for own in map(vars, cls.__mro__):
        if "__init__" in own:
            parameters = signature(own["__init__"]).parameters.values()
            found |= dict.fromkeys(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)
            if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
                break
    return list(found)
