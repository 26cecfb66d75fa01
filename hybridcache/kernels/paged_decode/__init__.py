"""Paged decode: attention of one query per request over its paged KV."""
