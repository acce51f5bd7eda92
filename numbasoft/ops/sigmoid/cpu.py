"""sigmoid and logit on the CPU: one element after the other, a vector at a time."""

import math

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...elementary import largest, logarithm
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...logistic import no_shift, small_exponential
from ...vector import fma, lanes, load, load_part, narrowed, row_at, select, splat, store, store_part, widened


@inline
def forward_rows(
    x,  # IN   (rows, n)
    high,  # IN   log2(e) in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n)
):
    n = x.shape[1]
    shift = no_shift(x, high, low)
    for i in range(start, stop):
        at, y_at = row_at(x, i), row_at(y, i)
        j = 0
        while j + lanes(x) <= n:
            store(y, y_at + j, logistic(load(x, at + j), x, shift, high, low))
            j += lanes(x)
        if j < n:
            v = logistic(load_part(x, at + j, n - j, 0.0), x, shift, high, low)
            store_part(y, y_at + j, n - j, v)


@inline
def logistic(v, like, shift, high, low):
    """1 / (1 + exp(-v)) as 1 / (1 + e) or e / (1 + e) with e = exp(-abs(v))."""
    e = small_exponential(v, shift, high, low)
    return select(v >= 0.0, splat(e, largest(like)), e) / (e + largest(like))


@kernel
def forward(x, high, low, y):
    forward_rows(x, high, low, 0, x.shape[0], y)


@parallel_kernel
def forward_parallel(x, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        forward_rows(x, high, low, b * rows // blocks, (b + 1) * rows // blocks, y)


@inline
def backward_rows(
    g,  # IN   (rows, n) the gradient with respect to y
    y,  # IN   (rows, n) what forward gave
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) g * y * (1 - y)
):
    n = y.shape[1]
    for i in range(start, stop):
        g_at, at, dx_at = row_at(g, i), row_at(y, i), row_at(dx, i)
        j = 0
        while j + lanes(y) <= n:
            store(dx, dx_at + j, gradient(load(g, g_at + j), load(y, at + j)))
            j += lanes(y)
        if j < n:
            a, v = load_part(g, g_at + j, n - j, 0.0), load_part(y, at + j, n - j, 0.0)
            store_part(dx, dx_at + j, n - j, gradient(a, v))


@inline
def gradient(g, y):
    return g * (y * fma(y, -1.0, splat(y, 1.0)))


@kernel
def backward(g, y, dx):
    backward_rows(g, y, 0, y.shape[0], dx)


@parallel_kernel
def backward_parallel(g, y, dx, blocks):
    rows = y.shape[0]
    for b in prange(blocks):
        backward_rows(g, y, b * rows // blocks, (b + 1) * rows // blocks, dx)


@inline
def logit_rows(
    p,  # IN   (rows, n) float32 or float64
    start,  # IN   the rows to do: start <= i < stop
    stop,
    x,  # OUT  (rows, n) log(p / (1 - p))
):
    for i in range(start, stop):
        row_logits(p, i, x)


def row_logits(p, i, x):
    """log(p / (1 - p)) for every element of row i."""


@overload(row_logits, **INLINE)
def row_logits_by_type(p, i, x):
    return row_logits_64 if p.dtype == types.float64 else row_logits_32


def row_logits_32(p, i, x):
    n, at, x_at = p.shape[1], row_at(p, i), row_at(x, i)
    j = 0
    while j + lanes(p) <= n:
        store(x, x_at + j, logit_32(load(p, at + j)))
        j += lanes(p)
    if j < n:
        store_part(x, x_at + j, n - j, logit_32(load_part(p, at + j, n - j, 0.5)))


@inline
def logit_32(p):
    # in float64, where 1 - p loses nothing that float32 would show
    v = widened(p)
    log = logarithm(v / (1.0 - v))
    log = select(v == 0.0, -np.inf, select(v == 1.0, np.inf, log))
    return narrowed(select(v * (1.0 - v) >= 0.0, log, np.nan))


def row_logits_64(p, i, x):
    for j in range(p.shape[1]):
        v = p[i, j]
        if 0.25 < v < 0.75:
            log = 2.0 * math.atanh(2.0 * v - 1.0)  # the difference is exact
        elif 0.0 <= v <= 1.0:
            log = np.log(v) - np.log1p(-v)
        else:
            log = np.nan
        x[i, j] = log


@kernel
def logit(p, x):
    logit_rows(p, 0, p.shape[0], x)


@parallel_kernel
def logit_parallel(p, x, blocks):
    rows = p.shape[0]
    for b in prange(blocks):
        logit_rows(p, b * rows // blocks, (b + 1) * rows // blocks, x)
