"""Device: choosing where a model runs, and refusing early what does not fit there."""

import os

import torch

from hybridcache.errors import bad


def choose_device(name: str) -> torch.device:
    """Resolve a device's name. ``auto`` is CUDA where there is a CUDA device, and the CPU elsewhere.

    Raises:
        UserError: ``name`` names no device, or a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise bad("device", name, "choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise bad("device", name, "choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise bad("device", name, "PyTorch finds no CUDA device here; choose cpu or auto")
        if (device.index or 0) >= torch.cuda.device_count():
            raise bad("device", name, f"there are {torch.cuda.device_count()} CUDA devices; count from 0")
    return device


def room_on(device: torch.device) -> tuple[int, str]:
    """Bytes that can still be allocated (on a CPU: the machine's whole memory), and a phrase that says of what. Memory that
    PyTorch's allocator holds and does not use counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, f"free on {device}"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's memory"


def require_room(field: str, value: object, num_bytes: int, device: torch.device) -> None:
    """Refuse a size that the device's free memory (on a CPU: the machine's whole memory) cannot hold.

    Raises:
        UserError: ``field=value`` takes ``num_bytes`` bytes and there are fewer; the message says how many.
    """
    room, what = room_on(device)
    if num_bytes > room:
        raise bad(field, value, f"takes {num_bytes} bytes and {what} is {room}; at most {int(0.9 * room)} would fit")
