"""RowTable: keeps which request is in which row of a step, and the host's copy of all rows' block tables.

Rows ``0 .. n - 1`` of a step decode; the prefilling rows follow at once, or, in a graph, behind padding. A request that
decodes keeps its row from step to step as long as the step is that long, so that only rows that changed are sent to the
device: a row with another request, with entries appended, or, after memory was moved, every row.

Shapes: R rows, L state layers, N table entries.
"""

from collections.abc import Sequence

import numpy as np

from hybridcache.strategies.base import Strategy

NOBODY = -1
"""Owner of a row that is padding on the device."""
STALE = -2
"""Owner of a row whose table on the device belongs to nobody any more."""


class RowTable:
    """The rows of one runner; see the module.

    A row of ``entries`` holds the entries that the request's states are written to, those that they are read from, its KV
    entries, then -1. A padding row is all -1.

    Args:
        strategy: built with ``physical=True``. Its ``drain_changed``, which nobody else drains, names the requests whose
            tables changed; where memory was moved (``drain_moves``), any table may have.
        max_rows: R.
        max_entries: N, KV entries of the longest request.
    """

    def __init__(self, strategy: Strategy, max_rows: int, max_entries: int) -> None:
        self.strategy = strategy
        self.state_width = len(strategy.spec.state_layers)
        self.first_kv = 2 * self.state_width
        """Column of a row's first KV entry."""
        self.entries = np.full((max_rows, self.first_kv + max_entries), -1, dtype=np.int32)
        self.num_entries = [0] * max_rows
        """KV entries of each row."""
        self.num_rows = 0
        """Number of rows of the last step; the rows behind them are padding."""
        self._sent = [0] * max_rows
        """KV entries of each row when it was last sent."""
        self._owner = [NOBODY] * max_rows
        self._row: dict[int, int] = {}
        self._moved = False

    def forget(self, seq_id: int) -> None:
        """Void a request's row: its memory is returned."""
        row = self._row.pop(seq_id, None)
        if row is not None:
            self._owner[row] = STALE

    def moved(self) -> None:
        """Read every table again at the next step: memory was moved."""
        self._moved = True

    def reset(self) -> None:
        """Send all rows again, at their full width: nobody knows what the device holds."""
        self._row.clear()
        self._owner = [STALE] * len(self._owner)
        self._sent = [self.entries.shape[1] - self.first_kv] * len(self._owner)
        self.num_rows = len(self._owner)

    def arrange(
        self, decode: Sequence[int], prefill: Sequence[int], first_prefill: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Give every request of a step a row and bring ``entries`` up to date.

        Args:
            decode, prefill: ids of resident requests.
            first_prefill: row of the first request that prefills; None puts it right behind those that decode.

        Returns:
            The rows of ``decode`` and then ``prefill`` (which are in order), and the rows whose entries changed.

        Raises:
            ValueError: more requests than rows, or one with more entries than a row holds.
        """
        n = len(decode)
        first = n if first_prefill is None else first_prefill
        total = first + len(prefill)
        if total > len(self._owner):
            raise ValueError(f"{total} requests in a step of at most {len(self._owner)} rows")
        beyond = len(self._owner)
        get = self._row.get
        rows = [get(seq_id, beyond) for seq_id in decode]
        if rows and max(rows) >= n:
            taken = set(rows)
            free = (row for row in range(n) if row not in taken)
            rows = [row if row < n else next(free) for row in rows]
        rows.extend(range(first, total))
        owner = [NOBODY] * max(total, self.num_rows)
        for seq_id, row in zip((*decode, *prefill), rows):
            owner[row] = seq_id
        return rows, self._refresh(owner, total)

    def again(self) -> list[int]:
        """Keep the last step's requests in their rows. Returns the rows whose entries changed."""
        return self._refresh(self._owner[: self.num_rows], self.num_rows)

    def sent_width(self, changed: Sequence[int]) -> int:
        """KV entries to send of every changed row: as many as any of them holds or held when last sent. Counts them as sent."""
        width = max(max(self._sent[row], self.num_entries[row]) for row in changed)
        for row in changed:
            self._sent[row] = self.num_entries[row]
        return max(width, 1)

    def _refresh(self, owner: list[int], num_rows: int) -> list[int]:
        before, altered = self._owner[: len(owner)], self.strategy.drain_changed()
        same = owner == before
        if same and not self._moved:
            rows = [(self._row.get(seq_id), seq_id) for seq_id in altered]
            changed = [row for row, _ in rows if row is not None]
            for row, seq_id in rows:
                if row is not None:
                    self._write(row, seq_id)
            return changed
        changed, anew = [], set(altered)
        for row, (now, then) in enumerate(zip(owner, before)):
            if now == NOBODY:
                if then != NOBODY:
                    self._clear(row)
                    changed.append(row)
            elif now != then or self._moved:
                self._clear(row)
                self._write(row, now)
                changed.append(row)
            elif now in anew:
                self._write(row, now)
                changed.append(row)
        if not same:
            self._owner[: len(owner)] = owner
            self._row = {seq_id: row for row, seq_id in enumerate(owner[:num_rows]) if seq_id != NOBODY}
        self.num_rows, self._moved = num_rows, False
        return changed

    def _clear(self, row: int) -> None:
        self.entries[row, : self.first_kv + self.num_entries[row]] = -1
        self.num_entries[row] = 0

    def _write(self, row: int, seq_id: int) -> None:
        """Bring a request's row up to date: its states' entries, and the KV entries that it has gained."""
        held, known, first = self.strategy.kv_table(seq_id), self.num_entries[row], self.first_kv
        count = len(held)
        if first + count > self.entries.shape[1]:
            raise ValueError(f"request {seq_id} holds {count} table entries; a row has {self.entries.shape[1] - first}")
        values = self.entries[row]
        values[: self.state_width] = self.strategy.state_write_table(seq_id)
        values[self.state_width : first] = self.strategy.state_read_table(seq_id)
        values[first + known : first + count] = held[known:]
        self.num_entries[row] = count
