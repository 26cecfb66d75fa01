"""The report: complete for a complete run, honest about a partial one, and readable without a network."""

import dataclasses
import json
import re
import shutil
import string
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from limits import SUBPROCESS_S
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from synthetic_run import STRATEGIES, hybrid_spec, write_run

from hybridcache.errors import UserError
from hybridcache.observe.report import NoData, load_run, style, write_report
from hybridcache.observe.report.capacity_figures import residents_by_length, waste_by_length
from hybridcache.observe.report.comparison import contests
from hybridcache.observe.report.memory_figures import memory_over_time, pool_over_time, queue_over_time
from hybridcache.observe.report.report import _answers, _header, _title, serving_table, shortfall, token_agreement
from hybridcache.observe.report.speed_figures import latency, throughput
from hybridcache.observe.report.units import bytes_text, seconds_text
from hybridcache.strategies import build

BUDGET = 1 << 28
SMALL = {"budget_bytes": BUDGET, "requests": 24, "workloads": ("chat",)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of all phases with its report."""
    path = write_run(tmp_path_factory.mktemp("run") / "full", repetitions=2, **SMALL)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def run(run_dir):
    return load_run(run_dir)


EXPECTED = {"residents_by_length", "waste_by_length"} | {
    f"{kind}_{phase}{suffix}"
    for phase in ("simulation", "inference")
    for kind, suffix in (
        ("throughput", ""),
        ("memory", "_chat"),
        ("pool", "_chat"),
        ("queue", "_chat"),
        ("latency", "_chat"),
    )
}


def test_every_figure_has_its_data_beside_it(run_dir):
    written = {path.name for path in (run_dir / "figures").iterdir()}
    assert written == {f"{name}.{suffix}" for name in EXPECTED for suffix in ("png", "pdf", "csv")}
    for name in EXPECTED:
        assert (run_dir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (run_dir / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert len(pd.read_csv(run_dir / "figures" / f"{name}.csv")) > 0


def test_page_is_self_contained_and_holds_every_figure(run_dir):
    page = (run_dir / "report.html").read_text()
    targets = re.findall(r"""\b(?:src|href|srcset|action|poster)\s*=\s*["']?([^"'> ]{1,40})""", page)
    assert len(targets) > len(EXPECTED)
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in targets), set(targets)
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(" not in page
    for name in EXPECTED:
        assert f'<figure id="{name}">' in page
        assert f"figures/{name}.csv" in page
    for section in ("best", "results", "capacity", "simulation", "inference", "run", "terms", "data"):
        assert f'<section id="{section}">' in page
    assert "Left out" not in page


def test_waste_is_what_the_strategies_charge(run_dir):
    data = pd.read_csv(run_dir / "figures" / "waste_by_length.csv")
    spec = hybrid_spec()
    assert set(data["strategy"]) == set(STRATEGIES)
    for name, rows in data.groupby("strategy"):
        kind, options = STRATEGIES[name]
        for length in range(1, 1100, 7):  # the curve is linear between its corners
            strategy = build(kind, spec=spec, budget_bytes=BUDGET, **options)
            assert strategy.admit(0, length)
            expected = strategy.usage().held - spec.request_bytes(length)
            assert np.interp(length, rows["length"], rows["waste_bytes"]) == pytest.approx(expected), (name, length)


def test_memory_over_time_adds_up_to_the_budget(run_dir):
    data = pd.read_csv(run_dir / "figures" / "memory_inference_chat.csv")
    total = data[["useful_bytes", "padding_bytes", "cached_bytes", "reserved_bytes", "free_bytes"]].sum(axis=1)
    assert total.to_numpy() == pytest.approx(BUDGET)


def test_pool_map_data_reads_back_as_text(run_dir):
    data = pd.read_csv(run_dir / "figures" / "pool_simulation_chat.csv")
    for kind in ("state", "kv", "reserved"):
        assert set("".join(data[kind])) <= set(string.ascii_lowercase)
        assert data[kind].str.len().nunique() == 1
    assert "byte_exact" not in set(data["strategy"]), "a bound has no addresses"


def test_series_show_one_repetition_and_distributions_pool_all(run):
    _, series = queue_over_time(run, "simulation", "chat")
    assert not series.duplicated(["strategy", "step"]).any()
    _, latencies = latency(run, "simulation", "chat")
    assert set(latencies.query("metric == 'ttft_s'")["requests"]) == {48}


def _draw_all(run):
    yield waste_by_length(run)
    yield residents_by_length(run)
    for phase in ("simulation", "inference"):
        yield throughput(run, phase)
        for draw in (memory_over_time, pool_over_time, queue_over_time, latency):
            yield draw(run, phase, "chat")


def _texts(figure):
    """Every text that is drawn, with its box in pixels."""
    found = list(figure.texts) + [figure._suptitle] + [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [child for child in axes.get_children() if isinstance(child, Text)]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            found.append(axis.label)
            ticks = axis.get_major_ticks()
            found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    shown = {id(text): text for text in found if text.get_visible() and text.get_text().strip()}
    return [(text.get_text(), text.get_window_extent()) for text in shown.values()]


def test_no_text_overlaps_another_or_leaves_the_figure(run):
    for figure, _ in _draw_all(run):
        FigureCanvasAgg(figure).draw()
        texts = _texts(figure)
        width, height = figure.bbox.width, figure.bbox.height
        for i, (first, box) in enumerate(texts):
            assert box.x0 >= -1, first
            assert box.y0 >= -1, first
            assert box.x1 <= width + 1, first
            assert box.y1 <= height + 1, first
            for second, other in texts[i + 1 :]:
                across = min(box.x1, other.x1) - max(box.x0, other.x0)
                down = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert across < 1 or down < 1, (figure.get_suptitle(), first, second)


def test_a_strategy_keeps_its_colour_in_every_figure_and_selection(run):
    styles = style.strategy_styles(run.strategies)
    figure, _ = waste_by_length(run)
    for line in figure.axes[0].get_lines():
        name = line.get_label().removesuffix(" (bound)")
        assert to_hex(line.get_color()).upper() == styles[name][0].upper()
    assert (
        style.strategy_styles(["mine", "two_ended"])["two_ended"] == style.strategy_styles(["two_ended"])["two_ended"]
    )
    many = style.strategy_styles([*run.strategies, "mine", "yours", "theirs"])
    assert len({color for color, _ in many.values()}) == len(many)


def test_results_table_shades_the_best_competitors(run):
    def shaded(of):
        table = serving_table(of, "inference", "chat")
        column = table.headings.index("output tokens/s")
        return {row[0] for row in table.rows if hasattr(row[column], "best")}

    results = run.results.assign(device="NVIDIA H100")
    rates = {"shared_pool": (200.0, 204.0), "padded_page": (200.5, 203.0), "shared_pool_carve": (100.0, 104.0)}
    for name, values in rates.items():
        chosen = (results["phase"] == "inference") & (results["strategy"] == name)
        results.loc[chosen, "output_tokens_per_s"] = values
    results.loc[results["strategy"] == "byte_exact", "output_tokens_per_s"] = 999.0
    changed = dataclasses.replace(run, results=results)
    assert shaded(changed) == {"shared_pool", "padded_page"}, "202 and 201.75 differ less than their repetitions"
    row = next(row for row in serving_table(changed, "inference", "chat").rows if row[0] == "shared_pool")
    assert row[1] == "202 ± 2.83", "mean and standard deviation"
    changed = dataclasses.replace(run, results=results.assign(device="cpu"))
    assert shaded(changed) == set(), "wall-clock times of a CPU are not ranked"


def test_answers_agree_with_the_results(run):
    cards = {card.title: card for card in _answers(run).cards}
    card = cards["capacity: most residents of 1 token"]
    rows = run.rows("capacity").query("workload == 'length=1' and strategy != 'byte_exact'")
    most = rows["residents_peak"].max()
    assert card.value == str(most)
    assert card.strategies.split(", ") == rows[rows["residents_peak"] == most]["strategy"].tolist()


def _asked(run):
    section = _answers(run)
    return [title for title, _, _ in contests(run)], " ".join(section.notes)


def test_wall_clock_of_a_cpu_is_not_ranked(run, run_dir):
    titles, notes = _asked(run)
    assert "inference, chat: highest output tokens/s" not in titles
    assert "inference, chat: highest utilization" in titles
    assert titles[0] == "simulation, chat: highest output tokens/s", "what a reader asks first"
    assert "Times of inference are not ranked" in notes
    assert "Times of inference are not ranked" in (run_dir / "report.html").read_text()
    for draw in (throughput(run, "inference"), latency(run, "inference", "chat")):
        assert "not ranked" in draw[0].get_suptitle()
        assert " under " not in draw[0].get_suptitle()
    on_gpu = dataclasses.replace(run, results=run.results.assign(device="NVIDIA H100"))
    assert _asked(on_gpu)[0][0] == "inference, chat: highest output tokens/s", "measured before simulated"
    assert "not ranked" not in throughput(on_gpu, "inference")[0].get_suptitle()


def test_titles_and_panels_have_the_means_of_the_table(run):
    table = serving_table(run, "simulation", "chat")
    for heading, draw in (("utilization", memory_over_time), ("running, mean", queue_over_time)):
        column = table.headings.index(heading)
        texts = {row[0]: row[column].split(" ± ")[0] for row in table.rows}
        figure, _ = draw(run, "simulation", "chat")
        title = " ".join(figure.get_suptitle().split())
        found = re.findall(r"([\d.,]+%?) under", title) or re.findall(r"([\d.,]+%?) to ([\d.,]+%?)", title)[0]
        assert set(found) <= set(texts.values()), title
        if draw is memory_over_time:
            panels = {axes.get_title(loc="left"): axes.get_title(loc="right") for axes in figure.axes}
            assert panels == {name: f"useful {text}" for name, text in texts.items()}


def test_shortfall_names_the_best_and_its_reasons(run):
    assert shortfall(run, "inference", "chat") is None, "times of a CPU"
    results = run.results.assign(device="NVIDIA H100").reset_index(drop=True)
    chosen = results["phase"] == "inference"
    results.loc[chosen, "output_tokens_per_s"] = 160.0
    results.loc[chosen & (results["strategy"] == "padded_page"), "output_tokens_per_s"] = 180.0
    results.loc[chosen & (results["strategy"] == "padded_page"), "residents_peak"] = 9999
    results.loc[chosen & (results["strategy"] == "byte_exact"), "output_tokens_per_s"] = 200.0
    text = shortfall(dataclasses.replace(run, results=results), "inference", "chat")
    assert text.startswith(
        "padded_page serves 12.5% more tokens a second than shared_pool: residents, peak 9,999 against"
    )


def test_token_agreement_is_read_from_the_hashes(run):
    assert "same tokens" in token_agreement(run, "inference", "chat")
    assert token_agreement(run, "simulation", "chat") is None
    results = run.results.copy()
    results.loc[results["phase"] == "inference", "tokens_sha256"] = [
        f"{i:064x}" for i in range(len(run.rows("inference")))
    ]
    changed = dataclasses.replace(run, results=results)
    assert "did not all sample the same tokens" in token_agreement(changed, "inference", "chat")


@pytest.mark.parametrize("phases", [("capacity",), ("inference",)])
def test_a_run_of_one_phase_leaves_the_rest_out_and_says_so(tmp_path, phases):
    path = write_run(tmp_path / "part", phases=phases, **SMALL)
    page = write_report(path).read_text()
    written = {file.stem for file in (path / "figures").glob("*.png")}
    assert written == {
        name for name in EXPECTED if (phases[0] in name) or (phases == ("capacity",) and "length" in name)
    }
    for phase in {"capacity", "simulation", "inference"} - set(phases):
        assert f"figures of phase {phase}: this run has no such phase" in page
        assert f'<section id="{phase}">' not in page


def test_without_events_the_tables_remain_and_stale_figures_go(run_dir, tmp_path):
    path = shutil.copytree(run_dir, tmp_path / "copy")
    (path / "events.jsonl").unlink()
    (path / "environment.json").unlink()
    page = write_report(path).read_text()
    assert {file.name for file in (path / "figures").iterdir()} == {
        f"throughput_{phase}.{suffix}" for phase in ("simulation", "inference") for suffix in ("png", "pdf", "csv")
    }
    assert "events.jsonl: not in the run directory" in page
    assert "waste_by_length: no charge events" in page
    assert "memory_inference_chat: no sample events of inference, chat" in page


def test_one_strategy_and_one_request(tmp_path):
    path = write_run(
        tmp_path / "one", strategies={"shared_pool": ("shared_pool", {})}, lengths=(12,), **{**SMALL, "requests": 1}
    )
    page = write_report(path).read_text()
    assert "Left out" not in page
    assert "under shared_pool" in page


def test_names_are_escaped_and_become_safe_file_names(tmp_path):
    path = write_run(tmp_path / "odd", phases=("simulation",), **SMALL)
    odd = '../<b>&"x'
    for name in ("events.jsonl",):
        lines = [json.loads(line) for line in (path / name).read_text().splitlines()]
        (path / name).write_text("".join(json.dumps({**line, "workload": odd}) + "\n" for line in lines))
    results = pd.read_parquet(path / "results.parquet")
    results.assign(workload=odd).to_parquet(path / "results.parquet")
    page = write_report(path).read_text()
    assert "<b>" not in page
    assert (path / "figures" / "memory_simulation_b_x.png").is_file()
    assert not list(tmp_path.glob("*.png"))


def _break(path, what):
    if what == "no results":
        (path / "results.parquet").unlink()
    elif what == "not parquet":
        (path / "results.parquet").write_text("hello")
    elif what == "no strategy":
        pd.read_parquet(path / "results.parquet").drop(columns="strategy").to_parquet(path / "results.parquet")
    elif what == "no rows":
        pd.read_parquet(path / "results.parquet").head(0).to_parquet(path / "results.parquet")
    elif what == "config":
        (path / "config.yaml").write_text("a: [1")
    elif what == "environment":
        (path / "environment.json").write_text("[1]")
    elif what == "events":
        with (path / "events.jsonl").open("a") as file:
            file.write('{"event": "sam')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no results", "has no results.parquet"),
        ("not parquet", "results.parquet: not a parquet table"),
        ("no strategy", "lacks strategy"),
        ("no rows", "holds no row"),
        ("config", "config.yaml: does not parse"),
        ("environment", "environment.json: expected a mapping"),
        ("events", "events.jsonl, line "),
    ],
)
def test_a_broken_run_is_named(run_dir, tmp_path, what, message):
    path = shutil.copytree(run_dir, tmp_path / "broken")
    _break(path, what)
    with pytest.raises(UserError, match=re.escape(message)):
        load_run(path)


def test_command_line_writes_the_page_or_one_line_of_error(run_dir, tmp_path):
    command = [sys.executable, "-m", "hybridcache.observe.report"]
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=SUBPROCESS_S)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run_dir=")
    assert done.stderr.count("\n") == 1
    path = write_run(tmp_path / "cli", phases=("capacity",), **SMALL)
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True, timeout=SUBPROCESS_S)
    assert done.stdout.strip() == str(path / "report.html")
    assert (path / "report.html").is_file()


