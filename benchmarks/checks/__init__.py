"""Checks that need a device or much time, and those that hold the documents to their records."""
