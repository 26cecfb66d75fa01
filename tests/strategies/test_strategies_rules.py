"""Every strategy's rules with values worked out by hand, on a model small enough to follow.

The model: 6 linear layers of 512 B a state (3,072 B in all; 640 B and 3,840 B stored with the ring's fourth column) and 2
attention layers of 96 B a token each (192 B in both).
"""

from collections.abc import Callable

import pytest
from pool_model import pool_spec
from strategies_specs import GIB, build_in, hybrid, qwen3_next

from hybridcache.errors import UserError
from hybridcache.strategies import STRATEGIES, Kind, Move, Strategy, build
from hybridcache.strategies.shared_pool import SharedPool

SPEC = pool_spec()
UNIT = 3072
"""The states of one request, or 16 tokens of KV."""
BLOCKS = {"kernel_block_tokens": 8, "kernel_blocks_per_manager_block": 2, "states_per_manager_block": 4}
"""Manager blocks of 3,072 B: 2 kernel blocks of 8 tokens (1,536 B), or 4 states; a request has 2 blocks of states."""


def make(name: str, units: float, **options: object) -> Strategy:
    return build(name, spec=SPEC, budget_bytes=int(units * UNIT), **options)


def residents(pool: Strategy, tokens: int) -> int:
    count = 0
    while pool.admit(count, tokens):
        count += 1
    pool.check_integrity()
    return count


def test_the_model_is_what_the_values_are_worked_out_for() -> None:
    assert (SPEC.state_bytes, SPEC.state_bytes_per_layer, SPEC.stored_state_bytes_per_layer) == (3072, 512, 640)
    assert (SPEC.kv_bytes_per_token, SPEC.kv_bytes_per_token_per_layer) == (192, 96)


@pytest.mark.parametrize("name", ["byte_exact", "shared_pool"])
def test_residents_grow_together_or_not_at_all(name: str) -> None:
    """States of two requests (two blocks each in shared_pool) and a unit of tokens each: both grow by as much again, and not
    by a token more."""
    pool = make(name, 6 if name == "byte_exact" else 8, **(BLOCKS if name == "shared_pool" else {}))
    assert pool.admit(0, 16)
    assert pool.admit(1, 16)
    assert not pool.grow_all({0: 33, 1: 32}), "a page more than there is"
    assert [pool.num_tokens(i) for i in (0, 1)] == [16, 16]
    assert pool.grow_all({0: 32, 1: 32})
    assert [pool.num_tokens(i) for i in (0, 1)] == [32, 32]
    assert pool.usage().free == 0
    assert not pool.grow_all({1: 33})
    assert pool.grow_all({0: 32, 1: 32}), "nothing to be taken"
    pool.check_integrity()
    pool.release(0)
    pool.checkpoint(1, 0)
    assert not pool.grow_all({1: 33}), "its states are another owner's, too"
    assert pool.grow(1, 33)


# -- shared_pool -------------------------------------------------------------------------------------------------------


def test_exclusive_blocks() -> None:
    pool = make("shared_pool", 10, **BLOCKS)
    assert pool.admit(0, 17)  # 2 blocks of states, 2 of KV
    assert (pool.usage().state_bytes, pool.usage().kv_bytes) == (2 * UNIT, 2 * UNIT)
    assert pool.usage().padding == 4 * UNIT - (3072 + 17 * 192)
    assert (list(pool._residents[0].states.units), pool.kv_table(0).tolist()) == ([0, 1], [2, 3])
    pool.release(0)
    assert residents(pool, 12) == 3
    assert pool.usage().free == UNIT


def test_carve_shares_the_kernel_blocks_of_a_block() -> None:
    pool = make("shared_pool", 10, mode="carve", **BLOCKS)
    assert pool.admit(0, 17)  # a whole block and one kernel block of another
    assert pool.usage().kv_bytes == 3 * 1536
    assert pool.kv_table(0).tolist() == [4, 5, 6]
    assert pool.usage().free == 6 * UNIT + 1536, "the other half of the last block is free"
    pool.check_integrity()
    assert pool.admit(1, 8)
    assert pool.kv_table(1).tolist() == [7], "the other half of the block that is open"
    assert pool.admit(2, 8)  # states in 6 and 7; opens block 8
    assert pool.grow(2, 32), "3 more: a whole block, then the open half"
    assert pool.kv_table(2).tolist() == [16, 18, 19, 17]
    for seq_id in (0, 1, 2):
        pool.release(seq_id)
    assert residents(pool, 8) == 4, "two share a block"
    assert pool.usage().free == 0


