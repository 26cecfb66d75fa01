"""Vectorised PyTorch forms of the cache operations, one module per noun; ``TorchBackend`` puts them behind the contract."""
