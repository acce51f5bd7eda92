"""Rows that lie across: along an axis with others behind it, a lane for every row.

An array is (outer, n, inner), its rows run along the middle. A tile of rows that lie side by side is
copied to planes, line by line: in one plane, vector j is element j of as many rows as a vector has
lanes. Nothing is transposed. Every addition is one that ``passes`` and ``summation`` make within
the vectors of a row, in the same order, so the bits are those of a row that lies along the last axis.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .elementary import any_factor, coefficients, divided, exponential, least, reduced_64, shift_of
from .jit import INLINE, inline
from .narrow import add_up_32, add_up_64, numbers_of
from .passes import BLOCK, exponential_of, exponential_of_reduced
from .summation import (
    dot_push,
    dot_start,
    exact_push,
    rest_push,
    rest_start,
    sum_push,
    sum_start,
)
from .tiles import log_of_others, logarithms_of_sums
from .vector import (
    filled,
    lanes,
    load,
    load_part,
    maximum,
    operand,
    plus,
    row_at,
    select,
    splat,
    stack_array,
    stack_block,
    store,
    store_part,
    widened,
)
from .vector.types import WIDEST

# Planes of a tile, at most: eight lines of float32 or float64, side by side. With four, arrays whose rows are a
# power of two of bytes apart take 4 to 8 cycles more for 16 elements, as few of their lines fit into a cache.
PLANES = 8
MOST = PLANES * WIDEST  # rows of a tile

# Lanes of the sums of a plane's rows.
SUMS = WIDEST * WIDEST


@inline
def tiles_of(x, planes, w):
    """How many tiles of so many planes, with so many lanes, the rows of x make."""
    wide = planes * w
    return x.shape[0] * ((x.shape[2] + wide - 1) // wide)


@inline
def tile(x, planes, u):
    """Where tile u of x is: its place along the outer axis and the inner, and its number of rows."""
    inner, wide = x.shape[2], planes * lanes(x)
    tiles = (inner + wide - 1) // wide
    k = u % tiles * wide
    return u // tiles, k, min(wide, inner - k)


@inline
def gathered(x, k, width, planes, start, m):
    """Copy the rows k <= i < k + width of an (n, inner) array into planes; beside it loop 1: their maxima."""
    p = four_by_four(planes, start, None, None, 0, x, k, width, m)
    one_by_one(planes, start, x, k, p, width, m)


@inline
def scattered(planes, factors, y, k, p, width):
    """The inverse of ``gathered``, from row k + p on; beside it loop 4, by the raised reciprocals of their sums, if there are any."""
    n, w = y.shape[0], lanes(y)
    for j in range(n):
        y_at = row_at(y, j) + k
        for q in range(p, width, w):
            store_lanes(y, y_at + q, width - q, scaled(load(planes, q * n + j * w), factors, q))


@inline
def exchanged(planes, factors, y, k, width, x, next_k, next_width, m):
    """``scattered`` for one tile and ``gathered`` for the next: the one waits for stores, the other for loads."""
    p = four_by_four(planes, 0, factors, y, k, x, next_k, min(width, next_width), m)
    scattered(planes, factors, y, k, p, width)
    one_by_one(planes, 0, x, next_k, p, next_width, m)


@inline
def four_by_four(planes, start, factors, y, k, x, next_k, width, m):
    """Fill planes from x, as many times four as there are, and write what was there to y; how many rows these were."""
    n, w = x.shape[0], lanes(x)
    p = 0
    while p + 4 * w <= width:
        m0 = filled(planes, -np.inf)
        m1, m2, m3 = m0, m0, m0
        for j in range(n):
            x_at, y_at, at = row_at(x, j) + next_k + p, row_at(y, j) + k + p, start + p * n + j * w
            e0, e1 = load(planes, at), load(planes, at + n * w)
            e2, e3 = load(planes, at + 2 * n * w), load(planes, at + 3 * n * w)
            v0, v1 = load(x, x_at), load(x, x_at + w)
            v2, v3 = load(x, x_at + 2 * w), load(x, x_at + 3 * w)
            store(planes, at, v0)
            store(planes, at + n * w, v1)
            store(planes, at + 2 * n * w, v2)
            store(planes, at + 3 * n * w, v3)
            m0, m1, m2, m3 = maximum(v0, m0), maximum(v1, m1), maximum(v2, m2), maximum(v3, m3)
            store(y, y_at, scaled(e0, factors, p))
            store(y, y_at + w, scaled(e1, factors, p + w))
            store(y, y_at + 2 * w, scaled(e2, factors, p + 2 * w))
            store(y, y_at + 3 * w, scaled(e3, factors, p + 3 * w))
        store(m, p, m0)
        store(m, p + w, m1)
        store(m, p + 2 * w, m2)
        store(m, p + 3 * w, m3)
        p += 4 * w
    return p


@inline
def one_by_one(planes, start, x, k, p, width, m):
    """Fill planes from x, from row k + p on."""
    n, w = x.shape[0], lanes(x)
    for q in range(p, width, w):
        top = filled(planes, -np.inf)
        for j in range(n):
            v = load_lanes(x, row_at(x, j) + k + q, width - q)
            store(planes, start + q * n + j * w, v)
            top = maximum(v, top)
        store(m, q, top)


def scaled(v, factors, p):
    """A vector times the raised reciprocals of its rows, in two parts each; itself if there are none."""


@overload(scaled, **INLINE)
def scaled_by_type(v, factors, p):
    if factors == types.none:
        return lambda v, factors, p: v
    return lambda v, factors, p: divided(v, any_factor(load(factors[0], p), load(factors[1], p)))


@inline
def load_lanes(array, at, count):
    """As many elements as there are, others 0."""
    return load(array, at) if count >= lanes(array) else load_part(array, at, count, 0.0)


@inline
def store_lanes(array, at, count, v):
    """Write as many elements as there are."""
    if count >= lanes(array):
        store(array, at, v)
    else:
        store_part(array, at, count, v)


@inline
def plane_exponentials(planes, at, n, shift, high, low, exact, e, total, lost):
    """Loops 2 and 3 over one plane, as ``passes.segment_exponentials`` over each of its rows.

    The exponentials are kept in e, at the same place, unless it is None. Lane by lane of a row's sum,
    so that it stays in registers.
    """
    w = lanes(planes)
    c = coefficients(filled(planes, 0.0))
    sums, rests = stack_block(np.float64, SUMS), stack_block(np.float64, SUMS)
    whole = n // w
    for lane in range(min(n, w)):
        s = sum_start(filled(planes, 0.0))
        first = 0
        while first < whole:
            stop = min(first + BLOCK // w, whole)
            s = lane_exponentials(
                planes, at + lane * w, first, stop, shift, high, low, c, exact, rest_start(exact, c[0]), e, s
            )
            first = stop
        # the last vector of a row overlaps the one before
        j = n - w + lane if n >= w else lane
        if whole * w <= j:
            v = load(planes, at + j * w)
            v, part, rest = exponential_of(exact, v, shift, high, low, c, rest_start(exact, v))
            store(e, at + j * w, v)
            s = rest_push(sum_push(s, part), rest)
        keep_sum(s, sums, rests, lane * w)
    add_up(planes, sums, rests, min(n, w), total, lost)


def lane_exponentials(planes, at, first, stop, shift, high, low, c, exact, rest, e, total):
    """What one lane of a row adds up of a block: elements as far apart as a vector has lanes, first <= i < stop."""


@overload(lane_exponentials, **INLINE)
def lane_exponentials_by_type(planes, at, first, stop, shift, high, low, c, exact, rest, e, total):
    return lane_exponentials_64 if planes.dtype == types.float64 else lane_exponentials_32


def lane_exponentials_32(planes, at, first, stop, shift, high, low, c, exact, rest, e, total):
    w = lanes(planes)
    even, odd, one = total[0], splat(total[0], 0.0), operand(total[0], 1.0)
    i = first
    while i + 1 < stop:
        j = at + i * w * w
        v, part, rest = exponential_of(exact, load(planes, j), shift, high, low, c, rest)
        store(e, j, v)
        even = plus(widened(part), even, one)
        v, part, rest = exponential_of(exact, load(planes, j + w * w), shift, high, low, c, rest)
        store(e, j + w * w, v)
        odd = plus(widened(part), odd, one)
        i += 2
    if i < stop:
        j = at + i * w * w
        v, part, rest = exponential_of(exact, load(planes, j), shift, high, low, c, rest)
        store(e, j, v)
        even = plus(widened(part), even, one)
    return rest_push((even + odd, None), rest)


def lane_exponentials_64(planes, at, first, stop, shift, high, low, c, exact, rest, e, total):
    # half of the work after the other, as in passes.block_exponentials_64
    w = lanes(planes)
    reduced, powers = stack_block(planes, BLOCK), stack_block(planes, BLOCK)
    k = 0
    for i in range(first, stop):
        r, power = reduced_64(load(planes, at + i * w * w), shift, high, low)
        store(reduced, k, r)
        store(powers, k, power)
        k += w
    k = 0
    for i in range(first, stop):
        v, part, rest = exponential_of_reduced(exact, load(reduced, k), load(powers, k), c, rest)
        store(e, at + i * w * w, v)
        total = sum_push(total, part)
        k += w
    return rest_push(total, rest)


@inline
def plane_others(planes, at, n, m, shift, high, low, total, lost):
    """The sums of exponentials without those of the maxima m, as ``passes.segment_others``."""
    w = lanes(planes)
    c = coefficients(m)
    sums, rests = stack_block(np.float64, SUMS), stack_block(np.float64, SUMS)
    for lane in range(min(n, w)):
        s = dot_start(m)
        for j in range(lane, n, w):
            v = load(planes, at + j * w)
            e = exponential(v, shift, high, low, c)
            s = exact_push(s, select((v == m) | (e < least(e)), 0.0, e))
        keep_sum(s, sums, rests, lane * w)
    add_up(planes, sums, rests, min(n, w), total, lost)


@inline
def plane_logarithms(planes, at, n, m, high, low, exact, top, logarithm):
    """Loops 2 to 4 of log_softmax over one plane: log(sum exp((x - m) / T)); ``top`` are the maxima m as numbers."""
    w = lanes(planes)
    total, lost = stack_array(np.float64, WIDEST), stack_array(np.float64, WIDEST)
    shift = shift_of(m, high, low)
    plane_exponentials(planes, at, n, shift, high, low, exact, None, total, lost)
    numbers_of(m, top)
    logarithms_of_sums(total, lost, top, w, planes, logarithm)
    is_special = False
    for r in range(w):
        is_special |= logarithm[r] < 0.0
    if is_special:
        plane_others(planes, at, n, m, shift, high, low, total, lost)
        for r in range(w):
            if logarithm[r] < 0.0:
                logarithm[r] = log_of_others(total[r], lost[r], planes)


@inline
def plane_counted(e, at, n, total, lost):
    """The sums of the exponentials of one plane that count as more than 0, as ``summation.exact_push`` makes them."""
    w = lanes(e)
    sums, rests = stack_block(np.float64, SUMS), stack_block(np.float64, SUMS)
    for lane in range(min(n, w)):
        s = dot_start(filled(e, 0.0))
        for j in range(at + lane * w, at + n * w, w * w):
            v = load(e, j)
            s = exact_push(s, select(v < least(v), 0.0, v))
        keep_sum(s, sums, rests, lane * w)
    add_up(e, sums, rests, min(n, w), total, lost)


@inline
def plane_dot(a, a_at, b, b_at, n, total, lost):
    """The sums of a[j] * b[j] of the rows of one plane, as ``passes.segment_dot``."""
    w = lanes(b)
    sums, rests = stack_block(np.float64, SUMS), stack_block(np.float64, SUMS)
    for lane in range(min(n, w)):
        s = dot_start(filled(b, 0.0))
        for j in range(lane * w, n * w, w * w):
            s = dot_push(s, load(a, a_at + j), load(b, b_at + j))
        keep_sum(s, sums, rests, lane * w)
    add_up(b, sums, rests, min(n, w), total, lost)


@inline
def plane_sum(a, a_at, b, b_at, n, total, lost):
    """The sums of a[j] where b[j] is not -inf of the rows of one plane, as ``passes.segment_sum``."""
    w = lanes(b)
    sums, rests = stack_block(np.float64, SUMS), stack_block(np.float64, SUMS)
    for lane in range(min(n, w)):
        s = dot_start(filled(b, 0.0))
        for j in range(lane * w, n * w, w * w):
            s = exact_push(s, select(load(b, b_at + j) == -np.inf, 0.0, load(a, a_at + j)))
        keep_sum(s, sums, rests, lane * w)
    add_up(b, sums, rests, min(n, w), total, lost)


def keep_sum(total, sums, rests, at):
    """One lane of the sum of every row, as ``summation`` keeps it."""


@overload(keep_sum, **INLINE)
def keep_sum_by_type(total, sums, rests, at):
    if total[1] == types.none:
        return lambda total, sums, rests, at: store(sums, at, total[0])
    if len(total) == 3:
        return keep_above
    return keep_pair


def keep_above(total, sums, rests, at):
    store(sums, at, total[0] - total[2])
    store(rests, at, total[1])


def keep_pair(total, sums, rests, at):
    store(sums, at, total[0])
    store(rests, at, total[1])


def add_up(like, sums, rests, count, total, lost):
    """The sums of all rows of a plane in two parts, from their lanes, of which so many are not 0."""


@overload(add_up, **INLINE)
def add_up_by_type(like, sums, rests, count, total, lost):
    if like.dtype == types.float64:
        return lambda like, sums, rests, count, total, lost: add_up_64(
            sums, rests, count, lanes(like), total, lost
        )
    return lambda like, sums, rests, count, total, lost: add_up_32(sums, count, lanes(like), total)
