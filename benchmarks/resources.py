"""Resources: what a Triton kernel needs on Hopper, from its compilation alone. No GPU is needed."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridcache.spec.dtypes import dtype_name

SHARED_MEMORY_LIMIT = 232_448
"""Bytes that one program may use on Hopper (227 KiB; CUDA C++ Programming Guide, compute capability 9.0)."""

TRITON_TYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Resources:
    """What one program needs. ``registers`` and spills are per thread; None where no assembler says so."""

    shared_bytes: int
    registers: int | None
    spill_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_MEMORY_LIMIT


def pointer(dtype: "str | torch.dtype") -> str:
    """Triton's name of a pointer to elements of that type."""
    return "*" + TRITON_TYPE[dtype_name(dtype)]


def measure_resources(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> Resources:
    """Compile for sm_90 as the launcher would for aligned arguments.

    A program that needs more shared memory than there is compiles all the same; only its launch would fail.

    Args:
        kernel: a ``triton.jit`` function.
        types: Triton's types of parameters that are neither constants nor annotated; others are ignored.
        constants: compile-time parameters.
        options: ``num_warps``, ``num_stages``.

    Raises:
        ImportError: Triton is not installed.
        ValueError: a parameter without a type.
        RuntimeError: kernels are interpreted in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted in this process and cannot be compiled")
    signature, aligned = {}, {}
    for index, param in enumerate(kernel.params):
        kind = "constexpr" if param.name in constants else types.get(param.name) or param.annotation_type
        if not kind:
            raise ValueError(f"{kernel.__name__}: no type for parameter {param.name}")
        signature[param.name] = kind
        free = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if free and kind != "constexpr" and (kind.startswith("*") or param.annotation_type):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    return Resources(compiled.metadata.shared, *_assembler_report(triton, compiled.asm["ptx"]))


def _assembler_report(triton: Any, ptx: str) -> tuple[int | None, int | None]:
    """Registers and spilled bytes (stores plus loads) by ptxas, Nones where there is none."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = str(bundled) if bundled.exists() else shutil.which("ptxas")
    if ptxas is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, None
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return (int(registers[-1]) if registers else None), sum(map(int, spills))
