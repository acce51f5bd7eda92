"""Rows of logits by family: each is a way in which softmax implementations are known to fail."""

import numpy as np
from oracle import BFLOAT16, DTYPES, FORMATS

FORWARD = ("softmax", "log_softmax", "logsumexp")
BACKWARD = ("softmax_backward", "log_softmax_backward", "logsumexp_backward")


def depth(dtype):
    """How far below the maximum a logit has to be for its probability to round to 0."""
    fmt = FORMATS[dtype]
    return (fmt.bits - fmt.emin) * np.log(2)


def largest_finite(dtype):
    fmt = FORMATS[dtype]
    return (2.0 - 2.0 ** (1 - fmt.bits)) * 2.0**fmt.emax


def random(rng, rows, n, dtype):
    return rng.normal(0, 3, (rows, n))


def wide(rng, rows, n, dtype):
    return rng.normal(0, 30, (rows, n))


def offset(rng, rows, n, dtype):
    return np.where(rng.random((rows, 1)) < 0.5, -1e4, 1e4) + rng.normal(0, 5, (rows, n))


def confident(rng, rows, n, dtype):
    gap = rng.uniform(5, 0.9 * depth(dtype), (rows, 1))
    x = -gap - rng.random((rows, n))
    peak = np.where(rng.random(rows) < 0.5, 0.0, rng.normal(0, 1, rows))
    x[np.arange(rows), rng.integers(n, size=rows)] = 0
    return x + peak[:, None]


def tied(rng, rows, n, dtype):
    x = rng.normal(0, 3, (rows, n))
    top = np.rint(x.max(1, keepdims=True)) + 1
    return np.where(rng.random((rows, n)) < rng.random((rows, 1)), top, x)


def equal(rng, rows, n, dtype):
    return np.broadcast_to(rng.normal(0, 3, (rows, 1)), (rows, n))


def tiny(rng, rows, n, dtype):
    return rng.normal(0, 100, (rows, n)) * 2.0 ** FORMATS[dtype].emin


def huge(rng, rows, n, dtype):
    x = rng.uniform(-1, 1, (rows, n)) * largest_finite(dtype)
    x[0, rng.integers(n)] = largest_finite(dtype)
    return x


def underflow(rng, rows, n, dtype):
    return -rng.uniform(0, 1.02 * depth(dtype), (rows, n))


def ramp(rng, rows, n, dtype):
    """As underflow, with the maximum far from 0: x - max is not exact, and x may be less than half of it."""
    x = -rng.uniform(0, 1.02 * depth(dtype), (rows, n))
    x += rng.uniform(-2.5, 2.5, (rows, 1)) * depth(dtype)
    return x * rng.uniform(0.999, 1, (rows, n))  # sums lie on the grid of the largest: fill the lower bits


def floor(rng, rows, n, dtype):
    """One maximum and the rest so low that a plain sum in the same type loses all of it."""
    x = np.full((rows, n), -0.7 * FORMATS[dtype].bits)
    x[:, 0] = 0
    return x


def magnitudes(rng, rows, n, dtype):
    return rng.choice([-1.0, 1.0], (rows, n)) * 2.0 ** rng.uniform(-20, 8, (rows, n))


FAMILIES = {
    f.__name__: f
    for f in (
        random, wide, offset, confident, tied, equal, tiny, huge, underflow, ramp, floor, magnitudes,
    )
}  # fmt: skip


def sample(family, rng, rows, n, dtype):
    """Rows of a family in a dtype (by name or as dtype)."""
    dtype = DTYPES.get(dtype, dtype)
    values = FAMILIES[family](rng, rows, n, dtype)
    if dtype == BFLOAT16:
        values = np.clip(values, -largest_finite(dtype), largest_finite(dtype))
    return np.ascontiguousarray(values).astype(dtype)
