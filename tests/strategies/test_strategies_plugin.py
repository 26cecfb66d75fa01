"""docs/strategies.md: its table is recomputed, and its example of a user's own strategy is built and run as written."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml
from pool_model import PoolModel, pool_spec
from strategies_specs import GIB, MIB, qwen3_next

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError
from hybridcache.kernels.backend import make_backend
from hybridcache.strategies import Kind, Strategy, build, strategy_class
from hybridcache.strategies.check import PROPERTIES, check

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "strategies.md").read_text()
ROWS = re.findall(r"^\| `([a-z_]+)((?: [a-z_]+=\w+)*)` \| (\d[^\n]*) \|$", PAGE, re.MULTILINE)


FILES = sorted((ROOT / "conf/strategy").glob("*.yaml"))
RESOLVED = "static_split_tuned"
"""Its ratio is found by an experiment."""


def block(language: str) -> str:
    """The page's first code block in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The example's module on the import path; its YAML, loaded."""
    (tmp_path / "regions.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "regions", raising=False)
    importlib.invalidate_caches()
    return yaml.safe_load(block("yaml"))


def test_the_table_has_every_strategy() -> None:
    """Two files are other options of a class that is in it."""
    assert {name for name, _, _ in ROWS} == {path.stem for path in FILES} - {"shared_pool_carve", RESOLVED}


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


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != RESOLVED], ids=lambda path: path.stem)
def test_every_file_builds_its_class(path: Path) -> None:
    options = yaml.safe_load(path.read_text())
    strategy = build(options.pop("_target_"), spec=qwen3_next(), budget_bytes=GIB, **options)
    assert path.stem.startswith(strategy.name)
    assert strategy.admit(0, 100)
    strategy.check_integrity()


def test_a_class_of_your_own_builds_by_dotted_path(regions: dict) -> None:
    assert regions.pop("_target_") == "regions.Regions"
    strategy = build("regions.Regions", spec=qwen3_next(), budget_bytes=20 * GIB, **regions)
    assert strategy.name == "regions"
    assert strategy.admit(0, 12)
    assert strategy.usage().held / MIB == pytest.approx(79.7, abs=0.05)
    residents = 1
    while strategy.admit(residents, 12):
        residents += 1
    assert residents == 257
    strategy = build("regions.Regions", spec=qwen3_next(), budget_bytes=20 * GIB, **regions)
    assert [strategy.admit(i, 2000) for i in range(33)] == [True] * 32 + [False]
    assert {span.kind for span in strategy.spans()} == {Kind.STATE, Kind.KV}
    strategy.check_integrity()


def test_a_class_of_your_own_keeps_the_contract(regions: dict) -> None:
    found = check("regions.Regions", region_tokens=64)
    assert len(found) == len(PROPERTIES)
    assert [why for _, why in found] == [None] * len(found)


@pytest.mark.parametrize("prompt_tokens", [20, 200])
def test_a_class_of_your_own_runs_inference(regions: dict, prompt_tokens: int) -> None:
    """The tokens that an engine samples under it are those under shared_pool; several requests run at once."""
    spec, found = pool_spec(), []
    for name, options in (("regions.Regions", {"region_tokens": 64}), ("shared_pool", {})):
        strategy = build(name, spec=spec, budget_bytes=1 << 20, physical=True, **options)
        engine = Engine(
            PoolModel(), strategy, SchedulerConfig(max_running=3), make_backend("torch", "cpu"), poison=True
        )
        prompts = [[(7 * i + 3 * j) % 101 for j in range(prompt_tokens + i)] for i in range(5)]
        seqs = [engine.add_request(prompt, SamplingParams(max_tokens=70)) for prompt in prompts]
        engine.run()
        strategy.check_integrity()
        found.append([seq.output_ids for seq in seqs])
    assert found[0] == found[1]
    assert [len(output) for output in found[0]] == [70] * 5


def test_its_errors_are_the_users(regions: dict) -> None:
    spec = qwen3_next()
    with pytest.raises(UserError, match="region_tokens=0"):
        build("regions.Regions", spec=spec, budget_bytes=GIB, region_tokens=0)
    with pytest.raises(UserError, match=r"^length=5: .* it has region_tokens$"):
        build("regions.Regions", spec=spec, budget_bytes=GIB, length=5)
    with pytest.raises(UserError, match="cannot be imported"):
        strategy_class("regions.Missing")
    with pytest.raises(UserError, match="cannot be imported"):
        strategy_class("no_such_module.Strategy")
    with pytest.raises(UserError, match="no subclass"):
        strategy_class("regions.Units")
    with pytest.raises(UserError, match=r"choose one of shared_pool.*shared_pool_carve"):
        strategy_class("sharedpool")
    assert issubclass(strategy_class("regions.Regions"), Strategy)


def test_names_of_files_build() -> None:
    """What ``conf/strategy`` calls a strategy builds it, with the same options."""
    with pytest.raises(UserError, match=r"static_split_tuned.*choose one of"):
        build(RESOLVED, spec=qwen3_next(), budget_bytes=GIB)
    for path in FILES:
        options = yaml.safe_load(path.read_text())
        if path.stem == RESOLVED:
            assert options.pop("ratio") == "best"
            assert options.pop("_target_").endswith(".StaticSplit")
            assert options.keys() <= {"q"}
            continue
        by_path = build(options.pop("_target_"), spec=qwen3_next(), budget_bytes=GIB, **options)
        by_name = build(path.stem, spec=qwen3_next(), budget_bytes=GIB)
        assert type(by_name) is type(by_path)
        assert by_name.cut == by_path.cut
