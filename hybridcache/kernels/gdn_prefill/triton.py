"""GDN prefill in Triton: the chunked gated delta rule over rows of any lengths, states and conv rings in the pool.

Four launches, whatever the lengths: conv (:mod:`.triton_conv`), rings, chunks (:mod:`.triton_chunk`) and states
(:mod:`.triton_state`). Grids follow from the shapes of the inputs, and which program does what from ``cu_seqlens`` and
``start_B`` on the device: the call reads nothing back, so that it can be captured in a CUDA graph.

Chunks lie on absolute multiples of the chunk size; where a row starts in between, its first chunk is short. Inside a
chunk whose state at the start is S, with ``g`` the decay since the start,

    A = strict_lower((k_i . k_j) beta_j g_i / g_j)      solve = diag(beta) (I + A)^-1
    new = solve (v - diag(g) k S)                       score = lower((q_i . k_j) g_i / g_j)
    out = diag(g) q S + score new                       S := g_end (S + (k / g)^T new)

This is the UT transform of Gated DeltaNet (Yang, Kautz, Hatamizadeh, 2024, arXiv:2412.06464) with the state's term kept
inside the bracket: ``solve`` and ``score`` are all that a chunk's own launch hands on, 2 * 64 elements a token and head. With
beta in ``solve``, conv and gates are apart, and the launch over states reads two numbers a slot.

Rounding, in bfloat16 (each rounding emulated alone in float64; relative errors of outputs, 512 tokens, largest of four):
all together 3.6e-3. Of it v, ``solve``, ``score``, the bracket and ``new`` add 1.6e-3 each, q and k 1e-3, and the steps to
``solve`` in float16 0.1e-3. (Beta in v instead of ``solve``: 3.2e-3.) Where keys hardly differ and nothing decays, 1.8e-2:
1.3e-2 by k, whose rounding no kernel can help, and 0.7e-2 each by ``solve``, ``score`` and ``new``. Cutting bits off instead,
as Triton's interpreter does, errs several times more.

Shapes: T tokens, B rows, L state layers, C conv channels (``q | k | v``), W conv kernel width, V value heads, N
checkpoints of a row.
"""

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridcache.errors import bad
from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_prefill.tiles import Tiles, choose, constants, why_not_hopper
from hybridcache.kernels.gdn_prefill.triton_chunk import chunk_kernel
from hybridcache.kernels.gdn_prefill.triton_conv import conv_kernel, ring_kernel
from hybridcache.kernels.gdn_prefill.triton_gates import ROWS_OF_GATES
from hybridcache.kernels.gdn_prefill.triton_state import state_kernel
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.operations import CHECKPOINT_MULTIPLE
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import ceil_div
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import dtype_name

MAX_KEY_DIM = 256
RING_TILE = 512
"""Channels of one program of the ring kernel."""


