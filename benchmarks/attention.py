"""Attention: paged decode and prefill, and what writes the cache, on shuffled blocks of a pool.

Shapes: T tokens, B rows, H query heads, K KV heads, D head dim, L layers, S tokens of one row, Q checked queries.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.work import Implementation, Setup, Work, worst
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.kv_store import naive as naive_store
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.paged_prefill import naive as naive_prefill
from hybridcache.kernels.qk_norm_rope_store import naive as naive_fused
from hybridcache.kernels.testing import attention_case, normal
from hybridcache.spec.dtypes import itemsize, torch_dtype

Operation = Callable[..., Any]
"""Takes a layer's cache, then the operation's arguments."""
Operations = Mapping[str, Operation]
NONE: Operations = MappingProxyType({})

CHECKED_ROWS = 2
CHECKED_QUERIES = 48
NAIVE_TOKENS = 512
"""A prefill of so many tokens is checked whole, a longer one at some of its queries."""


def _token_bytes(case: Case) -> int:
    return 2 * case.dims.kv_heads * case.dims.head_dim * itemsize(case.dtype)


class _Pool:
    """A case's rows in a pool. Its sets of memory are layers, evenly spread, since a block of the pool holds all of them; they
    are filled with random values if asked for."""

    def __init__(self, case: Case, setup: Setup, footprint: int, lengths: tuple[int, ...] = (), *, fill: bool) -> None:
        assert case.kernel_block
        assert case.layout
        dims, sets = case.dims, setup.sets(footprint, 1, case.dims.attention_layers)
        self.generator, self.device = setup.generator(), setup.device
        self.layers = [i * dims.attention_layers // sets for i in range(sets)]
        self.at = attention_case(
            self.generator, lengths=lengths or case.lengths, order=case.layout, layers=dims.attention_layers,
            kernel_block_tokens=case.kernel_block, kernel_blocks=case.kernel_blocks, kv_heads=dims.kv_heads,
            k_dim=dims.head_dim, v_dim=dims.head_dim, dtype=case.dtype, device=setup.device, extra_entries=0,
            fill=self.layers if fill else [],
        )  # fmt: skip
        self.caches = [AttentionCache(self.at.buffer, self.at.layout, layer) for layer in self.layers]

    def draw(self, *shape: int, dtype: str) -> torch.Tensor:
        return normal(self.generator, shape, self.device, dtype)

    def destinations(self, case: Case) -> tuple[torch.Tensor, ...]:
        """The table, and every new token's row and position: its row's last ones."""
        rows = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
        parts = [torch.arange(at - new, at) for at, new in zip(self.at.lengths, case.lengths)]
        return self.at.kv_table_BN, rows.int().to(self.device), torch.cat(parts).to(self.device)


def _empty(case: Case, setup: Setup, footprint: int) -> _Pool:
    """A pool to store into: rows of one token come after 99 others."""
    lengths = (100,) * len(case.lengths) if max(case.lengths) == 1 else case.lengths
    return _Pool(case, setup, footprint, lengths, fill=False)


def decode(case: Case, setup: Setup, more: Operations = NONE) -> Work:
    """``paged_decode``: one query per row over its whole context. ``more``: further implementations, for CUDA."""
    dims, rows = case.dims, len(case.lengths)
    footprint = sum(case.lengths) * _token_bytes(case)
    pool = _Pool(case, setup, footprint, fill=True)
    q_BHD = pool.draw(rows, dims.heads, dims.head_dim, dtype=case.dtype)
    checked, tables = slice(0, CHECKED_ROWS), (pool.at.kv_table_BN, pool.at.context_len_B)
    inputs: list[Any] = [q_BHD, *tables, dims.head_dim**-0.5]
    first: list[Any] = [*(x[checked] for x in inputs[:3]), inputs[3]]
    expected = naive_decode.paged_decode(pool.caches[0], *first)

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(pool.caches[i], *inputs)

        return Implementation(run, lambda: worst([(run(0)[checked], expected)]), graph)

    num_bytes = footprint + 2 * q_BHD.numel() * q_BHD.element_size()
    work = Work(len(pool.layers), footprint, num_bytes, 4 * dims.heads * dims.head_dim * sum(case.lengths))
    return work.offer(case, setup, implementation, more)


def prefill(case: Case, setup: Setup, more: Operations = NONE) -> Work:
    """``paged_prefill``: causal attention of whole prompts, or of their last tokens. ``more``: further implementations, for
    CUDA."""
    dims, context = case.dims, sum(case.lengths)
    queries = [min(case.queries or length, length) for length in case.lengths]
    tokens, element = sum(queries), itemsize(case.dtype)
    footprint = context * _token_bytes(case) + 2 * tokens * dims.heads * dims.head_dim * element
    pool = _Pool(case, setup, footprint, fill=True)
    q_THD = pool.draw(tokens, dims.heads, dims.head_dim, dtype=case.dtype)
    offsets = torch.tensor([0, *queries]).cumsum(0).int().to(setup.device)
    at = pool.at
    rest = (at.kv_table_BN, offsets, at.context_len_B, dims.head_dim**-0.5, max(queries), max(case.lengths))
    token_Q, expected_QHD = _reference(case, pool, q_THD, rest)

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(pool.caches[i], q_THD, *rest)

        return Implementation(run, lambda: worst([(run(0)[token_Q], expected_QHD)]), graph)

    pairs = sum(count * length - count * (count - 1) // 2 for count, length in zip(queries, case.lengths))
    work = Work(len(pool.layers), footprint, footprint, 4 * dims.heads * dims.head_dim * pairs)
    return work.offer(case, setup, implementation, more)


def _reference(
    case: Case, pool: _Pool, q_THD: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to check and their float64 attention: all of a short batch, else some adjacent queries of the first rows, the
    very last one of row 0 among them."""
    table_BN, offsets, _, *more = rest
    if q_THD.shape[0] <= NAIVE_TOKENS:
        return torch.arange(q_THD.shape[0]).to(q_THD.device), naive_prefill.paged_prefill(pool.caches[0], q_THD, *rest)
    tokens, lengths, bounds = [], [], offsets.tolist()
    for row, (first, last) in enumerate(pairwise(bounds[: CHECKED_ROWS + 1])):
        end = last if row == 0 else int(torch.randint(first + 1, last + 1, (), generator=pool.generator))
        tokens.append(torch.arange(max(first, end - CHECKED_QUERIES), end))
        lengths.append(case.lengths[row] - (last - end))
    token_Q, cu = torch.cat(tokens).to(q_THD.device), torch.tensor([0, *map(len, tokens)]).cumsum(0)
    inputs: list[Any] = [q_THD[token_Q], table_BN[: len(tokens)], cu, torch.tensor(lengths), *more]
    return token_Q, naive_prefill.paged_prefill(pool.caches[0], *inputs)


