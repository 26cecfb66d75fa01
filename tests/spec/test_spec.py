"""CacheSpec: exact bytes of Qwen3-Next, every architecture against Transformers' own cache, and what is refused."""

import re
import subprocess
import sys
from math import prod

import pytest
import torch
import transformers
from limits import SUBPROCESS_S

from hybridcache.errors import UserError
from hybridcache.spec import CacheSpec
from hybridcache.spec.architectures import ARCHITECTURES, text_config
from hybridcache.spec.hf_config import LAYER_TYPES_FROM
from models.configs import shipped_config, shipped_fields, shipped_names

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA_NET = {
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR, FULL = "linear_attention", "full_attention"
TINY = {
    "qwen3_next": {**DELTA_NET, **EXPERTS, "head_dim": 32},
    "qwen3_5_text": {**DELTA_NET, "head_dim": 32},
    "qwen3_5_moe_text": {**DELTA_NET, **EXPERTS, "head_dim": 32},
    "olmo_hybrid": {**DELTA_NET, "layer_types": [LINEAR, FULL, LINEAR, LINEAR]},
    "kimi_linear": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "linear_conv_kernel_dim": 3,
        "layer_types": [LINEAR, LINEAR, LINEAR, LINEAR, FULL],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "bamba": {**MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA,
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, FULL, LINEAR],
        "num_local_experts": 2,
        "shared_intermediate_size": 16,
    },
    "falcon_h1": {**MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 96},
    "nemotron_h": {
        "head_dim": 32,
        "layers_block_type": [LINEAR, "mlp", FULL, "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 3,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": [LINEAR, "hybrid", LINEAR],
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 3},
    "minimax": {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "num_local_experts": 2, "head_dim": 32},
}
"""Small models of every architecture, with widths that differ wherever a mix-up could hide."""


def tiny_config(model_type: str):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    return transformers.AutoConfig.for_model(model_type, **{**WIDTHS, **TINY[model_type]})


def qwen(**kwargs) -> CacheSpec:
    return CacheSpec.from_config(shipped_fields("qwen3_next_80b_a3b"), **kwargs)


# -- Qwen3-Next-80B-A3B, worked out by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", ["float32", "fp32", torch.float32])
def test_qwen3_next_in_fp32(state_dtype):
    spec = qwen(state_dtype=state_dtype)
    assert (len(spec.attention_layers), len(spec.state_layers)) == (12, 36)
    assert spec.attention_layers == tuple(range(3, 48, 4))
    assert spec.kv_bytes_per_token_per_layer == 2_048
    assert spec.kv_bytes_per_token == 24_576
    assert spec.state.recurrent_bytes == 2_097_152
    assert spec.state.conv_bytes == 49_152
    assert spec.state.ring_bytes == 65_536
    assert spec.state_bytes_per_layer == 2_146_304
    assert spec.stored_state_bytes_per_layer == 2_162_688
    assert spec.state_bytes == 77_266_944
    assert spec.request_bytes(12) == 77_266_944 + 12 * 24_576


def test_qwen3_next_in_bf16():
    spec = qwen(state_dtype=torch.bfloat16)
    assert spec.state.recurrent_bytes == 1_048_576
    assert spec.state_bytes == 39_518_208
    assert spec.kv_bytes_per_token == 24_576


@pytest.mark.parametrize(
    ("tp_size", "kv", "recurrent", "ring"), [(2, 12_288, 1_048_576, 32_768), (4, 12_288, 524_288, 16_384)]
)
def test_qwen3_next_tensor_parallel(tp_size, kv, recurrent, ring):
    spec = qwen(tp_size=tp_size)
    assert spec.kv_bytes_per_token == kv  # two KV heads: one per rank at TP 2, replicated at TP 4
    assert (spec.state.recurrent_bytes, spec.state.ring_bytes) == (recurrent, ring)
    assert spec.state_bytes * tp_size == qwen().state_bytes
    assert spec.tp_size == tp_size


def test_fp8_kv_halves_the_kv_and_leaves_the_conv_in_bf16():
    spec = qwen(kv_dtype="fp8")
    assert spec.kv_bytes_per_token == 12_288
    assert spec.attention.dtype == "float8_e4m3fn"
    assert spec.state.conv_dtype == "bfloat16"
    assert spec.state_bytes == 77_266_944


def test_conv_dtype_follows_the_kv_unless_given():
    assert qwen(kv_dtype="float32").state.conv_bytes == 2 * 49_152
    assert qwen(kv_dtype="float32", conv_dtype="bf16").state.conv_bytes == 49_152
    assert qwen(conv_dtype="fp8").state.conv_bytes == 49_152 // 2


# -- against Transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TINY)
def test_bytes_are_those_of_transformers_cache(model_type):
    """Run a random model and compare, layer by layer, what its cache holds with what the spec says."""
    config, tokens = tiny_config(model_type), 7
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(3, 64, (1, tokens)), use_cache=True).past_key_values
    spec = CacheSpec.from_config(config, kv_dtype="float32", state_dtype="float32")
    assert spec.model_type == model_type
    held = [_held(cache, index) for index in range(len(spec.layers))]
    for layer, (kv, recurrent, conv) in zip(spec.layers, held, strict=True):
        kv_bytes = layer.attention.bytes_per_token * tokens if layer.attention else 0
        assert sum(tensor.nbytes for tensor in kv) == kv_bytes, f"layer {layer.index}"
        state = layer.state
        assert [tuple(tensor.shape[1:]) for tensor in recurrent] == (
            [state.recurrent_shape] if state and state.recurrent_shape else []
        ), f"layer {layer.index}"
        # Transformers keeps conv_kernel columns; the exact state is the conv_kernel - 1 that the next token reads.
        one_column = state.conv_channels * 4 if state else 0
        conv_bytes = state.conv_bytes + one_column if state else 0
        assert sum(tensor.nbytes for tensor in conv) == conv_bytes, f"layer {layer.index}"
    assert sum(tensor.nbytes for kv, _, _ in held for tensor in kv) == spec.kv_bytes_per_token * tokens
    assert spec.attention_layers
    assert spec.state_layers


