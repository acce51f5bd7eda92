"""The Kullback-Leibler divergence of two softmaxes on the CPU: a row of each at a time."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...confident import log_of_total
from ...elementary import coefficients, exponential, largest
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...passes import row_exponentials, row_maximum
from ...split import row_shift
from ...summation import dot_push, dot_start, sum_end, two_parts
from ...tiles import prefetch_distance
from ...vector import filled, fma, lanes, load_part, row_at, select, store_part, widened


@inline
def row_log(x, at, n, high, low):
    """The maximum of a row, its shift, its sum and the logarithm of that."""
    m = row_maximum(x, at, None, 0, n)
    shift = row_shift(x, m, high, low)
    s = row_exponentials(x, at, None, 0, n, None, 0, shift, high, low, prefetch_distance(n))
    is_top = 2.0 * largest(x) > s[0]
    return m, shift, s[0] + s[1], log_of_total(x, at, n, m, is_top, shift, high, low, s[0], s[1])


@inline
def forward_rows(
    x,  # IN   (rows, n)
    y,  # IN   (rows, n)
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    divergence,  # OUT  (rows,) sum p (log p - log q) for p = softmax(x / T), q = softmax(y / T)
):
    n = x.shape[1]
    w = lanes(x)
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    c = coefficients(filled(x, 0.0))
    for i in range(start, stop):
        at, y_at = row_at(x, i), row_at(y, i)
        m, shift, s, log_x = row_log(x, at, n, high, low)
        top, _, _, log_y = row_log(y, y_at, n, high, low)
        # log p - log q = ((x - m) - (y - top)) / T - (log_x - log_y)
        between = log_x - log_y
        total = dot_start(filled(x, 0.0))
        j = 0
        while j < n:
            v, u = load_part(x, at + j, n - j, -np.inf), load_part(y, y_at + j, n - j, 0.0)
            e = exponential(v, shift, high, low, c)
            e = select(v == -np.inf, 0.0, e)
            total = ratio_push(total, e, v, m, u, top, inverse, between)
            j += w
        both = sum_end(total)
        value = (both[0] if np.isinf(both[0]) else both[0] + both[1]) / s
        divergence[i] = 0.0 if value < 0.0 else value


def ratio_push(total, e, v, m, u, top, inverse, between):
    """Add e (log p - log q) to a sum; nothing where e is 0."""


@overload(ratio_push, **INLINE)
def ratio_push_by_type(total, e, v, m, u, top, inverse, between):
    return ratio_push_64 if e.element == types.float64 else ratio_push_32


def ratio_push_32(total, e, v, m, u, top, inverse, between):
    difference = (widened(v) - np.float64(m)) - (widened(u) - np.float64(top))
    term = widened(e) * fma(difference, inverse, 0.0 - between)
    return total[0] + select(widened(e) == 0.0, 0.0, term), total[1]


def ratio_push_64(total, e, v, m, u, top, inverse, between):
    difference = (v - m) - (u - top)
    ratio = fma(difference, inverse, 0.0 - between)
    return dot_push(total, e, select(e == 0.0, 0.0, ratio))


@kernel
def forward(x, y, high, low, ih, il, divergence):
    forward_rows(x, y, high, low, ih, il, 0, x.shape[0], divergence)


@parallel_kernel
def forward_parallel(x, y, high, low, ih, il, divergence, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        forward_rows(x, y, high, low, ih, il, b * rows // blocks, (b + 1) * rows // blocks, divergence)


@inline
def row_sum(x, at, n, high, low):
    """The shift of a row and the sum of its exponentials."""
    shift = row_shift(x, row_maximum(x, at, None, 0, n), high, low)
    s = row_exponentials(x, at, None, 0, n, None, 0, shift, high, low, prefetch_distance(n))
    return shift, s[0] + s[1]


@inline
def backward_rows(
    g,  # IN   (rows,) the gradient with respect to each divergence, over T
    x,  # IN   (rows, n)
    y,  # IN   (rows, n)
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dy,  # OUT  (rows, n) g (q - p) for p = softmax(x / T), q = softmax(y / T)
):
    n = x.shape[1]
    c = coefficients(filled(x, 0.0))
    for i in range(start, stop):
        at, y_at, dy_at = row_at(x, i), row_at(y, i), row_at(dy, i)
        shift, s = row_sum(x, at, n, high, low)
        other_shift, other_s = row_sum(y, y_at, n, high, low)
        a, b = two_parts((g[i] / s, 0.0), x), two_parts((g[i] / other_s, 0.0), x)
        j = 0
        while j < n:
            e = exponential(load_part(x, at + j, n - j, -np.inf), shift, high, low, c)
            f = exponential(load_part(y, y_at + j, n - j, -np.inf), other_shift, high, low, c)
            p = fma(e, a[0], e * a[1])
            store_part(dy, dy_at + j, n - j, fma(f, b[0], f * b[1]) - p)
            j += lanes(x)


@kernel
def backward(g, x, y, high, low, dy):
    backward_rows(g, x, y, high, low, 0, x.shape[0], dy)


@parallel_kernel
def backward_parallel(g, x, y, high, low, dy, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        backward_rows(g, x, y, high, low, b * rows // blocks, (b + 1) * rows // blocks, dy)
