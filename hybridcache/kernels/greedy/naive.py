"""Reference of greedy choice, and the implementation wherever Triton does not run.

Shapes: R rows, V vocabulary.
"""

import torch

from hybridcache.kernels.greedy import NOT_FINITE


def greedy(logits_RV: torch.Tensor, ids_R: torch.Tensor, feed_R: torch.Tensor) -> None:
    """The most likely token of each row, the first of equals. Nothing waits for the device.

    Args:
        logits_RV: of any floating dtype.
        ids_R: int64; takes the tokens, :data:`~hybridcache.kernels.greedy.NOT_FINITE` where there is none.
        feed_R: int64; takes the tokens, 0 where there is none, for the next step to read.
    """
    best = logits_RV.max(dim=-1)
    # Infinity less itself and NaN are not 0. (torch.where would copy its scalar to the device, and wait.)
    ids_R.copy_(best.indices.masked_fill_(best.values - best.values != 0, NOT_FINITE))
    torch.clamp_min(ids_R, 0, out=feed_R)
