"""Operations in vectorised PyTorch, on any device. Those on caches read row lengths on the host: no CUDA graph holds them."""
