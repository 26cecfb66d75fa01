"""GDN decode: one token per request through conv, gates and the delta rule, the state updated in place."""

L2NORM_EPS = 1e-6
"""Added to the sum of squares of q and of k (Transformers 5, ``Qwen3NextGatedDeltaNet``)."""
