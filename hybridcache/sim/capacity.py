"""Capacity: how many requests of one length a strategy holds, and what it charges for one. No clock, no scheduler."""

from collections.abc import Callable

from hybridcache.errors import UserError
from hybridcache.strategies.base import Strategy, Usage


def residents(strategy_factory: Callable[[], Strategy], length: int) -> tuple[int, Usage]:
    """Admit identical live requests of ``length`` tokens to an empty pool until one is refused. None is admitted that is longer
    than the longest request to be served.

    Returns:
        How many fit, and the budget's usage with all of them resident. ``(0, usage of the empty pool)`` where not one fits.
    """
    strategy = strategy_factory()
    count = 0
    while length <= strategy.request_limit() and strategy.admit(count, length):
        count += 1
    return count, strategy.usage()


def charge(strategy_factory: Callable[[], Strategy], length: int) -> Usage:
    """The budget's usage with one live request of ``length`` tokens: ``held`` is what it is charged.

    Raises:
        UserError: the request does not fit the empty pool.
    """
    strategy = strategy_factory()
    if not strategy.admit(0, length):
        raise UserError(
            f"length={length}: {strategy.name} holds at most {strategy.request_limit()} tokens for one request in "
            f"budget_bytes={strategy.budget_bytes}; shorten it or raise the budget"
        )
    return strategy.usage()


def waste_curve(strategy: Strategy, up_to: int) -> tuple[list[int], list[int]]:
    """Bytes that one live request holds beyond its useful ones, while it grows from one token to ``up_to``.

    Returns:
        Lengths and bytes of the corners of the curve; it is linear between them. It ends early where memory does.
    """
    lengths: list[int] = []
    waste: list[int] = []
    for length in range(1, up_to + 1):
        if not (strategy.grow(0, length) if lengths else strategy.admit(0, length)):
            break
        now = strategy.usage().padding
        if len(lengths) > 1 and (now - waste[-1]) * (lengths[-1] - lengths[-2]) == waste[-1] - waste[-2]:
            lengths[-1], waste[-1] = length, now  # on the line through the last two corners
        else:
            lengths.append(length)
            waste.append(now)
    return lengths, waste
