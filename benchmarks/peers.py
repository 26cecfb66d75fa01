"""Peers: other projects' kernels for the same operations, measured where they are installed and named where they are not.

``fla`` (package fla-core) keeps contiguous states and leaves the conv, and here also the gates, to others: its rows are of
the delta rule alone, with q and k repeated to the value heads beforehand. ``fa3`` reads the pool itself, through
:mod:`hybridcache.kernels.flash_attention_3`, an attention backend of the library.
"""

from importlib import import_module
from typing import Any

import torch

from benchmarks.case import Dims
from benchmarks.work import Implementation, Setup, worst
from hybridcache.kernels.testing import normal
from hybridcache.spec.dtypes import torch_dtype

MODULES = {"fla": "fla.ops.gated_delta_rule", "fa3": "flash_attn_interface"}
CHECKED_TOKENS = 256


def state(name: str) -> str:
    """``installed``, or why the peer is not measured."""
    try:
        import_module(MODULES[name])
    except ImportError as error:
        return f"not measured: {error}"
    return "installed"


def states() -> dict[str, str]:
    """Every peer's state."""
    return {name: state(name) for name in MODULES}


def delta_rule(
    q_BTVI: torch.Tensor, k_BTVI: torch.Tensor, v_BTVJ: torch.Tensor, g_BTV: torch.Tensor, beta_BTV: torch.Tensor,
    state_BVIJ: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Reference of the gated delta rule with normalised q and k, one token after the other, in float64. ``g`` is the
    logarithm of the decay."""

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x.double() * torch.rsqrt((x.double() ** 2).sum(-1, keepdim=True) + 1e-6)

    q, k, v, s = unit(q_BTVI) * q_BTVI.shape[-1] ** -0.5, unit(k_BTVI), v_BTVJ.double(), state_BVIJ.double()
    outs = []
    for t in range(q.shape[1]):
        s = s * g_BTV[:, t].double().exp()[..., None, None]
        delta = (v[:, t] - torch.einsum("bvi,bvij->bvj", k[:, t], s)) * beta_BTV[:, t].double()[..., None]
        s = s + k[:, t, :, :, None] * delta[..., None, :]
        outs.append(torch.einsum("bvi,bvij->bvj", q[:, t], s))
    return torch.stack(outs, dim=1)


def fla(dims: Dims, rows: int, tokens: int, state_dtype: str, sets: int, setup: Setup) -> Implementation:
    """``fused_recurrent_gated_delta_rule`` of one token per row, its new state going to memory of its own, or
    ``chunk_gated_delta_rule`` of rows of one length, without ``cu_seqlens``; a state for every set."""
    module, generator = import_module(MODULES["fla"]), setup.generator()
    operation = module.fused_recurrent_gated_delta_rule if tokens == 1 else module.chunk_gated_delta_rule

    def draw(*shape: int) -> torch.Tensor:
        return normal(generator, shape, setup.device, "bfloat16")

    heads, dim = dims.v_heads, dims.state_dim
    q, k, v = (draw(rows, tokens, heads, dim) for _ in range(3))
    g = -torch.rand(rows, tokens, heads, generator=generator).to(setup.device) * 0.1
    inputs: list[Any] = [q, k, v, g, draw(rows, tokens, heads).sigmoid()]
    stored = [(draw(rows, heads, dim, dim) * 0.1).to(torch_dtype(state_dtype)) for _ in range(sets)]

    def run(i: int) -> torch.Tensor:
        options = {"initial_state": stored[i], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return operation(*inputs, **options)[0]

    def error() -> float:
        first = [*(x[:1, :CHECKED_TOKENS] for x in inputs), stored[0][:1]]
        return worst([(run(0)[:1, :CHECKED_TOKENS], delta_rule(*first))])

    return Implementation(run, error)
