"""The proof that the dispatch of specialised warps has no race: what it accepts, and what it must not."""

import pytest
from dispatch_proof import dispatch_phases, unordered

SOURCE = """@gluon.jit
def kernel(pointer):
    if pointer < 0:
        return
    work(pointer)
    gl.warp_specialize(
"""

PTX = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	.loc	1 2 0
	setp.gt.u32 	%p1, %r1, 3;
	@%p1 bra 	$L__BB0_2;
	@%p2 bra 	$L__BB0_1;
	.loc	1 4 0
	st.shared.b32 	[global_smem+8], 2;
	barrier.sync 	1;
	bra.uni 	$L__BB0_9;
$L__BB0_1:
	.loc	1 5 0
	st.shared.b32 	[global_smem+64], 5;
	.loc	1 2 0
	st.shared.b32 	[global_smem+8], 1;
	st.shared.b32 	[global_smem], %r7;
	barrier.sync 	1;
	barrier.sync 	1;
	.loc	1 5 0
	ld.shared.b32 	%r8, [global_smem+64];
	bar.sync 	0, 128;
	barrier.sync 	1;
	.loc	1 6 0
	st.shared.b32 	[global_smem+8], 2;
	barrier.sync 	1;
	bra.uni 	$L__BB0_9;
$L__BB0_2:                              // =>This Loop Header: Depth=1
	.loc	1 2 0
	barrier.sync 	1;
	ld.shared.b8 	%r2, [%r3+4];
	$L_brx_0: .branchtargets
		$L__BB0_3,
		$L__BB0_4,
		$L__BB0_9;
	brx.idx 	%r2, $L_brx_0;
$L__BB0_3:
	ld.shared.b32 	%r4, [global_smem];
	barrier.sync 	1;
	.loc	1 5 0
	add.s32 	%r5, %r4, 1;
	.loc	1 2 0
	barrier.sync 	1;
	bra.uni 	$L__BB0_2;
$L__BB0_4:
	barrier.sync 	1;
	barrier.sync 	1;
	bra.uni 	$L__BB0_2;
$L__BB0_9:
	ret;
                                        // -- End function
}
"""


def test_an_ordered_dispatch_is_proven():
    phases = dispatch_phases(PTX, "kernel", SOURCE)
    assert {access.split(" ", 1)[0]: at for access, at in phases.items()} == {"store": {0}, "load": {1}}
    assert not any("+64" in access for access in phases), "the partitions' own memory is not the dispatch's"
    assert unordered(PTX, "kernel", SOURCE) == []


def barriers_of_workers() -> list[int]:
    lines = PTX.splitlines()
    loop = lines.index(next(line for line in lines if line.startswith("$L__BB0_2:")))
    return [i for i, line in enumerate(lines) if line.startswith("\tbarrier.sync") and i > loop]


@pytest.mark.parametrize("line", barriers_of_workers())
def test_a_missing_barrier_is_found(line):
    lines = PTX.splitlines()
    assert unordered("\n".join(lines[:line] + lines[line + 1 :]), "kernel", SOURCE)


def test_a_partition_that_ends_too_early_for_the_others_is_found():
    """Without the barriers around its work, the default warps' last command meets the workers' reads."""
    lines = PTX.splitlines()
    first, second = (i for i, line in enumerate(lines) if line.startswith("\tbarrier.sync") and 18 <= i <= 20)
    assert unordered("\n".join(lines[:first] + lines[second + 1 :]), "kernel", SOURCE)


def test_a_barrier_of_some_threads_proves_nothing():
    with pytest.raises(ValueError, match="part of the threads"):
        unordered(PTX.replace("barrier.sync 	1;", "barrier.sync 	1, 256;", 1), "kernel", SOURCE)


@pytest.mark.parametrize("other", ["@%p3 barrier.sync 	1;", "bar.sync 	1;", "barrier.arrive 	1, 384;"])
def test_a_barrier_that_is_not_followed_proves_nothing(other):
    with pytest.raises(ValueError, match="another way"):
        unordered(PTX.replace("barrier.sync 	1;", other, 1), "kernel", SOURCE)


def test_no_dispatch_is_no_proof():
    (reason,) = unordered(PTX, "kernel", "\n".join("work()" for _ in range(6)))
    assert "nothing is proven" in reason


def test_an_absent_kernel_is_named():
    with pytest.raises(ValueError, match="kernel='other'"):
        unordered(PTX, "other", SOURCE)
