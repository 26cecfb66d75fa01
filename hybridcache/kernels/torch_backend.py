"""TorchBackend: every cache operation in vectorised PyTorch, on any device. Semantics are those of ``backend.py``."""

from collections import Counter
from collections.abc import Sequence

import torch

from hybridcache.kernels.torch_ops import attention, gated_delta_net
from hybridcache.memory.layout import AttentionLayout, StateLayout


class TorchBackend:
    """Operations read and write the pool through strided views; every call counts as one launch of ``op[torch]``.

    On CUDA the operations read row lengths on the host, so they can't be captured in a CUDA graph.
    """

    name = "torch"
    capturable = False
    fused = False

    def bind(self, buffer, layout):
        from hybridcache.kernels.backend import Caches

        return Caches(self, buffer, layout)

    def greedy(self, logits, sampled, feed):
        from hybridcache.kernels.greedy import naive

        naive.greedy(logits, sampled, feed)

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

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
        self.launches["kv_store[torch]"] += 1
        attention.kv_store(buffer, layout, layer, k_TKD, v_TKD, kv_table_BN, row_T, position_T)

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
        self.launches["qk_norm_rope_store[torch]"] += 1
        inputs = (q_THD, k_TKD, v_TKD, q_weight_D, k_weight_D, eps, cos_TP, sin_TP)
        return attention.qk_norm_rope_store(buffer, layout, layer, *inputs, kv_table_BN, row_T, position_T)

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
        self.launches["paged_decode[torch]"] += 1
        return attention.paged_decode(buffer, layout, layer, q_BHD, kv_table_BN, context_len_B, scale)

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
        self.launches["paged_prefill[torch]"] += 1
        return attention.paged_prefill(buffer, layout, layer, q_THD, kv_table_BN, cu_seqlens, context_len_B, scale)

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
        self.launches["gdn_decode[torch]"] += 1
        return gated_delta_net.gdn_decode(
            buffer, layout, layer, x_BC, conv_weight_CW, a_BV, b_BV, a_log_V, dt_bias_V, state_table_BL, position_B
        )

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
        self.launches["gdn_prefill[torch]"] += 1
        return gated_delta_net.gdn_prefill(
            buffer,
            layout,
            layer,
            x_TC,
            conv_weight_CW,
            a_TV,
            b_TV,
            a_log_V,
            dt_bias_V,
            state_table_BL,
            cu_seqlens,
            start_B,
        )

    def block_copy(self, buffer: torch.Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
        self.launches["block_copy[torch]"] += 1
        total = 0
        for src, dst, num_bytes in moves:
            buffer[dst : dst + num_bytes].copy_(buffer[src : src + num_bytes])
            total += num_bytes
        return total
