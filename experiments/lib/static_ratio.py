"""The ratio of a static split that serves a workload fastest: ``ratio: best`` in a strategy's options.

A static split is only as good as its border, so a comparison shows it tuned as well. The search starts where states and KV
run out together: bytes of a request's states over the bytes of KV that it holds on average while it runs. It simulates the
stream with that ratio, with multiples of it, and with the default, and takes the one that ends first among those that
refuse fewest requests. Where a trace changes with time no fixed border is best for all of it; this one is best for the whole.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from experiments.lib.strategy_choices import CacheMemory, StrategyChoice
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError, bad
from hybridcache.sim.cost_model import CostModel
from hybridcache.sim.simulator import simulate
from hybridcache.strategies import strategy_class
from hybridcache.workloads.base import Workload

BEST = "best"
MULTIPLES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.45, 2.0)
SEARCH_PAGE_TOKENS = 64
"""Page of the simulated splits of the search, where the options give none: single tokens take ten times as long."""


def wants_ratio(choices: Sequence[StrategyChoice]) -> bool:
    """Whether one of the strategies asks for its best ratio."""
    return any(choice.options.get("ratio") == BEST for choice in choices)


def with_best_ratio(
    choices: Sequence[StrategyChoice], memory: CacheMemory, streams: Sequence[Workload], scheduler: SchedulerConfig,
    cost_model: CostModel,
) -> list[StrategyChoice]:  # fmt: skip
    """The strategies with ``ratio: best`` replaced by the ratio that serves ``streams``, one after another, fastest.

    Raises:
        UserError: no ratio lets the budget hold a request.
    """
    found = []
    for choice in choices:
        if choice.options.get("ratio") == BEST:
            ratio = _best_ratio(choice, memory, streams, scheduler, cost_model)
            choice = replace(choice.with_options(ratio=ratio), searched=("ratio",))
        found.append(choice)
    return found


def balanced_ratio(memory: CacheMemory, streams: Sequence[Workload]) -> float:
    """Bytes of states over bytes of KV of the requests that run together: the mean over time of the tokens that a running
    request holds weighs each request by its steps, nearly its output tokens."""
    requests = [request for stream in streams for request in stream.requests]
    steps = sum(request.output_tokens for request in requests)
    tokens = sum((request.prompt_tokens + request.output_tokens / 2) * request.output_tokens for request in requests)
    return memory.spec.state_bytes / (memory.spec.kv_bytes_per_token * tokens / steps)


def _best_ratio(
    choice: StrategyChoice, memory: CacheMemory, streams: Sequence[Workload], scheduler: SchedulerConfig,
    cost_model: CostModel,
) -> float:  # fmt: skip
    start = balanced_ratio(memory, streams)
    parameter = inspect.signature(strategy_class(choice.target)).parameters.get("ratio")
    default = [] if parameter is None or parameter.default is parameter.empty else [parameter.default]
    found: dict[float, tuple[int, float]] = {}
    error: UserError | None = None
    for ratio in (*default, *(round(start * multiple, 3) for multiple in MULTIPLES)):
        candidate = choice.with_options(**{"page_size": SEARCH_PAGE_TOKENS, **choice.options, "ratio": ratio})
        try:
            runs = [simulate(stream, candidate.build(memory), scheduler, cost_model) for stream in streams]
        except UserError as refused:
            error = refused
            continue
        found[ratio] = (sum(run.refused for run in runs), sum(run.duration_s for run in runs))
    if not found:
        raise bad(f"strategy_options.{choice.label}.ratio", BEST, f"no ratio serves this budget ({error})") from error
    return min(found, key=lambda ratio: found[ratio])
