"""A launcher takes the compiled kernel that Triton would take, with the arguments that Triton would pass."""

import random

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from no_device import no_device  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from hybridcache.kernels.launch import Launcher, launcher  # noqa: E402
from hybridcache.observe.compilations import compilations  # noqa: E402


@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["anywhere_ptr"])
def mixed_kernel(
    out_ptr, anywhere_ptr, count, free, factor, by_name, BLOCK: tl.constexpr, NEGATE: tl.constexpr, KIND: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(anywhere_ptr + at, mask=at < count, other=0).to(KIND) * factor + free + by_name
    tl.store(out_ptr + at, -x if NEGATE else x, mask=at < count)


@triton.jit
def described_kernel(desc, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = desc.load([0, 0])
    tl.store(out_ptr + at[:, None] * BLOCK + at[None, :], tile)


@gluon.jit
def gluon_kernel(desc, out_ptr):
    gl.store(out_ptr + gl.program_id(0), gl.program_id(0))


@pytest.fixture(scope="module")
def device():
    for kernel in (mixed_kernel, described_kernel, gluon_kernel):
        kernel.device_caches.clear()  # a worker may come back to this module: what was compiled knows the device before
    with no_device() as pretended:
        yield pretended


MEMORY = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32)}


def pointer(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return MEMORY[dtype][rng.choice([0, 1, 8]) :]


def random_call(rng: random.Random) -> tuple[list, dict]:
    count, free = (rng.choice([0, 1, 2, 15, 16, 48, -16, -3, 2**31 - 1, 2**31, 2**40]) for _ in range(2))
    anywhere = MEMORY[torch.int32][rng.choice([0, 1, 4]) :]
    constants = {"by_name": rng.choice([1, 5, 16]), "BLOCK": rng.choice([32, 64]), "NEGATE": rng.random() < 0.5}
    constants |= {"KIND": rng.choice([tl.float32, tl.float16]), "num_warps": rng.choice([1, 4])}
    return [pointer(rng), anywhere, count, free, rng.choice([0.5, 2.0])], constants


def launch_both(device, quick: Launcher, kernel, grid, args, constants) -> bool:
    """Whether the launcher knew the call. Asserts that it passes what Triton does, the hooks and what they are told apart."""
    compiled = kernel[grid](*args, **constants)
    expected = device.last
    known, launches = len(quick._known), device.launches
    quick[grid](*args, **constants)
    assert device.launches == launches + 1
    got = device.last
    assert compiled.function == got[4]
    assert got[5] is compiled.packed_metadata
    assert got[:6] == expected[:6]
    assert len(got) == len(expected)
    for ours, theirs in zip(got[9:], expected[9:]):
        assert type(ours) is type(theirs)
        assert ours is theirs or ours == theirs
    return len(quick._known) == known


def test_any_call_takes_the_kernel_that_triton_takes(device):
    rng, quick = random.Random(), Launcher(mixed_kernel)
    calls = [random_call(rng) for _ in range(12)]
    for args, constants in calls:
        launch_both(device, quick, mixed_kernel, (3, 2), args, constants)
    for args, constants in calls:
        assert launch_both(device, quick, mixed_kernel, (3,), args, constants)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"count": 7}, True),
        ({"count": 1}, False),
        ({"count": 32}, False),
        ({"count": 2**33 + 1}, False),
        ({"free": 1}, True),
        ({"free": 16}, True),
        ({"free": 2**31}, False),
        ({"out": MEMORY[torch.float32][4:]}, True),
        ({"out": MEMORY[torch.float32][1:]}, False),
        ({"out": MEMORY[torch.bfloat16]}, False),
        ({"anywhere": MEMORY[torch.int32][1:]}, True),
        ({"factor": 3.5}, True),
        ({"BLOCK": 64}, False),
        ({"KIND": tl.float16}, False),
        ({"num_warps": 2}, False),
        ({"by_name": 16}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_calls_are_of_one_kind_where_triton_compiles_the_same(change, same, device):
    base = {"out": MEMORY[torch.float32], "anywhere": MEMORY[torch.int32], "count": 5, "free": 3, "factor": 0.5}
    named = {"by_name": 5, "BLOCK": 32, "NEGATE": False, "KIND": tl.float32, "num_warps": 1}
    quick = Launcher(mixed_kernel)
    assert not launch_both(device, quick, mixed_kernel, (1,), list(base.values()), named)
    args = [change.get(name, value) for name, value in base.items()]
    named = {name: change.get(name, value) for name, value in named.items()}
    assert launch_both(device, quick, mixed_kernel, (1,), args, named) == same


def test_descriptors_tell_calls_apart_by_their_tiles(device):
    quick, out = Launcher(described_kernel), MEMORY[torch.float32]
    wide = torch.zeros(64, 64)
    found = []
    for base, block in ((wide, 16), (wide[:32], 16), (wide, 32), (wide.bfloat16(), 16)):
        descriptor = TensorDescriptor.from_tensor(base, [block, block])
        found.append(launch_both(device, quick, described_kernel, (1,), [descriptor, out], {"BLOCK": block}))
    assert found == [False, True, False, False]


def test_descriptors_of_gluon_tell_calls_apart_by_their_layouts(device):
    quick, out, found = Launcher(gluon_kernel), MEMORY[torch.int32], []
    for swizzle, rows in ((128, 64), (128, 64), (64, 64), (128, 32)):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=2)
        base = torch.zeros(128, 64, dtype=torch.bfloat16)
        descriptor = GluonDescriptor.from_tensor(base, [rows, 64], layout)
        found.append(launch_both(device, quick, gluon_kernel, (1,), [descriptor, out], {"num_warps": 4}))
    assert found == [False, True, False, False]


