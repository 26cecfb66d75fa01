"""fixed_lengths: requests that are all alike, with random token ids; the workload of throughput benchmarks."""

import numpy as np

from hybridcache.errors import whole
from hybridcache.workloads.base import Request, Workload, check_ids


def fixed_lengths(
    *, num_requests: int = 256, prompt_tokens: int = 1024, output_tokens: int = 128, first_id: int = 1000,
    end_id: int = 150_000, label: str = "fixed_lengths", seed: int = 0,
) -> Workload:  # fmt: skip
    """All requests arrive at once, with the same lengths; prompt ids are uniform and independent.

    Args:
        num_requests: how many.
        prompt_tokens, output_tokens: of every request.
        first_id, end_id: ids lie in ``first_id .. end_id - 1``.
        label: the workload's name in results.
        seed: of the ids.

    Raises:
        UserError: a value out of range.
    """
    shape = (whole("num_requests", num_requests), whole("prompt_tokens", prompt_tokens))
    whole("output_tokens", output_tokens)
    check_ids(first_id, end_id)
    ids = np.random.default_rng(whole("seed", seed, 0)).integers(first_id, end_id, shape)
    requests = tuple(
        Request(i, 0.0, prompt_tokens, output_tokens, tuple(prompt)) for i, prompt in enumerate(ids.tolist())
    )
    return Workload(label, f"fixed_lengths seed={seed}", requests)
