"""Simulation of prefix reuse: a stream through every policy set, in processes of their own.

Two drivers. ``replay`` serves a request for as long as its trace says (or a cost model, where it says nothing), whatever the
cache finds, so that all policies meet the same accesses. ``scheduler`` runs the engine's scheduler on the clock of a cost
model, where a hit makes the queue shorter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.lib.future_uses import FutureUses
from experiments.lib.policy_sets import PolicySet
from experiments.lib.settings import container, scheduler_config
from experiments.lib.strategy_choices import CacheMemory, cache_columns
from experiments.lib.streams import seeded_streams
from hybridcache.errors import bad
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.observe.report.load import set_name
from hybridcache.sim.cost_model import CostModel, DeviceSpec, StepWork
from hybridcache.sim.parameters import ModelParameters
from hybridcache.sim.replay import replay
from hybridcache.sim.simulator import SimulatedSequence, simulate
from hybridcache.workloads import Request, Stream

DRIVERS = ("auto", "replay", "scheduler")
MOST_PROCESSES = 8


@dataclass(frozen=True)
class Case:
    """One run: a policy set on one stream, with what it gets.

    Args:
        policies: the policy set.
        stream: number of the stream, by :func:`streams_of`.
        memory: what the strategy gets.
        host_bytes: of host memory behind it; 0 for none.
        driver: ``replay`` or ``scheduler``.
        labels: more columns of the row.
    """

    policies: PolicySet
    stream: int
    memory: CacheMemory
    host_bytes: int
    driver: str
    labels: tuple[tuple[str, Any], ...] = ()


class _List:
    """Events of a run in another process."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: dict[str, Any]) -> None:
        self.events.append(event)


@lru_cache(maxsize=1)
def _streams(text: str, repetitions: int) -> list[tuple[int, Stream]]:
    cfg: Any = OmegaConf.create(text)
    return seeded_streams(cfg, repetitions, "simulation.repetitions")


def streams_of(cfg: DictConfig, repetitions: int) -> list[tuple[int, Stream]]:
    """``(seed, stream)`` of each repetition, with token ids; made once in a process."""
    keys = OmegaConf.masked_copy(cfg, [key for key in ("workload", "seed") if key in cfg])
    return _streams(OmegaConf.to_yaml(keys, resolve=True, sort_keys=True), repetitions)


def with_ids(cfg: DictConfig) -> None:
    """Ask the workload for token ids where it has to be asked."""
    if "with_prompt_ids" in cfg.workload:
        cfg.workload.with_prompt_ids = True


def driver_of(driver: str, stream: Stream) -> str:
    """``auto`` replays streams that know how long their requests took."""
    if driver not in DRIVERS:
        raise bad("simulation.driver", driver, f"choose one of {', '.join(DRIVERS)}")
    if driver != "auto":
        return driver
    return "replay" if timed(stream) else "scheduler"


def timed(stream: Stream) -> bool:
    """Whether a stream says how long its requests took."""
    return any(request.service_s is not None for request in stream.fresh().begin())


def rows_of(
    cfg: DictConfig, cases: Sequence[Case], repetitions: int, processes: int, events: EventSink
) -> Iterator[dict[str, Any]]:
    """A row a case, in their order."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    jobs = [(plain, case, repetitions) for case in cases]
    if processes > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
            yield from _written(pool.map(run_case, *zip(*jobs)), events)
    else:
        yield from _written((run_case(*job) for job in jobs), events)


def _written(found: Any, events: EventSink) -> Iterator[dict[str, Any]]:
    for row, written in found:
        for event in written:
            events.write(event)
        yield row


def run_case(plain: dict[str, Any], case: Case, repetitions: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and the events of one case."""
    cfg = OmegaConf.create(plain)
    seed, stream = streams_of(cfg, repetitions)[case.stream]
    strategy, cost_model = case.policies.choice.build(case.memory), cost_model_of(cfg, case.memory)
    service = None if case.driver == "scheduler" or timed(stream) else alone_s(cost_model)
    future = FutureUses(stream, service and of_request(service)) if case.policies.needs_future else None
    host_bytes = 0 if case.policies.policy is None else case.host_bytes
    prefix = case.policies.prefix(strategy, work=flops_of(cost_model), future=future, seed=seed, host_bytes=host_bytes)
    strategy = prefix.strategy
    # Sets of one strategy are told apart by both names, in events too.
    label = set_name(case.policies.choice.label, case.policies.name)
    common = {"phase": "simulation", "workload": stream.name, "repetition": case.stream}
    sink = _List()
    if case.driver == "replay":
        found = _replayed(stream, strategy, prefix, service and of_sequence(service))
    else:
        turns = _Turns(stream)
        recorder = Recorder({**common, "strategy": label}, sink)
        result = simulate(turns, strategy, scheduler_config(cfg), cost_model, recorder, prefix)
        found = recorder.finish(result.sequences, strategy, result.refused_requests)
        found |= turns.columns(result.sequences)
        found |= {
            "host_bytes_mean": 0.0,
            "host_hit_tokens": getattr(prefix, "host_hit_tokens", 0),
            "evicted": prefix.evicted,
        }
        found["computed_tokens"] = found["prompt_tokens"] - found["hit_tokens"]
    row = {
        **found, **common, **cache_columns(case.memory.spec), **case.policies.columns(), "driver": case.driver,
        "hit_rate": found["hit_tokens"] / found["prompt_tokens"] if found["prompt_tokens"] else math.nan,
        "live_sessions": cfg.workload.get("live_sessions", cfg.workload.get("num_conversations")),
        "budget_bytes": case.memory.budget_bytes, "host_budget_bytes": host_bytes, "seed": seed,
        "device": f"cost model: {cost_model.label}" if case.driver == "scheduler" else "replay", "backend": None,
        "workload_source": stream.source, **dict(case.labels),
    }  # fmt: skip
    return row, sink.events