def store(case: Case, setup: Setup) -> Work:
    """``kv_store``: K and V of every token to its address. Rows of one token are a decode step, others whole prompts."""
    dims, tokens = case.dims, sum(case.lengths)
    footprint = 2 * tokens * _token_bytes(case)
    pool = _empty(case, setup, footprint)
    place = pool.destinations(case)
    inputs = [pool.draw(tokens, dims.kv_heads, dims.head_dim, dtype=case.dtype) for _ in range(2)]
    buffer, before = pool.at.buffer, pool.at.buffer.clone()
    naive_store.kv_store(pool.caches[0], *inputs, *place)
    expected = buffer.clone()

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> None:
            operation(pool.caches[i], *inputs, *place)

        def error() -> float:
            buffer.copy_(before)
            run(0)
            return 0.0 if torch.equal(buffer, expected) else float("inf")

        return Implementation(run, error, graph)

    return Work(len(pool.layers), footprint, footprint, 0).offer(case, setup, implementation)


def fused_store(case: Case, setup: Setup) -> Work:
    """``qk_norm_rope_store``: norms, partial rotary positions and the KV store; q, k and v are slices of one projection."""
    dims, tokens = case.dims, sum(case.lengths)
    heads = (dims.heads, dims.kv_heads, dims.kv_heads)
    footprint = 2 * sum(heads) * dims.head_dim * tokens * itemsize(case.dtype)
    pool = _empty(case, setup, footprint)
    place = pool.destinations(case)
    angle_TP = torch.rand(tokens, dims.head_dim // 8, generator=pool.generator).to(pool.device) * 6.3
    norms = [pool.draw(dims.head_dim, dtype="float32") * 0.1 for _ in range(2)]
    rest: list[Any] = [*norms, 1e-6, angle_TP.cos(), angle_TP.sin(), *place]
    widths = [2 * dims.heads * dims.head_dim, *(count * dims.head_dim for count in heads[1:])]

    def projection() -> tuple[torch.Tensor, ...]:
        q, k, v = pool.draw(tokens, sum(widths), dtype=case.dtype).split(widths, dim=1)
        q = q.unflatten(1, (dims.heads, 2 * dims.head_dim))[:, :, : dims.head_dim]
        return (q, *(x.unflatten(1, (dims.kv_heads, dims.head_dim)) for x in (k, v)))

    qkv: list[Any] = [projection() for _ in pool.layers]
    buffer, before, dtype = pool.at.buffer, pool.at.buffer.clone(), torch_dtype(case.dtype)
    first: list[Any] = [*qkv[0], *rest]
    expected = naive_fused.qk_norm_rope_store(pool.caches[0], *first)
    stored = buffer.clone()

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(pool.caches[i], *qkv[i], *rest)

        def error() -> float:
            buffer.copy_(before)
            out = run(0)
            found, wanted = (x.view(dtype) for x in (buffer, stored))
            if not torch.equal(found.isnan(), wanted.isnan()):
                return float("inf")
            return worst([(out, expected), (found.nan_to_num(), wanted.nan_to_num())])

        return Implementation(run, error, graph)

    work = Work(len(pool.layers), footprint, footprint + angle_TP.numel() * 8, 0)
    return work.offer(case, setup, implementation)
