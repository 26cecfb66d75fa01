"""Memory with several owners: what checkpoints, restored and forked requests share, and what they never do.

Random operations drive every strategy beside a dictionary model. The model gives every state and every KV entry a symbol of
its own and says who must own it; whatever a strategy does (compaction renumbers units), symbols and units must correspond one
to one, and the bytes of every kind must be those of the symbols. In physical pools the bytes themselves are written and read.
"""

from collections import Counter
from itertools import count
from random import Random

import pytest
from strategies_contents import Contents, key_entries
from strategies_specs import build_in, small_spec

from hybridcache.observe.pool_map import LEVELS, pool_map, shares
from hybridcache.strategies import Kind, Strategy, build

VARIANTS = [
    ("byte_exact", {}, False),
    ("shared_pool", {"mode": "exclusive"}, False),
    ("shared_pool", {"mode": "exclusive"}, True),
    ("shared_pool", {"mode": "carve"}, False),
    ("shared_pool", {"mode": "carve"}, True),
    ("padded_page", {}, False),
    ("padded_page", {}, True),
    ("large_block", {}, False),
    ("large_block", {}, True),
    ("static_split", {"page_size": 16, "ratio": 2.0}, False),
    ("static_split", {"ratio": 2.0, "page_size": 8}, True),
    ("static_split", {"q": 3, "extra_buffer": True, "ratio": 4.0}, False),
    ("two_ended", {"page_size": 8}, False),
    ("two_ended", {"page_size": 8}, True),
    ("lcm_carve", {"page_size": 8}, False),
    ("lcm_carve", {"order": "jenga", "page_size": 4}, False),
]
IDS = [
    f"{name}-{'-'.join(map(str, options.values()))}-{'physical' if p else 'accounting'}"
    for name, options, p in VARIANTS
]


