"""Who serves most where all device memory counts, simulated: ``python -m benchmarks.equal_memory --out FILE``.

A serving record has every strategy with one cache budget; what PyTorch took beside the cache differs, mostly by block tables.
The simulator, with the efficiencies of this project's kernels, serves the same workloads twice: at the record's budget, and
with what a strategy took less than the greediest given to it as cache. ``static_split`` is also swept over its ratio, which a
user would tune. Simulated rates are for comparing strategies with each other.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.observe.environment import environment
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.sim.simulator import simulate
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from hybridcache.workloads import build_workload
from models.configs import shipped_fields

RECORD = Path(__file__).parent / "results" / "serve_throughput-h100.json"
BUDGET = 2 << 30
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_pool": ("shared_pool", {}),
    "shared_pool_carve": ("shared_pool", {"mode": "carve"}),
    "two_ended": ("two_ended", {}),
    "padded_page": ("padded_page", {}),
    "static_split": ("static_split", {}),
}
WORKLOADS = {"chat": (256, 1024, 128), "short": (512, 64, 256), "mixed": (256, 2048, 64)}
RATIOS = (0.9, 1.5, 2, 3, 5, 8, 12)
DEVICE = DeviceSpec(
    prefill_attention_efficiency=602 / 723, state_prefill_efficiency=0.095 * 2.76 / 0.955, step_overhead_s=0.05e-3
)
"""An H100 with the rates of ``kernels-h100.json`` (602 TFLOP/s at 1x8192, 0.955 ms of delta rule at 1x32768)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    taken: dict[str, int] = {}
    for row in json.loads(RECORD.read_text())["results"]:
        taken[row["strategy"]] = max(taken.get(row["strategy"], 0), int(row["workspace_bytes"]))
    fields = shipped_fields("qwen3_next_8l")
    spec = CacheSpec.from_config(fields, kv_dtype="bfloat16", state_dtype="float32")
    cost = CostModel.from_config(fields, spec, DEVICE, cache_bytes=BUDGET)
    rows = []
    for workload, (requests, prompt, output) in WORKLOADS.items():
        stream = build_workload("fixed_lengths", num_requests=requests, prompt_tokens=prompt, output_tokens=output)

        def rate(
            name: str, budget: int, stream: Any = stream, tokens: int = requests * output, **options: Any
        ) -> float:
            strategy = build(name, spec=spec, budget_bytes=budget, physical=True, **options)
            return tokens / simulate(stream, strategy, SchedulerConfig(), cost).duration_s

        for label, (name, options) in STRATEGIES.items():
            more = max(taken.values()) - taken[label]
            rows.append(
                {
                    "workload": workload,
                    "strategy": label,
                    "workspace_bytes": taken[label],
                    "equal_cache": rate(name, BUDGET, **options),
                    "equal_device_memory": rate(name, BUDGET + more, **options),
                }
            )
        rows += [
            {
                "workload": workload,
                "strategy": "static_split",
                "ratio": ratio,
                "equal_cache": rate("static_split", BUDGET, ratio=ratio),
            }
            for ratio in RATIOS
        ]
        for row in rows:
            if row["workload"] == workload:
                print(json.dumps(row), flush=True)
    out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
