"""KV store: K and V of a step's tokens to their addresses in the pool."""
