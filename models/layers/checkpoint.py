"""Loading the weights of a Hugging Face safetensors checkpoint.

Tensors are read one at a time from the memory-mapped file and copied straight into their parameter: no
second copy of the weights is held on the host.
"""

import json
import logging
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from hybridcache.errors import UserError, bad
from models.layers.parameters import Slots

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LISTED = 8
"""Names that an error lists of each kind."""


class Loadable(Protocol):
    """A model whose parameters are allocated."""

    config: Any

    def slots(self, names: Container[str]) -> Slots:
        """Slots of all checkpoint tensors, by the published names."""
        ...


def load_weights(folder: Path, make: Callable[[str], Loadable], device: str) -> Any:
    """A model with a checkpoint's weights: ``model.safetensors``, whole or sharded with its index.

    Experts may be stored one by one (as published) or fused (as Transformers' modules keep them). Tensors named
    ``mtp.*``, the published multi-token prediction head, are skipped, and the log says so.

    Args:
        make: allocates the model on a device.

    Raises:
        UserError: no such file; tensors missing, unexpected or of another shape (all kinds are listed at once, before
            anything is allocated).
    """
    files = _weight_files(folder)
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    skipped = _check_tensors(make("meta"), shapes, folder)
    if skipped:
        log.info("%s: skipped %d tensors that generation does not use (mtp.* ...)", folder, len(skipped))
    model = make(device)
    slots = dict(model.slots(shapes))
    with _progress() as progress:
        task = progress.add_task(f"load {folder.name}", total=sum(file.stat().st_size for file in files))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the handle is no mapping)
                    tensor = tensors.get_tensor(name)
                    if name in slots:
                        slots[name].write(tensor)
                    progress.advance(task, tensor.nbytes)
    return model


def _progress() -> Progress:
    """A bar of bytes on standard error, where that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, all present."""
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise bad("model", str(folder / INDEX), f"is no safetensors index ({error!r})") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise bad("model", str(folder), f"{INDEX} names files that are not there: {_listed(missing)}")
        return [folder / name for name in shards]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise bad("model", str(folder), f"has neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be loaded")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, from its header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise bad("model", str(file), f"cannot be read ({error})") from error


def _check_tensors(model: Loadable, shapes: dict[str, tuple[int, ...]], folder: Path) -> list[str]:
    """Compare a checkpoint's names and shapes with the model's. Returns the names that are skipped on purpose."""
    slots = dict(model.slots(shapes))
    skipped = [name for name in shapes if name.startswith("mtp.")]
    if model.config.tie_word_embeddings and "lm_head.weight" in shapes:
        skipped.append("lm_head.weight")
    problems = {
        "missing": [name for name in slots if name not in shapes],
        "unexpected": sorted(set(shapes) - set(slots) - set(skipped)),
        "misshaped": [
            f"{name} {list(shapes[name])} (the config says {list(slot.shape)})"
            for name, slot in slots.items()
            if name in shapes and shapes[name] != slot.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"model={str(folder)!r}: the checkpoint does not fit its config.json: {found}")
    return skipped


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
