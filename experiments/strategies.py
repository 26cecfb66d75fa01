"""Strategies of an experiment: the YAML files in ``conf/strategy/`` (or a config directory of the user's) by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hybridcache.errors import bad
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Strategy, build, strategy_class

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class StrategyChoice:
    """One strategy of a comparison: its label in results, its class, its options."""

    label: str
    target: str
    options: dict[str, Any]

    @property
    def supports_physical(self) -> bool:
        return strategy_class(self.target).supports_physical

    def build(self, spec: CacheSpec, budget_bytes: int, *, physical: bool = False) -> Strategy:
        return build(self.target, spec=spec, budget_bytes=budget_bytes, physical=physical, **self.options)


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
        UserError: a name without a file, a file without ``_target_``, options for a strategy that is not in the run.
    """
    directories = config_directories()
    known = sorted({path.stem for directory in directories for path in (directory / "strategy").glob("*.yaml")})
    extra = OmegaConf.to_container(cfg.get("strategy_options") or OmegaConf.create(), resolve=True)
    assert isinstance(extra, dict)
    for name in extra:
        if name not in cfg.strategies:
            raise bad("strategy_options", name, f"is not in strategies={list(cfg.strategies)}")
    if not cfg.strategies:
        raise bad("strategies", [], f"choose some of {', '.join(known)}")
    choices = []
    for name in cfg.strategies:
        file = next((path for d in directories if (path := d / "strategy" / f"{name}.yaml").exists()), None)
        if file is None:
            raise bad("strategies", name, f"choose some of {', '.join(known)}")
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        if not isinstance(loaded, dict) or "_target_" not in loaded:
            raise bad("_target_", None, f"{file.name} must name the strategy's class under _target_")
        options = {str(key): value for key, value in loaded.items()}
        target = options.pop("_target_")
        choices.append(StrategyChoice(name, target, {**options, **(extra.get(name) or {})}))
    return choices