def _replayed(stream: Stream, strategy: Any, prefix: Any, service: Any) -> dict[str, Any]:
    found = replay(stream, strategy, prefix, service)
    return {
        "requests_offered": found.requests + found.refused, "requests_served": found.requests,
        "requests_refused": found.refused, "prompt_tokens": found.prompt_tokens, "hit_tokens": found.hit_tokens,
        "computed_tokens": found.computed_tokens, "host_hit_tokens": found.host_hit_tokens, "evicted": found.evicted,
        "duration_s": found.duration_s, "held_bytes_mean": found.live_bytes, "cached_bytes_mean": found.cached_bytes,
        "host_bytes_mean": found.host_bytes,
    }  # fmt: skip


def cost_model_of(cfg: DictConfig, memory: CacheMemory) -> CostModel:
    """Of one device a rank, however much memory it has: budgets of a cache alone are compared."""
    parameters = ModelParameters.from_config(container(cfg.model.hf_config))
    return CostModel(parameters, memory.spec, DeviceSpec(**container(cfg.device)))


def flops_of(cost_model: CostModel) -> Callable[[int, int], float]:
    """FLOPs of tokens ``a .. b - 1`` of a prompt: those of all weights, and of attention to the tokens before each."""
    kv, linear = cost_model.spec.attention, 2.0 * cost_model.parameters.active
    pair = 0
    if kv is not None:
        each = kv.k_dim + (kv.v_dim or kv.k_dim)
        pair = 2 * cost_model.parameters.num_query_heads * each * len(cost_model.spec.attention_layers)
    return lambda a, b: linear * (b - a) + pair * (b * (b + 1) - a * (a + 1)) / 2


def alone_s(cost_model: CostModel) -> Callable[[int, int], float]:
    """Seconds of a request of so many prompt and output tokens that has the device to itself, whatever it found: its prompt in
    one step, then its output. (That policies are compared on the same accesses matters more here than how long they take.)"""

    def service(n: int, output: int) -> float:
        work = StepWork(
            tokens=n, sampled=1, prefill_tokens=n, prefill_context=n, prefill_pairs=n * (n + 1) // 2, states_written=1
        )
        prefill_s = sum(cost_model._terms(work, 0).values())
        return prefill_s + (output - 1) * cost_model.decode_s(1, n + output / 2)

    return service


def of_sequence(service: Callable[[int, int], float]) -> Callable[[SimulatedSequence], float]:
    return lambda seq: service(seq.prompt_len, seq.max_tokens)


def of_request(service: Callable[[int, int], float]) -> Callable[[Request], float]:
    return lambda request: service(request.prompt_tokens, request.output_tokens)


class _Turns:
    """A stream that notes which turn of its session each request is."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._turn = stream, {}  # type: ignore[var-annotated]
        self.name, self.source = stream.name, stream.source

    def fresh(self) -> "_Turns":
        self._stream = self._stream.fresh()
        return self

    def _noted(self, requests: Any) -> Any:
        self._turn.update((request.request_id, request.turn) for request in requests)
        return requests

    def begin(self) -> Any:
        return self._noted(self._stream.begin())

    def ended(self, *args: Any, **options: Any) -> Any:
        return self._noted(self._stream.ended(*args, **options))

    def columns(self, sequences: Sequence[Any]) -> dict[str, Any]:
        """Of requests that are not the first of their session."""
        later = [seq for seq in sequences if self._turn[seq.seq_id] > 0]
        second = sorted(seq.ttft_s for seq in later if self._turn[seq.seq_id] == 1)
        prompts = sum(seq.prompt_len for seq in later)
        return {
            "hit_rate_later_turns": sum(seq.hit_tokens for seq in later) / prompts if prompts else math.nan,
            "ttft_turn2_p50_s": second[len(second) // 2] if second else math.nan,
            "refound_tokens": sum(seq.refound_tokens for seq in sequences),
        }  # fmt: skip


def refusals(cases: Sequence[Case]) -> None:
    """Refuse budgets that a strategy cannot use before anything long starts."""
    for case in {(case.policies.choice.label, case.memory.budget_bytes): case for case in cases}.values():
        case.policies.choice.build(case.memory)
