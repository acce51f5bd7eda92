"""Which kernel runs: the machine code for the arrays' types, on one thread or on many."""

from typing import Any

import numpy as np
from numba import types

from . import columns, jit, split
from .caches import last_caches
from .passes import SEGMENT, WRITE_AHEAD
from .tiles import LARGEST_TILE
from .vector.types import LANES, WIDEST

# Below this many elements starting the threads costs more than they gain: 64,000 of float32 take 11 us in one thread, in two 9
# from a loop that does nothing else, 20 from one that does, and 23 where a millisecond is between, after which threads sleep.
PARALLEL = 1 << 16

# ... and below this sharing rows costs more: threads wait for each other between the loops.
SHARED = 3 << 15

# So few rows, whatever their length, are done one by one.
FEWEST = 8

# Fewer elements than this, and rows longer than any vector, are not worth a look at which kernel is best.
SMALLEST = 128

# Tiles of columns larger than this, in bytes, are half as wide: the second cache does not hold them. Still narrower
# ones are no faster, as little as is left of one when it is read again.
ROOM = 1 << 20

# Of the lanes of columns' vectors so many are to hold rows, or they are copied to rows, which fill them: with an eighth
# in use float32 took 1.5 to 4 times as long. In 16 bits a part of a vector is copied element by element.
LEAST_FILLED = {2: 2 / 3, 4: 1 / 2, 8: 5 / 8}  # by the size of an element

# Rows longer than this get no room for their exponentials. In 16 bits these are computed twice then, and no result is
# written past the caches.
LONGEST_WORK = 1 << 18

# Results of fewer bytes, and rows of fewer elements (by their size), are never written past the caches.
LEAST_PAST_CACHES, LEAST_ROW = 4 << 20, {4: 512, 8: 3072}

# Nor is what has fewer rows for a thread, of which each gets room for one.
FEWEST_OF_THREAD = 4

# Temperatures at which float32 has log2(e) / T.
SMALLEST_PLAIN, LARGEST_PLAIN = 1e-30, 1e30

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

KINDS = {
    FLOAT32: types.float32,
    FLOAT64: types.float64,
    np.dtype(np.int16): types.int16,  # float16
    np.dtype(np.uint16): types.uint16,  # bfloat16
    np.dtype(np.uint8): types.uint8,  # masks, and 8, 16, 32 and 64 bits to be copied
    np.dtype(np.uint32): types.uint32,
    np.dtype(np.uint64): types.uint64,
    np.dtype(np.int64): types.int64,  # classes
}


def signature(value, is_output):
    """The Numba type that kernels declare for an argument: one per dtype, whatever the layout."""
    if value is None:
        return types.none
    if isinstance(value, np.ndarray):
        return types.Array(KINDS[value.dtype], value.ndim, "A", readonly=not is_output)
    if isinstance(value, bool):
        return types.boolean
    return types.intp if isinstance(value, int) else types.float64


# The machine code of kernels by what tells their signatures apart.
CODE: dict[Any, Any] = {}


def compiled(kernel, key, inputs, outputs, *more):
    """A kernel's machine code for arguments like these."""
    kinds = [signature(v, False) for v in inputs] + [signature(v, True) for v in outputs]
    function = CODE[kernel, key] = jit.compiled(kernel, *kinds, *more)
    return function


def code_for_few(kernel, key, inputs, outputs):
    """The machine code of a kernel that is called without ``launch``, in the caller's thread."""
    return CODE.get((kernel, key)) or compiled(kernel, key, inputs, outputs)


def code_for_plain(serial, parallel, key, inputs, outputs, is_few):
    """``code_for_few``; or what does as ``launch`` does with less to find out, for the rows of at least PARALLEL elements.

    Between calls the arrays push Python's code out of the first caches: it took 4 us of the 30 that softmax of 256 x 1000
    takes in two threads, and so takes 2.
    """
    if is_few:
        return code_for_few(serial, key, inputs, outputs)
    code, first = None, len(inputs)

    def run(*arguments):
        nonlocal code
        rows = len(arguments[0])
        threads = 0 if code is None else jit.threads_at_once()
        if threads > 1:
            return code(*arguments, min(threads, rows))
        result = launch(serial, parallel, key, arguments[:first], arguments[first:], rows, PARALLEL)
        code = CODE.get((parallel, key))
        return result

    return run


def are_many(rows):
    """Whether plain rows are enough for threads, and neither so short, so long nor so many that other kernels are for them."""
    return rows.size >= PARALLEL and WIDEST < rows.shape[1] <= SEGMENT and rows.nbytes < LEAST_PAST_CACHES