def gdn_prefill(
    cache: StateCache,
    x_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    a_TV: torch.Tensor,
    b_TV: torch.Tensor,
    a_log_V: torch.Tensor,
    dt_bias_V: torch.Tensor,
    state_read_BL: torch.Tensor,
    state_write_BL: torch.Tensor,
    cu_seqlens: torch.Tensor,
    start_B: torch.Tensor,
    checkpoint_table_BNL: torch.Tensor | None = None,
    checkpoint_interval: int = 0,
    *,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """See :meth:`.StateOperations.gdn_prefill`. Output of tokens that no row with a state owns is 0.
    ``x``, ``a`` and ``b`` may be slices whose last dimension has stride 1.

    Args:
        checkpoint_table_BNL: int32, the entry of the block that keeps the state at the ``n``-th multiple of
            ``checkpoint_interval`` behind ``start`` (at ``(start // interval + 1 + n) * interval``), or -1 for none.
            Positions beyond the row's last token are ignored. The entries must be blocks that no row of this call owns.
        checkpoint_interval: tokens, a multiple of 64.

    Raises:
        UserError: a dtype, width or interval that this kernel cannot do.
    """
    call = Prefill(
        cache, x_TC, conv_weight_CW, a_TV, b_TV, a_log_V, dt_bias_V, state_read_BL, state_write_BL, cu_seqlens,
        start_B, checkpoint_table_BNL, checkpoint_interval, tiles,
    )  # fmt: skip
    if call.tokens and call.rows:
        call.conv()
        call.rings()
        call.chunks()
        call.states()
    return call.out_TVJ


class Prefill:
    """One call: its scratch memory and its launches. ``rings``, ``chunks`` and ``states`` need ``conv`` before them,
    ``states`` needs ``chunks``."""

    def __init__(
        self,
        cache: StateCache,
        x_TC: torch.Tensor,
        conv_weight_CW: torch.Tensor,
        a_TV: torch.Tensor,
        b_TV: torch.Tensor,
        a_log_V: torch.Tensor,
        dt_bias_V: torch.Tensor,
        state_read_BL: torch.Tensor,
        state_write_BL: torch.Tensor,
        cu_seqlens: torch.Tensor,
        start_B: torch.Tensor,
        checkpoint_table_BNL: torch.Tensor | None = None,
        checkpoint_interval: int = 0,
        tiles: Tiles | None = None,
    ) -> None:
        if checkpoint_table_BNL is not None and checkpoint_table_BNL.shape[1] == 0:
            checkpoint_table_BNL = None
        layout = cache.layout
        _check(layout, x_TC, a_TV, b_TV, checkpoint_table_BNL, checkpoint_interval)
        self.cache, self.layout, self.layer = cache, layout, cache.layer
        self.x_TC, self.conv_weight_CW, self.a_TV, self.b_TV = x_TC, conv_weight_CW, a_TV, b_TV
        self.a_log_V, self.dt_bias_V = a_log_V, dt_bias_V
        self.state_read_BL, self.state_write_BL = state_read_BL, state_write_BL
        self.cu_seqlens, self.start_B = cu_seqlens, start_B
        self.checkpoint_table_BNL, self.checkpoint_interval = checkpoint_table_BNL, checkpoint_interval
        self.tokens, self.rows = x_TC.shape[0], start_B.shape[0]
        device = x_TC.device
        self.tiles = tiles = tiles or choose(layout, x_TC, self.rows)
        self.constant = constants(layout, x_TC.dtype, tiles, checkpoint_table_BNL is not None)
        v_heads, _, value_dim = layout.recurrent_shape
        self.v_heads, self.k_heads, chunk = v_heads, self.constant["K_HEADS"], tiles.chunk
        # A row of n tokens has at most (n + 2 * chunk - 2) // chunk chunks.
        self.max_chunks = ceil_div(self.tokens + (2 * chunk - 2) * self.rows, chunk)

        # The interpreter casts to bfloat16 by cutting bits off: what goes from launch to launch stays exact there.
        between = torch.float32 if interpreting() else x_TC.dtype

        def scratch(*shape: int, dtype: torch.dtype = between) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        channels = 2 * self.k_heads * self.constant["BLOCK_K"] + v_heads * self.constant["HEAD_V"]
        self.out_TVJ = scratch(self.tokens, v_heads, value_dim, dtype=x_TC.dtype)
        self.y = scratch(self.max_chunks * chunk, channels)
        self.index = scratch(self.max_chunks, 2, dtype=torch.int32)
        self.first = scratch(self.rows, dtype=torch.int32)
        self.solve, self.score = (scratch(self.max_chunks * v_heads * chunk, chunk) for _ in range(2))
        self.gates = scratch(self.max_chunks * v_heads * ROWS_OF_GATES.value * chunk, dtype=torch.float32)

    def _constants(self, *names: str) -> dict[str, Any]:
        return {name: self.constant[name] for name in names}

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cu_seqlens, self.start_B

    def _checkpoints(self) -> tuple[torch.Tensor, int, int]:
        """The table, or anything of its type where there is none, and its strides."""
        table = self.checkpoint_table_BNL
        return (self.state_write_BL, 0, 0) if table is None else (table, table.stride(0), table.stride(1))

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.state_read_BL, self.state_write_BL

    def _table_strides(self) -> tuple[int, int]:
        return self.state_read_BL.stride(0), self.state_write_BL.stride(0)

    def conv(self) -> None:
        """q, k, v and gates of every token, and the index of chunks."""
        names = ("K_HEADS", "V_HEADS", "KEY_DIM", "VALUE_DIM", "WIDTH", "CHUNK", "BLOCK_K", "HEAD_V", "SCALE", "EPS")
        gate_programs = ceil_div(self.v_heads, self.constant["GATE_HEADS"])
        launcher(conv_kernel)[(gate_programs + 2 * self.k_heads + self.v_heads, self.max_chunks)](
            self.y,
            self.gates,
            self.index,
            self.first,
            self.out_TVJ,
            self.x_TC,
            self.conv_weight_CW,
            self.a_TV,
            self.b_TV,
            self.a_log_V,
            self.dt_bias_V,
            self.cache.ring,
            *self._tables(),
            *self._rows(),
            self.layer,
            self.rows,
            self.tokens,
            self.x_TC.stride(0),
            self.a_TV.stride(0),
            self.b_TV.stride(0),
            *self._table_strides(),
            *self.cache.ring_place,
            WEIGHT_STRIDE_C=self.conv_weight_CW.stride(0),
            WEIGHT_STRIDE_W=self.conv_weight_CW.stride(1),
            **self._constants(*names, "ROWS", "GATE_HEADS", "CONV_STEPS"),
            num_warps=self.tiles.conv_warps,
        )

    def rings(self) -> None:
        """The conv rings of rows and of their checkpoints."""
        table, stride_b, stride_n = self._checkpoints()
        ranks = table.shape[1] if self.constant["CHECKPOINTS"] else 1
        grid = (ceil_div(self.layout.conv_channels, RING_TILE), ranks, self.rows)
        launcher(ring_kernel)[grid](
            self.cache.ring,
            self.x_TC,
            *self._tables(),
            table,
            *self._rows(),
            self.layer,
            self.checkpoint_interval,
            self.x_TC.stride(0),
            *self._table_strides(),
            stride_b,
            stride_n,
            *self.cache.ring_place,
            CHANNELS=self.layout.conv_channels,
            BLOCK=RING_TILE,
            **self._constants("WIDTH", "CHECKPOINTS"),
            num_warps=4,
        )

    def chunks(self) -> None:
        """``solve`` and ``score`` of every chunk."""
        names = ("K_HEADS", "V_HEADS", "BLOCK_K", "HEAD_V", "KEY_TILE", "CHUNK", "LEVELS", "DOT", "SOLVE", "PRECISION")
        launcher(chunk_kernel)[(self.v_heads, self.max_chunks)](
            self.solve,
            self.score,
            self.y,
            self.gates,
            self.index,
            **self._constants(*names),
            num_warps=self.tiles.chunk_warps,
            maxnreg=self.tiles.chunk_registers,
        )

    def states(self) -> None:
        """Outputs, and the states of rows and of their checkpoints."""
        if self.tiles.hopper:
            return self._hopper_states()
        names = ("K_HEADS", "V_HEADS", "KEY_DIM", "VALUE_DIM", "CHUNK", "BLOCK_K", "HEAD_V", "BLOCK_V", "CHECKPOINTS")
        chunk = self.tiles.chunk
        table, stride_b, stride_n = self._checkpoints()
        grid = (self.constant["HEAD_V"] // self.constant["BLOCK_V"], self.v_heads, self.rows)
        # Whole tiles of the output are copied by descriptor, unless they would reach into the next head.
        whole = self.constant["VALUE_DIM"] == self.constant["HEAD_V"]
        launcher(state_kernel)[grid](
            self.out_TVJ,
            self.cache.state,
            TensorDescriptor.from_tensor(self.y, [chunk, self.constant["BLOCK_K"]]),
            TensorDescriptor.from_tensor(self.y, [chunk, self.constant["BLOCK_V"]]),
            TensorDescriptor.from_tensor(self.solve, [chunk, chunk]),
            TensorDescriptor.from_tensor(self.score, [chunk, chunk]),
            TensorDescriptor.from_tensor(self.gates, [chunk]),
            TensorDescriptor.from_tensor(
                self.out_TVJ.flatten(1) if whole else self.y, [chunk, self.constant["BLOCK_V"]]
            ),
            self.gates,
            self.first,
            *self._tables(),
            table,
            *self._rows(),
            self.layer,
            self.checkpoint_interval,
            table.shape[1],
            *self._table_strides(),
            stride_b,
            stride_n,
            *self.cache.state_place,
            **self._constants(*names, "DOT", "PRECISION", "STAGES"),
            num_warps=self.tiles.state_warps,
        )

    def _hopper_states(self) -> None:
        from hybridcache.kernels.gdn_prefill import hopper_state

        reason = why_not_hopper(self.layout, self.x_TC.dtype, self.tiles)
        if reason is not None:
            raise bad("tiles", self.tiles, f"the Gluon kernel cannot ({reason}); choose hopper=False")
        names = ("K_HEADS", "V_HEADS", "KEY_DIM", "VALUE_DIM", "BLOCK_K", "HEAD_V", "CHECKPOINTS", "STAGES")
        table, stride_b, stride_n = self._checkpoints()
        block_k = self.constant["BLOCK_K"]
        described = hopper_state.descriptors(self.y, self.solve, self.score, self.gates, self.out_TVJ, block_k)
        launcher(hopper_state.hopper_state_kernel)[(self.constant["HEAD_V"] // 64, self.v_heads, self.rows)](
            self.out_TVJ,
            self.cache.state,
            *described.values(),
            self.gates,
            self.first,
            *self._tables(),
            table,
            *self._rows(),
            self.layer,
            self.checkpoint_interval,
            table.shape[1],
            *self._table_strides(),
            stride_b,
            stride_n,
            *self.cache.state_place,
            **self._constants(*names),
            num_warps=4,
            maxnreg=hopper_state.REGISTERS,
        )


def _check(
    layout: StateLayout,
    x_TC: torch.Tensor,
    a_TV: torch.Tensor,
    b_TV: torch.Tensor,
    checkpoint_table_BNL: torch.Tensor | None,
    interval: int,
) -> None:
    if x_TC.stride(-1) != 1 or a_TV.stride(-1) != 1 or b_TV.stride(-1) != 1:
        raise ValueError(
            f"x, a, b strides {x_TC.stride()}, {a_TV.stride()}, {b_TV.stride()}: the last dimension must be contiguous"
        )
    if x_TC.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise bad(
            "dtype", dtype_name(x_TC.dtype), "GDN prefill in Triton takes float32, float16 or bfloat16; use torch"
        )
    if layout.recurrent_shape[1] > MAX_KEY_DIM:
        raise bad("key_dim", layout.recurrent_shape[1], f"GDN prefill in Triton takes at most {MAX_KEY_DIM}; use torch")
    if layout.conv_kernel > CHECKPOINT_MULTIPLE:
        raise bad("conv_kernel", layout.conv_kernel, f"GDN prefill in Triton takes at most {CHECKPOINT_MULTIPLE}")
    if checkpoint_table_BNL is not None and (interval <= 0 or interval % CHECKPOINT_MULTIPLE):
        raise bad("checkpoint_interval", interval, f"choose a multiple of {CHECKPOINT_MULTIPLE}")