def test_a_known_call_is_not_looked_up_again(device, monkeypatch):
    quick, (args, constants) = Launcher(mixed_kernel), random_call(random.Random())
    quick[(1,)](*args, **constants)

    def run(*args, **kwargs):
        raise AssertionError("looked up")

    monkeypatch.setattr(mixed_kernel, "run", run)
    quick[(5, 4)](*args, **constants)
    assert device.last[:3] == (5, 4, 1)


def test_hooks_are_told_of_launches(device):
    quick, (args, constants) = Launcher(mixed_kernel), random_call(random.Random())
    quick[(1,)](*args, **constants)
    quick[(1,)](*args, **constants)
    assert device.last[6:9] == (None, None, None)
    hook = triton.knobs.runtime.launch_enter_hook

    def enter(metadata): ...

    hook.add(enter)
    try:
        quick[(1,)](*args, **constants)
    finally:
        hook.remove(enter)
    metadata, before, _ = device.last[6:9]
    assert before is hook
    assert metadata.get()["name"] == "mixed_kernel"


def test_a_constant_that_is_missing_is_named(device):
    @triton.jit
    def optional_kernel(out_ptr, VALUE: tl.constexpr = 3):
        tl.store(out_ptr, VALUE)

    with pytest.raises(AssertionError, match="'VALUE'"):
        Launcher(optional_kernel)[(1,)](MEMORY[torch.int32])


def test_one_launcher_for_a_kernel_and_none_for_what_is_interpreted():
    assert launcher(mixed_kernel) is launcher(mixed_kernel)
    interpreted = object()
    assert launcher(interpreted) is interpreted


def test_compilations_are_named_once_each(device):
    @triton.jit
    def fresh_kernel(out_ptr, VALUE: tl.constexpr):
        tl.store(out_ptr, VALUE)

    with compilations() as outer:
        fresh_kernel[(1,)](MEMORY[torch.int32], VALUE=1)
        with compilations() as inner:
            fresh_kernel[(1,)](MEMORY[torch.int32], VALUE=1)
            fresh_kernel[(1,)](MEMORY[torch.int32], VALUE=2)
    fresh_kernel[(1,)](MEMORY[torch.int32], VALUE=3)
    assert inner == ["fresh_kernel"]
    assert outer == ["fresh_kernel"] * 2
