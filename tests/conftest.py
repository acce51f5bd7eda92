"""Settings and fixtures shared by all tests."""

import zlib

import numpy as np
import pytest

try:
    from hypothesis import settings
except ImportError:  # the property tests skip themselves with a reason
    pass
else:
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
    settings.load_profile("fixed")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "big: arrays above 2^31 elements, which need 20 GiB of memory and minutes; run with `pytest -m big`",
    )


def pytest_collection_modifyitems(config, items):
    if "big" in (config.getoption("markexpr") or ""):
        return
    big = [item for item in items if item.get_closest_marker("big")]
    if big:
        config.hook.pytest_deselected(items=big)
        items[:] = [item for item in items if not item.get_closest_marker("big")]


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's own name only, not on the order of tests."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.rpartition("::")[2].encode()))
