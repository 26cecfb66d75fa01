"""The contract of a memory-sharing strategy.

A strategy owns one byte budget and decides which bytes hold what. It is integer bookkeeping only (no torch): the same
object drives the simulator and real inference. Requests are named by integer ids that the caller chooses, cached owners
(checkpoints that no running request needs) by integer keys of a namespace of their own.

The base class keeps who owns what, counts, and notices which tables changed; a subclass only cuts the budget into units,
hands them out and takes them back (:class:`Cut` and the underscored methods at the end).

Accounting identity, checked by :meth:`Strategy.check_integrity` from independent counts:

    useful + padding + reserved + cached + free = budget,   held = useful + padding

*useful* is the exact 3-column state plus ``t`` bytes per token of every resident, bytes that several hold once; *padding* is
what residents hold beyond that; *cached* is what only cached owners hold; *reserved* can never hold a request's bytes
(block tables, null blocks, the remainder below one block); *free* is what the free lists hold. ``docs/metrics.md`` defines
every metric.
"""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hybridcache.errors import UserError, bad
from hybridcache.memory.layout import Layout, check_kv_rows
from hybridcache.memory.owners import Checkpoint, Resident, Segment, SharedKv, StateSet
from hybridcache.memory.spans import Kind, Move, Span, Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.options import whole

ENTRY_BYTES = 4
"""A table entry is an int32."""


@dataclass(frozen=True)
class Usage:
    """Bytes of the budget by what they do. ``state_bytes + kv_bytes = held`` splits the same bytes by what they store."""

    budget: int
    useful: int
    padding: int
    reserved: int
    cached: int
    free: int
    state_bytes: int
    kv_bytes: int
    residents: int

    @property
    def held(self) -> int:
        """Bytes that residents hold."""
        return self.useful + self.padding

    @property
    def utilization(self) -> float:
        """Useful bytes over budget."""
        return self.useful / self.budget


@dataclass(frozen=True)
class Tables:
    """What kernels read: rows are requests, in the order asked for.

    ``kv`` is int32 ``[B, entries]``, padded with -1; ``state_read`` and ``state_write`` are int32 ``[B, state layers]``.
    """

    kv: np.ndarray
    state_read: np.ndarray
    state_write: np.ndarray


@dataclass(frozen=True)
class Cut:
    """How a strategy cuts its pool: units of states and units of KV."""

    state: Units
    states_per_request: int
    """Units that hold the states of all layers of one request."""
    kv: Units
    """A unit is one table entry."""
    entry_tokens: int
    """Tokens of one entry."""
    least_bytes: int
    """Pool that holds one request of one token."""
    kernel_tokens: int = 0
    """Tokens of a kernel block, the least that is copied; 0 for those of an entry."""
    entry_units: int = 1
    """Entries that the same tokens take (groups of attention layers with a table each)."""


