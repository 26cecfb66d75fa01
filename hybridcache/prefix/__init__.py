"""Prefix reuse: checkpoints of prompts, and the requests that resume from them."""
