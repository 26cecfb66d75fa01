"""Contract tests for a strategy of one's own.

    python -m hybridcache.strategies.check my.module.MyStrategy [option=value ...]

prints one line for each property: ``ok``, or ``FAIL`` and why. Exit status 0 where all hold, 1 where one does not, 2 where the
class cannot be found or refuses its options. A physical class is also run as an engine would: what a step writes through
layout and tables must be read back, whatever was shared, copied or moved meanwhile.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from random import Random
from typing import Any

from hybridcache.errors import UserError
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.spec.dtypes import itemsize
from hybridcache.strategies import Strategy, build, strategy_class

Make = Callable[..., Strategy]
OPERATIONS = 400
LONGEST = 60
"""Tokens of the requests that are tried."""


class Memory:
    """What an engine's steps leave in a physical pool: tags by byte address, at both ends of every row and state."""

    def __init__(self, pool: Strategy) -> None:
        self.pool, self.layout = pool, pool.layout
        self.tags: dict[int, object] = {}
        self.written: dict[int, list[int]] = {}
        """Tokens that steps have written of each resident, by numbers of their own."""
        self.kept: dict[int, list[int]] = {}
        """As much, of each checkpoint."""
        self.tokens = 0

    def step(self) -> None:
        """Execute the moves, then let every resident read what it has and write what is new."""
        for move in self.pool.drain_moves():
            source = {at: tag for at, tag in self.tags.items() if move.src <= at < move.src + move.num_bytes}
            self.tags |= {at - move.src + move.dst: tag for at, tag in source.items()}
        for seq_id, tokens in self.written.items():
            table, start, total = self.pool.kv_table(seq_id), len(tokens), self.pool.num_tokens(seq_id)
            if tokens:
                found = [*self._rows(table, tokens, 0), *self._states(self.pool.state_read_table(seq_id), tokens[-1])]
                lost = [tag for at, tag in found if self.tags.get(at) != tag]
                assert not lost, f"request {seq_id} finds other bytes than were written: (token, layer, ...) {lost[0]}"
            if total > start:
                tokens += range(self.tokens, self.tokens + total - start)
                self.tokens += total - start
                self.tags |= self._rows(table, tokens, start)
                self.tags |= self._states(self.pool.state_write_table(seq_id), tokens[-1])
        assert all(0 <= at < self.layout.pool_bytes for at in self.tags), "a row or state lies beyond the pool"
        self.pool.settle_states()

    def _rows(self, table: Sequence[int], tokens: list[int], start: int) -> Iterator[tuple[int, object]]:
        at = self.layout.attention
        for position, layer, kv, head in product(
            range(start, len(tokens)), range(len(at.base)), range(2), range(at.num_kv_heads)
        ):
            first = at.address(layer, int(table[position // at.tokens_per_entry]), position, kv, head)
            for end in (first, first + (at.k_dim, at.v_dim)[kv] * itemsize(at.dtype) - 1):
                yield end, (tokens[position], layer, kv, head)

    def _states(self, table: Sequence[int], token: int) -> Iterator[tuple[int, object]]:
        for layer in range(len(self.layout.state.base)):
            first = self.layout.state.address(layer, int(table[layer % len(table)]))
            for end in (first, first + self.pool.spec.stored_state_bytes_per_layer - 1):
                yield end, (token, layer)


def _operate(pool: Strategy, rng: Random, shares: bool, memory: Memory | None = None) -> None:
    """Random operations, the bookkeeping checked after each; in the end everything is returned."""
    empty, settled = pool.usage(), set[int]()
    written, kept = ({}, {}) if memory is None else (memory.written, memory.kept)
    for number in range(OPERATIONS):
        seq_id, more, before = rng.randrange(6), rng.randint(1, LONGEST // 2), pool.usage()
        key = rng.choice(pool.cached) if pool.cached else None
        what, done = rng.random(), True
        if what < 0.3:
            pool.settle_states() if memory is None else memory.step()
            settled = set(pool.residents)
        elif seq_id in pool.residents and what < 0.5:
            pool.release(seq_id)
            settled.discard(seq_id)
            written.pop(seq_id)
        elif shares and seq_id in settled and what < 0.7:
            pool.checkpoint(seq_id, number)
            kept[number] = list(written[seq_id])
            assert pool.usage().free == before.free, "checkpoint took memory"
        elif seq_id in pool.residents:
            total = pool.num_tokens(seq_id) + more
            within = total <= pool.room[seq_id]
            if within and number % 2:
                pool.fill({seq_id: total})
            else:
                done = pool.grow(seq_id, total)
            assert done or not within, "refused to grow within its room"
            assert not within or pool.usage().held == before.held, "took memory to grow within its room"
            assert not done or pool.num_tokens(seq_id) == total, (
                f"{pool.num_tokens(seq_id)} tokens after growing to {total}"
            )
            settled -= {seq_id} if done else set()
        elif key is not None and what < 0.5:
            pool.drop(key)
            kept.pop(key)
        elif key is not None and what < 0.8:
            done = pool.restore(seq_id, key, pool.cached_tokens(key) + more)
            written |= {seq_id: list(kept[key])} if done else {}
        else:
            done = pool.admit(seq_id, more)
            written |= {seq_id: []} if done else {}
        assert done or pool.usage() == before, "a refused operation changed what is held"
        pool.check_integrity()
    for seq_id in pool.residents:
        pool.release(seq_id)
    for key in pool.cached:
        pool.drop(key)
    assert pool.usage() == empty, "released memory is not free"


def least_budget(make: Make) -> None:
    """a budget that is too small is refused with the bytes that would do"""
    refusal = ""
    try:
        make(1)
    except UserError as error:
        refusal = str(error)
    assert refusal, "a budget of one byte is accepted"
    _, _, enough = refusal.partition("give at least ")
    assert enough, f"the refusal names no budget: {refusal}"
    assert make(int(enough.split()[0])).admit(0, 1), "the budget that it asks for holds no request"


def bookkeeping(make: Make) -> None:
    """bookkeeping adds up whatever is admitted, grown and released, and refusals change nothing"""
    _operate(make(), Random(1), shares=False)


def limit(make: Make) -> None:
    """request_limit is what an empty pool holds, by admission and by growth"""
    pool = make()
    longest = pool.request_limit()
    assert pool.admit(0, longest), f"cannot admit {longest} tokens"
    pool.release(0)
    assert not pool.admit(0, longest + 1), f"admits {longest + 1} tokens beyond its limit of {longest}"
    assert pool.admit(0, 1), "cannot admit a token after a refusal"
    assert pool.grow(0, longest), f"cannot grow to {longest} tokens"
    pool.check_integrity()


def owners(make: Make) -> None:
    """checkpoints, restored requests and their sharing add up"""
    _operate(make(), Random(2), shares=True)


def tables(make: Make) -> None:
    """block tables are charged, and longer requests than those to be served are refused"""
    pool = make(table_rows=2, max_request_tokens=LONGEST)
    assert pool.request_limit() <= LONGEST
    least = int(pool.has_addresses)  # a bound that places nothing needs no tables
    assert pool.usage().reserved >= pool.table_bytes >= least, "block tables are not reserved"
    _operate(pool, Random(3), shares=True)


def contents(make: Make) -> None:
    """every token and state is read back from where layout and tables say (physical)"""
    for seed in range(4):
        pool = make(physical=True)
        _operate(pool, Random(seed), shares=True, memory=Memory(pool))


PROPERTIES = (least_budget, bookkeeping, limit, owners, tables, contents)


def check(name: str, **options: Any) -> list[tuple[str, str | None]]:
    """Run all properties on a class, by its dotted path or name.

    Returns:
        Of each property what it says, and why it does not hold (None where it does).

    Raises:
        UserError: the class cannot be found or built.
    """
    kv = AttentionKV(num_kv_heads=2, k_dim=16, v_dim=16, dtype="bfloat16")
    state = RecurrentState((2, 16, 32), "float32", conv_channels=32, conv_kernel=4, conv_dtype="bfloat16")
    spec = CacheSpec("check", tuple(LayerSpec(i, *((kv, None) if i % 4 == 3 else (None, state))) for i in range(8)))
    physical = strategy_class(name).supports_physical

    def make(budget_bytes: int = 1 << 32, **more: Any) -> Strategy:
        return build(name, spec=spec, budget_bytes=budget_bytes, **options, **more)

    try:
        large = make()
        assert large.admit(0, LONGEST), f"holds no request of {LONGEST} tokens in 4 GiB"
    except UserError:
        raise
    except Exception as error:
        return [("it can be built and holds a request", _line(error))]
    budget = 5 * large.usage().held + 4096
    found: list[tuple[str, str | None]] = []
    for one in PROPERTIES:
        if one is contents and not physical:
            continue
        try:
            one(lambda budget_bytes=budget, **more: make(budget_bytes, **more))
        except Exception as error:  # whatever a class of somebody else raises is the finding
            found.append((str(one.__doc__), _line(error)))
        else:
            found.append((str(one.__doc__), None))
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def main(arguments: Sequence[str]) -> int:
    if not arguments or any("=" not in argument for argument in arguments[1:]):
        print("usage: python -m hybridcache.strategies.check my.module.MyStrategy [option=value ...]", file=sys.stderr)
        return 2
    options = {}
    for key, value in (argument.split("=", 1) for argument in arguments[1:]):
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    try:
        found = check(arguments[0], **options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for what, why in found:
        print(f"ok    {what}" if why is None else f"FAIL  {what}: {why}")
    return int(any(why is not None for _, why in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
