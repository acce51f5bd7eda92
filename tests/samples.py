"""Rows of logits by family: each is a way in which softmax implementations are known to fail."""

import itertools
import os
from fractions import Fraction

import numpy as np
import pytest
from oracle import BFLOAT16, DTYPES, FORMATS

from numbasoft.cuda import geometry

FORWARD = ("softmax", "log_softmax", "logsumexp")
BACKWARD = ("softmax_backward", "log_softmax_backward", "logsumexp_backward")


def some(times, axes):
    """Parametrize by a few combinations of the values of each axis; by all where NUMBASOFT_ALL_KERNELS is 1.

    ``axes`` has lists of values by name, or of pairs by two names. Every value of a list occurs, those of the
    longest as often as ``times`` says.
    """
    lists = [list(values) for values in axes.values()]
    if os.environ.get("NUMBASOFT_ALL_KERNELS") == "1":
        found = itertools.product(*lists)
    else:
        steps = itertools.product(range(times), range(max(map(len, lists))))
        found = dict.fromkeys(
            tuple(v[(k + turn * i) % len(v)] for i, v in enumerate(lists)) for turn, k in steps
        )
    names = ",".join(axes)
    flat = [[x for part in each for x in (part if isinstance(part, tuple) else (part,))] for each in found]
    return pytest.mark.parametrize(names, flat)


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


def repeated(rng, rows, n, dtype):
    """A number below the maximum that most elements are: the errors of their exponentials do not average out."""
    x = np.where(rng.random((rows, n)) < 0.15, rng.uniform(-0.5 * depth(dtype), -1, (rows, n)), 0.0)
    x[np.arange(rows), rng.integers(n, size=rows)] = rng.uniform(0, 3, rows)
    return x + rng.choice([0.0, 1.0], (rows, 1)) * rng.uniform(-100, 100, (rows, 1))


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
        random, wide, offset, confident, tied, repeated, equal, tiny, huge, underflow, ramp, floor, magnitudes,
    )
}  # fmt: skip


def sample(family, rng, rows, n, dtype):
    """Rows of a family in a dtype (by name or as dtype)."""
    dtype = DTYPES.get(dtype, dtype)
    values = FAMILIES[family](rng, rows, n, dtype)
    if dtype == BFLOAT16:
        values = np.clip(values, -largest_finite(dtype), largest_finite(dtype))
    return np.ascontiguousarray(values).astype(dtype)


# --- arguments of backward passes where a factor or a sum leaves the range of the type -----------------------


def ends_of_log_softmax_backward(rng, dtype):
    """Sums of gradients that overflow, probabilities below the smallest float, subnormals to enlarge."""
    finfo = np.finfo(dtype)
    deep = -float(np.log(float(finfo.tiny)))
    for exponent in (
        0,
        finfo.maxexp // 2,
        finfo.maxexp - 30,
        finfo.maxexp - 1,
        finfo.minexp // 2,
        finfo.minexp - 5,
    ):
        for spread in (1.0, 0.3 * deep, 1.9 * deep):
            log_y = (-spread * rng.random((8, 6))).astype(dtype)
            log_y[0, 3] = -np.inf
            g = np.ldexp(rng.uniform(-1, 1, (8, 6)), int(exponent)).astype(dtype)
            g[4:] *= rng.permuted(np.eye(6), axis=0)[:4].astype(dtype)  # one gradient, the others 0
            g[2] = abs(g[2])
            yield g, log_y


def subnormal_probabilities(dtype):
    """Arguments of softmax_backward, of which 1 / T alone would round y."""
    limits = np.finfo(dtype)
    y = np.array([[1, 1, 3, 1001]] * 4, dtype)
    y[:, 1:] *= limits.smallest_subnormal
    g = np.array([1, 1e3, 1e15, 0.99 * limits.max], dtype)[:, None] * np.array([0, 1, -0.7, 0.3], dtype)
    return g, y


def overflowing_gradients(n, dtype):
    """A row of gradients and log_y; sums of three and more of the gradients overflow on the way."""
    most = 1.7e308 if dtype == DTYPES["float64"] else 3e38
    g = np.full((1, n), most, dtype)
    g[0, ::2] = -most
    g[0, :3] = most
    return g, np.full((1, n), -np.log(4.0), dtype)


def ends_of_logsumexp_backward(dtype, size, temperature):
    """Probabilities and products below the smallest float that 1 / T enlarges, and lse = 0 beside a large T."""
    x = (-temperature * depth(dtype) * np.array([[0, 0.9, 0.97, 1.02, 1.2]])).astype(dtype)
    for lse in (0.0, 300.0, 3999.0):
        given = (x + np.asarray(lse * temperature, dtype)).astype(dtype)
        yield np.array([[size]], dtype), given, np.array([[lse]], dtype)


def huge_logits(rng, dtype, temperature):
    """Gradients, logits and lse for logsumexp_backward: x / T - lse is small though neither is.

    No rounded 1 / T gives that difference.
    """
    # beyond these the oracle, too, needs a T of few bits
    few_bits, most = np.finfo(dtype).maxexp - 25, 45 if dtype == DTYPES["float64"] else 25
    top = few_bits if temperature >= 3 else most
    lse = np.ldexp(rng.integers(1, 9, 300).astype(float), rng.integers(12, top, 300)).astype(dtype)
    lse[200:] = rng.uniform(2**13, 2**16, 100)
    with np.errstate(over="ignore"):
        x = (lse.astype(np.longdouble) * temperature).astype(dtype)
    lse, x = lse[np.isfinite(x)], x[np.isfinite(x)]
    exact = [
        Fraction(float(a)) / Fraction(temperature) - Fraction(float(b)) for a, b in zip(x, lse, strict=True)
    ]
    close = np.array([abs(v) < 30 for v in exact])
    return rng.standard_normal((close.sum(), 1)).astype(dtype), x[close, None], lse[close, None]


def around_limits(storage, room, in_pairs=False, masked=False):
    """The widest rows of every way to hold them in registers or in shared memory, and the next wider ones."""
    found = set()
    for aligned in False, True:
        step = geometry.lanes(storage) if aligned else 1

        def way(n, aligned=aligned):
            how = geometry.rows_launch(n, storage, aligned, in_pairs or masked)
            if how:
                return 0
            how = geometry.resident_launch(n, storage, aligned, room, in_pairs)
            return how and how.threads

        n, end = 1, 1 << 21
        while n < end and way(n * step) is not None:
            low, high = n, end  # n is held as low is, and high is not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if way(middle * step) == way(n * step) else (low, middle)
            found |= {low * step, high * step}
            n = high
    return sorted(found)


def rows_of_every_kind(dtype, n, rng):
    """Rows of n logits, some of them special; as many as two full groups and a part of one."""
    rows = [rng.normal(0, scale, (12, n)) for scale in (1e-6, 1, 30)]
    rows.append(rng.normal(100, 3, (6, n)))
    special = rng.normal(0, 1, (11, n))
    special[rng.random((11, n)) < 0.3] = -np.inf
    special[3, 0], special[5, -1], special[7] = np.inf, np.nan, -np.inf
    confident = rng.normal(0, 1, (4, n))
    confident[:, 0] += 40
    x = np.concatenate([*rows, special, confident]).astype(dtype)
    return x[rng.permutation(len(x))]


def one_by_one(function, *arrays, **more):
    return np.concatenate([function(*(a[i : i + 1] for a in arrays), **more) for i in range(len(arrays[0]))])


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    same = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    assert np.all(same | (np.isnan(a) & np.isnan(b)))