def test_carve_takes_from_the_fullest_parent() -> None:
    pool = build(
        "shared_pool",
        spec=SPEC,
        budget_bytes=12 * 6144,
        mode="carve",
        kernel_block_tokens=8,
        kernel_blocks_per_manager_block=4,
        states_per_manager_block=6,
    )
    for seq_id, tokens in ((0, 8), (1, 24), (2, 16)):
        assert pool.admit(seq_id, tokens)
    # Blocks 0, 2 and 3 hold states. Request 1 takes the 3 children left in block 1, request 2 opens block 4.
    assert pool.kv_table(0).tolist() == [4]
    assert pool.kv_table(1).tolist() == [5, 6, 7]
    assert pool.kv_table(2).tolist() == [16, 17]
    pool.release(0)  # block 1 has 3 of 4 used, block 4 has 2
    assert pool.grow(2, 24)
    assert pool.kv_table(2).tolist() == [16, 17, 4]


# -- large_block and padded_page ---------------------------------------------------------------------------------------


def test_the_watermark_holds_back_admission_and_not_growth() -> None:
    pool = make("large_block", 20, watermark=0.25)  # blocks of 16 tokens in 2 tensors; 5 stay free at admission
    assert (pool.block_tokens, pool.num_blocks, pool.state_groups) == (16, 20, 3)
    assert not pool.admit(0, 12 * 16 + 1)
    assert pool.admit(0, 12 * 16)
    assert pool.usage().free == 5 * UNIT
    assert not pool.admit(1, 1)
    assert pool.grow(0, 17 * 16)
    assert pool.usage().free == 0
    assert not pool.grow(0, 17 * 16 + 1)
    assert pool.request_limit() == 12 * 16


def test_large_block_has_no_null_block() -> None:
    assert residents(make("large_block", 20), 1) == 5


def test_padded_page_keeps_block_0_and_takes_a_block_per_group() -> None:
    pool = make("padded_page", 20.9)
    assert (pool.block_tokens, pool.page_bytes, pool.num_blocks) == (16, 1536, 20)
    assert (pool.usage().reserved, pool.usage().free) == (int(20.9 * UNIT) - 19 * UNIT, 19 * UNIT)
    assert pool.admit(0, 33)  # 3 groups of 2 linear layers, 3 blocks of KV
    assert list(pool._residents[0].states.units) == [1, 2, 3]
    assert pool.kv_table(0).tolist() == [4, 5, 6]
    assert pool.usage().held == 6 * UNIT
    pool.release(0)
    assert residents(pool, 16) == 4
    physical = make("padded_page", 20, physical=True)
    assert physical.admit(0, 1)
    assert list(physical.state_write_table(0)) == [1, 2, 3, 1, 2, 3]
    assert physical.layout.state.base == (0, 0, 0, 20 * 1536, 20 * 1536, 20 * 1536)


# -- static_split ------------------------------------------------------------------------------------------------------


def test_static_split_border_and_cap() -> None:
    def split(**options: object) -> Strategy:
        return build("static_split", spec=SPEC, budget_bytes=100_000, ratio=0.5, **options)

    pool = split()  # a third is 33,333 B: 10 slots; 69,280 B are left for 360 tokens
    assert (pool.num_slots, pool.num_kv_tokens, pool.running_cap) == (10, 360, 10)
    assert pool.usage().reserved == 100_000 - 10 * 3072 - 360 * 192
    assert residents(pool, 30) == 10
    assert not pool.admit(10, 1), "slots are gone though tokens are left"
    assert pool.usage().free == 60 * 192
    assert build("static_split", spec=SPEC, budget_bytes=100_000, ratio=1.0).num_slots == 16  # of 50,000 B
    capped = split(q=3)
    assert capped.running_cap == 3
    assert capped.usage().reserved == 100_000 - 3 * 3072 - 360 * 192
    assert residents(capped, 1) == 3
    assert split(max_running=2).running_cap == 2
    assert residents(split(q=3, extra_buffer=True), 1) == 3
    extra = split(q=4, extra_buffer=True)
    assert extra.admit(0, 1)
    assert extra.usage().state_bytes == 3 * 3072
    assert extra.running_cap == 2
    few = build("static_split", spec=SPEC, budget_bytes=31 * 3072 + 5 * 192, slots=31)
    assert (few.num_kv_tokens, few.running_cap) == (5, 2), "half as many requests as tokens"


