"""Entry point: ``python run.py +experiment=shared_pool``. Any key of ``conf/`` can be overridden on the command line.

Wrong input ends with one line that says what to change and exit status 2; a defect of the program ends with a traceback.
"""

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hybridcache.errors import UserError

CONF = Path(__file__).resolve().parent / "conf"
GROUPS = ("experiment", "model", "workload", "engine", "device", "tracking")
USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run(cfg: DictConfig) -> None:
    from experiments.harness import run_experiment

    try:
        run_experiment(cfg, Path(HydraConfig.get().runtime.output_dir))
    except USER_ERRORS as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """One line on stderr, status 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _check_choices(arguments: list[str]) -> None:
    """Name the choices where an experiment is missing or a config group's file is misspelt (Hydra's own messages span many
    lines)."""
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    if not any(key in ("experiment", "experiment_name") or key.startswith("-") for key in keys):
        known = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
        raise UserError(f"no experiment chosen: add +experiment=NAME, one of {', '.join(known)}")
    if any(argument.startswith(("--config-dir", "-cd", "--config-path", "-cp")) for argument in arguments):
        return
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in GROUPS or not value or "," in value or "(" in value:
            continue
        known = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        if value not in known:
            near = get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{key}={value!r}: {hint}choose one of {', '.join(known)}")


def main() -> None:
    """Run the command line; the console script ``hybridcache`` is this function."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function whole, to be told apart below
    try:
        _check_choices(sys.argv[1:])
        _run()
    except USER_ERRORS as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted: what was written so far is in the run directory", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
