"""How long a test may take before it counts as hanging: far longer than any does, also on a busy machine.

The environment variable ``HYBRIDCACHE_TEST_PATIENCE`` multiplies the limits, for a machine that is slower still.
"""

import os

PATIENCE = float(os.environ.get("HYBRIDCACHE_TEST_PATIENCE", "1"))
SUBPROCESS_S = 1800 * PATIENCE
"""Of a program that a test starts."""
TEST_S = 2400 * PATIENCE
"""Of a test, so that the limit of a program in it passes first; pytest-timeout fails the test."""
PROCESS_S = 3600 * PATIENCE
"""Of a test that pytest-timeout cannot end, since no Python runs in it; all stacks are printed and the process ends."""