def test_slots_that_the_cap_keeps_hold_checkpoints() -> None:
    pool = build("static_split", spec=SPEC, budget_bytes=100_000, ratio=0.5, q=5)  # 10 slots, 2 requests
    before = pool.usage()
    assert pool.admit(0, 10)
    assert pool.admit(1, 10)
    pool.checkpoint(0, 7)
    assert pool.grow(0, 11)  # a third slot: one of those kept
    pool.settle_states()
    usage = pool.usage()
    assert usage.cached == 3072
    assert usage.reserved == before.reserved - 3072
    assert not pool.admit(2, 1)
    pool.check_integrity()


# -- two_ended ---------------------------------------------------------------------------------------------------------


def test_two_ended_takes_the_hole_nearest_its_end() -> None:
    pool = make("two_ended", 20, page_size=16)  # pages are numbered from the low end: the far one is 19
    for seq_id in range(4):
        assert pool.admit(seq_id, 16)
    assert [(pool._residents[i].states.units[0], pool.kv_table(i)[0]) for i in range(4)] == [
        (0, 19),
        (1, 18),
        (2, 17),
        (3, 16),
    ]
    for seq_id in (2, 0, 1):
        pool.release(seq_id)
    for seq_id, slot, page in ((5, 0, 19), (6, 1, 18), (7, 2, 17), (8, 4, 15)):
        assert pool.admit(seq_id, 16)
        assert (pool._residents[seq_id].states.units[0], pool.kv_table(seq_id)[0]) == (slot, page)
    assert pool.bytes_moved == 0


def test_two_ended_admission_charges_a_state_in_tokens() -> None:
    pool = make("two_ended", 4, page_size=16)
    assert pool.state_charge_tokens == 16
    assert not pool.admit(0, 49)
    assert pool.admit(0, 48)
    odd = build("two_ended", spec=SPEC, budget_bytes=4 * UNIT - 1, page_size=16)
    assert not odd.admit(0, 48), "a byte is missing"


def test_two_ended_compacts_slots_for_a_page() -> None:
    pool = make("two_ended", 8, page_size=16)
    for seq_id in range(3):
        assert pool.admit(seq_id, 16)
    pool.release(0)  # slots 1 and 2 stay, pages 6 and 5
    assert pool.grow(1, 64)  # page 7, the hole, then 4 and 3, which close the gap
    assert pool.kv_table(1).tolist() == [6, 7, 4, 3]
    assert pool.bytes_moved == 0
    pool.drain_changed()
    assert pool.grow(2, 32)  # slot 2 goes to slot 0
    assert pool.bytes_moved == UNIT
    assert (list(pool._residents[2].states.units), pool.kv_table(2).tolist()) == ([0], [5, 2])
    assert pool.usage().free == 0
    pool.check_integrity()


def test_two_ended_compacts_the_slot_of_a_checkpoint() -> None:
    pool = make("two_ended", 8, page_size=16)
    for seq_id in range(3):
        assert pool.admit(seq_id, 16)
    pool.checkpoint(2, 9)
    pool.release(2)  # slot 2 and page 5 are the key's
    pool.release(0)
    assert pool.grow(1, 64)  # closes the gap
    assert pool.grow(1, 80)  # slot 2 goes to slot 0
    assert pool.bytes_moved == UNIT
    assert list(pool._checkpoints[9].states.units) == [0]
    assert pool.kv_table(1).tolist() == [6, 7, 4, 3, 2]
    pool.check_integrity()


