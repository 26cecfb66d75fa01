"""Qwen3-Next on pool memory: ``build_model`` for random weights, ``load_model`` for checkpoints."""

from models.qwen3_next.model import Qwen3Next
from models.qwen3_next.weights import build_model, load_model

__all__ = ["Qwen3Next", "build_model", "load_model"]
