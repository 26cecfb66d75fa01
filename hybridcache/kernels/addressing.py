"""The layout formula for Triton kernels: one device function, and its arguments as the host passes them.

All strides are in elements of the pool's typed view and all offsets are int64: a pool exceeds 2^31 elements.
"""

import triton
import triton.language as tl

from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import itemsize


@triton.jit
def row_offset(
    entry,
    position,
    base,
    manager_stride,
    kernel_stride,
    token_stride,
    TM: tl.constexpr,
    KB: tl.constexpr,
):
    """Element offset of head 0's row of ``position``, whose table entry is ``entry``."""
    inside = position % TM
    offset = base + entry.to(tl.int64) * manager_stride
    offset += (inside // KB).to(tl.int64) * kernel_stride
    return offset + (inside % KB).to(tl.int64) * token_stride


def row_strides(layout: AttentionLayout, layer: int) -> dict[str, int]:
    """The kernels' arguments that say where K and V lie, by parameter name."""
    size = itemsize(layout.dtype)
    in_bytes = {
        "base": layout.base[layer],
        "manager_stride": layout.manager_stride,
        "kernel_stride": layout.kernel_stride,
        "kv_stride": layout.kv_stride,
        "k_token_stride": layout.token_stride[0],
        "v_token_stride": layout.token_stride[1],
        "k_head_stride": layout.head_stride[0],
        "v_head_stride": layout.head_stride[1],
    }
    return {name: value // size for name, value in in_bytes.items()}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (on the CPU) in this process."""
    return bool(triton.knobs.runtime.interpret)
