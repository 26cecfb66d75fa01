"""agent_sessions: who starts when, what a prompt holds, where a session is cut; worked out by hand on small traces."""

import heapq
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcache.errors import UserError
from hybridcache.workloads import Request, Stream, build_workload

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "traces" / "agentic_coding.jsonl.xz"

FORK = [
    [0.0, 200, 100, 0, [[0, 3]], 7.0, 1.5],  # blocks 0 1 2
    {"sub": [[0.0, 130, 10, 2, [], 2.0, 1.0], [9.0, 200, 5, 2, [[10, 1]], 3.0, 1.0]]},  # 0 1, then 0 1 10
    {"sub": [[0.0, 64, 5, 0, [[20, 1]], 1.0, 1.0]]},  # 20
    [50.0, 330, 50, 0, [[0, 3], [30, 2]], 4.0, 1.0],  # 0 1 2 30 31
    [70.0, 400, 0, 4, [[40, 2]], None, None],  # 0 1 2 30 40 41
]
"""Two sub-agents behind the first request; the last one diverges inside the last block before it."""


def chain(*prompts: int, think_s: float = 0.0) -> list[Any]:
    """Requests of 10 output tokens, each of which goes on from all blocks of the one before."""
    found, before = [], 0
    for tokens in prompts:
        blocks = tokens // 64
        runs = [[before, blocks - before]] if blocks > before else []
        found.append([0.0, tokens, 10, before, runs, think_s, 1.0])
        before = blocks
    return found


def trace(folder: Path, *sessions: list[Any], packed: bool = False) -> Path:
    """A file of these sessions, each with two blocks of tools and system prompt."""
    path = folder / ("trace.jsonl.xz" if packed else "trace.jsonl")
    lines = [
        json.dumps({"id": f"s{i}", "tool_tokens": 100, "system_tokens": 40, "requests": requests})
        for i, requests in enumerate(sessions)
    ]
    text = "\n".join(lines) + "\n"
    path.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
    return path


def stream(path: Path, **options: Any) -> Stream:
    return build_workload("agent_sessions", path=path, **{"live_sessions": 1, "num_sessions": 1, **options})


def replay(one: Stream, took: Callable[[Request], float] = lambda request: 1.0) -> Iterator[tuple[Request, float]]:
    """All requests with their ends, in order of arrival, each served as soon as it arrives."""
    due: list[tuple[float, int, str, Request]] = [(r.arrival_s, r.request_id, "arrives", r) for r in one.begin()]
    heapq.heapify(due)
    while due:
        at, _, what, request = heapq.heappop(due)
        if what == "arrives":
            end = at + took(request)
            yield request, end
            heapq.heappush(due, (end, request.request_id, "ends", request))
            continue
        for released in one.ended(request.request_id, at):
            assert released.arrival_s >= at
            heapq.heappush(due, (released.arrival_s, released.request_id, "arrives", released))


def ids(*runs: tuple[int, int]) -> list[int]:
    return [token for first, count in runs for token in range(first, first + count)]


def test_ids_of_blocks_tails_and_outputs(tmp_path: Path) -> None:
    """Block b holds the ids 64 b .. 64 b + 63. A tail and an output are what the next prompt of the same list holds there, or
    else occur once (negative ids)."""
    found = {r.turn: r for r, _ in replay(stream(trace(tmp_path, FORK)))}
    assert [(r.prompt_tokens, r.output_tokens) for _, r in sorted(found.items())] == [
        (200, 100), (130, 10), (200, 5), (64, 5), (330, 50), (400, 1)
    ]  # fmt: skip
    said = {turn: r.prompt_ids.tolist() + r.output_ids.tolist() for turn, r in found.items()}
    assert all(r.prompt_ids.dtype == r.output_ids.dtype == np.int32 for r in found.values())
    # 192 tokens of its own blocks; tail and output go 108 tokens into blocks 30 and 31 of the next main request.
    assert said[0] == ids((0, 192), (1920, 108))
    assert said[1] == ids((0, 128), (640, 12)), "goes on in block 10 of the sub-agent's next prompt"
    assert said[2][:192] == ids((0, 128), (640, 64))
    assert said[3][:64] == ids((1280, 64))
    assert said[4][:320] == ids((0, 192), (1920, 128))
    assert said[5][:384] == ids((0, 192), (1920, 64), (2560, 128))
    once = said[2][192:] + said[3][64:] + said[4][320:] + said[5][384:]
    assert len(once) == 13 + 5 + 60 + 17
    assert len(set(once)) == len(once)
    assert max(once) < 0


def test_a_prompt_of_the_same_blocks_shares_no_tail(tmp_path: Path) -> None:
    """100 tokens, then 110: both have one whole block, so that nothing says what stands behind it."""
    first, second = (r for r, _ in replay(stream(trace(tmp_path, chain(100, 110)))))
    assert first.prompt_ids[:64].tolist() == second.prompt_ids[:64].tolist() == ids((0, 64))
    assert not set(first.prompt_ids[64:].tolist()) & set(second.prompt_ids[64:].tolist())


