"""Rows no longer than a vector, as many at a time as a vector has lanes: a lane for every row.

One vector per row would be nearly empty where rows are short, and to find its maximum and its
sum takes as many instructions as for a long row. Here a vector is a column: element j of all
rows. Every addition is one that ``summation`` makes within the vector of a row, in the same
order, so the bits are those of ``passes``.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .elementary import coefficients, least, two_sum
from .jit import INLINE, inline
from .passes import exponential_of
from .summation import ABOVE, rest_start
from .tiles import log_of_others, logarithms_of_sums
from .vector import (
    block_side,
    filled,
    fma,
    lanes,
    load,
    load_part,
    maximum,
    row_at,
    select,
    stack_array,
    stack_block,
    store,
    transpose_block,
    widened,
)
from .vector.types import WIDEST

# A group is as many rows as a vector has lanes. It has at most so many elements: 16 rows of 16, in float64 8 of 8.
MOST = 16 * 16


@inline
def columns_of(x, i, count, columns):
    """Copy the rows from i on, ``count`` of them or as many as there are lanes, column by column."""
    n, w, side = x.shape[1], lanes(x), block_side(x)
    if count < w:
        for j in range(n):
            for r in range(w):
                columns[j * w + r] = x[i + min(r, count - 1), j]
    elif n < side:
        for j in range(n):
            for r in range(w):
                columns[j * w + r] = x[i + r, j]
    else:
        for start in range(0, n, side):
            j = min(start, n - side)
            for r in range(0, w, 2 * side):
                transpose_block(x, row_at(x, i + r) + j, row_at(x, 1), columns, j * w + r, w)


@inline
def rows_of(columns, y, i, count):
    """The inverse of ``columns_of``."""
    n, w, side = y.shape[1], lanes(y), block_side(y)
    if count < w or n < 2 * side:
        for r in range(min(count, w)):
            for j in range(n):
                y[i + r, j] = columns[j * w + r]
    else:
        for start in range(0, n, 2 * side):
            j = min(start, n - 2 * side)
            for r in range(0, w, side):
                transpose_block(columns, j * w + r, w, y, row_at(y, i + r) + j, row_at(y, 1))


@inline
def maxima_of(columns, n):
    """Loop 1: the maximum of every row."""
    m = filled(columns, -np.inf)
    for at in range(0, n * lanes(columns), lanes(columns)):
        m = maximum(load(columns, at), m)
    return m


def parts_in(exact, e, on_stack, more_on_stack):
    """Where what is summed of exponentials is kept: in e and nowhere else if ``exact`` is None."""


@overload(parts_in, **INLINE)
def parts_in_by_type(exact, e, on_stack, more_on_stack):
    if exact == types.none:
        return lambda exact, e, on_stack, more_on_stack: (e, None)
    if e.dtype == types.float64:
        return lambda exact, e, on_stack, more_on_stack: (e, more_on_stack)
    return lambda exact, e, on_stack, more_on_stack: (on_stack, more_on_stack)


@inline
def elements_at(columns, n, k):
    """Of every row the element of the number in k, 0 where there is none."""
    v = filled(columns, 0.0)
    for j in range(n):
        v = select(k == j, load(columns, j * lanes(columns)), v)
    return v


def numbers_of(v, numbers):
    """A vector, a lane for every row, into an array of float64 numbers."""


@overload(numbers_of, **INLINE)
def numbers_of_by_type(v, numbers):
    if v.element == types.float64:
        return lambda v, numbers: store(numbers, 0, v)
    return lambda v, numbers: store(numbers, 0, widened(v))


def rows_numbers(values, i, count, numbers):
    """One number for each row of a group, from values side by side or of stride 0, or one for all, if there are any."""


@overload(rows_numbers, **INLINE)
def rows_numbers_by_type(values, i, count, numbers):
    if values == types.none:
        return lambda values, i, count, numbers: None
    return fill_numbers if isinstance(values, types.Float) else copy_numbers


def fill_numbers(values, i, count, numbers):
    for r in range(0, WIDEST, 8):
        store(numbers, r, filled(numbers, values))


def copy_numbers(values, i, count, numbers):
    for r in range(0, WIDEST, 8):
        same = filled(values, values[i])
        store(numbers, r, same if row_at(values, 1) == 0 else load_part(values, i + r, count - r, 0.0))


@inline
def exponentials_of(columns, n, shift, high, low, exact, e, part, rest):
    """Loop 2: exp of every element after the shift of its row, and what is summed of it."""
    c = coefficients(filled(columns, 0.0))
    for at in range(0, n * lanes(columns), lanes(columns)):
        nothing = rest_start(exact, filled(columns, 0.0))
        v, first, second = exponential_of(exact, load(columns, at), shift, high, low, c, nothing)
        store(e, at, v)
        store(part, at, first)
        store_rest(rest, at, second)


def store_rest(array, at, v):
    """Write a vector of rests; none: nothing."""


@overload(store_rest, **INLINE)
def store_rest_by_type(array, at, v):
    if array == types.none:
        return lambda array, at, v: None
    return lambda array, at, v: store(array, at, v)


def sums_of_columns(part, rest, n, is_above, total, lost):
    """Loop 3: the sum of n elements of every row in two parts, as ``sum_push`` (or ``exact_push``) makes it.

    ``rest`` is what ``rest_push`` adds, or None.
    """


@overload(sums_of_columns, **INLINE)
def sums_of_columns_by_type(part, rest, n, is_above, total, lost):
    return sums_64 if part.dtype == types.float64 else sums_32


def sums_32(part, rest, n, is_above, total, lost):
    w = lanes(part)
    wide = stack_block(np.float64, MOST)
    for at in range(0, n * w, w):
        store(wide, at, plus_rest(widened(load(part, at)), rest, at))
    add_up_32(wide, n, w, total)


def sums_64(part, rest, n, is_above, total, lost):
    w = lanes(part)
    high, low = stack_block(np.float64, MOST), stack_block(np.float64, MOST)
    for at in range(0, n * w, w):
        v = load(part, at)
        rounded = (v + ABOVE) - ABOVE if is_above else v
        store(high, at, rounded)
        store(low, at, plus_rest(v - rounded, rest, at))
    add_up_64(high, low, n, w, total, lost)


def plus_rest(v, rest, at):
    """v and the rest of the elements at ``at``."""


@overload(plus_rest, **INLINE)
def plus_rest_by_type(v, rest, at):
    if rest == types.none:
        return lambda v, rest, at: v
    return lambda v, rest, at: v + widened(load(rest, at))


def products_of_columns(a, b, n, total, lost):
    """The sum of a[j] * b[j] of every row in two parts, as ``dot_push`` makes it."""


@overload(products_of_columns, **INLINE)
def products_of_columns_by_type(a, b, n, total, lost):
    return products_64 if b.dtype == types.float64 else products_32


def products_32(a, b, n, total, lost):
    w = lanes(b)
    wide = stack_block(np.float64, MOST)
    for at in range(0, n * w, w):
        store(wide, at, widened(load(a, at)) * widened(load(b, at)))
    add_up_32(wide, n, w, total)


def products_64(a, b, n, total, lost):
    w = lanes(b)
    high, low = stack_block(np.float64, MOST), stack_block(np.float64, MOST)
    for at in range(0, n * w, w):
        u, v = load(a, at), load(b, at)
        product = u * v
        # a sum that starts from 0 is never -0
        store(high, at, product + 0.0)
        store(low, at, fma(u, v, 0.0 - product) + 0.0)
    add_up_64(high, low, n, w, total, lost)


@inline
def add_up_32(terms, n, w, total):
    """Half of the columns added to the other half until one is left, as ``sum_across`` does."""
    half = w // 2
    while half > 0:
        for at in range(0, (n - half) * w, 8):
            store(terms, at, load(terms, at) + load(terms, at + half * w))
        n = min(n, half)
        half //= 2
    for at in range(0, w, 8):
        store(total, at, load(terms, at))


@inline
def add_up_64(high, low, n, w, total, lost):
    """As ``sum_of_pairs`` does."""
    half = w // 2
    while half > 0:
        for at in range(0, (n - half) * w, w):
            s, rounding = two_sum(load(high, at), load(high, at + half * w))
            store(low, at, (load(low, at) + load(low, at + half * w)) + rounding)
            store(high, at, s)
        n = min(n, half)
        half //= 2
    store(total, 0, load(high, 0))
    store(lost, 0, load(low, 0))


@inline
def logarithms_of_rows(columns, e, rest, n, m, top, logarithm):
    """Loops 3 and 4 of log_softmax: the sum of every row and its logarithm; ``top`` are the maxima m as numbers."""
    w = lanes(columns)
    total, lost = stack_array(np.float64, WIDEST), stack_array(np.float64, WIDEST)
    numbers_of(m, top)
    sums_of_columns(e, rest, n, True, total, lost)
    logarithms_of_sums(total, lost, top, w, e, logarithm)
    is_special = False
    for r in range(w):
        is_special |= logarithm[r] < 0.0
    if is_special:
        for at in range(0, n * w, w):
            v = load(e, at)
            store(e, at, select((load(columns, at) == m) | (v < least(v)), 0.0, v))
        sums_of_columns(e, None, n, False, total, lost)
        for r in range(w):
            if logarithm[r] < 0.0:
                logarithm[r] = log_of_others(total[r], lost[r], e)
