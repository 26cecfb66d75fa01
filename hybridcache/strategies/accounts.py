"""Accounts: one byte budget, who owns which units of it, and what that comes to.

The part of :class:`hybridcache.strategies.Strategy` that a subclass fills in: it cuts the budget into units, hands them out
and takes them back (the underscored methods at the end); who owns them is kept and counted here.
"""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, MutableSequence, Sequence
from typing import ClassVar

import numpy as np

from hybridcache.errors import UserError, bad, whole
from hybridcache.memory.layout import Layout, check_kv_rows
from hybridcache.memory.owners import Checkpoint, Resident, Segment, SharedKv, StateSet
from hybridcache.memory.spans import Kind, Move, Span
from hybridcache.spec import CacheSpec
from hybridcache.strategies.options import whole_or_none
from hybridcache.strategies.usage import Cut, Usage

ENTRY_BYTES = 4
"""A table entry is an int32."""


class Accounts(ABC):
    """Budget, owners and counts. Subclasses implement the underscored methods and call :meth:`_set_up`.

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
        self.max_request_tokens = whole_or_none("max_request_tokens", max_request_tokens)
        self.bytes_moved = 0
        """Bytes relocated by compaction since construction."""
        self.bytes_copied = 0
        """Bytes of partial tail entries copied by restoring since construction."""
        self.table_entries_appended = 0
        """int32 entries appended to KV tables since construction."""
        self._own_nothing()

    def _own_nothing(self) -> None:
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
        """Forget everybody: the strategy is as it was made, its counters excepted. For a caller that was interrupted in the
        middle of one of its calls, after which no bookkeeping counts."""
        self._own_nothing()
        self._adopt(self.pool_bytes)

    def _set_up(self) -> None:
        """Called at the end of a subclass's constructor: cut the pool."""
        self._adopt(self.budget_bytes)
        if self.table_rows:
            self._adopt(max(self.budget_bytes - self.table_bytes, 0))
        if self.request_limit() < 1:
            least, found, asked = self.cut.least_bytes, 0, self.budget_bytes
            while self.table_rows and found < least <= 1 << 60:
                found = least
                self.budget_bytes = found
                self._adopt(found)
                least = self.cut.least_bytes + self.table_bytes
            self.budget_bytes = asked
            raise UserError(
                f"budget_bytes={self.budget_bytes}: {self.name} cannot hold one request in it; "
                f"give at least {least} bytes"
            )

    def _adopt(self, pool_bytes: int) -> None:
        self.pool_bytes = pool_bytes
        """The budget without block tables: what is cut into units."""
        self.cut = cut = self._cut(pool_bytes)
        self._entry_tokens, self._entry_units = cut.entry_tokens, cut.entry_units

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
        return self.step_rows(self.table_rows) * width * ENTRY_BYTES

    def step_rows(self, asked: int) -> int:
        """Rows of the largest step: ``asked``, or fewer where the budget holds no more requests (a request holds its states at
        least)."""
        return min(asked, self.budget_bytes // self.spec.state_bytes)

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

    # -- for subclasses --------------------------------------------------------------------------------------------

    @abstractmethod
    def _cut(self, pool_bytes: int) -> Cut:
        """Cut the pool into units, all free. Called again where block tables take a part of the budget."""

    @abstractmethod
    def _fits(self, entries: int, states: bool) -> bool:
        """Whether ``entries`` units of KV, and one request's states where ``states``, can be had now."""

    def _admits(self, entries: int, states: bool = True) -> bool:
        """Whether a new request may come in that needs ``entries`` units of KV for its whole prompt, and states of its own (it
        takes over a checkpoint's otherwise)."""
        return self._fits(entries, states)

    @abstractmethod
    def _take_states(self) -> MutableSequence[int]:
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

    # -- taking and giving back ------------------------------------------------------------------------------------

    def _entries(self, num_tokens: int) -> int:
        return -(-num_tokens // self._entry_tokens) * self._entry_units

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
            at = self.layout.attention  # type: ignore[attr-defined]  # of Strategy
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
