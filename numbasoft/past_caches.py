"""Results larger than the last cache: written to memory beside the exponentials of the rows after them.

A store to a line that no cache holds reads the line first. One that fills the line and tells the CPU not to
keep it does not: of softmax's traffic with memory that spares a third. Such stores wait for memory, which rests while
exponentials are computed. So all loops run side by side, each a tile of rows behind the next: before some
exponentials of a row come the same elements of loop 4 of the tile before, whose exponentials those replace, and of loop 1
of the tile after. Memory reads and writes all the time.

A thread's rows lie side by side in the result. A line in which one ends and another begins is written once, when both
are known; only at the ends of a thread's rows are parts of lines written, by ordinary stores.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from .jit import INLINE, inline
from .passes import beside_exponentials, range_across, range_with
from .vector import (
    aligned_after,
    filled,
    lanes,
    load,
    load_part,
    maximum,
    minimum,
    prefetch,
    row_at,
    store,
    store_part,
    store_past_caches,
)
from .vector.types import WIDEST

# Elements of the row whose range is found are asked for so many before; at the end of a thread's rows in vain.
READ_AHEAD = 2048

TWO_VECTORS = 2 * WIDEST


class Row(NamedTuple):
    """A row of the result, and what tells it."""

    values: Any  # IN   what ``value_at`` takes
    y: Any  # OUT  an array whose rows lie side by side
    at: int  # IN   the row's first element in it
    n: int  # IN   its elements, not fewer than a vector holds
    is_there: bool  # IN   whether there is such a row
    is_first: bool  # IN   whether what lies before it in its first line is not this thread's, and what lies behind it
    is_last: bool
    line: Any  # WORK (2 vectors) what goes into the line that it shares with the next row


class Ranged(NamedTuple):
    """A row of which the largest and the least element are to be found."""

    x: Any  # IN   or None
    at: int
    found: Any  # IN OUT  (2 vectors) those of every lane


# What a row is written from is a named tuple, whose methods are compiled into the kernel.


def value_at(self, j, count):
    """A vector of results from element j of a row on, of which ``count`` are wanted, or all if that is None."""


@overload(value_at, **INLINE)
def value_at_by_type(self, j, count):
    return self.instance_class.value_at


def common_at(self, j):
    """The same, all wanted, where the next vector that is not common lies behind j; faster, if that has a method."""


@overload(common_at, **INLINE)
def common_at_by_type(self, j):
    return getattr(self.instance_class, "common_at", lambda self, j: value_at(self, j, None))


def uncommon_after(self, j, end):
    """Where the next vector begins, of those that begin at j, that is not common; without a method, or before ``end``, there is none."""


@overload(uncommon_after, **INLINE)
def uncommon_after_by_type(self, j, end):
    return getattr(self.instance_class, "uncommon_after", lambda self, j, end: end)


def loaded(array, at, count):
    """A vector, or its first elements."""


@overload(loaded, **INLINE)
def loaded_by_type(array, at, count):
    if count == types.none:
        return lambda array, at, count: load(array, at)
    return lambda array, at, count: load_part(array, at, count, 0.0)


@overload(beside_exponentials, **INLINE)
def beside_exponentials_by_type(beside, start, stop):
    return lambda beside, start, stop: write_part(beside[0], beside[1], start, stop)


@inline
def write_part(row, ranged, start, stop):
    """Elements ``start`` to ``stop`` of a row, and a few more, to whole lines; the same of another row are looked at."""
    y, n, w = row.y, row.n, lanes(row.y)
    x, x_at, found = ranged.x, ranged.at, ranged.found
    if n - stop < w:
        stop = n
    if start > 0 and n - start < w:  # done before
        return
    m = load(found, 0), load(found, w)
    if not row.is_there:
        for j in range(start, stop - w + 1, w):
            m = range_with(m, x, x_at + j, None, 0)
    else:
        edge = aligned_after(y, row.at)
        if start == 0:
            m = range_with(m, x, x_at, None, 0)
            v = value_at(row.values, 0, None)
            if row.is_first:
                store_part(y, row.at, edge, v)
            else:
                store(row.line, w - edge, v)
                store_past_caches(y, row.at + edge - w, load(row.line, 0))
        j, end = start + edge, min(stop + edge, n - w + 1)
        while j < end:
            common = uncommon_after(row.values, j, end)
            while j < common:
                prefetch(x, x_at + j + READ_AHEAD)
                m = range_with(m, x, x_at + j, None, 0)
                store_past_caches(y, row.at + j, common_at(row.values, j))
                j += w
            if j < end:
                m = range_with(m, x, x_at + j, None, 0)
                store_past_caches(y, row.at + j, value_at(row.values, j, None))
                j += w
        if stop == n:
            v = value_at(row.values, j, n - j)
            store(row.line, 0, v)
            if row.is_last:
                store_part(y, row.at + j, n - j, v)
    store(found, 0, m[0])
    store(found, w, m[1])


@inline
def row_of(values, y, i, is_there, start, stop, line):
    """Row i of the result, in which those from ``start`` to ``stop`` are one thread's."""
    return Row(values, y, row_at(y, i), y.shape[1], is_there, i == start, i == stop - 1, line)


@inline
def write_row(row, found):
    """A whole row by itself."""
    write_part(row, Ranged(None, 0, found), 0, row.n)


@inline
def nothing_found(found):
    """Begin to look for the range of a row; the same array, (2 vectors)."""
    store(found, 0, filled(found, -np.inf))
    store(found, lanes(found), filled(found, np.inf))
    return found


@inline
def range_found(ranged, n):
    """The largest and the least element of a row of n, all of which was beside exponentials."""
    last = load(ranged.x, ranged.at + n - lanes(ranged.x))
    m, bottom = load(ranged.found, 0), load(ranged.found, lanes(ranged.x))
    return range_across((maximum(last, m), minimum(last, bottom)))
