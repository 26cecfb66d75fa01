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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.operations import CHECKPOINT_MULTIPLE
from hybridcache.memory.layout import StateLayout

CHUNK = 64
"""Tokens of a chunk. Chunks lie on absolute multiples of it, so where a prompt was cut there, the arithmetic is the same."""


def gdn_decode(
    cache: StateCache, x_BC: Tensor, conv_weight_CW: Tensor, a_BV: Tensor, b_BV: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, state_read_BL: Tensor, state_write_BL: Tensor, position_B: Tensor,
) -> Tensor:  # fmt: skip
    """One token per row. Padding rows give zeros."""
    layout, position = cache.layout, position_B.long()
    source, target = state_read_BL[:, cache.layer].long(), state_write_BL[:, cache.layer].long()
    live = (target >= 0).nonzero().squeeze(1)
    x, a, b = x_BC, a_BV, b_BV
    if live.numel() < target.numel():
        source, target, position, x, a, b = (value[live] for value in (source, target, position, x, a, b))
    # At position 0 what is gathered counts for nothing, and any entry will do.
    source = torch.where(position > 0, source, target)
    recurrent, ring = cache.views
    dtype = torch.promote_types(x.dtype, torch.promote_types(recurrent.dtype, torch.float32))

    width = layout.conv_kernel
    age_W = torch.arange(width - 1, 0, -1, device=x.device)
    past_RW = position.unsqueeze(1) - age_W
    past = ring[source.unsqueeze(1), past_RW % width]
    seen_RW = past_RW >= 0
    window = torch.cat([past.to(dtype).masked_fill_(~seen_RW.unsqueeze(2), 0), x.to(dtype).unsqueeze(1)], dim=1)
    if state_read_BL is not state_write_BL:
        moved_RW = seen_RW & (source != target).unsqueeze(1)
        ring[target.unsqueeze(1).expand_as(past_RW)[moved_RW], (past_RW % width)[moved_RW]] = past[moved_RW]
    ring[target, position % width] = x.to(ring.dtype)
    y = F.silu((window * conv_weight_CW.to(dtype).t()).sum(1))

    q, k, v = _split(y, layout)
    q, k = (u.repeat_interleave(v.shape[1] // u.shape[1], dim=1) for u in (q, k))
    decay, beta = _gates(a, b, a_log_V, dt_bias_V, dtype)
    state = recurrent[source].to(dtype)
    state = state.masked_fill_((position == 0)[:, None, None, None], 0)
    state = state * decay.exp()[..., None, None]
    new_value = beta.unsqueeze(2) * (v - (k.unsqueeze(2) @ state).squeeze(2))
    state = state + k.unsqueeze(3) * new_value.unsqueeze(2)
    recurrent[target] = state.to(recurrent.dtype)
    out = (q.unsqueeze(2) @ state).squeeze(2).to(x_BC.dtype)
    if live.numel() == x_BC.shape[0]:
        return out
    return out.new_zeros(x_BC.shape[0], *out.shape[1:]).index_copy_(0, live, out)


def gdn_prefill(
    cache: StateCache, x_TC: Tensor, conv_weight_CW: Tensor, a_TV: Tensor, b_TV: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, state_read_BL: Tensor, state_write_BL: Tensor, cu_seqlens: Tensor, start_B: Tensor,
    checkpoint_table_BNL: Tensor | None = None, checkpoint_interval: int = 0,
) -> Tensor:  # fmt: skip
    """Several tokens per row, from the state that position ``start - 1`` left. Padding rows give zeros."""
    layout, layer = cache.layout, cache.layer
    kept = None if checkpoint_table_BNL is None else checkpoint_table_BNL[:, :, layer]
    if kept is not None and (checkpoint_interval <= 0 or checkpoint_interval % CHECKPOINT_MULTIPLE):
        raise bad("checkpoint_interval", checkpoint_interval, f"choose a multiple of {CHECKPOINT_MULTIPLE}")
    tables = (state_read_BL[:, layer], state_write_BL[:, layer])
    rows = _Rows.of(cu_seqlens, start_B, *tables, kept, checkpoint_interval)
    heads, _, value_dim = layout.recurrent_shape
    if rows.count == 0:
        return x_TC.new_zeros(x_TC.shape[0], heads, value_dim)
    recurrent, ring = cache.views
    dtype = torch.promote_types(x_TC.dtype, torch.promote_types(recurrent.dtype, torch.float32))
    q_TKD, k_TKD, v_TVD = _split(_conv(x_TC, conv_weight_CW, ring, rows, dtype), layout)
    decay_TV, beta_TV = _gates(a_TV, b_TV, a_log_V, dt_bias_V, dtype)
    state = recurrent[rows.source].to(dtype)
    state = state.masked_fill_((rows.start == 0)[:, None, None, None], 0)
    out_TVD, states, last = _delta_rule(state, q_TKD, k_TKD, v_TVD, decay_TV, beta_TV, rows, x_TC.dtype)
    for entries, chosen in ((rows.target, last), (rows.kept.entry, rows.kept.state)):
        recurrent[entries] = states[chosen].to(recurrent.dtype)
    return out_TVD


class _Kept(NamedTuple):
    """Checkpoints that the step writes, ``[M]`` int64 each."""

    entry: Tensor
    row: Tensor
    """Index in R."""
    end: Tensor
    """Position of the last token that the state holds."""
    state: Tensor
    """Index into the rows' states followed by the chunks' states."""


@dataclass(frozen=True)
class _Rows:
    """The rows that have a state and a token, those with most chunks first; ``[R]`` int64 tensors on the device."""

    source: Tensor
    """Entry whose state is read; at position 0, where none is, the one written."""
    target: Tensor
    start: Tensor
    """Position of the first token."""
    begin: Tensor
    """Index of the first token in T."""
    length: Tensor
    chunks: list[int]
    """Chunks of each row, descending."""
    active: list[int]
    """Rows that have a chunk of each number: because of the order, the first of the rows."""
    first: list[int]
    """Index of the first chunk of each number, where chunks lie by number and then by row."""
    kept: _Kept

    @property
    def count(self) -> int:
        return len(self.chunks)

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, start_B: Tensor, source_B: Tensor, target_B: Tensor, kept_BN: Tensor | None,
        interval: int,
    ) -> "_Rows":  # fmt: skip
        n, device = start_B.shape[0], cu_seqlens.device
        host = torch.cat([cu_seqlens.int(), start_B.int(), source_B.int(), target_B.int()]).tolist()
        offsets, starts, sources, targets = host[: n + 1], host[n + 1 :][:n], host[2 * n + 1 :][:n], host[3 * n + 1 :]
        found = []
        for b in range(n):
            length = offsets[b + 1] - offsets[b]
            if targets[b] >= 0 and length > 0:
                chunks = -(-(starts[b] % CHUNK + length) // CHUNK)
                source = sources[b] if starts[b] else targets[b]
                found.append((chunks, source, targets[b], starts[b], offsets[b], length, b))
        found.sort(key=lambda row: -row[0])
        chunks_R = [row[0] for row in found]
        active = [sum(chunks > number for chunks in chunks_R) for number in range(max(chunks_R, default=0))]
        first = [0, *accumulate(active[:-1])]
        kept = []
        for at, (_, _, _, start, _, length, b) in enumerate(found if kept_BN is not None else ()):
            for rank, entry in enumerate(kept_BN[b].tolist()):  # type: ignore[index]
                end = (start // interval + 1 + rank) * interval
                if entry >= 0 and end <= start + length:
                    number = end // CHUNK - start // CHUNK - 1
                    kept.append((entry, at, end - 1, len(found) + first[number] + at))
        columns = torch.tensor([row[1:6] for row in found] or [[0] * 5]).t().contiguous().to(device)
        source_R, target_R, start_R, begin_R, length_R = columns
        kept_4M = torch.tensor(kept, dtype=torch.int64).view(-1, 4).t().contiguous().to(device)
        return cls(source_R, target_R, start_R, begin_R, length_R, chunks_R, active, first, _Kept(*kept_4M))


def _split(y: Tensor, layout: StateLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Conv output ``[T, C]`` as normalised, scaled q and normalised k ``[T, K, Dk]``, and v ``[T, V, Dv]``."""
    heads, key_dim, value_dim = layout.recurrent_shape
    key_channels = (layout.conv_channels - heads * value_dim) // 2
    q, k, v = y.split([key_channels, key_channels, heads * value_dim], dim=1)
    q, k = (x.unflatten(1, (-1, key_dim)) for x in (q, k))
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * key_dim**-0.5, k, v.unflatten(1, (heads, value_dim))


def _gates(a: Tensor, b: Tensor, a_log_V: Tensor, dt_bias_V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log decay and beta, each ``[T, V]``."""
    decay = -a_log_V.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias_V.to(dtype))
    return decay, b.to(dtype).sigmoid()


def _conv(x_TC: Tensor, weight_CW: Tensor, ring: Tensor, rows: _Rows, dtype: torch.dtype) -> Tensor:
    """Depthwise causal conv and SiLU of every token, ``[T, C]``; the rows' rings are brought up to date.

    All rows are laid end to end, each behind the W - 1 inputs that precede it, and convolved in one go.
    """
    width, device = ring.shape[1], x_TC.device
    history = width - 1
    column_W = torch.arange(width, device=device)
    ring_RWC = ring[rows.source]
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

    # Column c of a ring takes the newest position p with p % W = c: one of this step's tokens, or what the row's had there.
    # Columns of positions that never were keep what the ring written has.
    written = [(rows.target, row_R, rows.start + rows.length - 1), (rows.kept.entry, rows.kept.row, rows.kept.end)]
    for target, row, end in written:
        start, begin = rows.start[row].unsqueeze(1), rows.begin[row].unsqueeze(1)
        newest_RW = end.unsqueeze(1) - (end.unsqueeze(1) - column_W) % width
        fresh_RW = newest_RW >= start
        x_RWC = x_TC[begin - start + torch.maximum(newest_RW, start)].to(ring.dtype)
        new_RWC = torch.where(fresh_RW.unsqueeze(2), x_RWC, ring_RWC[row])
        ring[target] = torch.where((newest_RW >= 0).unsqueeze(2), new_RWC, ring[target])
    return F.silu(y[(place_T - history).clamp_(min=0)], inplace=True)


def _delta_rule(
    state_RVDD: Tensor, q_TKD: Tensor, k_TKD: Tensor, v_TVD: Tensor, log_decay_TV: Tensor, beta_TV: Tensor, rows: _Rows,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Chunked gated delta rule of all rows. Returns the output ``[T, V, Dv]`` (zeros outside the rows), the rows' states
    followed by the one after each chunk ``[R + M, V, Dk, Dv]``, and which of them each row's last is."""
    chunks = _Chunks.of(rows, q_TKD.device)
    key_heads = q_TKD.shape[1]

    def scaled(x_MK: Tensor, factor_MV: Tensor) -> Tensor:
        """Something per key head times something per value head of its group, per value head."""
        factor_MK = rearrange(factor_MV, "m (k group) ... -> m k group ...", k=key_heads)
        return (x_MK.unsqueeze(2) * factor_MK).flatten(1, 2)

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
    for first, count in zip(rows.first, rows.active):
        here = slice(rows.count + first, rows.count + first + count)
        state = states[before][:count].flatten(0, 1)
        states[here].flatten(0, 1).baddbmm_(transition[first : first + count].flatten(0, 1), state)
        before = here

    state_M = states[chunks.before]
    out = q_since_start @ state_M + scores @ (u - w @ state_M)
    return chunks.scatter(out, v_TVD.shape[0], out_dtype), states, chunks.last


@dataclass(frozen=True)
class _Chunks:
    """Which token lies in which slot of which chunk. Chunks are ordered by their number in their row, then by row; rows
    with most chunks come first, so the rows still active at one number are a prefix of those active before."""

    token_MS: Tensor
    """Token of every slot; 0 in an empty slot (before a row's first token, after its last)."""
    empty_MS: Tensor
    before: Tensor
    """``[M]``, the state at each chunk's start: an index into the rows' states followed by the chunks' states."""
    last: Tensor
    """``[R]``, the state after each row's last chunk, likewise."""

    @classmethod
    def of(cls, rows: _Rows, device: torch.device) -> "_Chunks":
        count_N, first_N = torch.tensor([rows.active, rows.first])
        number_M = torch.arange(len(rows.active)).repeat_interleave(count_N)
        row_M = torch.arange(sum(rows.active)) - first_N[number_M]
        before_M = torch.where(number_M > 0, rows.count + first_N[number_M - 1], 0) + row_M
        last_R = rows.count + first_N[torch.tensor(rows.chunks) - 1] + torch.arange(rows.count)
        number_M, row_M, before_M = torch.stack([number_M, row_M, before_M]).to(device)
        start_M = (rows.begin - rows.start % CHUNK)[row_M] + number_M * CHUNK
        token_MS = start_M.unsqueeze(1) + torch.arange(CHUNK, device=device)
        begin_M1, length_M1 = rows.begin[row_M].unsqueeze(1), rows.length[row_M].unsqueeze(1)
        empty_MS = (token_MS < begin_M1) | (token_MS >= begin_M1 + length_M1)
        return cls(token_MS.masked_fill_(empty_MS, 0), empty_MS, before_M, last_R.to(device))

    def gather(self, x: Tensor) -> Tensor:
        """``[T, heads, ...]`` to ``[M, heads, S, ...]``; empty slots hold zeros, which change neither state nor output."""
        empty = self.empty_MS.reshape(*self.empty_MS.shape, *(1,) * (x.dim() - 1))
        return rearrange(x[self.token_MS].masked_fill_(empty, 0), "m s h ... -> m h s ...")

    def scatter(self, x: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """``[M, heads, S, D]`` to ``[tokens, heads, D]``; a spare row takes the empty slots."""
        out = torch.zeros(tokens + 1, x.shape[1], x.shape[3], dtype=dtype, device=x.device)
        out[self.token_MS.masked_fill(self.empty_MS, tokens)] = rearrange(x, "m h s d -> m s h d").to(dtype)
        return out[:tokens]
