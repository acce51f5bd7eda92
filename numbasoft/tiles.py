"""What is computed once per row, for the rows of a tile at a time.

A tile is as many rows as fit in the first cache, at most ROWS: the steps of different
rows do not wait for each other, and one vector instruction serves up to 16 rows.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

from .caches import first_cache
from .elementary import (
    ANY,
    DEEP,
    PLAIN,
    bounded,
    largest,
    logarithm,
    raising,
    shift_of,
    shift_of_lse,
    two_sum,
    without_lost,
)
from .jit import INLINE, inline
from .vector import fma, lanes, load, load_part, maximum, narrowed, row_at, select, splat, store, widened

ROWS = 32
TILE = 2048  # elements; 16 KiB of float32 in and out stay in a first cache of 32 KiB
LARGEST_TILE = (
    4096  # ... and these in one of 48 KiB, but not where x is read again for the result, as in log_softmax
)

# Elements are asked for while the tile before theirs is done, or the row before, in which there is nothing to
# wait for but arithmetic. Rows longer than this do not stay in the second cache till then.
LONGEST_ASKED_FOR = 1 << 18

# A row whose other exponentials sum to less than this part of the largest is confident: what it
# needs is their sum by itself, as 1 + 1e-18 is 1 in every float, while log1p(1e-18) is not 0.
CONFIDENT = 2.0**-12


@inline
def rows_in_tile(n, tile=TILE):
    return min(ROWS, max(1, tile // max(1, n)))


def larger_tile(x):
    """The elements of a tile where a first cache of 48 KiB gains by it; float64 and a smaller one have room for TILE."""


@overload(larger_tile, **INLINE)
def larger_tile_by_type(x):
    size = LARGEST_TILE if x.dtype != types.float64 and first_cache() >= 48 << 10 else TILE
    return lambda x: size


@inline
def prefetch_distance(x, rows, more):
    """How far ahead to ask for elements while computing exponentials: so many rows, if they are not huge.

    Where no ``more`` rows come, memory behind the last is not asked for: that would be read for nothing.
    """
    n = x.shape[1]
    if more > 0 and n < LONGEST_ASKED_FOR:
        return row_at(x, rows)
    return 1024 if n > TILE else 0


def exponentials_in(work, y):
    """Where a row's exponentials are kept: in y itself, or in the work array if there is one."""


@overload(exponentials_in, **INLINE)
def exponentials_in_by_type(work, y):
    return (lambda work, y: y) if work == types.none else (lambda work, y: work)


@inline
def shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction, probabilities=None):
    """The shift of every row of a tile from its maximum and its least element (see elementary.shift_of).

    Unless ``probabilities`` is None it is for these alone.
    """
    for j in range(0, count, lanes(m)):
        s = bounded(shift_for(probabilities, shift_of(load(m, j), high, low), high), load(bottom, j))
        store(c, j, s[0])
        store(magic, j, s[1])
        store(rest, j, s[2])
        store(lowest, j, s[3])
        store(fraction, j, s[4])


def shift_for(probabilities, shift, high):
    """A shift as it is, or for probabilities alone unless that is None."""


@overload(shift_for, **INLINE)
def shift_for_by_type(probabilities, shift, high):
    if probabilities == types.none:
        return lambda probabilities, shift, high: shift
    return lambda probabilities, shift, high: without_lost(shift, high)


@inline
def shifts_of_lse(lse, i, count, temperature, high, c, magic, rest, lowest, fraction):
    """The shift of every row of a tile, of which i is the first, from its logarithm (see elementary.shift_of_lse)."""
    for j in range(0, count, lanes(c)):
        s = shift_of_lse(load_part(lse, i + j, count - j, 0.0), temperature, high)
        store(c, j, s[0])
        store(magic, j, s[1])
        store(rest, j, s[2])
        store(lowest, j, s[3])
        store(fraction, j, s[4])


def in_two_parts(numbers, count, first, second):
    """float64 numbers, one per row of a tile, as two of the computing type each."""


@overload(in_two_parts, **INLINE)
def in_two_parts_by_type(numbers, count, first, second):
    return in_two_parts_64 if first.dtype == types.float64 else in_two_parts_32


def in_two_parts_32(numbers, count, first, second):
    for j in range(0, count, 8):
        v = load(numbers, j)
        high = narrowed(v)
        store(first, j, high)
        store(second, j, narrowed(v - widened(high)))


def in_two_parts_64(numbers, count, first, second):
    for j in range(0, count, 8):
        store(first, j, load(numbers, j))
        store(second, j, load(numbers, j) * 0.0)


def logarithms_of_sums(total, lost, m, count, like, logarithms):
    """log(sum exp(x - m)) for every row of a tile; -1 where the row is confident or m infinite."""


@overload(logarithms_of_sums, **INLINE)
def logarithms_of_sums_by_type(total, lost, m, count, like, logarithms):
    return logarithms_of_sums_64 if like.dtype == types.float64 else logarithms_of_sums_32


def logarithms_of_sums_32(total, lost, m, count, like, logarithms):
    for j in range(0, count, 8):
        s, top = load(total, j), load(m, j)
        log = logarithm(s * (1.0 / largest(like)))
        log = select(s - largest(like) < CONFIDENT * largest(like), -1.0, log)
        store(logarithms, j, select(maximum(top, 0.0 - top) == np.inf, -1.0, log))


