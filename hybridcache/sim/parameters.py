"""ModelParameters: how many weights a model has, and how many of them a token or a step touches.

The counts are taken from the model that Transformers would build, on torch's meta device: no memory, a fraction of a
second, and right for every architecture that it knows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hybridcache.errors import bad


@dataclass(frozen=True)
class ModelParameters:
    """Numbers of weights, and the widths that attention and communication cost depends on."""

    dense: int
    """Weights that every token uses, but for the embedding and the output head (a block that layers share counts once for
    every use, because every use reads it)."""
    head: int
    """Output head; used by tokens that are sampled from."""
    stored: int
    """All weights in memory, each once."""
    num_experts: int
    """Routed experts of one layer; 0 without."""
    experts_per_token: int
    expert: int
    """One routed expert of one layer."""
    expert_layers: int
    """Layers with routed experts."""
    num_layers: int
    hidden_size: int
    num_query_heads: int

    @property
    def active(self) -> int:
        """Weights that one sampled token uses."""
        return self.dense + self.head + self.experts_per_token * self.expert * self.expert_layers

    @classmethod
    def from_config(cls, hf_config: Any) -> "ModelParameters":
        """Count the weights of a causal language model.

        Args:
            hf_config: a Transformers config, or a mapping of its fields with ``model_type``.

        Raises:
            UserError: an unsupported or incomplete config, or one that Transformers cannot build a model from.
        """
        if isinstance(hf_config, Mapping):
            return _of_fields(json.dumps(dict(hf_config), sort_keys=True))
        # torch and transformers are needed here alone; accounting and simulation by hand-given counts go without.
        import torch
        from transformers import AutoModelForCausalLM

        from hybridcache.spec.architectures import text_config

        config = text_config(hf_config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise bad("hf_config", config.model_type, f"Transformers cannot build this model: {reason}") from error
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        experts, dense = [], 0
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight is embedding or weight is head:
                continue
            if ".experts." in name:
                experts.append((name.split(".experts.")[0], weight))
            else:
                dense += weight.numel()
        expert_layers = len({layer for layer, _ in experts})
        num_experts = experts[0][1].shape[0] if experts else 0
        if any(weight.dim() < 2 or weight.shape[0] != num_experts for _, weight in experts):
            raise bad("hf_config", config.model_type, "experts are not stacked alike; give ModelParameters by hand")
        return cls(
            dense=dense, head=head.numel(), stored=sum(weight.numel() for weight in model.parameters()),
            num_experts=num_experts, experts_per_token=config.num_experts_per_tok if experts else 0,
            expert=sum(weight.numel() for _, weight in experts) // (num_experts * expert_layers) if experts else 0,
            expert_layers=expert_layers, num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
            num_query_heads=config.num_attention_heads,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _of_fields(fields: str) -> ModelParameters:
    """Of a mapping as JSON: a run asks several times for one model, and building it takes a second."""
    from hybridcache.spec.architectures import text_config

    return ModelParameters.from_config(text_config(json.loads(fields)))
