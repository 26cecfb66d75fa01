"""Backend: one choice of kernels for every operation, and a pool's caches bound to it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.caches import cache_of
from hybridcache.kernels.operations import (
    ATTENTION,
    BLOCK_COPY,
    LAYER,
    STATE,
    AttentionOperations,
    LayerOperations,
    Operation,
    StateOperations,
    load,
)
from hybridcache.memory.layout import AttentionLayout, Layout, StateLayout
from hybridcache.spec.dtypes import dtype_name

PACKAGES = {
    "torch": ("torch", "pip install torch"),
    "triton": ("triton", "pip install triton"),
    "fa3": ("flash_attn_interface", "build hopper/ of Dao-AILab/flash-attention"),
}
"""What each attention backend imports, and how that is installed."""


@dataclass(frozen=True)
class Caches:
    """A pool's caches under one backend, by the ordinals of their layers."""

    backend: "Backend"
    buffer: Tensor
    layout: Layout
    attention: tuple[AttentionOperations, ...]
    states: tuple[StateOperations, ...]


class Backend(LayerOperations):
    """Every operation by the kernels of ``name`` (``torch`` or ``triton``), paged attention by those of ``attention``.

    The choice of Triton or Gluon follows from shapes, dtypes and device, so a run's choice is known before it starts. Nothing
    falls back: a kernel that fails to compile or to launch raises. Kernels run on the pool's device and current stream. The
    layers' operations on float64 are PyTorch's under every backend.
    """

    def __init__(self, name: str, attention: str = "auto") -> None:
        self._language = name
        self._attention = name if attention == "auto" else attention
        self.choice = {"backend": name, "attention_backend": self._attention}
        """What was asked for with every ``auto`` resolved."""
        self.name = name if self._attention == name else f"{name}+{attention}"
        self.launches: Counter[str] = Counter()
        """Calls by ``operation[implementation]``, for example ``{"paged_prefill[gluon]": 24}``."""
        self.fused = name == "triton"
        """Whether what layers compute between projections are fused kernels."""
        self.capturable = self._attention == name == "triton"
        """Whether a CUDA graph can hold a step: no operation reads the device from the host."""
        for operation, entry in LAYER.items():
            setattr(self, operation, self._layer_operation(operation, entry))
        self._copy = load(BLOCK_COPY.triton_module if self.fused else BLOCK_COPY.torch_module, "block_copy")

    def bind(self, buffer: Tensor, layout: Layout) -> Caches:
        """The caches of a pool, whose bytes are ``buffer``."""
        at = layout.attention, layout.state
        attention, states = ([self.bind_layer(buffer, kind, i) for i in range(len(kind.base))] for kind in at)
        return Caches(self, buffer, layout, tuple(attention), tuple(states))

    def bind_layer(self, buffer: Tensor, layout: AttentionLayout | StateLayout, layer: int) -> Any:
        """One layer's cache: :class:`AttentionOperations` or :class:`StateOperations`."""
        cache = cache_of(buffer, layout, layer, self.launches)
        entries = ATTENTION if isinstance(layout, AttentionLayout) else STATE
        return SimpleNamespace(**{name: self._cache_operation(name, entry, cache) for name, entry in entries.items()})

    def block_copy(self, buffer: Tensor, moves: Any) -> int:
        self.launches[f"block_copy[{self._language}]"] += 1
        if buffer.device.type != "cuda":
            return cast(int, self._copy(buffer, moves))
        with torch.cuda.device_of(buffer):
            return cast(int, self._copy(buffer, moves))

    def _layer_operation(self, operation: str, entry: Operation) -> Callable[..., Any]:
        exact = load(entry.torch_module, operation)
        if not self.fused:
            return exact
        fused = load(entry.triton_module, operation)
        return lambda x, *rest: (exact if x.dtype is torch.float64 else fused)(x, *rest)

    def _cache_operation(self, operation: str, entry: Operation, cache: Any) -> Callable[..., Any]:
        """The operation on one layer's cache: checked, counted and on the cache's device."""
        name = self._attention if entry.others else self._language
        run = load({"torch": entry.torch_module, "triton": entry.triton_module, **entry.others}[name], operation)
        two_kernels = entry.two_kernels and name == "triton"
        dtypes = entry.triton_dtypes if name == "triton" else ()
        label, launches, index = f"{operation}[{name}]", self.launches, cache.buffer.device.index

        def call(*args: Any, **options: Any) -> Any:
            launches[label] += 1
            return run(cache, *args, **options)

        def launch(*args: Any, **options: Any) -> Any:
            x = args[0]
            if dtypes and x.dtype not in dtypes:
                names = ", ".join(map(dtype_name, dtypes))
                fix = f"{operation} of backend=triton takes {names}; choose backend=torch"
                raise bad("dtype", dtype_name(x.dtype), fix)
            if index is None or index == torch.cuda.current_device():
                out = run(cache, *args, **options)
            else:
                with torch.cuda.device(index):
                    out = run(cache, *args, **options)
            if two_kernels:
                language, out = out
                launches[f"{operation}[{language}]"] += 1
            else:
                launches[label] += 1
            return out

        return call if name == "torch" and index is None else launch


def make_backend(name: str, device: str | torch.device, attention: str = "auto") -> Backend:
    """The backend of that name.

    Args:
        name: ``torch`` (any device), ``triton`` (CUDA), or ``auto``: triton on CUDA, torch elsewhere.
        attention: whose attention kernels: ``auto`` (the backend's own), ``torch``, ``triton`` or ``fa3``.

    Raises:
        UserError: an unknown name, one that needs CUDA on another device, or an attention backend that is not installed.
    """
    on_cuda = torch.device(device).type == "cuda"
    chosen = ("triton" if on_cuda else "torch") if name == "auto" else name
    if chosen not in ("torch", "triton"):
        raise bad("backend", name, "choose auto, torch or triton")
    if chosen == "triton" and not on_cuda:
        raise bad("backend", name, f"needs a CUDA device, not {device}; choose torch")
    if attention not in ("auto", chosen):
        _require_attention(attention, on_cuda, device)
    return Backend(chosen, attention)


def _require_attention(name: str, on_cuda: bool, device: str | torch.device) -> None:
    if name not in PACKAGES:
        raise bad("attention_backend", name, f"choose auto or one of {', '.join(PACKAGES)}")
    if name != "torch" and not on_cuda:
        raise bad("attention_backend", name, f"needs a CUDA device, not {device}; choose torch")
    state = attention_backends()[name]
    if state != "installed":
        module, install = PACKAGES[name]
        raise bad("attention_backend", name, f"{module} {state} ({install}); choose triton or torch")


def attention_backends() -> dict[str, str]:
    """Every attention backend's name, with ``installed`` or the reason why it is not."""
    return {name: _state(module) for name, (module, _) in PACKAGES.items()}


def _state(module: str) -> str:
    try:
        import_module(module)
    except ImportError as error:  # also a package that is there and does not load: a wrong CUDA version, for example
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        return "not installed" if absent else f"does not import: {error}"
    return "installed"
