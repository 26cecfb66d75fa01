"""What every strategy keeps true, whatever is admitted, grown and released, and in whatever order.

A machine drives the variants of one strategy (accounting and physical, its modes) with the same random operations on a small
random model. After every operation it checks, with its own model of who holds how many tokens:

* no byte has two owners, and every span lies in the budget and belongs to a resident;
* useful + padding + reserved + free = budget, with useful bytes as the residents' tokens say;
* held is the sum of what the strategy's rule charges each resident, and the spans are as many bytes of each kind;
* an operation that was refused changed nothing, and was refused for want of bytes;
* the strategy's own bookkeeping is consistent (``check_integrity``).

At the end everything is released, and the pool must be as free as at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar
from unittest import TestCase

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies_contents import Contents
from strategies_specs import build_in, small_spec

from hybridcache.errors import UserError
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Kind, Span, Strategy
from hybridcache.strategies.layer_major import LayerMajor
from hybridcache.strategies.lcm_carve import LcmCarve
from hybridcache.strategies.shared_pool import SharedPool
from hybridcache.strategies.static_split import StaticSplit
from hybridcache.strategies.two_ended import TwoEnded

STEPS = settings(max_examples=30, stateful_step_count=150, deadline=None)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# -- what the rules charge for one request of n tokens: (bytes of states, bytes of KV) ---------------------------------


def charge_byte_exact(pool: Strategy, n: int) -> tuple[int, int]:
    return pool.spec.state_bytes, n * pool.spec.kv_bytes_per_token


def charge_shared_pool(pool: Strategy, n: int) -> tuple[int, int]:
    assert isinstance(pool, SharedPool)
    g, block = pool.geometry, pool.geometry.manager_block_bytes
    states = ceil_div(len(pool.spec.state_layers), g.states_per_manager_block)
    if pool.mode == "exclusive":
        return states * block, ceil_div(n, g.manager_block_tokens) * block
    return states * block, ceil_div(n, g.kernel_block_tokens) * g.kernel_block_bytes


def charge_layer_major(pool: Strategy, n: int) -> tuple[int, int]:
    assert isinstance(pool, LayerMajor)
    block = pool.group_size * pool.block_tokens * pool.spec.kv_bytes_per_token_per_layer
    states = ceil_div(len(pool.spec.state_layers), pool.group_size)
    attention = ceil_div(len(pool.spec.attention_layers), pool.group_size)
    return states * block, ceil_div(n, pool.block_tokens) * attention * block


def charge_pages(pool: Strategy, n: int) -> tuple[int, int]:
    """Whole states, and KV by pages of a number of tokens: static_split, two_ended, lcm_carve."""
    assert isinstance(pool, StaticSplit | TwoEnded | LcmCarve)
    spec = pool.spec
    kv = ceil_div(n, pool.page_size) * pool.page_size * spec.kv_bytes_per_token
    if isinstance(pool, LcmCarve):
        page = pool.page_size * spec.kv_bytes_per_token
        return ceil_div(spec.state_bytes, page) * page, kv
    layer = spec.stored_state_bytes_per_layer if pool.physical else spec.state_bytes_per_layer
    slots = 3 if isinstance(pool, StaticSplit) and pool.extra_buffer else 1
    return slots * layer * len(spec.state_layers), kv


# -- the machine -------------------------------------------------------------------------------------------------------


@dataclass
class Driven:
    """One pool under test, and what it must hold."""

    pool: Strategy
    tokens: dict[int, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    contents: Contents | None = None
    moved: int = 0
    refusals: int = 0

    def __post_init__(self) -> None:
        usage = self.pool.usage()
        self.reserved, self.free = usage.reserved, usage.free


class PoolMachine(RuleBasedStateMachine):
    """Subclasses name the variants: ``(strategy, options(rng), physical)``."""

    variants: ClassVar[list[tuple[str, Callable[[Random, CacheSpec], dict], bool]]]
    charge: ClassVar[Callable[[Strategy, int], tuple[int, int]]]
    one_kind_of_byte: ClassVar[bool] = True
    """Any free bytes serve states as well as KV, so admission is refused only where they are too few."""
    kv_takes_any_byte: ClassVar[bool] = True
    """As much, for growth."""
    follow_contents: ClassVar[bool] = False
    """Whether a step writes and reads back what kernels keep."""

    def __init__(self) -> None:
        super().__init__()
        self.driven: list[Driven] = []
        self.operations = 0

    @initialize(seed=st.integers(0, 2**24 - 1))
    def build(self, seed: int) -> None:
        rng = Random(seed)
        spec = small_spec(rng)
        budget = int(spec.request_bytes(150) * rng.uniform(1.0, 5.0)) + rng.randrange(300)
        for name, options, physical in self.variants:
            if name == "padded_page" and physical and len(spec.attention_layers) > len(spec.state_layers):
                physical = False  # several attention groups have no physical form
            pool = build_in(budget, name, spec, physical=physical, **options(rng, spec))
            self.driven.append(Driven(pool))
            if physical and self.follow_contents:
                self.driven[-1].contents = Contents(pool)

    @rule(salt=st.integers(0, 2**24 - 1))
    def operate(self, salt: int) -> None:
        """Admit a request (a chunk of a prompt that may be longer) if it is not resident; grow or release it if it is.

        What is drawn seeds a generator together with the number of the operation: draws alone repeat each other so much that
        pools hardly fill and fragment.
        """
        self.operations += 1
        rng = Random(salt << 16 | self.operations)
        seq_id, release = rng.randrange(8), rng.random() < 0.4
        chunk, rest, more = rng.randint(1, 100), rng.choice((0, rng.randint(1, 60))), rng.randint(0, 150)
        for one in self.driven:
            if seq_id not in one.tokens:
                self.admit(one, seq_id, chunk, chunk + rest)
            elif release:
                self.release(one, seq_id)
            else:
                self.grow(one, seq_id, one.tokens[seq_id] + more)

    def admit(self, one: Driven, seq_id: int, chunk: int, prompt: int) -> None:
        free = one.pool.usage().free
        needed = sum(type(self).charge(one.pool, prompt))
        if one.pool.admit(seq_id, chunk, prompt_tokens=prompt):
            assert needed <= free, "admitted a prompt that does not fit"
            one.tokens[seq_id] = chunk
            if one.contents:
                one.contents.admitted(seq_id)
        else:
            self.refused(one, must_lack=needed if self.one_kind_of_byte else None)

    def grow(self, one: Driven, seq_id: int, total: int) -> None:
        free = one.pool.usage().free
        charge = type(self).charge
        if total <= one.pool.room[seq_id] and self.operations % 2:
            one.pool.fill({seq_id: total})
            one.tokens[seq_id] = total
            return
        needed = sum(charge(one.pool, total)) - sum(charge(one.pool, one.tokens[seq_id]))
        if one.pool.grow(seq_id, total):
            assert needed <= free, "grew beyond the free bytes"
            one.tokens[seq_id] = total
        else:
            self.refused(one, must_lack=needed if self.kv_takes_any_byte else None)

    def release(self, one: Driven, seq_id: int) -> None:
        one.pool.release(seq_id)
        del one.tokens[seq_id]
        if one.contents:
            one.contents.released(seq_id)

    @precondition(lambda self: self.follow_contents)
    @rule()
    def step(self) -> None:
        """An engine's step: relocations are executed, what was kept is read back, new tokens are written."""
        for one in self.driven:
            if one.contents:
                one.moved += one.contents.step()
                assert one.moved == one.pool.bytes_moved, "bytes moved are not the bytes charged"
            else:
                assert one.pool.drain_moves() == [], "nobody drains an accounting pool: it must not collect moves"

    def refused(self, one: Driven, must_lack: int | None) -> None:
        one.refusals += 1
        assert list(one.pool.spans()) == one.spans, "a refused operation changed what is held"
        if must_lack is not None:
            slack = 2 * one.pool.spec.kv_bytes_per_token if isinstance(one.pool, TwoEnded) else 0  # it counts in tokens
            assert must_lack > one.pool.usage().free - slack, "refused though the bytes are free"

    @invariant()
    def consistent(self) -> None:
        for one in self.driven:
            pool, spec = one.pool, one.pool.spec
            pool.check_integrity()
            usage = pool.usage()
            assert usage.useful == sum(spec.request_bytes(n) for n in one.tokens.values())
            assert usage.useful + usage.padding + usage.reserved + usage.free == usage.budget
            assert min(usage.useful, usage.padding, usage.reserved, usage.free) >= 0
            assert usage.reserved == one.reserved
            assert usage.residents == len(one.tokens)
            assert pool.residents == tuple(one.tokens)
            charges = [type(self).charge(pool, n) for n in one.tokens.values()]
            assert usage.state_bytes == sum(state for state, _ in charges)
            assert usage.kv_bytes == sum(kv for _, kv in charges)
            for seq_id, n in one.tokens.items():
                room = max(pool.room[seq_id], n)
                assert type(self).charge(pool, room) == type(self).charge(pool, n), "what it has room for is not held"
            one.spans = list(pool.spans())
            if pool.has_addresses:
                self.no_byte_has_two_owners(one)

    def no_byte_has_two_owners(self, one: Driven) -> None:
        end = 0
        held = {(seq_id, kind): 0 for seq_id in one.tokens for kind in (Kind.STATE, Kind.KV)}
        for offset, num_bytes, kind, seq_id in sorted((s.offset, s.num_bytes, s.kind, s.seq_id) for s in one.spans):
            assert offset >= end, "two spans share bytes"
            end = offset + num_bytes
            held[seq_id, kind] += num_bytes
        assert end <= one.pool.budget_bytes
        for seq_id, n in one.tokens.items():
            assert (held[seq_id, Kind.STATE], held[seq_id, Kind.KV]) == type(self).charge(one.pool, n)

    def teardown(self) -> None:
        for one in self.driven:
            for seq_id in one.tokens:
                one.pool.release(seq_id)
            usage = one.pool.usage()
            assert (usage.free, usage.reserved) == (one.free, one.reserved)
            assert usage.held == usage.residents == 0
            assert list(one.pool.spans()) == []
            one.pool.check_integrity()
            assert one.pool.admit(0, one.pool.request_limit()), "an emptied pool holds its longest request"


