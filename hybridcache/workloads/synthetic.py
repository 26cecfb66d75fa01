"""synthetic_chat: a seeded stream with lognormal lengths and Poisson arrivals."""

import math
import random

from hybridcache.errors import number, whole
from hybridcache.workloads.base import Request, Workload


def synthetic_chat(
    *, num_requests: int = 900, rate_per_s: float | None = 44.0, prompt_median: float = 1024, prompt_sigma: float = 1.0,
    output_median: float = 128, output_sigma: float = 0.7, max_prompt: int = 8192, max_output: int = 1024,
    seed: int = 0,
) -> Workload:  # fmt: skip
    """Requests whose prompt and output lengths are lognormal: ``median * exp(sigma * N(0, 1))``, rounded, cut to ``1 .. max``.

    Lengths and arrivals come from separate random streams, so that another rate leaves the lengths as they are.

    Args:
        num_requests: how many.
        rate_per_s: mean arrivals per second of a Poisson process; None or 0 lets all arrive at once.
        prompt_median, output_median: tokens.
        prompt_sigma, output_sigma: standard deviation of the logarithm; 0 makes every length the median.
        max_prompt, max_output: longest lengths, in tokens.
        seed: of every random stream.

    Raises:
        UserError: a value out of range.
    """
    num_requests = whole("num_requests", num_requests)
    rate = number("rate_per_s", rate_per_s or 0.0)
    prompts = _Lengths("prompt", prompt_median, prompt_sigma, max_prompt, seed)
    outputs = _Lengths("output", output_median, output_sigma, max_output, seed)
    gaps = random.Random(f"arrival-{whole('seed', seed, 0)}")
    requests, now = [], 0.0
    for i in range(num_requests):
        requests.append(Request(i, now, prompts.draw(), outputs.draw()))
        now += gaps.expovariate(rate) if rate else 0.0
    return Workload("synthetic_chat", f"synthetic_chat seed={seed}", tuple(requests))


class _Lengths:
    """One stream of lognormal lengths."""

    def __init__(self, what: str, median: float, sigma: float, longest: int, seed: int) -> None:
        self.median = number(f"{what}_median", median, above=True)
        self.sigma = number(f"{what}_sigma", sigma)
        self.longest = whole(f"max_{what}", longest)
        self.random = random.Random(f"{what}-{seed}")

    def draw(self) -> int:
        # An exponent of 700 is the largest that a float holds; such a length is cut to the longest anyway.
        exponent = min(self.sigma * self.random.gauss(0.0, 1.0), 700.0)
        return max(1, round(min(self.median * math.exp(exponent), self.longest)))
