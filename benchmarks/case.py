"""Cases: which operation is measured at which shape. A case is plain data, so that it can travel to another process."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybridcache.spec import RecurrentState

CONV_WIDTH = 4


@dataclass(frozen=True)
class Dims:
    """Sizes of a model's layers and of its manager block."""

    heads: int
    kv_heads: int
    head_dim: int
    attention_layers: int
    linear_layers: int
    k_heads: int
    v_heads: int
    state_dim: int
    """Key and value dim of a state."""
    block_bytes: int
    experts: int
    top_k: int
    hidden: int
    expert_dim: int

    @property
    def channels(self) -> int:
        """Of the conv: queries, keys and values."""
        return (2 * self.k_heads + self.v_heads) * self.state_dim

    def state(self, dtype: str) -> RecurrentState:
        """What a request keeps of a linear layer, its conv's columns in bfloat16."""
        shape = (self.v_heads, self.state_dim, self.state_dim)
        return RecurrentState(shape, dtype, self.channels, CONV_WIDTH, "bfloat16")


QWEN3_NEXT_80B = Dims(16, 2, 256, 12, 36, 16, 32, 128, 2_162_688, 512, 10, 2_048, 512)
TINY = Dims(4, 2, 16, 3, 9, 2, 4, 16, 4_096, 8, 2, 32, 16)
"""For a CPU: every operation runs, no time means anything."""
SHORT_TOKENS = 300


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        lengths: tokens of every row (context for attention, new tokens for a prefill, rows of a decode as one token each).
        dtype: of what lies in the pool: the recurrent state for the gated delta net, K and V for attention.
        kernel_block, kernel_blocks: tokens of a kernel block, and kernel blocks of a table entry.
        layout: ``block_major`` or ``layer_major``.
        queries: new tokens of every row of an attention prefill, its last ones; all where 0.
        checkpoint: tokens between checkpoints of a prefill, 0 for none.
        warm_sets: disjoint sets of memory that launches of the warm timing take in turn.
        with_torch: whether the torch backend runs it too.
    """

    operation: str
    lengths: tuple[int, ...]
    dims: Dims
    dtype: str = "bfloat16"
    kernel_block: int | None = None
    kernel_blocks: int = 1
    layout: str | None = None
    queries: int = 0
    checkpoint: int = 0
    warm_sets: int = 1
    with_torch: bool = True

    @property
    def manager_block(self) -> int | None:
        """Tokens of a table entry."""
        return self.kernel_block * self.kernel_blocks if self.kernel_block else None

    @property
    def shape(self) -> str:
        """``rows x tokens``, for example ``64x8192``; rows of a decode step of states, tokens of a store, blocks of a copy."""
        rows, longest = len(self.lengths), max(self.lengths)
        tokens, blocks = f"{sum(self.lengths)} tokens", f"{rows} blocks"
        texts = {"gdn_decode": str(rows), **dict.fromkeys(("kv_store", "qk_norm_rope_store", "experts"), tokens)}
        texts |= dict.fromkeys(("block_copy", "swap_out", "swap_in"), blocks)
        text = texts.get(self.operation, f"{rows}x{longest}")
        if self.queries:
            text = f"{rows}x{self.queries} of {longest}"
        return f"{text} ckpt{self.checkpoint}" if self.checkpoint else text

    @property
    def label(self) -> str:
        """Everything that tells it from other cases of its operation."""
        parts = [self.shape, self.dtype]
        if self.kernel_block:
            parts += [f"kb={self.kernel_block}", f"Tm={self.manager_block}", str(self.layout)]
        return " ".join(parts)

    def __str__(self) -> str:
        return f"{self.operation} {self.label}"

    def short(self) -> "Case":
        """The same kind of call on little memory: what its kernels compile to, if not all of it. Paged decodes keep their rows,
        by whose number tiles are chosen."""
        rows = self.lengths if self.operation == "paged_decode" else sorted(self.lengths)[:2]
        lengths = tuple(min(length, SHORT_TOKENS) for length in rows)
        return replace(self, lengths=lengths, queries=min(self.queries, SHORT_TOKENS // 4))


Lengths = tuple[int, ...]

PREFILLS: tuple[Lengths, ...] = ((2_048,), (8_192,), (32_768,), (1_024,) * 16)
DECODES: tuple[Lengths, ...] = ((32_768,), (4_096,) * 16, (8_192,) * 64, (2_048,) * 256)
ATTENTION_PREFILLS: tuple[Lengths, ...] = ((8_192,), (2_048,) * 4, (32_768,))
STORES: tuple[Lengths, ...] = ((1,) * 64, (8_192,))
DECODE_LAYOUTS = (
    *((kb, 11, "block_major") for kb in (8, 16, 32, 64)),
    (8, 1, "block_major"),
    (1_056, 1, "layer_major"),
    (16, 66, "layer_major"),
)
"""Kernel block, kernel blocks of a table entry, order: shared_pool's, its carve mode's, padded_page's and large_block's."""
GDN_ROWS = (1, 8, 64, 256)
GDN_SLOTS = 16
"""Launches on disjoint slots of one graph: the procedure by which vLLM's GDN decode was measured."""


