"""python -m benchmarks.gpu_host: host time of calls on device arrays, without a GPU.

Everything runs as on a GPU, numba-cuda and cuda.core included, but for the driver: driver.c stands
in for it and returns at once. What a real driver takes for a launch (2 to 3 us) comes on top.
Needs numba-cuda and a C compiler.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("driver.c")
NAME = "libcuda.so.1"
CALLS, ROUNDS = 1000, 15
COUNTED = {
    "launches": ctypes.c_long, "loads": ctypes.c_long, "links": ctypes.c_long, "grid": ctypes.c_uint,
    "block": ctypes.c_uint, "shared": ctypes.c_uint, "allowances": ctypes.c_long, "allowed": ctypes.c_int, "stream": ctypes.c_void_p, "device": ctypes.c_int, "count": ctypes.c_int,
    "parameters": ctypes.c_ulonglong * 32, "captured": ctypes.c_void_p,
}  # fmt: skip


def compiler():
    """The command of a C compiler, or None."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def build(folder):
    """Build the stand-in in a folder; the environment of processes that take it for the driver."""
    subprocess.run(
        [compiler(), "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(Path(folder) / NAME)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    # nor may its machine code get among that of a real driver
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, found)), "NUMBA_CACHE_DIR": str(folder)}


class StandIn:
    """What the stand-in has counted and kept, in a process that has loaded it."""

    def __init__(self):
        library = ctypes.CDLL(NAME)
        self.cells = {n: kind.in_dll(library, f"stand_in_{n}") for n, kind in COUNTED.items()}

    def __getattr__(self, name):
        cell = self.cells[name]
        return list(cell) if name == "parameters" else cell.value

    def keep(self, count):
        """Keep so many parameters of the launches to come."""
        self.cells["count"].value = count

    def capture(self, stream):
        """From now on a stream of this number is captured; None ends that."""
        self.cells["captured"].value = stream


def calls():
    """Calls on preallocated arrays by name."""
    import numpy as np
    from numba import cuda

    import numbasoft

    wide = cuda.to_device(np.ones((200, 20_000), "f4"))
    x, long = cuda.to_device(np.ones((8, 1000), "f4")), cuda.to_device(np.ones((8, 262_144), "f4"))
    y, long_y, lse = cuda.device_array_like(x), cuda.device_array_like(long), cuda.device_array(8, "f4")
    mask, stream = cuda.to_device(np.ones((8, 1000), bool)), cuda.stream()
    return {
        "softmax": lambda: numbasoft.softmax(x, out=y),
        "softmax, masked": lambda: numbasoft.softmax(x, where=mask, out=y),
        "softmax, on a stream": lambda: numbasoft.softmax(x, out=y, stream=stream),
        "softmax, axis 0": lambda: numbasoft.softmax(x, 0, out=y),
        "softmax, in shared memory": lambda: numbasoft.softmax(wide, out=wide),
        "softmax, three kernels": lambda: numbasoft.softmax(long, out=long_y),
        "log_softmax": lambda: numbasoft.log_softmax(x, out=y),
        "logsumexp": lambda: numbasoft.logsumexp(x, out=lse),
        "softmax_backward": lambda: numbasoft.softmax_backward(x, x, out=y),
        "log_softmax_backward": lambda: numbasoft.log_softmax_backward(x, x, out=y),
        "logsumexp_backward": lambda: numbasoft.logsumexp_backward(lse, x, lse, out=y),
    }


def measure():
    for name, call in calls().items():
        for _ in range(100):
            call()
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best = min(best, (time.perf_counter() - start) / CALLS)
        print(f"{name:23} {best * 1e6:6.1f} us", flush=True)


def main():
    if sys.argv[1:] == ["measure"]:
        warnings.simplefilter("ignore")
        measure()
        return
    if importlib.util.find_spec("numba_cuda") is None:
        sys.exit("benchmarks.gpu_host: numba-cuda is not installed: pip install '.[cuda]'")
    if compiler() is None:
        sys.exit("benchmarks.gpu_host: no C compiler to build the stand-in for the driver with")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **build(folder)}
        command = [sys.executable, "-m", "benchmarks.gpu_host", "measure"]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
