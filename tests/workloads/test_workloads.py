"""Workloads: the registry, seeded streams, cutting to size, text prompts."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from limits import SUBPROCESS_S
from test_traces import arrivals, lengths, mooncake_line, write

from hybridcache.errors import UserError
from hybridcache.workloads import WORKLOADS, Request, Workload, build_workload, cut_to_size, with_text_prompts
from hybridcache.workloads.byte_tokenizer import ByteTokenizer
from hybridcache.workloads.resize import license_text

CONF = Path(__file__).resolve().parents[2] / "conf" / "workload"


# -- registry ------------------------------------------------------------------------------------------------------------


def custom_workload(count: int) -> Workload:
    return Workload("custom", "test", tuple(Request(i, 0.0, 1, 1) for i in range(count)))


def not_a_workload() -> int:
    return 3


def test_a_function_of_the_users_own_goes_in_by_dotted_path() -> None:
    assert len(build_workload(f"{__name__}.custom_workload", count=3).requests) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonesuch", {}, "synthetic_chat, fixed_lengths, azure, mooncake, burstgpt"),
        ("no.such.module", {}, "cannot be imported"),
        (f"{__name__}.CONF", {}, "is not callable"),
        (f"{__name__}.not_a_workload", {}, "returned a int"),
        ("synthetic_chat", {"num_request": 3}, "num_request=3.*no such option.*num_requests"),
    ],
)
def test_registry_names_what_is_wrong(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_workload(name, **options)


@pytest.mark.parametrize("name", WORKLOADS)
def test_config_file_lists_every_option_with_its_default(name: str) -> None:
    from inspect import signature

    from hybridcache.workloads import workload_builder

    options = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert options.pop("name") == name
    if "seed" in options:
        assert options["seed"] == "${seed}", "the run's one seed"
        options["seed"] = 0
    assert options == {key: p.default for key, p in signature(workload_builder(name)).parameters.items()}


# -- synthetic -----------------------------------------------------------------------------------------------------------


def test_synthetic_is_a_function_of_its_seed() -> None:
    seed = random.randrange(1 << 30)
    one = build_workload("synthetic_chat", seed=seed, rate_per_s=3.0)
    assert one == build_workload("synthetic_chat", seed=seed, rate_per_s=3.0)
    assert lengths(one) != lengths(build_workload("synthetic_chat", seed=seed + 1))
    faster = build_workload("synthetic_chat", seed=seed, rate_per_s=30.0)
    assert lengths(faster) == lengths(one)
    assert arrivals(faster)[1:] == pytest.approx([at / 10 for at in arrivals(one)[1:]])


def test_synthetic_lengths_have_the_asked_median_and_spread() -> None:
    workload = build_workload(
        "synthetic_chat", num_requests=4001, prompt_median=500, prompt_sigma=0.8, max_prompt=10**6
    )
    ordered = sorted(request.prompt_tokens for request in workload.requests)
    # Standard error of the median of 4,001 lognormal draws is about 1.6 %; quartiles lie at exp(+-0.6745 sigma).
    assert ordered[2000] == pytest.approx(500, rel=0.08)
    assert ordered[3000] / ordered[1000] == pytest.approx(2.942, rel=0.12)


def test_synthetic_arrivals() -> None:
    assert set(arrivals(build_workload("synthetic_chat", rate_per_s=None))) == {0.0}
    assert set(arrivals(build_workload("synthetic_chat", rate_per_s=0))) == {0.0}
    times = arrivals(build_workload("synthetic_chat", num_requests=4001, rate_per_s=5.0))
    assert times == sorted(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(800, rel=0.08)


@given(sigma=st.floats(0, 1000), median=st.floats(0.01, 1e9), longest=st.integers(1, 10**6))
def test_synthetic_lengths_stay_in_range(sigma: float, median: float, longest: int) -> None:
    options = {
        "prompt_sigma": sigma,
        "prompt_median": median,
        "max_prompt": longest,
        "output_sigma": 0,
        "output_median": 7,
    }
    for prompt, output in lengths(build_workload("synthetic_chat", num_requests=5, **options)):
        assert 1 <= prompt <= longest
        assert output == 7


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_requests", 0),
        ("num_requests", 2.5),
        ("rate_per_s", -1),
        ("prompt_median", 0),
        ("output_sigma", float("nan")),
        ("max_output", 0),
        ("seed", -1),
    ],
)
def test_synthetic_refuses(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{option}="):
        build_workload("synthetic_chat", **{option: value})


# -- cutting to size, prompts ----------------------------------------------------------------------------------------------

REQUESTS = st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 20_000)), min_size=1, max_size=20)


@given(pairs=REQUESTS, max_prompt=st.integers(1, 4000), max_output=st.integers(1, 4000), keep_ratio=st.booleans())
def test_cut_to_size_scales_by_one_factor(
    pairs: list[tuple[int, int]], max_prompt: int, max_output: int, keep_ratio: bool
) -> None:
    workload = Workload("w", "s", tuple(Request(i, float(i), p, o) for i, (p, o) in enumerate(pairs)))
    cut = cut_to_size(workload, max_prompt=max_prompt, max_output=max_output, keep_ratio=keep_ratio)
    longest = (max(p for p, _ in pairs), max(o for _, o in pairs))
    fits = (longest[0] <= max_prompt, longest[1] <= max_output)
    new_longest = (max(p for p, _ in lengths(cut)), max(o for _, o in lengths(cut)))
    assert new_longest[0] <= max_prompt
    assert new_longest[1] <= max_output
    if all(fits):
        assert lengths(cut) == pairs
    elif keep_ratio:
        assert new_longest[0] == max_prompt or new_longest[1] == max_output
    else:
        assert new_longest == (min(longest[0], max_prompt), min(longest[1], max_output))
    assert set(arrivals(cut)) == {0.0}
    # Exact: the scaled length is the floor of length x factor, at least 1.
    ratio = min(max_prompt / longest[0], max_output / longest[1] if keep_ratio else 1.0, 1.0)
    for (before, _), (after, _) in zip(pairs, lengths(cut)):
        assert after == 1 or abs(after - before * ratio) < 1 + 1e-6


def test_cut_to_size_takes_the_head_and_scales_time() -> None:
    workload = Workload("w", "s", (Request(0, 0.0, 100, 10), Request(1, 4.0, 50, 30), Request(2, 9.0, 9000, 10)))
    cut = cut_to_size(workload, max_prompt=50, max_output=100, num_requests=2, arrivals="scaled")
    assert lengths(cut) == [(50, 5), (25, 15)]
    assert arrivals(cut) == [0.0, 2.0]
    assert "first 2 of " in cut.source
    with pytest.raises(UserError, match="arrivals='soon'"):
        cut_to_size(workload, max_prompt=1, max_output=1, arrivals="soon")
    with pytest.raises(UserError, match="max_prompt=0"):
        cut_to_size(workload, max_prompt=0, max_output=1)


def test_cut_to_size_keeps_the_fraction_that_prompts_share(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", mooncake_line(0, 4096, [*range(8)]), mooncake_line(0, 2048, [0, 1, 20, 21]))
    workload = build_workload("mooncake", path=path, with_prompt_ids=True)
    a, b = (request.prompt_ids for request in cut_to_size(workload, max_prompt=512, max_output=8).requests)
    assert a is not None
    assert b is not None
    assert (len(a), len(b)) == (512, 256)
    assert a[:128] == b[:128]
    assert a[128:256] != b[128:]


def test_text_prompts_are_slices_of_the_license() -> None:
    seed = random.randrange(1 << 30)
    tokenizer = ByteTokenizer(1000)
    long = len(license_text()) + 777
    workload = Workload("w", "s", tuple(Request(i, 0.0, n, 1) for i, n in enumerate((1, 200, long))))
    filled = with_text_prompts(workload, tokenizer, seed=seed)
    assert filled == with_text_prompts(workload, tokenizer, seed=seed)
    assert filled != with_text_prompts(workload, tokenizer, seed=seed + 1), seed
    for before, request in zip(workload.requests, filled.requests):
        assert request.prompt_ids is not None
        assert len(request.prompt_ids) == before.prompt_tokens
        assert tokenizer.decode(request.prompt_ids) in license_text() * 3


def test_ids_of_a_trace_are_folded_into_the_vocabulary() -> None:
    workload = Workload("w", "s", (Request(0, 0.0, 3, 1, (5, 300, 1000)),))
    tokenizer = ByteTokenizer(1000)
    n = tokenizer.vocab_size
    assert with_text_prompts(workload, tokenizer).requests[0].prompt_ids == (5, 300 % n, 1000 % n)


def test_license_is_the_whole_text() -> None:
    text = license_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def test_neither_workloads_nor_simulation_need_torch() -> None:
    code = (
        "import sys, hybridcache.sim.simulator, hybridcache.sim.capacity, hybridcache.strategies.shared_pool\n"
        "from hybridcache.workloads import build_workload, workload_builder, WORKLOADS\n"
        "[workload_builder(name) for name in WORKLOADS]; build_workload('synthetic_chat')\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=SUBPROCESS_S).returncode == 0


def test_synthetic_prompts_outputs_and_gaps_are_drawn_apart() -> None:
    """Poisson arrivals: a gap's deviation is its mean. Lengths of a prompt and its output are not correlated."""
    workload = build_workload("synthetic_chat", num_requests=4001, rate_per_s=5.0, seed=random.randrange(1 << 30))
    prompts, outputs = np.log(np.array(lengths(workload), dtype=float)).T
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.08, workload.source
    gaps = np.diff(arrivals(workload))
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.12), workload.source


def test_text_prompts_of_two_requests_differ() -> None:
    workload = Workload("w", "s", tuple(Request(i, 0.0, 200, 1) for i in range(20)))
    filled = with_text_prompts(workload, ByteTokenizer(1000), seed=3)
    assert len({request.prompt_ids for request in filled.requests}) > 15
