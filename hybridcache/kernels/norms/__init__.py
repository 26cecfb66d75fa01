"""Norms fused with what stands before and after them. Not cache operations: they read and write activations only."""
