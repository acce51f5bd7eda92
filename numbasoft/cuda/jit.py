"""How device code is compiled: the only file that names options of Numba's CUDA compiler."""

import functools

from numba import cuda
from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)


def device(function):
    """A function called from kernels, part of the code that calls it."""
    return cuda.jit(device=True) (function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def kernel(signature, threads):
    """A kernel of declared types, launched with at most so many threads a block."""
    if SIMULATED:
        return cuda.jit
    return functools.partial(cuda.jit, signature, launch_bounds=threads)
