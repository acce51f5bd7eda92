"""The Kullback-Leibler divergence of two softmaxes on the CPU: a row of each at a time."""

import math

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...confident import log_of_total
from ...elementary import coefficients, exponential, largest, least, two_sum
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...passes import row_exponentials, row_range
from ...split import row_shift
from ...summation import dot_start, exact_push, sum_end, two_parts
from ...tiles import prefetch_distance
from ...vector import (
    filled,
    fma,
    lanes,
    load_part,
    maximum,
    row_at,
    select,
    splat,
    store_part,
    widened,
)


@inline
def row_log(x, at, n, more, high, low):
    """The maximum of a row that ``more`` rows follow, its shift, its sum and the logarithm of that."""
    m, shift, s = row_sum(x, at, n, more, high, low)
    is_top = 2.0 * largest(x) > s[0]
    return m, shift, s[0] + s[1], log_of_total(x, at, n, m, is_top, shift, high, low, s[0], s[1])


@inline
def row_sum(x, at, n, more, high, low):
    """The maximum of a row that ``more`` rows follow, its shift, for -inf too, and the sum of its exponentials."""
    m, bottom = row_range(x, at, None, 0, n)
    ahead = prefetch_distance(x, 1, more)
    bounded = row_shift(x, m, high, low, bottom)
    s = row_exponentials(x, at, None, 0, n, None, 0, bounded, high, low, ahead)
    return m, row_shift(x, m, high, low), s


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
    inverse = (inverse_high, inverse_low)
    c = coefficients(filled(x, 0.0))
    for i in range(start, stop):
        at, y_at = row_at(x, i), row_at(y, i)
        m, shift, s, log_x = row_log(x, at, n, stop - i - 1, high, low)
        top, other_shift, other_s, log_y = row_log(y, y_at, n, stop - i - 1, high, low)
        between, part = log_y - log_x, s / other_s
        total, surplus = dot_start(filled(x, 0.0)), dot_start(filled(x, 0.0))
        j = 0
        while j < n:
            v, u = load_part(x, at + j, n - j, -np.inf), load_part(y, y_at + j, n - j, -np.inf)
            e = exponential(v, shift, high, low, c)
            f = exponential(u, other_shift, high, low, c)
            # what counts as 0 may be multiplied by a huge z
            e, f = select(e < least(e), 0.0, e), select(u == -np.inf, 0.0, f)
            z = log_ratio(v, m, u, top, inverse, between)
            total, surplus = term_push(total, surplus, e, f, part, z)
            j += lanes(x)
        both, error = sum_end(total), sum_end(surplus)
        value = (both[0] if np.isinf(both[0]) else both[0] + both[1]) / s
        # The sum of q - p is 0, or by how much log_y - log_x is wrong: exp(d) - 1 - d of that is too much.
        d = (error[0] + error[1]) / s
        value = value - d * d * 0.5 if abs(d) < 2.0**-10 else value
        divergence[i] = 0.0 if value < 0.0 else value


# As p and q both sum to 1 the divergence is the sum of q - p - p log(q / p), of which no term is negative:
# p (log p - log q) are of both signs, and where p and q are nearly equal little is left of them.


def log_ratio(v, m, u, top, inverse, between):
    """z = log(q / p) = ((y - top) - (x - m)) / T - (log_y - log_x), in float64."""


@overload(log_ratio, **INLINE)
def log_ratio_by_type(v, m, u, top, inverse, between):
    return log_ratio_64 if v.element == types.float64 else log_ratio_32


def log_ratio_32(v, m, u, top, inverse, between):
    d = (widened(u) - np.float64(top)) - (widened(v) - np.float64(m))
    return d * (np.float64(inverse[0]) + np.float64(inverse[1])) - between


def log_ratio_64(v, m, u, top, inverse, between):
    # x and y may be large and nearly equal: no difference is rounded
    a, a_lost = two_sum(u, splat(u, -top))
    b, b_lost = two_sum(v, splat(v, -m))
    d, d_lost = two_sum(a, 0.0 - b)
    h = d * inverse[0]
    lost = fma(d, inverse[0], 0.0 - h) + fma(d, inverse[1], (d_lost + (a_lost - b_lost)) * inverse[0])
    z, z_lost = two_sum(h, splat(h, -between))
    lost = z_lost + lost
    return select(lost == lost, z + lost, z)


def term_push(total, surplus, e, f, part, z):
    """Add f * part - e - e z, which is e (exp(z) - 1 - z), to one sum and f * part - e to another."""


@overload(term_push, **INLINE)
def term_push_by_type(total, surplus, e, f, part, z):
    return term_push_64 if e.element == types.float64 else term_push_32


def term_push_32(total, surplus, e, f, part, z):
    term, difference = terms(widened(e), widened(f) * part, z, EXP_SERIES_32)
    return (total[0] + term, total[1]), (surplus[0] + difference, surplus[1])


def term_push_64(total, surplus, e, f, part, z):
    term, difference = terms(e, f * part, z, EXP_SERIES_64)
    return exact_push(total, term), exact_push(surplus, difference)


# (exp(z) - 1 - z) / z**2 for abs(z) < 2, to 2**-33 and 2**-57: 1/2 + z/6 + z**2/24 + ...
EXP_SERIES_32, EXP_SERIES_64 = (tuple(1 / math.factorial(k) for k in range(n, 1, -1)) for n in (17, 26))


def terms(p, q, z, series):
    """q - p - p z, and q - p."""


@overload(terms, **INLINE)
def terms_by_type(p, q, z, series):
    def body(p, q, z, series):
        s = z * series[0] + series[1]
        for c in series[2:]:
            s = fma(s, z, splat(z, c))
        s = s * (z * z)
        is_near = maximum(z, 0.0 - z) < 2.0
        difference = select(is_near, p * (z + s), q - p)
        term = select(is_near, p * s, fma(0.0 - p, z, q - p))
        return select(p == 0.0, q, term), select(p == 0.0, q, difference)

    return body


@kernel
def forward(x, y, high, low, ih, il, divergence):
    forward_rows(x, y, high, low, ih, il, 0, x.shape[0], divergence)


@parallel_kernel
def forward_parallel(x, y, high, low, ih, il, divergence, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        forward_rows(x, y, high, low, ih, il, b * rows // blocks, (b + 1) * rows // blocks, divergence)


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
        _, shift, s = row_sum(x, at, n, stop - i - 1, high, low)
        _, other_shift, other_s = row_sum(y, y_at, n, stop - i - 1, high, low)
        a, b = (
            two_parts((g[i] / (s[0] + s[1]), 0.0), x),
            two_parts((g[i] / (other_s[0] + other_s[1]), 0.0), x),
        )
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
