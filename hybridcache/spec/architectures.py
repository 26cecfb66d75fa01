"""Architectures: reading from a Transformers config what each layer of the model caches.

One function per architecture or family reads the config's fields; :data:`ARCHITECTURES` maps a ``model_type`` to its
function. The shapes are those of Transformers 5.23's modelling files, except that a convolution is counted with the
``kernel - 1`` inputs it needs (Transformers keeps ``kernel``).

Tensor parallelism divides query heads, state heads and conv channels, which must divide evenly. KV heads and the B/C
groups of Mamba-2 divide too, and replicate where there are fewer of them than ranks, at least one per rank. The latent
of multi-head latent attention is the same on every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hybridcache.errors import bad, whole
from hybridcache.spec.dtypes import dtype_name, itemsize
from hybridcache.spec.hf_config import Fields, given_fields, known_to_transformers, transformers_config
from hybridcache.spec.layers import AttentionKV, LayerSpec, RecurrentState

if TYPE_CHECKING:
    import torch

LAYER_KINDS = {
    **dict.fromkeys(("full_attention", "attention"), (True, False)),
    **dict.fromkeys(("linear_attention", "mamba", "conv"), (False, True)),
    "hybrid": (True, True),
    **dict.fromkeys(("mlp", "moe"), (False, False)),
}
"""Layer type in a config (current and older names) -> whether such a layer keeps KV, and whether it keeps a state."""


@dataclass(frozen=True)
class Dtypes:
    """Canonical element type names of the three kinds of cached tensors."""

    kv: str
    recurrent: str
    conv: str


@dataclass(frozen=True)
class Caches:
    """The cache of each attention layer and of each state layer of a model on one rank, and the type of every layer."""

    attention: AttentionKV
    state: RecurrentState
    layer_types: Sequence[str]


def read_layers(
    hf_config: Any, kv_dtype: "str | torch.dtype", state_dtype: "str | torch.dtype", tp_size: int,
    conv_dtype: "str | torch.dtype | None",
) -> tuple[str, tuple[LayerSpec, ...]]:  # fmt: skip
    """Read the model type and the caches of every layer; see :meth:`hybridcache.spec.CacheSpec.from_config`."""
    kv = dtype_name(kv_dtype, "kv_dtype")
    conv = kv if itemsize(kv) > 1 else "bfloat16"
    if conv_dtype is not None:
        conv = dtype_name(conv_dtype, "conv_dtype")
    whole("tp_size", tp_size, fix="give the number of tensor-parallel ranks, 1 or more")
    config = text_config(hf_config)
    dtypes = Dtypes(kv=kv, recurrent=dtype_name(state_dtype, "state_dtype"), conv=conv)
    fields = Fields(config, given_fields(hf_config, config))
    try:
        caches = ARCHITECTURES[config.model_type](fields, tp_size, dtypes)
    finally:  # also after an error: a field that was not given explains it better
        fields.require_given()
    layers = []
    for index, kind in enumerate(caches.layer_types):
        if kind not in LAYER_KINDS:
            raise bad(f"layer_types[{index}]", kind, f"choose one of {', '.join(LAYER_KINDS)}")
        has_kv, has_state = LAYER_KINDS[kind]
        layers.append(LayerSpec(index, caches.attention if has_kv else None, caches.state if has_state else None))
    return config.model_type, tuple(layers)


def text_config(hf_config: Any) -> Any:
    """Return the config of the text decoder, after checking that its architecture is supported.

    Args:
        hf_config: a Transformers config (of a composite one, the text part is returned), or a mapping of its fields
            with ``model_type``. If the installed Transformers does not know the architecture, the mapping's fields are
            read as they are.

    Raises:
        UserError: no ``model_type``, an unsupported one, or fields that Transformers refuses.
    """
    if isinstance(hf_config, Mapping):
        hf_config = _config_from_mapping(hf_config)
    if hasattr(hf_config, "get_text_config"):
        hf_config = hf_config.get_text_config(decoder=True)
    _require_supported(getattr(hf_config, "model_type", None))
    return hf_config


def _config_from_mapping(fields: Mapping[str, Any]) -> Any:
    _require_supported(fields.get("model_type"))
    if known_to_transformers(fields["model_type"]):
        return transformers_config(fields)
    return SimpleNamespace(**{**fields, **fields.get("text_config", {})})


def _require_supported(model_type: str | None) -> None:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise bad("model_type", model_type, f"no supported hybrid architecture; choose one of {supported}")


# -- reading fields ----------------------------------------------------------------------------------------------------


def _positive(config: Fields, field: str) -> int:
    return whole(field, getattr(config, field, None), fix=f"{config.model_type} needs a positive integer")


def _divide(field: str, value: int, tp_size: int) -> int:
    """One rank's share of a number that ``tp_size`` must divide."""
    if value % tp_size:
        raise bad("tp_size", tp_size, f"does not divide {field}={value}; choose a divisor of it")
    return value // tp_size


