"""Prefix reuse: both experiments in their fast forms, policy sets, and the future that the bound knows."""

import json

import numpy as np
import pandas as pd
import pytest
from command_line import error_line, run
from omegaconf import OmegaConf

from experiments.checkpoint_policies import band, claims_table, league_table
from experiments.lib.future_uses import FutureUses
from experiments.lib.policy_sets import configured_policy, policy_sets
from experiments.lib.strategy_choices import CONF, StrategyChoice
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.index import Node
from hybridcache.prefix.points import Place, Point
from hybridcache.prefix.policy import PLACEMENTS, RETENTIONS, PrefixPolicy
from hybridcache.workloads import Request, Workload, build_workload

SHARED = StrategyChoice("shared_pool", "hybridcache.strategies.shared_pool.SharedPool", {})
PAGES = StrategyChoice("padded_page", "hybridcache.strategies.padded_page.PaddedPage", {})
ASKED = ("+experiment=prefix_reuse", "tracking=disabled")


def results_of(tmp_path, *options):
    done = run(*ASKED, f"hydra.run.dir={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(tmp_path / "results.parquet")


def groups(**chosen):
    names = {"placement": "default", "retention": "last_k", "eviction": "reuse_density", **chosen}
    return OmegaConf.create({group: OmegaConf.load(CONF / group / f"{name}.yaml") for group, name in names.items()})


def test_fast_form_runs_both_phases(tmp_path):
    found = results_of(tmp_path, "fast=true", "strategies=[shared_pool,padded_page,byte_exact]")
    simulated, served = (found[found["phase"] == phase] for phase in ("simulation", "inference"))
    sets = set(zip(simulated["strategy"], simulated["policy"]))
    assert {("shared_pool", "default"), ("padded_page", "own"), ("byte_exact", "own"), ("shared_pool", "lru")} <= sets
    assert (simulated["hit_rate"] * simulated["prompt_tokens"]).to_numpy() == pytest.approx(simulated["hit_tokens"])
    default = simulated.set_index(["strategy", "policy"]).loc[("shared_pool", "default")]
    assert 0.5 < default["hit_rate"] < default["hit_rate_later_turns"] < 1
    assert (simulated.set_index("policy").loc["none", "hit_tokens"] == 0).all()
    turns = served[served["workload"] == "turns_2000"].set_index(["strategy", "policy", "round"]).sort_index()
    assert (turns.xs(2, level="round")["hit_tokens"] > 0).sum() == 3, "all but the one without reuse"
    assert turns.groupby("round")["tokens_sha256"].nunique().max() == 1, "reuse changes no token"
    assert (served["seconds"] > 0).all()
    checkpoints = served[served["workload"] == "prefill_128"].set_index("policy")["checkpoints"]
    assert checkpoints["none"] == 0 < checkpoints["every_64"]
    page = (tmp_path / "report.html").read_text()
    assert "reuse_simulation" in page
    assert "TTFT of second turns" in page


def test_sessions_of_a_file_are_replayed(tmp_path):
    path, sessions = tmp_path / "sessions.jsonl", []
    for number in range(3):
        first = [0.0, 6400, 100, 0, [[0, 100]], None, 1.0]
        calls = [first, [9.0, 7680, 100, 100, [[100, 20]], 5.0, 1.0]]
        sessions.append({"id": number, "tool_tokens": 0, "system_tokens": 0, "requests": calls})
    path.write_text("\n".join(map(json.dumps, sessions)))
    found = results_of(
        tmp_path / "run", "phases=[simulation]", "workload=agent_sessions", f"workload.path={path}", "workload.live_sessions=2",
        "workload.num_sessions=3", "simulation.budget_gb=50", "simulation.host_gb=0", "strategies=[shared_pool]",
    )  # fmt: skip
    assert set(found["policy"]) == {"default", "lru", "farthest", "none"}
    assert set(found["driver"]) == {"replay"}
    assert set(found["budget_bytes"]) == {50 * 10**9}
    assert found.set_index("policy").loc["default", "hit_rate"] == pytest.approx(6400 / (6400 + 7680), abs=0.01)


def test_league_in_fast_form(tmp_path):
    done = run("+experiment=checkpoint_policies", "fast=true", "tracking=disabled", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    league, claims = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("league", "claims"))
    assert set(league["axis"]) == {"default", "placement", "retention", "eviction", "claims", "budget", "combined"}
    assert set(league["workload"]) == {"chat", "coding", "cyclic"}
    assert (league["difference_low"] <= league["difference"] + 1e-12).all()
    assert (league[league["policy"] == "default"]["difference"] == 0).all()
    assert league[league["axis"] == "combined"]["policy"].nunique() == 4
    assert set(claims["verdict"]) <= {"reproduced", "refuted", "undecided", "not testable here"}
    half = league[league["policy"] == "default, budget x0.5"]
    assert (half["difference"] <= 0).all()


def test_bands_are_of_paired_differences():
    rows = pd.DataFrame(
        {"workload": "w", "axis": "a", "evicted": 0, "repetition": [0, 1, 2] * 2, "policy": ["default"] * 3 + ["x"] * 3,
         "hit_rate": [0.1, 0.5, 0.9, 0.2, 0.6, 1.0]}
    )  # fmt: skip
    line = league_table(rows, 500, 0).set_index("policy").loc["x"]
    assert (line["difference_low"], line["difference_high"]) == pytest.approx((0.1, 0.1))
    assert line["low"] < 0.6 < line["high"]
    assert band([0.5], 10, 0) == (0.5, 0.5)


def test_claims_follow_the_bands():
    names = {"default": 0.5, "eviction=flop_aware": 0.6, "eviction=lru": 0.4, "eviction=lru_path": 0.45}
    names |= {"claims=optimal_only": 0.3, "claims=uniform_only": 0.3, "retention=semantic": 0.48, "retention=all": 0.5}
    rows = [
        {"workload": "w", "policy": policy, "repetition": i, "hit_rate": rate}
        for policy, rate in names.items()
        for i in range(3)
    ]
    verdicts = claims_table(pd.DataFrame(rows), 100, 0)["verdict"].tolist()
    assert verdicts[:4] == ["reproduced", "refuted", "undecided", "reproduced"]


def test_groups_are_the_policies():
    assert configured_policy(groups()) == PrefixPolicy(), "the groups' defaults are the shipped policy"
    for group, known in (("retention", RETENTIONS), ("eviction", tuple(ORDERS))):
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(known)
    used = {name for path in (CONF / "placement").glob("*.yaml") for name in OmegaConf.load(path).points}
    assert used == set(PLACEMENTS)
    for path in (CONF / "placement").glob("*.yaml"):
        configured_policy(groups(placement=path.stem))


def test_sets_of_policies():
    found = policy_sets([SHARED, PAGES], ["default", "own", "lru", "farthest", "none"], PrefixPolicy())
    shown = [(one.choice.label, one.name) for one in found]
    assert shown == [
        ("shared_pool", "default"), ("padded_page", "default"), ("padded_page", "own"), ("padded_page", "vllm_0.31"),
        ("shared_pool", "lru"), ("shared_pool", "farthest"), ("shared_pool", "none"),
    ]  # fmt: skip
    assert [one.name for one in policy_sets([SHARED], ["default"], PrefixPolicy(every=64))] == ["custom"]
    with pytest.raises(ValueError, match="policies='oldest'"):
        policy_sets([SHARED], ["oldest"], PrefixPolicy())


def test_future_uses_are_the_next_arrivals():
    def ids(*values):
        return np.array(values, dtype=np.int32)

    prompts = [ids(1, 2, 3), ids(1, 2, 3, 4, 5), ids(1, 2, 9), ids(1, 2, 3, 4, 6)]
    stream = Workload("w", "s", tuple(Request(i, 10.0 * i, len(p), 1, p) for i, p in enumerate(prompts)))
    future = FutureUses(stream)

    def point(*values):
        root = Node(None, ids(), 0)
        return Point(0, Node(root, ids(*values), len(values)), Place.INSIDE, 0.0)

    assert [future.after(point(1, 2), now) for now in (-1.0, 0.0, 10.0, 20.0, 30.0)] == [0, 10, 20, 30, np.inf]
    assert future.after(point(1, 2, 3), -1.0) == 10.0, "a prompt that ends there does not resume there"
    assert future.after(point(1, 2, 3, 4), 10.0) == 30.0
    assert future.after(point(1, 2, 3, 7), -1.0) == np.inf


def test_random_sessions_come_from_their_seed():
    options = {"live_sessions": 3, "num_sessions": 6, "turns": 3.0}
    first, again, other = (build_workload("random_sessions", **options, seed=seed) for seed in (1, 1, 2))
    begun = [stream.begin() for stream in (first, again, other, first.fresh())]
    assert begun[0] == begun[1] == begun[3] != begun[2]
    assert first.fresh().name == "random_sessions"
    prompts = [np.asarray(request.prompt_ids) for request in begun[0]]
    assert all((prompt[:1024] == prompts[0][:1024]).all() for prompt in prompts), "they share a system prompt"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("simulation.budget_gb=0", "simulation.budget_gb=0"),
        ("simulation.driver=fast", "simulation.driver='fast'"),
        ("policies=[oldest]", "policies='oldest'"),
        ("eviction=oldest", "eviction='oldest'"),
        ("placement.every=100", "prefix.every=100"),
        ("simulation.budget=1", "simulation.budget"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, option, said):
    line = error_line(monkeypatch, capsys, *ASKED, "phases=[simulation]", f"hydra.run.dir={tmp_path}", option)
    assert said in line
