"""events.jsonl: what happened during a run, one JSON object a line, told apart by its ``event`` key.

``docs/metrics.md`` lists the event types and their fields.
"""

import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hybridcache.errors import UserError, bad


class EventWriter:
    """Appends events to a file. Every event is flushed, so a run that dies keeps what it wrote.

    Use it as a context manager. NaN and infinities, which JSON lacks, are written as ``null``.

    Args:
        path: the file; its folder must exist, lines already there are kept.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise bad("path", str(path), f"cannot be written ({error.strerror})") from error

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event, a mapping whose ``event`` key names its type. Values may be numpy scalars and arrays.

        Raises:
            UserError: no ``event`` name, a value that JSON cannot hold, or a writer that is closed.
        """
        if self._file.closed:
            raise bad("path", str(self.path), "the event file is closed; write inside the writer's with block")
        if not isinstance(event.get("event"), str):
            raise bad("event", event.get("event"), "give the type of the event, for example 'sample'")
        try:
            line = json.dumps(_plain(event), allow_nan=False, separators=(",", ":"))
        except TypeError as error:
            raise bad("event", event["event"], f"{error}; events hold numbers, text, lists and mappings") from error
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_events(path: str | PathLike[str]) -> dict[str, pd.DataFrame]:
    """Events of a file by type, each type a table in the order written; missing fields are NaN.

    Raises:
        UserError: the file is missing, or a line is not an event; the message names file and line.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in _lines(Path(path)):
        rows.setdefault(event.pop("event"), []).append(event)
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise bad("path", str(path), f"cannot be read ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error}); a run that was cut off may end in half a line: delete it"
                ) from error
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise UserError(f"{path}, line {number}: not an event; expected an object with an 'event' name")
            yield event


def _plain(value: Any) -> Any:
    """``value`` with numpy types as Python's own and without the floats that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
