"""Inference with prefix reuse: conversations and shared system prompts through the engine, a round at a time.

All requests of a round are submitted together. A round's seconds run from the first submission to the last token; what the
engine has still to do then (a step on its way, states to be kept) is done in the next round, and counts there.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from experiments.lib.phases.model_phase import ModelPhase, require_finished, resolve_section
from experiments.lib.policy_sets import PolicySet
from experiments.lib.settings import container
from experiments.lib.strategy_choices import AUTO
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.request import Request as EngineRequest
from hybridcache.engine.sampling import SamplingParams
from hybridcache.errors import bad, whole
from hybridcache.observe.metrics import EventSink, _percentiles, tokens_sha256
from hybridcache.prefix.policy import OFF, PrefixPolicy
from hybridcache.workloads import Stream, build_workload

SHAPE = ("conversations", "first", "output", "new", "rounds")
SYSTEM = ("requests", "shared", "own", "output")


def resolve_reuse(cfg: DictConfig) -> None:
    """Replace every ``auto`` of ``cfg.inference``; see :func:`resolve_section`.

    Raises:
        UserError: a value that makes no sense.
    """
    resolve_section(cfg, "inference", AUTO["reuse"], ("cache_bytes", "prefill_every"))
    section = container(cfg.inference)
    for name, shape in section["shapes"].items() if isinstance(section["shapes"], Mapping) else [("", None)]:
        if not isinstance(shape, Mapping) or set(shape) != set(SHAPE) or not isinstance(shape["conversations"], list):
            form = f"{{name: {{conversations: [64], {', '.join(f'{key}: N' for key in SHAPE[1:])}}}}}"
            raise bad("inference.shapes", section["shapes"], f"give {form}, or auto")
        for key in SHAPE[1:]:
            whole(f"inference.shapes.{name}.{key}", shape[key])
    system = section["system"]
    if system is not None and (not isinstance(system, Mapping) or set(system) != set(SYSTEM)):
        raise bad("inference.system", system, f"give {{{', '.join(f'{key}: N' for key in SYSTEM)}}}, null or auto")
    for length in section["prefill"] if isinstance(section["prefill"], list) else [None]:
        whole("inference.prefill", length, fix="give a list of prompt lengths, or auto")


@dataclass(frozen=True)
class Cell:
    """What an engine serves from its start to its end: some requests in each round."""

    workload: str
    requests: int
    rounds: int
    longest: int
    options: tuple[tuple[str, Any], ...]

    def stream(self, seed: int) -> Stream:
        """The requests, with ids of that seed."""
        return build_workload(**dict(self.options), label=self.workload, seed=seed)


def cells_of(section: Mapping[str, Any], vocabulary: int) -> list[Cell]:
    """The conversations and the shared system prompt of a section."""
    ids = {"first_id": min(1000, vocabulary // 2), "end_id": min(150_000, vocabulary)}
    found = []
    for name, shape in section["shapes"].items():
        lengths = {f"{key}_tokens": shape[key] for key in ("first", "output", "new")}
        longest = shape["first"] + shape["rounds"] * shape["output"] + (shape["rounds"] - 1) * shape["new"]
        for count in shape["conversations"]:
            options = {"name": "conversations", "num_conversations": count, "rounds": shape["rounds"], **lengths, **ids}
            found.append(Cell(name, count, shape["rounds"], longest, tuple(options.items())))
    if (system := section["system"]) is not None:
        lengths = {f"{key}_tokens": system[key] for key in ("shared", "own", "output")}
        options = {"name": "shared_prompt", "num_requests": system["requests"], **lengths, **ids}
        found.append(
            Cell(f"system_{system['shared']}", system["requests"], 1, sum(lengths.values()), tuple(options.items()))
        )
    return found


class ReusePhase(ModelPhase):
    """One model on one device; every policy set in turn serves all workloads, each with an engine of its own.

    Args:
        cfg: of the experiment, with its resolved ``inference`` section.
        sets: of physical strategies.

    Raises:
        UserError: a budget that a strategy cannot use, or that does not hold a request.
    """

    def __init__(self, cfg: DictConfig, sets: Sequence[PolicySet]) -> None:
        super().__init__(cfg, "inference")
        section = container(self.settings)
        self.cache = self.memory(section["cache_bytes"])
        self.sets, self.cells = sets, cells_of(section, self.model.config.vocab_size)
        self.prefill, self.every = section["prefill"], section["prefill_every"]
        limit, label = min(
            (one.choice.build(self.cache, physical=True).request_limit(), one.choice.label) for one in sets
        )
        longest = max([cell.longest for cell in self.cells] + self.prefill)
        if longest > limit:
            raise bad(
                "inference.cache_bytes", section["cache_bytes"],
                f"{label} holds requests of at most {limit:,} tokens in it, and one here has {longest:,}; give more memory "
                "or shorter ones",
            )  # fmt: skip

    def __len__(self) -> int:
        rounds = sum(cell.rounds for cell in self.cells)
        return (len(self.sets) * rounds + 2 * len(self.prefill)) * self.settings.repetitions

    def rows(self, events: EventSink) -> Iterator[dict[str, Any]]:
        """One row per policy set, workload, number of conversations, round and repetition; then the prefill overhead."""
        for number, one in enumerate(self.sets):
            assert one.policy is not None
            for cell in self.cells:
                for repetition in range(self.settings.repetitions):
                    settle_heap()
                    engine = self.engine(one.choice, self.cache, prefix=one.policy)
                    # Untimed: the first set meets every shape, later ones find kernels and libraries warm.
                    self._warm(engine, cell, whole_cell=number == 0 and repetition == 0)
                    if number == 0 and repetition == 0:
                        engine = self.engine(one.choice, self.cache, prefix=one.policy)
                    yield from self._cell(one, engine, cell, repetition)
                    engine.strategy.check_integrity()
                    del engine
        yield from self._prefill_overhead()

    def _warm(self, engine: Engine, cell: Cell, whole_cell: bool) -> None:
        if whole_cell:
            for _ in self._rounds(engine, cell, self.seed + 10_000):
                pass
        elif self.on_cuda:
            engine.add_request([1] * 128, SamplingParams(max_tokens=8, ignore_eos=True))
        engine.run()
        for seq in engine.sequences:
            engine.forget(seq.seq_id)

    def _rounds(self, engine: Engine, cell: Cell, seed: int) -> Iterator[tuple[float, list[EngineRequest]]]:
        """Seconds and requests of each round."""
        stream = cell.stream(seed)
        requests = stream.begin()
        while requests:
            settle_heap()
            params = [SamplingParams(max_tokens=request.output_tokens, ignore_eos=True) for request in requests]
            started, seqs = time.perf_counter(), []
            for request, one in zip(requests, params):
                seqs.append(engine.add_request(np.asarray(request.prompt_ids), one))
            while any(seq.finish_reason is None for seq in seqs):
                engine.step()
            seconds = time.perf_counter() - started
            require_finished(cell.workload, engine, seqs)
            yield seconds, seqs
            later: list[Any] = []
            for request, seq in zip(requests, seqs):
                later += stream.ended(request.request_id, 0.0, seq.output_ids)
                engine.forget(seq.seq_id)
            requests = later
        engine.run()

    def _cell(self, one: PolicySet, engine: Engine, cell: Cell, repetition: int) -> Iterator[dict[str, Any]]:
        launched = engine.backend.launches.copy()
        for number, (seconds, seqs) in enumerate(self._rounds(engine, cell, self.seed + repetition), 1):
            usage = engine.strategy.usage()
            prompts, hits = (sum(getattr(seq, name) for seq in seqs) for name in ("prompt_len", "hit_tokens"))
            yield {
                **self._labels(one, cell.workload, repetition, len(seqs), number), "seconds": seconds,
                "prompt_tokens": prompts, "hit_tokens": hits, "computed_tokens": prompts - hits, "hit_rate": hits / prompts,
                "output_tokens": sum(seq.num_output for seq in seqs),
                "preemptions": sum(seq.num_preemptions for seq in seqs),
                "refound_tokens": sum(seq.refound_tokens for seq in seqs),
                "cached_bytes_end": usage.cached, "evicted": engine.prefix.evicted,
                **_percentiles("ttft", [seq.ttft_s for seq in seqs]), **_percentiles("tpot", [seq.tpot_s for seq in seqs]),
                "tokens_sha256": tokens_sha256(seqs), **self.columns(engine.backend.launches - launched, engine.backend.name),
            }  # fmt: skip

    def _labels(self, one: PolicySet, workload: str, repetition: int, requests: int, round_: int) -> dict[str, Any]:
        return {
            **one.choice.labels("inference", workload, repetition), **one.columns(), "conversations": requests,
            "round": round_, "budget_bytes": self.cache.budget_bytes, "host_budget_bytes": 0, "driver": "engine",
            "requests_offered": requests, "requests_served": requests, "requests_refused": 0,
            "workload_source": f"seed {self.seed + repetition}",
        }  # fmt: skip

    def _prefill_overhead(self) -> Iterator[dict[str, Any]]:
        """One prompt alone, with a checkpoint at every so many tokens of it, and with none."""
        often = PrefixPolicy(placement=("every_n",), every=self.every, retention="all", eviction="lru")
        choice = self.sets[0].choice
        sets = [PolicySet(choice, "none", OFF), PolicySet(choice, f"every_{self.every}", often)]
        for one in sets:
            engine = self.engine(choice, self.cache, prefix=one.policy)
            for length in self.prefill:
                options = {"name": "conversations", "num_conversations": 1, "first_tokens": length, "rounds": 1}
                options |= {"output_tokens": 1, "new_tokens": 1, "end_id": min(150_000, self.model.config.vocab_size)}
                options |= {"first_id": min(1000, self.model.config.vocab_size // 2)}
                cell = Cell(f"prefill_{length}", 1, 1, length, tuple(options.items()))
                for repetition in range(-1, self.settings.repetitions):  # the first one is not counted
                    while engine.prefix.make_room(urgent=True):
                        pass
                    for seconds, seqs in self._rounds(engine, cell, self.seed + 1 + repetition):
                        if repetition < 0:
                            continue
                        made = len(engine.prefix)
                        yield {
                            **self._labels(one, cell.workload, repetition, 1, 1), "seconds": seconds,
                            "prompt_tokens": length, "hit_tokens": seqs[0].hit_tokens, "checkpoints": made,
                            "ttft_p50_s": seqs[0].ttft_s, **self.columns({}, engine.backend.name),
                        }  # fmt: skip
            del engine
