"""A row shared by threads: the passes of loops 1 to 3 segment by segment.

For few long rows. Segments are fixed by the row's length alone, and their sums are
combined in order, so that the bits are those of a row done by one thread.
"""

import numpy as np
from numba import prange

from .elementary import shift_of, two_sum
from .jit import inline, kernel, parallel_kernel
from .passes import (
    filled,
    row_maximum,
    segment_exponentials,
    segment_length,
    segment_others,
    without_c,
)
from .tiles import exponentials_in, mask_row_at, row_at
from .vector import stack_array, store


@inline
def segment_maximum(x, mask, unit, segments, maxima):
    i, k = unit // segments, unit % segments
    n = x.shape[1]
    start = k * segment_length(n)
    count = min(segment_length(n), n - start)
    maxima[i, k] = row_maximum(x, row_at(x, i) + start, mask, mask_row_at(mask, i) + start, count)


@kernel
def maxima(x, mask, out):
    """Loop 1: the maximum of every segment of every row, out (rows, segments)."""
    for unit in range(out.size):
        segment_maximum(x, mask, unit, out.shape[1], out)


@parallel_kernel
def maxima_parallel(x, mask, out):
    for unit in prange(out.size):
        segment_maximum(x, mask, unit, out.shape[1], out)


@inline
def shift_of_row(x, m, high, low):
    """The shift of a row whose maximum is m."""
    parts = stack_array(x, 80)
    s = shift_of(filled(x, m), high, low)
    for k in range(5):
        store(parts, 16 * k, s[k])
    return parts[0], parts[16], parts[32], parts[48], parts[64]
