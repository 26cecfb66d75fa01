# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a run
#
# A run directory holds everything that an experiment measured: `results.parquet` (one row per phase, strategy, workload
# and repetition), `events.jsonl` (what happened over time), the configuration and the environment. This notebook loads
# one, redraws its figures, and works one question through: **how many bytes does each strategy waste, and what does that
# cost?**
#
# Set `HYBRIDCACHE_RUN` to a run directory, or leave it and the newest run below `outputs/` is taken. To make one:
# `python run.py +experiment=shared_pool`.
#
# The terms (useful, padding, held, cached, reserved, free) are defined in `docs/metrics.md`.

# %%
# %matplotlib inline
import os
from pathlib import Path

import pandas as pd
from IPython.display import display

from hybridcache.observe.report import NoData, load_run
from hybridcache.observe.report.capacity_figures import residents_by_length, waste_by_length
from hybridcache.observe.report.memory_figures import memory_over_time, pool_over_time
from hybridcache.observe.report.speed_figures import throughput
from hybridcache.observe.report.units import bytes_text

# %%
here = Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), here)
newest = max(root.glob("outputs/**/results.parquet"), key=lambda file: file.stat().st_mtime, default=None)
run_dir = os.environ.get("HYBRIDCACHE_RUN") or (newest and newest.parent)
if not run_dir:
    raise SystemExit("no run found: set HYBRIDCACHE_RUN, or run python run.py +experiment=shared_pool first")

run = load_run(run_dir)
print(run.path, "|", ", ".join(run.phases), "|", run.environment.get("device"), "|", run.environment.get("commit"))

# %% [markdown]
# ## Results
#
# One row per phase, strategy, workload and repetition. Every strategy had the same budget and dtypes, and was offered the
# same requests; one that could never hold a request refused it.

# %%
columns = ["phase", "workload", "strategy", "requests_served", "requests_refused", "residents_peak", "utilization_mean"]
columns += ["preemptions", "output_tokens_per_s"]
shown = run.results[[name for name in columns if name in run.results.columns]]
display(shown.style.format(precision=3, thousands=",").hide(axis="index"))


# %% [markdown]
# ## Figures
#
# The functions of `capacity_figures`, `memory_figures` and `speed_figures` in `hybridcache.observe.report` return a Matplotlib
# figure and the data that it shows. They are the ones that the report is made of.


# %%
def draw(function, *args):
    """A figure of the run, or what it lacks for it."""
    try:
        figure, data = function(run, *args)
    except NoData as reason:
        print("left out:", reason)
        return None
    display(figure)
    return data


residents = draw(residents_by_length)
draw(waste_by_length)

# %%
serving = [(phase, workload) for phase in run.phases if phase != "capacity" for workload in run.workloads(phase)]
for phase in dict.fromkeys(phase for phase, _ in serving):
    draw(throughput, phase)
for phase, workload in serving:
    draw(memory_over_time, phase, workload)
    draw(pool_over_time, phase, workload)

# %% [markdown]
# ## A question: what does the waste cost?
#
# *Waste* here is what a live request holds beyond its useful bytes. A budget of $B$ bytes holds at most
# $B / \text{held}$ requests of one length, so each wasted byte costs residents. Two things are compared below: the
# residents that the held bytes alone would allow, and those that really fit. What lies between them is lost to memory that
# no such request can use: null blocks, remainders, the wrong side of a split pool.

# %%
if residents is None:
    print("this run has no capacity phase")
    cost = pd.DataFrame()
else:
    cost = run.by_length("charge").merge(
        residents[["strategy", "length", "residents", "budget_bytes"]], on=["strategy", "length"]
    )
    cost["waste_bytes"] = cost["held_bytes"] - cost["useful_bytes"]
    cost["allowed"] = cost["budget_bytes"] // cost["held_bytes"]
    exact = cost["budget_bytes"] // cost["useful_bytes"]
    cost["lost_to_waste"] = exact - cost["allowed"]
    cost["lost_to_unusable_memory"] = (cost["allowed"] - cost["residents"]).clip(lower=0)
    cost["share_of_exact"] = cost["residents"] / exact
    cost = cost[
        ["length", "strategy", "waste_bytes", "residents", "lost_to_waste", "lost_to_unusable_memory", "share_of_exact"]
    ].sort_values(["length", "share_of_exact"], ascending=[True, False])
display(cost)

# %% [markdown]
# The same over time: the mean bytes that were useful, wasted, unusable and idle while requests were served, and what came
# of it. A strategy that keeps bytes *free* while requests wait had them in the wrong place.

# %%
over_time = pd.DataFrame()
if serving:
    means = [f"{kind}_bytes_mean" for kind in ("useful", "held", "reserved", "cached", "free")] + [
        "output_tokens_per_s"
    ]
    means = [name for name in means if name in run.results.columns]
    over_time = run.results[run.results["phase"] != "capacity"].groupby(["phase", "workload", "strategy"], sort=False)
    over_time = over_time[means].mean()
    if {"useful_bytes_mean", "held_bytes_mean"} <= set(means):
        over_time.insert(1, "padding_bytes_mean", over_time["held_bytes_mean"] - over_time["useful_bytes_mean"])
formats = {name: bytes_text for name in over_time if "bytes" in name}
display(over_time.style.format(formats, precision=1, thousands=","))
