"""What prefix reuse costs the host while 100,000 nodes are in its index, on this machine's CPU and without a device.

    python -m benchmarks.prefix_index [--nodes 100000] [--out benchmarks/results/prefix_index-cpu.json]

A prefix cache over a strategy's books (no bytes behind them) is filled by conversations of 2,000 tokens in turns of 400, each
of which leaves a checkpoint, and by a few of 100,000 tokens, half of them in turns of 400, half with a checkpoint every 8,192.
Then prompts that go on from these are looked up, submitted and admitted, and checkpoints are evicted, under every order. Times
are microseconds, medians and 90th percentiles; ``met`` says whether the bars of the record are.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import arguments, keep
from hybridcache.engine.sequence import Status
from hybridcache.engine.step import ScheduledTokens
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.sim.simulator import SimulatedSequence
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from hybridcache.workloads.base import UniqueIds
from models.configs import shipped_config

TURN, SHORT, LONG, EVERY = 400, 2000, 100_000, 8192
LONG_SHARE = 0.1
"""Of the nodes, in conversations of LONG tokens."""
BARS_US = {SHORT: 50.0, LONG: 300.0}
"""Looking up a prompt of so many tokens."""


class Filled:
    """A cache with so many nodes, and the token ids that it knows."""

    def __init__(self, nodes: int, eviction: str, seed: int = 0) -> None:
        spec = CacheSpec.from_config(shipped_config("tiny"), kv_dtype="bfloat16", state_dtype="float32")
        # Room for all checkpoints, with what blocks leave unused.
        budget = nodes * (2 * spec.request_bytes(TURN) + spec.request_bytes(1)) + 64 * spec.request_bytes(LONG)
        self.strategy = build("shared_pool", spec=spec, budget_bytes=budget)
        policy = PrefixPolicy(
            placement=("prompt_end", "every_n"), every=EVERY, retention="all", eviction=eviction, history_tokens=1 << 40
        )
        self.cache = PrefixCache(self.strategy, policy, seed=seed)
        self._random, self._unique, self._next = np.random.default_rng(seed), UniqueIds(), 0
        self.known: dict[str, list[np.ndarray]] = {"short": [], "long": [], "every": []}
        long = max(int(nodes * LONG_SHARE) // (LONG // TURN), 1)
        for _ in range(long):
            self._converse("long", LONG, TURN)
            self._converse("every", LONG, LONG)
        while self.cache.index.num_nodes < nodes:
            self._converse("short", SHORT, TURN)

    def _converse(self, kind: str, length: int, turn: int) -> None:
        ids = self.ids(length)
        for end in range(turn, length + 1, turn):
            seq = self.request(ids[:end])
            self.cache.submitted(seq)
            self.run(seq)
        self.known[kind].append(ids)

    def ids(self, count: int) -> np.ndarray:
        return self._random.integers(0, 150_000, count, dtype=np.int32)

    def request(self, ids: np.ndarray) -> SimulatedSequence:
        self._next += 1
        self.cache.now_s += 0.1
        return SimulatedSequence(self._next, len(ids), 1, ids=np.append(ids, np.int32(0)), unique=self._unique)

    def run(self, seq: SimulatedSequence) -> None:
        """Admit it, compute it, and end it."""
        cache, strategy = self.cache, self.strategy
        found = cache.find(seq)
        if not cache.admit(seq, found, seq.prompt_len, urgent=True):
            raise RuntimeError(f"no room ({strategy.usage()})")
        cache.admitted(seq, found, first=True)
        strategy.settle_states([seq.seq_id])
        start = 0 if found is None else found.position
        cache.keep(cache.plan([ScheduledTokens(seq, start, seq.prompt_len - start)]))
        seq.status, seq.num_computed, seq.num_output, seq.num_settled = Status.RUNNING, seq.prompt_len, 1, 1
        cache.ending(seq)
        strategy.release(seq.seq_id)
        cache.ended(seq)

    def follow_up(self, kind: str, turn: int) -> np.ndarray:
        """A prompt that goes on from a conversation."""
        some = self.known[kind]
        return np.append(some[int(self._random.integers(len(some)))], self.ids(turn))


def microseconds(work: Callable[[Any], object], given: Iterable[Any]) -> dict[str, float]:
    """Median and 90th percentile of a call's time."""
    times = []
    for each in given:
        started = time.perf_counter()
        work(each)
        times.append((time.perf_counter() - started) * 1e6)
    return {"median_us": round(float(np.median(times)), 2), "p90_us": round(float(np.percentile(times, 90)), 2)}


def measure(nodes: int, eviction: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each operation."""
    started = time.perf_counter()
    filled = Filled(nodes, eviction)
    cache, built_s = filled.cache, time.perf_counter() - started
    rows: list[dict[str, Any]] = []

    def add(operation: str, work: Callable[[Any], object], given: Iterable[Any], **where: int) -> None:
        rows.append({"eviction": eviction, "operation": operation, **where, **microseconds(work, given)})

    def look_up(seq: Any) -> None:
        cache._version += 1  # what was found before is out of date, as after every checkpoint that is made or evicted
        if cache.find(seq) is None:
            raise RuntimeError("a conversation is lost")

    for kind, tokens, checkpoints in (("short", SHORT, TURN), ("long", LONG, TURN), ("every", LONG, EVERY)):
        prompts = [filled.follow_up(kind, 100) for _ in range(rounds if tokens == SHORT else rounds // 10)]
        where = {"tokens": tokens, "checkpoint_every": checkpoints}
        add("walk", cache.index.walk, prompts, **where)
        seqs = [filled.request(prompt) for prompt in prompts]
        add("submit", cache.submitted, seqs, **where)
        add("look up", look_up, seqs, **where)
        add("admit and end", filled.run, seqs, **where)
    step = [ScheduledTokens(filled.request(filled.ids(100)), 100, 1) for _ in range(256)]
    for item in step:
        cache.submitted(item.seq)
        cache._prompts[item.seq.seq_id].wanted_at.clear()
    add("plan a step of 256 requests", cache.plan, [step] * rounds)
    for item in step:
        cache.ended(item.seq)
    live = len(cache)
    add("evict", lambda _: cache.make_room(urgent=False), range(rounds))
    if live - len(cache) != rounds:
        raise RuntimeError("checkpoints were not evicted")
    for row in rows:
        row |= {"nodes": nodes, "checkpoints": live, "built_s": round(built_s, 1)}
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--evictions", nargs="*", default=[name for name in ORDERS if name != "farthest"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for eviction in args.evictions:
        gc.collect()
        gc.freeze()
        for row in measure(args.nodes, eviction, args.rounds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    slow = [r for r in rows if r["operation"] == "look up" and r["median_us"] > BARS_US[r["tokens"]]]
    keep(args.out, bars_us=BARS_US, met=not slow, rows=rows)
    if slow:
        sys.exit(f"error: {len(slow)} of the rows are slower than {BARS_US}")


if __name__ == "__main__":
    main()