def test_two_ended_compacts_where_a_byte_is_missing() -> None:
    pool = build("two_ended", spec=SPEC, budget_bytes=8 * UNIT - 1, page_size=16)
    for seq_id in range(3):
        assert pool.admit(seq_id, 16)
    pool.release(0)
    assert pool.grow(1, 64)  # two pages beyond the reach, and the gap is a byte too small for them
    assert pool.bytes_moved == UNIT
    pool.check_integrity()


def test_two_ended_compacts_pages_for_a_slot() -> None:
    pool = make("two_ended", 8, page_size=16)
    assert pool.admit(0, 48)
    assert pool.admit(1, 16)
    assert pool.grow(1, 48)
    assert pool.kv_table(1).tolist() == [4, 3, 2]
    pool.release(0)
    assert pool.admit(2, 16)  # slot 0, page 7
    pool.drain_changed()
    assert pool.admit(3, 16)  # no slot and no gap: pages 2 and 3, the outermost, go to 6 and 5
    assert pool.bytes_moved == 2 * UNIT
    assert pool.kv_table(1).tolist() == [4, 5, 6]
    assert pool.kv_table(3).tolist() == [3]
    assert pool.drain_changed() == (1,), "a table that compaction rewrote has changed"
    pool.check_integrity()


def test_two_ended_moves_in_order_with_a_tail_copy() -> None:
    pool = build(
        "two_ended", spec=SPEC, budget_bytes=8 * 3840, page_size=20, physical=True
    )  # 8 slots or pages of 3,840 B
    assert pool.admit(0, 20)
    assert pool.admit(1, 50)  # pages 6, 5 and 4; slots 0 and 1; a gap of 2
    pool.checkpoint(1, 9)
    pool.release(1)
    pool.release(0)  # page 7 and slot 0 are holes; the key holds slot 1 and pages 6 to 4
    assert pool.restore(2, 9, 51)  # slot 0; two entries are shared, page 4 is copied to the hole
    assert pool.kv_table(2).tolist() == [6, 5, 7]
    assert pool.drain_moves() == [Move(4 * 3840, 7 * 3840, 3840)]
    assert (pool.bytes_copied, pool.bytes_moved) == (3840, 0)
    pool.check_integrity()


# -- lcm_carve and byte_exact ------------------------------------------------------------------------------------------


def test_lcm_carve_fills_the_fullest_large_page() -> None:
    pool = make("lcm_carve", 8, page_size=4)  # a large page is a state, or 4 KV pages
    assert pool.children == 4
    assert pool.admit(0, 20)  # state in 0, pages in 1 and one in 2
    assert pool.kv_table(0).tolist() == [4, 5, 6, 7, 8]
    assert pool.admit(1, 4)  # state in 3
    assert pool.kv_table(1).tolist() == [9]
    assert pool.admit(2, 8)
    assert pool.kv_table(2).tolist() == [10, 11]
    assert pool.usage().held == 3 * UNIT + 8 * 768
    assert pool.usage().free == 3 * UNIT


def test_lcm_carve_in_jengas_order() -> None:
    pool = make("lcm_carve", 6, page_size=4, order="jenga")
    assert pool.admit(0, 4)  # state in 0, page in 1
    assert pool.admit(1, 4)  # state in 2, page in 3: an empty large page, not the half-used one
    assert pool.kv_table(1).tolist() == [12]
    assert pool.grow(1, 8)
    assert pool.kv_table(1).tolist() == [12, 13], "one that it uses already"
    assert pool.admit(2, 8)  # state in 4, pages in 5: nothing is empty any more
    assert pool.grow(2, 20)
    assert pool.kv_table(2).tolist() == [20, 21, 22, 23, 14], "then any other, the fullest"


def test_lcm_carve_large_page_is_a_state_rounded_up() -> None:
    pool = build("lcm_carve", spec=qwen3_next(), budget_bytes=20 * GIB)
    assert (pool.children, pool.large_page_bytes) == (50, 50 * 64 * 24_576)


def test_byte_exact_has_no_padding() -> None:
    pool = make("byte_exact", 3)
    assert pool.admit(0, 5)
    usage = pool.usage()
    assert (usage.held, usage.useful, usage.padding, usage.reserved, usage.free) == (4032, 4032, 0, 0, 5184)
    assert pool.request_limit() == 32


# -- several owners ----------------------------------------------------------------------------------------------------