def no_options(rng: Random, spec: CacheSpec) -> dict:
    return {}


def placement(rng: Random, spec: CacheSpec) -> dict:
    return {"placement_seed": rng.randrange(1 << 30)}


def shared_pool_options(mode: str) -> Callable[[Random, CacheSpec], dict]:
    def options(rng: Random, spec: CacheSpec) -> dict:
        found: dict = {"mode": mode, **placement(rng, spec)}
        if rng.random() < 0.7:
            kb, n = rng.choice((8, 16)), rng.randint(1, len(spec.state_layers))
            m = ceil_div(n * spec.stored_state_bytes_per_layer, kb * spec.kv_bytes_per_token) + rng.randint(0, 3)
            while (m * kb * spec.kv_bytes_per_token) % 128:
                m += 1
            found |= {"kernel_block_tokens": kb, "kernel_blocks_per_manager_block": m, "states_per_manager_block": n}
        return found

    return options


def static_split_options(rng: Random, spec: CacheSpec) -> dict:
    extra = rng.random() < 0.3
    return {
        "ratio": rng.choice((0.3, 0.9, 2.0)),
        "q": rng.choice((3, 5)) if extra else rng.choice((1, 1, 2)),
        "extra_buffer": extra,
        "page_size": rng.choice((8, 16, 32, None)),
        "max_running": rng.choice((None, 3, 100)),
        "placement_seed": rng.choice((None, rng.randrange(1 << 30))),
    }