def test_the_header_says_experiment_model_workload_and_budget(run_dir):
    page = (run_dir / "report.html").read_text()
    assert "<h1>Experiment synthetic: qwen3_next · chat · 256 MiB</h1>" in page
    head = re.sub(r"<[^>]+>", " ", page[page.index("<h1>") : page.index("<nav>")])
    assert re.search(r"inference\s+qwen3_next\s+chat\s+256 MiB\s+cpu · none", head)
    assert "2026-01-01 00:00:00 UTC" in head


@pytest.mark.parametrize(("ranks", "text"), [(1, "256 MiB"), (4, "256 MiB on each of 4 ranks"), (None, "256 MiB")])
def test_a_budget_of_several_ranks_says_so_in_the_header_and_in_the_figure(run, ranks, text):
    results = run.results.drop(columns="tp_size", errors="ignore")
    changed = dataclasses.replace(run, results=results if ranks is None else results.assign(tp_size=ranks))
    assert [row[3] for row in _header(changed)] == ["budget", *[text] * 3]
    assert _title(changed).endswith(f" · {text}")
    figure, _ = residents_by_length(changed)
    assert f" in {text} " in " ".join(figure.get_suptitle().split())


def test_repetitions_have_error_bars_of_one_standard_deviation(run):
    figure, data = throughput(run, "simulation")
    assert data["repetition"].nunique() == 2
    spread = data.groupby("strategy")["output_tokens_per_s"].std()
    means = data.groupby("strategy")["output_tokens_per_s"].mean()
    drawn = [segment for found in figure.axes[0].collections for segment in found.get_segments()]
    ends = sorted((round(float(a[0]), 6), round(float(b[0]), 6)) for a, b in drawn if a[1] == b[1])
    expected = sorted(
        (round(means[name] - spread[name], 6), round(means[name] + spread[name], 6)) for name in means.index
    )
    assert np.array(ends) == pytest.approx(np.array(expected))


