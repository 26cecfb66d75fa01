"""Operations in vectorised PyTorch, on any device. Those on caches read row lengths on the host: no CUDA graph holds them."""

import torch


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any of them is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