def _divide_or_replicate(field: str, value: int, tp_size: int) -> int:
    """One rank's share of a number of heads or groups, which are replicated where there are fewer of them than ranks."""
    if value % tp_size and tp_size % value:
        raise bad("tp_size", tp_size, f"neither divides nor is a multiple of {field}={value}; choose one that is")
    return max(value // tp_size, 1)


def _layer_types(config: Fields) -> Sequence[str]:
    layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not layer_types:
        raise bad("layer_types", layer_types, f"{config.model_type} needs one layer type per layer")
    depth = getattr(config, "num_hidden_layers", None)
    if depth is not None and len(layer_types) != depth:
        raise bad("layer_types", layer_types, f"has {len(layer_types)} entries; give num_hidden_layers={depth} of them")
    return layer_types


def _head_dim(config: Fields) -> int:
    if getattr(config, "head_dim", None) is not None:
        return _positive(config, "head_dim")
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    if hidden % heads:
        raise bad("num_attention_heads", heads, f"does not divide hidden_size={hidden}; give head_dim")
    return hidden // heads


def _attention(config: Fields, tp_size: int, dtypes: Dtypes, head_dim: int | None = None) -> AttentionKV:
    """Grouped-query attention keeps K and V of every KV head."""
    heads, kv_heads = _positive(config, "num_attention_heads"), _positive(config, "num_key_value_heads")
    if heads % kv_heads:
        raise bad("num_key_value_heads", kv_heads, f"does not divide num_attention_heads={heads}")
    _divide("num_attention_heads", heads, tp_size)
    dim = head_dim or _head_dim(config)
    return AttentionKV(_divide_or_replicate("num_key_value_heads", kv_heads, tp_size), dim, dim, dtypes.kv)


def _state(shape: tuple[int, ...], channels: int, kernel: int, dtypes: Dtypes) -> RecurrentState:
    return RecurrentState(shape, dtypes.recurrent, channels, kernel, dtypes.conv)


# -- architectures -----------------------------------------------------------------------------------------------------


def _gated_delta_net(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Qwen3-Next, Qwen3.5 and OLMo-Hybrid keep ``[value head, key dim, value dim]`` and one convolution over q, k and v."""
    key_heads, value_heads = _positive(config, "linear_num_key_heads"), _positive(config, "linear_num_value_heads")
    if value_heads % key_heads:
        raise bad("linear_num_key_heads", key_heads, f"does not divide linear_num_value_heads={value_heads}")
    key_heads = _divide("linear_num_key_heads", key_heads, tp_size)
    value_heads = _divide("linear_num_value_heads", value_heads, tp_size)
    key_dim, value_dim = _positive(config, "linear_key_head_dim"), _positive(config, "linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    kernel = _positive(config, "linear_conv_kernel_dim")
    state = _state((value_heads, key_dim, value_dim), channels, kernel, dtypes)
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


def _kimi_delta_attention(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Kimi Linear has as many key as value heads in its delta attention; MLA layers keep one latent and one rotary key."""
    _divide("num_attention_heads", _positive(config, "num_attention_heads"), tp_size)
    latent = _positive(config, "kv_lora_rank") + _positive(config, "qk_rope_head_dim")
    heads = _divide("linear_num_heads", _positive(config, "linear_num_heads"), tp_size)
    dim = _positive(config, "linear_head_dim")
    state = _state((heads, dim, dim), 3 * heads * dim, _positive(config, "linear_conv_kernel_dim"), dtypes)
    return Caches(AttentionKV(1, latent, 0, dtypes.kv), state, _layer_types(config))


def _expanded_width(config: Fields) -> int:
    return _positive(config, "mamba_expand") * _positive(config, "hidden_size")


BAMBA_FIELDS = ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
"""Fields of heads, groups, state dim and convolution kernel; below those of other families."""
NEMOTRON_FIELDS = ("mamba_num_heads", "n_groups", "ssm_state_size", "conv_kernel")
ZAMBA_FIELDS = ("n_mamba_heads", "mamba_ngroups", "mamba_d_state", "mamba_d_conv")


def _mamba2_state(
    config: Fields, tp_size: int, dtypes: Dtypes, fields: tuple[str, str, str, str], head_dim: int | None = None
) -> RecurrentState:
    """Mamba-2 keeps ``[head, head dim, state dim]`` and one convolution over x, B and C. Without ``head_dim`` the heads
    share the width ``mamba_d_ssm`` where that is given, ``mamba_expand`` times the hidden size elsewhere."""
    heads, groups, state_dim, kernel = fields
    num_heads, num_groups = _positive(config, heads), _positive(config, groups)
    if head_dim is None:
        given = getattr(config, "mamba_d_ssm", None) is not None
        width = _positive(config, "mamba_d_ssm") if given else _expanded_width(config)
        if width % num_heads:
            raise bad(heads, num_heads, f"does not divide the Mamba width {width}")
        head_dim = width // num_heads
    if num_heads % num_groups:
        raise bad(groups, num_groups, f"does not divide {heads}={num_heads}")
    num_heads = _divide(heads, num_heads, tp_size)
    num_groups = _divide_or_replicate(groups, num_groups, tp_size)
    state_size = _positive(config, state_dim)
    channels = num_heads * head_dim + 2 * num_groups * state_size
    return _state((num_heads, head_dim, state_size), channels, _positive(config, kernel), dtypes)


def _bamba(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Bamba and Granite 4.0 hybrid have Mamba-2 or attention in every layer."""
    state = _mamba2_state(config, tp_size, dtypes, BAMBA_FIELDS)
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


def _falcon_h1(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Falcon-H1 has Mamba-2 and attention side by side in every layer (older Transformers call them "attention")."""
    state = _mamba2_state(config, tp_size, dtypes, BAMBA_FIELDS)
    return Caches(_attention(config, tp_size, dtypes), state, ["hybrid"] * _positive(config, "num_hidden_layers"))


def _nemotron_h(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Nemotron-H has one of Mamba-2, attention, MLP or experts in every layer; the last two keep nothing."""
    state = _mamba2_state(config, tp_size, dtypes, NEMOTRON_FIELDS, _positive(config, "mamba_head_dim"))
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


def _zamba2(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Zamba2 has Mamba-2 in every layer. Hybrid layers add attention, whose weights are shared but not its KV, and whose
    heads together span twice the hidden size."""
    state = _mamba2_state(config, tp_size, dtypes, ZAMBA_FIELDS)
    head_dim = 2 * _positive(config, "hidden_size") // _positive(config, "num_attention_heads")
    return Caches(_attention(config, tp_size, dtypes, head_dim), state, _layer_types(config))


def _jamba(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """Jamba's Mamba-1 keeps ``[channel, state dim]`` and a convolution over the same channels."""
    channels = _divide("the Mamba channels", _expanded_width(config), tp_size)
    state = _state((channels, _positive(config, "mamba_d_state")), channels, _positive(config, "mamba_d_conv"), dtypes)
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


def _lfm2(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """LFM2 has short convolutions over the hidden size and no recurrent part."""
    channels = _divide("hidden_size", _positive(config, "hidden_size"), tp_size)
    state = _state((), channels, _positive(config, "conv_L_cache"), dtypes)
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


def _minimax(config: Fields, tp_size: int, dtypes: Dtypes) -> Caches:
    """MiniMax's lightning attention keeps ``[query head, key dim, value dim]`` and has no convolution."""
    heads, dim = _divide("num_attention_heads", _positive(config, "num_attention_heads"), tp_size), _head_dim(config)
    state = _state((heads, dim, dim), 0, 0, dtypes)
    return Caches(_attention(config, tp_size, dtypes), state, _layer_types(config))


ARCHITECTURES: dict[str, Callable[[Fields, int, Dtypes], Caches]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _gated_delta_net),
    "olmo_hybrid": _gated_delta_net,
    "kimi_linear": _kimi_delta_attention,
    "bamba": _bamba,
    "granitemoehybrid": _bamba,
    "falcon_h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
    "zamba2": _zamba2,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "minimax": _minimax,
}
"""``model_type`` -> the function that reads its config."""
