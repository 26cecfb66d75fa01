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

from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from hybridcache.errors import bad
from hybridcache.memory.layout import Layout
from hybridcache.memory.owners import Checkpoint, Resident, StateSet
from hybridcache.memory.spans import Kind, Move, Span
from hybridcache.strategies.accounts import Accounts
from hybridcache.strategies.usage import Cut, Tables, Usage

__all__ = ["Cut", "Kind", "Move", "Span", "Strategy", "Tables", "Usage"]


class Strategy(Accounts):
    """Base of all strategies: what the scheduler and the engine call. A subclass implements the underscored methods of
    :class:`Accounts`, and calls :meth:`_set_up` at the end of its constructor."""

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
            pages = -(-num_tokens // self._entry_tokens)
            more = pages * self._entry_units - len(one.kv)
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
            self.room[seq_id] = pages * self._entry_tokens
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens - held
        return True

    def fill(self, totals: Mapping[int, int]) -> None:
        """What :meth:`grow` does, for many residents at once that stay within their ``room`` (tokens in all, by id)."""
        self._total_tokens += sum(totals.values()) - sum(map(self._tokens.__getitem__, totals))
        self._tokens.update(totals)

    def grow_all(self, totals: Mapping[int, int]) -> bool:
        """What :meth:`grow` does, for many residents at once (tokens in all, by id). False, and no change, where memory for all
        of them is short, or where one of them must take states of its own first."""
        more = sum(max(self._entries(tokens) - len(self._residents[i].kv), 0) for i, tokens in totals.items())
        if any(self._residents[i].states.owners > 1 for i in totals) or not self._fits(more, False):
            return False
        return all(self.grow(i, tokens) for i, tokens in totals.items())

    def release(self, seq_id: int) -> None:
        """Return everything that only this request holds."""
        held = self.num_tokens(seq_id)
        one = self._residents.pop(seq_id)
        self._return_kv(one.own())
        if one.prefix is not None:
            self._shared.leave(one.prefix)
        self._leave_states(one.states)
        if seq_id in self._reads:
            self._leave_states(self._reads.pop(seq_id))
        if one.extra:
            self._return_states(one.extra)
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
        step; where the step is never launched, the caller drops it. False, and no change, where memory is short."""
        tokens = self.num_tokens(seq_id)
        self._check_new_key(key)
        if not 1 <= position <= tokens:
            raise bad("position", position, f"request {seq_id} holds {tokens} tokens; choose one from 1 to {tokens}")
        if not self._fits(0, True):
            return False
        self._cached_state_units += self.cut.states_per_request
        self._cache(key, self._residents[seq_id], self._take_state_set(), position)
        return True

    def restore(
        self, seq_id: int, key: int, num_tokens: int, prompt_tokens: int | None = None, *, take_over: bool = False
    ) -> bool:
        """As :meth:`admit`, of a request whose first ``cached_tokens(key)`` tokens are those of the key.

        Whole entries are shared; a partial one at the end is copied to one of its own by a move (:meth:`drain_moves`). Its read
        table names the key's states, its write table its own, until :meth:`settle_states`.

        With ``take_over`` the request takes the key's states, and a partial entry that nobody else holds, as its own, and the
        key owns nothing any more; False also where somebody else holds the states.
        """
        cached = self.cached_tokens(key)
        self._check_admission(seq_id, num_tokens, prompt_tokens)
        if num_tokens <= cached:
            raise bad(
                "num_tokens", num_tokens, f"key {key} holds {cached} tokens; a request computes one more at least"
            )
        point, shared = self._checkpoints[key], cached // self._entry_tokens * self._entry_units
        if take_over:
            if point.states.owners > 1:
                return False
            if point.kv.holders == 1:
                shared = self._entries(cached)
        if not self._admits(self._entries(prompt_tokens or num_tokens) - shared, states=not take_over):
            return False
        one = Resident(point.states if take_over else self._take_state_set())
        if shared:
            prefix = self._shared.ending(point.kv, shared)
            self._shared.enter(prefix)
            one.prefix, one.shared = prefix, shared
            for node in reversed([*prefix.path()]):
                one.kv.extend(node.entries)
        if not point.states.residents:
            self._cached_state_units -= len(point.states.units)
        if not take_over:
            point.states.owners += 1
            point.states.residents += 1
            self._reads[seq_id] = point.states
        self._join(seq_id, one, num_tokens)
        tail = cached - shared // self._entry_units * self._entry_tokens
        if tail > 0:
            node = next(n for n in point.kv.path() if n.end - len(n.entries) <= shared)
            self._copy_tail(node.entries[shared - node.end], one.kv[shared], tail)
        if take_over:
            del self._checkpoints[key]
            self._shared.let_go(point.kv)
        return True

    def fork(self, seq_id: int, child: int, num_tokens: int) -> bool:
        """As :meth:`restore`, from a resident as the last launched step left it."""
        key = min(self._checkpoints, default=0) - 1
        room = self.room.get(seq_id, 0)
        self.checkpoint(seq_id, key)
        try:
            return self.restore(child, key, num_tokens)
        finally:
            self.drop(key)
            if self._residents[seq_id].states.owners == 1:
                self.room[seq_id] = room

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

    def releasable(self, key: int) -> int:
        """Bytes that :meth:`drop` would free: what neither another cached owner nor a resident holds."""
        self.cached_tokens(key)
        point, cut = self._checkpoints[key], self.cut
        states = len(point.states.units) * cut.state.num_bytes if point.states.owners == 1 else 0
        entries, node = 0, point.kv
        while node is not None and node.holders == 1:
            entries, node = entries + len(node.entries), node.parent  # type: ignore[assignment]
        return states + entries * cut.kv.num_bytes

    def recall(self, key: int, num_tokens: int, base: int | None = None) -> bool:
        """Let ``key`` own states of its own, and the KV of ``num_tokens`` tokens, whose bytes the caller brings from elsewhere;
        whole entries of the key ``base`` (a shorter prefix) are shared. False, and no change, where memory is short."""
        self._check_new_key(key)
        seq_id, shared, prefix = min(self._tokens, default=0) - 1, 0, None
        self._check_admission(seq_id, num_tokens, None)
        if base is not None:
            shared = self.cached_tokens(base) // self._entry_tokens * self._entry_units
        if not self._admits(self._entries(num_tokens) - shared):
            return False
        one = Resident(self._take_state_set())
        if shared and base is not None:
            prefix = self._shared.ending(self._checkpoints[base].kv, shared)
            self._shared.enter(prefix)
            one.prefix, one.shared = prefix, shared
            for node in reversed([*prefix.path()]):
                one.kv.extend(node.entries)
        self._join(seq_id, one, num_tokens)
        self.checkpoint(seq_id, key)
        self.release(seq_id)
        return True

    def cached_units(self, key: int) -> tuple[Sequence[int], array]:
        """Units of a cached owner's states, and of its KV in order of position."""
        self.cached_tokens(key)
        point, kv = self._checkpoints[key], array("i")
        for node in reversed([*point.kv.path()]):
            kv.extend(node.entries)
        return point.states.units, kv

    def at_rest(self, seq_id: int, num_tokens: int) -> bool:
        """Whether the last launched step left the resident's states after exactly these tokens, so that :meth:`checkpoint` may
        be called: no further step has been prepared for it."""
        return self.num_tokens(seq_id) == num_tokens and seq_id not in self._reads

    def cached_tokens(self, key: int) -> int:
        """Tokens before the cached owner's position."""
        if key not in self._checkpoints:
            raise bad("key", key, "owns nothing; checkpoint it first")
        return self._checkpoints[key].num_tokens

    @property
    def cached(self) -> Sequence[int]:
        """Keys of the cached owners, in order of creation."""
        return tuple(self._checkpoints)

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

    def sample_moves(self) -> list[Move]:
        """Copies as restoring makes them, between entries that nobody holds; so that an engine compiles the kernel before its
        first request. Only while nobody holds anything."""
        assert not self._residents
        assert not self._checkpoints
        before, self.bytes_copied = self.bytes_copied, 0
        if self.request_limit() > self._entry_tokens:
            self._copy_tail(0, 1, 1)
        self.bytes_copied = before
        return self.drain_moves()

    # -- helpers ---------------------------------------------------------------------------------------------

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

    def _require_physical(self, purpose: str) -> None:
        if not self.physical:
            raise bad("physical", False, f"build {self.name} with physical=True to {purpose}")
