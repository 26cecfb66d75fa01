"""Errors a user can cause and mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field, the value and the fix.

    ``run.py`` prints it without a traceback and exits with status 2.
    """


def bad(field: str, value: object, fix: str) -> UserError:
    """A :class:`UserError` in the project's one form: ``field=value: fix``."""
    return UserError(f"{field}={value!r}: {fix}")
