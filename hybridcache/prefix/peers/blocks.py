"""BlockPool and AlignPages: padded_page's blocks where each is cached by itself, as vLLM 0.25.1 keeps them.

All blocks that nobody holds stand in one queue, whatever they store. A block that was *named* (the tokens before its
end are known) can still be found there, and loses its names when it comes to the queue's head and is handed out. Blocks
that return go to the tail where they are named, to the head where they are not.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hybridcache.errors import bad
from hybridcache.memory.spans import Kind
from hybridcache.spec import CacheSpec
from hybridcache.strategies.padded_page import PaddedPage
from hybridcache.strategies.usage import Cut, Usage

Name = tuple[int, bytes]
"""Group (those of linear layers first, then those of attention), and digest of all tokens up to the block's end."""


class BlockPool:
    """Blocks ``first .. first + count - 1``: who holds them, what they are named, and the order in which they are
    taken."""

    def __init__(self, first: int, count: int) -> None:
        self.queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, first + count))
        self.holders = [0] * (first + count)
        self.names: list[list[Name]] = [[] for _ in self.holders]
        self.found: dict[Name, dict[int, None]] = {}
        """Blocks by name; several where several requests computed the same."""
        self.taken = [0] * len(self.holders)
        """How often each block was taken."""
        self.cached = 0
        """Named blocks in the queue."""
        self.lost = 0
        """Named blocks that were taken for something else, since construction."""

    def take(self, count: int) -> list[int]:
        """The blocks at the head; the caller knows that there are as many."""
        taken = []
        for _ in range(count):
            block, _ = self.queue.popitem(last=False)
            if self.names[block]:
                self.cached -= 1
                self.lost += 1
                self.unname(block)
            self.holders[block] = 1
            self.taken[block] += 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> bool:
        """One holder more. Whether it is the first."""
        self.holders[block] += 1
        if self.holders[block] > 1:
            return False
        del self.queue[block]
        self.cached -= bool(self.names[block])
        return True

    def give(self, block: int) -> bool:
        """One holder less. Whether it was the last."""
        self.holders[block] -= 1
        if self.holders[block]:
            return False
        self.queue[block] = None
        if self.names[block]:
            self.cached += 1
        else:
            self.queue.move_to_end(block, last=False)
        return True

    def name(self, block: int, name: Name) -> None:
        """Let a block that somebody holds be found by a name, from now on."""
        self.found.setdefault(name, {})[block] = None
        self.names[block].append(name)

    def unname(self, block: int) -> None:
        """Let a block be found no longer."""
        for name in self.names[block]:
            blocks = self.found[name]
            blocks.pop(block, None)
            if not blocks:
                del self.found[name]
        self.names[block] = []

    def forget(self) -> None:
        """No block has a name."""
        self.found.clear()
        self.names = [[] for _ in self.holders]
        self.taken = [count + 1 for count in self.taken]
        self.cached = 0


@dataclass(eq=False, slots=True)
class Table:
    """Blocks of a running request."""

    states: list[int]
    """What its next step writes, one for each linear group."""
    kv: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    """States that its next step reads and that are given back after it."""
    kept: list[int] = field(default_factory=list)
    """States held until it ends, to be named then."""
    named: int = 0
    """Entries of ``kv`` that have been named."""


