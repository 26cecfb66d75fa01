"""Qwen3-Next, whole: embedding, hybrid decoder layers, final norm, language model head.

The model keeps weights only. K, V and recurrent states live in a pool, which the layers reach through the operations of its
:class:`~hybridcache.kernels.backend.Caches`.

Shapes: T tokens of the step, R tokens whose logits are wanted, D hidden, V vocabulary.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3NextConfig

from hybridcache.kernels.backend import Caches
from hybridcache.kernels.batch import StepBatch
from hybridcache.spec.dtypes import dtype_name
from models.layers.moe import MLP, SparseMoe
from models.layers.norms import RMSNorm
from models.layers.parameters import Slot, Slots, parameter
from models.layers.rotary import Rotary
from models.layers.step import Step
from models.qwen3_next.attention import Attention
from models.qwen3_next.config import check_config
from models.qwen3_next.linear_attention import LinearAttention
from models.qwen3_next.workspace import scratch_bytes


def has_experts(config: Qwen3NextConfig, index: int) -> bool:
    """Whether that layer's MLP is a mixture of experts (Transformers' rule)."""
    return (
        index not in config.mlp_only_layers and config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
    )


class DecoderLayer(nn.Module):
    """Token mixer (full or linear attention), then MLP or experts, each behind a norm and added to the stream."""

    def __init__(self, config: Qwen3NextConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        kind = config.layer_types[index]
        ordinal = config.layer_types[:index].count(kind)
        self.mixer_name = "self_attn" if kind == "full_attention" else "linear_attn"
        self.mixer: Attention | LinearAttention
        if kind == "full_attention":
            self.mixer = Attention(config, ordinal, dtype, device)
        else:
            self.mixer = LinearAttention(config, ordinal, dtype, device)
        self.mlp: SparseMoe | MLP
        if has_experts(config, index):
            self.mlp = SparseMoe(config, dtype, device)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype, device)
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Takes the stream and what is still to be added to it, None for nothing, and returns the same: the addition is
        part of the norm behind it."""
        backend, mixer_norm, mlp_norm = step.backend, self.mixer_norm, self.mlp_norm
        x_TD, normed_TD = backend.add_norm(x_TD, delta_TD, mixer_norm.weight, mixer_norm.eps)
        x_TD, normed_TD = backend.add_norm(x_TD, self.mixer(normed_TD, step), mlp_norm.weight, mlp_norm.eps)
        return x_TD, self.mlp(normed_TD, backend)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield from self.mixer_norm.slots(f"{prefix}input_layernorm.", names)
        yield from self.mixer.slots(f"{prefix}{self.mixer_name}.", names)
        yield from self.mlp_norm.slots(f"{prefix}post_attention_layernorm.", names)
        yield from self.mlp.slots(f"{prefix}mlp.", names)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for module in (self.mixer_norm, self.mixer, self.mlp_norm, self.mlp):
            module.init_weights(std, generator)


class Qwen3Next(nn.Module):
    """The model. Make one with :mod:`models.registry`.

    Args:
        config: Transformers' config.
        dtype: of weights and activations. Norms, softmax and gates are float32, or float64 with float64.
        device: where the weights are allocated, uninitialised.

    Raises:
        UserError: a config that this would compute wrongly.
    """

    def __init__(self, config: Qwen3NextConfig, dtype: torch.dtype, device: torch.device) -> None:
        check_config(config)
        super().__init__()
        self.config = config
        self.embedding = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.rotary = Rotary(config, dtype, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, dtype, device) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def waits(self) -> str | None:
        """Why a forward pass waits for the device; None where it does not."""
        if self.dtype == torch.bfloat16 or not any(has_experts(self.config, i) for i in range(len(self.layers))):
            return None
        return f"experts in dtype={dtype_name(self.dtype)} are counted on the host; choose bfloat16"

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        """Upper bound of what a forward pass holds at once; see :func:`.workspace.scratch_bytes`."""
        return scratch_bytes(self.config, self.dtype, tokens, rows, prefilling)

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        """One step: the tokens' K, V and states go into the caches. Returns logits ``[R, V]`` of the tokens that
        ``batch.logit_index_R`` names, in the model's dtype."""
        step = Step(batch, caches, self.rotary(batch.position_T))
        x_TD, delta_TD = F.embedding(batch.token_ids_T, self.embedding), None
        for layer in self.layers:
            x_TD, delta_TD = layer(x_TD, delta_TD, step)
        if batch.logit_index_R is not None:
            x_TD = x_TD[batch.logit_index_R]
            delta_TD = None if delta_TD is None else delta_TD[batch.logit_index_R]
        _, normed_RD = caches.backend.add_norm(x_TD, delta_TD, self.norm.weight, self.norm.eps)
        return F.linear(normed_RD, self.head)

    def slots(self, names: Container[str]) -> Slots:
        """Slots of all checkpoint tensors, by the published names."""
        yield "model.embed_tokens.weight", Slot.of(self.embedding)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.slots(f"model.layers.{index}.", names)
        yield from self.norm.slots("model.norm.", names)
        if self.head is not self.embedding:
            yield "lm_head.weight", Slot.of(self.head)

    def init_weights(self, seed: int) -> None:
        """Random weights as Transformers would draw them for a new model, drawn on the model's device."""
        std = self.config.initializer_range
        generator = torch.Generator(self.device).manual_seed(seed)
        self.embedding.normal_(0.0, std, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.init_weights(std, generator)
        self.norm.init_weights(std, generator)
        if self.head is not self.embedding:
            self.head.normal_(0.0, std, generator=generator)
