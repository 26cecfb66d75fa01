"""Engine on CUDA at the widths of Qwen3-Next (8 layers, fewer experts): everything runs, and nothing reads stale memory."""

import random

import pytest
import torch
from test_checkpoints import share_states

from hybridcache import SamplingParams
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingRow, sample
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.kernels.greedy import NOT_FINITE
from hybridcache.kernels.torch_ops import layers
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Span, build

triton = pytest.importorskip("hybridcache.kernels.greedy.triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make_model(experts: int):
    from models.configs import shipped_config
    from models.qwen3_next import build_model

    config = shipped_config("qwen3_next_8l")
    config.num_experts = experts
    return build_model(config, "bfloat16", "cuda")


@pytest.fixture(scope="module")
def model():
    return make_model(32)


@pytest.fixture(scope="module")
def model_of_chosen_experts():
    """Every token chooses all experts, so that rounding tips over no choice."""
    return make_model(10)


def make_engine(model, budget_tokens: int, requests: float, strategy: str = "shared_pool", **options) -> Engine:
    spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
    budget = int(requests * spec.request_bytes(budget_tokens))
    memory = build(strategy, spec=spec, budget_bytes=budget, physical=True, **options)
    config = SchedulerConfig(max_tokens_per_step=1024)
    return Engine(model, memory, config, make_backend("auto", "cuda"), poison=True)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("shared_pool", {}), ("shared_pool", {"mode": "carve"}), ("padded_page", {}), ("two_ended", {})],
    ids=["exclusive", "carve", "padded_page", "two_ended"],
)
def test_a_tight_pool_finishes_every_request(model, strategy, options):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    engine = make_engine(model, 1300, 3.0, strategy, **options)
    for i in range(12):
        prompt = [rng.randrange(1000, 150_000) for _ in range(rng.choice([1, 90, 500, 527]))]
        params = SamplingParams(max_tokens=rng.randint(8, 40), temperature=float(i % 2), ignore_eos=True)
        engine.add_request(prompt, params)
    engine.run()
    assert [seq.finish_reason for seq in engine.sequences] == ["length"] * 12, f"seed {seed}"
    assert engine.failed_steps == 0
    assert all(0 <= token < model.config.vocab_size for seq in engine.sequences for token in seq.output_ids)
    launched = engine.backend.launches
    for operation in ("qk_norm_rope_store", "paged_decode", "gdn_decode"):
        assert launched[f"{operation}[triton]"] > 0, launched
    hopper = torch.cuda.get_device_capability()[0] == 9
    for operation in ("paged_prefill", "gdn_prefill"):
        assert launched[f"{operation}[{'gluon' if hopper else 'triton'}]"] > 0, launched
    assert not any("[torch]" in name for name in launched), launched
    engine.strategy.check_integrity()


