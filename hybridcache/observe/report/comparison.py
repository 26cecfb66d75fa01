"""Comparison: the metrics of a run, which strategies may be compared in them, and who did best beyond the noise.

Only runs that served the same requests are ranked. Of two values, one is better only where the difference exceeds the noise:
the 95 % interval of the paired differences over repetitions, or 1 % where there is one repetition.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hybridcache.observe.report.load import Run
from hybridcache.observe.report.units import bytes_text, join_names, number_text, percent_text, plural, seconds_text

BOUND = "byte_exact"
"""The strategy that is a bound, not a competitor; it is never named the best."""
FORESEEN = "farthest"
"""The policy that is one: it knows the future."""
CLOSE = 0.01
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t, two-sided 95 %, for 1 to 10 degrees of freedom; the last serves for more."""


def is_bound(name: str) -> bool:
    """Whether a strategy, or one under a policy, is a bound."""
    return name.partition(" (")[0] == BOUND or name.endswith(f"({FORESEEN})")


def label(name: str) -> str:
    if not is_bound(name):
        return name
    return f"{name[:-1]}, bound)" if name.endswith(")") else f"{name} (bound)"


def competitors(names: Sequence[str]) -> list[str]:
    """``names`` without the bound, unless nothing else is there."""
    return [name for name in names if not is_bound(name)] or list(names)


@dataclass(frozen=True)
class Metric:
    """A column of results."""

    column: str
    heading: str
    text: Callable[[float], str]
    better: int
    """+1 where more is better, -1 where less is, 0 where neither."""
    clock: bool = False
    """Whether it is a time, or depends on one."""
    always: bool = True
    """Whether a column of zeros is shown."""


METRICS = (
    Metric("output_tokens_per_s", "output tokens/s", number_text, +1, clock=True),
    Metric("requests_refused", "refused", number_text, 0),
    Metric("residents_peak", "residents, peak", number_text, +1),
    Metric("running_mean", "running, mean", number_text, 0),
    Metric("utilization_mean", "utilization", percent_text, +1),
    Metric("cached_bytes_mean", "cached", bytes_text, 0, always=False),
    Metric("preemptions", "preemptions", number_text, -1),
    Metric("recomputed_tokens_preemption", "recomputed tokens", number_text, -1),
    Metric("recomputed_tokens_failure", "recomputed after failures", number_text, -1, always=False),
    Metric("hit_tokens", "hit tokens", number_text, 0, always=False),
    Metric("ttft_p50_s", "TTFT p50", seconds_text, -1, clock=True),
    Metric("ttft_p99_s", "TTFT p99", seconds_text, -1, clock=True),
    Metric("tpot_p50_s", "TPOT p50", seconds_text, -1, clock=True),
    Metric("tpot_p99_s", "TPOT p99", seconds_text, -1, clock=True),
)
BY_COLUMN = {metric.column: metric for metric in METRICS}
HIGHLIGHTS = ("output_tokens_per_s", "residents_peak", "utilization_mean", "ttft_p50_s", "tpot_p50_s")
"""What a reader asks first, in order; the residents are those of the capacity phase."""


def clock_means_nothing(run: Run, phase: str) -> bool:
    """Whether a phase's times are wall-clock of a CPU, which rank nothing: the host decides, not the strategy."""
    rows = run.rows(phase)
    return phase == "inference" and "device" in rows.columns and set(rows["device"].dropna()) == {"cpu"}


# -- who did best ------------------------------------------------------------------------------------------------------


def half_interval(differences: pd.Series) -> float:
    """Half the 95 % interval of the mean of paired differences (at least two)."""
    count = len(differences)
    return T_95[min(count - 1, len(T_95)) - 1] * float(differences.std()) / float(np.sqrt(count))


