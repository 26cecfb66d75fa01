"""Where bytes lie: block geometry, layouts, the device pool, free blocks."""