def test_one_repetition_has_none(tmp_path):
    single = load_run(write_run(tmp_path / "single", phases=("simulation",), **SMALL))
    assert not throughput(single, "simulation")[0].axes[0].collections


def test_cached_bytes_have_a_colour_in_maps_and_memory(run):
    samples, maps = run.events["sample"].copy(), run.events["pool_map"].copy()
    samples["cached_bytes"], samples["free_bytes"] = samples["free_bytes"] / 2, samples["free_bytes"] / 2
    maps["cached"], maps["state"], maps["kv"] = "z" * 160, "a" * 160, "a" * 160
    changed = dataclasses.replace(run, events={**run.events, "sample": samples, "pool_map": maps})
    for draw in (memory_over_time, pool_over_time):
        figure, data = draw(changed, "simulation", "chat")
        assert "cached" in [text.get_text() for text in figure.legends[0].get_texts()]
        assert "cached" in " ".join(data.columns)
    mesh = figure.axes[0].collections[0].get_array()
    assert np.allclose(mesh, style.rgb(style.KIND_COLORS["cached"]))


def test_mixed_slices_are_drawn_as_mixtures(run):
    maps = run.events["pool_map"].copy()
    maps["state"], maps["kv"] = "k" * 160, "p" * 160  # 10 and 15 of 25: no room for anything else
    figure, _ = pool_over_time(dataclasses.replace(run, events={**run.events, "pool_map": maps}), "simulation", "chat")
    mixture = 0.4 * style.rgb(style.KIND_COLORS["state"]) + 0.6 * style.rgb(style.KIND_COLORS["kv"])
    assert np.allclose(figure.axes[0].collections[0].get_array(), mixture)
    assert "in turn: 0% (" in figure.get_suptitle(), "40 % and 60 % need not be the same addresses"
    maps["kv"] = "z" * 160
    figure, _ = pool_over_time(dataclasses.replace(run, events={**run.events, "pool_map": maps}), "simulation", "chat")
    assert "in turn: 40% (" in figure.get_suptitle()


