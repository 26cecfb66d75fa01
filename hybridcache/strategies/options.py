"""Options of strategies: what a class takes, and checks of their values."""

from inspect import Parameter, signature
from numbers import Real
from typing import Any

from hybridcache.errors import bad


def whole(field: str, value: Any, least: int = 1) -> int:
    """A whole number from ``least``.

    Raises:
        UserError: it is none (a boolean is none).
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad(field, value, f"give a whole number from {least}")
    return value


def number(field: str, value: Any, fix: str) -> float:
    """A number, which is not a boolean and not NaN; ``fix`` says what to give.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or value != value:
        raise bad(field, value, fix)
    return float(value)


def flag(field: str, value: Any) -> bool:
    """True or false.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool):
        raise bad(field, value, "give true or false")
    return value


def choice(field: str, value: Any, options: tuple[str, ...]) -> str:
    """One of some names.

    Raises:
        UserError: it is none of them.
    """
    if not isinstance(value, str) or value not in options:
        raise bad(field, value, f"choose one of {', '.join(options)}")
    return value


def seed(field: str, value: Any) -> int | None:
    """A seed, or None.

    Raises:
        UserError: it is neither.
    """
    return None if value is None else whole(field, value, 0)


def options_of(cls: type) -> list[str]:
    """Names of the keyword options that a class takes, its own first; those that it passes on to its base included."""
    found: dict[str, None] = {}
    for own in map(vars, cls.__mro__):
        if "__init__" not in own:
            continue
        parameters = signature(own["__init__"]).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)
        if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(found)
