"""Norm of q and k, partial rotary positions, and the KV store: what lies between the projections and the attention."""
