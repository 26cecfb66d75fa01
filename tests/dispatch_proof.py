"""Proof, from a compiled kernel, that Triton's dispatch of specialised warps has no race.

A kernel with ``gl.warp_specialize`` begins with a loop in which the worker warps wait for orders: the default warps write a
command byte per worker warp, and what the partitions capture, into shared memory, and everybody meets at barrier 1. NVIDIA's
racecheck reports hazards between those writes and reads. It does not see that they are ordered; this module does.

Barrier 1 is waited at without a count of threads, so every thread of the program takes part in each of its phases (PTX ISA,
``barrier.sync``), and accesses in different phases are ordered. The phase of an instruction, modulo :data:`CYCLE`, is what a
walk over the branches counts from the entry: where no store of the dispatch shares a phase with a load of it, no two of them
race.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

CYCLE = 3
"""Barriers in one round of the dispatch: command written, captures read, partition done."""
_DISPATCH = re.compile(r"\s*(@gluon\.jit|def |gl\.warp_specialize\(|return$)")
"""Lines of a kernel's source to which Triton ascribes the dispatch."""


@dataclass
class _Block:
    """Instructions up to the next label: barriers and shared accesses in order, and where control goes."""

    events: list[tuple[str, str]] = field(default_factory=list)
    """Kind (``barrier``, ``load``, ``store``) and the instruction."""
    successors: list[str] = field(default_factory=list)
    falls_through: bool = True


def dispatch_phases(ptx: str, kernel: str, source: str) -> dict[str, set[int]]:
    """Phases modulo :data:`CYCLE` in which the dispatch's accesses to shared memory may run.

    Args:
        ptx: of the module that holds the kernel.
        kernel: its name.
        source: text of the Python file that defines it; a shared access belongs to the dispatch if the line that the PTX
            ascribes it to is the kernel's ``def``, its call of ``gl.warp_specialize`` or a bare ``return``.

    Returns:
        Instruction text, ``load`` or ``store`` before it, to phases. Empty where the kernel has no such access.

    Raises:
        ValueError: the PTX lacks the kernel, or waits at barrier 1 in a way that does not gather all threads or that this does
            not follow.
    """
    blocks = _blocks(_body(ptx, kernel), source.splitlines())
    at_entry: dict[str, set[int]] = defaultdict(set)
    names = list(blocks)
    open_blocks = [(names[0], 0)]
    found: dict[str, set[int]] = defaultdict(set)
    while open_blocks:
        name, phase = open_blocks.pop()
        if phase in at_entry[name]:
            continue
        at_entry[name].add(phase)
        block = blocks[name]
        for kind, text in block.events:
            if kind == "barrier":
                phase = (phase + 1) % CYCLE
            else:
                found[f"{kind} {text}"].add(phase)
        following = names[names.index(name) + 1 :][:1] if block.falls_through else []
        open_blocks += [(successor, phase) for successor in (*block.successors, *following)]
    return dict(found)


def unordered(ptx: str, kernel: str, source: str) -> list[str]:
    """Why the dispatch is not proven free of races, in lines; nothing where it is. Arguments and errors are those of
    :func:`dispatch_phases`."""
    phases = dispatch_phases(ptx, kernel, source)
    stores = {access: at for access, at in phases.items() if access.startswith("store")}
    loads = {access: at for access, at in phases.items() if access.startswith("load")}
    if not stores or not loads:
        return [f"{kernel}: {len(stores)} stores and {len(loads)} loads of a dispatch: nothing is proven"]
    return [
        f"{kernel}: {store!r} and {load!r} may share a phase"
        for store, written in stores.items()
        for load, read in loads.items()
        if written & read
    ]


def _body(ptx: str, kernel: str) -> list[str]:
    start = re.search(rf"^\.visible \.entry {re.escape(kernel)}\(", ptx, re.MULTILINE)
    if start is None:
        raise ValueError(
            f"kernel={kernel!r}: the PTX has no entry of that name; give the module that it was compiled to"
        )
    return ptx[start.end() : ptx.index("// -- End function", start.end())].splitlines()


def _blocks(lines: list[str], source: list[str]) -> dict[str, _Block]:
    blocks = {"entry": _Block()}
    block, line_number = blocks["entry"], 0
    targets: dict[str, list[str]] = {}
    listing: list[str] | None = None
    for line in lines:
        text = line.split("//")[0].strip()
        if listing is not None:
            listing += re.findall(r"\$L\w+", text)
            listing = None if text.endswith(";") else listing
        elif match := re.match(r"(\$L\w+): +\.branchtargets(.*)|(\$L\w+): \.branchtargets$", text):
            name = match[1] or match[3]
            listing = targets[name] = re.findall(r"\$L\w+", match[2] or "")
        elif match := re.match(r"(\$L\w+):$", text):
            block = blocks.setdefault(match[1], _Block())
        elif match := re.match(r"\.loc\s+\d+\s+(\d+)", text):
            line_number = int(match[1])
        elif re.match(r"barrier\.sync(\.aligned)?\s+1\b", text):
            if "," in text:
                raise ValueError(f"{text!r}: barrier 1 gathers a part of the threads, so its phases order nothing")
            block.events.append(("barrier", text))
        elif re.search(r"\bbar(rier)?(\.\w+)+\s+1\b", text):
            raise ValueError(f"{text!r}: another way to wait at barrier 1, which this does not follow")
        elif match := re.match(r"(?:@!?%p\d+ )?(ld|st)\.shared\b", text):
            on = source[line_number - 1] if 0 < line_number <= len(source) else ""
            if _DISPATCH.match(on):
                block.events.append(("load" if match[1] == "ld" else "store", " ".join(text.split())))
        elif match := re.match(r"(@!?%p\d+ )?\s*bra(?:\.uni)?\s+(\$L\w+);", text):
            block.successors.append(match[2])
            block = _after(blocks, block, falls_through=match[1] is not None)
        elif match := re.match(r"brx\.idx\s+%r\d+, (\$L\w+);", text):
            block.successors += targets[match[1]]
            block = _after(blocks, block, falls_through=False)
        elif re.match(r"(ret|exit|trap);", text):
            block = _after(blocks, block, falls_through=False)
    return blocks


def _after(blocks: dict[str, _Block], block: _Block, falls_through: bool) -> _Block:
    """A block of its own for what follows a branch."""
    block.falls_through = falls_through
    return blocks.setdefault(f"after branch {len(blocks)}", _Block())
