"""Gated delta net: decode steps and prefills, whole and in their parts, on states scattered over a pool.

Shapes: T tokens, B rows, L layers (here: disjoint sets of memory), C conv channels, V value heads, J value dim.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from benchmarks import peers
from benchmarks.case import CONV_WIDTH, Case
from benchmarks.work import Implementation, Saved, Setup, Work, worst
from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_decode import naive as naive_decode
from hybridcache.kernels.gdn_prefill import naive as naive_prefill
from hybridcache.kernels.gdn_prefill.testing import PrefillCase, checkpoint_table, prefill_case
from hybridcache.kernels.testing import state_case
from hybridcache.kernels.torch_ops import gated_delta_net as torch_ops
from hybridcache.spec.dtypes import itemsize

MAX_SETS = 192
CHECKED_ROWS = 2
CHECKED_TOKENS = 2_048
"""Outputs of so many first tokens of a checked row are compared: later ones cannot change them."""
NAIVE_TOKENS = 512
"""Up to so many tokens the reference takes one after the other, beyond them the torch backend's chunks in float64."""
START_CHUNKS = {"cuda": 64, "cpu": 1}
"""Chunks of 64 tokens that lie before a prefill, so that it reads a state."""


def _options(case: Case) -> dict[str, Any]:
    dims = case.dims
    sizes = {"key_dim": dims.state_dim, "value_dim": dims.state_dim, "width": CONV_WIDTH}
    return {"k_heads": dims.k_heads, "v_heads": dims.v_heads, "state_dtype": case.dtype, **sizes}


def _delta_flops(case: Case, tokens: int) -> int:
    """Operations of the recurrence: decay, prediction, outer product and output, ``7 I J`` per token and value head. A chunked
    form does more, so its rate counts useful operations only."""
    return tokens * case.dims.v_heads * 7 * case.dims.state_dim**2


