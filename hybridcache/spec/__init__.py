"""Specs: what a model stores, read from its configuration."""

from hybridcache.spec.cache_spec import CacheSpec
from hybridcache.spec.layers import STATE_ALIGNMENT, AttentionKV, LayerSpec, RecurrentState, round_up

__all__ = ["STATE_ALIGNMENT", "AttentionKV", "CacheSpec", "LayerSpec", "RecurrentState", "round_up"]
