"""What an experiment about kernels leaves: figures, records, refusals."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import kernel_figures, measure
from benchmarks.case import OPERATIONS, QWEN3_NEXT_80B, Case, cuda_cases
from benchmarks.kernel_figures import fraction_of_ceiling, relative_errors
from benchmarks.measure import blank
from benchmarks.work import Setup, Work
from hybridcache.errors import UserError
from hybridcache.observe.report import style

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def measured_rows() -> pd.DataFrame:
    rows = []
    for i, case in enumerate(cuda_cases()):
        names = ["triton", *(["torch"] if case.with_torch else []), *(["unknown"] if i == 0 else [])]
        for name in names:
            times = {
                "l2": "cold",
                "fraction": 0.9 - 0.01 * (i % 7),
                "bound": "copy",
                "median_ms": 1.0,
                "rel_error": 1e-3,
            }
            rows.append({**blank(case, name), **times})
    rows.append({**blank(Case("gdn_decode", (1,), QWEN3_NEXT_80B), "triton"), "error": "failed"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("draw", [fraction_of_ceiling, relative_errors])
def test_figures_of_a_gpu_run(draw, tmp_path):
    with style.styled():
        figure, data = draw(measured_rows())
        figure.savefig(tmp_path / "figure.png", dpi=50)
    assert len(data) == len(measured_rows()) - 1, "the failed row has nothing to draw"
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == len(OPERATIONS)


def test_figure_of_times_marks_what_does_not_fit(tmp_path):
    common = {"operation": "paged_decode", "shape": "64x1024", "l2": "cold", "spread": 0.0}
    rows = [
        {**common, "strategy": "page_tiled", "kernel_block": 16, "median_ms": 2.0, "overflow": False},
        {**common, "strategy": "page_tiled", "kernel_block": 256, "median_ms": None, "l2": None, "overflow": True},
        {**common, "strategy": "independent", "kernel_block": 16, "median_ms": 1.0, "overflow": False},
        {**common, "strategy": "independent", "kernel_block": 256, "median_ms": 1.1, "overflow": False},
    ]
    with style.styled():
        figure, data = kernel_figures.time(pd.DataFrame(rows))
        figure.savefig(tmp_path / "figure.png", dpi=50)
    assert "1.10" in figure.get_suptitle()
    assert len(data) == 4
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[256]]


def config(**kernels) -> OmegaConf:
    found = OmegaConf.load(ROOT / "conf" / "experiment" / "kernels.yaml")
    return OmegaConf.merge(found, {"fast": True, "seed": 0, "kernels": {"device": "cpu", **kernels}})


def test_a_run_keeps_its_record_and_says_what_it_claims(tmp_path):
    from experiments import kernels

    results = kernels.run(config(), tmp_path)
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["claim"] == "functional, not a timing claim"
    assert record["device"] == "cpu"
    assert record["ceilings"] is None
    assert set(record["peers"]) == {"fla", "fa3"}
    assert len(record["rows"]) == len(results) == len(pd.read_parquet(tmp_path / "results.parquet"))
    assert {row["op"] for row in record["rows"]} >= {"gdn_decode", "gdn_prefill", "paged_decode", "paged_prefill"}
    page = (tmp_path / "report.html").read_text()
    assert "functional, not a timing claim" in page
    assert (tmp_path / "figures" / "kernels_error.csv").exists()


def test_a_failure_is_a_row_and_ends_the_run_badly(tmp_path, monkeypatch):
    from experiments import kernels

    def build(case: Case, setup: Setup) -> Work:
        raise RuntimeError("no memory")

    monkeypatch.setitem(measure.BUILDERS, "kv_store", build)
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ measurements failed, the first: kv_store 100 tokens all: .*no memory"
    ):
        kernels.run(config(), tmp_path)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["op"] for row in rows if row["error"]] == ["kv_store"]
    assert rows[-1]["op"] == "table_expansion", "operations after it were measured"
    assert "no memory" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("operations", "words"),
    [(["gdn_decod"], "kernels.operations='gdn_decod'.*gdn_decode"), (["gdn_conv"], "no form on a CPU")],
)
def test_wrong_operations_are_refused(operations, words, tmp_path):
    from experiments import kernels

    with pytest.raises(UserError, match=words):
        kernels.run(config(operations=operations), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"blocks": [12]}, "blocks=12: give multiples of 8"), ({"operations": ["paged"]}, "operations='paged'")],
)
def test_wrong_block_sizes_are_refused(changes, words, tmp_path):
    from experiments import kernel_block_size

    found = OmegaConf.load(ROOT / "conf" / "experiment" / "kernel_block_size.yaml")
    cfg = OmegaConf.merge(found, {"fast": False, "seed": 0, "kernel_block_size": {"device": "cpu", **changes}})
    with pytest.raises(UserError, match=words):
        kernel_block_size.run(cfg, tmp_path)


def test_kernels_compiled_side_by_side_need_what_they_need_alone(monkeypatch):
    pytest.importorskip("triton")
    from experiments import kernel_block_size

    settings = {"operations": ["paged_decode"], "blocks": [16, 1056], "compile_up_to": 16}
    found = []
    for cores in (2, 4):
        monkeypatch.setattr(kernel_block_size.os, "cpu_count", lambda cores=cores: cores)
        found.append(list(kernel_block_size._resources(settings)))
    assert found[0] == found[1]
    assert [row["compiled"] for row in found[0]] == [True, True, False, True]
    assert all(row["shared_bytes"] > 0 and "error" not in row for row in found[0])
