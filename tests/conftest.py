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


@pytest.fixture(scope="module", params=["at once", "in blocks"])
def little(request):
    """Whether little is copied to rows and back at once, or as much is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "in blocks":
            monkeypatch.setattr("numbasoft.arrays.LITTLE", 0)
        yield


@pytest.hookimpl(trylast=True)  # after tests that were not asked for have been taken out
def pytest_collection_modifyitems(config, items):
    """Tests that take minutes come first, some for each worker, which begins with as many tests as the others.

    One process alone takes tests as they come: that costs it nothing, and --stepwise counts on it.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    slow = [item for item in items if item.get_closest_marker("minutes")]
    quick = [item for item in items if not item.get_closest_marker("minutes")]
    total, items[:] = len(items), []
    for k in range(workers):
        size, begin = (total - len(items)) // (workers - k), slow[k::workers]
        rest = max(0, size - len(begin))
        items += begin + quick[:rest]
        del quick[:rest]
    items += quick
