"""Binary cross-entropy on the CPU, forward and backward, a vector of elements at a time."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...elementary import largest
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...logistic import log_of_one_and, no_shift, small_exponential
from ...summation import dot_push, dot_start, sum_end
from ...vector import filled, fma, lanes, load_part, maximum, row_at, select, splat, store_part


@inline
def forward_rows(
    x,  # IN   (rows, n)
    t,  # IN   (rows, n) the probability of the positive class
    weight,  # IN   of the positive class
    high,  # IN   log2(e) in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    sums,  # OUT  (rows,) the sum of the losses of a row
    loss,  # OUT  (rows, n) or None
):
    n = x.shape[1]
    shift = no_shift(x, high, low)
    one = filled(x, 1.0)
    for i in range(start, stop):
        at, t_at, y_at = row_at(x, i), row_at(t, i), row_at(loss, i)
        total = dot_start(one)
        j = 0
        while j < n:
            v, q = load_part(x, at + j, n - j, -np.inf), load_part(t, t_at + j, n - j, 0.0)
            log = log_of_one_and(small_exponential(v, shift, high, low), x)
            # log(1 + exp(v)) and log(1 + exp(-v)), without the difference of nearly equal numbers
            y = times(one - q, log + maximum(v, 0.0)) + times(q * weight, log + maximum(0.0 - v, 0.0))
            y = select(v == v, y, v)
            total = dot_push(total, y, one)
            store_part(loss, y_at + j, n - j, y)
            j += lanes(x)
        s = sum_end(total)
        sums[i] = s[0] if np.isinf(s[0]) else s[0] + s[1]


@inline
def times(a, b):
    """a * b, 0 where a is: also beside infinity."""
    return select(a == 0.0, 0.0, a * b)


@kernel
def forward(x, t, weight, high, low, sums, loss):
    forward_rows(x, t, weight, high, low, 0, x.shape[0], sums, loss)


@parallel_kernel
def forward_parallel(x, t, weight, high, low, sums, loss, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        forward_rows(x, t, weight, high, low, i, j, sums, loss)


@inline
def backward_rows(
    g,  # IN   (rows, n) the gradient with respect to each loss; or one number for all
    x,  # IN   (rows, n)
    t,  # IN   (rows, n) the probability of the positive class
    weight,  # IN   of the positive class
    high,  # IN   log2(e) in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) g * ((1 - t) * p - weight * t * (1 - p))
):
    n = x.shape[1]
    shift = no_shift(x, high, low)
    one = filled(x, 1.0)
    for i in range(start, stop):
        at, t_at, dx_at = row_at(x, i), row_at(t, i), row_at(dx, i)
        j = 0
        while j < n:
            v, q = load_part(x, at + j, n - j, 0.0), load_part(t, t_at + j, n - j, 0.0)
            e = small_exponential(v, shift, high, low)
            s = e + largest(x)
            near, far = splat(e, largest(x)) / s, e / s
            p, rest = select(v >= 0.0, near, far), select(v >= 0.0, far, near)
            d = fma(one - q, p, 0.0 - q * weight * rest)
            store_part(dx, dx_at + j, n - j, d * given(g, i, j, n - j))
            j += lanes(x)


def given(g, i, j, count):
    """The gradient with respect to a vector of losses."""


@overload(given, **INLINE)
def given_by_type(g, i, j, count):
    if isinstance(g, types.Array):
        return lambda g, i, j, count: load_part(g, row_at(g, i) + j, count, 0.0)
    return lambda g, i, j, count: g


@kernel
def backward(g, x, t, weight, high, low, dx):
    backward_rows(g, x, t, weight, high, low, 0, x.shape[0], dx)


@parallel_kernel
def backward_parallel(g, x, t, weight, high, low, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        backward_rows(g, x, t, weight, high, low, b * rows // blocks, (b + 1) * rows // blocks, dx)
