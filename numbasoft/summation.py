"""Sums over a row that lose nothing as rows grow, in an order fixed by the row's length.

A running sum is a float64 vector and what all its additions lost, which is None where that
does not matter, in float32 and below; what else there is, is where the sum started. At the end
the lanes are combined half with half. ``numbasoft.narrow`` makes the same additions, a lane for every row.

Source of the compensated form: T. Ogita, S. M. Rump, S. Oishi, "Accurate sum and dot
product", SIAM J. Sci. Comput. 26 (2005) 1955-1988.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .elementary import OFFSET_64, two_sum
from .jit import INLINE, inline
from .vector import (
    filled,
    fma,
    lanes,
    load,
    load_part,
    operand,
    plus,
    select,
    splat,
    sum_across,
    sum_of_pairs,
    widened,
)

ABOVE = 2.0 ** (OFFSET_64 + 1)  # more than any exponential in float64


def sum_start(like):
    """An empty sum of vectors of exponentials, for ``sum_push``; sum it up with ``sum_end``."""


@overload(sum_start, **INLINE)
def sum_start_by_type(like):
    if like.element == types.float64:
        return lambda like: (splat(like, ABOVE), splat(like, 0.0), ABOVE)
    return dot_start_32


def sum_end(total):
    """A sum of vectors as two numbers: the sum of all lanes and what is lost by rounding it."""


@overload(sum_end, **INLINE)
def sum_end_by_type(total):
    if total[1] == types.none:
        return lambda total: (sum_across(total[0]), 0.0)
    if len(total) == 3:
        return lambda total: sum_of_pairs(total[0] - total[2], total[1])
    return lambda total: sum_of_pairs(total[0], total[1])


def two_parts(total, like):
    """A sum in two parts as two numbers of the type that the array ``like`` is computed in."""


@overload(two_parts, **INLINE)
def two_parts_by_type(total, like):
    if like.dtype == types.float64:
        return lambda total, like: total
    return two_parts_32


def two_parts_32(total, like):
    both = total[0] + total[1]
    high = np.float32(both)
    return high, np.float32(both - high)


def sum_joined(like, total, lost, part):
    """The sum of a row's segments so far, in two parts, and of the next, as ``sum_end`` gave it."""


@overload(sum_joined, **INLINE)
def sum_joined_by_type(like, total, lost, part):
    if like.dtype == types.float64:
        return joined_64
    return lambda like, total, lost, part: (total + part[0], lost)


def joined_64(like, total, lost, part):
    total, rounding = two_sum(total, part[0])
    return total, lost + (rounding + part[1])


def sum_push(total, v):
    """Add a vector of exponentials to a sum that holds a row's largest exponential.

    In float64 the sum starts above every term, which makes what an addition loses known after
    two subtractions.
    """


@overload(sum_push, **INLINE)
def sum_push_by_type(total, v):
    return sum_push_64 if v.element == types.float64 else exact_push_32


def sum_push_64(total, v):
    high = total[0] + v
    return high, total[1] + (v - (high - total[0])), total[2]


def sum_push_stored(total, array, start, stop):
    """Add whole vectors of exponentials from an array, as ``sum_push``."""


@overload(sum_push_stored, **INLINE)
def sum_push_stored_by_type(total, array, start, stop):
    return sum_push_stored_64 if array.dtype == types.float64 else sum_push_stored_32


def sum_push_stored_64(total, array, start, stop):
    for i in range(start, stop, lanes(array)):
        total = sum_push(total, load(array, i))
    return total


def sum_push_stored_32(total, array, start, stop):
    # two sums: the additions of one wait for each other
    w = lanes(array)
    even, odd, one = total[0], splat(total[0], 0.0), operand(total[0], 1.0)
    i = start
    while i + w < stop:
        even = plus(widened(load(array, i)), even, one)
        odd = plus(widened(load(array, i + w)), odd, one)
        i += 2 * w
    if i < stop:
        even = plus(widened(load(array, i)), even, one)
    return even + odd, None


def rest_start(exact, like):
    """What ``elementary.exponential_in_parts`` adds to, at first; None if ``exact`` is."""


@overload(rest_start, **INLINE)
def rest_start_by_type(exact, like):
    if exact == types.none:
        return lambda exact, like: None
    return lambda exact, like: splat(like, 0.0)


def rest_where(mask, rest, other):
    """One where the mask holds, else the other; None if one is."""


@overload(rest_where, **INLINE)
def rest_where_by_type(mask, rest, other):
    if types.none in (rest, other):
        return lambda mask, rest, other: None
    return lambda mask, rest, other: select(mask, rest, other)


def rest_push(total, rest):
    """Add the rests of exponentials to the sum of their first parts."""


@overload(rest_push, **INLINE)
def rest_push_by_type(total, rest):
    if rest == types.none:
        return lambda total, rest: total
    if rest.element == types.float64:
        return lambda total, rest: (total[0], total[1] + rest, total[2])
    return lambda total, rest: (total[0] + widened(rest), total[1])


def dot_start(like):
    """An empty sum for ``dot_push`` and ``exact_push``; sum it up with ``sum_end``."""


@overload(dot_start, **INLINE)
def dot_start_by_type(like):
    return dot_start_64 if like.element == types.float64 else dot_start_32


def dot_start_32(like):
    return splat(widened(like), 0.0), None


def dot_start_64(like):
    zero = splat(like, 0.0)
    return zero, zero


def dot_push(total, a, b):
    """Add a * b to a sum of products, without the rounding of the product."""


@overload(dot_push, **INLINE)
def dot_push_by_type(total, a, b):
    return dot_push_64 if a.element == types.float64 else dot_push_32


def dot_push_32(total, a, b):
    return fma(widened(a), widened(b), total[0]), total[1]


def dot_push_64(total, a, b):
    product = a * b
    high, lost = two_sum(total[0], product)
    return high, total[1] + (lost + fma(a, b, 0.0 - product))


def exact_push(total, v):
    """Add a vector to a sum that may stay small, far below a row's largest exponential."""


@overload(exact_push, **INLINE)
def exact_push_by_type(total, v):
    return exact_push_64 if v.element == types.float64 else exact_push_32


def exact_push_32(total, v):
    return total[0] + widened(v), total[1]


def exact_push_64(total, v):
    high, lost = two_sum(total[0], v)
    return high, total[1] + lost


@inline
def added_up(values):
    """The sum of contiguous float64 numbers, rounded once; where that is not finite, as added from the first to the last."""
    one = filled(values, 1.0)
    total = dot_start(one)
    n, w = values.size, lanes(values)
    for j in range(0, n, w):
        v = load(values, j) if j + w <= n else load_part(values, j, n - j, 0.0)
        total = dot_push(total, v, one)
    s = sum_end(total)
    if np.isfinite(s[0]):
        return s[0] + s[1]
    plain = 0.0
    for j in range(n):
        plain += values[j]
    return plain
