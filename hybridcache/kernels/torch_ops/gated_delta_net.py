"""The gated delta net in PyTorch: conv ring, gates, one-token step and the chunked delta rule.

Shapes: T tokens, B rows, R rows that are no padding, V value heads, K key heads, Dk and Dv key and value dim, C conv
channels, W conv width, M chunks of all rows together, N chunk numbers, S = 64 slots of a chunk.

The recurrence is that of Gated DeltaNet (Yang, Kautz, Hatamizadeh, 2024, arXiv:2412.06464); the chunked form is its UT
transform: inside a chunk, ``(I + tril(beta K K^T * decay)) [u | w] = [beta v | beta k decay]``, so that the chunk's new
values are ``u - w S`` for any state S at its start. The state after the chunk is then affine in S, and the scan over
chunks is one matrix product each.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from hybridcache.kernels.torch_ops.addressing import accumulation_dtype, state_views
from hybridcache.memory.layout import StateLayout

CHUNK = 64
"""Tokens of a chunk. Chunks lie on absolute multiples of it, so where a prompt was cut there, the arithmetic is the same."""


def gdn_decode(
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
    """One token per row; the state is updated in place. Padding rows give zeros."""
    entry, position = state_table_BL[:, layer].long(), position_B.long()
    live = (entry >= 0).nonzero().squeeze(1)
    x, a, b = x_BC, a_BV, b_BV
    if live.numel() < entry.numel():
        entry, position, x, a, b = (value[live] for value in (entry, position, x, a, b))
    recurrent, ring = state_views(buffer, layout, layer)
    dtype = accumulation_dtype(x.dtype, recurrent.dtype)

    width = layout.conv_kernel
    age_W = torch.arange(width - 1, 0, -1, device=x.device)
    past_RW = position.unsqueeze(1) - age_W
    past = ring[entry.unsqueeze(1), past_RW % width].to(dtype)
    past = past.masked_fill_((past_RW < 0).unsqueeze(2), 0)
    window = torch.cat([past, x.to(dtype).unsqueeze(1)], dim=1)
    ring[entry, position % width] = x.to(ring.dtype)
    y = F.silu((window * conv_weight_CW.to(dtype).t()).sum(1))

    q, k, v = _split(y, layout)
    q, k = (u.repeat_interleave(v.shape[1] // u.shape[1], dim=1) for u in (q, k))
    decay, beta = _gates(a, b, a_log_V, dt_bias_V, dtype)
    state = recurrent[entry].to(dtype)
    state = state.masked_fill_((position == 0)[:, None, None, None], 0)
    state = state * decay.exp()[..., None, None]
    new_value = beta.unsqueeze(2) * (v - (k.unsqueeze(2) @ state).squeeze(2))
    state = state + k.unsqueeze(3) * new_value.unsqueeze(2)
    recurrent[entry] = state.to(recurrent.dtype)
    out = (q.unsqueeze(2) @ state).squeeze(2).to(x_BC.dtype)
    if live.numel() == x_BC.shape[0]:
        return out
    return out.new_zeros(x_BC.shape[0], *out.shape[1:]).index_copy_(0, live, out)


def gdn_prefill(
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
    """Several tokens per row, from the state that position ``start - 1`` left. Padding rows give zeros."""
    rows = _Rows.of(cu_seqlens, start_B, state_table_BL[:, layer])
    heads, _, value_dim = layout.recurrent_shape
    if rows.count == 0:
        return x_TC.new_zeros(x_TC.shape[0], heads, value_dim)
    recurrent, ring = state_views(buffer, layout, layer)
    dtype = accumulation_dtype(x_TC.dtype, recurrent.dtype)
    q_TKD, k_TKD, v_TVD = _split(_conv(x_TC, conv_weight_CW, ring, rows, dtype), layout)
    decay_TV, beta_TV = _gates(a_TV, b_TV, a_log_V, dt_bias_V, dtype)
    state = recurrent[rows.entry].to(dtype)
    state = state.masked_fill_((rows.start == 0)[:, None, None, None], 0)
    out_TVD, state = _delta_rule(state, q_TKD, k_TKD, v_TVD, decay_TV, beta_TV, rows, x_TC.dtype)
    recurrent[rows.entry] = state.to(recurrent.dtype)
    return out_TVD


@dataclass(frozen=True)
class _Rows:
    """The rows that have a state and a token, those with most chunks first; ``[R]`` int64 tensors on the device."""

    entry: torch.Tensor
    start: torch.Tensor
    """Position of the first token."""
    begin: torch.Tensor
    """Index of the first token in T."""
    length: torch.Tensor
    chunks: list[int]
    """Chunks of each row, descending."""

    @property
    def count(self) -> int:
        return len(self.chunks)

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, start_B: torch.Tensor, entry_B: torch.Tensor) -> "_Rows":
        n = start_B.shape[0]
        host = torch.cat([cu_seqlens.int(), start_B.int(), entry_B.int()]).tolist()
        offsets, starts, entries = host[: n + 1], host[n + 1 : 2 * n + 1], host[2 * n + 1 :]
        found = []
        for b in range(n):
            length = offsets[b + 1] - offsets[b]
            if entries[b] >= 0 and length > 0:
                chunks = -(-(starts[b] % CHUNK + length) // CHUNK)
                found.append((chunks, entries[b], starts[b], offsets[b], length))
        found.sort(key=lambda row: -row[0])
        columns = torch.tensor([row[1:] for row in found] or [[0] * 4]).t().contiguous().to(cu_seqlens.device)
        return cls(columns[0], columns[1], columns[2], columns[3], [row[0] for row in found])


def _split(y: torch.Tensor, layout: StateLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conv output ``[T, C]`` as normalised, scaled q and normalised k ``[T, K, Dk]``, and v ``[T, V, Dv]``."""
    heads, key_dim, value_dim = layout.recurrent_shape
    key_channels = (layout.conv_channels - heads * value_dim) // 2
    q, k, v = y.split([key_channels, key_channels, heads * value_dim], dim=1)
    q, k = (x.unflatten(1, (-1, key_dim)) for x in (q, k))
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * key_dim**-0.5, k, v.unflatten(1, (heads, value_dim))


