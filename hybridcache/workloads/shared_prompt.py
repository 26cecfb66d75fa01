"""shared_prompt: requests that begin with one system prompt and go on each with tokens of their own."""

import numpy as np

from hybridcache.errors import whole
from hybridcache.workloads.base import Request, Workload, check_ids, uniform_ids


def shared_prompt(
    *,
    num_requests: int = 256,
    shared_tokens: int = 600,
    own_tokens: int = 30,
    output_tokens: int = 16,
    first_id: int = 1000,
    end_id: int = 150_000,
    label: str = "shared_prompt",
    seed: int = 0,
) -> Workload:
    """All requests arrive at once; ids are uniform and independent.

    Args:
        num_requests: how many.
        shared_tokens: of the system prompt.
        own_tokens: behind it, of every request.
        output_tokens: of every request.
        first_id, end_id: ids lie in ``first_id .. end_id - 1``.
        label: the workload's name in results.
        seed: of the ids.

    Raises:
        UserError: a value out of range.
    """
    lengths = {"num_requests": num_requests, "shared_tokens": shared_tokens, "own_tokens": own_tokens}
    for name, value in {**lengths, "output_tokens": output_tokens}.items():
        whole(name, value)
    check_ids(first_id, end_id)
    rng = np.random.default_rng(whole("seed", seed, 0))
    shared, *own = (uniform_ids(rng, first_id, end_id, n) for n in (shared_tokens, *[own_tokens] * num_requests))
    prompts = [np.concatenate([shared, ids]) for ids in own]
    requests = tuple(Request(i, 0.0, len(ids), output_tokens, ids) for i, ids in enumerate(prompts))
    return Workload(label, f"shared_prompt seed={seed}", requests)
