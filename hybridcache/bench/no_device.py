"""A driver for Triton that compiles for a Hopper GPU and launches nothing: what a launch costs the host, without a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class _Launcher:
    """Takes what a kernel is launched with, and keeps the last of it."""

    last: ClassVar[tuple[Any, ...]] = ()
    launches: ClassVar[int] = 0

    def __init__(self, src: Any, metadata: Any) -> None: ...

    def __call__(self, *args: Any) -> None:
        _Launcher.last = args
        _Launcher.launches += 1


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return (1, 1, 32, 0, 1024)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class NoDevice:
    """See the module."""

    launcher_cls = _Launcher
    utils = _Utils()

    @property
    def last(self) -> tuple[Any, ...]:
        """What the last launch was given: grid, stream, function, metadata, hooks, then the kernel's arguments."""
        return _Launcher.last

    @property
    def launches(self) -> int:
        return _Launcher.launches

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def no_device() -> Iterator[NoDevice]:
    """Triton's driver while the context lasts. Kernels that were launched in it must not be launched on a device by the same
    process: their compiled forms have been loaded nowhere."""
    before, pretended = driver._active, NoDevice()  # the default driver cannot be asked for where there is no device
    driver.set_active(pretended)
    try:
        yield pretended
    finally:
        driver._active = before
