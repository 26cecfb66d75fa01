"""Element types by name, with their sizes in bytes. No torch import: accounting does not need it."""

from functools import lru_cache
from typing import TYPE_CHECKING

from hybridcache.errors import bad

if TYPE_CHECKING:
    import torch

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}


@lru_cache
def dtype_name(dtype: "str | torch.dtype", field: str = "dtype") -> str:
    """Canonical name of an element type given as a string, an alias (``bf16``) or a torch dtype.

    Raises:
        UserError: the type is not one that a cache can hold.
    """
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in ITEMSIZE:
        raise bad(field, str(dtype), f"choose one of {', '.join(ITEMSIZE)}")
    return name


def itemsize(dtype: "str | torch.dtype") -> int:
    """Bytes of one element."""
    return ITEMSIZE[dtype_name(dtype)]


@lru_cache
def torch_dtype(dtype: "str | torch.dtype") -> "torch.dtype":
    """The torch dtype of that name."""
    import torch

    return getattr(torch, dtype_name(dtype))