def test_queues_show_their_peaks(run):
    samples = run.events["sample"].copy()
    samples["running_max"], samples["waiting_max"] = 777.0, 888.0
    figure, _ = queue_over_time(
        dataclasses.replace(run, events={**run.events, "sample": samples}), "simulation", "chat"
    )
    for axes, peak in zip(figure.axes, (777, 888)):
        assert all((line.get_ydata() == peak).all() for line in axes.get_lines())


def test_events_of_an_older_version_are_left_out_by_name(run):
    maps = run.events["pool_map"].drop(columns=["state"])
    with pytest.raises(NoData, match="pool_map events of simulation, chat lack state"):
        pool_over_time(dataclasses.replace(run, events={**run.events, "pool_map": maps}), "simulation", "chat")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"), (3.5e-5, "35 µs"), (9.9999e-4, "1 ms"), (0.0123, "12.3 ms"), (0.99999, "1 s"), (12.34, "12.3 s"),
        (119.4, "119 s"), (119.6, "2 min 0 s"), (3502.7, "58 min 23 s"), (7199.6, "2 h 0 min"), (7530.0, "2 h 6 min"),
    ],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20, "1 MiB"),
        (10**9, "953.7 MiB"),
        (5 * 2**30, "5 GiB"),
        (-(2**31), "-2 GiB"),
    ],
)
def test_bytes_are_said_in_binary_units(value, text):
    assert bytes_text(value) == text
