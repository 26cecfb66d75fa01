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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridcache.errors import bad
from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_prefill.tiles import Tiles, choose, constants, why_not_hopper
from hybridcache.kernels.gdn_prefill.triton_chunk import chunk_kernel
from hybridcache.kernels.gdn_prefill.triton_conv import conv_kernel
from hybridcache.kernels.gdn_prefill.triton_gates import ROWS_OF_GATES
from hybridcache.kernels.gdn_prefill.triton_ring import ring_kernel
from hybridcache.kernels.gdn_prefill.triton_state import state_kernel
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.operations import CHECKPOINT_MULTIPLE
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import ceil_div
from hybridcache.memory.layout import StateLayout

MAX_KEY_DIM = 256
RING_TILE = 512
"""Channels of one program of the ring kernel."""


def gdn_prefill(cache: StateCache, x_TC: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """See :meth:`.StateOperations.gdn_prefill`; arguments and errors are those of :class:`Prefill`."""
    call = Prefill(cache, x_TC, *inputs, **options)
    if call.tokens and call.rows:
        call.conv()
        call.rings()
        call.chunks()
        call.states()
    return call.out_TVJ


@dataclass
class Prefill:
    """One call: its inputs, its scratch memory and its launches. ``rings``, ``chunks`` and ``states`` need ``conv`` before
    them, ``states`` needs ``chunks``. ``x``, ``a`` and ``b`` may be slices whose last dimension has stride 1.

    Raises:
        UserError: a width or interval that this kernel cannot do.
    """

    cache: StateCache
    x_TC: Tensor
    conv_weight_CW: Tensor
    a_TV: Tensor
    b_TV: Tensor
    a_log_V: Tensor
    dt_bias_V: Tensor
    state_read_BL: Tensor
    state_write_BL: Tensor
    cu_seqlens: Tensor
    start_B: Tensor
    checkpoint_table_BNL: Tensor | None = None
    checkpoint_interval: int = 0
    tiles: Tiles | None = None
    """:func:`~hybridcache.kernels.gdn_prefill.tiles.choose` decides where None."""

    def __post_init__(self) -> None:
        if self.checkpoint_table_BNL is not None and self.checkpoint_table_BNL.shape[1] == 0:
            self.checkpoint_table_BNL = None
        layout, x_TC = self.cache.layout, self.x_TC
        self.layout, self.layer = layout, self.cache.layer
        _check(layout, x_TC, self.a_TV, self.b_TV, self.checkpoint_table_BNL, self.checkpoint_interval)
        self.tokens, self.rows, device = x_TC.shape[0], self.start_B.shape[0], x_TC.device
        self.cut = self.tiles or choose(layout, x_TC, self.rows)
        self.constant = constants(layout, x_TC.dtype, self.cut, self.checkpoint_table_BNL is not None)
        v_heads, _, value_dim = layout.recurrent_shape
        self.v_heads, self.k_heads, chunk = v_heads, self.constant["K_HEADS"], self.cut.chunk
        # A row of n tokens has at most (n + 2 * chunk - 2) // chunk chunks.
        self.max_chunks = ceil_div(self.tokens + (2 * chunk - 2) * self.rows, chunk)

        # The interpreter casts to bfloat16 by cutting bits off: what goes from launch to launch stays exact there.
        between = torch.float32 if interpreting() else x_TC.dtype

        def scratch(*shape: int, dtype: torch.dtype = between) -> Tensor:
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

    def _rows(self) -> tuple[Tensor, Tensor]:
        return self.cu_seqlens, self.start_B

    def _checkpoints(self) -> tuple[Tensor, int, int]:
        """The table, or anything of its type where there is none, and its strides."""
        table = self.checkpoint_table_BNL
        return (self.state_write_BL, 0, 0) if table is None else (table, table.stride(0), table.stride(1))

    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.state_read_BL, self.state_write_BL

    def _table_strides(self) -> tuple[int, int]:
        return self.state_read_BL.stride(0), self.state_write_BL.stride(0)

    def conv(self) -> None:
        """q, k, v and gates of every token, and the index of chunks."""
        names = ("K_HEADS", "V_HEADS", "KEY_DIM", "VALUE_DIM", "WIDTH", "CHUNK", "BLOCK_K", "HEAD_V", "SCALE", "EPS")
        gate_programs = ceil_div(self.v_heads, self.constant["GATE_HEADS"])
        launcher(conv_kernel)[(gate_programs + 2 * self.k_heads + self.v_heads, self.max_chunks)](
            self.y, self.gates, self.index, self.first, self.out_TVJ, self.x_TC, self.conv_weight_CW, self.a_TV,
            self.b_TV, self.a_log_V, self.dt_bias_V, self.cache.ring, *self._tables(), *self._rows(), self.layer,
            self.rows, self.tokens, self.x_TC.stride(0), self.a_TV.stride(0), self.b_TV.stride(0),
            *self._table_strides(), *self.cache.ring_place,
            WEIGHT_STRIDE_C=self.conv_weight_CW.stride(0), WEIGHT_STRIDE_W=self.conv_weight_CW.stride(1),
            **self._constants(*names, "ROWS", "GATE_HEADS", "CONV_STEPS"), num_warps=self.cut.conv_warps,
        )  # fmt: skip

    def rings(self) -> None:
        """The conv rings of rows and of their checkpoints."""
        table, stride_b, stride_n = self._checkpoints()
        ranks = table.shape[1] if self.constant["CHECKPOINTS"] else 1
        grid = (ceil_div(self.layout.conv_channels, RING_TILE), ranks, self.rows)
        launcher(ring_kernel)[grid](
            self.cache.ring, self.x_TC, *self._tables(), table, *self._rows(), self.layer, self.checkpoint_interval,
            self.x_TC.stride(0), *self._table_strides(), stride_b, stride_n, *self.cache.ring_place,
            CHANNELS=self.layout.conv_channels, BLOCK=RING_TILE, **self._constants("WIDTH", "CHECKPOINTS"), num_warps=4,
        )  # fmt: skip

    def chunks(self) -> None:
        """``solve`` and ``score`` of every chunk."""
        names = ("K_HEADS", "V_HEADS", "BLOCK_K", "HEAD_V", "KEY_TILE", "CHUNK", "LEVELS", "DOT", "SOLVE", "PRECISION")
        launcher(chunk_kernel)[(self.v_heads, self.max_chunks)](
            self.solve, self.score, self.y, self.gates, self.index,
            **self._constants(*names), num_warps=self.cut.chunk_warps, maxnreg=self.cut.chunk_registers,
        )  # fmt: skip

    def states(self) -> None:
        """Outputs, and the states of rows and of their checkpoints."""
        table, stride_b, stride_n = self._checkpoints()
        names = ("K_HEADS", "V_HEADS", "KEY_DIM", "VALUE_DIM", "BLOCK_K", "HEAD_V", "CHECKPOINTS", "STAGES")
        form = self._hopper_states() if self.cut.hopper else self._triton_states()
        kernel, descriptors, value_tile, options = form
        launcher(kernel)[(self.constant["HEAD_V"] // value_tile, self.v_heads, self.rows)](
            self.out_TVJ, self.cache.state, *descriptors, self.gates, self.first, *self._tables(), table, *self._rows(),
            self.layer, self.checkpoint_interval, table.shape[1], *self._table_strides(), stride_b, stride_n,
            *self.cache.state_place,
            **self._constants(*names), **options,
        )  # fmt: skip

    def _triton_states(self) -> tuple[Any, list[TensorDescriptor], int, dict[str, Any]]:
        """Kernel, tensor descriptors, value dims of a program, options."""
        chunk, block_k, block_v = (self.constant[name] for name in ("CHUNK", "BLOCK_K", "BLOCK_V"))
        # Whole tiles of the output are copied by descriptor, unless they would reach into the next head.
        whole = self.constant["VALUE_DIM"] == self.constant["HEAD_V"]
        out = self.out_TVJ.flatten(1) if whole else self.y
        tiles = ((self.y, block_k), (self.y, block_v), (self.solve, chunk), (self.score, chunk))
        descriptors = [TensorDescriptor.from_tensor(tensor, [chunk, columns]) for tensor, columns in tiles]
        descriptors.append(TensorDescriptor.from_tensor(self.gates, [chunk]))
        descriptors.append(TensorDescriptor.from_tensor(out, [chunk, block_v]))
        options = self._constants("CHUNK", "BLOCK_V", "DOT", "PRECISION") | {"num_warps": self.cut.state_warps}
        return state_kernel, descriptors, block_v, options

    def _hopper_states(self) -> tuple[Any, list[Any], int, dict[str, Any]]:
        """As :meth:`_triton_states`, in Gluon."""
        from hybridcache.kernels.gdn_prefill import hopper_state as hopper

        reason = why_not_hopper(self.layout, self.x_TC.dtype, self.cut)
        if reason is not None:
            raise bad("tiles", self.cut, f"the Gluon kernel cannot ({reason}); choose hopper=False")
        scratch = (self.y, self.solve, self.score, self.gates, self.out_TVJ)
        descriptors = hopper.descriptors(*scratch, self.constant["BLOCK_K"])
        options = {"num_warps": 4, "maxnreg": hopper.REGISTERS}
        return hopper.hopper_state_kernel, [*descriptors.values()], hopper.TILE.value, options


def _check(
    layout: StateLayout, x_TC: Tensor, a_TV: Tensor, b_TV: Tensor, checkpoint_table_BNL: Tensor | None, interval: int
) -> None:
    if x_TC.stride(-1) != 1 or a_TV.stride(-1) != 1 or b_TV.stride(-1) != 1:
        raise ValueError(
            f"x, a, b strides {x_TC.stride()}, {a_TV.stride()}, {b_TV.stride()}: the last dimension must be contiguous"
        )
    if layout.recurrent_shape[1] > MAX_KEY_DIM:
        raise bad("key_dim", layout.recurrent_shape[1], f"GDN prefill in Triton takes at most {MAX_KEY_DIM}; use torch")
    if layout.conv_kernel > CHECKPOINT_MULTIPLE:
        raise bad("conv_kernel", layout.conv_kernel, f"GDN prefill in Triton takes at most {CHECKPOINT_MULTIPLE}")
    if checkpoint_table_BNL is not None and (interval <= 0 or interval % CHECKPOINT_MULTIPLE):
        raise bad("checkpoint_interval", interval, f"choose a multiple of {CHECKPOINT_MULTIPLE}")
