"""Trace readers: what they make of their files, and what they say of bad ones."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.errors import UserError
from hybridcache.workloads import Workload, build_workload
from hybridcache.workloads.mooncake import block_ids


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def lengths(workload: Workload) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in workload.requests]


def arrivals(workload: Workload) -> list[float]:
    return [request.arrival_s for request in workload.requests]


def test_azure_in_both_forms(tmp_path: Path) -> None:
    public = write(
        tmp_path / "public.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:15:48.1805900,879,55",
    )
    relative = write(
        tmp_path / "relative.csv",
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        "0.0,374,44",
        "",
        "4.314579,396,109",
        "1.5,879,55",
    )
    for path in (public, relative):
        workload = build_workload("azure", path=path)
        assert lengths(workload) == [(374, 44), (879, 55), (396, 109)]
        assert arrivals(workload) == pytest.approx([0.0, 1.5, 4.314579], abs=2e-6)
        assert workload.source == str(path)


def test_window_of_a_trace(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        *(f"{100 + 2 * i},{i + 1},1" for i in range(10)),
    )
    workload = build_workload("azure", path=path, start_s=5, max_requests=3, time_scale=0.5)
    assert lengths(workload) == [(4, 1), (5, 1), (6, 1)]
    assert arrivals(workload) == [0.5, 1.5, 2.5]
    with pytest.raises(UserError, match=r"start_s=50.*after 18 s"):
        build_workload("azure", path=path, start_s=50)
    for option, value in (("max_requests", 0), ("start_s", -1), ("time_scale", 0)):
        with pytest.raises(UserError, match=f"{option}={value}"):
            build_workload("azure", path=path, **{option: value})


def mooncake_line(timestamp: int, input_length: int, hash_ids: list[int], output_length: int = 5) -> str:
    fields = {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
    }
    return json.dumps(fields)


def test_mooncake_ids_keep_the_sharing_of_hashes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl",
        mooncake_line(3000, 1100, [0, 1, 2]),
        mooncake_line(0, 1300, [0, 1, 7]),
        mooncake_line(3000, 600, [9, 1]),
    )
    plain = build_workload("mooncake", path=path)
    assert lengths(plain) == [(1300, 5), (1100, 5), (600, 5)]
    assert arrivals(plain) == [0.0, 3.0, 3.0]
    assert all(request.prompt_ids is None for request in plain.requests)
    requests = build_workload("mooncake", path=path, with_prompt_ids=True, vocab_size=50_000).requests
    assert all(np.asarray(r.prompt_ids).dtype == np.int32 for r in requests)
    a, b, c = (np.asarray(r.prompt_ids).tolist() for r in requests)
    assert [len(ids) for ids in (a, b, c)] == [1300, 1100, 600]
    assert a[:1024] == b[:1024]
    assert a[1024:1100] != b[1024:]
    assert c[:512] != a[:512]
    assert c[512:] == a[512:600]
    assert min(a) >= 0
    assert max(a) < 50_000
    assert len(set(a)) > 1000


@given(hash_id=st.integers(-(1 << 70), 1 << 70), vocab=st.integers(2, 1 << 20))
def test_block_ids_depend_on_the_hash_only(hash_id: int, vocab: int) -> None:
    ids = block_ids([hash_id], vocab).tolist()
    other = block_ids([hash_id + 1], vocab).tolist()
    assert block_ids([hash_id + 1, hash_id], vocab).tolist() == other + ids
    assert len(ids) == 512
    assert 0 <= min(ids) <= max(ids) < vocab
    assert ids != other


BURST_HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"


def test_burstgpt_counts_failures_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path / "b.csv",
        BURST_HEADER,
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1087,Conversation log",
        "118,GPT-4,417,276,693,API log",
        "120,GPT-4,0,0,0,API log",
    )
    with caplog.at_level(logging.WARNING):
        workload = build_workload("burstgpt", path=path)
    assert lengths(workload) == [(472, 18), (417, 276)]
    assert arrivals(workload) == [0.0, 113.0]
    assert "skipped 2 failed requests" in workload.source
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped 2 failed requests (0 response tokens)"
    ]


def test_burstgpt_of_failures_only(tmp_path: Path) -> None:
    path = write(tmp_path / "b.csv", BURST_HEADER, "45,ChatGPT,1087,0,1087,Conversation log")
    with pytest.raises(UserError, match="all 1 rows"):
        build_workload("burstgpt", path=path)


@pytest.mark.parametrize(
    ("name", "where"),
    [("azure", "AzurePublicDataset"), ("mooncake", "kvcache-ai/Mooncake"), ("burstgpt", "HPMLL/BurstGPT")],
)
def test_missing_trace_says_where_to_get_it(name: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"path=None.*{where}"):
        build_workload(name)
    with pytest.raises(UserError, match=f"gone.*is no file.*{where}"):
        build_workload(name, path=tmp_path / "gone")


AZURE_HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens"
GOOD_MOONCAKE = mooncake_line(0, 10, [0])


@pytest.mark.parametrize(
    ("name", "lines", "parts"),
    [
        (
            "azure",
            [AZURE_HEADER, "0.0,1,1", "1.0,abc,1"],
            ["num_prefill_tokens='abc'", "line 3", "whole number of tokens"],
        ),
        ("azure", [AZURE_HEADER, "0.0,1,0"], ["num_decode_tokens='0'", "line 2", "at least 1"]),
        ("azure", [AZURE_HEADER, "0.0,1.5,1"], ["num_prefill_tokens='1.5'", "line 2"]),
        ("azure", [AZURE_HEADER, "inf,1,1"], ["arrived_at='inf'", "line 2", "finite number"]),
        ("azure", [AZURE_HEADER, "0.0,1"], ["num_decode_tokens=None", "line 2", "found nothing"]),
        ("azure", [AZURE_HEADER, "0.0,1,1,9"], ["line 2", "expected 3 fields"]),
        ("azure", ["a,b,c", "0.0,1,1"], ["header='a,b,c'", "line 1", "TIMESTAMP,ContextTokens,GeneratedTokens"]),
        ("azure", [AZURE_HEADER], ["holds no request"]),
        (
            "azure",
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,1"],
            ["TIMESTAMP='yesterday'", "line 2", "2023-11-16"],
        ),
        ("mooncake", [GOOD_MOONCAKE, "{"], ["line 2", "is no JSON"]),
        ("mooncake", ["[1, 2]"], ["line 1", "expected a JSON object"]),
        ("mooncake", [mooncake_line(0, -4, [0])], ["input_length=-4", "line 1"]),
        ("mooncake", ['{"timestamp": true, "input_length": 1, "output_length": 1}'], ["timestamp=True", "line 1"]),
        ("mooncake", ['{"input_length": 1, "output_length": 1}'], ["timestamp=None", "found nothing"]),
        ("mooncake", [mooncake_line(0, 513, [0])], ["hash_ids='1 ids'", "2 whole numbers"]),
        ("mooncake", [mooncake_line(0, 5, ["x"])], ["hash_ids=['x']", "line 1"]),  # type: ignore[list-item]
        ("burstgpt", [BURST_HEADER, "5,m,x,18,490,l"], ["Request tokens='x'", "line 2"]),
        ("burstgpt", [BURST_HEADER, "5,m,1,-18,490,l"], ["Response tokens='-18'", "line 2", "at least 0"]),
    ],
)
def test_malformed_line_is_named(name: str, lines: list[str], parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "trace", *lines)
    options = {"with_prompt_ids": True} if name == "mooncake" else {}
    with pytest.raises(UserError) as caught:
        build_workload(name, path=path, **options)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_bytes_that_are_no_text_are_named_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(AZURE_HEADER.encode() + b"\n0.0,\xff\xfe,1\n")
    with pytest.raises(UserError, match=r"num_prefill_tokens=.*line 2"):
        build_workload("azure", path=path)


@pytest.mark.parametrize("name", ["azure", "burstgpt", "mooncake"])
def test_a_cut_trace_says_so(tmp_path, name: str) -> None:
    path = {"azure": azure_file, "burstgpt": burstgpt_file, "mooncake": mooncake_file}[name](tmp_path)
    assert build_workload(name, path=path).source == str(path)
    assert build_workload(name, path=path, max_requests=2).source == f"{path} (2 of 5 requests)"
    assert build_workload(name, path=path, start_s=2.5).source == f"{path} (2 of 5 requests from 2.5 s on)"


def azure_file(folder):
    header = "arrived_at,num_prefill_tokens,num_decode_tokens"
    return write(folder / "a.csv", "\n".join([header, *(f"{i},10,2" for i in range(5))]))


def burstgpt_file(folder):
    return write(
        folder / "b.csv", "\n".join(["Timestamp,Request tokens,Response tokens", *(f"{i},10,2" for i in range(5))])
    )


def mooncake_file(folder):
    return write(folder / "m.jsonl", "\n".join(mooncake_line(1000 * i, 10, [i]) for i in range(5)))
