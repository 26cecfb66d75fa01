"""Layers that models share: norms, rotary positions, MLPs and experts, parameters, and the loading of checkpoints."""
