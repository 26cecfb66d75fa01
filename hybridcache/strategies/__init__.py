"""Memory-sharing strategies behind one contract. ``build`` makes one by name; ``docs/strategies.md`` compares them."""

from importlib import import_module
from typing import Any

from hybridcache.errors import bad, named
from hybridcache.memory.spans import Kind, Move, Span, Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Cut, Strategy, Tables, Usage
from hybridcache.strategies.options import options_of

_CLASSES = {
    "shared_pool": "SharedPool",
    "large_block": "LargeBlock",
    "padded_page": "PaddedPage",
    "static_split": "StaticSplit",
    "two_ended": "TwoEnded",
    "lcm_carve": "LcmCarve",
    "byte_exact": "ByteExact",
}
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"shared_pool_carve": ("shared_pool", {"mode": "carve"})}
"""Names of ``conf/strategy`` that are a class with other options."""
COMMON = ("physical", "table_rows", "max_request_tokens")
"""Options of every strategy, which whoever builds it gives."""
STRATEGIES = tuple(_CLASSES)
"""Names that ``build`` knows; a class of your own goes in by ``_target_`` (``docs/strategies.md``)."""

__all__ = [
    "STRATEGIES",
    "Cut",
    "Kind",
    "Move",
    "Span",
    "Strategy",
    "Tables",
    "Units",
    "Usage",
    "build",
    "strategy_class",
]


def strategy_class(name: str) -> type[Strategy]:
    """The class of that name, or of that dotted path (``my_package.my_module.MyStrategy``)."""
    name, _ = _PRESETS.get(name, (name, {}))
    if name in _CLASSES:
        return getattr(import_module(f"hybridcache.strategies.{name}"), _CLASSES[name])
    found = named("strategy", name, (*STRATEGIES, *_PRESETS))
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise bad("strategy", name, "is no subclass of hybridcache.strategies.Strategy")
    return found


def build(name: str, *, spec: CacheSpec, budget_bytes: int, physical: bool = False, **options: Any) -> Strategy:
    """Make a strategy.

    Args:
        name: one of :data:`STRATEGIES`, a file of ``conf/strategy``, or the dotted path of a class.
        spec: what the model stores.
        budget_bytes: the whole budget.
        physical: for real inference (see :class:`Strategy`).
        options: the strategy's own options, as its class documents them.

    Raises:
        UserError: an unknown name or option, or a budget that cannot hold one request.
    """
    cls, given = strategy_class(name), {"physical": physical, **_PRESETS.get(name, (name, {}))[1], **options}
    valid = options_of(cls)
    for unknown in given:
        if unknown not in valid:
            own = ", ".join(option for option in valid if option not in COMMON) or "none of its own"
            raise bad(unknown, given[unknown], f"strategy {name} has no such option; it has {own}")
    return cls(spec, budget_bytes, **given)
