"""What the trace readers share: opening a file, naming a bad field, choosing a window, building the stream."""

import csv
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hybridcache.errors import UserError, bad, number, whole
from hybridcache.workloads.base import Request, Workload


@dataclass(frozen=True)
class Row:
    """One request of a trace, its time in seconds on the trace's own clock."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Window:
    """Which part of a trace to take. Checked at construction.

    Args:
        max_requests: at most so many requests, the earliest; None takes all.
        start_s: skip what arrived in the first ``start_s`` seconds of the trace, and count arrivals from there.
        time_scale: multiplies arrival times: 0.5 doubles the request rate.
    """

    max_requests: int | None = None
    start_s: float = 0.0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.max_requests is not None:
            whole("max_requests", self.max_requests)
        number("start_s", self.start_s)
        number("time_scale", self.time_scale, above=True)

    def choose(self, rows: Iterable[Row], path: Path) -> tuple[list[tuple[float, Row]], str]:
        """``(arrival in seconds, row)`` of the rows in the window, ordered by arrival (ties in file order), and the source
        that a :class:`Workload` names: the file, and what was cut off it.

        Raises:
            UserError: the window holds no row.
        """
        ordered = sorted(rows, key=lambda row: row.time_s)
        if not ordered:
            raise UserError(f"{path}: holds no request; give a trace with at least one")
        begin = ordered[0].time_s + self.start_s
        inside = [row for row in ordered if row.time_s >= begin]
        if not inside:
            last = ordered[-1].time_s - ordered[0].time_s
            raise bad("start_s", self.start_s, f"the last request of {path} arrives after {last:g} s; start before it")
        chosen = [((row.time_s - begin) * self.time_scale, row) for row in inside[: self.max_requests]]
        if len(chosen) == len(ordered):
            return chosen, str(path)
        after = f" from {self.start_s:g} s on" if len(inside) < len(ordered) else ""
        return chosen, f"{path} ({len(chosen):,} of {len(ordered):,} requests{after})"


def trace_path(path: str | Path | None, trace: str, where: str) -> Path:
    """The file to read.

    Raises:
        UserError: no path, or no such file; the message names the public trace and where it is published.
    """
    if path is None:
        raise bad("path", path, f"give the file of the {trace}; it is published in {where}")
    found = Path(path).expanduser()
    if not found.is_file():
        raise bad("path", str(path), f"is no file; get the {trace} from {where}")
    return found


@dataclass(frozen=True)
class Line:
    """One line of a trace file as a mapping; its accessors raise a UserError that names file, line, field and value."""

    path: Path
    number: int
    fields: Mapping[str, object]

    def bad(self, field: str, value: object, expected: str) -> UserError:
        return bad(field, value, f"in {self.path}, line {self.number}: expected {expected}")

    def get(self, field: str, expected: str) -> object:
        value = self.fields.get(field)
        if value is None:
            raise self.bad(field, None, f"{expected}, found nothing")
        return value

    def tokens(self, field: str, least: int = 1) -> int:
        """A whole number of tokens, at least ``least``; text is accepted, so is ``12.0``."""
        expected = f"a whole number of tokens, at least {least}"
        value = self.get(field, expected)
        found = self._float(value)
        if found is None or found != int(found) or found < least:
            raise self.bad(field, value, expected)
        return int(found)

    def seconds(self, field: str) -> float:
        """A finite number."""
        value = self.get(field, "a time as a finite number")
        found = self._float(value)
        if found is None:
            raise self.bad(field, value, "a time as a finite number")
        return found

    @staticmethod
    def _float(value: object) -> float | None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        try:
            found = float(value)
        except ValueError:
            return None
        return found if math.isfinite(found) else None


def json_lines(path: Path) -> Iterator[Line]:
    """Lines of a file with one JSON object a line. Empty lines are skipped.

    Raises:
        UserError: a line that is no JSON object, or a file that cannot be unpacked.
    """
    with open_text(path) as file:
        try:
            for at, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    found = json.loads(text)
                except ValueError as error:
                    raise UserError(f"{path}, line {at}: is no JSON ({error}); expected one object a line") from error
                if not isinstance(found, dict):
                    raise UserError(f"{path}, line {at}: is {text.strip()[:40]!r}; expected a JSON object")
                yield Line(path, at, found)
        except (lzma.LZMAError, EOFError) as error:
            raise bad("path", str(path), f"cannot be unpacked ({error})") from error


def open_text(path: Path) -> TextIO:
    """The file (unpacked where it ends in ``.xz``) as UTF-8 text, a byte order mark skipped and bad bytes shown as
    escapes (a reader then names the line)."""
    opened: Any = lzma.open if path.suffix == ".xz" else open
    try:
        return opened(path, "rt", encoding="utf-8-sig", errors="backslashreplace", newline="")
    except OSError as error:
        raise bad("path", str(path), f"cannot be read ({error.strerror})") from error


def csv_lines(path: Path, headers: Sequence[tuple[str, ...]]) -> Iterator[Line]:
    """Lines of a CSV file that has all the columns of one of ``headers``. Empty lines are skipped.

    Raises:
        UserError: other columns, or a line with more fields than the header.
    """
    with open_text(path) as file:
        reader = csv.DictReader(file, restkey="", skipinitialspace=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        if not any(set(header) <= set(columns) for header in headers):
            expected = " or ".join(",".join(header) for header in headers)
            raise bad("header", ",".join(columns), f"in {path}, line 1: expected the columns {expected}")
        reader.fieldnames = columns
        try:
            for fields in reader:
                if "" in fields:
                    raise bad("line", fields[""], f"in {path}, line {reader.line_num}: expected {len(columns)} fields")
                yield Line(path, reader.line_num, fields)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: is no CSV ({error}); expected comma-separated fields"
            ) from error


def build(name: str, rows: Iterable[tuple[float, Row]], source: str) -> Workload:
    """The stream of rows that carry lengths only."""
    requests = [Request(i, at, row.prompt_tokens, row.output_tokens) for i, (at, row) in enumerate(rows)]
    return Workload(name, source, tuple(requests))
