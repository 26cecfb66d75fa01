"""events.jsonl: what is written is what is read, and a damaged file says where."""

import json
import math
import random

import numpy as np
import pytest

from hybridcache.errors import UserError
from hybridcache.observe.events import EventWriter, read_events


def test_round_trip_keeps_order_types_and_values(tmp_path):
    seed = random.randrange(2**32)
    rng = np.random.default_rng(seed)
    path = tmp_path / "events.jsonl"
    numbers, reals = rng.integers(0, 2**62, 20), rng.standard_normal(20)
    with EventWriter(path) as events:
        for i in range(20):
            events.write(
                {"event": "a" if i % 3 else "b", "i": numbers[i], "x": reals[i], "list": reals[:3], "ok": True}
            )
    found = read_events(path)
    of_a = [i for i in range(20) if i % 3]
    assert list(found) == ["b", "a"], seed
    assert found["a"]["i"].tolist() == numbers[of_a].tolist(), seed
    assert found["a"]["x"].tolist() == reals[of_a].tolist(), seed
    assert found["b"]["list"].iloc[0] == reals[:3].tolist(), seed
    assert found["b"]["ok"].all()


def test_values_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        events.write({"event": "a", "nan": math.nan, "inf": np.float32("inf"), "array": np.array([1.0, np.nan])})
    assert json.loads(path.read_text()) == {"event": "a", "nan": None, "inf": None, "array": [1.0, None]}


def test_every_event_is_on_disk_at_once_and_lines_are_appended(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        events.write({"event": "a"})
        assert path.read_text() == '{"event":"a"}\n'
    with EventWriter(path) as events:
        events.write({"event": "b"})
    assert set(read_events(path)) == {"a", "b"}


@pytest.mark.parametrize(
    ("event", "message"),
    [({"x": 1}, "event=None"), ({"event": 3}, "event=3"), ({"event": "a", "x": object()}, "not JSON serializable")],
)
def test_what_is_no_event_is_refused_and_not_written(tmp_path, event, message):
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events, pytest.raises(UserError, match=message):
        events.write(event)
    assert path.read_text() == ""


def test_a_closed_writer_and_a_missing_folder_are_named(tmp_path):
    with EventWriter(tmp_path / "events.jsonl") as events:
        pass
    with pytest.raises(UserError, match="closed"):
        events.write({"event": "a"})
    with pytest.raises(UserError, match="cannot be written"):
        EventWriter(tmp_path / "missing" / "events.jsonl")


@pytest.mark.parametrize(
    "damage", [b'{"event": "a", "x"', b"[1, 2]", b'{"x": 1}', b'{"event": 7}', b'{"event":"\xff"}']
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path, damage):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"a"}\n\n' + damage + b"\n")
    with pytest.raises(UserError, match=r"events\.jsonl, line 3: not "):
        read_events(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_events(tmp_path / "events.jsonl")
