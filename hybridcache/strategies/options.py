"""Options of strategies: what a class takes, and checks of their values, which raise a UserError that names the field."""

from inspect import Parameter, signature
from typing import Any

from hybridcache.errors import whole


def whole_or_none(field: str, value: Any, least: int = 1) -> int | None:
    """As :func:`hybridcache.errors.whole`, or None."""
    return None if value is None else whole(field, value, least)


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
