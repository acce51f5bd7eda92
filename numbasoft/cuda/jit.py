"""How device code is compiled: the only file that names options of Numba's CUDA compiler."""

import numpy as np
from numba import cuda
from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)


def device(function):
    """A function called from kernels, part of the code that calls it."""
    if SIMULATED:
        return cuda.jit(device=True)(function)
    return cuda.jit(device=True, forceinline=True)(function)


def kernel(function, signature, threads):
    """A kernel of declared types, launched with at most so many threads a block.

    It is compiled at once, for the current device.
    """
    if SIMULATED:
        return Simulated(function, signature)
    return cuda.jit(signature, launch_bounds=threads, lto=False)(function)


class Simulated:
    """A kernel in the simulator, which would not give its arguments the declared types."""

    def __init__(self, function, signature):
        self.kernel, self.kinds = cuda.jit(function), [str(kind) for kind in signature.args]

    def __getitem__(self, configuration):
        def launch(*arguments):
            # the simulator keeps a configuration in the kernel itself
            typed = [getattr(np, k)(a) for k, a in zip(self.kinds, arguments, strict=True)]
            self.kernel[configuration](*typed)

        return launch
