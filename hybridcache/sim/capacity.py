"""Capacity: how many requests of one length a strategy holds, and what it charges for one. No clock, no scheduler."""

from collections.abc import Callable

from hybridcache.errors import UserError
from hybridcache.strategies.base import Strategy, Usage


def residents(strategy_factory: Callable[[], Strategy], length: int) -> tuple[int, Usage]:
    """Admit identical live requests of ``length`` tokens to an empty pool until one is refused.

    Returns:
        How many fit, and the budget's usage with all of them resident. ``(0, usage of the empty pool)`` where not one fits.
    """
    strategy = strategy_factory()
    count = 0
    while strategy.admit(count, length):
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
