"""The planner: which manager block a model should use.

A *kernel block* holds ``kb`` tokens of K and V for all attention layers (``kb * t`` bytes). A *manager block* is ``m``
kernel blocks, ``M = m * kb * t`` bytes, and is large enough for the states of ``n`` layers. Candidates are ranked by the
bytes a request is expected to waste,

    W = ceil(layers / n) * M - S + M / 2

(the states' padding plus half a manager block of tail), ties to the larger kernel block.

Two sizes of a state are involved. What must *fit* is the stored state (the conv ring with its extra column, rounded up to
128 B), since that is what kernels address; the ring is therefore part of ``M`` and of the ranking. What ``S`` and the
padding are measured against is the exact state. ``S`` is the same for all candidates of a model, so it moves ``W`` but
never the order. For Qwen3-Next at ``(8, 11, 1)`` the stored state fills the block to the last byte, and the 0.76 % of
padding is the ring's extra column.
"""

from dataclasses import dataclass

from hybridcache.errors import bad
from hybridcache.memory.layout import check_kv_rows
from hybridcache.spec import CacheSpec

KERNEL_BLOCK_TOKENS = (8, 16, 32, 64)
"""Kernel blocks the paged attention kernels are offered with.

With rows on 16 B (:func:`hybridcache.memory.layout.check_kv_rows`) even the smallest is a multiple of the 128 B on which states
start, so every manager block is.
"""


@dataclass(frozen=True)
class Geometry:
    """One way to cut memory into manager blocks for one :class:`CacheSpec`."""

    kernel_block_tokens: int
    kernel_blocks_per_manager_block: int
    states_per_manager_block: int
    kv_bytes_per_token: int
    state_bytes_per_layer: int
    state_layers: int

    @property
    def kernel_block_bytes(self) -> int:
        """Bytes of one kernel block: K and V of all attention layers."""
        return self.kernel_block_tokens * self.kv_bytes_per_token

    @property
    def manager_block_bytes(self) -> int:
        """``M``."""
        return self.kernel_blocks_per_manager_block * self.kernel_block_bytes

    @property
    def manager_block_tokens(self) -> int:
        """``Tm``: tokens of KV in one manager block."""
        return self.kernel_blocks_per_manager_block * self.kernel_block_tokens

    @property
    def state_blocks_per_request(self) -> int:
        """Manager blocks that hold the states of all layers of one request."""
        return -(-self.state_layers // self.states_per_manager_block)

    @property
    def state_padding(self) -> float:
        """Bytes of a manager block beyond ``n`` exact states, as a fraction of those states."""
        return self.manager_block_bytes / (self.states_per_manager_block * self.state_bytes_per_layer) - 1.0

    @property
    def expected_waste_bytes(self) -> float:
        """``W``: expected waste of one request, in bytes."""
        state_waste = self.state_blocks_per_request * self.manager_block_bytes
        state_waste -= self.state_layers * self.state_bytes_per_layer
        return state_waste + self.manager_block_bytes / 2

    def request_blocks(self, num_tokens: int) -> int:
        """Manager blocks of a request of ``num_tokens`` tokens when no block is shared."""
        return self.state_blocks_per_request + -(-num_tokens // self.manager_block_tokens)


def geometry(spec: CacheSpec, kernel_block_tokens: int, kernel_blocks: int, states: int) -> Geometry:
    """A geometry chosen by hand, checked against what the kernels and the states need.

    Raises:
        UserError: the model is not hybrid, its K or V rows do not start on 16 bytes, or the block is too small for
            its states; the message says what would do.
    """
    _require_plannable(spec)
    stored, t = spec.stored_state_bytes_per_layer, spec.kv_bytes_per_token
    for field, value in (
        ("kernel_block_tokens", kernel_block_tokens),
        ("kernel_blocks_per_manager_block", kernel_blocks),
        ("states_per_manager_block", states),
    ):
        if not isinstance(value, int):
            raise bad(field, value, "give a whole number")
    if kernel_block_tokens not in KERNEL_BLOCK_TOKENS:
        raise bad("kernel_block_tokens", kernel_block_tokens, f"choose one of {KERNEL_BLOCK_TOKENS}")
    if not 1 <= states <= len(spec.state_layers):
        raise bad("states_per_manager_block", states, f"choose 1 to {len(spec.state_layers)}")
    found = Geometry(
        kernel_block_tokens=kernel_block_tokens,
        kernel_blocks_per_manager_block=kernel_blocks,
        states_per_manager_block=states,
        kv_bytes_per_token=t,
        state_bytes_per_layer=spec.state_bytes_per_layer,
        state_layers=len(spec.state_layers),
    )
    if kernel_blocks < 1 or found.manager_block_bytes < states * stored:
        need = -(-states * stored // found.kernel_block_bytes)
        raise bad(
            "kernel_blocks_per_manager_block",
            kernel_blocks,
            f"{states} state(s) of {stored} B need at least {need} kernel blocks of {found.kernel_block_bytes} B",
        )
    return found


def plan(spec: CacheSpec) -> list[Geometry]:
    """All candidate geometries, least expected waste first.

    For every kernel block and number of states the least number of kernel blocks that holds them is taken: a larger one
    only adds waste.

    Raises:
        UserError: the model is not hybrid, or its K or V rows do not start on 16 bytes.
    """
    _require_plannable(spec)
    found: list[Geometry] = []
    for kb in KERNEL_BLOCK_TOKENS:
        kernel_block_bytes = kb * spec.kv_bytes_per_token
        for n in range(1, len(spec.state_layers) + 1):
            m = -(-n * spec.stored_state_bytes_per_layer // kernel_block_bytes)
            found.append(geometry(spec, kb, m, n))
    return sorted(found, key=lambda g: (g.expected_waste_bytes, -g.kernel_block_tokens, g.states_per_manager_block))


def _require_plannable(spec: CacheSpec) -> None:
    """Refuse a model that has nothing to share, or whose K or V rows kernels could not load."""
    if spec.state is None or spec.attention is None:
        raise bad("spec", spec.model_type, "block geometry needs a model with attention KV and recurrent states")
    check_kv_rows(spec)
