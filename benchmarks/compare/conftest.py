"""``python -m pytest benchmarks/compare --library NAME``: one library in one process, since thread pools disturb each other."""

import os

from numbasoft import jit
from numbasoft.report import rivals


def pytest_addoption(parser):
    group = parser.getgroup("numbasoft")
    group.addoption("--library", default="numbasoft", choices=list(rivals.EVERYONE), help="what is measured")
    group.addoption("--threads", type=int, default=jit.processors(), help="threads it may use (default: all)")
    group.addoption("--small", action="store_true", help="small shapes only, for a quick look")


def pytest_configure(config):
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(config.getoption("--threads"))
