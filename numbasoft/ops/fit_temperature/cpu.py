"""The slope and curvature of the cross-entropy in 1 / T on the CPU: loops 1 to 3 of the softmax with moments."""

import numpy as np
from numba import prange

from ...elementary import coefficients, exponential, largest, least
from ...jit import inline, kernel, parallel_kernel
from ...passes import row_range
from ...split import row_shift
from ...summation import dot_push, dot_start, exact_push, sum_end
from ...vector import filled, lanes, load_part, row_at, select, sum_across

IGNORED = -1


@inline
def moment_rows(
    x,  # IN   (rows, n) float64
    target,  # IN   (rows,) each row's class, IGNORED where it does not count
    unit,  # IN   what x is multiplied with in both results: a power of two
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    slope,  # OUT  (rows,) the mean of x under the softmax of x / T, less x at the target
    curvature,  # OUT  (rows,) the variance of x under it
):
    n = x.shape[1]
    w = lanes(x)
    zero = filled(x, 0.0)
    c = coefficients(zero)
    scale = 1.0 / largest(x)
    for i in range(start, stop):
        if target[i] == IGNORED:
            slope[i], curvature[i] = 0.0, 0.0
            continue
        at = row_at(x, i)
        own = sum_across(load_part(x, at + target[i], 1, 0.0))
        m, _ = row_range(x, at, None, 0, n)
        shift = row_shift(x, m, high, low)
        # moments of x - m, to which the maximum adds nothing: a confident row loses nothing
        total, first, second = dot_start(zero), dot_start(zero), dot_start(zero)
        j = 0
        while j < n:
            v = load_part(x, at + j, n - j, -np.inf)
            e = exponential(v, shift, high, low, c)
            e = select((v == -np.inf) | (e < least(x)), 0.0, e * scale)
            d = select(e == 0.0, 0.0, (v - m) * unit)
            total = exact_push(total, e)
            first = dot_push(first, e, d)
            second = dot_push(second, e * d, d)
            j += w
        s, one, two = sum_end(total), sum_end(first), sum_end(second)
        s0 = s[0] + s[1]
        mean = (one[0] + one[1]) / s0
        slope[i] = mean + (m - own) * unit
        curvature[i] = max(0.0, (two[0] + two[1]) / s0 - mean * mean)


@kernel
def moments(x, target, unit, high, low, slope, curvature):
    moment_rows(x, target, unit, high, low, 0, x.shape[0], slope, curvature)


@parallel_kernel
def moments_parallel(x, target, unit, high, low, slope, curvature, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        moment_rows(
            x, target, unit, high, low, b * rows // blocks, (b + 1) * rows // blocks, slope, curvature
        )
