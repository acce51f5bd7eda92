"""The six functions in far higher precision than any result, independent of numbasoft's kernels.

float16, bfloat16 and float32 are evaluated in NumPy's longdouble where that has 64 bits or more, everything
else in Python's decimal arithmetic, whose exp and ln are correctly rounded, with 28 digits. The formulas
are written once: an object array of Decimals knows the same operators as an array of longdoubles.
tests/test_cli.py compares both with mpmath.
"""

from __future__ import annotations

import decimal
import functools

import numpy as np

LONGDOUBLE_IS_WIDE = np.finfo(np.longdouble).nmant >= 63
CONTEXT = decimal.Context(prec=28, Emin=-999_999, Emax=999_999, traps=[decimal.InvalidOperation])


def in_high_precision(function):
    """Run with Decimal's precision set and without NumPy's warnings about longdouble's own overflow."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with decimal.localcontext(CONTEXT), np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return wrapper


def in_decimals(dtype: np.dtype) -> bool:
    return dtype.itemsize > 4 or not LONGDOUBLE_IS_WIDE


def wide(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array, exactly, in the arithmetic that results of `dtype` are judged by."""
    if not in_decimals(dtype):
        return array.astype(np.longdouble)
    exact = np.empty(array.shape, object)
    exact[...] = np.reshape([decimal.Decimal(v) for v in array.astype("f8").ravel().tolist()], array.shape)
    return exact


def _like(number, array):
    """A Python number, exactly, in the array's arithmetic."""
    return decimal.Decimal(number) if array.dtype == object else np.longdouble(number)


def _log1p(r):
    if r.dtype != object:
        return np.log1p(r)
    # Of 60 digits, 1 + r leaves 45 where r is 1e-15; below, two terms of the series are right to 30.
    more = decimal.Context(prec=60)
    logs = [v - v * v / 2 if v < decimal.Decimal("1e-15") else more.ln(more.add(1, v)) for v in r.flat]
    return np.reshape(np.array(logs, object), r.shape)


class Forward:
    """Softmax, log-softmax and log-sum-exp of the rows of a 2-D array that `wide` made."""

    @in_high_precision
    def __init__(self, x: np.ndarray, temperature: float):
        t = _like(temperature, x)
        self.maximum = x.max(axis=1, keepdims=True) / t
        top = x.argmax(axis=1)
        self.shifted = (x - x.max(axis=1, keepdims=True)) / t
        self.exponentials = np.exp(self.shifted)
        others = self.exponentials.copy()
        others[np.arange(len(x)), top] = _like(0, x)
        # The maximum's own 1 is kept apart, so that the logarithm is right when it is nearly 0.
        self.others = others.sum(axis=1, keepdims=True)
        self.log_sum = _log1p(self.others)

    @in_high_precision
    def softmax(self):
        y = self.exponentials / (_like(1, self.others) + self.others)
        return y, y

    @in_high_precision
    def log_softmax(self):
        y = self.shifted - self.log_sum
        return y, y

    @in_high_precision
    def logsumexp(self):
        """Judged by the largest of the result, the maximum and the logarithm of the sum."""
        y = self.maximum + self.log_sum
        return y[:, 0], np.maximum(np.abs(y), np.maximum(np.abs(self.maximum), np.abs(self.log_sum)))[:, 0]


# A backward pass is judged by the largest of its result and the terms of its sum, each times the factor
# that stands before the sum; the sum over the row is one of the terms.


@in_high_precision
def softmax_backward(g, y, temperature):
    terms = g * y
    total = terms.sum(axis=1, keepdims=True)
    factor = y / _like(temperature, y)
    dx = factor * (g - total)
    largest = np.maximum(np.abs(terms).max(axis=1, keepdims=True), np.abs(total))
    return dx, np.maximum(np.abs(dx), factor * np.maximum(np.abs(g), largest))


@in_high_precision
def log_softmax_backward(g, log_y, temperature):
    t = _like(temperature, g)
    total = g.sum(axis=1, keepdims=True)
    p = np.exp(log_y)
    dx = (g - p * total) / t
    largest = np.maximum(np.abs(g).max(axis=1, keepdims=True), np.abs(total))
    return dx, np.maximum(np.abs(dx), np.maximum(np.abs(g), p * largest) / t)


@in_high_precision
def logsumexp_backward(g, x, lse, temperature):
    t = _like(temperature, x)
    dx = g[:, None] * np.exp(_minus_product(x, lse[:, None], t) / t) / t
    return dx, np.abs(dx)


def _minus_product(x, a, t):
    """x - a t with one rounding: of huge logits and their log-sum-exp nothing but the last digits may be left."""
    if x.dtype != object:
        return x - a * t
    return np.frompyfunc(lambda x, a: (-t).fma(a, x), 2, 1)(x, a)


@in_high_precision
def error_in_ulp(got: np.ndarray, exact: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> float:
    """The largest error, in units of the last place of `scale` rounded to `dtype`; infinite for a NaN."""
    if got.size == 0:
        return 0.0
    got64, rounded = got.astype("f8"), exact.astype("f8").astype(dtype).astype("f8")
    finite = np.isfinite(got64) & np.isfinite(rounded)
    if not np.array_equal(
        got64[~finite], rounded[~finite]
    ):  # an infinity is right where the exact result rounds to it
        return float("inf")
    unit = wide(_unit(scale[finite].astype("f8"), dtype), dtype)
    return float((np.abs(wide(got[finite], dtype) - exact[finite]) / unit).max(initial=0))


def _unit(scale, dtype):
    """The spacing of `dtype` at `scale` rounded to it; in the subnormal range the subnormal spacing."""
    digits, lowest = format_of(dtype)
    mantissa, exponent = np.frexp(scale)
    exponent = exponent + (np.rint(mantissa * 2.0**digits) == 2.0**digits)
    exponent = np.where(scale == 0, lowest, np.maximum(exponent - 1, lowest))
    return np.ldexp(1.0, exponent - digits + 1)


def format_of(dtype: np.dtype) -> tuple[int, int]:
    """Bits of the significand, the leading 1 among them, and the exponent of the smallest normal number."""
    if dtype.name == "bfloat16":
        return 8, -126
    info = np.finfo(dtype)
    return info.nmant + 1, int(info.minexp)
