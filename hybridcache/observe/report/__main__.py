"""``python -m hybridcache.observe.report RUN_DIR``: write a run's figures and page anew."""

import argparse
import sys

from hybridcache.errors import UserError
from hybridcache.observe.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hybridcache.observe.report", description="Write a run's report anew."
    )
    parser.add_argument("run_dir", help="output directory of a run")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