def cuda_cases() -> Iterator[Case]:
    """Qwen3-Next-80B-A3B: layouts are those of the strategies, see :data:`DECODE_LAYOUTS`."""
    dims = QWEN3_NEXT_80B
    for dtype in ("float32", "bfloat16"):
        for rows in GDN_ROWS:
            yield Case("gdn_decode", (1,) * rows, dims, dtype, warm_sets=GDN_SLOTS)
    for lengths in PREFILLS:
        for operation in ("gdn_prefill", "gdn_delta", "gdn_conv"):
            yield Case(operation, lengths, dims, "float32")
    for operation in ("gdn_prefill", "gdn_delta"):
        yield Case(operation, (8_192,), dims, "float32", checkpoint=512, with_torch=False)
    for lengths in DECODES:
        for at in DECODE_LAYOUTS:
            yield Case("paged_decode", lengths, dims, "bfloat16", *at, with_torch=at == DECODE_LAYOUTS[0])
    for lengths in ATTENTION_PREFILLS:
        yield Case("paged_prefill", lengths, dims, "bfloat16", 8, 11, "block_major")
        yield Case("paged_prefill", lengths, dims, "bfloat16", 1_056, 1, "layer_major", with_torch=False)
    for operation in ("kv_store", "qk_norm_rope_store"):
        for lengths in STORES:
            yield Case(operation, lengths, dims, "bfloat16", 8, 11, "block_major")
    for operation in ("block_copy", "swap_out", "swap_in"):
        yield Case(operation, (1,) * 64, dims, "uint8")
    for lengths in DECODES:
        yield Case("table_expansion", lengths, dims, "bfloat16")


def fast_cuda_cases() -> Iterator[Case]:
    """One or two shapes of every operation."""
    keep = {"1", "64", "1x2048", "64 tokens", "1x8192 ckpt512", "16x4096", "4x2048"}
    seen: set[str] = set()
    for case in cuda_cases():
        small = case.shape in keep and (case.kernel_block, case.kernel_blocks) in ((None, 1), (8, 11))
        if small or case.operation not in seen:
            yield case
        seen.add(case.operation)


def cpu_cases() -> Iterator[Case]:
    """Every operation of the torch backend at sizes that a CPU checks in seconds."""
    dims = TINY
    for dtype in ("float32", "bfloat16"):
        yield Case("gdn_decode", (1,) * 3, dims, dtype)
    yield Case("gdn_prefill", (130, 5), dims, "float32")
    for kb, blocks, layout in ((8, 11, "block_major"), (16, 11, "block_major"), (88, 1, "layer_major")):
        yield Case("paged_decode", (200, 1, 89), dims, "bfloat16", kb, blocks, layout)
        yield Case("paged_prefill", (150, 7), dims, "bfloat16", kb, blocks, layout)
    for operation in ("kv_store", "qk_norm_rope_store"):
        yield Case(operation, (100,), dims, "bfloat16", 8, 11, "block_major")
    for operation in ("block_copy", "swap_out", "swap_in"):
        yield Case(operation, (1,) * 8, dims, "uint8")
    yield Case("table_expansion", (200, 1, 89), dims, "bfloat16")


def select(cases: Iterator[Case], operations: list[str]) -> list[Case]:
    """Cases of the named operations, all where none is named."""
    return [case for case in cases if not operations or case.operation in operations]


OPERATIONS = tuple(dict.fromkeys(case.operation for case in cuda_cases()))