def _held(cache, index: int) -> tuple[list, list, list]:
    """K and V, recurrent states and conv states of one layer of a Transformers cache."""
    linear = getattr(cache, "linear_cache", [])  # MiniMax keeps its states in a list of its own
    recurrent = [linear[index]] if index < len(linear) and torch.is_tensor(linear[index]) else []
    if index >= len(cache.layers):
        return [], recurrent, []
    layer = cache.layers[index]
    kv = [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
    recurrent += _tensors(getattr(layer, "recurrent_states", None))
    return kv, recurrent, _tensors(getattr(layer, "conv_states", None))


def _tensors(states) -> list:
    states = states.values() if isinstance(states, dict) else [states]
    return [tensor for tensor in states if tensor is not None]


def test_every_architecture_is_compared():
    composite = {"qwen3_5", "qwen3_5_moe"}  # their text parts are
    assert set(TINY) == set(ARCHITECTURES) - composite


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_a_composite_config_gives_its_text_part(model_type):
    fields = {**WIDTHS, **TINY[f"{model_type}_text"]}
    whole = CacheSpec.from_config({"model_type": model_type, "text_config": fields})
    assert whole == CacheSpec.from_config({"model_type": f"{model_type}_text", **fields})
    assert whole == CacheSpec.from_config(transformers.AutoConfig.for_model(model_type, text_config=fields))


def test_a_mapping_and_a_config_give_the_same_spec():
    for name in ("tiny", "qwen3_next_80b_a3b", "nemotron_h_8b"):
        assert CacheSpec.from_config(shipped_fields(name)) == CacheSpec.from_config(shipped_config(name))


def test_older_layer_names_are_understood():
    fields = {**WIDTHS, **TINY["granitemoehybrid"], "model_type": "granitemoehybrid"}
    current = CacheSpec.from_config(fields)
    assert CacheSpec.from_config({**fields, "layer_types": ["mamba", "attention", "mamba"]}) == current


# -- tensor parallelism over all architectures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_shipped_config_gives_a_sane_spec(name, tp_size):
    spec = CacheSpec.from_config(shipped_fields(name), tp_size=tp_size)
    one = CacheSpec.from_config(shipped_fields(name))
    assert [layer.index for layer in spec.layers] == list(range(len(one.layers)))
    assert {layer.kind for layer in spec.layers} <= {"attention", "linear", "hybrid", "none"}
    assert spec.kv_bytes_per_token > 0
    assert spec.stored_state_bytes_per_layer >= spec.state_bytes_per_layer > 0
    assert spec.stored_state_bytes_per_layer % 128 == 0
    # A rank holds at least its share, and at most the whole.
    assert one.kv_bytes_per_token / tp_size <= spec.kv_bytes_per_token <= one.kv_bytes_per_token
    assert one.state_bytes / tp_size <= spec.state_bytes <= one.state_bytes
    if spec.state.recurrent_shape:
        assert prod(spec.state.recurrent_shape) * tp_size == prod(one.state.recurrent_shape)


def test_groups_and_latents_replicate():
    bamba = CacheSpec.from_config(shipped_fields("bamba_9b"), tp_size=4)
    assert bamba.state.conv_channels == 128 // 4 * 64 + 2 * 1 * 128
    assert bamba.state.recurrent_shape == (32, 64, 128)
    nemotron = CacheSpec.from_config(shipped_fields("nemotron_h_8b"), tp_size=16)
    assert nemotron.state.conv_channels == 128 // 16 * 64 + 2 * 1 * 128  # eight groups, one on each of sixteen ranks
    assert nemotron.attention.num_kv_heads == 1
    kimi = CacheSpec.from_config(shipped_fields("kimi_linear_48b_a3b"), tp_size=8)
    assert kimi.attention.bytes_per_token == (512 + 64) * 2
    assert kimi.state.recurrent_shape == (4, 128, 128)


# -- refusals ----------------------------------------------------------------------------------------------------------


def changed(model_type: str, **fields) -> dict:
    return {**WIDTHS, **TINY[model_type], "model_type": model_type, **fields}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, r"^model_type='llama': no supported hybrid architecture; choose one of qwen3_next, "),
        ({"model_type": "gpt_9"}, r"^model_type='gpt_9': "),
        ({"model_type": ["qwen3_next"]}, r"^model_type=\['qwen3_next'\]: no supported hybrid architecture"),
        ({"model_type": "qwen3_5", "text_config": None}, r"^hf_config='qwen3_5_text': lacks linear_num_key_heads, "),
        ({"model_type": "qwen3_5", "text_config": 3}, r"^hf_config='qwen3_5': Transformers refuses these fields, "),
        ({"model_type": "kimi_linear", "linear_attn_config": None}, r"^hf_config='kimi_linear': "),
        ({"hidden_size": 64}, r"^model_type=None: "),
        (changed("qwen3_next", linear_num_value_heads=0), r"^linear_num_value_heads=0: .*positive"),
        (changed("qwen3_next", linear_key_head_dim=-16), r"^linear_key_head_dim=-16: .*positive"),
        (changed("qwen3_next", num_key_value_heads=0), r"^num_key_value_heads=0: "),
        (changed("qwen3_next", head_dim=-1), r"^head_dim=-1: "),
        (changed("qwen3_next", linear_num_key_heads=3), r"^linear_num_key_heads=3: does not divide .*heads=4"),
        (
            changed("qwen3_next", num_key_value_heads=3),
            r"^num_key_value_heads=3: does not divide num_attention_heads=4",
        ),
        (changed("qwen3_next", linear_conv_kernel_dim=0), r"^linear_conv_kernel_dim=0: "),
        (changed("qwen3_next", layer_types=["sliding_attention"] * 4), r"^layer_types\[0\]='sliding_attention': "),
        (changed("qwen3_next", layer_types=["nonsense"] * 4), r"'qwen3_next': Transformers refuses .*layer_types"),
        (changed("qwen3_next", layer_types=[FULL]), r"'qwen3_next': Transformers refuses .*num_hidden_layers"),
        (
            changed("qwen3_next", linear_key_head_dim="wide"),
            r"'qwen3_next': Transformers refuses .*linear_key_head_dim",
        ),
        (changed("bamba", mamba_n_heads=0), r"'bamba': Transformers refuses these fields, "),
        (changed("bamba", mamba_n_groups=3), r"^mamba_n_groups=3: does not divide mamba_n_heads=8"),
        (changed("falcon_h1", mamba_n_heads=7), r"'falcon_h1': Transformers refuses these fields, "),
        (changed("jamba", mamba_d_state=0), r"^mamba_d_state=0: "),
        (changed("lfm2", conv_L_cache=0), r"^conv_L_cache=0: "),
        (changed("minimax", num_attention_heads=-4), r"^num_attention_heads=-4: "),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        CacheSpec.from_config(config)


