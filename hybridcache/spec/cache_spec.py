"""CacheSpec: what a model stores, layer by layer, in bytes.

Everything else (block geometry, strategies, layouts) is computed from a :class:`CacheSpec` alone; nothing downstream
looks at a model configuration. Sizes are those of one tensor-parallel rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hybridcache.spec.architectures import read_layers
from hybridcache.spec.layers import AttentionKV, LayerSpec, RecurrentState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheSpec:
    """The caches of one model on one tensor-parallel rank. Build it with :meth:`from_config`.

    All attention layers keep the same number of bytes per token, and all states are of the same shape: no supported
    architecture differs, and one block geometry could not serve it.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    tp_size: int = 1

    @classmethod
    def from_config(
        cls, hf_config: Any, kv_dtype: "str | torch.dtype" = "bfloat16", state_dtype: "str | torch.dtype" = "float32",
        tp_size: int = 1, conv_dtype: "str | torch.dtype | None" = None,
    ) -> "CacheSpec":  # fmt: skip
        """The caches of a Hugging Face model.

        Args:
            hf_config: a Transformers config, or a mapping of its fields with ``model_type``. Architectures:
                :data:`hybridcache.spec.architectures.ARCHITECTURES`.
            kv_dtype: element type of K and V.
            state_dtype: element type of the recurrent states.
            tp_size: tensor-parallel ranks; the sizes are those of one rank.
            conv_dtype: element type of the convolutions' inputs; ``kv_dtype`` where it is None, or bfloat16 where
                ``kv_dtype`` has one byte (nobody keeps them in fp8).

        Raises:
            UserError: the architecture is not a supported hybrid one, a field is impossible, or ``tp_size`` does not
                divide the heads.
        """
        model_type, layers = read_layers(hf_config, kv_dtype, state_dtype, tp_size, conv_dtype)
        return cls(model_type=model_type, layers=layers, tp_size=tp_size)

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Model layer indices of the layers with KV, ascending; their order numbers the *attention ordinals*."""
        return tuple(layer.index for layer in self.layers if layer.attention)

    @cached_property
    def state_layers(self) -> tuple[int, ...]:
        """Model layer indices of the layers with a state, ascending; their order numbers the *state ordinals*."""
        return tuple(layer.index for layer in self.layers if layer.state)

    @cached_property
    def attention(self) -> AttentionKV | None:
        return next((layer.attention for layer in self.layers if layer.attention), None)

    @cached_property
    def state(self) -> RecurrentState | None:
        return next((layer.state for layer in self.layers if layer.state), None)

    @cached_property
    def kv_bytes_per_token_per_layer(self) -> int:
        return self.attention.bytes_per_token if self.attention else 0

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """``t``: KV of one token in all attention layers."""
        return self.kv_bytes_per_token_per_layer * len(self.attention_layers)

    @cached_property
    def state_bytes_per_layer(self) -> int:
        """``s``: exact bytes of one layer's state."""
        return self.state.bytes if self.state else 0

    @cached_property
    def stored_state_bytes_per_layer(self) -> int:
        """``s`` with the conv ring's last column and alignment; what a physical layout allots."""
        return self.state.stored_bytes if self.state else 0

    @cached_property
    def state_bytes(self) -> int:
        """``S``: exact bytes of all layers' states of one request."""
        return self.state_bytes_per_layer * len(self.state_layers)

    def request_bytes(self, num_tokens: int) -> int:
        """Exact bytes of a request of ``num_tokens`` tokens: ``S + t * num_tokens``. No allocator can hold less."""
        return self.state_bytes + self.kv_bytes_per_token * num_tokens
