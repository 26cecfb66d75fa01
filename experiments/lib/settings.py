"""Settings: an experiment's configuration is what it reads, and nothing else.

An experiment declares a dataclass ``Config`` (a subclass of :class:`Common`): its fields are the groups and keys that the
experiment reads, with their types. :func:`read_settings` keeps those, refuses on the command line whatever else was set
there, and turns every mistake into one line that names the key and those that exist.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError, bad
from hybridcache.sim.device import DeviceSpec
from hybridcache.spec import CacheSpec
from hybridcache.spec.architectures import known_to_transformers, text_config
from models.configs import shipped_fields

ROOT_KEYS = ("model", "workload", "engine", "device", "tracking", "kv_dtype", "state_dtype", "tp_size", "seed", "fast")
"""Keys of ``conf/config.yaml``. They stand in every composed configuration, whoever reads them."""


@dataclass
class Model:
    """``conf/model/``: fields of a Transformers configuration under a name."""

    name: str
    hf_config: dict[str, Any]


@dataclass
class Tracking:
    """``conf/tracking/``: Weights & Biases."""

    mode: str
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    dir: str | None


def _section(cls: type, **types: Any) -> type:
    """A dataclass of the same fields without the checks of ``cls``, which runs them later; ``types`` replace and add some."""
    hints = get_type_hints(cls)
    return make_dataclass(f"{cls.__name__}Section", ({f.name: hints[f.name] for f in fields(cls)} | types).items())


Engine = _section(SchedulerConfig, max_tokens_per_step=int | str, max_model_len=int | None)
"""``conf/engine/``: the scheduler's policies, whose token budget may be ``auto``, and the longest request to serve."""
Device = _section(DeviceSpec)
"""``conf/device/``: the device of the cost model."""


@dataclass
class RunsModel:
    """A section of a phase that runs a model. ``auto`` is replaced when the experiment resolves its settings."""

    device: str
    backend: str
    attention_backend: str
    checkpoint: str | None
    dtype: str
    repetitions: int
    cpu_threads: int


@dataclass
class Common:
    """What every experiment reads. A subclass adds a field for each group and key that its experiment reads."""

    experiment_name: str
    tracking: Tracking
    fast: bool


def read_settings(cfg: DictConfig, schema: type[Common], overrides: Sequence[str] = ()) -> DictConfig:
    """The part of ``cfg`` that an experiment reads, typed, interpolations resolved.

    Args:
        cfg: the composed configuration.
        schema: the experiment's ``Config``.
        overrides: the command line's (``["model=tiny", "+a.b=3"]``).

    Raises:
        UserError: a key that the experiment does not read was set, is unknown or missing, or has a value of a wrong type.
    """
    known = keys_read(schema)
    plain = _plain(cfg)
    for key in [*overridden(overrides), *(key for key in plain if key not in ROOT_KEYS)]:
        if key.partition(".")[0] not in known:
            raise not_read(key, cfg.experiment_name, known)
    chosen = {key: value for key, value in plain.items() if key in known and (key, value) != ("model", None)}
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(chosen))
    except ConfigKeyError as error:
        raise _unknown(str(error.full_key), schema) from error
    except OmegaConfBaseException as error:
        raise _wrong_type(error, OmegaConf.create(chosen)) from error
    missing = sorted(OmegaConf.missing_keys(typed) - {"model"})
    if missing:
        raise bad(missing[0], None, "give it in the experiment's YAML file or on the command line")
    found = OmegaConf.create(OmegaConf.to_container(typed))
    if "model" in known and "model" not in chosen:
        found.model = None  # the experiment's own choice
    if "seed" in found and found.seed < 0:
        raise bad("seed", found.seed, "give a whole number of at least 0")
    return found  # type: ignore[return-value]


def keys_read(schema: type[Common]) -> list[str]:
    """The groups and keys that an experiment reads, those that all read last."""
    common = [field.name for field in fields(Common)]
    own = [field.name for field in fields(schema) if field.name not in common]
    return own + common


FIXES = {
    "is not a ListConfig": "give a list, e.g. [a,b]",
    "converted to Integer": "give a whole number",
    "converted to Float": "give a number",
    "valid bool": "give true or false",
    "is not a subclass": "is a section of keys; give those, e.g. {key}.KEY=VALUE",
    "is not Optional": "give a value",
}
"""What to do, by a part of OmegaConf's message."""


