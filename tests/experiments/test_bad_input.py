"""Every mistake of a command line or of a user's file ends with one line that names it, and a status that is not 0."""

import textwrap

import pytest
from command_line import error_line, run

SHARED, SERVE, GEOMETRY = "+experiment=shared_pool", "+experiment=serve_throughput", "+experiment=geometry"
CAPACITY = ("phases=[capacity]", "strategies=[shared_pool]")
SIMULATION = ("phases=[simulation]", "strategies=[shared_pool]")
INFERENCE = ("phases=[inference]", "strategies=[shared_pool]")


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    def call(*arguments: str) -> str:
        return error_line(monkeypatch, capsys, *arguments, "tracking=disabled", f"hydra.run.dir={tmp_path / 'run'}")

    return call


def line(*words: str):
    """A case: the words of the command line, then those that the message must have."""
    at = words.index("->")
    return pytest.param(words[:at], words[at + 1 :], id=" ".join(words[:at]) or "nothing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # -- what is chosen
        line("->", "+experiment=", "shared_pool", "geometry"),
        line("+experiment=shard_pool", "->", "shard_pool", "did you mean shared_pool?"),
        line("+experiment_name=tables", "->", "experiment_name='tables'", "serve_throughput"),
        line("+experiment_name=lib", "->", "experiment_name='lib'", "serve_throughput"),
        line("+experiment_name=experiments.lib.harness", "->", "experiments.lib.harness", "run(cfg, run_dir)"),
        line("+experiment_name=my_lab.nothing", "->", "my_lab", "PYTHONPATH"),
        line(SHARED, "model=qwen4", "->", "model", "qwen4", "qwen3_next_80b_a3b"),
        line(SHARED, "workload=azur", "->", "did you mean azure?"),
        line(SHARED, "device=h300", "->", "h300", "h100"),
        line(SHARED, "engine=fast", "->", "engine", "fast", "default"),
        # -- keys that the experiment does not read, with and without +
        line(GEOMETRY, "workload=azure", "->", "workload: experiment geometry does not read it", "geometry", "tp_size"),
        line(GEOMETRY, "engine.max_running=3", "->", "engine.max_running", "does not read"),
        line(GEOMETRY, "seed=3", "->", "seed", "does not read"),
        line(GEOMETRY, "foo=10", "->", "foo: experiment geometry does not read it", "kv_dtype"),
        line(GEOMETRY, "+foo=10", "->", "foo: experiment geometry does not read it", "kv_dtype"),
        line(GEOMETRY, "+strategy=shared_pool", "->", "strategy", "does not read", "kv_dtype"),
        line(GEOMETRY, "+strategy=x", "->", "strategy", "byte_exact"),
        line(SHARED, "+simulation.budgt_gib=10", "->", "simulation.budgt_gib", "did you mean budget_gib?", "repetitions"),
        line(SHARED, "simulation.budgt_gib=10", "->", "simulation.budgt_gib", "did you mean budget_gib?", "repetitions"),
        line(SHARED, "engine.max_runing=3", "->", "engine.max_runing", "did you mean max_running?"),
        line(SHARED, "+engine.max_runing=3", "->", "engine.max_runing", "did you mean max_running?"),
        line(SHARED, "tracking.modus=offline", "->", "tracking.modus", "mode"),
        line(SHARED, "device.num_devices=4", "->", "device.num_devices", "bandwidth"),
        line(SHARED, "inference.state_dtype=bfloat16", "->", "inference.state_dtype", "checkpoint"),
        line(SHARED, "inference.model=tiny", "->", "inference.model", "checkpoint"),
        line(SERVE, "workload=azure", "->", "workload: experiment serve_throughput does not read it", "serving"),
        line(SERVE, "tp_size=2", "->", "tp_size", "does not read"),
        line("+experiment=kernels", "model=tiny", "->", "model", "does not read", "kernels"),
        line("+experiment=kernels", "+kernels.opertions=[a]", "->", "did you mean operations?"),
        line(SHARED, *CAPACITY, "workload.seed=3", "->", "workload.seed", "with these settings", "capacity"),
        line(SHARED, *CAPACITY, "simulation.budget_gib=3", "->", "simulation.budget_gib", "with these settings"),
        line(SHARED, *CAPACITY, "seed=3", "->", "seed", "with these settings"),
        line(SHARED, *SIMULATION, "capacity.lengths=[7]", "->", "capacity.lengths", "with these settings"),
        line(SHARED, *SIMULATION, "inference.device=cpu", "->", "inference.device", "with these settings"),
        line(SHARED, *INFERENCE, "tp_size=2", "->", "tp_size", "with these settings"),
        line(SHARED, "+workload.foo=1", "->", "foo=1", "synthetic_chat", "rate_per_s"),
        line(SHARED, "workload.foo=1", "->", "workload.foo", "rate_per_s"),
        # -- values of a wrong type
        line(SHARED, "capacity.budget_gib=abc", "->", "capacity.budget_gib='abc'", "number"),
        line(SHARED, "capacity.lengths=[]", "->", "capacity.lengths=[]"),
        line(SHARED, "capacity.lengths=12", "->", "capacity.lengths=12", "list"),
        line(SHARED, "capacity.lengths=[12,x]", "->", "capacity.lengths[1]='x'", "whole number"),
        line(SHARED, "capacity.lengths=[12,12]", "->", "capacity.lengths=12", "once"),
        line(SHARED, "capacity.lengths=[0]", "->", "capacity.lengths=0"),
        line(SHARED, "strategies=shared_pool", "->", "strategies='shared_pool'", "list"),
        line(SHARED, "phases=capacity", "->", "phases='capacity'", "list"),
        line(SHARED, "seed=abc", "->", "seed='abc'", "whole number"),
        line(SHARED, "seed=-1", "->", "seed=-1", "at least 0"),
        line(SHARED, "seed=1.5", "->", "seed=1.5", "whole number"),
        line(SHARED, "fast=maybe", "->", "fast='maybe'", "true or false"),
        line(SHARED, "simulation.repetitions=0", "->", "simulation.repetitions=0", "positive"),
        line(SHARED, "simulation.num_requests=-3", "->", "simulation.num_requests=-3", "positive"),
        line(SHARED, "simulation.budget_gib=-1", "->", "simulation.budget_gib=-1", "positive"),
        line(SHARED, "simulation.budget_gib=nan", "->", "simulation.budget_gib=nan", "positive"),
        line(SHARED, "simulation=7", "->", "simulation=7", "section"),
        line(SHARED, "engine.max_tokens_per_step=many", "->", "max_tokens_per_step='many'", "auto"),
        line(SHARED, "tp_size=two", "->", "tp_size='two'", "auto"),
        line(SHARED, "tp_size=0", "->", "tp_size=0"),
        line(SHARED, "inference.max_prompt=long", "->", "inference.max_prompt='long'"),
        line(SHARED, "inference.repetitions=0", "->", "inference.repetitions=0"),
        line(SHARED, "inference.budget_requests=-1", "->", "inference.budget_requests=-1", "positive"),
        line(SHARED, "inference.device=tpu", "->", "inference.device='tpu'", "cpu"),
        line(SERVE, "serving.workloads=[1,2]", "->", "serving.workloads=[1, 2]", "requests"),
        line(SERVE, "serving.workloads={a:[1,2]}", "->", "serving.workloads.a=[1, 2]"),
        line(SERVE, "serving.workloads={a:chat}", "->", "serving.workloads.a='chat'"),
        line(SERVE, "serving.cache_bytes=-5", "->", "serving.cache_bytes=-5"),
        line(GEOMETRY, "geometry.top=0", "->", "geometry.top=0"),
        line(GEOMETRY, "geometry.lengths=[]", "->", "geometry.lengths=[]"),
        line(GEOMETRY, "~geometry.top", "->", "geometry.top"),
        # -- values that make no sense
        line(SHARED, "phases=[]", "->", "phases=[]", "simulation"),
        line(SHARED, "phases=[simulate]", "->", "phases='simulate'", "simulation"),
        line(SHARED, "phases=[capacity,capacity]", "->", "phases='capacity'", "once"),
        line(SHARED, "strategies=[]", "->", "strategies=[]", "two_ended"),
        line(SHARED, "strategies=[shared_pool,mine]", "->", "strategies='mine'", "padded_page"),
        line(SHARED, "strategies=[shared_pool,shared_pool]", "->", "strategies='shared_pool'", "twice"),
        line(SHARED, *INFERENCE[:1], "strategies=[byte_exact]", "->", "byte_exact", "physical"),
        line(SERVE, "strategies=[byte_exact]", "->", "byte_exact", "physical"),
        line(SHARED, "+strategy_options.mine.ratio=1", "->", "strategy_options='mine'", "strategies="),
        line(SHARED, *CAPACITY, "+strategy_options.shared_pool.moed=carve", "->", "moed"),
        line(SHARED, *CAPACITY, "+strategy_options.shared_pool=carve", "->", "strategy_options.shared_pool='carve'"),
        line(
            SHARED, "phases=[capacity]", "strategies=[static_split]", "+strategy_options.static_split.ratio=big",
            "->", "ratio", "big",
        ),
        line(
            SHARED, "phases=[capacity]", "strategies=[large_block]", "+strategy_options.large_block.kernel_block_size=48",
            "->", "kernel_block_size", "48",
        ),
        line(SHARED, "engine.victim=oldest", "->", "victim='oldest'", "least_computed"),
        line(SHARED, "engine.max_running=0", "->", "max_running=0"),
        line(SHARED, "engine.max_model_len=1", "->", "engine.max_model_len=1", "from 2 to the 262144 of qwen3_next_80b_a3b"),
        line(SHARED, "engine.max_model_len=262145", "->", "engine.max_model_len=262145", "from 2 to the 262144"),
        line(SHARED, "engine.max_model_len=8193", "->", "engine.max_model_len=8193", "from 2 to the 8192 of tiny"),
        line(SHARED, "engine.max_model_len=long", "->", "engine.max_model_len='long'", "whole number"),
        line(GEOMETRY, "engine.max_model_len=64", "->", "engine.max_model_len", "does not read"),
        line(SERVE, "engine.max_model_len=8193", "->", "engine.max_model_len=8193", "from 2 to the 8192 of tiny"),
        line(SERVE, "engine.max_model_len=398", "->", "engine.max_model_len=398", "workload long has 399", "leave"),
        line(SERVE, "engine.max_model_len=47", "serving.workloads={a:[1,8,4]}", "->", "engine.max_model_len=47", "has 87"),
        line(SHARED, "kv_dtype=int3", "->", "kv_dtype='int3'", "bfloat16"),
        line(SHARED, "state_dtype=int3", "->", "state_dtype='int3'", "bfloat16"),
        line(SHARED, *CAPACITY, "tp_size=3", "->", "tp_size=3"),
        line(SHARED, *SIMULATION, "tp_size=1", "->", "tp_size=1", "148.4 GiB", "tp_size=auto"),
        line(SHARED, *SIMULATION, "device.bandwidth=0", "->", "device.bandwidth=0", "positive"),
        line(SHARED, *CAPACITY, "capacity.budget_gib=0.001", "->", "budget_bytes", "at least"),
        line(SHARED, *SIMULATION, "workload=azure", "->", "path=None", "AzurePublicDataset"),
        line(SHARED, *SIMULATION, "workload.num_requests=0", "->", "num_requests=0"),
        line(SHARED, *SIMULATION, "workload.seed=x", "->", "workload.seed='x'"),
        line(SHARED, *INFERENCE, "inference.checkpoint=/nowhere", "->", "/nowhere"),
        line(SHARED, *INFERENCE, "inference.checkpoint=/nowhere", "model=tiny", "->", "checkpoint", "tiny", "give one"),
        line(SHARED, *INFERENCE, "model=jamba_v0_1", "->", "jamba_v0_1", "inference does not run jamba"),
        line(SERVE, "model=jamba_v0_1", "->", "jamba_v0_1", "inference does not run jamba"),
        line(SHARED, "model=tiny", "+model.hf_config.hidden_ac=silu", "->", "hidden_ac", "did you mean hidden_act?"),
        line(GEOMETRY, "model=tiny", "model.hf_config.model_type=llama", "->", "llama", "qwen3_next"),
        line(SHARED, "tracking.mode=sometimes", "->", "tracking.mode='sometimes'", "offline"),
        # -- the shell's grammar
        line(GEOMETRY, "=3", "->", "'=3'", "KEY=VALUE"),
        line(GEOMETRY, "geometry.lengths=[1,", "->", "geometry.lengths=[1,"),
        line(GEOMETRY, "--config-dir=/nowhere", "->", "/nowhere", "no such folder"),
    ],
)  # fmt: skip
def test_one_line(arguments, words, fails):
    message = fails(*arguments)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("workload", ["azure", "synthetic_chat"])
