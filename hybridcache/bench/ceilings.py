"""Ceilings: what the device can do at most, measured on it by the plainest large operation of each kind."""

from dataclasses import asdict, dataclass

import torch

from hybridcache.bench.timing import time_events

COPY_ELEMENTS = 1 << 30
MATMUL_SIZE = 8192
HOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Ceilings:
    """Rates per second."""

    copy_bytes: float
    """Device-to-device copy of 4 GiB, read plus written."""
    matmul_flops: float
    """bfloat16 matrix product of side 8192, random values."""
    to_host_bytes: float
    from_host_bytes: float
    """One transfer of 256 MiB to and from pinned memory."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings() -> Ceilings:
    """On the current CUDA device."""
    return Ceilings(
        copy_bytes=measure_copy(),
        matmul_flops=_matmul(),
        to_host_bytes=_transfer(to_host=True),
        from_host_bytes=_transfer(to_host=False),
    )


def measure_copy() -> float:
    """Bytes per second of a device-to-device copy of 4 GiB, read plus written."""
    source = torch.empty(COPY_ELEMENTS, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    timing = time_events([lambda: target.copy_(source)])
    return 2 * source.nbytes / timing.median_ms * 1e3


def _matmul() -> float:
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    timing = time_events([lambda: a @ b] * 4)
    return 2 * MATMUL_SIZE**3 / timing.median_ms * 1e3


def _transfer(*, to_host: bool) -> float:
    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(HOST_BYTES, dtype=torch.uint8, device="cuda")
    source, target = (on_device, host) if to_host else (host, on_device)
    timing = time_events([lambda: target.copy_(source, non_blocking=True)])
    return HOST_BYTES / timing.median_ms * 1e3
