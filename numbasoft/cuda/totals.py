"""One number per row to one number for all of them, in an order that the number of rows alone decides.

Rows are added by blocks of CHUNK, and what those give by a single block; every sum is kept
in two parts of float64, whatever the rows were computed in.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from . import jit
from .backend import from_lane, number, reader, select, vector_of, writer
from .elementary import two_sum
from .geometry import ITEMSIZE
from .signatures import address, signature, whole
from .team import CELLS, exchanged

THREADS, CHUNK = 256, 4096


@jit.device
def plus(a, b):
    """The sum of two numbers, each in two parts; where it is not finite the first part tells."""
    s, lost = two_sum(a[0], b[0])
    return s, a[1] + b[1] + select(lost == lost, lost, 0.0)


@jit.device
def block_sum(pair, cells, slot):
    """The sum over a block of numbers in two parts; takes two slots."""
    step = 1
    while step < 32:
        pair = plus(pair, (from_lane(pair[0], step), from_lane(pair[1], step)))
        step *= 2
    zero = number(pair[0], 0.0)
    first = exchanged(pair[0], zero, cuda.blockDim.x, cells, slot)
    pair = first, exchanged(pair[1], zero, cuda.blockDim.x, cells, slot + 1)
    step = 1
    while step < 32:
        pair = plus(pair, (from_lane(pair[0], step), from_lane(pair[1], step)))
        step *= 2
    return pair


@jit.device
def value_of(pair):
    return pair[0] + select(pair[0] - pair[0] == 0.0, pair[1], 0.0)


@lru_cache
def add(storage):
    """A sum for every CHUNK of numbers."""
    read, write = reader(storage, "f8"), writer("f8")
    itemsize = ITEMSIZE[storage]

    def add_numbers(
        values,  # IN   address of the first of contiguous numbers
        total,  # IN   how many
        zero,  # IN   0
        sums,  # OUT  address of a float64 pair for every chunk
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        zero = vector_of(zero)
        pair = zero, zero
        i = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
        end = min((cuda.blockIdx.x + 1) * CHUNK, total)
        while i < end:
            pair = plus(pair, (read(values + i * itemsize), zero))
            i += THREADS
        pair = block_sum(pair, cells, 0)
        if cuda.threadIdx.x == 0:
            write(sums + cuda.blockIdx.x * 16, pair[0])
            write(sums + cuda.blockIdx.x * 16 + 8, pair[1])

    return add_numbers, signature(address, whole, types.float64, address)


@lru_cache
def finish(storage):
    """The sum of all chunks, divided and rounded once; 0 where the divisor is 0."""
    read, write = reader("f8", "f8"), writer(storage)

    def finish_sum(
        sums,  # IN   address of a float64 pair for every chunk
        chunks,  # IN   how many
        divisor,  # IN   what to divide by, unless an address is given
        divisor_at,  # IN   0, or the address of a float64 divisor
        result,  # OUT  address of the result
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        divisor = vector_of(divisor)
        zero = number(divisor, 0.0)
        pair = zero, zero
        i = cuda.threadIdx.x
        while i < chunks:
            pair = plus(pair, (read(sums + i * 16), read(sums + i * 16 + 8)))
            i += THREADS
        pair = block_sum(pair, cells, 0)
        if cuda.threadIdx.x == 0:
            if divisor_at != 0:
                divisor = read(divisor_at)
            write(result, select(divisor == 0.0, 0.0, value_of(pair) / divisor))

    return finish_sum, signature(address, whole, types.float64, address, address)