def test_repetitions_of_a_trace_are_refused_and_of_a_seeded_stream_are_not(workload, fails, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n1.0,10,3\n")
    more = (f"workload.path={trace}",) if workload == "azure" else ("simulation.budget_gib=1000",)
    message = fails(SHARED, *SIMULATION, f"workload={workload}", *more, "simulation.repetitions=2")
    assert ("has no seed" in message) == (workload == "azure")
    assert ("GiB of cache" in message) == (workload != "azure")


def test_malformed_trace_names_the_line(fails, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n1.0,many,3\n")
    message = fails(SHARED, "workload=azure", f"workload.path={trace}")
    for word in ("trace.csv", "3", "many"):
        assert word in message


@pytest.mark.parametrize(
    ("file", "text", "arguments", "words"),
    [
        ("workload/mine.yaml", "name: [broken", ["workload=mine"], ["mine.yaml", "line 1"]),
        ("strategy/mine.yaml", "a: b: c", ["strategies=[mine]"], ["mine.yaml", "line 1"]),
        ("strategy/mine.yaml", "ratio: 3", ["strategies=[mine]"], ["mine.yaml", "_target_"]),
        ("strategy/mine.yaml", "- a", ["strategies=[mine]"], ["mine.yaml", "_target_"]),
        ("strategy/mine.yaml", "_target_: nowhere.Mine", ["strategies=[mine]"], ["nowhere"]),
        ("strategy/mine.yaml", "_target_: json.JSONDecoder", ["strategies=[mine]"], ["JSONDecoder", "Strategy"]),
        ("workload/mine.yaml", "seed: 3", ["workload=mine"], ["workload", "_target_"]),
        ("workload/mine.yaml", "_target_: nowhere.mine", ["workload=mine"], ["nowhere"]),
        ("workload/mine.yaml", "_target_: json.dumps", ["workload=mine", "strategies=[shared_pool]"], ["obj", "json.dumps"]),
        ("model/mine.yaml", "name: mine", ["model=mine"], ["model.hf_config"]),
        ("model/mine.yaml", "name: mine\nhf_config: {num_hidden_layers: 3}", ["model=mine"], ["model_type"]),
        ("experiment/mine.yaml", "experiment_name: my.own", [], ["# @package _global_"]),
        ("experiment/mine.yaml", "# @package _global_\nexperiment_name: my.own", [], ["my", "PYTHONPATH"]),
        ("experiment/mine.yaml", "# @package _global_\nexperiment_name: geometry\ngeometry: {top: 3, lengths: [1]}\nextra: 3",
         [], ["extra", "does not read"]),
    ],
)  # fmt: skip
def test_files_of_a_folder_outside(file, text, arguments, words, fails, tmp_path):
    path = tmp_path / "conf" / file
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(text) + "\n")
    experiment = "+experiment=mine" if file.startswith("experiment/") else SHARED
    message = fails("--config-dir", str(tmp_path / "conf"), experiment, *arguments)
    for word in words:
        assert word in message, message


def test_a_run_directory_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/nope", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        message = error_line(monkeypatch, capsys, GEOMETRY, "tracking=disabled", f"hydra.run.dir={folder}")
        assert "hydra.run.dir" in message


def test_no_traceback_from_the_shell(tmp_path):
    done = run(SHARED, "strategies=[mine]", "tracking=disabled", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: strategies='mine'")
    assert done.stderr.count("\n") == 1


def test_a_bad_point_does_not_end_a_sweep(tmp_path):
    done = run("-m", GEOMETRY, "tp_size=1,3,2", "model=tiny", "tracking=disabled", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if "tp_size=3: does not divide" in line
    ]
    assert [(tmp_path / str(i) / "results.parquet").exists() for i in range(3)] == [True, False, True]