@dataclass(frozen=True)
class Verdict:
    """Who did best in one metric."""

    means: pd.Series
    """By strategy, competitors only."""
    best: list[str]
    """Strategies whose mean reads as the best; ``alike`` cannot be told from it, ``worst`` reads as the worst."""
    alike: list[str]
    worst: list[str]
    half_interval: float | None
    """Of the best's lead, as a share of the worst; None for one repetition."""
    noise: str
    """What differences are held against, in words."""
    text: Callable[[float], str]

    @property
    def decided(self) -> bool:
        """Whether some strategy did worse than the best, beyond the noise."""
        return not set(self.worst) <= {*self.best, *self.alike}

    def words(self) -> str:
        """For a title: ``3 under a (b within 1 %), 9 under c and d``."""
        first, last = self.text(self.means[self.best[0]]), self.text(self.means[self.worst[0]])
        if len(self.means) == 1:
            return f"{first} under {self.best[0]}"
        if first == last:
            return f"{first} under every strategy"
        if not self.decided:
            return f"{first} to {last}, no difference beyond {self.noise}"
        close = f" ({join_names(self.alike)} within {self.noise})" if self.alike else ""
        return f"{first} under {join_names(self.best)}{close}, {last} under {join_names(self.worst)}"


def judge(values: pd.DataFrame, text: Callable[[float], str], better: int, exact: bool = False) -> Verdict | None:
    """Who did best in ``values``, a column per strategy and a row per repetition; None where nobody has a value.

    The bound takes no part. Values that read alike are alike, and so are those within the noise unless they are ``exact``.
    """
    values = values[competitors(list(values.columns))].dropna(axis=1, how="all")
    if values.empty:
        return None
    means = values.mean()
    shown = means.map(text)
    first, last = (means.idxmax(), means.idxmin()) if better > 0 else (means.idxmin(), means.idxmax())
    best = list(shown.index[shown == shown[first]])
    alike = [name for name in values if name not in best and not exact and _alike(values[first], values[name])]
    differences = (values[first] - values[last]).dropna()
    several = len(differences) > 1 and means[last] != 0
    return Verdict(
        means=means, best=best, alike=alike, worst=list(shown.index[shown == shown[last]]),
        half_interval=half_interval(differences) / abs(means[last]) if several else None,
        noise=f"the spread of {len(values)} repetitions" if len(values) > 1 else "1 %", text=text,
    )  # fmt: skip


def _alike(best: pd.Series, other: pd.Series) -> bool:
    differences = (best - other).dropna()
    if len(differences) < 2:
        return bool(abs(best.mean() - other.mean()) <= CLOSE * abs(best.mean()))
    return bool(abs(differences.mean()) <= half_interval(differences))


# -- which may be compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What of one workload may be compared."""

    rows: pd.DataFrame
    """One per strategy and repetition, of those that are ranked: their results, or what they did for common requests."""
    common: bool = False
    """Whether ``rows`` are about the requests that all of them served, and no others."""
    note: str | None = None
    """What was refused, and who is ranked therefore; None where nothing was refused."""
    exact: bool = False
    """Whether values are counts without noise."""

    def judge(self, metric: Metric) -> Verdict | None:
        """Who did best; None where ``metric`` cannot be compared or ranks nothing."""
        if not metric.better or metric.column not in self.rows.columns or self.rows.empty:
            return None
        values = self.rows.pivot_table(index="repetition", columns="strategy", values=metric.column, sort=False)
        return judge(values, metric.text, metric.better, self.exact)