def _gates(
    a: torch.Tensor, b: torch.Tensor, a_log_V: torch.Tensor, dt_bias_V: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay and beta, each ``[T, V]``."""
    decay = -a_log_V.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias_V.to(dtype))
    return decay, b.to(dtype).sigmoid()


def _conv(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, ring: torch.Tensor, rows: _Rows, dtype: torch.dtype
) -> torch.Tensor:
    """Depthwise causal conv and SiLU of every token, ``[T, C]``; the rows' rings are brought up to date.

    All rows are laid end to end, each behind the W - 1 inputs that precede it, and convolved in one go.
    """
    width, device = ring.shape[1], x_TC.device
    history = width - 1
    column_W = torch.arange(width, device=device)
    ring_RWC = ring[rows.entry]
    row_R = torch.arange(rows.count, device=device)

    past_RH = rows.start.unsqueeze(1) + column_W[:history] - history
    past = ring_RWC[row_R.unsqueeze(1), past_RH % width]
    past = past.masked_fill_((past_RH < 0).unsqueeze(2), 0)

    # The rows lie in order of chunks, their tokens in order of T: each row's history goes before its tokens.
    order = torch.argsort(rows.begin)
    behind_R = torch.empty_like(order)
    behind_R[order] = row_R
    token_T = torch.arange(x_TC.shape[0], device=device)
    rank_T = torch.searchsorted(rows.begin[order], token_T, right=True)
    place_T = token_T + rank_T * history
    padded = x_TC.new_zeros(
        x_TC.shape[0] + rows.count * history, x_TC.shape[1], dtype=torch.promote_types(x_TC.dtype, ring.dtype)
    )
    padded[place_T] = x_TC.to(padded.dtype)
    if history:
        place_RH = (rows.begin + behind_R * history).unsqueeze(1) + column_W[:history]
        padded[place_RH] = past.to(padded.dtype)

    weight_WC = weight_CW.to(dtype).t()
    total = padded.shape[0] - history
    y = padded[:total] * weight_WC[0]
    for column in range(1, width):
        y.addcmul_(padded[column : column + total], weight_WC[column])

    # Column c of the ring takes the newest position p with p % W = c, where that is one of this step's tokens.
    end_R = rows.start + rows.length - 1
    newest_RW = end_R.unsqueeze(1) - (end_R.unsqueeze(1) - column_W) % width
    fresh_RW = newest_RW >= rows.start.unsqueeze(1)
    source_RW = (rows.begin - rows.start).unsqueeze(1) + torch.maximum(newest_RW, rows.start.unsqueeze(1))
    ring[rows.entry] = torch.where(fresh_RW.unsqueeze(2), x_TC[source_RW].to(ring.dtype), ring_RWC)
    return F.silu(y[(place_T - history).clamp_(min=0)], inplace=True)


def _delta_rule(
    state_RVDD: torch.Tensor,
    q_TKD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TVD: torch.Tensor,
    log_decay_TV: torch.Tensor,
    beta_TV: torch.Tensor,
    rows: _Rows,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked gated delta rule of all rows. Returns the output ``[T, V, Dv]`` (zeros outside the rows) and the states
    after the last token ``[R, V, Dk, Dv]``."""
    chunks = _Chunks.of(rows, q_TKD.device)
    key_heads = q_TKD.shape[1]

    def scaled(x_MK: torch.Tensor, factor_MV: torch.Tensor) -> torch.Tensor:
        """Something per key head times something per value head of its group, per value head."""
        return (x_MK.unsqueeze(2) * factor_MV.unflatten(1, (key_heads, -1))).flatten(1, 2)

    # Inside chunks, all at once: [M, heads, S, ...].
    q, k, v, beta = (chunks.gather(x) for x in (q_TKD, k_TKD, v_TVD, beta_TV.unsqueeze(-1)))
    log_decay = chunks.gather(log_decay_TV).cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill_(later, float("-inf")).exp_()
    since_start = log_decay.exp().unsqueeze(-1)
    right = torch.cat([v * beta, scaled(k, beta * since_start)], dim=-1)
    system = scaled(k @ k.mT, between * beta)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    scores = scaled(q @ k.mT, between)
    q_since_start = scaled(q, since_start)
    k_to_end_T = scaled(k, (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)).mT

    # Across chunks: S' = (decay - k^T w) S + k^T u. `states` holds the rows' first states, then the one after each chunk.
    transition = (k_to_end_T @ w).neg_()
    transition.diagonal(dim1=-2, dim2=-1).add_(since_start[:, :, -1])
    states = torch.cat([state_RVDD, k_to_end_T @ u])
    before = slice(0, rows.count)
    for first, count in zip(chunks.first, chunks.active):
        here = slice(rows.count + first, rows.count + first + count)
        state = states[before][:count].flatten(0, 1)
        states[here].flatten(0, 1).baddbmm_(transition[first : first + count].flatten(0, 1), state)
        before = here

    state_M = states[chunks.before]
    out = q_since_start @ state_M + scores @ (u - w @ state_M)
    return chunks.scatter(out, v_TVD.shape[0], out_dtype), states[chunks.last]


@dataclass(frozen=True)
class _Chunks:
    """Which token lies in which slot of which chunk. Chunks are ordered by their number in their row, then by row; rows
    with most chunks come first, so the rows still active at one number are a prefix of those active before."""

    token_MS: torch.Tensor
    """Token of every slot; 0 in an empty slot (before a row's first token, after its last)."""
    empty_MS: torch.Tensor
    active: list[int]
    """Rows that have a chunk of each number."""
    first: list[int]
    """Index in M of the first chunk of each number."""
    before: torch.Tensor
    """``[M]``, the state at each chunk's start: an index into the rows' states followed by the chunks' states."""
    last: torch.Tensor
    """``[R]``, the state after each row's last chunk, likewise."""

    @classmethod
    def of(cls, rows: _Rows, device: torch.device) -> "_Chunks":
        active = [sum(chunks > number for chunks in rows.chunks) for number in range(rows.chunks[0])]
        first = [0, *accumulate(active[:-1])]
        count_N, first_N = torch.tensor([active, first])
        number_M = torch.arange(len(active)).repeat_interleave(count_N)
        row_M = torch.arange(sum(active)) - first_N[number_M]
        before_M = torch.where(number_M > 0, rows.count + first_N[number_M - 1], 0) + row_M
        last_R = rows.count + first_N[torch.tensor(rows.chunks) - 1] + torch.arange(rows.count)
        number_M, row_M, before_M = torch.stack([number_M, row_M, before_M]).to(device)
        start_M = (rows.begin - rows.start % CHUNK)[row_M] + number_M * CHUNK
        token_MS = start_M.unsqueeze(1) + torch.arange(CHUNK, device=device)
        begin_M1, length_M1 = rows.begin[row_M].unsqueeze(1), rows.length[row_M].unsqueeze(1)
        empty_MS = (token_MS < begin_M1) | (token_MS >= begin_M1 + length_M1)
        return cls(token_MS.masked_fill_(empty_MS, 0), empty_MS, active, first, before_M, last_R.to(device))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, heads, ...]`` to ``[M, heads, S, ...]``; empty slots hold zeros, which change neither state nor output."""
        empty = self.empty_MS.reshape(*self.empty_MS.shape, *(1,) * (x.dim() - 1))
        return x[self.token_MS].masked_fill_(empty, 0).transpose(1, 2)

    def scatter(self, x: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """``[M, heads, S, D]`` to ``[tokens, heads, D]``; a spare row takes the empty slots."""
        out = torch.zeros(tokens + 1, x.shape[1], x.shape[3], dtype=dtype, device=x.device)
        out[self.token_MS.masked_fill(self.empty_MS, tokens)] = x.transpose(1, 2).to(dtype)
        return out[:tokens]
