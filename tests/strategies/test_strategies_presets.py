"""The names in ``conf/strategy/`` are names that ``build`` knows, and mean the same."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from strategies_specs import GIB, qwen3_next

from hybridcache.errors import UserError
from hybridcache.strategies import build, strategy_class

SEARCHED = {"static_split_tuned"}
"""Strategies with an option that experiments search for, and that have no value before."""
FILES = sorted(
    path for path in (Path(__file__).parents[2] / "conf" / "strategy").glob("*.yaml") if path.stem not in SEARCHED
)


def attributes(strategy) -> dict:
    """What a new strategy holds, except what is an object of its own each time."""
    return {name: value for name, value in vars(strategy).items() if isinstance(value, int | float | str | tuple)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_and_its_name_build_the_same(file):
    options = OmegaConf.to_container(OmegaConf.load(file))
    target = options.pop("_target_")
    assert strategy_class(file.stem) is strategy_class(target)
    by_file = build(target, spec=qwen3_next(), budget_bytes=GIB, **options)
    by_name = build(file.stem, spec=qwen3_next(), budget_bytes=GIB)
    assert attributes(by_name) == attributes(by_file)
    assert attributes(by_name)


def test_options_go_over_a_preset():
    assert build("shared_pool_carve", spec=qwen3_next(), budget_bytes=GIB).mode == "carve"
    assert build("shared_pool_carve", spec=qwen3_next(), budget_bytes=GIB, mode="exclusive").mode == "exclusive"
    with pytest.raises(UserError, match=r"^strategy='magic': choose one of .*byte_exact, shared_pool_carve, or give"):
        build("magic", spec=qwen3_next(), budget_bytes=GIB)
