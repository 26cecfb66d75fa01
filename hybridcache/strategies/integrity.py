"""check: the bookkeeping of a strategy, counted again from the structures themselves.

What residents and cached owners hold is counted by walking them, free bytes come from the free lists and reserved ones from
null blocks, remainders and tables; none is a remainder of the others, so a wrong one breaks the identity.
"""

from collections import Counter
from typing import TYPE_CHECKING

from hybridcache.memory.owners import Segment, StateSet
from hybridcache.memory.spans import Kind

if TYPE_CHECKING:
    from hybridcache.strategies.accounts import Accounts


def check(pool: "Accounts") -> None:
    """Raise AssertionError where anything does not add up (see :meth:`Accounts.check_integrity`)."""
    residents, points, cut = pool._residents, pool._checkpoints, pool.cut
    assert list(residents) == list(pool._tokens) == list(pool.room)
    assert pool._total_tokens == sum(pool._tokens.values())
    states = _check_states(pool)
    segments = _check_segments(pool)
    for seq_id, one in residents.items():
        assert len(one.kv) == pool._entries(pool._tokens[seq_id]), f"request {seq_id} holds too few entries or too many"
        room = len(one.kv) // cut.entry_units * cut.entry_tokens
        assert pool.room[seq_id] in ((0,) if one.states.owners > 1 else (0, room)), f"room of request {seq_id}"
    for key, point in points.items():
        assert point.kv.end == pool._entries(point.num_tokens), f"key {key} holds too few entries or too many"

    own = [one.own() for one in residents.values()]
    extra = [one.extra for one in residents.values()]
    held = sum(len(s.units) for s in states if s.residents) + sum(map(len, extra))
    held_kv = sum(map(len, own)) + sum(len(s.entries) for s in segments if s.residents)
    cached = sum(len(s.units) for s in states if not s.residents)
    cached_kv = sum(len(s.entries) for s in segments if not s.residents)
    again = sum((s.residents - 1) * len(s.entries) for s in segments if s.residents) // cut.entry_units
    useful = len(residents) * pool.spec.state_bytes
    useful += (pool._total_tokens - again * cut.entry_tokens) * pool.spec.kv_bytes_per_token
    usage = pool.usage()
    state, kv = cut.state.num_bytes, cut.kv.num_bytes
    assert (usage.state_bytes, usage.kv_bytes) == (held * state, held_kv * kv), usage
    assert usage.cached == cached * state + cached_kv * kv, usage
    assert usage.useful == useful, usage
    assert usage.residents == len(residents)
    assert min(useful, usage.padding, usage.reserved, usage.cached, usage.free) >= 0, usage
    assert usage.held == usage.state_bytes + usage.kv_bytes
    total = (held + cached) * state + (held_kv + cached_kv) * kv + pool._free_bytes() + pool._reserved()
    assert total == pool.budget_bytes, (
        f"held, cached, free and reserved bytes are {total}, the budget {pool.budget_bytes}"
    )
    assert pool._reserved() >= pool.table_bytes, "block tables are not charged"

    pool._check(
        [unit for units in (*extra, *(s.units for s in states)) for unit in units],
        [unit for units in (*own, *(s.entries for s in segments)) for unit in units],
    )
    _check_spans(pool)


def _check_states(pool: "Accounts") -> list[StateSet]:
    """Every set of states once; its owners are those that name it."""
    sets: dict[int, StateSet] = {}
    owners: Counter[int] = Counter()
    runs: Counter[int] = Counter()
    for seq_id, one in pool._residents.items():
        for states in [one.states, pool._reads.get(seq_id)]:
            if states is not None:
                sets[id(states)] = states
                owners[id(states)] += 1
                runs[id(states)] += 1
    for point in pool._checkpoints.values():
        sets[id(point.states)] = point.states
        owners[id(point.states)] += 1
    for at, states in sets.items():
        assert (states.owners, states.residents) == (owners[at], runs[at]), f"owners of states {states.units}"
        assert len(states.units) == pool.cut.states_per_request
    for seq_id, read in pool._reads.items():
        written = pool._residents[seq_id].states
        assert read is not written
        assert written.owners == 1, f"request {seq_id} writes states that another owner holds"
    return list(sets.values())


def _check_segments(pool: "Accounts") -> list[Segment]:
    """Every segment once; its holders are the owners that end there and the segments that follow."""
    segments: dict[int, Segment] = {}
    holders: Counter[int] = Counter()
    runs: Counter[int] = Counter()
    leaves = [one.prefix for one in pool._residents.values() if one.prefix is not None]
    for leaf in (*leaves, *(point.kv for point in pool._checkpoints.values())):
        holders[id(leaf)] += 1
        segments |= {id(node): node for node in leaf.path()}
    for leaf in leaves:
        runs.update(id(node) for node in leaf.path())
    for node in segments.values():
        if node.parent is not None:
            holders[id(node.parent)] += 1
    for at, node in segments.items():
        before = 0 if node.parent is None else node.parent.end
        assert node.end == before + len(node.entries) > before, "a segment is empty or out of place"
        assert (node.holders, node.residents) == (holders[at], runs[at]), f"owners of entries {node.entries[:4]}..."
    for one in pool._residents.values():
        assert one.shared == (0 if one.prefix is None else one.prefix.end)
        if one.prefix is not None:
            path = [entry for node in reversed([*one.prefix.path()]) for entry in node.entries]
            assert one.kv[: one.shared].tolist() == path, "a table differs from what its request holds"
    return list(segments.values())


def _check_spans(pool: "Accounts") -> None:
    usage, end = pool.usage(), 0
    by_kind: Counter[Kind] = Counter()
    for span in sorted(pool.spans()):
        assert span.num_bytes > 0, span
        assert span.offset >= end, f"{span} overlaps a span that ends at {end}"
        owners = pool._checkpoints if span.kind is Kind.CACHED else pool._residents
        assert span.seq_id in owners, f"{span} belongs to nobody"
        assert span.owners >= 1, span
        end = span.offset + span.num_bytes
        by_kind[span.kind] += span.num_bytes
    assert end <= pool.pool_bytes, f"a span ends at {end}, beyond the pool of {pool.pool_bytes} bytes"
    if pool.has_addresses:
        expected = {Kind.STATE: usage.state_bytes, Kind.KV: usage.kv_bytes, Kind.CACHED: usage.cached}
        assert by_kind == Counter(expected), (by_kind, usage)
        found = {kind: int(extents[:, 1].sum()) for kind, extents in pool.extents().items()}
        assert found == expected, (found, usage)
