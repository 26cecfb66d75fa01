"""The sanitizer's script: whose a finding is, what counts as clean, and what becomes of a tool that is absent or never ends."""

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def script():
    from tests.checks import sanitize

    return sanitize


MEMCHECK = """========= COMPUTE-SANITIZER
SANITIZE begin kv_store
SANITIZE end 1.250
SANITIZE begin block_copy
========= Invalid __global__ read of size 16 bytes
=========     at block_copy_kernel+0xec0 in triton.py:43
=========     by thread (18,0,0) in block (0,0,0)
=========     Access at 0x74505bcccca0 is out of bounds
=========
========= Invalid __global__ write of size 4 bytes
=========     at block_copy_kernel+0xfc0 in triton.py:45
SANITIZE error AcceleratorError: CUDA error: unspecified launch failure
SANITIZE end 0.500
SANITIZE begin planted
========= Invalid __global__ write of size 4 bytes
=========     at write_beyond_kernel+0x10 in once.py:120
SANITIZE end 0.100
========= Target application returned an error
========= ERROR SUMMARY: 5 errors
"""

RACECHECK = """========= COMPUTE-SANITIZER
SANITIZE begin gdn_prefill
========= Error: Race reported between Write access at state_kernel+0x140 in triton_state.py:9
=========     and Read access at state_kernel+0xe0 in triton_state.py:10 [4 hazards]
=========
========= Warning: Race reported between Write access at conv_kernel+0x10
=========     and Write access at conv_kernel+0x10 [2 hazards]
SANITIZE end 2.0
SANITIZE begin kv_store
SANITIZE end 0.2
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""

CLEAN = MEMCHECK.replace("SANITIZE error", "nothing").split("SANITIZE begin block_copy", maxsplit=1)[0] + (
    "SANITIZE begin planted\n========= Invalid __global__ write of size 4 bytes\nSANITIZE end 0.1\n"
    "========= ERROR SUMMARY: 1 error\n"
)


def test_findings_belong_to_the_kernel_that_ran(script):
    found = script.parse(MEMCHECK)
    script.add_rest(found, "memcheck", MEMCHECK)
    assert (found["kv_store"].errors, found["kv_store"].seconds) == (0, 1.25)
    assert (found["block_copy"].errors, found["block_copy"].warnings) == (2, 0)
    assert "block_copy_kernel+0xec0" in found["block_copy"].messages[0]
    assert "unspecified launch failure" in found["block_copy"].failure
    assert found["planted"].errors == 1
    assert found[script.REST].errors == 2, "the summary counts five, three are shown"
    wrong = script.verdict("memcheck", found)
    assert len(wrong) == 3
    assert not any("planted" in line for line in wrong)


def test_races_are_errors_or_warnings(script):
    found = script.parse(RACECHECK)
    script.add_rest(found, "racecheck", RACECHECK)
    assert (found["gdn_prefill"].errors, found["gdn_prefill"].warnings) == (1, 1)
    assert (found["kv_store"].errors, found["kv_store"].warnings) == (0, 0)
    assert (found[script.REST].errors, found[script.REST].warnings) == (0, 0)
    (line,) = script.verdict("racecheck", found)
    assert "1 errors, 1 warnings" in line
    assert "state_kernel" in line


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_report_without_a_summary_is_not_clean(script, tool):
    text = "========= COMPUTE-SANITIZER\nSANITIZE begin kv_store\nSANITIZE end 1.0\n"
    found = script.parse(text)
    script.add_rest(found, tool, text)
    assert script.verdict(tool, found) == [f"{tool}: {script.REST}: the report has no summary"]


def test_a_planted_fault_that_is_not_seen_is_wrong(script):
    found = script.parse("SANITIZE begin planted\nSANITIZE end 0.1\n========= ERROR SUMMARY: 0 errors\n")
    script.add_rest(found, "memcheck", "========= ERROR SUMMARY: 0 errors\n")
    (line,) = script.verdict("memcheck", found)
    assert "planted fault was not found" in line


def stand_in(folder: Path, text: str, then: str = "exit 0") -> str:
    """A sanitizer that runs nothing and reports ``text``."""
    (folder / "report.txt").write_text(text)
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat '{folder}/report.txt'\n{then}\n")
    tool.chmod(0o755)
    return str(tool)


def test_a_clean_run_has_nothing_wrong(script, tmp_path):
    found, text = script.sanitize(stand_in(tmp_path, CLEAN), "memcheck", ["kv_store"], 20.0)
    assert script.verdict("memcheck", found) == []
    assert "ERROR SUMMARY" in text


def test_kernels_that_were_not_reached_are_named(script, tmp_path):
    found, _ = script.sanitize(stand_in(tmp_path, CLEAN, "exit 3"), "memcheck", ["kv_store", "block_copy"], 20.0)
    wrong = script.verdict("memcheck", found)
    assert wrong == ["memcheck: block_copy: not reached", f"memcheck: {script.REST}: exit status 3"]


def test_a_tool_that_never_ends_is_stopped_with_its_children(script, tmp_path):
    text = "SANITIZE begin kv_store\n"
    started = time.perf_counter()
    tool = stand_in(tmp_path, text, f"sleep 300 & echo $! > '{tmp_path}/child'\nwait")
    found, _ = script.sanitize(tool, "racecheck", ["kv_store", "block_copy"], 1.0)
    assert time.perf_counter() - started < 250
    assert found["kv_store"].failure == "did not finish"
    assert found["block_copy"].failure == "not reached"
    assert found[script.REST].failure == "stopped after 1 s"
    child = int((tmp_path / "child").read_text())
    for _ in range(600):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_sanitizer_is_looked_for(script, tmp_path, monkeypatch):
    tool = stand_in(tmp_path, "")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert script.find_sanitizer() == tool


def test_an_absent_sanitizer_is_said(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(SystemExit, match="compute-sanitizer is neither on the PATH nor in /usr/local"):
        script.find_sanitizer()


DISPATCH = """========= COMPUTE-SANITIZER
SANITIZE begin gdn_prefill
========= Error: Race reported between Read access at hopper_state_kernel+0xe0 in hopper_state.py:{line}
=========     and Write access at hopper_state_kernel+0x1080 in hopper_state.py:{other} [182 hazards]
SANITIZE end 2.0
========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)
"""


def test_hazards_in_the_dispatch_of_warps_need_a_proof(script, tmp_path):
    lines = script.source_of("hopper_state_kernel").splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if text.startswith("def hopper_state_kernel("))
    call = 1 + next(i for i, text in enumerate(lines) if text.strip().startswith("gl.warp_specialize("))
    found = script.parse(DISPATCH.format(line=line, other=call))
    assert (found["gdn_prefill"].dispatch, found["gdn_prefill"].dispatched) == (1, ["hopper_state_kernel"])
    (wrong,) = script.verdict("racecheck", found)
    assert "1 errors" in wrong
    assert script.verdict("racecheck", found, ["hopper_state_kernel"]) == []
    (nothing,) = script.disproof("hopper_state_kernel", tmp_path)
    assert "no PTX" in nothing

    beside = script.parse(DISPATCH.format(line=line, other=line + 60))
    assert beside["gdn_prefill"].dispatch == 0
    assert script.verdict("racecheck", beside, ["hopper_state_kernel"]), "a place beside the dispatch is excused"


def test_every_cache_operation_is_launched():
    from kernels_once import KERNELS

    from hybridcache.kernels.operations import ATTENTION, STATE

    for operation in (*ATTENTION, *STATE, "block_copy", "page_tiled"):
        assert any(name.split()[0] == operation for name in KERNELS), operation