def test_who_starts_when(tmp_path: Path) -> None:
    """Times from the end of the first request, at 0: sub-agents start after 2 and 1; the first one's second request 3 after its
    first; the next main request 4 after, but not before both sub-agents have ended; the last one has no think time."""
    took = {0: 5.0, 1: 10.0, 2: 1.0, 3: 30.0, 4: 1.0, 5: 1.0}
    rows = {r.turn: (r.arrival_s, end) for r, end in replay(stream(trace(tmp_path, FORK)), lambda r: took[r.turn])}
    zero = rows[0][1]
    assert rows[0][0] == zero - 5.0, "nobody thinks before the first request"
    expected = {1: (2, 12), 2: (15, 16), 3: (1, 31), 4: (31, 32), 5: (32, 33)}
    for turn, times in expected.items():
        assert [at - zero for at in rows[turn]] == pytest.approx(times), turn
    took[3] = 1.0  # now the first sub-agent ends last, at 16
    rows = {r.turn: (r.arrival_s, end) for r, end in replay(stream(trace(tmp_path, FORK)), lambda r: took[r.turn])}
    assert rows[4][0] - rows[0][1] == pytest.approx(16)
    took |= {1: 0.25, 2: 0.25}  # sub-agents have ended at 5.5; the think time of 9 counts
    longer = [*FORK[:3], [*FORK[3][:5], 9.0, 1.0], FORK[4]]
    rows = {r.turn: (r.arrival_s, end) for r, end in replay(stream(trace(tmp_path, longer)), lambda r: took[r.turn])}
    assert rows[4][0] - rows[0][1] == pytest.approx(9)


def test_recorded_times(tmp_path: Path) -> None:
    """Think times are cut, null is none; the service time is told."""
    path = trace(tmp_path, chain(100, 200, 300, think_s=77_360.0))
    ends = [(r.arrival_s, end) for r, end in replay(stream(path, max_think_s=20.0))]
    assert [later[0] - earlier[1] for earlier, later in pairwise(ends)] == pytest.approx([20.0, 20.0])
    assert [r.service_s for r, _ in replay(stream(trace(tmp_path, FORK)))] == [1.5, 1.0, 1.0, 1.0, 1.0, None]


