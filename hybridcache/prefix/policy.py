"""PrefixPolicy: where checkpoints are made, which are kept, and which go when blocks are short."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridcache.errors import bad, number, whole
from hybridcache.prefix.eviction import ORDERS

PLACEMENTS = ("prompt_end", "generation_end", "branch_points", "every_n", "log_spaced", "uniform", "optimal")
RETENTIONS = ("all", "last_k", "semantic", "budget_share")


@dataclass(frozen=True)
class PrefixPolicy:
    """Prefix reuse as configuration.

    Args:
        placement: where checkpoints are made, any of :data:`PLACEMENTS`; none switches reuse off (checkpoints that requests
            ask for with ``SamplingParams.checkpoint_at`` are made all the same).

            * ``prompt_end``: after a prompt, before its first output token; for clients that drop or change outputs (reasoning)
              in their next prompt, where ``generation_end`` never matches;
            * ``generation_end``: the states of a request that ends are handed over as they are, at no cost;
            * ``branch_points``: where prompts part, from the second one on (its position cut to a multiple of 64);
            * ``every_n``: at multiples of ``every`` tokens;
            * ``log_spaced``: before a prompt's end at distances that double, from ``every / 16``;
            * ``uniform``: ``num_optimal`` positions at even distances;
            * ``optimal``: ``num_optimal`` positions that leave the least expected work, by dynamic programming over where
              earlier prompts parted (Sparse Prefix Caching, arXiv 2605.05219).
        every: tokens; a multiple of 64.
        num_optimal: positions of ``optimal`` and ``uniform``.
        retention: which checkpoints of a sequence stay when it goes on: ``all``; the ``last_k``; ``semantic``, those at the
            ends of prompts and turns; ``budget_share``, as many as keep checkpoints' states within ``share`` of the budget.
            Branch points and pinned prefixes stay under each.
        last_k: how many.
        share: of the budget, above 0 up to 1.
        eviction: an order of :data:`~hybridcache.prefix.eviction.ORDERS`.
        wanted_share: of running requests and checkpoints kept for waiting ones together, most that may be the latter where they
            keep another request from being admitted: beyond it those of the last in the queue are evicted, and computed again.
        history_tokens: tokens remembered without a checkpoint.
        host_bytes: pinned host memory for checkpoints that are evicted; 0 for none.
        host_state_share: part of it for states, the rest for KV; None where they share it.
        host_eviction: the order in which copies leave the host.
    """

    placement: tuple[str, ...] = ("generation_end", "branch_points", "every_n")
    every: int = 8192
    num_optimal: int = 4
    retention: str = "last_k"
    last_k: int = 2
    share: float = 0.5
    eviction: str = "reuse_density"
    wanted_share: float = 0.25
    history_tokens: int = 1 << 24
    host_bytes: int = 0
    host_state_share: float | None = None
    host_eviction: str = "lru"

    def __post_init__(self) -> None:
        given = self.placement
        if isinstance(given, str) or not all(isinstance(name, str) for name in given):
            raise bad("prefix.placement", given, f"give a list of {', '.join(PLACEMENTS)}")
        object.__setattr__(self, "placement", tuple(given))
        for name in self.placement:
            if name not in PLACEMENTS or self.placement.count(name) > 1:
                raise bad("prefix.placement", name, f"choose some of {', '.join(PLACEMENTS)}, each once")
        if whole("prefix.every", self.every) % 64:
            raise bad("prefix.every", self.every, "give a multiple of 64, at which a prefill kernel can keep states")
        whole("prefix.num_optimal", self.num_optimal)
        if self.retention not in RETENTIONS:
            raise bad("prefix.retention", self.retention, f"choose one of {', '.join(RETENTIONS)}")
        whole("prefix.last_k", self.last_k)
        if not 0 < number("prefix.share", self.share) <= 1:
            raise bad("prefix.share", self.share, "give a share of the budget, above 0 up to 1")
        if not 0 <= number("prefix.wanted_share", self.wanted_share) <= 1:
            raise bad("prefix.wanted_share", self.wanted_share, "give a share, from 0 to 1")
        if self.eviction not in ORDERS:
            raise bad("prefix.eviction", self.eviction, f"choose one of {', '.join(ORDERS)}")
        whole("prefix.history_tokens", self.history_tokens, 0)
        whole("prefix.host_bytes", self.host_bytes, 0)
        if self.host_state_share is not None and not 0 < number("prefix.host_state_share", self.host_state_share) < 1:
            raise bad("prefix.host_state_share", self.host_state_share, "give a share between 0 and 1, or null")
        of_host = [name for name in ORDERS if name != "lru_path"]  # a copy has no path of its own
        if self.host_eviction not in of_host:
            raise bad("prefix.host_eviction", self.host_eviction, f"choose one of {', '.join(of_host)}")

    @classmethod
    def read(cls, given: Any) -> "PrefixPolicy | None":
        """What a user gave: a policy, a mapping of its fields, True for the defaults, None or False for none.

        Raises:
            UserError: anything else; the message names the field.
        """
        if given is None or given is False or isinstance(given, PrefixPolicy):
            return given or None
        if given is True:
            return cls()
        if not isinstance(given, Mapping):
            raise bad("prefix", given, "give True, False, a PrefixPolicy or a dict of its fields")
        for name, value in given.items():
            if name not in cls.__dataclass_fields__:
                raise bad(
                    f"prefix.{name}", value, f"is no field of a policy; it has {', '.join(cls.__dataclass_fields__)}"
                )
        return cls(**given)


OFF = PrefixPolicy(placement=(), retention="all", eviction="lru")
"""No checkpoints but those that requests ask for."""
