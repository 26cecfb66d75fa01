"""Host swap: whole manager blocks of the pool to pinned host memory and back, beside the work of the device."""
