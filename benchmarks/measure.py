"""Measure: a case's implementations checked, then timed; one row each, also where one fails."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks import attention, copies, gated_delta_net
from benchmarks.block_tables import expansions
from benchmarks.case import Case
from benchmarks.processes import Row, describe, isolated
from benchmarks.timing import Ceilings, Timing, measure_ceilings, time_launches
from benchmarks.work import Setup, Work

Builder = Callable[[Case, Setup], Work]

BUILDERS: dict[str, Builder] = {
    "gdn_decode": gated_delta_net.decode,
    "gdn_prefill": gated_delta_net.prefill,
    "gdn_delta": gated_delta_net.prefill,
    "gdn_conv": gated_delta_net.prefill,
    "paged_decode": attention.decode,
    "paged_prefill": attention.prefill,
    "kv_store": attention.store,
    "qk_norm_rope_store": attention.fused_store,
    "block_copy": copies.copy,
    "swap_out": copies.swap,
    "swap_in": copies.swap,
}
HOST_OPERATION = "table_expansion"
"""Has no kernel."""

TOLERANCE = 1e-2
"""Relative error, above which a result is wrong and its time is not reported."""
LAUNCHES = 16
"""Launches of a warm timing; a cold one has one per disjoint set, at least ``MIN_COLD``."""
MIN_COLD = 4
ERROR_CHARS = 400
COLUMNS = (
    "op", "impl", "shape", "dtype", "kernel_block", "manager_block", "layout", "l2", "median_ms", "spread", "launches",
    "clock", "bytes", "flops", "gbps", "tflops", "fraction", "bound", "rel_error", "error",
)  # fmt: skip
"""Columns of every row; None where a column has no meaning. ``fraction``: the least time that the binding ceiling
(``bound``) allows, over the median."""


class DeviceLost(RuntimeError):
    """The device answers no more: nothing can be measured in this process."""


@dataclass(frozen=True)
class Bench:
    """What all cases of a run share. ``ceilings`` is None on a CPU."""

    setup: Setup
    ceilings: Ceilings | None

    def rows(self, case: Case, builder: Builder | None = None) -> Iterator[Row]:
        """Rows of every implementation of a case, one per state of the L2 cache that its memory allows. ``builder``: of the
        work, the operation's own where None.

        Raises:
            DeviceLost: an error after which the device is of no more use.
        """
        if case.operation == HOST_OPERATION:
            yield from self._host_rows(case)
            return
        try:
            work = (builder or BUILDERS[case.operation])(case, self.setup)
        except Exception as error:  # one case must not hide the others; its row says what happened
            yield failed(case, describe(error))
            self._require_device()
            return
        for name, build in work.build.items():
            try:
                implementation = build()
                rel_error = implementation.error()
                if not rel_error <= TOLERANCE:
                    raise ArithmeticError(f"wrong result: relative error {rel_error:.2e}, at most {TOLERANCE:g}")
                for l2, order in self.orders(case, work):
                    launches = [partial(implementation.run, i) for i in order]
                    timing = time_launches(launches, self.setup.device, graph=implementation.graph)
                    yield self._row(case, name, work, l2, timing, rel_error)
            except Exception as error:
                yield failed(case, describe(error), name)
                self._require_device()
            if self.setup.device.type == "cuda":
                torch.cuda.empty_cache()

    def orders(self, case: Case, work: Work) -> Iterator[tuple[str | None, list[int]]]:
        """State of the L2 cache, and which set of memory each launch of a timing takes.

        Warm: the sets fit in the cache, and every launch finds what an earlier one left. Cold: a launch's data was evicted
        by those of the launches in between.
        """
        if self.setup.device.type != "cuda":
            yield None, [0]
            return
        if case.warm_sets * work.footprint <= self.setup.l2_bytes:
            yield "warm", [i % min(case.warm_sets, work.sets) for i in range(LAUNCHES)]
        if work.sets * work.footprint >= 2 * self.setup.l2_bytes:
            launches = max(work.sets, MIN_COLD)
            yield "cold", [i % work.sets for i in range(launches)]

    def _row(self, case: Case, name: str, work: Work, l2: str | None, timing: Timing, rel_error: float) -> Row:
        seconds = timing.median_ms * 1e-3
        rates = {"gbps": work.bytes / seconds / 1e9, "tflops": work.flops / seconds / 1e12}
        row = {**blank(case, name), "l2": l2, "bytes": work.bytes, "flops": work.flops, **rates, "rel_error": rel_error}
        row |= {each: getattr(timing, each) for each in ("median_ms", "spread", "launches", "clock")}
        if self.ceilings is not None:
            row["fraction"], row["bound"] = fraction(work, seconds, self.ceilings)
        return row

    def _host_rows(self, case: Case) -> Iterator[Row]:
        for found in expansions(case, self.setup.seed):
            row = {**blank(case, found["impl"]), "bytes": found["bytes"], "rel_error": found["rel_error"]}
            if found["rel_error"] != 0.0:
                row["error"] = "wrong result: entries name the wrong memory"
            elif found["seconds"] is not None:
                row |= {"median_ms": found["seconds"] * 1e3, "clock": "host", "launches": 1}
            yield row

    def _require_device(self) -> None:
        if self.setup.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.setup.device)
        except Exception as error:
            raise DeviceLost(describe(error)) from error


def fraction(work: Work, seconds: float, ceilings: Ceilings) -> tuple[float, str]:
    """The least time that the ceilings allow over the time it took, and which ceiling that is."""
    rate = {"copy": ceilings.copy_bytes, "to_host": ceilings.to_host_bytes, "from_host": ceilings.from_host_bytes}
    floors = {work.link: work.bytes / rate[work.link], "matmul": work.flops / ceilings.matmul_flops}
    bound = max(floors, key=lambda name: floors[name])
    return floors[bound] / seconds, bound


def blank(case: Case, name: str) -> Row:
    """A row that says what was to be measured."""
    known = {"op": case.operation, "impl": name}
    known |= {each: getattr(case, each) for each in ("shape", "dtype", "kernel_block", "manager_block", "layout")}
    return {column: known.get(column) for column in COLUMNS}


def failed(case: Case, text: str, name: str = "all") -> Row:
    """The row of an implementation (or of all of a case) that gave no time."""
    return {**blank(case, name), "error": text[:ERROR_CHARS]}


def compile_case(case: Case, builder: Builder | None = None) -> None:
    """Compile what a case launches, or most of it, by launching it on little memory, in a process of its own."""
    if case.operation != HOST_OPERATION:
        (builder or BUILDERS[case.operation])(case.short(), Setup(torch.device("cuda"), 0, 0)).launch_all()


def isolated_ceilings(limit_s: float) -> Ceilings:
    """The device's ceilings, measured in a process of its own, which then gives its memory back.

    Raises:
        RuntimeError: the plainest operations fail on this device.
    """
    row, *_ = isolated(_ceiling_rows, [None], lambda _, text: {"error": text}, limit_s=limit_s)
    if "error" in row:
        raise RuntimeError(f"the device's ceilings cannot be measured: {row['error']}")
    return Ceilings(**row)


def _ceiling_rows(_: None) -> Iterator[Row]:
    yield asdict(measure_ceilings())