def test_graphs_and_overlap_give_the_tokens_and_launches_of_plain_steps(model):
    """Float32 has no near ties that matter, but its experts wait for the device; so bf16, and few steps."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    prompts = [[rng.randrange(1000, 150_000) for _ in range(rng.choice([1, 90, 500, 527]))] for _ in range(8)]
    found = []
    for on in ("auto", "false"):
        spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
        memory = build("shared_pool", spec=spec, budget_bytes=9 * spec.request_bytes(700), physical=True)
        backend = make_backend("auto", "cuda")
        engine = Engine(model, memory, SchedulerConfig(), backend, poison=True, cuda_graphs=on, overlap=on)
        seqs = [engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in prompts]
        engine.run()
        assert engine.failed_steps == 0
        assert (engine.runner.graphs is None) == (on == "false")
        found.append((dict(backend.launches), [seq.output_ids for seq in seqs]))
        if engine.runner.graphs is not None:
            assert engine.runner.graphs.replays >= 11
    (launches, tokens), (plain_launches, plain_tokens) = found
    assert launches == plain_launches
    # Rounding differs with the number of splits, so that a near tie may flip a token, and all after it.
    same = sum(a[:3] == b[:3] for a, b in zip(tokens, plain_tokens))
    assert same >= 6, f"seed {seed}: {tokens}, {plain_tokens}"


class Relaunched:
    """In the place of a graph: its kernels are launched one by one."""

    def __init__(self, run) -> None:
        self.replay = run


def test_padding_around_what_prefills_changes_no_logits(model_of_chosen_experts):
    """Steps as a graph holds them and as they are: requests arrive while others decode, and prefill beside them."""
    model = model_of_chosen_experts
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    prompts = [[rng.randrange(1000, 150_000) for _ in range(n)] for n in (70, 500, 1, 129, 64, 700)]
    found = []
    for padded in (True, False):
        spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
        memory = build("shared_pool", spec=spec, budget_bytes=9 * spec.request_bytes(800), physical=True)
        backend = make_backend("auto", "cuda")
        engine = Engine(model, memory, SchedulerConfig(), backend, poison=True, cuda_graphs=False, overlap=False)
        runner = engine.runner
        if padded:
            runner.graphs = runner._make_graphs(Relaunched)
        forward, logits, shapes = runner._forward, [], []
        runner._forward = lambda batch, forward=forward, logits=logits, shapes=shapes: (
            shapes.append((batch.num_decode, batch.num_rows)) or logits.append(forward(batch)) or logits[-1]
        )
        steps = []
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
            for _ in range(2):
                engine.step()
                steps.append({seq_id: logits[-1][slot].float() for seq_id, slot in runner._sampled.items()})
        if padded:
            assert len({n for n, rows in shapes if rows > n}) > 1, shapes
        found.append((steps, [seq.output_ids for seq in engine.sequences]))
    (padded, padded_ids), (exact, exact_ids) = found
    cosines = []
    for number, (ours, theirs) in enumerate(zip(padded, exact)):
        assert ours.keys() == theirs.keys()
        for seq_id, row in ours.items():
            known = number - 2 * seq_id  # output tokens that the step reads, or has read
            if padded_ids[seq_id][:known] == exact_ids[seq_id][:known]:
                cosines.append(float(torch.cosine_similarity(row, theirs[seq_id], dim=0)))
    assert len(cosines) > 20, f"seed {seed}"
    assert min(cosines) > 0.998, f"seed {seed}: {sorted(cosines)[:9]}"


def test_drawn_tokens_under_graphs_are_those_of_plain_steps(model):
    """A row that is drawn beside greedy ones, its randomness its own: with top_k=1 it must be the greedy token."""
    prompt = list(range(2000, 2100))
    engine = make_engine(model, 700, 5.0)
    assert engine.runner.graphs is not None
    greedy = engine.add_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    top = engine.add_request(prompt, SamplingParams(max_tokens=8, temperature=0.7, top_k=1, ignore_eos=True))
    free = engine.add_request(prompt, SamplingParams(max_tokens=8, temperature=5.0, ignore_eos=True))
    engine.run()
    assert greedy.output_ids == top.output_ids
    assert free.output_ids != greedy.output_ids


def test_every_live_block_is_read(model):
    prompt = list(range(1000, 1600))
    geometry = make_engine(model, 1000, 2.0).strategy.geometry
    for index in range(geometry.request_blocks(len(prompt))):
        engine = make_engine(model, 1000, 2.0)
        seq = engine.add_request(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        engine.step()
        block = _blocks(engine.strategy.spans(), geometry.manager_block_bytes)[index]
        engine.runner.pool.poison([block])
        engine.run()
        assert (seq.finish_reason, len(seq.output_ids)) == ("error", 1), block


def _blocks(spans, block_bytes: int) -> list[Span]:
    """Spans cut into manager blocks (adjacent ones of a request come as one span)."""
    return [
        Span(span.offset + start, block_bytes, span.kind, span.seq_id)
        for span in spans
        for start in range(0, span.num_bytes, block_bytes)
    ]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 151_936), (40, 5000)])
def test_greedy_choice_is_that_of_torch(rows, vocabulary):
    logits = torch.randn(rows, vocabulary, device="cuda").bfloat16()
    logits[0, vocabulary // 3 :: 1000] = 20.0
    if rows > 3:
        logits[1, 7], logits[2], logits[3, -1] = float("nan"), float("-inf"), float("inf")
    ids, feed, expected, expected_feed = torch.full((4, rows), -7, device="cuda")
    triton.greedy(logits, ids, feed)
    layers.greedy(logits, expected, expected_feed)
    finite = expected != NOT_FINITE
    assert torch.equal(ids != NOT_FINITE, finite)
    # Of equal logits PyTorch may name another.
    assert torch.equal(logits.gather(1, feed[:, None])[finite], logits.gather(1, expected_feed[:, None])[finite])
    assert ids[0] == vocabulary // 3


def test_sampling_on_cuda_is_that_of_the_cpu():
    seed = random.randrange(2**32)
    logits = torch.randn(80, 5000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    choices = [SamplingParams(), SamplingParams(temperature=0.8), SamplingParams(temperature=1.2, top_k=50, top_p=0.9)]
    rows = [SamplingRow(choices[i % 3], (seed, i), i) for i in range(80)]
    assert sample(logits.cuda(), rows) == sample(logits, rows), f"seed {seed}"


def test_memory_at_its_peak_is_no_more_than_was_stated(model):
    """Weights, cache and workspace, with prompts that fill steps, many rows, and sampling."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = make_engine(model, 1300, 40.0)
    rng = random.Random()
    for i in range(60):
        prompt = [rng.randrange(1000, 150_000) for _ in range(rng.choice([1, 90, 1000]))]
        engine.add_request(prompt, SamplingParams(max_tokens=8, temperature=float(i % 2), top_p=0.9, ignore_eos=True))
    engine.run()
    workspace = torch.cuda.max_memory_allocated() - before - engine.memory.cache_bytes
    print(engine.memory, "measured workspace", workspace)
    assert workspace <= engine.memory.workspace_bytes


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("shared_pool", {}), ("shared_pool", {"mode": "carve"}), ("padded_page", {}), ("two_ended", {})],
    ids=["exclusive", "carve", "padded_page", "two_ended"],
)
def test_states_written_elsewhere_at_every_step_change_no_token(model, strategy, options):
    """The same steps under graphs, in place and from one block to another: the arithmetic is the same, to the last bit."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    prompts = [[rng.randrange(1000, 150_000) for _ in range(rng.choice([3, 64, 200, 700]))] for _ in range(6)]
    found = []
    for elsewhere in (False, True):
        engine = make_engine(model, 800, 20.0, strategy, **options)
        if elsewhere:
            share_states(engine)
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
        engine.run()
        engine.strategy.check_integrity()
        assert engine.runner.graphs.replays > 0
        found.append([seq.output_ids for seq in engine.sequences])
    assert engine.moved_states > 50
    assert found[0] == found[1], f"seed {seed}"


def test_prompts_resume_from_checkpoints(model_of_chosen_experts, record_property):
    """Checkpoints inside prefill chunks and at their ends: the logits behind a resumed prompt are those of the whole prompt.
    (In bf16 rows of other shapes round differently; which tokens that flips says little of a model with random weights.)"""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    head = [rng.randrange(1000, 150_000) for _ in range(900)]
    prompts = [head[:length] + [rng.randrange(1000, 150_000) for _ in range(40)] for length in (64, 200, 640, 900)]
    fresh = make_engine(model_of_chosen_experts, 1000, 20.0, mode="carve")
    resumed = make_engine(model_of_chosen_experts, 1000, 20.0, mode="carve")
    resumed.add_request(head, SamplingParams(max_tokens=1, ignore_eos=True, checkpoint_at=(64, 192, 640, 900)))
    resumed.run()
    cosines, hits = [], []
    for prompt in prompts:
        logits = []
        for engine in (fresh, resumed):
            seq = engine.add_request(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
            engine.run()
            assert seq.finish_reason == "length"
            logits.append(engine.runner._logits[0].float().clone())  # a step of one row, under a graph
        hits.append(seq.hit_tokens)
        cosines.append(float(torch.cosine_similarity(*logits, dim=0)))
    resumed.strategy.check_integrity()
    record_property("cosines", cosines)
    assert hits == [64, 192, 640, 900], f"seed {seed}"
    assert min(cosines) > 0.998, f"seed {seed}: {cosines}"
