"""launch: Triton kernels launched again without being looked up again.

``kernel[grid](...)`` finds out anew at every launch which of a kernel's compiled forms the arguments ask for, and writes keys
as text to do it. A step that prefills launches more than a hundred kernels one by one, and only as long as the host is done
with a step sooner than the device does the device not wait: ``docs/serving.md`` has both times.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SMALL = 1 << 31
ALIGNMENT = 16


def launcher(kernel: Any) -> Any:
    """What ``launcher(kernel)[grid](...)`` does is what ``kernel[grid](...)`` does; see :class:`Launcher`. Under Triton's
    interpreter it is the kernel itself."""
    known = _LAUNCHERS.get(id(kernel))
    if known is None:
        known = _LAUNCHERS[id(kernel)] = Launcher(kernel) if isinstance(kernel, JITFunction) else kernel
    return known


class Launcher:
    """Launches one kernel. Triton itself launches the first call of every kind, and says which compiled form it took; later
    calls of that kind take the same one.

    Calls are of one kind if Triton would compile the same for them: the same device, types, constants and options, and the
    same of what it specialises on (integers that are 1, divisible by 16 or beyond 32 bits, pointers on multiples of 16 bytes).
    Arguments that the kernel exempts from that are exempt here too. What Triton reads of its environment while a process runs
    (``TRITON_DEBUG``, instrumentation) counts at the first call of a kind.

    Arguments by position come first, and all others by name, constants among them. Those given by name count by their value:
    what changes from step to step is to be given by position.

    Args:
        kernel: a ``triton.jit`` or ``gluon.jit`` function.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
        # Of integers and pointers: whether their values matter.
        self._exempt = [parameter.do_not_specialize for parameter in kernel.params]
        self._anywhere = [p.do_not_specialize or p.do_not_specialize_on_alignment for p in kernel.params]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            device = driver.active.get_current_device()
            kind = (device, *self._kind(args), *constants, *constants.values())
            known = self._known.get(kind)
            if known is None:
                self._first(kind, grid, args, constants)
                return
            compiled, rest = known
            x, y, z, *_ = *grid, 1, 1
            stream = driver.active.get_current_stream(device)
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            observed: tuple[Any, ...] = (None, None, None)
            if enter.calls or leave.calls:
                observed = (compiled.launch_metadata(grid, stream, *args, *rest), enter, leave)
            compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *observed, *args, *rest)

        return launch

    def _kind(self, args: tuple[Any, ...]) -> list[Any]:
        kind: list[Any] = []
        for arg, exempt, anywhere in zip(args, self._exempt, self._anywhere):
            of = type(arg)
            if of is int:
                wide = not -SMALL <= arg < SMALL
                kind.append((wide, arg == 1, arg % ALIGNMENT == 0) if not exempt else wide)
            elif isinstance(arg, Tensor):
                kind.append(arg.dtype)
                kind.append(anywhere or arg.data_ptr() % ALIGNMENT == 0)
            elif of is float or of is bool:
                kind.append(of)
            else:  # a tensor descriptor, of Triton's or Gluon's class
                kind += (of, arg.base.dtype, *arg.block_shape, getattr(arg, "layout", None), arg.padding)
        return kind

    def _first(
        self, kind: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        compiled = self.kernel[grid](*args, **constants)
        names = [parameter.name for parameter in self.kernel.params]
        rest = names[len(args) :]
        if self.kernel.pre_run_hooks or not isinstance(compiled, CompiledKernel):
            return
        assert set(rest) <= set(constants), f"{self.kernel.__name__}: {set(rest) - set(constants)} not given by name"
        self._known[kind] = compiled, tuple(constants[name] for name in rest)


_LAUNCHERS: dict[int, Any] = {}
"""By the identity of kernels, which live as long as their launchers."""
