"""Copies on the device between any two layouts and dtypes, for what the kernels cannot read in place."""

from functools import lru_cache

from numba import cuda

from .backend import integer_reader, reader, write_cell, writer
from .signatures import address, signature, whole

THREADS = 256


@lru_cache
def copy(source, target):
    """From one storage type to another, rounded once; from an integer to int64 as it is, from uint64 the same bits."""
    if target == "i8":
        read, write = integer_reader(source), write_cell
    else:
        read = reader(source, "f8" if "8" in source + target or source[0] in "iu" else "f4")
        write = writer(target)

    def copy_elements(
        a,  # IN   address of the first element
        a0,  # IN   bytes from one to the next along five axes
        a1,
        a2,
        a3,
        a4,
        n1,  # IN   lengths of all axes but the first
        n2,
        n3,
        n4,
        total,  # IN   elements
        b,  # OUT  address of the first element
        b0,  # IN   as of a
        b1,
        b2,
        b3,
        b4,
    ):
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if i < total:
            i4, i = i % n4, i // n4
            i3, i = i % n3, i // n3
            i2, i = i % n2, i // n2
            i1, i = i % n1, i // n1
            value = read(a + i * a0 + i1 * a1 + i2 * a2 + i3 * a3 + i4 * a4)
            write(b + i * b0 + i1 * b1 + i2 * b2 + i3 * b3 + i4 * b4, value)

    return copy_elements, signature(address, *[whole] * 10, address, *[whole] * 5)
