"""What kernels ask of a device, and what they say of one."""

import logging
from functools import lru_cache

import torch


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of a device that is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether the device's compute capability is 9.x."""
    return capability(device)[0] == 9


@lru_cache
def warn_once(logger: str, message: str) -> None:
    """Log a warning, the first time it is given."""
    logging.getLogger(logger).warning(message)
