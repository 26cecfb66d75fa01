"""The layout formula as a device function of Triton kernels.

Strides are in elements of the pool's typed view and offsets are int64: a pool exceeds 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def row_offset(entry, position, base, manager_stride, kernel_stride, token_stride, TM: tl.constexpr, KB: tl.constexpr):
    """Element offset of head 0's row of ``position``, whose table entry is ``entry``."""
    inside = position % TM
    offset = base + entry.to(tl.int64) * manager_stride
    offset += (inside // KB).to(tl.int64) * kernel_stride
    return offset + (inside % KB).to(tl.int64) * token_stride


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (on the CPU) in this process."""
    return bool(triton.knobs.runtime.interpret)
