"""Sampling on the CPU: a row's exponentials, which of them are kept, and where a random part of their sum ends."""

import math

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...counter import DRAW, NOISE, uniforms
from ...elementary import largest
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...passes import row_exponentials, row_range, row_scaled
from ...split import row_shift
from ...summation import dot_start, exact_push, sum_end, two_parts
from ...tiles import prefetch_distance
from ...vector import filled, lanes, load_part, row_at, select, sum_across

# No draw of 53 bits tells a probability below this from 0, nor what counts as 0.
NOTHING = 2.0**-149

BLOCK = 1024


@inline
def draw_rows(
    x,  # IN   (rows, n) float32 or float64
    row,  # IN   (rows,) the number of each row
    key,  # IN   of all random numbers
    top_k,  # IN   how many classes are kept at most
    top_p,  # IN   the least part of the probability that is kept
    min_p,  # IN   the least probability kept, as a part of the largest
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    block,  # IN   the row of work to use
    work,  # WORK (blocks, at least n) for exponentials
    drawn,  # OUT  (rows,) a class of each row, -1 where the row has no probabilities
):
    n = x.shape[1]
    at = row_at(work, block)
    for i in range(start, stop):
        m, bottom = row_range(x, row_at(x, i), None, 0, n)
        shift = row_shift(x, m, high, low, bottom)
        ahead = prefetch_distance(x, 1, stop - i - 1)
        s = row_exponentials(x, row_at(x, i), None, 0, n, work, at, shift, high, low, ahead)
        if not s[0] + s[1] < np.inf:
            drawn[i] = -1
            continue
        least = np.float64(from_bits(bits_of(max(NOTHING, min_p) * largest(x), work), work))
        if top_k < n:
            least = keep_first(work, block, at, n, least, top_k)
        if top_p < 1.0:
            mass = mass_from(work, at, n, least)
            least = keep_mass(work, block, at, n, least, top_p * mass)
        first, _ = uniforms(key, row[i], 0, DRAW)
        drawn[i] = place_of(work, block, at, n, least, first * mass_from(work, at, n, least))


@inline
def mass_from(work, at, n, least):
    """The sum of the exponentials that are at least ``least``, block by block."""
    total = 0.0
    j = 0
    while j < n:
        count = min(BLOCK, n - j)
        total += block_mass(work, at + j, count, least)
        j += BLOCK
    return total


@inline
def block_mass(work, at, n, least):
    total = dot_start(filled(work, 0.0))
    j = 0
    while j < n:
        v = load_part(work, at + j, n - j, 0.0)
        total = exact_push(total, select(v >= least, v, 0.0))
        j += lanes(work)
    s = sum_end(total)
    return s[0] + s[1]


@inline
def count_from(work, at, n, least):
    """How many exponentials are at least ``least``."""
    one, count = filled(work, 1.0), 0.0
    j = 0
    while j < n:
        counts = filled(work, 0.0)  # of a block: float32 would not count a long row
        for k in range(j, min(n, j + BLOCK), lanes(work)):
            counts = counts + select(load_part(work, at + k, n - k, 0.0) >= least, one, 0.0)
        count += sum_across(counts)
        j += BLOCK
    return np.intp(count)


def bits_of(v, like):
    """A number that is not negative as an integer of the same order, in the type of an array."""


@overload(bits_of, **INLINE)
def bits_of_by_type(v, like):
    if like.dtype == types.float64:
        return lambda v, like: np.int64(np.float64(v).view(np.int64))
    return lambda v, like: np.int64(np.float32(v).view(np.int32))


def from_bits(bits, like):
    """The inverse of ``bits_of``."""


@overload(from_bits, **INLINE)
def from_bits_by_type(bits, like):
    if like.dtype == types.float64:
        return lambda bits, like: np.int64(bits).view(np.float64)
    return lambda bits, like: np.int32(bits).view(np.float32)


@inline
def keep_first(work, block, at, n, least, count):
    """Drop all but the ``count`` largest exponentials, of equal ones the first; what is then the least."""
    if count_from(work, at, n, least) <= count:
        return least
    low, high = bits_of(least, work), bits_of(largest(work), work) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if count_from(work, at, n, from_bits(middle, work)) >= count:
            low = middle
        else:
            high = middle
    above = count_from(work, at, n, from_bits(low + 1, work))
    drop_ties(work, block, n, from_bits(low, work), count - above)
    return np.float64(from_bits(low, work))


@inline
def keep_mass(work, block, at, n, least, mass):
    """Drop all but the fewest largest exponentials whose sum is at least ``mass``; what is then the least."""
    low, high = bits_of(least, work), bits_of(largest(work), work) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if mass_from(work, at, n, from_bits(middle, work)) >= mass:
            low = middle
        else:
            high = middle
    value = np.float64(from_bits(low, work))
    above = mass_from(work, at, n, from_bits(low + 1, work))
    drop_ties(work, block, n, from_bits(low, work), max(1.0, math.ceil((mass - above) / value)))
    return value


@inline
def drop_ties(work, block, n, value, count):
    """Of the exponentials equal to a value only the first ``count`` remain."""
    for j in range(n):
        if work[block, j] == value:
            count -= 1
            if count < 0:
                work[block, j] = 0.0


@inline
def place_of(work, block, at, n, least, part):
    """The first class at which the sum of what is kept exceeds a part of it."""
    total = 0.0
    j = 0
    while j < n:
        count = min(BLOCK, n - j)
        here = block_mass(work, at + j, count, least)
        if here + total > part:
            for k in range(j, j + count):
                e = work[block, k]
                total += e if e >= least else 0.0  # which of them are kept no CPU can foresee
                if total > part:
                    return k
        else:
            total += here
        j += BLOCK
    k = n - 1  # rounding alone leads here
    while work[block, k] < least:
        k -= 1
    return k


@kernel
def draw(x, row, key, top_k, top_p, min_p, high, low, work, drawn):
    draw_rows(x, row, key, top_k, top_p, min_p, high, low, 0, x.shape[0], 0, work, drawn)


@parallel_kernel
def draw_parallel(x, row, key, top_k, top_p, min_p, high, low, work, drawn, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        draw_rows(x, row, key, top_k, top_p, min_p, high, low, i, j, np.int64(b), work, drawn)


@inline
def relaxed_rows(
    x,  # IN   (rows, n) float32 or float64
    row,  # IN   (rows,) the number of each row
    key,  # IN   of all random numbers
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n) softmax((x + noise) / T)
):
    n = x.shape[1]
    for i in range(start, stop):
        at = row_at(y, i)
        for j in range(0, n, 2):
            pair = uniforms(key, row[i], j // 2, NOISE)
            for k in range(min(2, n - j)):
                y[i, j + k] = x[i, j + k] - math.log(-math.log(pair[k]))
        m, bottom = row_range(y, at, None, 0, n)
        shift = row_shift(y, m, high, low, bottom)
        ahead = prefetch_distance(y, 1, stop - i - 1)
        s = row_exponentials(y, at, None, 0, n, y, at, shift, high, low, ahead)
        row_scaled(y, at, n, two_parts((1.0 / (s[0] + s[1]), 0.0), y), y, at)


@kernel
def relaxed(x, row, key, high, low, y):
    relaxed_rows(x, row, key, high, low, 0, x.shape[0], y)


@parallel_kernel
def relaxed_parallel(x, row, key, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        relaxed_rows(x, row, key, high, low, b * rows // blocks, (b + 1) * rows // blocks, y)
