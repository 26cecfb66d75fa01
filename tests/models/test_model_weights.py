"""Loading checkpoints in every form they are stored in, refusing those that do not fit, and random weights; and that the
model keeps no cache of its own."""

import json
import logging
import random
import re
from collections.abc import Sequence

import pytest
import torch
import transformers
from qwen3_next_runs import Loop, tiny_config
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextForCausalLM

from hybridcache.errors import UserError
from hybridcache.strategies import Kind, Span
from models.qwen3_next import build_model, load_model


@pytest.fixture(scope="module", autouse=True)
def quiet_and_small():
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as the model's authors publish it: one tensor per expert and matrix, by our own conversion of
    Transformers' modules. Returns its tensors, config and what Transformers answers to a prompt."""
    torch.manual_seed(random.randrange(1 << 30))
    config = tiny_config(initializer_range=0.1, mlp_only_layers=[2])
    model = Qwen3NextForCausalLM(config).eval()
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(*weight.chunk(2, dim=1))):
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(weight):
                tensors[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            tensors[name] = weight
    prompt = torch.randint(0, config.vocab_size, (30,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    return {"model": model, "tensors": tensors, "config": config, "prompt": prompt, "logits": logits}


def write_checkpoint(folder, config, tensors, shards=1) -> None:
    """``config.json`` and one file, or shards with an index; tensors are dealt to shards at random."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: weight.contiguous().clone() for name, weight in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: random.choice(names) for name in tensors}
    where.update(zip(tensors, names))
    for file in names:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def answers(model, prompt) -> torch.Tensor:
    return Loop(model, placement_seed=0).generate([prompt], 1, random.Random(0))[1][0]


# -- what loads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_published_names_one_file_and_shards(published, tmp_path, shards):
    write_checkpoint(tmp_path, published["config"], published["tensors"], shards)
    model = load_model(tmp_path, "float32", "cpu")
    torch.testing.assert_close(answers(model, published["prompt"]), published["logits"], rtol=0, atol=1e-4)


def test_transformers_own_names(published, tmp_path):
    """Experts fused as Transformers' modules keep them, and whatever names ``save_pretrained`` chooses to write."""
    write_checkpoint(tmp_path / "fused", published["config"], published["model"].state_dict(), shards=2)
    published["model"].save_pretrained(tmp_path / "saved")
    published["model"].save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    fused = load_file(next((tmp_path / "fused").glob("*.safetensors")))
    assert not any(re.search(r"experts\.\d+\.", name) for name in fused)
    expected = load_model(tmp_path / "fused", "float32", "cpu")
    torch.testing.assert_close(answers(expected, published["prompt"]), published["logits"], rtol=0, atol=1e-4)
    for folder in ("saved", "sharded"):
        model = load_model(tmp_path / folder, "float32", "cpu")
        for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", ["float64", "fp32", torch.bfloat16, "float16"])
def test_weights_take_the_dtype_asked_for_and_norms_never_less_than_float32(published, tmp_path, dtype):
    write_checkpoint(tmp_path, published["config"], {n: t.bfloat16() for n, t in published["tensors"].items()})
    model = load_model(tmp_path, dtype, "cpu")
    wanted = {"float64": torch.float64, "fp32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)
    assert model.dtype == wanted
    assert model.device == torch.device("cpu")
    for name, weight in model.named_parameters():
        exact = "norm" in name or name.endswith(("a_log", "dt_bias"))
        expected = torch.promote_types(wanted, torch.float32) if exact else wanted
        assert weight.dtype == expected, name
        assert not weight.requires_grad, name
    assert torch.equal(
        model.embedding.double(),
        published["tensors"]["model.embed_tokens.weight"].to(torch.bfloat16).to(wanted).double(),
    )


def test_prediction_heads_are_skipped_and_reported(published, tmp_path, caplog):
    extra = {"mtp.layers.0.self_attn.q_proj.weight": torch.ones(3), "mtp.norm.weight": torch.ones(2)}
    write_checkpoint(tmp_path, published["config"], {**published["tensors"], **extra})
    with caplog.at_level(logging.INFO):
        load_model(tmp_path, "float32", "cpu")
    assert "2 tensors" in caplog.text
    assert "mtp." in caplog.text


@pytest.mark.parametrize("stored", [True, False], ids=["head-stored", "head-absent"])
def test_a_tied_head_is_the_embedding_whether_stored_or_not(tmp_path, stored):
    config = tiny_config(tie_word_embeddings=True)
    tensors = dict(Qwen3NextForCausalLM(config).state_dict())
    if not stored:
        tensors.pop("lm_head.weight", None)
    write_checkpoint(tmp_path, config, tensors)
    model = load_model(tmp_path, "float32", "cpu")
    assert model.head is model.embedding


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(published, tmp_path):
    tensors = dict(published["tensors"])
    for expert in range(8):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    del tensors["model.layers.0.linear_attn.A_log"], tensors["model.norm.weight"]
    tensors["model.layers.9.odd.weight"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(5, 7)
    write_checkpoint(tmp_path, published["config"], tensors, shards=2)
    with pytest.raises(UserError) as error:
        load_model(tmp_path, "float32", "cpu")
    message = str(error.value)
    assert "10 missing" in message
    assert "model.layers.0.linear_attn.A_log" in message
    assert "and 2 more" in message
    assert "1 unexpected: model.layers.9.odd.weight" in message
    assert "1 misshaped: lm_head.weight [5, 7] (the config says [97, 32])" in message
    assert "\n" not in message


def test_a_missing_shard_is_named(published, tmp_path):
    write_checkpoint(tmp_path, published["config"], published["tensors"], shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors"):
        load_model(tmp_path, "float32", "cpu")


def test_a_truncated_file_is_named(published, tmp_path):
    write_checkpoint(tmp_path, published["config"], published["tensors"])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors.*cannot be read"):
        load_model(tmp_path, "float32", "cpu")


def test_folders_that_are_no_checkpoint(published, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path / "nowhere", "float32", "cpu")
    published["config"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        load_model(tmp_path, "float32", "cpu")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(UserError, match="index"):
        load_model(tmp_path, "float32", "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_model(tmp_path, "float32", "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type='llama'"):
        load_model(tmp_path, "float32", "cpu")


def test_quantised_checkpoints_are_refused_by_name(published, tmp_path):
    write_checkpoint(tmp_path, published["config"], published["tensors"])
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="quantization_config='fp8'"):
        load_model(tmp_path, "float32", "cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("layer_types", ["linear_attention"] * 3),
        ("num_attention_heads", 5),
        ("linear_num_value_heads", 3),
        ("num_experts_per_tok", 9),
    ],
)
def test_configs_that_would_compute_something_else(field, value):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(UserError, match=field):
        build_model(config, "float32", "cpu")


def test_rotary_types_that_depend_on_the_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.25}
    with pytest.raises(UserError, match="rope_type"):
        build_model(tiny_config(rope_parameters=rope), "float32", "cpu")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_dtypes_that_cannot_compute(dtype):
    with pytest.raises(UserError, match="dtype"):
        build_model(tiny_config(), dtype, "cpu")


# -- random weights ----------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed():
    seed = random.randrange(1 << 30)
    config = tiny_config()
    a, b, c = (build_model(config, "float32", "cpu", seed=s) for s in (seed, seed, seed + 1))
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())]
    assert all(same), f"seed {seed}"
    assert not torch.equal(a.embedding, c.embedding)


def test_random_weights_are_drawn_as_transformers_draws_them():
    """Every parameter is filled, with the mean and spread of Transformers' own initialisation."""
    config = tiny_config(hidden_size=64, initializer_range=0.05, attention_bias=True, mlp_only_layers=[1])
    seed = random.randrange(1 << 30)
    model = build_model(config, "float32", "cpu", seed=seed)
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), (name, seed)
        if name.endswith("mixer.norm.weight") or name.endswith("dt_bias"):
            assert (weight == 1).all(), name
        elif "norm" in name or "bias" in name:
            assert (weight == 0).all(), name
        elif name.endswith("a_log"):
            assert ((weight.exp() >= 0.0099) & (weight.exp() <= 16.01)).all(), (name, seed)
        else:
            if name.endswith("router"):
                assert (weight[config.num_experts + 1 :] == 0).all(), name
                weight = weight[: config.num_experts + 1]
            spread = 0.05 * 6 / weight.numel() ** 0.5
            assert abs(weight.mean()) < spread, (name, seed)
            assert abs(weight.std() - 0.05) < spread, (name, seed)


# -- no cache but the pool ---------------------------------------------------------------------------------------------


def tensors_of(model) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model or a module of it holds as an attribute, registered or not."""
    found = {}
    for path, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        found.update({f"{path}.{k}": tuple(v.shape) for k, v in held.items() if isinstance(v, torch.Tensor)})
    return found


def test_the_model_holds_nothing_that_grows():
    model = build_model(tiny_config(), "float32", "cpu", seed=1)
    before = tensors_of(model)
    weights = [weight.clone() for weight in model.parameters()]
    prompts = [[random.randrange(97) for _ in range(n)] for n in (5, 70)]
    loop = Loop(model, placement_seed=1)
    loop.generate(prompts, 5, random.Random())
    assert tensors_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    backend = [v for v in vars(loop.backend).values() if isinstance(v, torch.Tensor)]
    assert not backend


@pytest.mark.parametrize("kind", [Kind.STATE, Kind.KV], ids=["state", "kv"])
def test_poisoning_any_live_block_of_a_request_spoils_its_output_and_no_other(kind):
    """The pool is the only memory: a NaN in a block that one request holds reaches its next token, and only its."""
    rng = random.Random()
    model = build_model(tiny_config(), "float32", "cpu", seed=2)
    loop = Loop(model, placement_seed=rng.randrange(1000))
    for seq_id in (0, 1):
        loop.admit(seq_id, [rng.randrange(97) for _ in range(41)])
    loop.step({0: 40, 1: 40})
    live = loop.pool.buffer.clone()

    def next_logits(spoil: Sequence[Span]) -> dict[int, torch.Tensor]:
        loop.pool.buffer.copy_(live)
        loop.pool.poison(spoil)
        loop.done = {0: 40, 1: 40}
        return loop.step({0: 1, 1: 1})

    expected = next_logits([])
    assert all(logits.isfinite().all() for logits in expected.values())
    spans = [span for span in loop.strategy.spans() if span.seq_id == 0 and span.kind == kind]
    assert spans
    for span in spans:
        logits = next_logits([span])
        assert logits[0].isnan().any(), span
        # Rows meet in the experts' products, whose rounding depends on how many there are; nothing else is shared.
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-4, atol=1e-4)
