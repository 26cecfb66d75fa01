"""TritonBackend: every cache operation on CUDA.

Paged prefill, GDN decode and GDN prefill (its launch over states) have two kernels each: one in Gluon for Hopper, counted as
``paged_prefill[gluon]``, ``gdn_decode[gluon]`` and ``gdn_prefill[gluon]``, and one for other devices, for what the first cannot
do and for shapes where it is the slower one, counted as ``[triton]``. Shapes, dtypes and the device choose, so a run's choice
is known before it starts; nothing falls back: a kernel that fails to compile or to launch raises.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch

from hybridcache.errors import bad
from hybridcache.kernels.block_copy.triton import block_copy
from hybridcache.kernels.gdn_decode.staging import Staging
from hybridcache.kernels.gdn_decode.triton import gdn_decode
from hybridcache.kernels.gdn_decode.tuning import choose
from hybridcache.kernels.gdn_prefill import tiles as prefill_tiles
from hybridcache.kernels.gdn_prefill.triton import gdn_prefill
from hybridcache.kernels.kv_store.triton import kv_store
from hybridcache.kernels.paged_decode.triton import paged_decode
from hybridcache.kernels.paged_prefill import hopper, triton
from hybridcache.kernels.paged_prefill.tiles import choose_ring
from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store
from hybridcache.memory.layout import AttentionLayout, StateLayout
from hybridcache.spec.dtypes import dtype_name

IMPLEMENTATION = {
    "kv_store": "triton",
    "qk_norm_rope_store": "triton",
    "paged_decode": "triton",
    "paged_prefill": "triton",
    "gdn_decode": "triton",
    "gdn_prefill": "triton",
    "block_copy": "triton",
}
"""Which language's kernels run each operation; Gluon is Triton's own."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations."""


def check_dtype(operation: str, x: torch.Tensor) -> None:
    """Raises UserError for a dtype that Triton does not compute in."""
    if x.dtype not in DTYPES:
        raise bad(
            "dtype",
            dtype_name(x.dtype),
            f"{operation} of backend=triton takes {', '.join(map(dtype_name, DTYPES))}; choose backend=torch",
        )


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device's compute capability is 9.x."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


class TritonBackend:
    """Kernels run on the buffer's device and on its current stream. All operations but ``block_copy`` can be captured in a
    CUDA graph. Attention and prefill refuse float64, in which the torch backend computes."""

    name = "triton"

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def describe(self) -> dict[str, str]:
        """Operation to implementation."""
        return dict(IMPLEMENTATION)

    def _count(self, operation: str, implementation: str = "triton") -> None:
        self.launches[f"{operation}[{implementation}]"] += 1

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

    def qk_norm_rope_store(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        q_weight_D: torch.Tensor,
        k_weight_D: torch.Tensor,
        eps: float,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        kv_table_BN: torch.Tensor,
        row_T: torch.Tensor,
        position_T: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`. Takes float64 too."""
        norms = (q_weight_D, k_weight_D, eps, cos_TP, sin_TP)
        tables = (kv_table_BN, row_T, position_T)
        with torch.cuda.device_of(buffer):
            out_THD = qk_norm_rope_store(buffer, layout, layer, q_THD, k_TKD, v_TKD, *norms, *tables)
        self._count("qk_norm_rope_store")
        return out_THD

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
        check_dtype("paged_decode", q_BHD)
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
        """See :class:`hybridcache.kernels.backend.Backend`. Output of padding rows, and behind the last row, is 0."""
        check_dtype("paged_prefill", q_THD)
        on_hopper = is_hopper(buffer.device) and choose_ring(layout, layer, q_THD) is not None
        operation = hopper.paged_prefill if on_hopper else triton.paged_prefill
        lengths = (cu_seqlens, context_len_B, scale, max_query_len, max_context_len)
        with torch.cuda.device_of(buffer):
            out_THD = operation(buffer, layout, layer, q_THD, kv_table_BN, *lengths)
        self._count("paged_prefill", "gluon" if on_hopper else "triton")
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
        gates, tuning = (a_BV, b_BV, a_log_V, dt_bias_V), choose(layout, x_BC)
        with torch.cuda.device_of(buffer):
            out_BVJ = gdn_decode(
                buffer, layout, layer, x_BC, conv_weight_CW, *gates, state_table_BL, position_B, tuning
            )
        self._count("gdn_decode", "gluon" if isinstance(tuning, Staging) else "triton")
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
        """See :class:`hybridcache.kernels.backend.Backend`. Output of padding rows, and behind the last row, is 0."""
        check_dtype("gdn_prefill", x_TC)
        gates = (a_TV, b_TV, a_log_V, dt_bias_V)
        rows = (state_table_BL, cu_seqlens, start_B)
        tiles = prefill_tiles.choose(layout, x_TC, start_B.shape[0])
        with torch.cuda.device_of(buffer):
            out_TVJ = gdn_prefill(buffer, layout, layer, x_TC, conv_weight_CW, *gates, *rows, tiles=tiles)
        self._count("gdn_prefill", "gluon" if tiles.hopper else "triton")
        return out_TVJ

    def block_copy(self, buffer: torch.Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
        """See :class:`hybridcache.kernels.backend.Backend`."""
        with torch.cuda.device_of(buffer):
            moved = block_copy(buffer, moves)
        self._count("block_copy")
        return moved
