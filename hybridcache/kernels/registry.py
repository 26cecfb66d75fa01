"""Registry of attention backends: whose kernels read the paged KV cache.

Every other operation stays with the backend (``torch`` or ``triton``). An optional one is imported when it is chosen and
not before; :func:`attention_backends` says which are here.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend
from hybridcache.memory.layout import AttentionLayout


class Attention(Protocol):
    """The operations that an attention backend provides; see :class:`hybridcache.kernels.backend.Backend`."""

    launches: Counter[str]

    def paged_decode(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_BHD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        context_len_B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor: ...

    def paged_prefill(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_THD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        cu_seqlens: torch.Tensor,
        context_len_B: torch.Tensor,
        scale: float,
        max_query_len: int,
        max_context_len: int,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Entry:
    """One choice: the module it needs beyond this project's, and how it is built from that module."""

    build: Callable[[Any], Attention]
    module: str
    install: str
    needs_cuda: bool = True


def _torch(_: Any) -> Attention:
    from hybridcache.kernels.torch_backend import TorchBackend

    return TorchBackend()


def _triton(_: Any) -> Attention:
    from hybridcache.kernels.triton_backend import TritonBackend

    return TritonBackend()


def _fa3(module: Any) -> Attention:
    from hybridcache.kernels.flash_attention_3 import FlashAttention3

    return FlashAttention3(module)


ENTRIES = {
    "torch": Entry(_torch, "torch", "pip install torch", needs_cuda=False),
    "triton": Entry(_triton, "triton", "pip install triton"),
    "fa3": Entry(_fa3, "flash_attn_interface", "build hopper/ of Dao-AILab/flash-attention"),
}


def attention_backends() -> dict[str, str]:
    """Every attention backend's name, with ``installed`` or the reason why it is not."""
    return {name: _load(entry)[1] for name, entry in ENTRIES.items()}


def _load(entry: Entry) -> tuple[Any, str]:
    try:
        return import_module(entry.module), "installed"
    except ImportError as error:  # also a package that is there and does not load: a wrong CUDA version, for example
        absent = isinstance(error, ModuleNotFoundError) and error.name == entry.module
        return None, "not installed" if absent else f"does not import: {error}"


def make_attention(name: str, device: str | torch.device) -> Attention:
    """The attention backend of that name.

    Raises:
        UserError: an unknown name, one that is not installed here, or one that needs CUDA on another device.
    """
    entry = ENTRIES.get(name)
    if entry is None:
        raise bad("attention_backend", name, f"choose auto or one of {', '.join(ENTRIES)}")
    if entry.needs_cuda and torch.device(device).type != "cuda":
        raise bad("attention_backend", name, f"needs a CUDA device, not {device}; choose torch")
    module, state = _load(entry)
    if module is None:
        raise bad("attention_backend", name, f"{entry.module} {state} ({entry.install}); choose triton or torch")
    return entry.build(module)


class WithAttention:
    """A backend whose attention is another's; every other operation is ``base``'s. Launches of both are counted together."""

    def __init__(self, base: Backend, attention: Attention, attention_name: str) -> None:
        self.base, self.attention = base, attention
        self.name = f"{base.name}+{attention_name}"
        self.launches = attention.launches = base.launches
        self.paged_decode, self.paged_prefill = attention.paged_decode, attention.paged_prefill

    def __getattr__(self, operation: str) -> Any:
        return getattr(self.base, operation)


def with_attention(base: Backend, name: str, device: str | torch.device) -> Backend:
    """``base`` with the attention of that name; ``auto`` and the base's own name leave it as it is.

    Raises:
        UserError: see :func:`make_attention`.
    """
    if name in ("auto", base.name):
        return base
    return cast(Backend, WithAttention(base, make_attention(name, device), name))
