"""Which kernel runs: the machine code for the arrays' types, on one thread or on many."""

from functools import cache

import numpy as np
from numba import types

from . import jit
from .tiles import TILE

# Below this many elements starting the threads costs more than they gain.
PARALLEL = 1 << 15
# An output of more bytes is written past the caches, where it would not stay anyway.
STREAM = 1 << 25

KINDS = {
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.int16): types.int16,  # float16
    np.dtype(np.uint16): types.uint16,  # bfloat16
    np.dtype(np.uint8): types.uint8,  # masks
}


def argument(value, is_output=False):
    """The Numba type that kernels declare for an argument: one per dtype, whatever the layout."""
    if value is None:
        return types.none
    if isinstance(value, np.ndarray):
        return types.Array(KINDS[value.dtype], value.ndim, "A", readonly=not is_output)
    if isinstance(value, bool):
        return types.boolean
    return types.intp if isinstance(value, int) else types.float64


@cache
def compiled(kernel, types_):
    return jit.compiled(kernel, *types_)


def launch(serial, parallel, inputs, outputs, rows, size):
    """Call a kernel with its inputs and outputs; ``parallel`` takes a number of blocks besides."""
    kinds = (*(argument(v) for v in inputs), *(argument(v, True) for v in outputs))
    threads = min(jit.threads(), rows) if size >= PARALLEL else 1
    if threads > 1:
        function = compiled(parallel, (*kinds, types.intp))
        with jit.parallel_region() as entered:
            if entered:
                function(*inputs, *outputs, threads)
                return
    compiled(serial, kinds)(*inputs, *outputs)


def workspace(blocks, n):
    """Room for the exponentials of a tile of rows, for each of the blocks."""
    return np.empty((blocks, max(n, TILE)), np.float32)


def computing_dtype(dtype, temperature):
    """What kernels are given: the array's dtype, or float64 where float32 has no log2(e) / T."""
    if dtype.itemsize < 8 and not 1e-30 <= temperature <= 1e30:
        return np.dtype(np.float64)
    return dtype


def is_wide(dtype):
    return dtype == np.float64
