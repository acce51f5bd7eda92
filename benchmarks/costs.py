"""asv: what is not speed: errors, memory, and what a user waits for before the first result."""

import os
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np

import numbasoft
from numbasoft.report import accuracy, workloads

CALL = (
    "import numpy as np, numbasoft, time; t = time.perf_counter(); numbasoft.softmax(np.ones((2, 9), 'f4')); "
)
IMPORT = "import numba, time; t = time.perf_counter(); import numbasoft; "
PRINT = "print(time.perf_counter() - t)"
REPEATS = 5


class Accuracy:
    """The largest error in ULP over the kinds of rows of numbasoft.report.accuracy."""

    params = (list(workloads.FUNCTIONS), list(workloads.DTYPES))
    param_names = ("function", "dtype")
    unit = "ULP"

    def track_largest_error(self, function, dtype):
        def evaluate(name, arrays, temperature):
            return getattr(numbasoft, name)(*arrays, temperature=temperature)

        needed = tuple(dict.fromkeys((function.removesuffix("_backward"), function)))
        records = accuracy.measure(evaluate, dtype, needed, quick=True)
        return max(
            np.inf if r["max_ulp"] is None else r["max_ulp"] for r in records if r["function"] == function
        )


class Memory:
    """What a call allocates beside its output, over the bytes of its input: no temporary of that size."""

    params = (
        ["softmax", "log_softmax", "softmax_backward"],
        ["last axis", "first axis", "strided", "float16"],
    )
    param_names = ("function", "layout")
    unit = "bytes per byte of input"

    def setup(self, function, layout):
        work = workloads.Workload(function, (2000, 2000), "float16" if layout == "float16" else "float32")
        self.arrays = [a[:, ::2] if layout == "strided" else a for a in work.inputs()]
        self.axis = 0 if layout == "first axis" else -1
        self.out = np.zeros(self.arrays[0].shape, self.arrays[0].dtype)
        self.function = getattr(numbasoft, function)
        self.function(*self.arrays, axis=self.axis, out=self.out)

    def track_temporaries(self, function, layout):
        tracemalloc.start()
        self.function(*self.arrays, axis=self.axis, out=self.out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak / self.arrays[0].nbytes


class Start:
    """Seconds until something is there, in processes of their own: the least of some runs."""

    unit = "seconds"

    def track_import_beyond_numba(self):
        return min(seconds(IMPORT + PRINT) for _ in range(REPEATS))

    def track_first_call_cold(self):
        with tempfile.TemporaryDirectory() as empty:
            return seconds(CALL + PRINT, NUMBA_CACHE_DIR=empty)

    def track_first_call_from_the_disk_cache(self):
        with tempfile.TemporaryDirectory() as folder:
            return min(seconds(CALL + PRINT, NUMBA_CACHE_DIR=folder) for _ in range(REPEATS))


def seconds(code, **environment):
    """What a program prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(done.stdout)
