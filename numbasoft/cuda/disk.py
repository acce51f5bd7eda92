"""Machine code of kernels on disk, so that a process need not compile what another has.

The folders, the stamp of the package's sources and the manner of reading and writing are those of
the CPU's kernels (numbasoft.jit). A file holds a kernel's name, a newline and a cubin: nothing in
it is unpickled or run on the host. What goes wrong is a miss.
"""

import contextlib
import os
from functools import cache
from importlib.metadata import version

from cuda import pathfinder
from numba import cuda
from numba.core import config
from numba.cuda.core import config as cuda_config

from .. import jit

# What makes machine code of a kernel, beside numbasoft.jit.stamp.
PACKAGES = "numba-cuda", "cuda-bindings", "cuda-core"
LIBRARIES = "nvvm", "nvJitLink"
OPTIONS = "CUDA_DEBUGINFO_DEFAULT", "OPT"
PLAIN = bool, int, float, str, tuple


@cache
def tools():
    """The compilers, by name, size and date; the driver links where there is no nvJitLink."""
    found = []
    for library in LIBRARIES:
        with contextlib.suppress(pathfinder.DynamicLibNotFoundError):
            path = pathfinder.load_nvidia_dynamic_lib(library).abs_path
            status = os.stat(path)
            found.append((path, status.st_size, status.st_mtime_ns))
    options = [(name, repr(getattr(c, name, None))) for c in (config, cuda_config) for name in OPTIONS]
    return [version(p) for p in PACKAGES], found, cuda.cudadrv.driver.driver.get_version(), options


def path_of(function, signature, threads, options):
    """A file's name by all that decides the machine code; None where that is not known."""
    with contextlib.suppress(Exception):
        if not function.__module__.startswith(f"{jit.__package__}."):
            return None
        jit.check_sources_are_those_imported()
        frozen = [c.cell_contents for c in function.__closure__ or ()]
        parts = (
            jit.stamp(), tools(), cuda.get_current_device().compute_capability, function.__module__,
            function.__qualname__, options, [v for v in frozen if isinstance(v, PLAIN)], str(signature), threads,
        )  # fmt: skip
        return f"{function.__name__}-{jit.DIGEST(repr(parts).encode()).hexdigest()[: jit.KEY_LENGTH]}.cubin"
    return None


def load(path):
    """A kernel's name and its machine code, or None."""
    for directory in jit.directories() if path else ():
        with contextlib.suppress(Exception):
            name, _, code = jit.read(directory, path).partition(b"\n")
            return name.decode(), code
    return None


def save(path, name, code):
    for directory in jit.directories() if path else ():
        with contextlib.suppress(OSError):
            jit.write(directory, path, name.encode() + b"\n" + code)
            return
