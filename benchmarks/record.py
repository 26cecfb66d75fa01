"""Keep a run: ``python -m benchmarks.record RUN_DIR --name shared_pool-h100``.

Writes ``benchmarks/results/NAME.json``: the run's environment (versions, device, commit, command) and its results, one row
per phase x strategy x workload x repetition, without the columns that say nothing of it. Figures in README and docs name the
record they come from.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True, help="of the record, e.g. shared_pool-h100")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--figures", nargs="*", default=[], help="figures to copy into docs/figures/, without suffix")
    args = parser.parse_args()
    for file in ("results.parquet", "environment.json"):
        if not (args.run_dir / file).exists():
            sys.exit(f"error: run_dir={str(args.run_dir)!r}: has no {file}; give a finished run's directory")
    rows = pd.read_parquet(args.run_dir / "results.parquet")
    record = {
        "environment": json.loads((args.run_dir / "environment.json").read_text()),
        "results": [
            {name: value for name, value in row.items() if value is not None}
            for row in json.loads(rows.to_json(orient="records"))
        ],
    }
    args.to.mkdir(parents=True, exist_ok=True)
    target = args.to / f"{args.name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)
    for name in args.figures:
        for suffix in (".png", ".csv"):
            copied = ROOT / "docs" / "figures" / f"{name}{suffix}"
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.run_dir / "figures" / f"{name}{suffix}", copied)
            print(copied.relative_to(ROOT))


if __name__ == "__main__":
    main()
