"""Qwen3-Next on pool memory. :mod:`models.registry` makes one with random weights or from a checkpoint."""

from models.qwen3_next.model import Qwen3Next
from models.registry import build_model, load_model

__all__ = ["Qwen3Next", "build_model", "load_model"]
