"""Step profiles: kernels sorted into classes, overlap counted once, gaps as idle time; and the figure of a run that has one."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from synthetic_run import write_run

import hybridcache
from benchmarks import page_tiled
from hybridcache.observe.report.load import NoData, load_run
from hybridcache.observe.report.speed_figures import PART_COLORS, step_profile
from hybridcache.observe.step_profile import IDLE, OTHER, OURS, StepProfile, classify, profile_steps, summarize

KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paged_decode_kernel", "attention"),
        ("gdn_decode_kernel", "gated delta net"),
        ("void cutlass::device_kernel<GemmUniversal<GroupProblemShape<...>>>", "experts"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "dense products"),
        ("void cub::DeviceRadixSortOnesweepKernel<...>", "routing"),
        ("Memcpy HtoD (Pinned -> Device)", "memory copies"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", OTHER),
    ],
)
def test_kernels_have_a_class(name: str, expected: str) -> None:
    assert classify(name) == expected


BY_FOLDER = {
    "paged_decode": {"attention"},
    "paged_prefill": {"attention"},
    "page_tiled": {"attention"},
    "gdn_decode": {"gated delta net"},
    "gdn_prefill": {"gated delta net"},
    "kv_store": {"KV store"},
    "qk_norm_rope_store": {"KV store"},
    "moe": {"experts", "routing"},
    "greedy": {"sampling"},
    "block_copy": {"memory copies"},
    "norms": {OTHER},
}


def test_every_kernel_of_the_project_has_the_class_of_its_operation() -> None:
    root = Path(hybridcache.__file__).parent / "kernels"
    found = {name: path.parent.name for path in root.rglob("*.py") for name in KERNEL.findall(path.read_text())}
    found |= dict.fromkeys(KERNEL.findall(Path(page_tiled.__file__).read_text()), "page_tiled")
    assert len(found) > 20
    assert set(OURS) <= set(found), "a class for a kernel that does not exist"
    for name, folder in found.items():
        assert classify(name) in BY_FOLDER[folder], name


def test_parts_and_gaps_add_up_to_the_step() -> None:
    steps, at = random.randint(1, 5), random.random()
    spans, busy = [], 0.0
    for _ in range(40):
        length, gap = random.uniform(1e-6, 1e-4), random.choice([0.0, random.uniform(0, 1e-5)])
        spans.append((at, at + length, random.choice(["nvjet_x", "gdn_prefill", "elementwise"])))
        busy, end = busy + length, at + length
        at += length + gap
    whole = end - spans[0][0]
    random.shuffle(spans)
    found = summarize(spans, steps)
    assert found.seconds * steps == pytest.approx(whole)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds)
    assert found.idle_fraction == pytest.approx((whole - busy) / whole, abs=1e-9)
    assert sum(part.launches for part in found.parts) * steps == pytest.approx(40)


def test_overlapping_kernels_count_once() -> None:
    found = summarize([(0.0, 4.0, "nvjet"), (1.0, 2.0, "gdn"), (3.0, 6.0, "gdn"), (8.0, 10.0, "nvjet")], 1)
    seconds = {part.name: part.seconds for part in found.parts}
    assert seconds == pytest.approx({"dense products": 6.0, "gated delta net": 2.0, IDLE["cuda"]: 2.0})
    assert found.idle_fraction == pytest.approx(0.2)


def test_profile_of_a_step_on_the_cpu(tmp_path, capfd) -> None:
    size = random.randint(200, 300)
    weight, x = torch.randn(size, size), torch.randn(size, size)
    trace = tmp_path / "trace.json"
    found = profile_steps(lambda: torch.mm(x, weight).sort(), 4, torch.device("cpu"), trace)
    assert isinstance(found, StepProfile)
    assert "profiler_st" not in capfd.readouterr().err, "Kineto's log stands among an experiment's tables"
    launches = {part.name: part.launches for part in found.parts}
    assert launches["dense products"] >= 1
    assert launches["routing"] >= 1
    assert 0.0 <= found.idle_fraction < 1.0
    assert json.loads(trace.read_text())["traceEvents"]


def test_every_class_has_a_colour() -> None:
    from hybridcache.observe.step_profile import CLASSES

    assert {name for name, _ in CLASSES} | {OTHER, *IDLE.values()} == set(PART_COLORS)


def test_figure_shows_what_was_profiled(tmp_path) -> None:
    write_run(tmp_path)
    with pytest.raises(NoData, match="was profiled"):
        step_profile(load_run(tmp_path), "inference")
    parts = {"experts": 0.004, "attention": 0.001, IDLE["cuda"]: 0.0005}
    with (tmp_path / "events.jsonl").open("a") as file:
        for part, seconds in parts.items():
            event = {
                "event": "step_profile",
                "phase": "inference",
                "strategy": "shared_pool",
                "workload": "decode: 4 rows",
            }
            file.write(json.dumps({**event, "repetition": 0, "part": part, "seconds": seconds, "launches": 2.0}) + "\n")
    figure, data = step_profile(load_run(tmp_path), "inference")
    assert dict(zip(data["part"], data["seconds"])) == parts
    assert "5.5 ms" in figure.get_suptitle()
    assert "experts (73%)" in " ".join(figure.get_suptitle().split())
