"""Cache specs by hand for the tests of strategies: Qwen3-Next's, and small ones in which pools fill quickly."""

import re
from random import Random
from typing import Any

from hybridcache.errors import UserError
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import Strategy, build

GIB = 1 << 30
MIB = 1 << 20


def qwen3_next(kv: str = "bfloat16", state: str = "float32", tp: int = 1, layers: int = 48) -> CacheSpec:
    """Qwen3-Next-80B-A3B cut to ``layers`` layers; the conv state is in bf16 also where KV is in fp8."""
    conv = "bfloat16" if kv.startswith("float8") else kv
    attention = AttentionKV(max(2 // tp, 1), 256, 256, kv)
    linear = RecurrentState((32 // tp, 128, 128), state, 8192 // tp, 4, conv)
    return CacheSpec(
        "qwen3_next",
        tuple(LayerSpec(i, attention, None) if i % 4 == 3 else LayerSpec(i, None, linear) for i in range(layers)),
        tp,
    )


def hybrid(attention_layers: int, state_layers: int, attention: AttentionKV, state: RecurrentState) -> CacheSpec:
    """A model whose layers hold these caches; a layer holds both where its number is below both counts."""
    return CacheSpec(
        "test",
        tuple(
            LayerSpec(i, attention if i < attention_layers else None, state if i < state_layers else None)
            for i in range(max(attention_layers, state_layers))
        ),
    )


def small_spec(rng: Random) -> CacheSpec:
    """A random hybrid model of a few layers: states of tens to hundreds of tokens of KV, MLA and states without a
    convolution or without a recurrent part among them."""
    dtype = rng.choice(("float32", "bfloat16"))
    wide = 8 if dtype == "bfloat16" else 4
    k_dim = wide * rng.choice((1, 2))
    attention = AttentionKV(rng.choice((1, 1, 2)), k_dim, rng.choice((k_dim, k_dim, 0, wide)), dtype)
    conv = rng.choice((8, 24, 40, 0))
    shape = rng.choice(((2, 4, 8), (1, 8, 8), (3, 4, 4), ()))
    state = RecurrentState(shape if conv else (2, 4, 8), rng.choice(("float32", "bfloat16")), conv, 4, dtype)
    return hybrid(rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 5, 6)), attention, state)


def build_in(budget_bytes: int, name: str, spec: CacheSpec, **options: Any) -> Strategy:
    """The strategy with that budget, or with the least that its refusal asks for."""
    try:
        return build(name, spec=spec, budget_bytes=budget_bytes, **options)
    except UserError as error:
        asked = re.search(r"give at least (\d+) bytes", str(error))
        if asked is None:
            raise
        return build(name, spec=spec, budget_bytes=int(asked[1]), **options)
