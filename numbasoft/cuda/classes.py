"""The classes of rows: where they lie on a device, and what of them is a class."""

from functools import lru_cache

import numpy as np
from numba import cuda
from numba.cuda import types

from . import layout
from .backend import bits_of, integer_reader, number, reader, vector_of, write_cell
from .operations import TALLY
from .signatures import address, signature, whole
from .team import CELLS, team_sum
from .totals import PAIR_CELLS, THREADS, block_sum

# Instead of a class: the row is ignored, or its class does not exist.
IGNORED, NO_CLASS = -1, -2

COPY = "i8"  # of class indices with gaps along too many axes


def five_axes(shape, strides):
    """How elements lie that are taken one by one: strides and lengths along five axes; None where these are too few."""
    axes = layout.merged([(n, (s,)) for n, s in zip(shape, strides, strict=True)])
    if len(axes) > layout.MOST_AXES:
        return None
    lengths, (strides,) = layout.five(axes, 1)
    return tuple(strides), tuple(lengths)


def places_of(target, ignore_index):
    """How class indices lie, or their copy, and which of them is ignored: None where their dtype does not have it."""
    shadow, storage = target.shadow, target.storage
    found = five_axes(shadow.shape, shadow.strides)
    if found is None:
        storage, found = COPY, five_axes(shadow.shape, layout.contiguous(shadow.shape, 8))
    limits = np.iinfo(shadow.dtype)
    possible = ignore_index is not None and limits.min <= ignore_index <= min(limits.max, 2**63 - 1)
    return storage, *found, ignore_index if possible else None


def address_of(target, call):
    """The address of class indices that lie as ``places_of`` says."""
    if five_axes(target.shadow.shape, target.shadow.strides):
        return target.address
    copy = call.temporary(target.shadow.shape, COPY)
    call.copied(target, target.shadow, copy, copy.shadow)
    return copy.address


@lru_cache
def tally(storage):
    """The class of every row, or what stands instead of it, and how many rows count."""
    read_target, read = integer_reader(storage), reader("f8", "f8")

    def class_tally(
        target,  # IN   address of the first target
        t0,  # IN   bytes from one to the next along five axes
        t1,
        t2,
        t3,
        t4,
        n1,  # IN   lengths of all axes but the first
        n2,
        n3,
        n4,
        rows,  # IN
        classes,  # IN
        ignores,  # IN   whether a class is ignored, and which
        ignore_index,
        weights,  # IN   0, or the address of a float64 for every class
        one,  # IN   1
        places,  # OUT  address of an int64 for every row
        tallies,  # OUT  0, or the address of TALLY cells for every block
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        pairs = cuda.shared.array(PAIR_CELLS, types.int64)
        row = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        one = vector_of(one)
        weight = number(one, 0.0)
        counts = row - row
        if row < rows:
            i4, i = row % n4, row // n4
            i3, i = i % n3, i // n3
            i2, i = i % n2, i // n2
            i1, i = i % n1, i // n1
            k = read_target(target + i * t0 + i1 * t1 + i2 * t2 + i3 * t3 + i4 * t4)
            counts += 1
            weight = one
            if ignores != 0 and k == ignore_index:
                k = row - row + IGNORED
                counts -= 1
                weight = number(one, 0.0)
            elif k < 0 or k >= classes:
                k = row - row + NO_CLASS
            elif weights != 0:
                weight = read(weights + k * 8)
            write_cell(places + row * 8, k)
        if tallies != 0:
            counts = team_sum(counts, THREADS, cells, 0)
            pair = block_sum((weight, number(one, 0.0)), pairs)
            if cuda.threadIdx.x == 0:
                at = tallies + cuda.blockIdx.x * (8 * TALLY)
                write_cell(at, counts)
                write_cell(at + 8, bits_of(pair[0]))
                write_cell(at + 16, bits_of(pair[1]))

    return class_tally, signature(
        address, *[whole] * 5, *[whole] * 4, whole, whole, whole, whole, address, types.float64, address, address
    )  # fmt: skip