def page_options(rng: Random, spec: CacheSpec) -> dict:
    return {"page_size": rng.choice((1, 4, 8, 16, 16, 32, 64))}


class ByteExactMachine(PoolMachine):
    variants: ClassVar = [("byte_exact", no_options, False)]
    charge: ClassVar = charge_byte_exact


class SharedPoolMachine(PoolMachine):
    variants: ClassVar = [("shared_pool", shared_pool_options("exclusive"), physical) for physical in (False, True)]
    charge: ClassVar = charge_shared_pool


class SharedPoolCarveMachine(PoolMachine):
    variants: ClassVar = [("shared_pool", shared_pool_options("carve"), physical) for physical in (False, True)]
    charge: ClassVar = charge_shared_pool
    one_kind_of_byte: ClassVar = False


class PaddedPageMachine(PoolMachine):
    variants: ClassVar = [("padded_page", placement, physical) for physical in (False, True)]
    charge: ClassVar = charge_layer_major


class LargeBlockMachine(PoolMachine):
    variants: ClassVar = [("large_block", placement, physical) for physical in (False, True)]
    charge: ClassVar = charge_layer_major


class StaticSplitMachine(PoolMachine):
    variants: ClassVar = [("static_split", static_split_options, physical) for physical in (False, True)]
    charge: ClassVar = charge_pages
    one_kind_of_byte: ClassVar = False
    kv_takes_any_byte: ClassVar = False


class TwoEndedMachine(PoolMachine):
    variants: ClassVar = [("two_ended", page_options, physical) for physical in (False, True)]
    charge: ClassVar = charge_pages
    follow_contents: ClassVar = True


class LcmCarveMachine(PoolMachine):
    variants: ClassVar = [
        ("lcm_carve", lambda rng, spec: {"order": "fullest", **page_options(rng, spec), **placement(rng, spec)}, False),
        ("lcm_carve", lambda rng, spec: {"order": "jenga", **page_options(rng, spec), **placement(rng, spec)}, False),
    ]
    charge: ClassVar = charge_pages
    one_kind_of_byte: ClassVar = False


def case(machine: type[PoolMachine]) -> type[TestCase]:
    """What pytest collects of a machine."""
    machine.TestCase.settings = STEPS
    return machine.TestCase


TestByteExact = case(ByteExactMachine)
TestSharedPool = case(SharedPoolMachine)
TestSharedPoolCarve = case(SharedPoolCarveMachine)
TestPaddedPage = case(PaddedPageMachine)
TestLargeBlock = case(LargeBlockMachine)
TestStaticSplit = case(StaticSplitMachine)
TestTwoEnded = case(TwoEndedMachine)
TestLcmCarve = case(LcmCarveMachine)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda pool: pool.admit(3, 10), "seq_id=3: is resident already"),
        (lambda pool: pool.admit(4, 0), "num_tokens=0"),
        (lambda pool: pool.admit(4, 5, prompt_tokens=4), "prompt_tokens=4"),
        (lambda pool: pool.grow(3, 5), "num_tokens=5: .* never shrinks"),
        (lambda pool: pool.grow(4, 5), "seq_id=4: is not resident"),
        (lambda pool: pool.release(4), "seq_id=4: is not resident"),
    ],
)
def test_misuse_is_named(operation: Callable[[Strategy], object], message: str) -> None:
    pool = build_in(1 << 20, "byte_exact", small_spec(Random(0)))
    assert pool.admit(3, 10)
    with pytest.raises(UserError, match=message):
        operation(pool)
