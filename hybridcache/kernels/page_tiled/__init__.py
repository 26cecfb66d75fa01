"""Page-tiled attention: the baseline of experiment ``kernel_block_size``. No backend uses it."""
