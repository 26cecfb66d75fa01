"""What all tests share: a test that hangs ends by itself, property tests do not mind a slow machine, and the garbage collector
does not walk what was there before a test's module."""

import faulthandler
import gc
import os

import pytest
from limits import PROCESS_S, TEST_S

try:
    import hypothesis
except ImportError:  # GPU tests also run on machines that hold only what they need
    pass
else:
    hypothesis.settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any machine")

STDERR = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)  # before tests capture it


def pytest_unconfigure(config):
    os.close(config.stash[STDERR])


def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("timeout"):
        return  # PROCESS_S holds
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_S))


@pytest.fixture(autouse=True, scope="module")
def light_heap():
    """A process that runs all tests holds a million objects, which every full collection would look at."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    faulthandler.dump_traceback_later(PROCESS_S, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