def test_sessions_are_replaced_and_share_nothing(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    path = trace(tmp_path, chain(200, 300), chain(400, 500), chain(600, 700, 800), packed=True)
    begun, ended, blocks, prompts = {}, {}, defaultdict(set), defaultdict(list)
    one = stream(path, live_sessions=2, num_sessions=7, seed=seed)
    for r, end in replay(one, lambda r: 1.0 + r.request_id / 100):
        begun.setdefault(r.session, r.arrival_s)
        ended[r.session] = end
        prompts[r.session].append(r.prompt_tokens)
        blocks[r.session] |= {int(token) for token in r.prompt_ids if token >= 0}
    assert sorted(begun) == [*range(7)], seed
    assert all(0 <= begun[i] < 60 for i in (0, 1)), "the first ones start within a minute"
    assert [begun[i] for i in range(2, 7)] == sorted(ended.values())[:5], "a later one starts when another ends"
    for pass_ in (range(3), range(3, 6)):
        assert sorted(prompts[i] for i in pass_) == [[200, 300], [400, 500], [600, 700, 800]], (
            "each is started once a pass"
        )
    owned = [token for tokens in blocks.values() for token in tokens]
    assert len(owned) == len(set(owned)), "copies of a session share nothing either"
    assert [r for r, _ in replay(one.fresh())] == [r for r, _ in replay(one.fresh())]
    assert len({stream(path, seed=i).begin()[0].prompt_tokens for i in range(40)}) == 3, "the seed draws the order"


def test_tools_and_system_prompt_are_shared_only_where_assumed(tmp_path: Path) -> None:
    """140 tokens of tools and system prompt are two whole blocks."""
    path = trace(tmp_path, chain(200), chain(250))
    for share, same in ((False, 0), (True, 128)):
        a, b = (r.prompt_ids for r, _ in replay(stream(path, num_sessions=2, share_system=share)))
        assert int((a[:192] == b[:192]).sum()) == same
    assert "taken as shared" in stream(path, share_system=True).source


def test_sessions_are_cut_before_longer_prompts(tmp_path: Path) -> None:
    """Of main requests what follows is cut, too; of a sub-agent's the rest of its list. Sessions without a request left do not
    count. The requests behind still share blocks with one that was cut."""
    branched = [
        *chain(128),
        {"sub": [[0, 100, 9, 1, [], 0, 1], [0, 1000, 9, 1, [[50, 14]], 0, 1], [0, 90, 9, 1, [], 0, 1]]},
        [0, 150, 9, 1, [[60, 1]], 0, 1],
        [0, 1001, 9, 2, [[70, 13]], 0, 1],
        [0, 10, 9, 0, [], 0, 1],
    ]
    path = trace(tmp_path, branched, chain(2000, 3000))
    found = [r for r, _ in replay(stream(path, max_tokens=999, num_sessions=3))]
    assert [(r.session, r.prompt_tokens) for r in found] == [(i, n) for i in range(3) for n in (128, 100, 150)]
    assert found[2].prompt_ids[:128].tolist() == ids((0, 64), (60 * 64, 64))
    assert [r.prompt_tokens for r, _ in replay(stream(path, max_tokens=1000, num_sessions=1))] == [
        128,
        100,
        1000,
        90,
        150,
    ]
    with pytest.raises(UserError, match=r"max_tokens=127: every session of .* begins with a longer prompt"):
        stream(path, max_tokens=127)


def test_an_aborted_request_ends_its_session(tmp_path: Path) -> None:
    one = stream(trace(tmp_path, FORK), num_sessions=2)
    (first,) = one.begin()
    subs = one.ended(first.request_id, 100.0)
    assert [r.turn for r in subs] == [1, 3]
    assert one.ended(subs[0].request_id, 105.0, aborted=True) == [], "the other sub-agent still runs"
    (second,) = one.ended(subs[1].request_id, 110.0)
    assert (second.session, second.turn, second.arrival_s) == (1, 0, 110.0)
    assert one.ended(second.request_id, 120.0, aborted=True) == []


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "requests=.*a request first"),
        (FORK[1:], "requests=.*a request first"),
        ([[0, 1, 1, 0, [], 0]], r"line 1: expected \[t_s, input_tokens"),
        ([[0, 64, 1, 0, [], 0, 1]], r"new='0 blocks'.*1 \(input_tokens=64\)"),
        ([[0, 64, 1, 1, [], 0, 1]], "shared=1.*at most the 0 blocks"),
        ([[0, 64, 1, 0, [[-1, 1]], 0, 1]], r"new=\[\[-1, 1\]\]"),
        ([[0, 64, 1, 0, [[1, 0]], 0, 1]], r"new=\[\[1, 0\]\]"),
        ([[0, 64, 1, 0, [[1]], 0, 1]], r"new=\[\[1\]\]"),
        ([[0, 0, 1, 0, [], 0, 1]], "input_tokens=0"),
        ([[0, 1, -1, 0, [], 0, 1]], "output_tokens=-1"),
        ([[0, 1, 1, 0, [], -2, 1]], "think_s=-2"),
        ([[0, 1, 1, 0, [], 0, "long"]], "api_s='long'"),
        ([[0, 1, 1, 0, [], 0, 1], {"subs": []}], "sub=None"),
        ([[0, 1, 1, 0, [[1 << 26, 1]], 0, 1]], "new='1 blocks'"),
        ([[0, 64, 1, 0, [[1 << 26, 1]], 0, 1]], "num_sessions=1: their blocks have .* ids, more than int32 holds"),
    ],
)
def test_malformed_sessions_are_named(tmp_path: Path, requests: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(trace(tmp_path, requests))


def test_options_out_of_range_and_files_that_are_none(tmp_path: Path) -> None:
    path = trace(tmp_path, chain(100))
    options = {
        "live_sessions": 0,
        "num_sessions": 0,
        "max_think_s": -1,
        "max_tokens": 0,
        "share_system": "yes",
        "seed": -1,
    }
    for option, value in options.items():
        with pytest.raises(UserError, match=f"{option}="):
            stream(path, **{option: value})
    with pytest.raises(UserError, match=r"path=None: .*kv-cache-tester"):
        build_workload("agent_sessions")
    (tmp_path / "broken.xz").write_bytes(trace(tmp_path, *[chain(100)] * 99, packed=True).read_bytes()[:-20])
    with pytest.raises(UserError, match=r"broken\.xz.*cannot be unpacked"):
        stream(tmp_path / "broken.xz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no session"):
        stream(tmp_path / "empty.jsonl")


@pytest.mark.skipif(not RECORDED.is_file(), reason=f"the recorded sessions are not at {RECORDED}")
def test_the_recorded_sessions() -> None:
    """What is known of the recording: 237 sessions, 17,274 requests of 122,000 tokens on average; 6 to 7 % of the requests
    diverge inside the prompt before them, more than half of those in its last block."""
    one = stream(RECORDED, num_sessions=237, live_sessions=8, max_tokens=1 << 30)
    before: dict[int, Request] = {}
    requests = tokens = diverged = in_last_block = 0
    for r, _ in replay(one, lambda r: r.service_s or 0.0):
        requests, tokens = requests + 1, tokens + r.prompt_tokens
        last, before[r.session] = before.get(r.session), r
        if last is None or last.turn != r.turn - 1:
            continue
        whole = last.prompt_tokens // 64 * 64
        most = min(whole, r.prompt_tokens)
        differ = np.flatnonzero(last.prompt_ids[:most] != r.prompt_ids[:most])
        same = int(differ[0]) if len(differ) else most
        diverged += same < whole
        in_last_block += whole - 64 <= same < whole
    assert (len(before), requests) == (237, 17_274)
    assert 122_000 < tokens / requests < 123_000
    assert 0.06 <= diverged / requests <= 0.07
    assert 0.5 <= in_last_block / diverged <= 0.65
