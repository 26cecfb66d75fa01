"""Workloads: streams of requests, made from a seed or read from public traces. ``build_workload`` makes one by name."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hybridcache.errors import bad, named
from hybridcache.workloads.base import Request, Stream, Workload, open_loop
from hybridcache.workloads.resize import cut_to_size, with_text_prompts

_READERS = {
    "synthetic_chat": "hybridcache.workloads.synthetic",
    "fixed_lengths": "hybridcache.workloads.fixed",
    "azure": "hybridcache.workloads.azure",
    "mooncake": "hybridcache.workloads.mooncake",
    "burstgpt": "hybridcache.workloads.burstgpt",
    "agent_sessions": "hybridcache.workloads.agent_sessions",
    "conversations": "hybridcache.workloads.conversations",
    "random_sessions": "hybridcache.workloads.random_sessions",
    "shared_prompt": "hybridcache.workloads.shared_prompt",
}
WORKLOADS = tuple(_READERS)
"""Names that ``build_workload`` knows; a function of your own goes in by its dotted path."""

__all__ = [
    "WORKLOADS",
    "Request",
    "Stream",
    "Workload",
    "build_workload",
    "cut_to_size",
    "open_loop",
    "takes_seed",
    "with_text_prompts",
]


def workload_builder(name: str) -> Callable[..., Stream]:
    """The function of that name, or the callable of that dotted path (``my_package.my_module.my_workload``).

    Raises:
        UserError: an unknown name, or a path that cannot be imported or called.
    """
    if name in _READERS:
        return getattr(import_module(_READERS[name]), name)
    found = named("workload", name, WORKLOADS)
    if not callable(found):
        raise bad(
            "workload", name, "is not callable; give a function or class that returns a Workload or another Stream"
        )
    return found


def takes_seed(name: str) -> bool:
    """Whether the workload is drawn from a seed, so that another seed is another stream."""
    return "seed" in inspect.signature(workload_builder(name)).parameters


def build_workload(name: str, **options: Any) -> Stream:
    """Make a workload. :func:`open_loop` narrows it for callers that need all arrivals beforehand.

    Args:
        name: one of :data:`WORKLOADS`, or the dotted path of a callable that returns a :class:`Workload` or another
            :class:`Stream`.
        options: the keyword arguments of that callable, as it documents them.

    Raises:
        UserError: an unknown name or option, a value out of range, or a trace file that is missing or malformed.
    """
    builder = workload_builder(name)
    parameters = inspect.signature(builder).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option, value in options.items():
        if option not in parameters and not takes_any:
            raise bad(option, value, f"workload {name} has no such option; choose from {', '.join(parameters)}")
    for option, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and option not in options:
            raise bad(option, None, f"workload {name} needs it")
    workload = builder(**options)
    if not isinstance(workload, Stream):
        raise bad("workload", name, f"returned a {type(workload).__name__}; return a hybridcache.workloads.Workload")
    return workload