class Strategy(ABC):
    """Base of all strategies. Subclasses implement the underscored methods and call :meth:`_set_up`; callers use the public
    ones.

    Args:
        spec: what the model stores.
        budget_bytes: the whole budget, reserved rows and block tables included.
        physical: allot what real inference with our kernels needs beyond the peer's own accounting (the conv ring's
            last column where the layout has no slack for it, 64-token pages where the peer accounts single tokens), and
            offer ``layout`` and ``tables``.
        table_rows: rows of the block tables that lie beside the pool; their bytes are charged to the budget.
        max_request_tokens: tokens of the longest request to be served; None for the longest that the pool holds.

    Raises:
        UserError: the budget cannot hold one request of one token, or an argument that means nothing.
    """

    name: ClassVar[str]
    supports_physical: ClassVar[bool] = False
    has_addresses: ClassVar[bool] = True
    """False for a bound that counts bytes without placing them."""

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **options: Any) -> "Strategy":
        made = super().__new__(cls)
        made._made_with = args, options
        return made

    def __init__(
        self,
        spec: CacheSpec,
        budget_bytes: int,
        *,
        physical: bool = False,
        table_rows: int = 0,
        max_request_tokens: int | None = None,
    ) -> None:
        if not isinstance(budget_bytes, int) or budget_bytes <= 0:
            raise bad("budget_bytes", budget_bytes, "give a positive whole number of bytes")
        if spec.state is None or spec.attention is None:
            raise bad("spec", spec.model_type, "strategies share memory of hybrid models: attention KV and states")
        if spec.state_bytes == 0 or spec.kv_bytes_per_token == 0:
            raise bad("spec", spec.model_type, "its states or its KV have no bytes; check the shapes")
        if physical and not self.supports_physical:
            raise bad("strategy", self.name, "is accounting only; for inference choose a physical strategy")
        if physical:
            check_kv_rows(spec)
        self.spec = spec
        self.budget_bytes = budget_bytes
        self.physical = physical
        self.table_rows = whole("table_rows", table_rows, 0)
        self.max_request_tokens = (
            None if max_request_tokens is None else whole("max_request_tokens", max_request_tokens)
        )
        self.bytes_moved = 0
        """Bytes relocated by compaction since construction."""
        self.bytes_copied = 0
        """Bytes of partial tail entries copied by restoring since construction."""
        self.table_entries_appended = 0
        """int32 entries appended to KV tables since construction."""
        self.room: dict[int, int] = {}
        """To how many tokens each resident can grow with nothing to be done but counting; 0 where its states are another
        owner's too, and it must take some of its own first. To be read only."""
        self._tokens: dict[int, int] = {}
        self._total_tokens = 0
        self._residents: dict[int, Resident] = {}
        self._reads: dict[int, StateSet] = {}
        """Of residents whose next step reads other states than it writes."""
        self._checkpoints: dict[int, Checkpoint] = {}
        self._shared = SharedKv(self._return_kv)
        self._changed: dict[int, None] = {}
        self._moves: list[Move] = []
        self._state_units = self._cached_state_units = self._kv_units = 0
        """Units that anybody holds, and of those the ones that only cached owners hold."""

    def reset(self) -> None:
        """Forget everybody: the strategy is as it was made. For a caller that was interrupted in the middle of one of these
        calls, after which no bookkeeping counts."""
        args, options = self._made_with
        self.__dict__.clear()
        self._made_with = args, options
        self.__init__(*args, **options)  # type: ignore[misc]

    def _set_up(self) -> None:
        """Called at the end of a subclass's constructor: cut the pool."""
        self._adopt(self.budget_bytes)
        if self.table_rows:
            self._adopt(max(self.budget_bytes - self.table_bytes, 0))
        if self.request_limit() < 1:
            least, found = self.cut.least_bytes, 0
            while self.table_rows and found < least <= 1 << 60:
                found = least
                self._adopt(found)
                least = self.cut.least_bytes + self.table_bytes
            raise UserError(
                f"budget_bytes={self.budget_bytes}: {self.name} cannot hold one request in it; "
                f"give at least {least} bytes"
            )

    def _adopt(self, pool_bytes: int) -> None:
        self.pool_bytes = pool_bytes
        """The budget without block tables: what is cut into units."""
        self.cut = cut = self._cut(pool_bytes)
        self._entry_tokens, self._entry_units = cut.entry_tokens, cut.entry_units

    # -- requests --------------------------------------------------------------------------------------------------

    def admit(self, seq_id: int, num_tokens: int, prompt_tokens: int | None = None) -> bool:
        """Make a request resident with memory for its state and its first ``num_tokens`` tokens.

        ``prompt_tokens`` is the whole prompt's length where only a chunk is admitted; a strategy may refuse if the
        whole prompt would not fit now, though it allocates the chunk only. Returns False, and changes nothing, where
        memory is short.
        """
        self._check_admission(seq_id, num_tokens, prompt_tokens)
        if not self._admits(self._entries(prompt_tokens or num_tokens)):
            return False
        self._join(seq_id, Resident(self._take_state_set()), num_tokens)
        return True

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        """Extend a resident request to ``num_tokens`` tokens in all. False, and no change, where memory is short.

        Where its states have another owner (see :meth:`checkpoint`), it takes states of its own to write to.
        """
        held = self._tokens.get(seq_id)  # looked up here, not in num_tokens: every request grows in every step
        if held is None:
            raise bad("seq_id", seq_id, "is not resident; admit it first")
        if num_tokens < held:
            raise bad("num_tokens", num_tokens, f"request {seq_id} holds {held} tokens; a request never shrinks")
        if num_tokens > self.room[seq_id]:
            one = self._residents[seq_id]
            more = -(-num_tokens // self._entry_tokens) * self._entry_units - len(one.kv)
            copies = one.states.owners > 1
            if not self._fits(more, copies):
                return False
            if copies:
                self._reads[seq_id], one.states = one.states, self._take_state_set()
                one.states.owners = one.states.residents = 1
            if more:
                one.kv.extend(self._take_kv(more, one.kv))
                self._kv_units += more
                self.table_entries_appended += more
            if more or copies:
                self._changed[seq_id] = None
            self.room[seq_id] = len(one.kv) // self._entry_units * self._entry_tokens
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens - held
        return True

    def fill(self, totals: Mapping[int, int]) -> None:
        """What :meth:`grow` does, for many residents at once that stay within their ``room`` (tokens in all, by id)."""
        self._total_tokens += sum(totals.values()) - sum(map(self._tokens.__getitem__, totals))
        self._tokens.update(totals)

    def release(self, seq_id: int) -> None:
        """Return everything that only this request holds."""
        held = self.num_tokens(seq_id)
        one = self._residents.pop(seq_id)
        self._leave_states(one.states)
        if seq_id in self._reads:
            self._leave_states(self._reads.pop(seq_id))
        if one.extra:
            self._return_states(one.extra)
        self._return_kv(one.own())
        if one.prefix is not None:
            self._shared.leave(one.prefix)
        del self._tokens[seq_id], self.room[seq_id]
        self._changed.pop(seq_id, None)
        self._total_tokens -= held

    def num_tokens(self, seq_id: int) -> int:
        """Tokens that the resident request holds memory for."""
        try:
            return self._tokens[seq_id]
        except KeyError:
            raise bad("seq_id", seq_id, "is not resident; admit it first") from None

    @property
    def residents(self) -> Sequence[int]:
        """Ids of the resident requests, in order of admission."""
        return tuple(self._tokens)

    # -- cached owners ---------------------------------------------------------------------------------------------

    def checkpoint(self, seq_id: int, key: int) -> None:
        """Let ``key`` own, jointly with the resident, its states as the last launched step left them and the KV of its
        ``num_tokens``. To be called between that step and the next ``grow``. Takes no memory.

        The resident's ``room`` is 0 from then on, so that its next step calls ``grow``, which takes states of its own.
        """
        tokens = self.num_tokens(seq_id)
        self._check_new_key(key)
        if seq_id in self._reads:
            raise bad("seq_id", seq_id, "reads states that it does not write; call settle_states() first")
        one = self._residents[seq_id]
        self._cache(key, one, one.states, tokens)
        self.room[seq_id] = 0

    def reserve_checkpoint(self, seq_id: int, key: int, position: int) -> bool:
        """Let ``key`` own states of its own, which a prefill step is going to write at ``position`` through
        :meth:`checkpoint_table`, and jointly the KV of the first ``position`` tokens. Nobody may restore from it before that
        step. False, and no change, where memory is short."""
        tokens = self.num_tokens(seq_id)
        self._check_new_key(key)
        if not 1 <= position <= tokens:
            raise bad("position", position, f"request {seq_id} holds {tokens} tokens; choose one from 1 to {tokens}")
        if not self._fits(0, True):
            return False
        self._cached_state_units += self.cut.states_per_request
        self._cache(key, self._residents[seq_id], self._take_state_set(), position)
        return True

    def restore(self, seq_id: int, key: int, num_tokens: int, prompt_tokens: int | None = None) -> bool:
        """As :meth:`admit`, of a request whose first ``cached_tokens(key)`` tokens are those of the key.

        Whole entries are shared; a partial one at the end is copied to one of its own by a move (:meth:`drain_moves`). Its read
        table names the key's states, its write table its own, until :meth:`settle_states`.
        """
        cached = self.cached_tokens(key)
        self._check_admission(seq_id, num_tokens, prompt_tokens)
        if num_tokens <= cached:
            raise bad(
                "num_tokens", num_tokens, f"key {key} holds {cached} tokens; a request computes one more at least"
            )
        point, shared = self._checkpoints[key], cached // self._entry_tokens * self._entry_units
        if not self._admits(self._entries(prompt_tokens or num_tokens) - shared):
            return False
        one = Resident(self._take_state_set())
        if shared:
            prefix = self._shared.ending(point.kv, shared)
            self._shared.enter(prefix)
            one.prefix, one.shared = prefix, shared
            for node in reversed([*prefix.path()]):
                one.kv.extend(node.entries)
        point.states.owners += 1
        if not point.states.residents:
            self._cached_state_units -= len(point.states.units)
        point.states.residents += 1
        self._reads[seq_id] = point.states
        self._join(seq_id, one, num_tokens)
        tail = cached % self._entry_tokens
        if tail:
            node = next(n for n in point.kv.path() if n.end - len(n.entries) <= shared)
            self._copy_tail(node.entries[shared - node.end], one.kv[shared], tail)
        return True

    def fork(self, seq_id: int, child: int, num_tokens: int) -> bool:
        """As :meth:`restore`, from a resident as the last launched step left it."""
        key = min(self._checkpoints, default=0) - 1
        room = self.room.get(seq_id)
        self.checkpoint(seq_id, key)
        try:
            found = self.restore(child, key, num_tokens)
        finally:
            self.drop(key)
        if not found and self._residents[seq_id].states.owners == 1 and room is not None:
            self.room[seq_id] = room
        return found

    def settle_states(self, seq_ids: Iterable[int] | None = None) -> None:
        """A launched step has read what it was to read, for these residents (None: for all): read tables become the write
        tables, and what is owned of the states read only for it goes back."""
        if not self._reads:
            return
        for seq_id in list(self._reads if seq_ids is None else seq_ids):
            states = self._reads.pop(seq_id, None)
            if states is not None:
                self._leave_states(states)
                self._changed[seq_id] = None

    def drop(self, key: int) -> None:
        """Return everything that only this cached owner holds."""
        self.cached_tokens(key)
        point = self._checkpoints.pop(key)
        states = point.states
        states.owners -= 1
        if not states.owners:
            self._cached_state_units -= len(states.units)
            self._return_states(states.units)
        self._shared.let_go(point.kv)

    def cached_tokens(self, key: int) -> int:
        """Tokens before the cached owner's position."""
        if key not in self._checkpoints:
            raise bad("key", key, "owns nothing; checkpoint it first")
        return self._checkpoints[key].num_tokens

    @property
    def cached(self) -> Sequence[int]:
        """Keys of the cached owners, in order of creation."""
        return tuple(self._checkpoints)

    # -- accounting ------------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """The budget's bytes by what they do, now."""
        cut, shared = self.cut, self._shared
        tokens = self._total_tokens - shared.repeated // self._entry_units * self._entry_tokens
        useful = len(self._tokens) * self.spec.state_bytes + tokens * self.spec.kv_bytes_per_token
        state = (self._state_units - self._cached_state_units) * cut.state.num_bytes
        kv = (self._kv_units - shared.cached) * cut.kv.num_bytes
        return Usage(
            budget=self.budget_bytes,
            useful=useful,
            padding=state + kv - useful,
            reserved=self._reserved(),
            cached=self._cached_state_units * cut.state.num_bytes + shared.cached * cut.kv.num_bytes,
            free=self._free_bytes(),
            state_bytes=state,
            kv_bytes=kv,
            residents=len(self._tokens),
        )

    def request_limit(self) -> int:
        """Tokens of the longest request that an empty pool can hold, or of the longest to be served; the engine refuses longer
        ones at submit."""
        limit = self._request_limit()
        return limit if self.max_request_tokens is None else min(limit, self.max_request_tokens)

    @property
    def table_bytes(self) -> int:
        """Bytes of the block tables of ``table_rows`` rows: for every state layer an entry to read and one to write, then the
        KV entries of the longest request."""
        width = 2 * len(self.spec.state_layers) + self._entries(max(self.request_limit(), 0))
        return self.table_rows * width * ENTRY_BYTES

    def spans(self) -> Iterator[Span]:
        """Every span that somebody holds, in any order and without overlap (nothing for a strategy without addresses)."""
        if self.has_addresses:
            for kind, owner, owners, state, units in self._holdings():
                yield from (self.cut.state if state else self.cut.kv).spans(units, kind, owner, owners)

    def extents(self) -> dict[Kind, np.ndarray]:
        """The bytes that are held by kind, as int64 ``[n, 2]`` of ``(offset, bytes)``, whoever holds them, in any order and
        without overlap. Faster than :meth:`spans`."""
        found: dict[Kind, list[np.ndarray]] = {Kind.STATE: [], Kind.KV: [], Kind.CACHED: []}
        if self.has_addresses:
            held: dict[tuple[Kind, bool], array] = {}
            for kind, _, _, state, units in self._holdings():
                held.setdefault((kind, state), array("i")).extend(units)
            for (kind, state), units in held.items():
                place = self.cut.state if state else self.cut.kv
                found[kind].append(place.extents(np.frombuffer(units, dtype=np.int32)))
        return {kind: np.concatenate([np.empty((0, 2), np.int64), *parts]) for kind, parts in found.items()}

    def _holdings(self) -> Iterator[tuple[Kind, int, int, bool, Sequence[int]]]:
        """``(kind, owner, owners, whether states, units)`` of everything that is held, once: residents' first."""
        owners = Counter(id(node) for leaf in self._leaves() for node in leaf.path())
        seen: set[int] = set()

        def states(one: StateSet, kind: Kind, owner: int) -> Iterator[tuple[Kind, int, int, bool, Sequence[int]]]:
            if id(one) not in seen:
                seen.add(id(one))
                yield kind, owner, one.owners, True, one.units

        def path(leaf: Segment, kind: Kind, owner: int) -> Iterator[tuple[Kind, int, int, bool, Sequence[int]]]:
            for node in leaf.path():
                if id(node) not in seen:
                    seen.add(id(node))
                    yield kind, owner, owners[id(node)], False, node.entries

        for seq_id, one in self._residents.items():
            yield from states(one.states, Kind.STATE, seq_id)
            if seq_id in self._reads:
                yield from states(self._reads[seq_id], Kind.STATE, seq_id)
            if one.extra:
                yield Kind.STATE, seq_id, 1, True, one.extra
            if one.kv:
                yield Kind.KV, seq_id, 1, False, one.own()
            if one.prefix is not None:
                yield from path(one.prefix, Kind.KV, seq_id)
        for key, point in self._checkpoints.items():
            yield from states(point.states, Kind.CACHED, key)
            yield from path(point.kv, Kind.CACHED, key)

    def check_integrity(self) -> None:
        """Raise AssertionError where bookkeeping is inconsistent: who owns what, the usage identity from independent counts,
        spans without overlap, and the strategy's own invariants."""
        from hybridcache.strategies.integrity import check

        check(self)

    # -- physical memory -------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """How kernels find KV and states. Only of a strategy built with ``physical=True``."""
        self._require_physical("run inference on it")
        return self._layout()

    def tables(self, seq_ids: Sequence[int]) -> Tables:
        """Block tables of resident requests, a row each, in the order given. Only with ``physical=True``, as the layout."""
        self._require_physical("read its tables")
        rows = [self.kv_table(seq_id) for seq_id in seq_ids]
        kv = np.full((len(rows), max((len(row) for row in rows), default=0)), -1, dtype=np.int32)
        read, write = (np.empty((len(rows), len(self.spec.state_layers)), dtype=np.int32) for _ in range(2))
        for i, (seq_id, row) in enumerate(zip(seq_ids, rows, strict=True)):
            kv[i, : len(row)] = row
            read[i], write[i] = self.state_read_table(seq_id), self.state_write_table(seq_id)
        return Tables(kv, read, write)

    def kv_table(self, seq_id: int) -> array:
        """The KV entries of one resident request, in order of position; to be read before the strategy is called again.
        Entries are only ever appended, unless memory was compacted; ``drain_changed`` names whose did either."""
        return self._residents[seq_id].kv

    def state_write_table(self, seq_id: int) -> Sequence[int]:
        """The entries that the resident's next step writes its states to: one for every state layer, or one that all of them
        share."""
        return self._residents[seq_id].states.table

    def state_read_table(self, seq_id: int) -> Sequence[int]:
        """The entries that the resident's next step reads its states from; those of the write table but after a checkpoint
        or restore, until :meth:`settle_states`."""
        return (self._reads.get(seq_id) or self._residents[seq_id].states).table

    def checkpoint_table(self, key: int) -> Sequence[int]:
        """The state entries of a cached owner."""
        self.cached_tokens(key)
        return self._checkpoints[key].states.table

    def drain_changed(self) -> Sequence[int]:
        """Residents whose tables (KV, states read or written) have changed since the last drain or their admission."""
        changed, self._changed = self._changed, {}
        return tuple(changed)

    def drain_moves(self) -> list[Move]:
        """Copies decided since the last drain, to be executed in order before any kernel reads the tables."""
        moves, self._moves = self._moves, []
        return moves

    # -- for subclasses --------------------------------------------------------------------------------------------

    @abstractmethod
    def _cut(self, pool_bytes: int) -> Cut:
        """Cut the pool into units, all free. Called again where block tables take a part of the budget."""

    @abstractmethod
    def _fits(self, entries: int, states: bool) -> bool:
        """Whether ``entries`` units of KV, and one request's states where ``states``, can be had now."""

    def _admits(self, entries: int) -> bool:
        """Whether a new request may come in that needs ``entries`` units of KV for its whole prompt."""
        return self._fits(entries, True)

    @abstractmethod
    def _take_states(self) -> Sequence[int]:
        """The units of one request's states; the caller knows that they are there."""

    @abstractmethod
    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        """Units of KV for a request that holds ``held``; the caller knows that they are there."""

    @abstractmethod
    def _give_states(self, units: Sequence[int]) -> None: ...

    @abstractmethod
    def _give_kv(self, units: Sequence[int]) -> None: ...

    @abstractmethod
    def _free_bytes(self) -> int:
        """What the free lists hold."""

    @abstractmethod
    def _reserved(self) -> int:
        """Bytes of the budget that can never hold a request's."""

    @abstractmethod
    def _request_limit(self) -> int: ...

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        """The strategy's own invariants, given the units that are held, each once."""

    def _layout(self) -> Layout:
        raise TypeError(f"{self.name} has no physical layout")

    def _state_table(self, units: Sequence[int]) -> Sequence[int]:
        """Table entries of these units of states: one for every state layer, or one that all of them share."""
        return units

    def _extra_states(self) -> Sequence[int]:
        """State units that a resident takes at admission beside its states."""
        return ()

    # -- shared by all ---------------------------------------------------------------------------------------------

    def _entries(self, num_tokens: int) -> int:
        return -(-num_tokens // self._entry_tokens) * self._entry_units

    def _check_admission(self, seq_id: int, num_tokens: int, prompt_tokens: int | None) -> None:
        if seq_id in self._tokens:
            raise bad("seq_id", seq_id, "is resident already; release it first")
        if num_tokens < 1:
            raise bad("num_tokens", num_tokens, "a request has at least one token")
        if prompt_tokens is not None and prompt_tokens < num_tokens:
            raise bad("prompt_tokens", prompt_tokens, f"is below the chunk of {num_tokens} tokens")

    def _check_new_key(self, key: int) -> None:
        if not isinstance(key, int):
            raise bad("key", key, "give a whole number")
        if key in self._checkpoints:
            raise bad("key", key, "owns a checkpoint already; drop it first")

    def _join(self, seq_id: int, one: Resident, num_tokens: int) -> None:
        one.states.owners = one.states.residents = 1
        one.extra = self._extra_states()
        self._state_units += len(one.extra)
        self._residents[seq_id] = one
        more = self._entries(num_tokens) - len(one.kv)
        one.kv.extend(self._take_kv(more, one.kv))
        self._kv_units += more
        self.table_entries_appended += more
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens
        self.room[seq_id] = len(one.kv) // self._entry_units * self._entry_tokens

    def _cache(self, key: int, one: Resident, states: StateSet, tokens: int) -> None:
        segment = self._shared.publish(one, self._entries(tokens))
        segment.holders += 1
        states.owners += 1
        self._checkpoints[key] = Checkpoint(states, segment, tokens)

    def _leaves(self) -> list[Segment]:
        """Where the paths of all owners end."""
        shared = [one.prefix for one in self._residents.values() if one.prefix is not None]
        return shared + [point.kv for point in self._checkpoints.values()]

    def _take_state_set(self) -> StateSet:
        units = self._take_states()
        self._state_units += len(units)
        return StateSet(units, self._state_table(units))

    def _leave_states(self, states: StateSet) -> None:
        """A resident owns them no longer."""
        states.owners -= 1
        states.residents -= 1
        if not states.owners:
            self._return_states(states.units)
        elif not states.residents:
            self._cached_state_units += len(states.units)

    def _return_states(self, units: Sequence[int]) -> None:
        self._state_units -= len(units)
        self._give_states(units)

    def _return_kv(self, units: array) -> None:
        self._kv_units -= len(units)
        self._give_kv(units)

    def _copy_tail(self, src: int, dst: int, tokens: int) -> None:
        """Copy the first kernel blocks of an entry, as many as hold ``tokens`` tokens."""
        kernel_tokens = self.cut.kernel_tokens or self._entry_tokens
        blocks = -(-tokens // kernel_tokens)
        self.bytes_copied += blocks * kernel_tokens * self.spec.kv_bytes_per_token
        if self.physical:
            at = self.layout.attention
            size = kernel_tokens * self.spec.kv_bytes_per_token_per_layer
            starts = sorted(base + k * at.kernel_stride for base in at.base for k in range(blocks))
            joined: list[list[int]] = []
            for start in starts:
                if joined and joined[-1][0] + joined[-1][1] == start:
                    joined[-1][1] += size
                else:
                    joined.append([start, size])
            stride = at.manager_stride
            self._moves += [Move(start + src * stride, start + dst * stride, count) for start, count in joined]

    def _require_physical(self, purpose: str) -> None:
        if not self.physical:
            raise bad("physical", False, f"build {self.name} with physical=True to {purpose}")
