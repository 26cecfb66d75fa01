"""Mixture of experts: routing, and the experts' matrices for few tokens and for many. Not cache operations.

A token has ``k`` routed experts and, in its last slot, the shared expert, whose weight is the sigmoid of its own gate. The
router's rows are one per expert, then the shared expert's gate, then rows that only pad their number
(:func:`router_rows`).
"""

ROUTER_MULTIPLE = 8
"""Rows of a router are a multiple of this: a row of its output starts on 16 bytes."""


def router_rows(experts: int) -> int:
    """Rows of a router's matrix: the experts, the shared expert's gate, and padding."""
    return -(-(experts + 1) // ROUTER_MULTIPLE) * ROUTER_MULTIPLE
