"""Mixture of experts on CUDA: experts of few tokens are read row by row, those of many multiplied in tiles."""

import torch
from torch import Tensor

from hybridcache.kernels.moe import few_tokens, tiled
from hybridcache.kernels.torch_ops import layers


def mixture(x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, *matrices: Tensor) -> Tensor:
    """See :meth:`.LayerOperations.mixture`. Products in Triton take bfloat16; other dtypes do as
    PyTorch does."""
    if x_TD.dtype != torch.bfloat16:
        return layers.mixture(x_TD, weight_Ts, expert_Tk, *matrices)
    _, down_EDI, _, shared_down_DJ = matrices
    few = shared_down_DJ.shape[1] == down_EDI.shape[2] and x_TD.shape[0] <= few_tokens.MAX_TOKENS
    return (few_tokens if few else tiled).mixture(x_TD, weight_Ts, expert_Tk, *matrices)
