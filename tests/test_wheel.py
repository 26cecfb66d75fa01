"""The wheel works by itself: outside the repository, beside other people's folders of the same names."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from limits import SUBPROCESS_S

ROOT = Path(__file__).resolve().parent.parent
TREE = ("hybridcache", "models", "experiments", "benchmarks", "conf")
FILES = ("run.py", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def succeed(*command: object, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=SUBPROCESS_S, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The repository's files, where a build may leave its own."""
    tree = tmp_path_factory.mktemp("source") / "repository"
    for name in TREE:
        ignored = shutil.ignore_patterns("__pycache__", "results", "outputs")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(copied, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    succeed(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, copied)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Where somebody works who has folders and files of the same names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("models", "experiments", "benchmarks", "conf"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('this is another {name}')\n")
    (folder / "run.py").write_text("raise ImportError('this is another run')\n")
    return folder


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    succeed(*pip, "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def environment(site: Path) -> dict[str, str]:
    """The installed wheel comes first on the path; the environment's packages, an editable install among them, behind. Modules
    are compiled once for all tests."""
    return {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "", "CUDA_VISIBLE_DEVICES": ""}


SOURCE = """from models.qwen3_next import model
from models import configs
import models.configs as shipped
def f(name, files):
    from run import main
    path = f"experiments.{name}", 'models.configs', "models.configs:Name"
    others = "models.nothing", "experiments", f"{name}.models.configs"
    models = files.models.configs  # neither is models.configs
"""
RENAMED = """from hybridcache.models.qwen3_next import model
from hybridcache.models import configs
import hybridcache.models.configs as shipped
def f(name, files):
    from hybridcache.run import main
    path = f"hybridcache.experiments.{name}", 'hybridcache.models.configs', "hybridcache.models.configs:Name"
    others = "models.nothing", "experiments", f"{name}.models.configs"
    models = files.models.configs  # neither is models.configs
"""


def test_modules_are_renamed_in_imports_and_strings():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.rename(SOURCE, "file.py") == RENAMED
    assert setup.rename(RENAMED, "file.py") == RENAMED
    with pytest.raises(SystemExit, match=r"^file.py:1: write `import models.configs as ...`"):
        setup.rename("import models.configs", "file.py")


def run_elsewhere(site: Path, elsewhere: Path, *arguments: object) -> str:
    return succeed(sys.executable, *arguments, cwd=elsewhere, env=environment(site))


def test_the_wheel_holds_one_package_and_no_general_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hybridcache"}
    assert "hybridcache = hybridcache.__main__:main" in entry_points
    assert not [name for name in names if "notebooks" in name or "/results/" in name or "/tests/" in name]
    held = {name.removeprefix("hybridcache/") for name in names}
    for pattern in ("models/**/*.py", "experiments/*.py", "conf/**/*.yaml", "hybridcache/**/*.html"):
        expected = {path.relative_to(ROOT).as_posix().removeprefix("hybridcache/") for path in ROOT.glob(pattern)}
        assert expected
        assert expected <= held


def test_no_module_of_the_wheel_names_one_of_the_repository(wheel):
    general = re.compile(
        r"""^\s*(?:from|import) (?:models|experiments|benchmarks|run)\b|["'](?:models|experiments)\.\{"""
    )
    with zipfile.ZipFile(wheel) as archive:
        found = [
            f"{name}: {line}"
            for name in archive.namelist()
            if name.endswith(".py")
            for line in archive.read(name).decode().splitlines()
            if general.search(line)
        ]
    assert not found


def test_every_experiment_of_the_wheel_can_be_imported(site, elsewhere):
    code = (
        "import importlib, pathlib, sys, hybridcache\n"
        "folder = pathlib.Path(hybridcache.__file__).parent\n"
        "files = [*(folder / 'experiments').rglob('*.py'), *(folder / 'models').rglob('*.py')]\n"
        "for file in files:\n"
        "    name = '.'.join(file.relative_to(folder.parent).with_suffix('').parts).removesuffix('.__init__')\n"
        "    assert importlib.import_module(name).__file__ == str(file)\n"
        "print(len(files), folder, *[n for n in ('models', 'experiments', 'benchmarks', 'run') if n in sys.modules])\n"
    )
    count, folder, *general = run_elsewhere(site, elsewhere, "-c", code).split()
    assert int(count) > 15
    assert Path(folder) == site / "hybridcache"
    assert general == []


def test_the_command_runs_an_experiment(site, elsewhere, tmp_path):
    arguments = ("+experiment=geometry", "tracking=disabled", f"hydra.run.dir={tmp_path / 'run'}")
    printed = run_elsewhere(site, elsewhere, "-m", "hybridcache", *arguments)
    assert "qwen3_next" in printed
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.parquet", "config.yaml", "environment.json"} <= written


def test_the_console_script_is_the_command(site, elsewhere):
    command = [sys.executable, str(site / "bin" / "hybridcache"), "+experiment=geometri"]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment(site), capture_output=True, text=True, timeout=SUBPROCESS_S
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: experiment='geometri': did you mean geometry? choose one of ")
    assert done.stderr.count("\n") == 1


def test_the_library_generates(site, elsewhere):
    code = (
        "from hybridcache import LLM, SamplingParams\n"
        "import hybridcache, sys\n"
        "llm = LLM('tiny', 'shared_pool_carve', cache_bytes=4 << 20, device='cpu')\n"
        "(output,) = llm.generate('The pool is', SamplingParams(max_tokens=5, ignore_eos=True), progress=False)\n"
        "print(hybridcache.__file__, type(llm.model).__module__, len(output.token_ids))\n"
    )
    file, model, count = run_elsewhere(site, elsewhere, "-c", code).split()
    assert Path(file) == site / "hybridcache" / "__init__.py"
    assert model.startswith("hybridcache.models.")
    assert count == "5"


def test_an_editable_install_is_the_repository(copied, tmp_path):
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    succeed(sys.executable, "-c", build, tmp_path, cwd=copied)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        (path_file,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(path_file).decode().strip() == str(copied)
        assert not [name for name in archive.namelist() if name.endswith(".py")]


def test_a_source_distribution_holds_what_a_wheel_is_built_from(copied, tmp_path):
    build = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    succeed(sys.executable, "-c", build, tmp_path, cwd=copied)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    unpacked = tmp_path / f"hybridcache-{version}"
    for pattern in ("run.py", "setup.py", "models/**/*.py", "experiments/*.py", "benchmarks/**/*.py", "conf/**/*.yaml"):
        expected = {path.relative_to(copied) for path in copied.glob(pattern)}
        assert expected
        assert {path.relative_to(unpacked) for path in unpacked.glob(pattern)} == expected
