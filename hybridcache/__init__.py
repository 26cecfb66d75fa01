"""hybridcache: how should a hybrid model share memory between recurrent states and the KV cache?

``docs/architecture.md`` maps the package. The offline API is ``LLM`` and ``SamplingParams``, which are imported on first
use, so that accounting and simulation need neither a model nor a device.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridcache.engine.sampling import SamplingParams
    from hybridcache.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from hybridcache.llm import LLM

        return LLM
    if name == "SamplingParams":
        from hybridcache.engine.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'hybridcache' has no attribute {name!r}")
