"""Peers: prefix caching under each peer's own rules, for simulation. :func:`make_prefix` makes one for a strategy."""

from typing import Any

from hybridcache.errors import bad
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.peers.align import AlignPrefix
from hybridcache.prefix.peers.blocks import AlignPages
from hybridcache.prefix.peers.radix import RadixEnds, RadixPrefix, RadixSplit
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.strategies.base import Strategy

RULES = ("own", "common")

__all__ = ["RULES", "make_prefix"]


def make_prefix(
    strategy: Strategy,
    rules: str = "own",
    policy: PrefixPolicy | None = None,
    next_use: Any = None,
    seed: int = 0,
    variant: str | None = None,
) -> Any:
    """What the requests of a simulation resume from.

    Args:
        strategy: empty. **Simulate with the result's** ``strategy``: some rules need a form of it with the same budget that
            accounts more finely, or that cuts it as the peer does with prefix caching on.
        rules: ``own`` for the peer's, ``common`` for ``policy``.
        policy: of the common rules; the default policy where None.
        next_use: see :class:`~hybridcache.prefix.cache.PrefixCache`.
        seed: of what is random.
        variant: of the peer's rules (``vllm_0.31``, ``sglang_0.5.18``, ...); None for the version that its module names.

    Raises:
        UserError: unknown rules, or a strategy without rules of its own.
    """
    if rules not in RULES:
        raise bad("rules", rules, f"choose one of {RULES}")
    common = {"table_rows": strategy.table_rows, "max_request_tokens": strategy.max_request_tokens}
    spec, budget = strategy.spec, strategy.budget_bytes
    if rules == "common" or strategy.name == "shared_pool":
        return PrefixCache(strategy, policy or PrefixPolicy(), next_use=next_use, seed=seed)
    made: Any = strategy
    if strategy.name == "padded_page":
        return AlignPrefix(AlignPages(spec, budget, **common), variant)
    if strategy.name == "static_split":
        if made._q == 1:
            common |= {"q": 5, "extra_buffer": True}
        else:
            common |= {"q": made._q, "extra_buffer": made.extra_buffer}
        split = RadixSplit(
            spec, budget, ratio=made.ratio, slots=made._asked_slots, page_size=made.page_size,
            max_running=made._max_running, **common,
        )  # fmt: skip
        return RadixPrefix(split, variant)
    if strategy.name == "two_ended":
        return RadixPrefix(RadixEnds(spec, budget, page_size=made.page_size, **common), variant)
    raise bad("rules", rules, f"{strategy.name} has no rules of its own here; choose common")
