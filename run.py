"""Entry point: ``python run.py +experiment=shared_pool``. Any key that the experiment reads can be overridden.

Wrong input ends with one line that says what to change and exit status 2; a defect of the program ends with a traceback.
In a sweep (``--multirun``) a point with wrong input says its line, the other points run, and the status is 2 in the end.
"""

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from typing import NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridcache.errors import UserError

CONF = Path(__file__).resolve().parent / "conf"
EXPERIMENTS = CONF.parent / "experiments"
GROUPS = ("experiment", "model", "workload", "engine", "device", "tracking", "placement", "retention", "eviction")
USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError)


class BadPoint(Exception):
    """A point of a sweep that said its line; Hydra raises it again when the sweep has ended."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run(cfg: DictConfig) -> None:
    from experiments.lib.harness import run_experiment

    job = HydraConfig.get()
    try:
        run_experiment(cfg, Path(job.runtime.output_dir), list(job.overrides.task))
    except USER_ERRORS as error:
        if job.mode != RunMode.MULTIRUN:
            _fail(_line(error))
        print(f"error: point {job.job.num} ({' '.join(job.overrides.task)}): {_line(error)}", file=sys.stderr)
        raise BadPoint from error


def main() -> None:
    """Run the command line; the console script ``hybridcache`` is this function."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function whole, to be told apart below
    try:
        _check_choices(sys.argv[1:])
        _run()
    except BadPoint:
        sys.exit(2)
    except USER_ERRORS as error:
        _fail(_line(error))
    except OSError as error:
        if error.filename is None or any(
            call.filename.startswith(str(EXPERIMENTS)) for call in extract_tb(error.__traceback__)
        ):
            raise
        from experiments.lib.harness import unwritable  # Hydra could not make the run directory

        _fail(str(unwritable(error)))
    except KeyboardInterrupt:
        print("interrupted: what was written so far is in the run directory", file=sys.stderr)
        sys.exit(130)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


# -- one line for each error ---------------------------------------------------------------------------------------------


def _line(error: BaseException) -> str:
    """What the error says, as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is no YAML: {text}"
    override = getattr(error, "override", None)
    if override is not None:
        return f"{override}: Hydra cannot read it ({text})"
    if "Key 'experiment_name' is not in struct" in text:
        return (
            "experiment_name: the experiment's YAML file does not set it; it needs the first line '# @package _global_'"
        )
    missing = re.search(r"Could not (?:override|delete from config) '([^']+)'", text)
    if missing:
        return _no_such_key(missing.group(1))
    return text


def _no_such_key(path: str) -> str:
    """Hydra found no key at ``path``; names those that are there, read from the configuration without other overrides."""
    from experiments.lib.harness import experiment_module
    from experiments.lib.settings import keys_read, not_read, unknown_key

    cfg = _composed()
    parent, _, last = path.rpartition(".")
    name = str(cfg.get("experiment_name"))
    if not parent:
        return str(not_read(path, name, keys_read(experiment_module(name).Config)))
    found = OmegaConf.select(cfg, parent)
    return str(unknown_key(path, last, [str(key) for key in found] if isinstance(found, DictConfig) else []))


def _composed() -> DictConfig:
    """The configuration with the command line's choices of groups only."""
    arguments = [argument for argument in sys.argv[1:] if argument.lstrip("+").partition("=")[0] in GROUPS]
    folders = ",".join(f"file://{folder.resolve()}" for folder in _config_folders(sys.argv[1:]))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [*arguments, f"hydra.searchpath=[{folders}]"])


def _config_folders(arguments: list[str]) -> list[Path]:
    """Folders that ``--config-dir`` adds."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(Path(value or following))
    return found


def _check_choices(arguments: list[str]) -> None:
    """Name the choices where an experiment is missing or a config group's file is misspelt (Hydra's own messages span many
    lines)."""
    if any(argument.lstrip("+").startswith(("--config-path", "-cp", "hydra.searchpath")) for argument in arguments):
        return  # names may stand elsewhere; Hydra says what it does not find
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    if "" in keys:
        raise UserError(f"{arguments[keys.index('')]!r}: there is no key before the value; give KEY=VALUE")
    folders = [CONF, *_config_folders(arguments)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir={str(folder)!r}: there is no such folder")
    asks_hydra = any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments)
    if not any(key in ("experiment", "experiment_name") for key in keys) and (len(folders) > 1 or not asks_hydra):
        known = _choices(folders, "experiment")
        raise UserError(f"no experiment chosen: add +experiment=NAME, one of {', '.join(known)}")
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in GROUPS or not value or "(" in value or value in ("null", "~"):
            continue
        known = _choices(folders, key)
        for choice in value.split(","):
            if choice not in known:
                near = get_close_matches(choice, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"{key}={choice!r}: {hint}choose one of {', '.join(known)}")


def _choices(folders: list[Path], group: str) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


if __name__ == "__main__":
    main()
