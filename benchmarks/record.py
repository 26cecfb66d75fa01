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
from typing import Any

import pandas as pd

from hybridcache.observe.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser of a script's arguments whose help is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def keep(path: Path | None, **found: Any) -> None:
    """Write a record: this process's environment, then what was found. No path, no record."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **found}, indent=1, default=str) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True, help="of the record, e.g. shared_pool-h100")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--figures", nargs="*", default=[], help="figures to copy into docs/figures/, without suffix")
    args = parser.parse_args()
    for file in ("results.parquet", "environment.json"):
        if not (args.run_dir / file).exists():
            sys.exit(f"error: run_dir={str(args.run_dir)!r}: has no {file}; give a finished run's directory")
    rows = json.loads(pd.read_parquet(args.run_dir / "results.parquet").to_json(orient="records"))
    results = [{name: value for name, value in row.items() if value is not None} for row in rows]
    ran_in = json.loads((args.run_dir / "environment.json").read_text())
    keep(args.to / f"{args.name}.json", environment=ran_in, results=results)
    print(args.to / f"{args.name}.json")
    for name in (f"{figure}{suffix}" for figure in args.figures for suffix in (".png", ".csv")):
        print(shutil.copyfile(args.run_dir / "figures" / name, ROOT / "docs" / "figures" / name).relative_to(ROOT))


if __name__ == "__main__":
    main()
