"""Attention: paged decode and prefill, and what writes the cache, on shuffled blocks of a pool.

Shapes: T tokens, B rows, H query heads, K KV heads, D head dim, L layers, S tokens of one row, Q checked queries.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import peers
from benchmarks.case import Case
from benchmarks.work import Implementation, Setup, Work, worst
from hybridcache.kernels.kv_store import naive as naive_store
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.paged_prefill import naive as naive_prefill
from hybridcache.kernels.qk_norm_rope_store import naive as naive_fused
from hybridcache.kernels.testing import AttentionCase, attention_case, byte_index, normal
from hybridcache.kernels.torch_backend import TorchBackend
from hybridcache.spec.dtypes import itemsize, torch_dtype

if TYPE_CHECKING:
    from hybridcache.kernels.paged_decode.tiles import Tuning

Operation = Callable[..., torch.Tensor]

CHECKED_ROWS = 2
CHECKED_QUERIES = 48
NAIVE_TOKENS = 512
"""A prefill of so many tokens is checked whole, a longer one at some of its queries."""


def _token_bytes(case: Case) -> int:
    return 2 * case.dims.kv_heads * case.dims.head_dim * itemsize(case.dtype)


def _layers(case: Case, sets: int) -> list[int]:
    """Which layers the sets are: evenly spread, since a block of the pool holds all of them."""
    return [i * case.dims.attention_layers // sets for i in range(sets)]


def _cache(
    case: Case, device: torch.device, generator: torch.Generator, fill: list[int], layers: int | None = None
) -> AttentionCase:
    """The case's rows in a pool, of which some layers are filled with random values."""
    assert case.kernel_block
    assert case.layout
    return attention_case(
        generator,
        lengths=case.lengths,
        order=case.layout,
        layers=layers or case.dims.attention_layers,
        kernel_block_tokens=case.kernel_block,
        kernel_blocks=case.kernel_blocks,
        kv_heads=case.dims.kv_heads,
        k_dim=case.dims.head_dim,
        v_dim=case.dims.head_dim,
        dtype=case.dtype,
        device=device,
        extra_entries=0,
        fill=fill,
    )


def decode(case: Case, setup: Setup, more: Mapping[str, Operation] = MappingProxyType({})) -> Work:
    """``paged_decode``: one query per row over its whole context. ``more``: further implementations, for CUDA."""
    dims, rows = case.dims, len(case.lengths)
    footprint = sum(case.lengths) * _token_bytes(case)
    layers = _layers(case, setup.sets(footprint, 1, dims.attention_layers))
    generator = setup.generator()
    at = _cache(case, setup.device, generator, layers)
    q_BHD = normal(generator, (rows, dims.heads, dims.head_dim), at.buffer.device, case.dtype)
    scale, checked = dims.head_dim**-0.5, slice(0, CHECKED_ROWS)
    tables = (at.kv_table_BN, at.context_len_B)
    q, table_BN, length_B = (x[checked] for x in (q_BHD, *tables))
    expected = naive_decode.paged_decode(at.buffer, at.layout, layers[0], q, table_BN, length_B, scale)

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(at.buffer, at.layout, layers[i], q_BHD, *tables, scale)

        return Implementation(run, lambda: worst([(run(0)[checked], expected)]), graph)

    def triton() -> Implementation:
        from hybridcache.kernels.paged_decode.triton import paged_decode

        return implementation(paged_decode)

    pairs = sum(case.lengths)
    work = Work(
        sets=len(layers),
        footprint=footprint,
        bytes=footprint + 2 * q_BHD.numel() * q_BHD.element_size(),
        flops=4 * dims.heads * dims.head_dim * pairs,
    )
    if setup.device.type == "cuda":
        work.build["triton"] = triton
    if case.with_torch:
        work.build["torch"] = lambda: implementation(TorchBackend().paged_decode, False)
    if setup.device.type == "cuda" and peers.state("fa3") == "installed":
        work.build["fa3"] = lambda: implementation(peers.fa3().paged_decode)
    return work.with_more(more, implementation)


