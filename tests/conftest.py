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


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's own name only, not on the order of tests."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.rpartition("::")[2].encode()))