def test_shared_bytes_count_once() -> None:
    pool = make("shared_pool", 20, **BLOCKS)
    assert pool.admit(0, 32)
    pool.checkpoint(0, 5)
    assert pool.room[0] == 0
    assert pool.usage().cached == 0
    assert pool.restore(1, 5, 40)  # 2 blocks of states and the third of KV are its own
    usage = pool.usage()
    assert usage.held == 7 * UNIT
    assert usage.useful == 2 * 3072 + 40 * 192
    assert {(span.seq_id, span.kind, span.owners) for span in pool.spans()} == {
        (0, Kind.STATE, 3),  # the request, the key and the reader
        (0, Kind.KV, 3),
        (1, Kind.STATE, 1),
        (1, Kind.KV, 1),
    }
    pool.settle_states()
    pool.release(0)
    usage = pool.usage()
    assert (usage.held, usage.cached, usage.free) == (5 * UNIT, 2 * UNIT, 13 * UNIT)
    assert usage.useful == 3072 + 40 * 192
    assert {(span.seq_id, span.kind, span.owners) for span in pool.spans()} == {
        (1, Kind.STATE, 1),
        (1, Kind.KV, 1),
        (1, Kind.KV, 2),
        (5, Kind.CACHED, 1),
    }
    pool.release(1)
    assert pool.usage().cached == 4 * UNIT
    assert int(pool.extents()[Kind.CACHED][:, 1].sum()) == 4 * UNIT
    pool.drop(5)
    assert pool.usage().free == 20 * UNIT


def test_a_request_goes_on_in_states_of_its_own() -> None:
    pool = make("shared_pool", 5, physical=True, **BLOCKS)
    assert pool.admit(0, 16)
    before = list(pool.state_write_table(0))
    pool.checkpoint(0, 5)
    pool.drain_changed()
    assert not pool.grow(0, 17), "2 blocks are left, and it would take 3"
    assert pool.room[0] == 0
    pool.drop(5)
    assert pool.grow(0, 17), "nobody else owns its states: in place"
    assert list(pool.state_write_table(0)) == before
    assert pool.drain_changed() == (0,)
    pool.release(0)
    assert pool.admit(0, 8)
    pool.checkpoint(0, 5)
    assert pool.grow(0, 9)
    assert list(pool.state_read_table(0)) == list(pool.checkpoint_table(5)) == before
    assert set(pool.state_write_table(0)).isdisjoint(before)
    assert pool.room[0] == 16
    pool.drain_changed()
    pool.settle_states()
    assert list(pool.state_read_table(0)) == list(pool.state_write_table(0))
    assert pool.drain_changed() == (0,), "its read table changed"
    assert pool.drain_changed() == ()


def test_states_that_are_read_are_nobody_elses_within_the_step() -> None:
    pool = make("shared_pool", 7, physical=True, **BLOCKS)
    assert pool.admit(0, 8)
    pool.checkpoint(0, 5)
    pool.release(0)
    assert pool.restore(1, 5, 17)  # 2 blocks of states and 2 of KV beside the key's 3
    read = list(pool.state_read_table(1))
    pool.drop(5)
    assert pool.usage().free == UNIT, "the states stay the reader's; the key's KV block goes"
    assert not pool.admit(2, 1)
    pool.settle_states()
    assert pool.usage().free == 3 * UNIT
    assert pool.admit(2, 1)
    assert set(pool.state_write_table(2)) & set(read)
    pool.check_integrity()


def test_reserved_checkpoints_take_states_and_share_kv() -> None:
    pool = make("shared_pool", 8, physical=True, **BLOCKS)
    assert pool.admit(0, 40)  # 2 + 3 blocks
    assert pool.reserve_checkpoint(0, 4, 20)
    assert pool.usage().cached == 2 * UNIT
    assert pool.usage().held == 5 * UNIT
    assert pool.cached_tokens(4) == 20
    assert set(pool.checkpoint_table(4)).isdisjoint(pool.state_write_table(0))
    assert pool.room[0] == 48, "its own states are nobody else's"
    assert not pool.reserve_checkpoint(0, 6, 40), "one block is left"
    assert pool.cached == (4,)
    pool.release(0)
    assert pool.usage().cached == 4 * UNIT, "2 of states and 2 of KV; the third block of KV is free"
    pool.check_integrity()