class Model:
    """Who owns which symbol: of every owner the symbol of its states and those of its KV entries."""

    def __init__(self, pool: Strategy) -> None:
        self.pool = pool
        self.fresh = count()
        self.tokens: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self.reads: dict[int, int] = {}
        self.kv: dict[int, list[int]] = {}
        self.points: dict[int, tuple[int, list[int], int]] = {}
        """Symbol of the states, those of the entries, and tokens, by key."""

    def entries(self, tokens: int) -> int:
        return -(-tokens // self.pool.cut.entry_tokens) * self.pool.cut.entry_units

    def extend(self, seq_id: int, tokens: int) -> None:
        kv = self.kv[seq_id]
        kv.extend(next(self.fresh) for _ in range(self.entries(tokens) - len(kv)))
        self.tokens[seq_id] = tokens

    def state_owners(self, symbol: int) -> int:
        owners = [*self.states.values(), *self.reads.values(), *(states for states, _, _ in self.points.values())]
        return owners.count(symbol)

    # -- operations ------------------------------------------------------------------------------------------------

    def admit(self, seq_id: int, tokens: int) -> None:
        self.states[seq_id], self.kv[seq_id] = next(self.fresh), []
        self.extend(seq_id, tokens)

    def grow(self, seq_id: int, tokens: int) -> None:
        if tokens > self.tokens[seq_id] and self.state_owners(self.states[seq_id]) > 1:
            self.reads[seq_id], self.states[seq_id] = self.states[seq_id], next(self.fresh)
        self.extend(seq_id, tokens)

    def release(self, seq_id: int) -> None:
        for held in (self.tokens, self.states, self.kv):
            del held[seq_id]
        self.reads.pop(seq_id, None)

    def checkpoint(self, seq_id: int, key: int) -> None:
        self.points[key] = (self.states[seq_id], list(self.kv[seq_id]), self.tokens[seq_id])

    def reserve(self, seq_id: int, key: int, position: int) -> None:
        self.points[key] = (next(self.fresh), self.kv[seq_id][: self.entries(position)], position)

    def restore(self, seq_id: int, key: int, tokens: int) -> None:
        states, kv, cached = self.points[key]
        whole = cached // self.pool.cut.entry_tokens * self.pool.cut.entry_units
        self.states[seq_id], self.kv[seq_id], self.reads[seq_id] = next(self.fresh), kv[:whole], states
        self.extend(seq_id, tokens)

    def fork(self, seq_id: int, child: int, tokens: int) -> None:
        self.checkpoint(seq_id, -1)
        self.restore(child, -1, tokens)
        del self.points[-1]

    # -- what must be so -------------------------------------------------------------------------------------------

    def check(self) -> None:
        pool = self.pool
        pool.check_integrity()
        assert pool.residents == tuple(self.tokens)
        assert pool.cached == tuple(self.points)
        if pool.has_addresses:
            self.check_units()
        self.check_bytes()

    def check_units(self) -> None:
        pool, states, kv = self.pool, set(), set()
        for seq_id, one in pool._residents.items():
            kv |= set(zip(self.kv[seq_id], pool.kv_table(seq_id), strict=True))
            states.add((self.states[seq_id], tuple(one.states.units)))
            if seq_id in self.reads:
                states.add((self.reads[seq_id], tuple(pool._reads[seq_id].units)))
        for key, point in pool._checkpoints.items():
            kv |= set(zip(self.points[key][1], key_entries(pool, key), strict=True))
            states.add((self.points[key][0], tuple(point.states.units)))
        for pairs in (states, kv):
            assert len({symbol for symbol, _ in pairs}) == len(pairs), "an owner finds other memory than was its own"
            assert len({unit for _, unit in pairs}) == len(pairs), "memory was given to two that share nothing"

    def check_bytes(self) -> None:
        pool, cut, usage = self.pool, self.pool.cut, self.pool.usage()
        running = Counter(symbol for kv in self.kv.values() for symbol in kv)
        cached = {symbol for _, kv, _ in self.points.values() for symbol in kv} - set(running)
        states = {*self.states.values(), *self.reads.values()}
        state = cut.state.num_bytes * cut.states_per_request
        extra = len(self.tokens) * 2 * state if getattr(pool, "extra_buffer", False) else 0
        cached_states = {states for states, _, _ in self.points.values()} - states
        assert usage.state_bytes == len(states) * state + extra
        assert usage.kv_bytes == len(running) * cut.kv.num_bytes
        assert usage.cached == len(cached_states) * state + len(cached) * cut.kv.num_bytes
        again = sum(n - 1 for n in running.values()) // cut.entry_units * cut.entry_tokens
        tokens = sum(self.tokens.values()) - again
        useful = len(self.tokens) * pool.spec.state_bytes + tokens * pool.spec.kv_bytes_per_token
        assert usage.useful == useful
        assert usage.useful + usage.padding + usage.reserved + usage.cached + usage.free == usage.budget
        for span in pool.spans():
            assert (span.kind is Kind.CACHED) == (span.seq_id in self.points and span.seq_id >= 100), span


class Driver:
    """One pool, its model, and its bytes where it is physical."""

    def __init__(self, pool: Strategy, rng: Random) -> None:
        self.pool, self.rng, self.model = pool, rng, Model(pool)
        self.contents = Contents(pool, rng) if pool.physical else None
        self.keys = count(100)
        self.settled: set[int] = set()
        """Residents that have not grown since the last step."""
        self.pending: dict[int, int] = {}
        """Resident that is to write the states of a reserved checkpoint, by key."""
        self.moved = 0
        self.done: Counter[str] = Counter()

    def tell(self, what: str, *arguments: int) -> None:
        if self.contents is not None:
            getattr(self.contents, what)(*arguments)

    def operate(self) -> None:
        rng, model = self.rng, self.model
        seq_id = rng.randrange(6)
        usable = [key for key in model.points if key not in self.pending]
        if rng.random() < 0.25:
            self.step()
        elif rng.random() < 0.12 and usable:
            self.drop(rng.choice(usable))
        elif seq_id not in model.tokens:
            if usable and rng.random() < 0.7:
                self.restore(seq_id, rng.choice(usable))
            elif self.settled and rng.random() < 0.5:
                self.fork(rng.choice(sorted(self.settled)), seq_id)
            else:
                self.admit(seq_id)
        elif rng.random() < 0.2:
            self.release(seq_id)
        elif seq_id in self.settled and rng.random() < 0.5:
            self.checkpoint(seq_id)
        elif seq_id not in self.settled and rng.random() < 0.5:
            self.reserve(seq_id)
        else:
            self.grow(seq_id)

    def refused(self, before: tuple) -> None:
        assert before == (self.pool.usage(), sorted(self.pool.spans())), "a refused operation changed something"
        self.done["refused"] += 1

    def before(self) -> tuple:
        return self.pool.usage(), sorted(self.pool.spans())

    def admit(self, seq_id: int) -> None:
        tokens, before = self.rng.randint(1, 60), self.before()
        if self.pool.admit(seq_id, tokens):
            self.model.admit(seq_id, tokens)
            self.tell("admitted", seq_id)
            self.done["admit"] += 1
        else:
            self.refused(before)

    def grow(self, seq_id: int) -> None:
        tokens, before = self.model.tokens[seq_id] + self.rng.choice((1, 1, self.rng.randint(1, 40))), self.before()
        if tokens <= self.pool.room[seq_id] and self.rng.random() < 0.5:
            self.pool.fill({seq_id: tokens})
        elif not self.pool.grow(seq_id, tokens):
            self.refused(before)
            return
        self.model.grow(seq_id, tokens)
        self.settled.discard(seq_id)
        self.done["grow"] += 1

    def release(self, seq_id: int) -> None:
        for key in [key for key, writer in self.pending.items() if writer == seq_id]:
            self.drop(key)
        self.pool.release(seq_id)
        self.model.release(seq_id)
        self.tell("released", seq_id)
        self.settled.discard(seq_id)
        self.done["release"] += 1

    def checkpoint(self, seq_id: int) -> None:
        key, free = next(self.keys), self.pool.usage().free
        self.pool.checkpoint(seq_id, key)
        assert self.pool.usage().free == free
        assert self.pool.room[seq_id] == 0
        self.model.checkpoint(seq_id, key)
        self.tell("checkpointed", seq_id, key)
        self.done["checkpoint"] += 1

    def reserve(self, seq_id: int) -> None:
        written = len(self.contents.running[seq_id]) if self.contents else 0
        total = self.model.tokens[seq_id]
        if total == written:
            return
        key, before, position = next(self.keys), self.before(), self.rng.randint(written + 1, total)
        if self.pool.reserve_checkpoint(seq_id, key, position):
            self.model.reserve(seq_id, key, position)
            self.tell("reserve", seq_id, key, position)
            self.pending[key] = seq_id
            self.done["reserve"] += 1
        else:
            self.refused(before)

    def restore(self, seq_id: int, key: int) -> None:
        tokens, before = self.pool.cached_tokens(key) + self.rng.randint(1, 30), self.before()
        if self.pool.restore(seq_id, key, tokens):
            self.model.restore(seq_id, key, tokens)
            self.tell("restored", seq_id, key)
            self.done["restore"] += 1
        else:
            self.refused(before)

    def fork(self, seq_id: int, child: int) -> None:
        tokens, before = self.model.tokens[seq_id] + self.rng.randint(1, 30), self.before()
        if self.pool.fork(seq_id, child, tokens):
            self.model.fork(seq_id, child, tokens)
            self.tell("forked", seq_id, child)
            self.done["fork"] += 1
        else:
            self.refused(before)

    def drop(self, key: int) -> None:
        self.pool.drop(key)
        del self.model.points[key]
        self.pending.pop(key, None)
        self.tell("dropped", key)
        self.done["drop"] += 1

    def step(self) -> None:
        """All that have grown run; then reads are over."""
        if self.contents is not None:
            self.moved += self.contents.step([s for s in self.model.tokens if s not in self.settled])
            assert self.moved == self.pool.bytes_moved + self.pool.bytes_copied, "bytes moved are not those charged"
        else:
            assert self.pool.drain_moves() == [], "nobody drains an accounting pool: it must not collect moves"
            self.pool.settle_states()
        self.model.reads.clear()
        self.pending.clear()
        self.settled = set(self.model.tokens)


def small_pool(rng: Random, name: str, options: dict, physical: bool) -> Strategy:
    spec = small_spec(rng)
    while name == "padded_page" and physical and len(spec.attention_layers) > len(spec.state_layers):
        spec = small_spec(rng)  # several attention groups have no physical form
    budget = int(spec.request_bytes(120) * rng.uniform(2.0, 8.0)) + rng.randrange(300)
    if name not in ("byte_exact", "two_ended"):
        options = {**options, "placement_seed": rng.randrange(1 << 30)}
    return build_in(budget, name, spec, physical=physical, **options)


@pytest.mark.parametrize(("name", "options", "physical"), VARIANTS, ids=IDS)
def test_random_owners_against_a_dictionary(name: str, options: dict, physical: bool) -> None:
    done: Counter[str] = Counter()
    for seed in range(5):
        rng = Random(seed)
        driver = Driver(small_pool(rng, name, options, physical), rng)
        empty = driver.pool.usage()
        for number in range(110):
            driver.operate()
            try:
                driver.model.check()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, operation {number}: {error}") from error
        driver.step()
        for seq_id in driver.pool.residents:
            driver.release(seq_id)
        for key in driver.pool.cached:
            driver.drop(key)
        driver.model.check()
        assert driver.pool.usage() == empty, "memory was lost"
        done += driver.done
    assert min(done[what] for what in ("admit", "grow", "release", "checkpoint", "reserve", "restore", "drop")) >= 3, (
        done
    )
    assert done["fork"] >= 1
    assert done["refused"] >= 3


def test_the_pool_map_shows_cached_bytes() -> None:
    pool = build("shared_pool", spec=small_spec(Random(5)), budget_bytes=1 << 16)
    assert pool.admit(0, pool.request_limit() // 2)

    def share(*kinds: str) -> float:
        return sum(shares(pool_map(pool, 40)[kind]).sum() for kind in kinds)

    held = share("state", "kv")
    assert held > 5
    assert share("cached") == 0
    pool.checkpoint(0, 1)
    assert (share("state", "kv"), share("cached")) == (held, 0), "a resident holds them too"
    pool.release(0)
    assert share("state", "kv") == 0
    assert share("cached") == pytest.approx(held, abs=40 / LEVELS)
    pool.drop(1)
    assert share("state", "kv", "cached") == 0