def decode(case: Case, setup: Setup, more: Mapping[str, Any] = MappingProxyType({})) -> Work:
    """``gdn_decode``: conv update, gates and recurrence of one token per row, state in place. ``more``: further
    implementations, for CUDA."""
    rows, stored = len(case.lengths), case.dims.state(case.dtype).stored_bytes
    sets = setup.sets(rows * stored, case.warm_sets, MAX_SETS)
    positions = [100 + row for row in range(rows)]
    at = state_case(setup.generator(), positions=positions, layers=sets, device=setup.device, **_options(case))
    at.conv_weight_CW = at.conv_weight_CW.t().contiguous().t()  # by tap, as the model keeps it
    checked = min(CHECKED_ROWS, rows)
    caches = [StateCache(at.buffer, at.layout, layer) for layer in range(sets)]
    inputs = at.step(0)[2:]
    by_row = (0, 2, 3, 6, 7, 8)
    entries = at.state_write_BL[:checked, 0].tolist()
    saved = Saved(at.buffer, [(at.layout.address(0, entry), stored) for entry in entries])
    part = [x[:checked] if i in by_row else x for i, x in enumerate(inputs)]
    expected = naive_decode.gdn_decode(caches[0], *part)
    states = [caches[0].stored(entry)[0].clone() for entry in entries]
    saved.restore()

    def implementation(operation: Callable[..., torch.Tensor], graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(caches[i], *inputs)

        def error() -> float:
            saved.restore()
            out = run(0)[:checked]
            found = [caches[0].stored(entry)[0] for entry in entries]
            return worst([(out, expected), *zip(found, states)])

        return Implementation(run, error, graph)

    channels, v_heads, dim = case.dims.channels, case.dims.v_heads, case.dims.state_dim
    state_bytes = v_heads * dim * dim * itemsize(case.dtype)
    ring_bytes = channels * CONV_WIDTH * 2  # W - 1 columns read and one written
    activation_bytes = 2 * (channels + 2 * v_heads + v_heads * dim)
    work = Work(
        sets=sets,
        footprint=rows * stored,
        bytes=rows * (2 * state_bytes + ring_bytes + activation_bytes) + channels * CONV_WIDTH * 2,
        flops=_delta_flops(case, rows) + rows * channels * 2 * CONV_WIDTH,
    )
    work.offer(case, setup, implementation)
    if setup.device.type == "cuda" and peers.state("fla") == "installed":
        work.build["fla"] = lambda: peers.fla(case.dims, rows, 1, case.dtype, sets, setup)
    return work.with_more(more, implementation)


def prefill(case: Case, setup: Setup, more: Mapping[str, Any] = MappingProxyType({})) -> Work:
    """``gdn_prefill`` (all of it), ``gdn_delta`` (the delta rule without the conv) or ``gdn_conv`` (the conv and the rings).
    ``more``: further implementations of all of it, or tiles of a part, for CUDA."""
    rows, tokens, stored = len(case.lengths), sum(case.lengths), case.dims.state(case.dtype).stored_bytes
    channels, v_heads, dim = case.dims.channels, case.dims.v_heads, case.dims.state_dim
    out_channels = v_heads * dim
    footprint = 2 * tokens * (channels + out_channels + 2 * v_heads) + rows * stored
    sets = setup.sets(footprint, 1, 4)
    kept = sum(length // case.checkpoint for length in case.lengths) if case.checkpoint else 0
    at = prefill_case(
        setup.generator(), lengths=case.lengths, starts=[64 * START_CHUNKS[setup.device.type]] * rows, layers=sets,
        device=setup.device, pool_bytes=(rows * sets + kept + rows + 3) * stored, **_options(case),
    )  # fmt: skip
    part = _Part(at, stored)
    xs = [at.x_TC, *(at.x_TC.clone() for _ in range(sets - 1))]
    caches = [StateCache(at.buffer, at.state.layout, layer) for layer in range(sets)]

    def step(i: int) -> tuple[Any, ...]:
        return (caches[i], xs[i], *at.step(i)[3:])

    def checkpoints(layer: int) -> dict[str, Any]:
        if not case.checkpoint:
            return {}
        table_BNL = checkpoint_table(at, layer, case.checkpoint)
        return {"checkpoint_table_BNL": table_BNL, "checkpoint_interval": case.checkpoint}

    def whole(operation: Callable[..., torch.Tensor], graph: bool = True) -> Implementation:
        kept = [checkpoints(layer) for layer in range(sets)]

        def run(i: int) -> torch.Tensor:
            return operation(*step(i), **kept[i])

        return Implementation(run, lambda: part.error(lambda: run(0)), graph)

    def parts(tiles: Any = None) -> Implementation:
        """The launches of one part; those that it needs before it have run once."""
        from hybridcache.kernels.gdn_prefill.triton import Prefill

        options: list[dict[str, Any]] = [{**checkpoints(i), "tiles": tiles} for i in range(sets)]
        calls = [Prefill(*step(i), **options[i]) for i in range(sets)]

        def prepare(i: int) -> None:
            calls[i].conv()
            calls[i].chunks()

        def run(i: int) -> torch.Tensor:
            if case.operation == "gdn_conv":
                calls[i].conv()
                calls[i].rings()
            else:
                calls[i].chunks()
                calls[i].states()
            return calls[i].out_TVJ

        def complete() -> torch.Tensor:
            prepare(0)
            calls[0].rings()
            calls[0].states()
            return calls[0].out_TVJ

        for i in range(sets):
            prepare(i)
        return Implementation(run, lambda: part.error(complete))

    state_bytes = v_heads * dim * dim * itemsize(case.dtype)
    delta_bytes = 2 * tokens * (out_channels + 2 * v_heads) + (2 * rows + kept) * state_bytes
    ring_bytes = (2 * rows + kept) * channels * CONV_WIDTH * 2
    bytes_of = {
        "gdn_prefill": 2 * tokens * channels + ring_bytes + delta_bytes,
        "gdn_delta": 2 * tokens * channels + delta_bytes,
        "gdn_conv": 4 * tokens * channels + ring_bytes,
    }
    conv_flops = tokens * channels * 2 * CONV_WIDTH
    delta_flops = _delta_flops(case, tokens)
    flops_of = {"gdn_prefill": conv_flops + delta_flops, "gdn_delta": delta_flops, "gdn_conv": conv_flops}
    work = Work(sets, footprint, bytes_of[case.operation], flops_of[case.operation])
    if case.operation == "gdn_prefill":
        work.offer(case, setup, whole)
    elif setup.device.type == "cuda":
        work.build["triton"] = parts
    by_peer = case.operation == "gdn_delta" and not case.checkpoint and setup.device.type == "cuda"
    if by_peer and peers.state("fla") == "installed":
        work.build["fla"] = lambda: peers.fla(case.dims, rows, case.lengths[0], "float32", sets, setup)
    return work.with_more(more, whole if case.operation == "gdn_prefill" else parts)


class _Part:
    """The first tokens of some rows: what they should give, and the error of a run that is to give it."""

    def __init__(self, at: PrefillCase, stored: int) -> None:
        self.at = at
        rows = range(min(CHECKED_ROWS, len(at.lengths)))
        offsets = at.cu_seqlens.tolist()
        counts = [min(at.lengths[row], CHECKED_TOKENS) for row in rows]
        self.entries = at.state.state_write_BL[: len(rows), 0].tolist()
        self.whole = [count == at.lengths[row] for row, count in zip(rows, counts)]
        self.tokens = torch.cat([torch.arange(offsets[row], offsets[row] + count) for row, count in zip(rows, counts)])
        self.tokens = self.tokens.to(at.buffer.device)
        layout = at.state.layout
        self.cache = StateCache(at.buffer, layout, 0)
        self.saved = Saved(at.buffer, [(layout.address(0, entry), stored) for entry in self.entries])
        _, _, x, weight, a, b, a_log, dt_bias, read_BL, write_BL, cu, start = at.step(0)
        inputs = [x[self.tokens], weight, a[self.tokens], b[self.tokens], a_log, dt_bias]
        bounds = torch.tensor([0, *counts]).cumsum(0).to(cu)
        inputs += [read_BL[: len(rows)], write_BL[: len(rows)], bounds, start[: len(rows)]]
        if len(self.tokens) <= NAIVE_TOKENS:
            self.out = naive_prefill.gdn_prefill(self.cache, *inputs)
        else:
            exact = [x.double() if x.is_floating_point() else x for x in inputs]
            self.out = torch_ops.gdn_prefill(self.cache, *exact)
        self.states = [self.cache.stored(entry)[0].clone() for entry in self.entries]
        self.saved.restore()

    def error(self, run: Callable[[], torch.Tensor]) -> float:
        """Relative error of the outputs, and of the states of rows that were compared whole."""
        self.saved.restore()
        pairs = [(run()[self.tokens], self.out)]
        for entry, expected, whole in zip(self.entries, self.states, self.whole):
            if whole:
                pairs.append((self.cache.stored(entry)[0], expected))
        return worst(pairs)