def logarithms_of_sums_64(total, lost, m, count, like, logarithms):
    for r in range(count):
        others = (total[r] - largest(like)) + lost[r]
        is_special = others < CONFIDENT * largest(like) or np.isinf(m[r])
        logarithms[r] = -1.0 if is_special else math.log1p(others / largest(like))


@inline
def log_of_others(others, lost, like):
    """log(sum exp(x - m)) of one row from the sum of its exponentials without the maximum."""
    return math.log1p((others + lost) / largest(like))


def subtrahends(m, logarithms, count, first, second):
    """m + l in float64, one per row of a tile, as two numbers of the computing type each."""


@overload(subtrahends, **INLINE)
def subtrahends_by_type(m, logarithms, count, first, second):
    return subtrahends_64 if first.dtype == types.float64 else subtrahends_32


def subtrahends_32(m, logarithms, count, first, second):
    for j in range(0, count, 8):
        top, log = load(m, j), load(logarithms, j)
        high = narrowed(top + log)
        store(first, j, high)
        store(second, j, narrowed((top - widened(high)) + log))


def subtrahends_64(m, logarithms, count, first, second):
    for j in range(0, count, 8):
        high, low = two_sum(load(m, j), load(logarithms, j))
        store(first, j, high)
        store(second, j, low)


@inline
def first_lanes(shift, parts):
    """The shift of one row as numbers; ``parts`` is a stack array of 80 elements."""
    for k in range(5):
        store(parts, 16 * k, shift[k])
    return parts[0], parts[16], parts[32], parts[48], parts[64]


@inline
def reciprocals(total, lost, count, first, second):
    """1 / (total + lost) for every row of a tile, as two numbers of the computing type."""
    for j in range(0, count, 8):
        high, low = reciprocal(load(total, j), load(lost, j), first)
        put(first, j, high)
        put(second, j, low)


@inline
def raised_reciprocals(total, lost, count, first, second):
    """As ``reciprocals``, raised for ``elementary.any_factor``."""
    reciprocals(total, lost, count, first, second)
    for j in range(0, count, lanes(first)):
        store(first, j, load(first, j) * raising(first))
        store(second, j, load(second, j) * raising(first))


def choose_ways(m, bottom, high, count, first, second, way):
    """How every row of a tile is to be divided by its sum; the reciprocals of all but ``PLAIN`` ones are raised.

    Its maximum, its least element and the reciprocal tell what its least probability is about; if that is 0, as
    in rows with a mask, then not.
    """


@overload(choose_ways, **INLINE)
def choose_ways_by_type(m, bottom, high, count, first, second, way):
    return choose_none if first.dtype == types.float64 else choose_ways_32


def choose_none(m, bottom, high, count, first, second, way):
    """In float64 all are plain."""


def choose_ways_32(m, bottom, high, count, first, second, way):
    one = 2.0**-60  # the reciprocal where the maximum is about all of the sum
    for j in range(0, count, lanes(first)):
        f = load(first, j)
        # down to 2**-73 plainly; 2**-125 is a normal number
        plain = select(f > one / 8.0, splat(f, 70.0), select(f > one / 1024.0, splat(f, 63.0), 42.0))
        depth = (load(m, j) - load(bottom, j)) * high
        is_raised = (f > 0.0) & (depth > plain)  # not where there is NaN
        is_deep = is_raised & (depth > plain + 52.0) & (depth < np.inf)
        factor = select(is_raised, splat(f, raising(first)), 1.0)
        store(first, j, f * factor)
        store(second, j, load(second, j) * factor)
        store(way, j, select(is_deep, splat(f, DEEP), select(is_raised, splat(f, ANY), PLAIN)))


def way_of(way, r):
    """What ``choose_ways`` chose for row r of a tile."""


@overload(way_of, **INLINE)
def way_of_by_type(way, r):
    return (lambda way, r: PLAIN) if way.dtype == types.float64 else (lambda way, r: way[r])


def reciprocal(total, lost, like):
    """1 / (total + lost) of float64 vectors as two numbers of the computing type, which are float64 here."""


@overload(reciprocal, **INLINE)
def reciprocal_by_type(total, lost, like):
    return reciprocal_64 if like.dtype == types.float64 else reciprocal_32


def reciprocal_32(total, lost, like):
    r = 1.0 / (total + lost)
    high = widened(narrowed(r))
    return high, widened(narrowed(r - high))


def reciprocal_64(total, lost, like):
    r = 1.0 / total
    return r, r * fma(0.0 - r, lost, fma(0.0 - r, total, 1.0))


def put(array, at, v):
    """Store a float64 vector in an array of the computing type."""


@overload(put, **INLINE)
def put_by_type(array, at, v):
    if array.dtype == types.float64:
        return lambda array, at, v: store(array, at, v)
    return lambda array, at, v: store(array, at, narrowed(v))


def put_parts(first, second, at, high, low):
    """Store high + low as two numbers of the computing type."""


@overload(put_parts, **INLINE)
def put_parts_by_type(first, second, at, high, low):
    return put_parts_64 if first.dtype == types.float64 else put_parts_32


def put_parts_32(first, second, at, high, low):
    both = high + low
    high = narrowed(both)
    store(first, at, high)
    store(second, at, narrowed(both - widened(high)))


def put_parts_64(first, second, at, high, low):
    store(first, at, high)
    store(second, at, low)
