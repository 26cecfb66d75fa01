"""What the torch backend's tests share: pools full of NaN patterns, read by byte address, and tolerances by dtype."""

import torch

from hybridcache.spec.dtypes import torch_dtype

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def poisoned(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


def read(buffer: torch.Tensor, address: int, count: int, dtype: str) -> torch.Tensor:
    """``count`` elements from a byte address, as float64."""
    found = torch_dtype(dtype)
    return buffer[address : address + count * found.itemsize].clone().view(found).double()
