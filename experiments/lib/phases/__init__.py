"""Phases of experiments: each turns a configuration into result rows and events."""
