"""One row shared by threads, segment by segment, for few long rows.

Segments are fixed by the row's length alone and their sums are combined in order, as in a
row done by one thread: the bits are the same. Every kernel does one step of the softmax
for all segments of all rows, numbered row by row; work on a row waits for the step before.
"""

import numpy as np
from numba import prange

from .elementary import shift_of
from .jit import inline, kernel, parallel_kernel
from .passes import (
    row_maximum,
    segment_exponentials,
    segment_length,
    segment_others,
    without_c,
)
from .summation import sum_joined
from .tiles import ROWS, first_lanes, log_of_others, logarithms_of_sums
from .vector import filled, row_at, stack_array


@inline
def segment_count(n):
    """How many segments a row of n elements has."""
    return (n + segment_length(n) - 1) // segment_length(n)


@inline
def place(unit, n):
    """The row that a segment belongs to, its first element there and its length."""
    segments = segment_count(n)
    first = unit % segments * segment_length(n)
    return unit // segments, first, min(segment_length(n), n - first)


@inline
def row_shift(x, m, high, low):
    """The shift of a row whose maximum is m."""
    return first_lanes(shift_of(filled(x, m), high, low), stack_array(x, 80))


@inline
def row_total(x, sums, first, n):
    """The sums of a row's segments combined in order, as ``passes.row_exponentials`` does."""
    total = 0.0
    lost = 0.0
    for unit in range(first, first + segment_count(n)):
        total, lost = sum_joined(x, total, lost, (sums[unit, 0], sums[unit, 1]))
    return total, lost


@inline
def maximum_of(x, mask, unit, maxima):
    n = x.shape[1]
    i, first, count = place(unit, n)
    maxima[unit] = row_maximum(x, row_at(x, i) + first, mask, row_at(mask, i) + first, count)


@kernel
def maxima(x, mask, maxima):
    """Loop 1, segment by segment."""
    for unit in range(maxima.size):
        maximum_of(x, mask, unit, maxima)


@parallel_kernel
def maxima_parallel(x, mask, maxima, blocks):
    for unit in prange(maxima.size):
        maximum_of(x, mask, unit, maxima)


@inline
def exponentials_of(x, mask, m, high, low, unit, e, sums):
    n = x.shape[1]
    i, first, count = place(unit, n)
    shift = row_shift(x, m[i], high, low)
    at, mask_at, e_at = row_at(x, i) + first, row_at(mask, i) + first, row_at(e, i) + first
    if shift[0] == 0.0:
        near = without_c(shift)
        s = segment_exponentials(x, at, mask, mask_at, count, e, e_at, near, high, low, 1024)
    else:
        s = segment_exponentials(x, at, mask, mask_at, count, e, e_at, shift, high, low, 1024)
    sums[unit, 0] = s[0]
    sums[unit, 1] = s[1]


@kernel
def exponentials(x, mask, m, high, low, e, sums):
    """Loops 2 and 3 of softmax, segment by segment; e may be None."""
    for unit in range(sums.shape[0]):
        exponentials_of(x, mask, m, high, low, unit, e, sums)


@parallel_kernel
def exponentials_parallel(x, mask, m, high, low, e, sums, blocks):
    for unit in prange(sums.shape[0]):
        exponentials_of(x, mask, m, high, low, unit, e, sums)


@inline
def others_of(x, mask, m, high, low, logarithms, unit, sums):
    n = x.shape[1]
    i, first, count = place(unit, n)
    if not logarithms[i] < 0.0:
        return
    shift = row_shift(x, m[i], high, low)
    at, mask_at = row_at(x, i) + first, row_at(mask, i) + first
    sums[unit, 0], sums[unit, 1] = segment_others(x, at, mask, mask_at, count, m[i], shift, high, low)


@kernel
def others(x, mask, m, high, low, logarithms, sums):
    """Loops 2 and 3 of log_softmax without the maxima, for rows whose logarithm is -1."""
    for unit in range(sums.shape[0]):
        others_of(x, mask, m, high, low, logarithms, unit, sums)


@parallel_kernel
def others_parallel(x, mask, m, high, low, logarithms, sums, blocks):
    for unit in prange(sums.shape[0]):
        others_of(x, mask, m, high, low, logarithms, unit, sums)


@kernel
def logarithms(x, m, sums, logarithms):
    """Loop 4 of log_softmax: log of the sum for every row, or -1 if that takes ``others`` first."""
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    maximum, log = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    for i in range(x.shape[0]):
        total[0], lost[0] = row_total(x, sums, i * segment_count(x.shape[1]), x.shape[1])
        maximum[0], log[0] = m[i], log_of_others(total[0], lost[0], x)
        if not logarithms[i] < 0.0:
            logarithms_of_sums(total, lost, maximum, 1, x, log)
        logarithms[i] = log[0]