class AlignPages(PaddedPage):
    """padded_page with cached blocks; accounting only. Made by :func:`~hybridcache.prefix.peers.make_prefix`.

    A request takes new blocks for its states whenever its KV reaches a new block or the old ones were named, reads the
    old ones in that step and gives them back after it; :attr:`watch` is told before, so that they are named.
    """

    supports_physical: ClassVar[bool] = False

    def __init__(self, spec: CacheSpec, budget_bytes: int, **options: Any) -> None:
        super().__init__(spec, budget_bytes, **options)
        self.watch: Callable[[int, int], None] = lambda seq_id, tokens: None
        """Called with a request and its tokens before it moves to another block, and after."""

    def _own_nothing(self) -> None:
        super()._own_nothing()
        self._tables: dict[int, Table] = {}
        self._held_states = self._held_kv = self._repeated = 0
        """Blocks that anybody holds, and holders of KV blocks beyond the first."""

    def _cut(self, pool_bytes: int) -> Cut:
        cut = super()._cut(pool_bytes)
        self.pool = BlockPool(self.null_blocks, max(self.num_blocks - self.null_blocks, 0))
        return cut

    def _request_limit(self) -> int:
        blocks = self.num_blocks - self.null_blocks - 3 * self.state_groups
        return max(blocks, 0) // self.attention_groups * self.block_tokens

    # -- requests --------------------------------------------------------------------------------------------------

    def admit(self, seq_id: int, num_tokens: int, prompt_tokens: int | None = None) -> bool:
        return self.admit_found(seq_id, num_tokens, prompt_tokens, (), ())

    def admit_found(
        self, seq_id: int, num_tokens: int, prompt_tokens: int | None, kv: Sequence[int], states: Sequence[int]
    ) -> bool:
        """As :meth:`admit`, of a request that begins with the tokens of the blocks ``kv`` and whose next step reads
        ``states``. What it finds in the queue counts as taken."""
        self._check_admission(seq_id, num_tokens, prompt_tokens)
        pool = self.pool
        idle = sum(not pool.holders[block] for block in {*kv, *states})
        again = (
            prompt_tokens or num_tokens
        ) > num_tokens  # it moves on from its first states before it gives them back
        asked = self._entries(prompt_tokens or num_tokens) - len(kv) + (1 + again) * self.state_groups
        if asked + idle > len(pool.queue):
            return False
        for block in kv:
            first = pool.hold(block)
            self._held_kv += first
            self._repeated += not first
        self._held_states += sum([pool.hold(block) for block in states])
        table = Table(self._take(self.state_groups, True), [*kv], [*states], named=len(kv))
        table.kv += self._take(self._entries(num_tokens) - len(kv), False)
        self._tables[seq_id] = table
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens
        self.room[seq_id] = len(table.kv) // self.attention_groups * self.block_tokens
        return True

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        held = self.num_tokens(seq_id)
        if num_tokens < held:
            raise bad("num_tokens", num_tokens, f"request {seq_id} holds {held} tokens; a request never shrinks")
        if num_tokens > self.room[seq_id]:
            table = self._tables[seq_id]
            more = max(self._entries(num_tokens) - len(table.kv), 0)
            if more + self.state_groups > len(self.pool.queue):
                return False
            self.watch(seq_id, held)
            self._give(table.reads, True)
            table.reads, table.states = table.states, self._take(self.state_groups, True)
            table.kv += self._take(more, False)
            self.room[seq_id] = len(table.kv) // self.attention_groups * self.block_tokens
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens - held
        return True

    def grow_all(self, totals: Mapping[int, int]) -> bool:
        if any(tokens > self.room[seq_id] for seq_id, tokens in totals.items()):
            return False
        self.fill(totals)
        return True

    def release(self, seq_id: int) -> None:
        self._total_tokens -= self.num_tokens(seq_id)
        table = self._tables.pop(seq_id)
        del self._tokens[seq_id], self.room[seq_id]
        for states in (table.reads, table.kept, table.states):
            self._give(states, True)
        self._give(reversed(table.kv), False)

    def settle_states(self, seq_ids: Iterable[int] | None = None) -> None:
        for seq_id in list(self._tables if seq_ids is None else seq_ids):
            table = self._tables.get(seq_id)
            if table is not None and table.reads:
                self._give(table.reads, True)
                table.reads = []

    def table(self, seq_id: int) -> Table:
        """The blocks of a running request."""
        return self._tables[seq_id]

    def keep(self, seq_id: int) -> None:
        """Hold the states that the request writes now until it ends, in place of those kept before."""
        table = self._tables[seq_id]
        for block in table.states:
            self.pool.hold(block)
        self._give(table.kept, True)
        table.kept = [*table.states]

    def _take(self, count: int, states: bool) -> list[int]:
        if states:
            self._held_states += count
        else:
            self._held_kv += count
            self.table_entries_appended += count
        return self.pool.take(count)

    def _give(self, blocks: Iterable[int], states: bool) -> None:
        for block in blocks:
            last = self.pool.give(block)
            if states:
                self._held_states -= last
            else:
                self._held_kv -= last
                self._repeated -= not last

    # -- accounting ------------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        tokens = self._total_tokens - self._repeated // self.attention_groups * self.block_tokens
        useful = len(self._tokens) * self.spec.state_bytes + tokens * self.spec.kv_bytes_per_token
        state, kv = self._held_states * self.block_bytes, self._held_kv * self.block_bytes
        return Usage(
            budget=self.budget_bytes, useful=useful, padding=state + kv - useful, reserved=self._reserved(),
            cached=self.pool.cached * self.block_bytes, free=self._free_bytes(), state_bytes=state, kv_bytes=kv,
            residents=len(self._tokens),
        )  # fmt: skip

    def _free_bytes(self) -> int:
        return (len(self.pool.queue) - self.pool.cached) * self.block_bytes

    def _holdings(self) -> Iterator[tuple[Kind, int, int, bool, Sequence[int]]]:
        seen: set[int] = set()

        def new(blocks: Iterable[int]) -> array:
            found = array("i", dict.fromkeys(block for block in blocks if block not in seen))
            seen.update(found)
            return found

        for seq_id, table in self._tables.items():
            yield Kind.STATE, seq_id, 1, True, new([*table.states, *table.reads, *table.kept])
            yield Kind.KV, seq_id, 1, False, new(table.kv)
        yield Kind.CACHED, 0, 1, True, new(block for block in self.pool.queue if self.pool.names[block])

    def check_integrity(self) -> None:
        pool, tables = self.pool, self._tables
        states = Counter(b for t in tables.values() for b in {*t.states, *t.reads, *t.kept})
        for table in tables.values():  # states that are kept and written at once have two holds
            states.update(block for block in table.kept if block in table.states or block in table.reads)
        kv = Counter(block for table in tables.values() for block in table.kv)
        assert not states.keys() & kv.keys(), "a block holds states and KV"
        assert list(tables) == list(self._tokens) == list(self.room)
        holders = states + kv
        assert {b: n for b, n in enumerate(pool.holders) if n} == dict(holders), "holders are miscounted"
        assert not holders.keys() & pool.queue.keys(), "a block that somebody holds is in the queue"
        everything = {*holders, *pool.queue}
        assert everything == set(range(self.null_blocks, self.num_blocks)), "a block is lost"
        assert pool.cached == sum(bool(pool.names[block]) for block in pool.queue)
        for name, blocks in pool.found.items():
            assert blocks
            assert all(name in pool.names[block] for block in blocks)
        assert sum(map(len, pool.names)) == sum(map(len, pool.found.values()))
        for seq_id, table in tables.items():
            tokens = self._tokens[seq_id]
            assert len(table.kv) == self._entries(tokens), f"request {seq_id} holds too few blocks or too many"
            assert self.room[seq_id] in (0, len(table.kv) // self.attention_groups * self.block_tokens)
            assert len(table.states) == self.state_groups
        assert (self._held_states, self._held_kv) == (len(states), len(kv))
        assert self._repeated == sum(kv.values()) - len(kv)
        assert self._total_tokens == sum(self._tokens.values())
        usage = self.usage()
        assert min(usage.padding, usage.cached, usage.free, usage.reserved) >= 0, usage
        assert usage.held + usage.cached + usage.free + usage.reserved == self.budget_bytes, usage