def others(value) -> list:
    """Values that a field might hold instead."""
    if isinstance(value, int):
        return [2 * value, 3 * value, value // 2, value - 1, value + 1]
    if value and isinstance(value[0], int):
        return [[index + 1 for index in value], [index - 1 for index in value]]
    return [value[::-1], value[1:] + value[:1]]


def depends(fields: dict, name: str) -> bool:
    """Whether the caches are others with another value of the field."""
    for value in others(fields[name]):
        try:
            if CacheSpec.from_config({**fields, name: value}) != CacheSpec.from_config(fields):
                return True
        except UserError:
            continue
    return False


@pytest.mark.parametrize("model_type", TINY)
def test_a_mapping_without_a_field_of_the_caches_is_refused_by_name(model_type):
    """Transformers fills such a field with another model's value: a cache would be computed, of the wrong size."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    fields = changed(model_type)
    needed = [name for name in fields if name != "model_type" and depends(fields, name)]
    if model_type == "minimax":  # without it, the heads share the hidden size, in Transformers too
        needed.remove("head_dim")
        without = {key: value for key, value in fields.items() if key != "head_dim"}
        assert CacheSpec.from_config(without).attention.k_dim == fields["hidden_size"] // fields["num_attention_heads"]
    assert len(needed) >= 3
    refused_by_us = 0
    for name in needed:
        with pytest.raises(UserError) as refused:
            CacheSpec.from_config({key: value for key, value in fields.items() if key != name})
        told = str(refused.value)
        assert "\n" not in told
        if "Transformers refuses these fields, with its defaults for those that are not given" in told:
            continue  # the default does not go with the fields that are given
        makes_layers = name in ("layers_block_type", *LAYER_TYPES_FROM.get(model_type, ()))
        shown = "layer_types" if makes_layers else name
        assert re.match(rf"hf_config='{model_type}': lacks .*\b{shown}\b", told), told
        refused_by_us += 1
    assert refused_by_us >= 2
    unused = fields.keys() - {*needed, "model_type", "num_hidden_layers"}
    assert {"vocab_size", "bos_token_id"} <= unused
    rest = {key: value for key, value in fields.items() if key not in {"vocab_size", "bos_token_id", "eos_token_id"}}
    assert CacheSpec.from_config(rest) == CacheSpec.from_config(fields)


def test_a_mapping_of_nothing_names_all_that_is_missing():
    with pytest.raises(UserError) as refused:
        CacheSpec.from_config({"model_type": "qwen3_next"})
    assert str(refused.value) == (
        "hf_config='qwen3_next': lacks linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, "
        "linear_value_head_dim, linear_conv_kernel_dim, num_attention_heads, num_key_value_heads, head_dim, layer_types, "
        "num_hidden_layers; give every field that the caches depend on"
    )
    with pytest.raises(UserError, match=r"^hf_config='qwen3_5_text': lacks linear_num_key_heads, "):
        CacheSpec.from_config({**changed("qwen3_5_text"), "model_type": "qwen3_5"})  # fields belong in text_config
    fields = changed("qwen3_next", linear_num_key_heads=3)  # 3 does not divide the default, 32, which nobody gave
    del fields["linear_num_value_heads"]
    with pytest.raises(UserError, match=r"^hf_config='qwen3_next': lacks linear_num_value_heads; "):
        CacheSpec.from_config(fields)
    assert CacheSpec.from_config(transformers.Qwen3NextConfig())  # a config was checked by whoever made it


def test_other_names_of_fields_count_as_given():
    kimi = changed("kimi_linear")
    nested = {
        "head_dim": kimi.pop("linear_head_dim"),
        "num_heads": kimi.pop("linear_num_heads"),
        "short_conv_kernel_size": kimi.pop("linear_conv_kernel_dim"),
        "full_attn_layers": [5],
        "kda_layers": [1, 2, 3, 4],
    }
    del kimi["layer_types"]
    if "kimi_linear" in transformers.CONFIG_MAPPING:
        published = CacheSpec.from_config({**kimi, "linear_attn_config": nested})
        assert published == CacheSpec.from_config(changed("kimi_linear"))
        with pytest.raises(UserError, match=r"^hf_config='kimi_linear': lacks linear_num_heads; "):
            CacheSpec.from_config(
                {**kimi, "linear_attn_config": {key: value for key, value in nested.items() if key != "num_heads"}}
            )
    nemotron = changed("nemotron_h")
    older = {**nemotron, "mamba_n_groups": nemotron["n_groups"], "mamba_d_conv": nemotron["conv_kernel"]}
    del older["n_groups"], older["conv_kernel"]
    assert CacheSpec.from_config(older) == CacheSpec.from_config(nemotron)
    older["hybrid_override_pattern"] = "M-*E"
    del older["layers_block_type"]
    assert CacheSpec.from_config(older) == CacheSpec.from_config(nemotron)


def test_a_non_hybrid_transformers_config_is_refused():
    with pytest.raises(UserError, match=r"^model_type='llama': "):
        CacheSpec.from_config(transformers.LlamaConfig())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tp_size": 0}, r"^tp_size=0: "),
        ({"tp_size": -2}, r"^tp_size=-2: "),
        ({"tp_size": 2.0}, r"^tp_size=2.0: "),
        ({"tp_size": True}, r"^tp_size=True: "),
        ({"tp_size": 3}, r"^tp_size=3: does not divide linear_num_key_heads=16"),
        ({"tp_size": 32}, r"^tp_size=32: does not divide linear_num_key_heads=16"),
        ({"kv_dtype": "int4"}, r"^kv_dtype='int4': choose one of float64"),
        ({"state_dtype": torch.int8}, r"^state_dtype='torch.int8': "),
        ({"conv_dtype": "bf17"}, r"^conv_dtype='bf17': "),
    ],
)
def test_impossible_arguments_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        qwen(**kwargs)


def test_kv_heads_that_neither_divide_nor_replicate_are_refused():
    # 12 query heads over 3 KV heads: 2 ranks can't share 3 heads evenly, 6 can take half a head's queries each.
    fields = changed("lfm2", hidden_size=96, num_attention_heads=12, num_key_value_heads=3)
    with pytest.raises(UserError, match=r"^tp_size=2: neither divides nor is a multiple of num_key_value_heads=3"):
        CacheSpec.from_config(fields, tp_size=2)
    assert CacheSpec.from_config(fields, tp_size=6).attention.num_kv_heads == 1


def test_query_heads_must_divide():
    with pytest.raises(UserError, match=r"^tp_size=8: does not divide num_attention_heads=4"):
        CacheSpec.from_config(changed("lfm2"), tp_size=8)


# -- an architecture that the installed Transformers does not know -----------------------------------------------------


def test_a_mapping_is_read_as_it_is_where_transformers_is_too_old(monkeypatch):
    expected = CacheSpec.from_config(shipped_fields("kimi_linear_48b_a3b"))
    for module in ("architectures", "hf_config"):
        monkeypatch.setattr(f"hybridcache.spec.{module}.known_to_transformers", lambda model_type: False)
    fields = shipped_fields("kimi_linear_48b_a3b")
    assert CacheSpec.from_config(fields) == expected
    del fields["kv_lora_rank"]
    with pytest.raises(UserError, match=r"^kv_lora_rank=None: kimi_linear needs a positive integer"):
        CacheSpec.from_config(fields)
    with pytest.raises(UserError, match=r"^layer_types=.*: has 27 entries; give num_hidden_layers=26 of them"):
        CacheSpec.from_config({**shipped_fields("kimi_linear_48b_a3b"), "num_hidden_layers": 26})
    with pytest.raises(UserError, match=r"^model_type='kimi_linear': Transformers .* has no such model"):
        shipped_config("kimi_linear_48b_a3b")


# -- shipped configs and imports ---------------------------------------------------------------------------------------


def test_shipped_names_and_configs():
    assert {"tiny", "qwen3_next_8l", "qwen3_next_80b_a3b"} <= set(shipped_names())
    assert {shipped_fields(name)["model_type"].removesuffix("_text") for name in shipped_names()} == {
        model_type.removesuffix("_text") for model_type in ARCHITECTURES
    }
    config = shipped_config("qwen3_next_8l")
    assert (config.num_hidden_layers, config.vocab_size, config.num_experts) == (8, 151_936, 512)
    assert config.layer_types == [LINEAR, LINEAR, LINEAR, FULL] * 2
    assert config.rope_parameters["rope_theta"] == 1e7
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    with pytest.raises(UserError, match=r"^model='qwen4': choose one of .*qwen3_next_8l"):
        shipped_config("qwen4")


def test_text_config_passes_a_supported_config_through():
    config = tiny_config("jamba")
    assert text_config(config) is config


def test_accounting_imports_neither_torch_nor_transformers():
    code = (
        "import sys, hybridcache.spec.architectures, hybridcache.memory.geometry, hybridcache.spec;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SUBPROCESS_S
    )
    assert done.stdout.strip() == "[]"
