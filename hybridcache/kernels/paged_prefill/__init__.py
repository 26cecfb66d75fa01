"""Paged prefill: causal attention of several new tokens per request over its paged KV."""