def launch(serial, parallel, key, inputs, outputs, rows, size):
    """Call a kernel with its inputs and outputs; ``parallel`` takes a number of blocks besides. Returned is what it returns.

    ``key`` tells apart what the types of the arguments depend on; as many elements of a softmax as ``size`` says take as long.
    """
    threads = min(jit.threads(), rows) if size >= PARALLEL else 1
    if threads > 1:
        function = CODE.get((parallel, key)) or compiled(parallel, key, inputs, outputs, types.intp)
        with jit.parallel_region() as entered:
            if entered:
                return function(*inputs, *outputs, threads)
    function = CODE.get((serial, key)) or compiled(serial, key, inputs, outputs)
    return function(*inputs, *outputs)


def fill_vectors(rows, dtype):
    """Whether so many rows side by side are enough for kernels for columns."""
    w = LANES["float64" if is_wide(dtype) else "float32"]
    return rows >= -(-rows // w) * w * LEAST_FILLED[dtype.itemsize]


def launch_columns(serial, parallel, key, inputs, outputs, rooms=1):
    """As ``launch``, for kernels along the middle axis of the first input (see numbasoft.columns).

    Each thread has room for as many tiles as ``rooms`` says. Returned is how many rows a tile has.
    """
    x = inputs[0]
    n = x.shape[1]
    kind, w = (FLOAT64, LANES["float64"]) if is_wide(x.dtype) else (FLOAT32, LANES["float32"])
    planes = columns.PLANES
    if n * planes * w * kind.itemsize * rooms > ROOM:
        planes //= 2
    while planes > 1 and columns.tiles_of(x, planes, w) < 2 * jit.threads():
        planes //= 2
    tiles = columns.tiles_of(x, planes, w)
    work = workspace(min(jit.threads(), tiles), n * planes * w * rooms, kind)
    launch(serial, parallel, key, (*inputs, planes), (work, *outputs), tiles, x.size)
    return planes * w


def launch_plain_columns(serial, parallel, key, inputs, output):
    """As ``launch_columns``, for gradients; returned are the tiles that are left as they were, or None.

    In these are numbers for which the plain formula does not do. They are told by where they are along the outer
    axis, where they start along the inner, and how many rows a tile has.
    """
    outer, _, inner = inputs[0].shape
    left = np.zeros((outer, inner), np.uint8)
    wide = launch_columns(serial, parallel, key, inputs, (left, output), rooms=2)
    places, tiles = np.nonzero(left[:, ::wide])
    return (places, tiles * wide, wide) if places.size else None


def split_rows(rows, n):
    """Whether rows are to be shared by threads: few and long, and not the same number for every thread."""
    if n <= SEGMENT or rows * n < SHARED:
        return False
    threads = jit.threads()
    return 1 < threads and rows < 2 * threads and rows != threads


def are_narrow(x, mask=None):
    """Whether rows are so short and so many that a lane is better used for a row (see numbasoft.narrow)."""
    most = LANES["float64" if x.itemsize == 8 else "float32"]
    return mask is None and x.shape[1] <= most and x.shape[0] >= FEWEST


def segments_of(rows, n):
    """How many segments ``rows`` rows of n elements have (see numbasoft.split)."""
    return rows * split.segment_count(n)


def shared_work(x):
    """What the kernels of numbasoft.split need for the rows of x: maxima, sums (before them least elements), turns."""
    units = segments_of(*x.shape)
    maxima = np.empty(units, np.float64 if is_wide(x.dtype) else np.float32)
    turns = np.zeros(split.STEPS * (jit.threads() + 1) * split.APART, np.int64)
    return maxima, np.empty((units, 2)), turns


def is_past_caches(x, y):
    """Whether y, given for the result of rows x, is written to memory at once (see numbasoft.past_caches): no cache holds it.

    Where x is y its rows are in caches when they are written, as are pages of a new array, which the system fills with zeros.
    """
    rows, n = y.shape
    return (
        y.nbytes >= LEAST_PAST_CACHES
        and y.itemsize >= 4
        and LEAST_ROW[y.itemsize] <= n <= LONGEST_WORK
        and rows >= FEWEST_OF_THREAD * jit.threads()
        and y.flags.carray
        and x.ctypes.data != y.ctypes.data
        and y.nbytes >= last_caches(jit.threads())
    )


def workspace(blocks, n, dtype=np.float32):
    """Room for the exponentials of a tile of rows, for each of the blocks.

    So far apart that no thread asks for what another writes, ahead of its own: that took a quarter of the time.
    """
    return np.empty((blocks, max(n, LARGEST_TILE) + WRITE_AHEAD), dtype)


def computing_dtype(dtype, temperature):
    """What kernels are given: the array's dtype, or float64 where float32 has no log2(e) / T."""
    if dtype.itemsize < 8 and not SMALLEST_PLAIN <= temperature <= LARGEST_PLAIN:
        return np.dtype(np.float64)
    return dtype


def is_wide(dtype):
    return dtype == FLOAT64
