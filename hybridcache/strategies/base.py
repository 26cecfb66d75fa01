"""The contract of a memory-sharing strategy.

A strategy owns one byte budget and decides which bytes hold what. It is integer bookkeeping only (no torch): the same
object drives the simulator and real inference. Requests are named by integer ids that the caller chooses.

Accounting identity, checked by :meth:`Strategy.check_integrity`:

    useful + padding + reserved + free = budget,   held = useful + padding

*useful* is the exact 3-column state plus ``t`` bytes per token of every resident; *padding* is what residents hold
beyond that; *reserved* can never hold a request's bytes (null blocks, the remainder below one block); *free* is the
rest. ``docs/metrics.md`` defines every metric.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hybridcache.errors import UserError, bad
from hybridcache.memory.layout import Layout, check_kv_rows
from hybridcache.memory.spans import Kind, Move, Span
from hybridcache.spec import CacheSpec


@dataclass(frozen=True)
class Usage:
    """Bytes of the budget by what they do. ``state_bytes + kv_bytes = held`` splits the same bytes by owner kind."""

    budget: int
    useful: int
    padding: int
    reserved: int
    free: int
    state_bytes: int
    kv_bytes: int
    residents: int

    @property
    def held(self) -> int:
        return self.useful + self.padding

    @property
    def utilization(self) -> float:
        """Useful bytes over budget."""
        return self.useful / self.budget


@dataclass(frozen=True)
class Tables:
    """What kernels read: rows are requests, in the order asked for.

    ``kv`` is int32 ``[B, entries]``, padded with -1; ``state`` is int32 ``[B, state layers]``.
    """

    kv: np.ndarray
    state: np.ndarray


@dataclass(frozen=True)
class Held:
    """Bytes allocated to residents, by kind."""

    state: int
    kv: int


class Strategy(ABC):
    """Base of all strategies. Subclasses implement the underscored methods; callers use the public ones.

    Args:
        spec: what the model stores.
        budget_bytes: the whole budget, reserved rows included.
        physical: allot what real inference with our kernels needs beyond the peer's own accounting (the conv ring's
            last column where the layout has no slack for it, 64-token pages where the peer accounts single tokens), and
            offer ``layout`` and ``tables``.

    Raises:
        UserError: the budget cannot hold one request of one token.
    """

    name: ClassVar[str]
    supports_physical: ClassVar[bool] = False

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **options: Any) -> "Strategy":
        made = super().__new__(cls)
        made._made_with = args, options
        return made

    def __init__(self, spec: CacheSpec, budget_bytes: int, *, physical: bool = False) -> None:
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
        self.bytes_moved = 0
        """Bytes relocated by compaction since construction."""
        self.table_entries_appended = 0
        """int32 entries appended to KV tables since construction."""
        self.room: dict[int, int] = {}
        """To how many tokens each resident can grow in the memory that it holds; may be less than that (0 where a strategy does
        not say), never more. To be read only."""
        self._tokens: dict[int, int] = {}
        self._total_tokens = 0
        self._gained: dict[int, None] = {}

    # -- public contract -------------------------------------------------------------------------------------------

    def admit(self, seq_id: int, num_tokens: int, prompt_tokens: int | None = None) -> bool:
        """Make a request resident with memory for its state and its first ``num_tokens`` tokens.

        ``prompt_tokens`` is the whole prompt's length where only a chunk is admitted; a strategy may refuse if the
        whole prompt would not fit now, though it allocates the chunk only. Returns False, and changes nothing, where
        memory is short.
        """
        if seq_id in self._tokens:
            raise bad("seq_id", seq_id, "is resident already; release it first")
        if num_tokens < 1:
            raise bad("num_tokens", num_tokens, "a request has at least one token")
        if prompt_tokens is not None and prompt_tokens < num_tokens:
            raise bad("prompt_tokens", prompt_tokens, f"is below the chunk of {num_tokens} tokens")
        if not self._admit(seq_id, num_tokens, prompt_tokens or num_tokens):
            return False
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens
        self.room[seq_id] = self._room(seq_id)
        return True

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        """Extend a resident request to ``num_tokens`` tokens in all. False, and no change, where memory is short."""
        held = self._tokens.get(seq_id)  # looked up here, not in num_tokens: every request grows in every step
        if held is None:
            raise bad("seq_id", seq_id, "is not resident; admit it first")
        if num_tokens <= held:
            if num_tokens < held:
                raise bad("num_tokens", num_tokens, f"request {seq_id} holds {held} tokens; a request never shrinks")
            return True
        if num_tokens > self.room[seq_id]:
            appended = self.table_entries_appended
            if not self._grow(seq_id, num_tokens):
                return False
            self.room[seq_id] = self._room(seq_id)
            if self.table_entries_appended != appended:
                self._gained[seq_id] = None
        self._tokens[seq_id] = num_tokens
        self._total_tokens += num_tokens - held
        return True

    def fill(self, totals: Mapping[int, int]) -> None:
        """What :meth:`grow` does, for many residents at once that stay within their ``room`` (tokens in all, by id)."""
        self._total_tokens += sum(totals.values()) - sum(map(self._tokens.__getitem__, totals))
        self._tokens.update(totals)

    def release(self, seq_id: int) -> None:
        """Return everything that the request holds."""
        held = self.num_tokens(seq_id)
        self._release(seq_id)
        del self._tokens[seq_id], self.room[seq_id]
        self._gained.pop(seq_id, None)
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

    def usage(self) -> Usage:
        """The budget's bytes by what they do, now."""
        useful = len(self._tokens) * self.spec.state_bytes + self._total_tokens * self.spec.kv_bytes_per_token
        held, reserved = self._held(), self._reserved()
        total = held.state + held.kv
        return Usage(
            budget=self.budget_bytes,
            useful=useful,
            padding=total - useful,
            reserved=reserved,
            free=self.budget_bytes - total - reserved,
            state_bytes=held.state,
            kv_bytes=held.kv,
            residents=len(self._tokens),
        )

    def request_limit(self) -> int:
        """Tokens of the longest request that an empty pool can hold; the engine refuses longer ones at submit."""
        return self._request_limit()

    def check_integrity(self) -> None:
        """Raise AssertionError where bookkeeping is inconsistent: the usage identity, spans without overlap, and the
        strategy's own invariants."""
        usage = self.usage()
        assert usage.useful >= 0, usage
        assert usage.padding >= 0, usage
        assert usage.reserved >= 0, usage
        assert usage.free >= 0, usage
        assert usage.useful + usage.padding + usage.reserved + usage.free == usage.budget, usage
        assert self._total_tokens == sum(self._tokens.values())
        assert self.room == {seq_id: self._room(seq_id) for seq_id in self._tokens}
        end = 0
        by_kind = {Kind.STATE: 0, Kind.KV: 0}
        for span in sorted(self.spans(), key=lambda s: s.offset):
            assert span.num_bytes > 0, span
            assert span.offset >= end, f"{span} overlaps a span that ends at {end}"
            assert span.seq_id in self._tokens, f"{span} belongs to no resident"
            end = span.offset + span.num_bytes
            by_kind[span.kind] += span.num_bytes
        assert end <= self.budget_bytes, f"a span ends at {end}, beyond the budget of {self.budget_bytes}"
        if self.has_addresses:
            assert by_kind == {Kind.STATE: usage.state_bytes, Kind.KV: usage.kv_bytes}, (by_kind, usage)
        self._check()

    has_addresses: ClassVar[bool] = True
    """False for a bound that counts bytes without placing them."""

    @abstractmethod
    def spans(self) -> Iterator[Span]:
        """Every span that a resident holds, in any order (nothing for a strategy without addresses)."""

    def extents(self) -> dict[Kind, np.ndarray]:
        """The bytes that residents hold by kind, as int64 ``[n, 2]`` of ``(offset, bytes)``, whoever holds them, in any order
        and without overlap. A strategy whose spans are very many may override it with something faster."""
        by_kind: dict[Kind, list[tuple[int, int]]] = {Kind.STATE: [], Kind.KV: []}
        states, kv = by_kind[Kind.STATE], by_kind[Kind.KV]
        for offset, num_bytes, kind, _ in self.spans():
            (states if kind is Kind.STATE else kv).append((offset, num_bytes))
        return {kind: np.array(pairs, dtype=np.int64).reshape(-1, 2) for kind, pairs in by_kind.items()}

    # -- physical memory -------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """How kernels find KV and states. Only of a strategy built with ``physical=True``."""
        if not self.physical:
            raise bad("physical", False, f"build {self.name} with physical=True to run inference on it")
        return self._layout()

    def tables(self, seq_ids: Sequence[int]) -> Tables:
        """Block tables of resident requests, a row each, in the order given. Only with ``physical=True``, as the layout."""
        if not self.physical:
            raise bad("physical", False, f"build {self.name} with physical=True to read its tables")
        rows = [self._kv_table(seq_id) for seq_id in seq_ids]
        kv = np.full((len(rows), max((len(row) for row in rows), default=0)), -1, dtype=np.int32)
        state = np.empty((len(rows), len(self.spec.state_layers)), dtype=np.int32)
        for i, (seq_id, row) in enumerate(zip(seq_ids, rows, strict=True)):
            kv[i, : len(row)] = row
            state[i] = self._state_table(seq_id)
        return Tables(kv=kv, state=state)

    def kv_table(self, seq_id: int) -> Sequence[int] | np.ndarray:
        """The KV entries of one resident request, in order of position; to be read before the strategy is called again.
        Entries are only ever appended, unless :meth:`drain_moves` returns moves; ``table_entries_appended`` counts them. Only
        with ``physical=True``."""
        return self._kv_table(seq_id)

    def state_table(self, seq_id: int) -> Sequence[int]:
        """The state entries of one resident request: one for every state layer, or one that all of them share. Only with
        ``physical=True``."""
        return self._state_table(seq_id)

    def settle_states(self) -> None:
        pass

    def drain_changed(self) -> Sequence[int]:
        return self.drain_gained()

    def state_write_table(self, seq_id):
        return self.state_table(seq_id)

    state_read_table = state_write_table

    def reset(self) -> None:
        """Forget everybody and everything: the strategy is as it was made. For a caller that was interrupted in the middle of
        one of these calls."""
        args, options = self._made_with
        moved, appended = self.bytes_moved, self.table_entries_appended
        self.__dict__.clear()
        self._made_with = args, options
        self.__init__(*args, **options)  # type: ignore[misc]
        self.bytes_moved, self.table_entries_appended = moved, appended

    def drain_gained(self) -> Sequence[int]:
        """Residents whose KV tables have gained entries by growing since the last drain."""
        gained, self._gained = self._gained, {}
        return tuple(gained)

    def drain_moves(self) -> list[Move]:
        """Relocations decided since the last drain, to be executed in order before any kernel reads the tables."""
        return []

    # -- for subclasses --------------------------------------------------------------------------------------------

    @abstractmethod
    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool: ...

    @abstractmethod
    def _grow(self, seq_id: int, num_tokens: int) -> bool: ...

    def _room(self, seq_id: int) -> int:
        """To how many tokens the resident request can grow with nothing to be done but counting; 0 for not saying."""
        return 0

    @abstractmethod
    def _release(self, seq_id: int) -> None: ...

    @abstractmethod
    def _held(self) -> Held: ...

    @abstractmethod
    def _reserved(self) -> int: ...

    @abstractmethod
    def _request_limit(self) -> int: ...

    def _check(self) -> None:
        """The strategy's own invariants."""

    def _layout(self) -> Layout:
        raise TypeError(f"{self.name} has no physical layout")

    def _kv_table(self, seq_id: int) -> Sequence[int] | np.ndarray:
        """Entries in order of position. Tables are built in every step: an ``array("i")`` copies fastest."""
        raise TypeError(f"{self.name} has no block tables")

    def _state_table(self, seq_id: int) -> Sequence[int]:
        """An entry for every state layer, or one entry that all of them share."""
        raise TypeError(f"{self.name} has no state tables")

    def _require_one_request(self, needed_bytes: int) -> None:
        """Called at the end of a constructor: refuse a budget that holds no request, naming the bytes it would take."""
        if self._request_limit() < 1:
            raise UserError(
                f"budget_bytes={self.budget_bytes}: {self.name} cannot hold one request in it; "
                f"give at least {needed_bytes} bytes"
            )
