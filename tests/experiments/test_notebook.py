"""The notebook runs from top to bottom on a run directory, and is kept without outputs."""

import re
from pathlib import Path

import pytest
from limits import SUBPROCESS_S
from synthetic_run import write_run

nbformat = pytest.importorskip("nbformat", reason="the notebook's test needs the dev extra: pip install -e '.[dev]'")
NotebookClient = pytest.importorskip("nbclient", reason="the notebook's test needs the dev extra").NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "notebooks"
NOTEBOOK = FOLDER / "reading_a_run.ipynb"


def execute(run_dir, monkeypatch):
    """Outputs of every code cell, in order."""
    monkeypatch.setenv("HYBRIDCACHE_RUN", str(run_dir))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=int(SUBPROCESS_S), resources={"metadata": {"path": str(FOLDER)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_it_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("phases", [("capacity", "simulation", "inference"), ("capacity",)])
def test_notebook_runs(tmp_path, monkeypatch, phases):
    run_dir = write_run(
        tmp_path / "run", phases=phases, budget_bytes=1 << 28, requests=8, workloads=("chat",), lengths=(12, 2000)
    )
    outputs = execute(run_dir, monkeypatch)
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    serving = len(phases) - 1
    assert len(images) == 2 + 3 * serving
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)
    assert "left out" not in text
    assert "lost_to_waste" in text
    assert re.search(r"shared_pool_carve", text)
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