@pytest.mark.parametrize(
    ("name", "options", "cached", "moves"),
    [
        # exclusive: entry 1 is the second block; 5 tokens are one kernel block, 9 are two
        ("shared_pool", BLOCKS, 21, [1536]),
        ("shared_pool", BLOCKS, 25, [3072]),
        ("shared_pool", BLOCKS, 32, []),
        ("shared_pool", {"mode": "carve", **BLOCKS}, 21, [1536]),
        ("shared_pool", {"mode": "carve", **BLOCKS}, 24, []),
        # layer-major: as much in each of the two tensors
        ("large_block", {"manager_block_size": 48}, 53, [1536, 1536]),
        ("large_block", {"manager_block_size": 48}, 65, [3072, 3072]),
        ("padded_page", {}, 17, [1536, 1536]),
        ("static_split", {"page_size": 8}, 13, [768, 768]),
        ("two_ended", {"page_size": 8}, 13, [1536]),
    ],
)
def test_restoring_copies_the_kernel_blocks_of_the_tail(
    name: str, options: dict, cached: int, moves: list[int]
) -> None:
    pool = make(name, 60, physical=True, **options)
    assert pool.admit(0, cached)
    pool.checkpoint(0, 1)
    assert pool.restore(3, 1, cached + 1)
    found = pool.drain_moves()
    assert [move.num_bytes for move in found] == moves
    assert pool.bytes_copied == sum(moves)
    accounting = make(name, 60, **options)
    assert accounting.admit(0, cached)
    accounting.checkpoint(0, 1)
    assert accounting.restore(3, 1, cached + 1)
    assert accounting.bytes_copied == pool.bytes_copied
    assert accounting.drain_moves() == []
    whole, at = cached // pool.cut.entry_tokens, pool.layout.attention
    assert pool.kv_table(3)[:whole] == pool.kv_table(0)[:whole]
    if moves:
        src, dst = pool.kv_table(0)[whole], pool.kv_table(3)[whole]
        assert src != dst
        assert [(move.src, move.dst) for move in found] == [
            (base + src * at.manager_stride, base + dst * at.manager_stride) for base in sorted(at.base)[: len(moves)]
        ]


def test_fork_is_refused_without_a_trace() -> None:
    pool = make("shared_pool", 7, **BLOCKS)
    assert pool.admit(0, 17)  # 2 + 2 blocks
    before = pool.usage()
    assert not pool.fork(0, 1, 40), "2 blocks of states and 2 of KV, where 3 are free"
    assert pool.usage() == before
    assert pool.room[0] == 32
    with pytest.raises(UserError, match="num_tokens=17"):
        pool.fork(0, 1, 17)
    assert (pool.room[0], pool.cached) == (32, ())
    assert pool.fork(0, 1, 32)
    assert pool.usage().free == 0
    assert pool.cached == ()
    assert pool.room[0] == 0, "the child reads its states"
    assert not pool.grow(0, 18)
    pool.settle_states()
    assert pool.grow(0, 18), "nobody reads them any more"
    pool.check_integrity()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda pool: pool.checkpoint(9, 2), "seq_id=9: is not resident"),
        (lambda pool: pool.checkpoint(0, 1), "key=1: owns a checkpoint already"),
        (lambda pool: pool.checkpoint(0, "a"), "key='a': give a whole number"),
        (lambda pool: pool.reserve_checkpoint(0, 2, 0), "position=0: .*from 1 to 20"),
        (lambda pool: pool.reserve_checkpoint(0, 2, 21), "position=21: .*from 1 to 20"),
        (lambda pool: pool.reserve_checkpoint(9, 2, 1), "seq_id=9: is not resident"),
        (lambda pool: pool.restore(0, 1, 30), "seq_id=0: is resident already"),
        (lambda pool: pool.restore(3, 4, 30), "key=4: owns nothing"),
        (lambda pool: pool.restore(3, 1, 20), "num_tokens=20: key 1 holds 20 tokens"),
        (lambda pool: pool.restore(3, 1, 30, prompt_tokens=29), "prompt_tokens=29"),
        (lambda pool: pool.fork(9, 3, 30), "seq_id=9: is not resident"),
        (lambda pool: pool.fork(0, 3, 20), "num_tokens=20"),
        (lambda pool: pool.drop(4), "key=4: owns nothing"),
        (lambda pool: pool.cached_tokens(4), "key=4: owns nothing"),
        (lambda pool: pool.checkpoint_table(4), "key=4: owns nothing"),
        (lambda pool: pool.grow(0, 21) and pool.checkpoint(0, 2), "seq_id=0: .*settle_states"),
    ],
)
def test_misuse_of_cached_owners_is_named(operation: Callable[[Strategy], object], message: str) -> None:
    pool = make("shared_pool", 20, **BLOCKS)
    assert pool.admit(0, 20)
    pool.checkpoint(0, 1)
    with pytest.raises(UserError, match=message):
        operation(pool)
    pool.check_integrity()
    assert pool.cached == (1,)


