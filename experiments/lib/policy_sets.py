"""Policy sets of an experiment on prefix reuse: which checkpoints are made, kept and evicted, by name, under which strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import DictConfig

from experiments.lib.future_uses import FutureUses
from experiments.lib.strategy_choices import StrategyChoice
from hybridcache.errors import bad
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.peers import OWN, VARIANTS, make_prefix
from hybridcache.prefix.policy import OFF, PrefixPolicy
from hybridcache.strategies import strategy_class
from hybridcache.strategies.base import Strategy

Work = Callable[[int, int], float]
BY_WORK = ("flop_aware",)
"""Orders that weigh FLOPs; the others count tokens."""
BOUND = "farthest"


@dataclass
class Placement:
    """``conf/placement/``: where checkpoints are made."""

    points: list[str]
    every: int
    num_optimal: int


@dataclass
class Retention:
    """``conf/retention/``: which of them stay when a sequence goes on."""

    keep: str
    last_k: int
    share: float


@dataclass
class Eviction:
    """``conf/eviction/``: which goes when blocks are short."""

    order: str


def configured_policy(cfg: DictConfig) -> PrefixPolicy:
    """The policy of the groups ``placement``, ``retention`` and ``eviction``, checked."""
    placement, retention = cfg.placement, cfg.retention
    return PrefixPolicy(
        placement=tuple(placement.points), every=placement.every, num_optimal=placement.num_optimal,
        retention=retention.keep, last_k=retention.last_k, share=retention.share, eviction=cfg.eviction.order,
    )  # fmt: skip


@dataclass(frozen=True)
class PolicySet:
    """One contestant: a strategy with the rules by which its checkpoints are made, kept and evicted.

    Args:
        choice: the strategy.
        name: of the rules, the ``policy`` of results.
        policy: the rules; None for the strategy's own (:mod:`hybridcache.prefix.peers`).
        variant: of its own rules.
    """

    choice: StrategyChoice
    name: str
    policy: PrefixPolicy | None
    variant: str | None = None

    @property
    def needs_future(self) -> bool:
        return self.policy is not None and self.policy.eviction == BOUND

    def prefix(
        self, strategy: Strategy, *, work: Work | None = None, future: FutureUses | None = None, seed: int = 0,
        host_bytes: int = 0,
    ) -> Any:  # fmt: skip
        """The cache of this set over an empty strategy; simulate with the result's ``strategy``.

        Args:
            strategy: built from :attr:`choice`.
            work: FLOPs of tokens ``a .. b - 1``, for the orders that weigh them.
            future: for the bound.
            seed: of what is random.
            host_bytes: of host memory behind it; peers' own rules have none.
        """
        if self.policy is None:
            return make_prefix(strategy, variant=self.variant, work=work, seed=seed)
        work = work if self.policy.eviction in BY_WORK else None
        policy = with_host(self.policy, host_bytes)
        next_use = None if future is None else (lambda point: future.after(point, cache.now_s))
        cache: PrefixCache = PrefixCache(strategy, policy, work=work, next_use=next_use, seed=seed)
        return cache

    def columns(self) -> dict[str, Any]:
        """The columns of a result row that say whose rules ran."""
        policy = self.policy
        rules = {"placement": "own", "retention": "own", "eviction": "own"}
        if policy is not None:
            kept = {"last_k": f"last_{policy.last_k}", "budget_share": f"budget_share={policy.share:g}"}
            rules = {
                "placement": "+".join(_spaced(name, policy) for name in policy.placement) or "none",
                "retention": kept.get(policy.retention, policy.retention), "eviction": policy.eviction,
            }  # fmt: skip
        return {**self.choice.columns(), "policy": self.name, **rules}


def _spaced(name: str, policy: PrefixPolicy) -> str:
    return {"every_n": f"every_{policy.every}", "optimal": f"optimal_{policy.num_optimal}"}.get(name, name)


def policy_sets(
    choices: Sequence[StrategyChoice], names: Sequence[str], common: PrefixPolicy, bound: bool = True
) -> list[PolicySet]:
    """Every strategy under the common policy (``default``) and under its own rules (``own``, where it has some), and the first
    strategy under the common policy with other eviction orders (by their names) or without reuse (``none``).

    Args:
        choices: the strategies.
        names: some of ``default``, ``own``, ``none`` and the orders.
        common: the policy of all; where it is not the shipped one, its name in results is ``custom``.
        bound: whether the future is known; without, the bound is left out.

    Raises:
        UserError: an unknown name, or one given twice.
    """
    known, found = ("default", "own", "none", *ORDERS), []
    for name in names:
        if name not in known or list(names).count(name) > 1:
            raise bad("policies", name, f"choose some of {', '.join(known)}, each once")
        if name == "default":
            shown = "default" if common == PrefixPolicy() else "custom"
            found += [PolicySet(choice, shown, common) for choice in choices]
        elif name == "own":
            found += [one for choice in choices for one in own_sets(choice)]
        elif name == "none":
            found.append(PolicySet(choices[0], name, OFF))
        elif bound or name != BOUND:
            found.append(PolicySet(choices[0], name, replace(common, eviction=name)))
    if not found:
        raise bad("policies", list(names), f"leaves nothing to compare; choose some of {', '.join(known)}")
    return found


def own_sets(choice: StrategyChoice) -> list[PolicySet]:
    """The strategy under each version of its own rules that is known; none for one that is no peer's."""
    name = strategy_class(choice.target).name
    # A variant that the strategy is built as is its own.
    more = [each for each in VARIANTS.get(name, ()) if each not in choice.options.values()]
    versions = (None, *more) if name in OWN else ()
    return [PolicySet(choice, each or "own", None, each) for each in versions]


def with_host(policy: PrefixPolicy, host_bytes: int) -> PrefixPolicy:
    """The policy with so much host memory.

    Raises:
        UserError: there is no host tier.
    """
    if not host_bytes:
        return policy
    if "host_bytes" not in {field.name for field in fields(policy)}:
        raise bad("simulation.host_gb", host_bytes / 1e9, "there is no host tier yet; give 0")
    return replace(policy, host_bytes=host_bytes)  # type: ignore[call-arg]
