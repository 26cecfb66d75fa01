"""Errors a user can cause and mend, and the checks of numbers that raise them."""

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class UserError(ValueError):
    """Bad input. The message is one line that names the field, the value and the fix.

    ``run.py`` prints it without a traceback and exits with status 2.
    """


def bad(field: str, value: object, fix: str) -> UserError:
    """A :class:`UserError` in the project's one form: ``field=value: fix``."""
    return UserError(f"{field}={value!r}: {fix}")


def whole(field: str, value: object, least: int = 1, fix: str = "") -> int:
    """``value`` as a whole number of at least ``least`` (a boolean is none); ``fix`` replaces what the error says to do."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad(field, value, fix or f"give a whole number of at least {least}")
    return value


def number(field: str, value: object, least: float = 0.0, *, above: bool = False, fix: str = "") -> float:
    """``value`` as a finite float of at least (or, with ``above``, greater than) ``least``; ``fix`` as in :func:`whole`."""
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value) or value < least or (above and value == least):  # type: ignore[operator,arg-type]
        raise bad(field, value, fix or f"give a finite number {'above' if above else 'of at least'} {least:g}")
    return float(value)  # type: ignore[arg-type]


def named(field: str, path: str, known: Iterable[str]) -> Any:
    """What stands at a dotted path (``my_package.my_module.Name``); ``known`` are the names that may be given instead."""
    module, _, attribute = path.rpartition(".")
    if not module:
        raise bad(field, path, f"choose one of {', '.join(known)}, or give a dotted path of your own")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise bad(field, path, f"cannot be imported ({error})") from error