# -- what lies beside the pool, and the identity -----------------------------------------------------------------------


def test_block_tables_are_charged() -> None:
    pool = make("padded_page", 20, table_rows=4, max_request_tokens=100)
    assert pool.table_bytes == 4 * (2 * 6 + 7) * 4  # 100 tokens are 7 blocks
    assert pool.pool_bytes == 20 * UNIT - 304
    assert pool.num_blocks == 19
    assert pool.usage().reserved == 20 * UNIT - 18 * UNIT
    assert pool.request_limit() == 100
    free = make("padded_page", 20, table_rows=4)
    assert free.request_limit() == 15 * 16, "a block less than without tables"
    assert free.table_bytes == 4 * (2 * 6 + 15) * 4
    assert make("padded_page", 20).table_bytes == 0
    assert make("padded_page", 20, max_request_tokens=1000).request_limit() == 16 * 16
    rows = 64
    budget = 10 * GIB
    carve, exclusive = (
        build(
            "shared_pool",
            spec=qwen3_next(),
            budget_bytes=budget,
            mode=mode,
            table_rows=rows,
            max_request_tokens=262_144,
        )
        for mode in ("carve", "exclusive")
    )
    assert carve.table_bytes == rows * (72 + 32_768) * 4
    assert exclusive.table_bytes == rows * (72 + 2_979) * 4


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_budget_asked_for_covers_block_tables(name: str) -> None:
    pool = build_in(4096, name, SPEC, table_rows=3)
    assert pool.admit(0, 1)
    assert pool.usage().reserved >= pool.table_bytes
    assert (pool.table_bytes > 0) == pool.has_addresses, "a bound needs no tables"
    pool.check_integrity()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_identity_is_not_a_tautology(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved, free, held and cached bytes are counted each for itself: a wrong one is found."""
    pool = build(name, spec=SPEC, budget_bytes=40 * UNIT + 123, table_rows=2)
    assert pool.admit(0, 100)
    pool.checkpoint(0, 1)
    assert pool.grow(0, 120)
    pool.check_integrity()
    for count in ("_reserved", "_free_bytes"):
        true = getattr(pool, count)()
        for lie in {0, 3 * true + 7, true - 1, true + UNIT} - {true}:
            monkeypatch.setattr(pool, count, lambda lie=lie: lie)
            with pytest.raises(AssertionError):
                pool.check_integrity()
            monkeypatch.undo()
    for field in ("_state_units", "_cached_state_units", "_kv_units", "_total_tokens"):
        true = getattr(pool, field)
        setattr(pool, field, true + 1)
        with pytest.raises(AssertionError):
            pool.check_integrity()
        setattr(pool, field, true)
    for field in ("cached", "repeated"):
        true = getattr(pool._shared, field)
        setattr(pool._shared, field, true + 1)
        with pytest.raises(AssertionError):
            pool.check_integrity()
        setattr(pool._shared, field, true)
    pool.check_integrity()


def test_a_subclass_cannot_forget_to_count() -> None:
    class Terse(SharedPool):
        def _take_kv(self, entries, held):
            return self._free.take(entries)

    pool = Terse(SPEC, 20 * UNIT, physical=True, **BLOCKS)
    assert pool.admit(0, 16)
    assert pool.drain_changed() == ()
    assert pool.grow(0, 17)
    assert pool.drain_changed() == (0,)
    assert pool.table_entries_appended == 2
    assert pool.grow(0, 32)
    assert pool.drain_changed() == ()
    assert pool.usage().kv_bytes == 2 * UNIT


WRONG = ("many", True, float("nan"), [1], -1)


@pytest.mark.parametrize(
    ("name", "field", "also"),
    [
        ("shared_pool", "mode", ()),
        ("shared_pool", "placement_seed", ()),
        ("shared_pool", "table_rows", ()),
        ("shared_pool", "max_request_tokens", (0,)),
        ("large_block", "manager_block_size", (0,)),
        ("large_block", "kernel_block_size", (0, 8, 48)),
        ("large_block", "watermark", (1.0, 1)),
        ("padded_page", "placement_seed", ()),
        ("static_split", "ratio", (0, float("inf"))),
        ("static_split", "slots", (0,)),
        ("static_split", "page_size", (0,)),
        ("static_split", "q", (0,)),
        ("static_split", "max_running", (0,)),
        ("static_split", "placement_seed", ()),
        ("two_ended", "page_size", (0,)),
        ("lcm_carve", "order", ()),
        ("lcm_carve", "page_size", (0,)),
    ],
)
def test_values_of_a_wrong_type_are_refused(name: str, field: str, also: tuple) -> None:
    for value in (*WRONG, *also):
        with pytest.raises(UserError, match=f"^{field}="):
            build(name, spec=SPEC, budget_bytes=40 * UNIT, **{field: value})
    for value in ("yes", 1, None):
        with pytest.raises(UserError, match=r"^extra_buffer="):
            build("static_split", spec=SPEC, budget_bytes=40 * UNIT, q=3, extra_buffer=value)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_unknown_option_names_the_valid_ones(name: str) -> None:
    with pytest.raises(UserError, match=rf"^ratoi=0\.5: strategy {name} has no such option; it has "):
        build(name, spec=SPEC, budget_bytes=40 * UNIT, ratoi=0.5)


def test_a_request_that_is_restored_asks_for_what_it_does_not_share() -> None:
    """4 blocks are held; 2 of states and the third of KV are asked for, not the 2 that are shared."""
    pool = make("shared_pool", 7, **BLOCKS)
    assert pool.admit(0, 32)
    pool.checkpoint(0, 5)
    assert not pool.restore(1, 5, 49)
    assert pool.restore(1, 5, 48)
    pool.check_integrity()
    assert pool.usage().free == 0
    assert pool.kv_table(1).tolist()[:2] == pool.kv_table(0).tolist()


def test_layers_are_dealt_by_the_more_frequent_type_where_it_has_less_than_half_as_many_more() -> None:
    """7 of 5 layers are 1.4 times as many, 6 of 4 are 1.5 times, 5 of 3 are 1.67 times."""
    for attention, states, size in ((5, 7, 7), (7, 5, 7), (4, 6, 4), (3, 5, 3), (2, 2, 2)):
        pool = build_in(1 << 20, "padded_page", hybrid(attention, states, SPEC.attention, SPEC.state))
        assert pool.group_size == size, (attention, states)


def test_states_that_only_a_released_request_reads_are_free() -> None:
    pool = make("shared_pool", 10, **BLOCKS)
    empty = pool.usage()
    assert pool.admit(0, 16)
    pool.checkpoint(0, 5)
    assert pool.grow(0, 17)  # in states of its own; it reads the key's
    pool.drop(5)
    assert pool.usage().state_bytes == 4 * UNIT
    pool.release(0)
    assert pool.usage() == empty
    pool.check_integrity()


def test_tables_have_no_more_rows_than_the_budget_holds_states() -> None:
    """16 requests' states are the whole budget, so a step has at most 16 rows: each 12 entries of states, then KV's."""
    pool = make("shared_pool", 16, table_rows=20, **BLOCKS)
    assert pool.step_rows(20) == 16
    assert pool.step_rows(7) == 7
    assert pool.table_bytes == 16 * (12 + -(-pool.request_limit() // 16)) * 4
    assert pool.usage().reserved >= pool.table_bytes