def _wrong_type(error: OmegaConfBaseException, cfg: DictConfig) -> UserError:
    key, text = str(error.full_key), _first_line(error)
    fix = next((fix for part, fix in FIXES.items() if part in text), text)
    return bad(key, OmegaConf.select(cfg, key), fix.format(key=key))


def _plain(cfg: DictConfig) -> dict[str, Any]:
    try:
        return {str(key): value for key, value in container(cfg).items()}
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error


def overridden(overrides: Sequence[str]) -> list[str]:
    """Keys that a command line sets, without the choice of the experiment itself."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [override.key_or_group.replace("/", ".") for override in parsed]
    return [key for key in keys if key.partition(".")[0] not in ("experiment", "hydra")]


def not_read(key: str, experiment: str, known: Iterable[str]) -> UserError:
    """The error of a key that an experiment does not read."""
    return UserError(f"{key}: experiment {experiment} does not read it; it reads {', '.join(known)}")


def _unknown(path: str, schema: type) -> UserError:
    """The error of a key inside a section: names the section's keys."""
    section: Any = schema
    *parents, last = path.split(".")
    for name in parents:
        section = get_type_hints(section).get(name) if is_dataclass(section) else None
    known = [field.name for field in fields(section)] if is_dataclass(section) else []
    return unknown_key(path, last, known)


def unknown_key(path: str, last: str, known: Sequence[str]) -> UserError:
    """``path`` names no key; ``known`` are the keys beside it."""
    near = get_close_matches(last, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(f"{path}: there is no such key; {hint}choose from {', '.join(known)}")


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error.msg or error).splitlines()[0].rstrip(".")


def container(cfg: Any) -> dict[str, Any]:
    """Plain values, interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def scheduler_config(cfg: DictConfig) -> SchedulerConfig:
    """The policies of ``cfg.engine``, checked."""
    return SchedulerConfig(**{key: value for key, value in container(cfg.engine).items() if key != "max_model_len"})


def max_request_tokens(cfg: DictConfig, model: str, longest: int | None) -> int | None:
    """Most tokens that a request may store: ``engine.max_model_len`` or, where that is null, ``longest``.

    Args:
        cfg: of an experiment that reads ``engine``.
        model: its name, for the error.
        longest: what the model's positions allow; None where it does not say.

    Raises:
        UserError: fewer than 2 tokens, or more than the model allows.
    """
    given = cfg.engine.max_model_len
    if given is None:
        return longest
    if given < 2 or given > (longest or given):
        most = f"from 2 to the {longest} of {model}" if longest else "of at least 2"
        raise bad("engine.max_model_len", given, f"give a number of tokens {most}, or null for all")
    return int(given)


def model_chosen(cfg: DictConfig) -> bool:
    """Whether the configuration names a model."""
    return cfg.get("model") is not None


def resolve_model(cfg: DictConfig, default: str) -> None:
    """Replace an ``auto`` of what a cache stores: the model (``default`` where none was chosen) and its two dtypes."""
    if not model_chosen(cfg):
        cfg.model = {"name": default, "hf_config": shipped_fields(default)}
    cfg.kv_dtype = "bfloat16" if cfg.kv_dtype == "auto" else cfg.kv_dtype
    cfg.state_dtype = "float32" if cfg.state_dtype == "auto" else cfg.state_dtype


def spec_of(cfg: DictConfig) -> CacheSpec:
    """What the model stores on one rank."""
    fields = container(cfg.model.hf_config)
    return CacheSpec.from_config(fields, kv_dtype=cfg.kv_dtype, state_dtype=cfg.state_dtype, tp_size=cfg.tp_size)


def check_model_fields(hf_config: Mapping[str, Any]) -> None:
    """Refuse a model's field that is nearly the name of another, which Transformers would keep and ignore.

    Raises:
        UserError: such a field, or an architecture that is not supported.
    """
    if not known_to_transformers(str(hf_config.get("model_type"))):
        return
    cls, given = type(text_config(hf_config)), {**hf_config, **hf_config.get("text_config", {})}
    known = [name for name in dir(cls) if not name.startswith("_") and name not in given]
    for name in sorted(set(given) - set(dir(cls))):
        near = get_close_matches(name, known, n=1, cutoff=0.9)
        if near:
            raise bad(f"model.hf_config.{name}", given[name], f"there is no such field; did you mean {near[0]}?")
