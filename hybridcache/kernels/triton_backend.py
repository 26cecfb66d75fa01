"""TritonBackend: every cache operation on CUDA.

The prefill operations run the torch backend's code for now, and say so: their launches are counted under
``gdn_prefill[torch]`` and ``paged_prefill[torch]``. Nothing falls back: a Triton kernel that fails to compile or to launch
raises.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from hybridcache.kernels.block_copy.triton import block_copy
from hybridcache.kernels.gdn_decode.triton import gdn_decode
from hybridcache.kernels.kv_store.triton import kv_store
from hybridcache.kernels.paged_decode.triton import paged_decode
from hybridcache.kernels.torch_backend import TorchBackend
from hybridcache.layout import AttentionLayout, StateLayout

IMPLEMENTATION = {
    "kv_store": "triton",
    "paged_decode": "triton",
    "paged_prefill": "torch",
    "gdn_decode": "triton",
    "gdn_prefill": "torch",
    "block_copy": "triton",
}
"""Which code runs each operation."""


class TritonBackend:
    """Triton kernels for decode, store and copy; torch for prefill. Kernels run on the buffer's device and on its current
    stream. All operations but ``block_copy`` and the prefills can be captured in a CUDA graph."""

    name = "triton"

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self._torch = TorchBackend()

    def describe(self) -> dict[str, str]:
        """Operation to implementation."""
        return dict(IMPLEMENTATION)

    def _count(self, operation: str) -> None:
        self.launches[f"{operation}[{IMPLEMENTATION[operation]}]"] += 1

    def kv_store(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        row_T: torch.Tensor,
        position_T: torch.Tensor,
    ) -> None:
        """See :class:`hybridcache.kernels.backend.Backend`."""
        with torch.cuda.device_of(buffer):
            kv_store(buffer, layout, layer, k_TKD, v_TKD, kv_table_BN, row_T, position_T)
        self._count("kv_store")

    def paged_decode(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_BHD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        context_len_B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`. Output of a padding row is 0."""
        with torch.cuda.device_of(buffer):
            out_BHD = paged_decode(buffer, layout, layer, q_BHD, kv_table_BN, context_len_B, scale)
        self._count("paged_decode")
        return out_BHD

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
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`."""
        out_THD = self._torch.paged_prefill(
            buffer, layout, layer, q_THD, kv_table_BN, cu_seqlens, context_len_B, scale, max_query_len, max_context_len
        )
        self._count("paged_prefill")
        return out_THD

    def gdn_decode(
        self,
        buffer: torch.Tensor,
        layout: StateLayout,
        layer: int,
        x_BC: torch.Tensor,
        conv_weight_CW: torch.Tensor,
        a_BV: torch.Tensor,
        b_BV: torch.Tensor,
        a_log_V: torch.Tensor,
        dt_bias_V: torch.Tensor,
        state_table_BL: torch.Tensor,
        position_B: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`. Output of a padding row is 0."""
        gates = (a_BV, b_BV, a_log_V, dt_bias_V)
        with torch.cuda.device_of(buffer):
            out_BVJ = gdn_decode(buffer, layout, layer, x_BC, conv_weight_CW, *gates, state_table_BL, position_B)
        self._count("gdn_decode")
        return out_BVJ

    def gdn_prefill(
        self,
        buffer: torch.Tensor,
        layout: StateLayout,
        layer: int,
        x_TC: torch.Tensor,
        conv_weight_CW: torch.Tensor,
        a_TV: torch.Tensor,
        b_TV: torch.Tensor,
        a_log_V: torch.Tensor,
        dt_bias_V: torch.Tensor,
        state_table_BL: torch.Tensor,
        cu_seqlens: torch.Tensor,
        start_B: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`."""
        gates = (a_TV, b_TV, a_log_V, dt_bias_V)
        out_TVJ = self._torch.gdn_prefill(
            buffer, layout, layer, x_TC, conv_weight_CW, *gates, state_table_BL, cu_seqlens, start_B
        )
        self._count("gdn_prefill")
        return out_TVJ

    def block_copy(self, buffer: torch.Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
        """See :class:`hybridcache.kernels.backend.Backend`."""
        with torch.cuda.device_of(buffer):
            moved = block_copy(buffer, moves)
        self._count("block_copy")
        return moved
