"""docs/strategies.md: its table is recomputed, and its example of a user's own strategy is built and run as written."""

import importlib
import random
import re
import sys
from pathlib import Path

import pytest
import yaml
from strategies_specs import GIB, MIB, qwen3_next

from hybridcache.errors import UserError
from hybridcache.strategies import Kind, Strategy, build, strategy_class

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "strategies.md").read_text()
ROWS = re.findall(r"^\| `([a-z_]+)((?: [a-z_]+=\w+)*)` \| (\d[^\n]*) \|$", PAGE, re.MULTILINE)


def block(language: str) -> str:
    """The page's one code block in that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def max_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The example's module on the import path; its YAML, loaded."""
    (tmp_path / "max_length.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "max_length", raising=False)
    importlib.invalidate_caches()
    return yaml.safe_load(block("yaml"))


def test_the_table_has_every_strategy() -> None:
    assert {name for name, _, _ in ROWS} == {path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")} - {
        "shared_pool_carve"
    }


@pytest.mark.parametrize(("name", "options", "figures"), ROWS, ids=[name + options for name, options, _ in ROWS])
def test_the_table_is_true(name: str, options: str, figures: str) -> None:
    chosen = {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in options.split())}
    cells = [float(cell) for cell in figures.split("|")]
    for num_tokens, mib in zip((12, 545, 2000, 8192), cells[:4], strict=True):
        strategy = build(name, spec=qwen3_next(), budget_bytes=20 * GIB, **chosen)
        assert strategy.admit(0, num_tokens)
        assert strategy.usage().held / MIB == pytest.approx(mib, abs=0.0051)
    for num_tokens, residents in zip((12, 2000), cells[4:], strict=True):
        strategy = build(name, spec=qwen3_next(), budget_bytes=20 * GIB, **chosen)
        count = 0
        while strategy.admit(count, num_tokens):
            count += 1
        assert count == residents


@pytest.mark.parametrize("path", sorted((ROOT / "conf/strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_builds_its_class(path: Path) -> None:
    options = yaml.safe_load(path.read_text())
    strategy = build(options.pop("_target_"), spec=qwen3_next(), budget_bytes=GIB, **options)
    assert path.stem.startswith(strategy.name)
    assert strategy.admit(0, 100)
    strategy.check_integrity()


def test_a_class_of_your_own_builds_by_dotted_path(max_length: dict) -> None:
    assert max_length.pop("_target_") == "max_length.MaxLength"
    strategy = build("max_length.MaxLength", spec=qwen3_next(), budget_bytes=20 * GIB, **max_length)
    assert strategy.name == "max_length"
    assert strategy.admit(0, 12)
    assert strategy.usage().held / MIB == pytest.approx(841.7, abs=0.05)
    residents = 1
    while strategy.admit(residents, 12):
        residents += 1
    assert residents == 24
    assert {span.kind for span in strategy.spans()} == {Kind.STATE, Kind.KV}
    strategy.check_integrity()


def test_a_class_of_your_own_keeps_the_contract(max_length: dict) -> None:
    strategy = build("max_length.MaxLength", spec=qwen3_next(), budget_bytes=GIB, max_tokens=2000)
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    rng, empty = random.Random(seed), strategy.usage()
    for _ in range(300):
        seq_id = rng.randrange(12)
        if seq_id not in strategy.residents:
            strategy.admit(seq_id, rng.randint(1, 2500))
        elif rng.random() < 0.5:
            strategy.release(seq_id)
        else:
            strategy.grow(seq_id, strategy.num_tokens(seq_id) + rng.randint(0, 900))
        strategy.check_integrity()
    for seq_id in strategy.residents:
        strategy.release(seq_id)
    assert strategy.usage() == empty


def test_its_errors_are_the_users(max_length: dict) -> None:
    spec = qwen3_next()
    with pytest.raises(UserError, match="max_tokens=0"):
        build("max_length.MaxLength", spec=spec, budget_bytes=GIB, max_tokens=0)
    with pytest.raises(UserError, match="accounting only"):
        build("max_length.MaxLength", spec=spec, budget_bytes=GIB, physical=True)
    with pytest.raises(UserError, match=r"unexpected keyword argument 'length'"):
        build("max_length.MaxLength", spec=spec, budget_bytes=GIB, length=5)
    with pytest.raises(UserError, match="cannot be imported"):
        strategy_class("max_length.Missing")
    with pytest.raises(UserError, match="cannot be imported"):
        strategy_class("no_such_module.Strategy")
    with pytest.raises(UserError, match="no subclass"):
        strategy_class("max_length.Span")
    with pytest.raises(UserError, match="choose one of shared_pool"):
        strategy_class("sharedpool")
    assert issubclass(strategy_class("max_length.MaxLength"), Strategy)
