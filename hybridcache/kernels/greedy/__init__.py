"""Greedy choice of tokens from logits. Not a cache operation."""

NOT_FINITE = -1
"""In place of a token id where a row's logits hold NaN or no finite maximum."""