def compare(run: Run, phase: str, workload: str) -> Comparison:
    """Only strategies that served the same requests: all; else the two or more that served most; else what all served."""
    rows = run.rows(phase, workload)
    rivals = competitors(list(dict.fromkeys(rows["strategy"])))
    rows = rows[rows["strategy"].isin(rivals)]
    if phase == "capacity" or "requests_refused" not in rows.columns:
        return Comparison(rows, exact=phase == "capacity")
    requests = _served(run, phase, workload)
    keys = ["repetition", "requests_served", "prompt_tokens"]  # where there are no events, number and tokens tell
    by_name = {str(name): frozenset(found[keys].itertuples(index=False)) for name, found in rows.groupby("strategy")}
    served = {name: requests.get(name) or by_name[name] for name in rivals}
    offered = rows["requests_offered"].max()
    if len(set(served.values())) == 1:
        refused = rows["requests_refused"].max()
        note = f"Every strategy refused the same {refused:,.0f} of {plural(offered, 'request')}." if refused else None
        return Comparison(rows, note=note)
    means = rows.groupby("strategy")[["requests_served", "requests_refused", "prompt_tokens"]].mean().loc[rivals]
    counts, fewer = means["requests_served"], means["prompt_tokens"].max() - means["prompt_tokens"]
    refused = means["requests_refused"].map(lambda count: f"refused {count:,.0f}" if count else "did not finish all")
    refusals = "; ".join(
        f"{name} {refused[name]} of {plural(offered, 'request')} and computed {fewer[name]:,.0f} prompt tokens fewer"
        for name in counts.index[counts < offered]
    )
    leader = max(rivals, key=lambda name: (counts[name], list(served.values()).count(served[name])))
    most = [name for name in rivals if served[name] == served[leader]]
    if len(most) > 1:
        note = f"Not all strategies served the same requests: {refusals}. Ranked are {join_names(most)}, which served the same."
        return Comparison(rows[rows["strategy"].isin(most)], note=note)
    common = frozenset.intersection(*requests.values()) if len(requests) == len(rivals) else frozenset()
    note = f"No two strategies served the same requests: {refusals}. "
    if not common:
        return Comparison(rows.iloc[:0], note=note + "Nothing is ranked.")
    share = plural(len(common) / rows["repetition"].nunique(), "request")
    note += f"Ranked are times over the {share} that all served; the rest is not ranked."
    return Comparison(_of_common(run.select("request", phase, workload), rivals, common), common=True, note=note)


def _served(run: Run, phase: str, workload: str) -> dict[str, frozenset[tuple[int, int]]]:
    """Repetition and number of the requests that each competitor served, as its events say; nothing where there are none."""
    events = run.select("request", phase, workload)
    if events.empty:
        return {}
    events = events[~events["finish_reason"].isin(["abort", "error"])]
    groups = events[events["strategy"].isin(competitors(run.strategies))].groupby("strategy", sort=False)
    return {str(name): frozenset(zip(rows["repetition"], rows["seq_id"])) for name, rows in groups}


def _of_common(events: pd.DataFrame, names: list[str], common: frozenset[tuple[int, int]]) -> pd.DataFrame:
    chosen = np.array([key in common for key in zip(events["repetition"], events["seq_id"])])
    events = events[chosen & events["strategy"].isin(names)]
    rows = []
    for (strategy, repetition), group in events.groupby(["strategy", "repetition"], sort=False):
        seconds = (group["arrival_s"] + group["latency_s"]).max() - group["arrival_s"].min()
        row = {"strategy": strategy, "repetition": repetition}
        row["output_tokens_per_s"] = group["output_tokens"].sum() / seconds
        for name in ("ttft", "tpot"):
            values = pd.to_numeric(group[f"{name}_s"])
            row |= {f"{name}_p{q}_s": values.quantile(q / 100) for q in (50, 99)}
        rows.append(row)
    return pd.DataFrame(rows)


def contests(run: Run) -> Iterator[tuple[str, Verdict, Comparison]]:
    """Every comparison that the first part of a report shows, in the order in which a reader asks: its title, who did best,
    and what was compared. Of the capacity phase these are the shortest and the longest request."""
    order = {"inference": 0, "simulation": 1, "capacity": 2}
    phases = sorted(run.phases, key=lambda phase: (clock_means_nothing(run, phase), order.get(phase, 3)))
    for column in HIGHLIGHTS:
        metric = BY_COLUMN[column]
        for phase in phases:
            unranked = metric.clock and clock_means_nothing(run, phase)
            if unranked or (column == "residents_peak") != (phase == "capacity"):
                continue
            workloads = run.workloads(phase)
            for workload in dict.fromkeys((workloads[0], workloads[-1])) if phase == "capacity" else workloads:
                comparison = compare(run, phase, workload)
                title = f"{phase}, {workload}: {'highest' if metric.better > 0 else 'lowest'} {metric.heading}"
                if phase == "capacity":
                    title = f"capacity: most residents of {length_text(workload)}"
                if (verdict := comparison.judge(metric)) is not None:
                    yield title, verdict, comparison


def length_text(workload: str) -> str:
    """``length=2000`` in words."""
    text = workload.removeprefix("length=")
    return plural(int(text), "token") if text.isdigit() else workload