def prefill(case: Case, setup: Setup, more: Mapping[str, Operation] = MappingProxyType({})) -> Work:
    """``paged_prefill``: causal attention of whole prompts, or of their last tokens. ``more``: further implementations, for
    CUDA."""
    dims, context = case.dims, sum(case.lengths)
    queries = [min(case.queries or length, length) for length in case.lengths]
    tokens, element = sum(queries), itemsize(case.dtype)
    footprint = context * _token_bytes(case) + 2 * tokens * dims.heads * dims.head_dim * element
    layers = _layers(case, setup.sets(footprint, 1, dims.attention_layers))
    generator = setup.generator()
    at = _cache(case, setup.device, generator, layers)
    q_THD = normal(generator, (tokens, dims.heads, dims.head_dim), at.buffer.device, case.dtype)
    offsets = torch.tensor([0, *queries]).cumsum(0).int().to(setup.device)
    rest = (at.kv_table_BN, offsets, at.context_len_B, dims.head_dim**-0.5, max(queries), max(case.lengths))
    token_Q, expected_QHD = _reference(case, at, layers[0], q_THD, rest, generator)

    def implementation(operation: Operation, graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(at.buffer, at.layout, layers[i], q_THD, *rest)

        return Implementation(run, lambda: worst([(run(0)[token_Q], expected_QHD)]), graph)

    def triton() -> Implementation:
        from hybridcache.kernels.paged_prefill.triton import paged_prefill

        return implementation(paged_prefill)

    def gluon() -> Implementation:
        from hybridcache.kernels.paged_prefill.hopper import paged_prefill

        return implementation(paged_prefill)

    pairs = sum(count * length - count * (count - 1) // 2 for count, length in zip(queries, case.lengths))
    work = Work(len(layers), footprint, footprint, 4 * dims.heads * dims.head_dim * pairs)
    if setup.device.type == "cuda":
        work.build["triton"] = triton
        if torch.cuda.get_device_capability(setup.device)[0] == 9:
            work.build["gluon"] = gluon
    if case.with_torch:
        work.build["torch"] = lambda: implementation(TorchBackend().paged_prefill, False)
    if setup.device.type == "cuda" and peers.state("fa3") == "installed":
        work.build["fa3"] = lambda: implementation(peers.fa3().paged_prefill)
    return work.with_more(more, implementation)


def _reference(
    case: Case, at: AttentionCase, layer: int, q_THD: torch.Tensor, rest: tuple[Any, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to check and their float64 attention: all of a short batch, else some queries of the first rows."""
    device = q_THD.device
    if q_THD.shape[0] <= NAIVE_TOKENS:
        out_THD = naive_prefill.paged_prefill(at.buffer, at.layout, layer, q_THD, *rest)
        return torch.arange(q_THD.shape[0], device=device), out_THD
    offsets, scale, group = rest[1].tolist(), rest[3], case.dims.heads // case.dims.kv_heads
    tokens, outs = [], []
    for row in range(min(CHECKED_ROWS, len(case.lengths))):
        length, count = case.lengths[row], offsets[row + 1] - offsets[row]
        query_Q = torch.randperm(count, generator=generator)[:CHECKED_QUERIES]
        query_Q[0] = count - 1
        query_Q = query_Q.to(device)
        k_SKD, v_SKD = (
            at.buffer[byte_index(at, layer, row, kv)].view(torch_dtype(case.dtype)).double() for kv in range(2)
        )
        q_QKGD = q_THD[offsets[row] + query_Q].double().unflatten(1, (case.dims.kv_heads, group))
        score = torch.einsum("qkgd,skd->qkgs", q_QKGD, k_SKD) * scale
        hidden_QS = torch.arange(length, device=device) > length - count + query_Q[:, None]
        p = score.masked_fill(hidden_QS[:, None, None], float("-inf")).softmax(-1)
        outs.append(torch.einsum("qkgs,skd->qkgd", p, v_SKD).flatten(1, 2))
        tokens.append(offsets[row] + query_Q)
    return torch.cat(tokens), torch.cat(outs)


def store(case: Case, setup: Setup) -> Work:
    """``kv_store``: K and V of every token to its address. Rows of one token are a decode step, others whole prompts."""
    dims, tokens = case.dims, sum(case.lengths)
    footprint = 2 * tokens * _token_bytes(case)
    layers = _layers(case, setup.sets(footprint, 1, dims.attention_layers))
    generator = setup.generator()
    at, row_T, position_T = _destinations(case, setup, generator)
    k_TKD, v_TKD = (
        normal(generator, (tokens, dims.kv_heads, dims.head_dim), at.buffer.device, case.dtype) for _ in range(2)
    )
    inputs = (k_TKD, v_TKD, at.kv_table_BN, row_T, position_T)
    before = at.buffer.clone()
    naive_store.kv_store(at.buffer, at.layout, layers[0], *inputs)
    expected = at.buffer.clone()

    def implementation(operation: Callable[..., None], graph: bool) -> Implementation:
        def run(i: int) -> None:
            operation(at.buffer, at.layout, layers[i], *inputs)

        def error() -> float:
            at.buffer.copy_(before)
            run(0)
            return 0.0 if torch.equal(at.buffer, expected) else float("inf")

        return Implementation(run, error, graph)

    def triton() -> Implementation:
        from hybridcache.kernels.kv_store.triton import kv_store

        return implementation(kv_store, True)

    work = Work(len(layers), footprint, footprint, 0)
    if setup.device.type == "cuda":
        work.build["triton"] = triton
    if case.with_torch:
        work.build["torch"] = lambda: implementation(TorchBackend().kv_store, False)
    return work


def _destinations(
    case: Case, setup: Setup, generator: torch.Generator
) -> tuple[AttentionCase, torch.Tensor, torch.Tensor]:
    """An empty cache, and each token's row and position: rows of one token come after 99 others."""
    decoding = max(case.lengths) == 1
    lengths = tuple(100 for _ in case.lengths) if decoding else case.lengths
    at = _cache(Case(**{**vars(case), "lengths": lengths}), setup.device, generator, [])
    row_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(case.lengths)).int()
    parts = [torch.arange(length) for length in case.lengths]
    position_T = torch.full((len(lengths),), 99) if decoding else torch.cat(parts)
    return at, row_T.to(setup.device), position_T.to(setup.device)


def fused_store(case: Case, setup: Setup) -> Work:
    """``qk_norm_rope_store``: norms, partial rotary positions and the KV store; q, k and v are slices of one projection."""
    dims, tokens = case.dims, sum(case.lengths)
    heads = (dims.heads, dims.kv_heads, dims.kv_heads)
    footprint = 2 * sum(heads) * dims.head_dim * tokens * itemsize(case.dtype)
    layers = _layers(case, setup.sets(footprint, 1, dims.attention_layers))
    generator = setup.generator()
    at, row_T, position_T = _destinations(case, setup, generator)
    device, pairs = at.buffer.device, dims.head_dim // 8
    angle_TP = torch.rand(tokens, pairs, generator=generator).to(device) * 6.3
    norms = [normal(generator, (dims.head_dim,), device, "float32") * 0.1 for _ in range(2)]
    rest: list[Any] = [*norms, 1e-6, angle_TP.cos(), angle_TP.sin(), at.kv_table_BN, row_T, position_T]
    widths = [2 * dims.heads * dims.head_dim, *(count * dims.head_dim for count in heads[1:])]

    def projection() -> tuple[torch.Tensor, ...]:
        q, k, v = normal(generator, (tokens, sum(widths)), device, case.dtype).split(widths, dim=1)
        q = q.unflatten(1, (dims.heads, 2 * dims.head_dim))[:, :, : dims.head_dim]
        return (q, *(x.unflatten(1, (dims.kv_heads, dims.head_dim)) for x in (k, v)))

    qkv = [projection() for _ in layers]
    dtype, before = torch_dtype(case.dtype), at.buffer.clone()
    expected = naive_fused.qk_norm_rope_store(at.buffer, at.layout, layers[0], *[*qkv[0], *rest])
    stored = at.buffer.clone()

    def implementation(operation: Operation, graph: bool) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(at.buffer, at.layout, layers[i], *[*qkv[i], *rest])

        def error() -> float:
            at.buffer.copy_(before)
            out = run(0)
            found, wanted = (buffer.view(dtype) for buffer in (at.buffer, stored))
            if not torch.equal(found.isnan(), wanted.isnan()):
                return float("inf")
            return worst([(out, expected), (found.nan_to_num(), wanted.nan_to_num())])

        return Implementation(run, error, graph)

    def triton() -> Implementation:
        from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store

        return implementation(qk_norm_rope_store, True)

    work = Work(len(layers), footprint, footprint + angle_TP.numel() * 8, 0)
    if setup.device.type == "cuda":
        work.build["triton"] = triton
    if case.with_torch:
        work.build["torch"] = lambda: implementation(TorchBackend().qk_norm_rope_store, False)
    return work


# -- what is compiled beforehand -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeLaunch:
    """A paged decode as it is compiled: a case's layout and sizes, a tuning and the splits."""

    case: Case
    tuning: "Tuning"
    splits: int

    @classmethod
    def of(cls, case: Case, multiprocessors: int, tuning: "Tuning | None" = None) -> "DecodeLaunch":
        """What the library launches for a case of rows of one length; its own tuning where None. Cases that compile to the
        same give equal launches."""
        from hybridcache.kernels.paged_decode.tiles import choose_splits, choose_tuning

        dims, dtype = case.dims, getattr(torch, case.dtype)
        assert case.manager_block
        programs, tokens = len(case.lengths) * dims.kv_heads, -(-max(case.lengths) // case.manager_block)
        layout = _cache(
            Case(**{**vars(case), "lengths": (0,)}), torch.device("cpu"), torch.Generator(), [], layers=1
        ).layout
        tuning = tuning or choose_tuning(layout, dims.heads, dtype, programs, multiprocessors)
        splits = choose_splits(programs, tokens * case.manager_block, multiprocessors, tuning)
        return cls(Case(**{**vars(case), "lengths": (300, 70)}), tuning, splits)


def decode_launches(cases: Iterable[Case], multiprocessors: int) -> list[DecodeLaunch]:
    """What the paged decodes among the cases compile, once each."""
    chosen = (case for case in cases if case.operation == "paged_decode")
    return list(dict.fromkeys(DecodeLaunch.of(case, multiprocessors) for case in chosen))


def launch_decode(item: DecodeLaunch) -> None:
    """Compile a paged decode by launching it on two short rows."""
    from hybridcache.kernels.paged_decode.triton import paged_decode

    dims = item.case.dims
    at = _cache(item.case, torch.device("cuda"), torch.Generator(), [])
    q_BHD = normal(torch.Generator(), (2, dims.heads, dims.head_dim), at.buffer.device, item.case.dtype)
    inputs = (at.layout, 0, q_BHD, at.kv_table_BN, at.context_len_B, dims.head_dim**-0.5)
    paged_decode(at.buffer, *inputs, num_splits=item.splits, tuning=item.tuning)
    torch.cuda.synchronize()
