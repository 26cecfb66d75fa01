"""Peers: prefix caching under each peer's own rules, for simulation. :func:`make_prefix` makes one for a strategy."""

from typing import Any

from hybridcache.errors import bad
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.peers.align import AlignPrefix
from hybridcache.prefix.peers.blocks import AlignPages
from hybridcache.prefix.peers.carve import CarvePrefix
from hybridcache.prefix.peers.chunk_ends import ChunkEndPrefix
from hybridcache.prefix.peers.marconi import MarconiPrefix
from hybridcache.prefix.peers.radix import RadixBlocks, RadixCarve, RadixEnds, RadixPrefix, RadixSplit
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.strategies.base import Strategy

RULES = ("own", "common")
CHECKPOINT_PAGE = 64
"""Tokens of SGLang's KV pages with the extra buffer."""

__all__ = ["OWN", "RULES", "VARIANTS", "make_prefix"]


def make_prefix(
    strategy: Strategy,
    rules: str = "own",
    policy: PrefixPolicy | None = None,
    next_use: Any = None,
    seed: int = 0,
    variant: str | None = None,
    work: Any = None,
) -> Any:
    """What the requests of a simulation resume from.

    Args:
        strategy: empty. **Simulate with the result's** ``strategy``: some rules need a form of it with the same budget
            that accounts more finely, or that cuts it as the peer does with prefix caching on.
        rules: ``own`` for the peer's, ``common`` for ``policy``.
        policy: of the common rules; the default policy where None.
        next_use: see :class:`~hybridcache.prefix.cache.PrefixCache`.
        seed: of what is random.
        variant: of the peer's rules (:data:`VARIANTS`); None for the version that its module names.
        work: FLOPs of computing tokens ``a .. b - 1``, for rules that weigh them; None counts tokens.

    Raises:
        UserError: unknown rules, or a strategy without rules of its own.
    """
    if rules not in RULES:
        raise bad("rules", rules, f"choose one of {RULES}")
    common = {"table_rows": strategy.table_rows, "max_request_tokens": strategy.max_request_tokens}
    if rules == "common" or strategy.name == "shared_pool":
        return PrefixCache(strategy, policy or PrefixPolicy(), work=work, next_use=next_use, seed=seed)
    build = _OWN.get(strategy.name)
    if build is None:
        raise bad("rules", rules, f"{strategy.name} has no rules of its own here; choose common")
    known = VARIANTS.get(strategy.name, ())
    if variant is not None and variant not in known:
        raise bad("variant", variant, f"{strategy.name} has the variants {known} beside None")
    return build(strategy, variant, work, common)


def _align(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    return AlignPrefix(AlignPages(made.spec, made.budget_bytes, **common), variant)


def _split(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    asked = {"q": made._q, "extra_buffer": made.extra_buffer}
    if variant == "lmdeploy_0.18":
        asked = {"q": 1, "extra_buffer": False}
    elif made._q == 1:  # its rule without a prefix cache
        asked = {"q": 5, "extra_buffer": True}
    page_size = CHECKPOINT_PAGE if asked["extra_buffer"] and made.page_size == 1 else made.page_size
    split = RadixSplit(
        made.spec, made.budget_bytes, ratio=made.ratio, slots=made._asked_slots, page_size=page_size,
        max_running=made._max_running, **asked, **common,
    )  # fmt: skip
    return ChunkEndPrefix(split) if variant == "lmdeploy_0.18" else RadixPrefix(split, variant)


def _ends(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    return RadixPrefix(RadixEnds(made.spec, made.budget_bytes, page_size=made.page_size, **common), variant)


def _carve(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    order = variant or made.order
    return CarvePrefix(RadixCarve(made.spec, made.budget_bytes, order=order, page_size=made.page_size, **common))


def _blocks(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    blocks = RadixBlocks(
        made.spec, made.budget_bytes, manager_block_size=made.block_tokens, kernel_block_size=made.kernel_block_tokens,
        watermark=made._watermark, **common,
    )  # fmt: skip
    return ChunkEndPrefix(blocks)


def _marconi(made: Any, variant: str | None, work: Any, common: dict[str, Any]) -> Any:
    return MarconiPrefix(made, work=work)


_OWN = {
    "padded_page": _align, "static_split": _split, "two_ended": _ends, "lcm_carve": _carve, "large_block": _blocks,
    "byte_exact": _marconi,
}  # fmt: skip
OWN = tuple(_OWN)
"""Strategies with rules of their own."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "padded_page": ("vllm_0.31",),
    "static_split": ("sglang_0.5.18", "lmdeploy_0.18"),
    "two_ended": ("sglang_0.5.18",),
    "lcm_carve": ("jenga", "fullest"),
}
"""Variants of each strategy's own rules, beside None."""
