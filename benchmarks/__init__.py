"""Measurements of single operations: what a kernel needs, how long it takes, and how close that is to the device's limits."""
