"""Strategies of an experiment: the YAML files in ``conf/strategy/`` (or a config directory of the user's) by name."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.lib.settings import container
from hybridcache.errors import UserError, bad
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Strategy, build, strategy_class

CONF = Path(__file__).resolve().parents[2] / "conf"
AUTO: dict[str, dict[str, Any]] = yaml.safe_load((CONF / "auto.yaml").read_text(encoding="utf-8"))
"""What ``auto`` means, by section and kind of device."""


def cache_columns(spec: CacheSpec) -> dict[str, Any]:
    """The columns of a result row that say what was stored, and where."""
    kv_dtype = spec.attention.dtype if spec.attention else None
    return stored_columns(kv_dtype, spec.state.recurrent_dtype if spec.state else None, spec.tp_size)


def stored_columns(kv_dtype: str | None, state_dtype: str | None, tp_size: int = 1) -> dict[str, Any]:
    """:func:`cache_columns` of a row that is about no whole model; None for what it does not touch."""
    return {"tp_size": tp_size, "num_devices": tp_size, "kv_dtype": kv_dtype, "state_dtype": state_dtype}


@dataclass(frozen=True)
class CacheMemory:
    """What every strategy of a comparison gets: the same bytes for the same model.

    Args:
        spec: what the model stores, on one rank.
        budget_bytes: of one rank, block tables included.
        table_rows: requests that may run at once, each with a row of the block tables.
        max_request_tokens: of the longest request that the model allows; None: it does not say.
    """

    spec: CacheSpec
    budget_bytes: int
    table_rows: int = 0
    max_request_tokens: int | None = None


@dataclass(frozen=True)
class StrategyChoice:
    """One strategy of a comparison: its label in results, its class, its options."""

    label: str
    target: str
    options: dict[str, Any]
    searched: tuple[str, ...] = ()
    """Options whose values were searched for this comparison."""

    @property
    def supports_physical(self) -> bool:
        return strategy_class(self.target).supports_physical

    def build(self, memory: CacheMemory, *, physical: bool = False) -> Strategy:
        """An empty strategy over that memory."""
        tables = {"table_rows": memory.table_rows, "max_request_tokens": memory.max_request_tokens}
        try:
            return build(
                self.target,
                spec=memory.spec,
                budget_bytes=memory.budget_bytes,
                physical=physical,
                **tables,  # type: ignore[arg-type]
                **self.options,
            )
        except TypeError as error:  # a value that the class could not even compare
            fix = f"{self.target} cannot use one of these values ({' '.join(str(error).split())})"
            raise bad(f"strategy_options.{self.label}", self.options, fix) from error

    def with_options(self, **options: Any) -> "StrategyChoice":
        return replace(self, options={**self.options, **options})

    def labels(self, phase: str, workload: str, repetition: int) -> dict[str, Any]:
        """What names a result row, and the events behind it."""
        return {"phase": phase, "strategy": self.label, "workload": workload, "repetition": repetition}

    def columns(self) -> dict[str, Any]:
        """The columns of a result row that say which strategy ran."""
        return {
            "strategy": self.label,
            "strategy_options": json.dumps(self.options, sort_keys=True, default=str),
            "searched_options": ", ".join(f"{name}={self.options[name]}" for name in self.searched),
        }


def config_directories() -> list[Path]:
    """Where config groups are looked up: what the command line added, then the project's own ``conf/``."""
    found = []
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        found = [Path(source.path) for source in sources if source.schema == "file"]
    return [*found, CONF]


def choose_strategies(cfg: DictConfig) -> list[StrategyChoice]:
    """The strategies named in ``cfg.strategies``, with ``cfg.strategy_options`` laid over their files.

    Raises:
        UserError: a name without a file or given twice, a file that is no YAML or lacks ``_target_``, options for a strategy
            that is not in the run.
    """
    directories = config_directories()
    known = sorted({path.stem for directory in directories for path in (directory / "strategy").glob("*.yaml")})
    extra, names = container(cfg.strategy_options), list(cfg.strategies)
    for name in extra:
        if name not in names:
            raise bad("strategy_options", name, f"is not in strategies={names}")
    if not names:
        raise bad("strategies", [], f"choose some of {', '.join(known)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise bad("strategies", twice, "is named twice; for two variants of one strategy give a YAML file to each")
    return [_choice(name, directories, known, extra.get(name) or {}) for name in names]


def _choice(name: str, directories: list[Path], known: list[str], extra: dict[str, Any]) -> StrategyChoice:
    file = next((path for d in directories if (path := d / "strategy" / f"{name}.yaml").exists()), None)
    if file is None:
        raise bad("strategies", name, f"choose some of {', '.join(known)}")
    if not isinstance(extra, dict):
        raise bad(f"strategy_options.{name}", extra, "give options by name, e.g. {ratio: 0.5}")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or "_target_" not in loaded:
        raise bad("_target_", None, f"{file} must name the strategy's class under _target_")
    options = {str(key): value for key, value in loaded.items()}
    return StrategyChoice(name, str(options.pop("_target_")), {**options, **extra})
