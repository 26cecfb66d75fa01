"""Layout: where a strategy keeps each layer's KV and states inside one flat byte buffer.

For attention ordinal ``l`` and token position ``p`` of the request in table row ``b``, the first element of head ``h``
of K (``kv=0``) or V (``kv=1``) lies at byte

    base[l] + table[b, p // Tm] * manager_stride + ((p % Tm) // kb) * kernel_stride
            + kv * kv_stride + (p % kb) * token_stride[kv] + h * head_stride[kv]

with ``Tm = tokens_per_entry`` and ``kb = kernel_block_tokens``. For state ordinal ``l``, the state lies at byte

    state_base[l] + state_table[b, l] * state_stride

and holds ``[value head][key dim][value dim]`` of the recurrent part, then at ``conv_offset`` the conv ring as
``[column][channel]``, position ``p`` in column ``p % conv_kernel``. These strides express every physical strategy, so
one set of kernels serves them all. All offsets are bytes; element offsets are exact because every stride is a multiple
of the element size.
"""

from dataclasses import dataclass

from hybridcache.errors import bad
from hybridcache.spec import STATE_ALIGNMENT, CacheSpec
from hybridcache.spec.dtypes import itemsize

KV_ROW_ALIGNMENT = 16
"""Bytes on which a K or V row must start: one 16-byte vector load."""


@dataclass(frozen=True)
class AttentionLayout:
    """Strides, in bytes, of the paged KV cache (see the module's formula)."""

    base: tuple[int, ...]
    tokens_per_entry: int
    kernel_block_tokens: int
    manager_stride: int
    kernel_stride: int
    kv_stride: int
    token_stride: tuple[int, int]
    head_stride: tuple[int, int]
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str

    def address(self, layer: int, entry: int, position: int, kv: int, head: int) -> int:
        """Byte address of one row, given the table entry that covers ``position``."""
        inside = position % self.tokens_per_entry
        return (
            self.base[layer]
            + entry * self.manager_stride
            + (inside // self.kernel_block_tokens) * self.kernel_stride
            + kv * self.kv_stride
            + (position % self.kernel_block_tokens) * self.token_stride[kv]
            + head * self.head_stride[kv]
        )


@dataclass(frozen=True)
class StateLayout:
    """Where recurrent states lie (see the module's formula)."""

    base: tuple[int, ...]
    stride: int
    conv_offset: int
    recurrent_shape: tuple[int, ...]
    recurrent_dtype: str
    conv_channels: int
    conv_kernel: int
    conv_dtype: str

    def address(self, layer: int, entry: int) -> int:
        """Byte address of one state."""
        return self.base[layer] + entry * self.stride


@dataclass(frozen=True)
class Layout:
    """One strategy's buffer: ``pool_bytes`` bytes, and how kernels find KV and states in it."""

    pool_bytes: int
    attention: AttentionLayout
    state: StateLayout

    def __post_init__(self) -> None:
        kv, st = self.attention, self.state
        size = itemsize(kv.dtype)
        for field in ("base", "token_stride", "head_stride"):
            if any(value % size for value in getattr(kv, field)):
                raise ValueError(f"attention.{field}={getattr(kv, field)}: not a multiple of the {size}-byte element")
        for field in ("manager_stride", "kernel_stride", "kv_stride"):
            if getattr(kv, field) % size:
                raise ValueError(f"attention.{field}={getattr(kv, field)}: not a multiple of the {size}-byte element")
        if kv.tokens_per_entry % kv.kernel_block_tokens:
            raise ValueError(
                f"kernel_block_tokens={kv.kernel_block_tokens}: does not divide tokens_per_entry={kv.tokens_per_entry}"
            )
        if any(base % STATE_ALIGNMENT for base in st.base) or st.stride % STATE_ALIGNMENT:
            raise ValueError(f"state.base/stride={st.base[:2]}.../{st.stride}: a state starts on {STATE_ALIGNMENT} B")


def check_kv_rows(spec: CacheSpec) -> None:
    """What every kernel needs of a model: K and V rows that start on 16 bytes.

    Raises:
        UserError: a row of one head has another length.
    """
    kv = spec.attention
    assert kv is not None
    for field, dim in (("k_dim", kv.k_dim), ("v_dim", kv.v_dim)):
        row = dim * itemsize(kv.dtype)
        if row % KV_ROW_ALIGNMENT:
            raise bad(
                field, dim, f"a row of {row} B does not start on {KV_ROW_ALIGNMENT} B; choose a wider dtype or head"
            )


def attention_layout(
    spec: CacheSpec,
    *,
    base: tuple[int, ...],
    tokens_per_entry: int,
    kernel_block_tokens: int,
    manager_stride: int,
    kernel_stride: int,
) -> AttentionLayout:
    """The usual interior: a kernel block of one layer is ``[K|V][token][head][dim]``, contiguous."""
    kv = spec.attention
    assert kv is not None
    size = itemsize(kv.dtype)
    k_row, v_row = kv.k_dim * size, kv.v_dim * size
    return AttentionLayout(
        base=base,
        tokens_per_entry=tokens_per_entry,
        kernel_block_tokens=kernel_block_tokens,
        manager_stride=manager_stride,
        kernel_stride=kernel_stride,
        kv_stride=kernel_block_tokens * kv.num_kv_heads * k_row,
        token_stride=(kv.num_kv_heads * k_row, kv.num_kv_heads * v_row),
        head_stride=(k_row, v_row),
        num_kv_heads=kv.num_kv_heads,
        k_dim=kv.k_dim,
        v_dim=kv.v_dim,
        dtype=kv.dtype,
    )


def state_layout(spec: CacheSpec, *, base: tuple[int, ...], stride: int) -> StateLayout:
    """The usual interior of a stored state: recurrent part, then the conv ring."""
    st = spec.state
    assert st is not None
    return StateLayout(
        base=base,
        stride=stride,
        conv_offset=st.conv_offset,
        recurrent_shape=st.recurrent_shape,
        recurrent_dtype=st.recurrent_dtype,
        conv_channels=st.conv_channels,
        conv_kernel=st.conv_kernel,
        conv_dtype=st.conv_dtype,
    )
