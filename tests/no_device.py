"""A driver for Triton that compiles for a Hopper GPU and launches nothing: what a launcher is asked for, without a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return (1, 1, 32, 0, 1024)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class NoDevice:
    """A driver for Triton that compiles for a Hopper GPU and launches nothing."""

    utils = _Utils()

    def __init__(self) -> None:
        self.launches = 0
        self.last: tuple[Any, ...] = ()
        """What the last launch was given: grid, stream, function, metadata, hooks, then the kernel's arguments."""

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What launches a compiled kernel."""
        return self._launch

    def _launch(self, *args: Any) -> None:
        self.last = args
        self.launches += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def no_device() -> Iterator[NoDevice]:
    """Triton's driver while the context lasts, once in a process: what it compiled keeps to it, and must not be launched on a
    device later, for it has been loaded nowhere."""
    from triton.runtime.driver import driver

    before, pretended = driver._active, NoDevice()  # the default driver cannot be asked for where there is no device
    driver.set_active(pretended)
    try:
        yield pretended
    finally:
        driver._active = before
