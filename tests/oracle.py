"""The exact answers, computed without any code of numbasoft, and the measure of an error in ULP.

Two number systems stand behind one set of formulas:

- results in float16, bfloat16 and float32 are computed in NumPy's longdouble (at least 53 bits);
- results in float64 are computed in `Twofold`: the unevaluated sum of two float64 with an exponent of
  its own, about 104 bits, so that neither underflow nor overflow happens on the way.

"Exact" is the function of the inputs as they are stored. An ULP is the spacing of the output type at the
exact result rounded to that type; below the smallest normal number it is the subnormal spacing.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

try:
    import ml_dtypes
except ModuleNotFoundError:  # on a machine with a GPU: bfloat16 is PyTorch's there
    BFLOAT16 = np.dtype("V2")
else:
    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


class Format(NamedTuple):
    """A binary floating-point format: significant bits, smallest normal and largest exponent."""

    bits: int
    emin: int
    emax: int


FORMATS = {
    DTYPES["float16"]: Format(11, -14, 15),
    BFLOAT16: Format(8, -126, 127),
    DTYPES["float32"]: Format(24, -126, 127),
    DTYPES["float64"]: Format(53, -1022, 1023),
}
SIXTEEN_BIT = (DTYPES["float16"], BFLOAT16)


def result_dtype(dtype):
    """The dtype that results have for inputs of this one."""
    dtype = np.dtype(dtype)
    native = dtype if dtype == BFLOAT16 else dtype.newbyteorder("=")
    return native if native in FORMATS else DTYPES["float64"]


# ---------------------------------------------------------------------------------------------------------
# Twofold arithmetic: Dekker's and Knuth's error-free transformations, no FMA needed.


def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _quick_two_sum(a, b):
    s = a + b
    return s, b - (s - a)


def _split(a):
    t = 134217729.0 * a
    high = t - (t - a)
    return high, a - high


def _two_prod(a, b):
    p = a * b
    ah, al = _split(a)
    bh, bl = _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _pair_add(ah, al, bh, bl):
    s, e = _two_sum(ah, bh)
    t, f = _two_sum(al, bl)
    s, e = _quick_two_sum(s, e + t)
    return _quick_two_sum(s, e + f)


def _pair_mul(ah, al, bh, bl):
    p, e = _two_prod(ah, bh)
    return _quick_two_sum(p, e + (ah * bl + al * bh))


NO_EXPONENT = -(
    1 << 40
)  # the exponent of zero: below every other, so that sums are scaled by their other term


class Twofold:
    """Arrays of numbers (hi + lo) * 2**exp with 0.5 <= abs(hi) < 1, or zero."""

    def __init__(self, hi, lo=0.0, exp=0):
        hi, lo = _quick_two_sum(np.asarray(hi, np.float64), np.asarray(lo, np.float64))
        self.hi, shift = np.frexp(hi)
        self.lo = np.ldexp(lo, -shift)
        self.exp = np.where(hi == 0, NO_EXPONENT, shift.astype(np.int64) + exp)

    def map(self, function):
        """The same function of positions (reshape, index, broadcast) for all parts."""
        new = object.__new__(Twofold)
        new.hi, new.lo, new.exp = function(self.hi), function(self.lo), function(self.exp)
        return new

    def __add__(self, other):
        exp = np.maximum(self.exp, other.exp)
        a, b = (np.maximum(v.exp - exp, -400).astype(np.int32) for v in (self, other))
        hi, lo = _pair_add(
            np.ldexp(self.hi, a), np.ldexp(self.lo, a), np.ldexp(other.hi, b), np.ldexp(other.lo, b)
        )
        return Twofold(hi, lo, exp)

    def __neg__(self):
        return Twofold(-self.hi, -self.lo, self.exp)

    def __sub__(self, other):
        return self + -other

    def __mul__(self, other):
        hi, lo = _pair_mul(self.hi, self.lo, other.hi, other.lo)
        return Twofold(hi, lo, self.exp + other.exp)

    def __truediv__(self, other):
        q = self.hi / other.hi
        p, e = _two_prod(q, other.hi)
        rest = ((self.hi - p) - e + self.lo) - q * other.lo
        return Twofold(q, rest / other.hi, self.exp - other.exp)


def _twofold_of(fraction):
    """A rational number as the pair (hi, lo)."""
    hi = float(fraction)
    return hi, float(fraction - Fraction(hi))


# log(2) by its series sum of 1 / (k 2^k), cut into two pieces of 32 bits, whose product with an integer below
# 2^21 is exact, and a pair for the rest.
_LN2 = sum(Fraction(1, k << k) for k in range(1, 260))
_LN2_A = Fraction(math.floor(_LN2 * 2**32), 2**32)
_LN2_B = Fraction(math.floor((_LN2 - _LN2_A) * 2**64), 2**64)
_LN2_C = _twofold_of(_LN2 - _LN2_A - _LN2_B)
_INVERSE_FACTORIALS = [_twofold_of(Fraction(1, math.factorial(k))) for k in range(13)]


def _pair_exp(hi, lo):
    """exp(hi + lo) as (hi, lo, n) with the value (hi + lo) * 2**n, for abs(hi) below 2^20."""
    n = np.rint(hi * 1.4426950408889634)
    hi, lo = _pair_add(hi, lo, -n * float(_LN2_A), 0.0)
    hi, lo = _pair_add(hi, lo, -n * float(_LN2_B), 0.0)
    hi, lo = _pair_add(hi, lo, *_pair_mul(-n, 0.0, *_LN2_C))
    hi, lo = hi / 256, lo / 256
    # expm1 of the 256th part by Taylor's series (abs <= 0.00136, so 11 terms reach 2^-120),
    # then squared 8 times
    ph, pl = _INVERSE_FACTORIALS[11]
    for k in range(10, 0, -1):
        ph, pl = _pair_mul(ph, pl, hi, lo)
        ph, pl = _pair_add(ph, pl, *_INVERSE_FACTORIALS[k])
    ph, pl = _pair_mul(ph, pl, hi, lo)
    for _ in range(8):
        ph, pl = _pair_add(2 * ph, 2 * pl, *_pair_mul(ph, pl, ph, pl))
    return (*_pair_add(1.0, 0.0, ph, pl), n)


# ---------------------------------------------------------------------------------------------------------
# What the formulas need besides + - * /, for both number systems.


def number(values, wide):
    """Floats as numbers of the system: Twofold if `wide`, else longdouble."""
    values = np.asarray(values)
    if wide:
        return Twofold(values.astype(np.float64))
    if values.dtype == BFLOAT16:
        values = values.astype(np.float32)
    return values.astype(np.longdouble)


def mapped(v, function):
    return v.map(function) if isinstance(v, Twofold) else function(v)


def select(mask, v):
    """v where the mask is True, 0 elsewhere."""
    if isinstance(v, Twofold):
        return Twofold(np.where(mask, v.hi, 0.0), np.where(mask, v.lo, 0.0), np.where(mask, v.exp, 0))
    return np.where(mask, v, np.longdouble(0))


def scaled(v, power):
    """v * 2**power."""
    if isinstance(v, Twofold):
        return Twofold(v.hi, v.lo, v.exp + power)
    return np.ldexp(v, power)


def is_zero(v):
    return v.hi == 0 if isinstance(v, Twofold) else v == 0


def exp(v):
    if not isinstance(v, Twofold):
        return np.exp(v)
    shape = v.hi.shape
    hi, lo, exponent = v.hi.ravel(), v.lo.ravel(), v.exp.ravel()
    small = np.clip(exponent, -1000, 20).astype(np.int32)
    out = [np.empty(hi.size), np.empty(hi.size), np.empty(hi.size)]
    for i in range(0, hi.size, 8192):  # pieces that stay in cache
        part = slice(i, i + 8192)
        parts = _pair_exp(np.ldexp(hi[part], small[part]), np.ldexp(lo[part], small[part]))
        for target, source in zip(out, parts, strict=True):
            target[part] = source
    result = Twofold(out[0], out[1], out[2].astype(np.int64))
    return select((exponent <= 20) | (hi > 0), result).map(lambda a: a.reshape(shape))


def log1p(r):
    """log(1 + r) for r >= 0, with full relative precision also for small r."""
    if not isinstance(r, Twofold):
        return np.log1p(r)
    one, two = Twofold(1.0), Twofold(2.0)
    s = r / (two + r)
    square, term, small = s * s, s, s
    for k in range(3, 17, 2):
        term = term * square
        small = small + term / Twofold(float(k))
    small = small * two
    start = np.log1p(np.ldexp(r.hi, np.clip(r.exp, -1000, 1000).astype(np.int32)))
    correction = (one + r) * exp(Twofold(-start)) - one
    newton = Twofold(start) + (correction - correction * correction / two)
    return select(r.exp < -8, small) + select(r.exp >= -8, newton)


def total(v):
    """The sum over the last axis, kept with length 1."""
    if not isinstance(v, Twofold):
        return v.sum(axis=-1, keepdims=True)
    n = v.hi.shape[-1]
    if n == 0:
        return Twofold(np.zeros((*v.hi.shape[:-1], 1)))
    while n > 1:
        half, odd = divmod(n, 2)
        folded = v.map(lambda a: a[..., : a.shape[-1] // 2]) + v.map(
            lambda a: a[..., a.shape[-1] // 2 : a.shape[-1] // 2 * 2]
        )
        if odd:
            head = folded.map(lambda a: a[..., :1]) + v.map(lambda a: a[..., -1:])
            parts = [(getattr(head, p), getattr(folded, p)[..., 1:]) for p in ("hi", "lo", "exp")]
            folded = Twofold(*(np.concatenate(p, -1) for p in parts))
        v, n = folded, half
    return v


def largest(v):
    """The number of largest magnitude over the last axis, kept with length 1."""
    key = v.exp + np.log2(np.abs(v.hi) + 1e-300) if isinstance(v, Twofold) else np.abs(v)
    index = key.argmax(axis=-1, keepdims=True)
    return mapped(v, lambda a: np.take_along_axis(a, index, -1))


def unit_exponent(v, fmt):
    """The exponent u of one ULP, 2**u, at v rounded to the format."""
    if isinstance(v, Twofold):
        hi, exponent = v.hi, v.exp
    else:
        hi, exponent = np.frexp(v)
        exponent = np.where(hi == 0, NO_EXPONENT, exponent.astype(np.int64))
    rounds_up = np.rint(np.ldexp(np.abs(hi), fmt.bits)) == 2.0**fmt.bits
    return np.maximum(exponent + rounds_up, fmt.emin + 1) - fmt.bits


def in_units(v, u):
    """abs(v) / 2**u as float64."""
    if isinstance(v, Twofold):
        return np.ldexp(np.abs(v.hi), np.clip(v.exp - u, -1000, 1100).astype(np.int32))
    return np.ldexp(np.abs(v), np.clip(-u, -2000, 2000).astype(np.int32)).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------
# Expected results.


class Expected:
    """What a call has to return, and the unit in which its error is measured, element by element."""

    def __init__(self, value, fmt, fixed, is_fixed, scales=(), rounded_once=False):
        self.value, self.fmt, self.fixed, self.is_fixed = value, fmt, fixed, is_fixed
        self.unit = unit_exponent(value, fmt)
        self.free = None
        if rounded_once:
            # 16-bit gradients: half an ULP for the one rounding, the rest in float32's ULP of the scale
            self.free, fmt = self.unit, FORMATS[DTYPES["float32"]]
            self.unit = unit_exponent(value, fmt)
        for scale in scales:
            self.unit = np.maximum(self.unit, unit_exponent(scale, fmt))

    @property
    def shape(self):
        return self.is_fixed.shape

    def map(self, function):
        new = object.__new__(Expected)
        new.fmt = self.fmt
        new.value = mapped(self.value, function)
        new.fixed, new.is_fixed = function(self.fixed), function(self.is_fixed)
        new.unit = function(self.unit)
        new.free = None if self.free is None else function(self.free)
        return new

    def floats(self):
        """The expected values rounded to float64, for messages and coarse comparisons."""
        v = self.value
        with np.errstate(all="ignore"):
            if isinstance(v, Twofold):
                plain = np.ldexp(v.hi, np.clip(v.exp, -1200, 1100).astype(np.int32))
            else:
                plain = v.astype(np.float64)
        return np.where(self.is_fixed, self.fixed, plain)

    def errors(self, got):
        """The error of every element in ULP; inf where a special value is wrong."""
        got = np.asarray(got)
        assert got.shape == self.shape, f"shape {got.shape}, expected {self.shape}"
        wide = isinstance(self.value, Twofold)
        as_float = got.astype(np.float64)
        infinite = np.isinf(as_float)
        with np.errstate(all="ignore"):
            # an infinity stands for the first power of two that is too large
            got_number = number(np.where(infinite, np.copysign(0.5, as_float), as_float), wide)
            power = select(infinite, scaled(got_number, self.fmt.emax + 2))
            difference = (select(~infinite, got_number) + power) - self.value
            error = in_units(difference, self.unit)
            if self.free is not None:
                half = np.ldexp(0.5, np.clip(self.free - self.unit, -1000, 1000).astype(np.int32))
                error = np.maximum(error - half, 0.0)
        overflows = unit_exponent(self.value, self.fmt) > self.fmt.emax + 1 - self.fmt.bits
        infinity = np.copysign(np.inf, self.value.hi if wide else self.value).astype(np.float64)
        error = np.where(np.isnan(as_float), np.inf, error)
        error = np.where(overflows & (as_float == infinity), 0.0, error)
        same = (as_float == self.fixed) | (np.isnan(as_float) & np.isnan(self.fixed))
        return np.where(self.is_fixed, np.where(same, 0.0, np.inf), error)


def check(got, expected, limit, what=""):
    """Assert that every element of `got` is within `limit` ULP; name the worst element if not."""
    error = expected.errors(got)
    if error.size == 0:
        return
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= limit, (
        f"{what} element {tuple(map(int, worst))}: got {np.asarray(got)[worst]!r}, "
        f"exact {expected.floats()[worst]!r}, {error[worst]:.6g} ULP off, allowed {limit}; "
        f"{int((error > limit).sum())} of {error.size} elements are past the limit"
    )


def rows_of(array, axis):
    """The array as rows along the reduced axes, and a function that puts rows (or one value a row) back."""
    array = np.asarray(array)
    axes = tuple(range(array.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(a % array.ndim for a in axes) if array.ndim else ()
    rest = tuple(i for i in range(array.ndim) if i not in axes)
    order = rest + tuple(sorted(axes))
    moved = array.transpose(order)
    outer, inner = moved.shape[: len(rest)], moved.shape[len(rest) :]
    rows = np.ascontiguousarray(moved).reshape(math.prod(outer), math.prod(inner))

    def full(values):
        return values.reshape(outer + inner).transpose(np.argsort(order)) if order else values.reshape(())

    def reduced(values, keepdims=False):
        kept = tuple(1 if i in axes else n for i, n in enumerate(array.shape))
        return values.reshape(kept if keepdims else outer)

    return rows, full, reduced


def _native(x):
    x = np.asarray(x)
    dtype = result_dtype(x.dtype)
    return x.astype(dtype), dtype


class _Forward(NamedTuple):
    shifted: object  # (x - max) / T
    terms: object  # exp of that, 0 where masked or -inf
    others: object  # the sum of the terms but for one maximum
    peak: object  # max / T
    wide: bool
    keep: np.ndarray
    no_number: np.ndarray  # one value a row, as are the following
    infinite: np.ndarray
    masked: np.ndarray
    vanished: np.ndarray


def _forward(rows, dtype, temperature, kept, counts=None):
    wide = dtype == DTYPES["float64"]
    with np.errstate(all="ignore"):
        values = rows.astype(np.float64)
        no_number = (np.isnan(values) & kept).any(1, keepdims=True)
        infinite = ((values == np.inf) & kept).any(1, keepdims=True)
        masked = ~kept.any(1, keepdims=True)
        keep = kept & np.isfinite(values)
        vanished = ~masked & ~(kept & (values != -np.inf)).any(1, keepdims=True)
        peak = np.where(keep, values, -np.inf).max(1, keepdims=True, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        values = np.where(keep, values, peak)
        t = number(float(temperature), wide)
        shifted = (number(values, wide) - number(peak, wide)) / t
        terms = select(keep, exp(shifted))
        if counts is not None:
            weighted = terms * number(counts, wide)
        else:
            weighted = terms
        top = keep & is_zero(shifted)
        tops = (top * (1 if counts is None else counts)).sum(1, keepdims=True)
        others = total(select(~top, weighted)) + number(np.maximum(tops - 1, 0), wide)
        return _Forward(
            shifted, terms, others, number(peak, wide) / t, wide, keep, no_number, infinite, masked, vanished
        )


def _kept(x, where, axis):
    mask = np.broadcast_to(np.asarray(True if where is None else where), np.shape(x))
    return rows_of(mask, axis)[0]


def softmax(x, axis=-1, *, temperature=1.0, where=None, counts=None):
    """Expected softmax. `counts` (one row only) says how often each element stands in the real row."""
    x, dtype = _native(x)
    rows, full, _ = rows_of(x, axis)
    f = _forward(rows, dtype, temperature, _kept(x, where, axis), counts)
    with np.errstate(all="ignore"):
        value = f.terms / (number(1.0, f.wide) + f.others)
    fixed = np.zeros(rows.shape)
    fixed[...] = np.where(f.masked, 0.0, np.where(f.no_number | f.infinite | f.vanished, np.nan, 0.0))
    is_fixed = ~f.keep | f.masked | f.no_number | f.infinite | f.vanished
    return Expected(value, FORMATS[dtype], fixed, is_fixed).map(full)


def log_softmax(x, axis=-1, *, temperature=1.0, where=None, counts=None):
    """Expected log_softmax."""
    x, dtype = _native(x)
    rows, full, _ = rows_of(x, axis)
    f = _forward(rows, dtype, temperature, _kept(x, where, axis), counts)
    with np.errstate(all="ignore"):
        value = f.shifted - log1p(f.others)
    fixed = np.zeros(rows.shape)
    fixed[...] = np.where(f.masked, -np.inf, np.where(f.no_number | f.infinite | f.vanished, np.nan, -np.inf))
    is_fixed = ~f.keep | f.masked | f.no_number | f.infinite | f.vanished
    return Expected(value, FORMATS[dtype], fixed, is_fixed).map(full)


def logsumexp(x, axis=-1, *, temperature=1.0, where=None, keepdims=False, counts=None):
    """Expected log sum exp(x / T); the unit is that of max(abs(result), abs(max), abs(log sum))."""
    x, dtype = _native(x)
    rows, _, reduced = rows_of(x, axis)
    f = _forward(rows, dtype, temperature, _kept(x, where, axis), counts)
    with np.errstate(all="ignore"):
        log_sum = log1p(f.others)
        value = f.peak + log_sum
    fixed = np.where(f.no_number, np.nan, np.where(f.infinite, np.inf, -np.inf))
    is_fixed = f.no_number | f.infinite | f.masked | f.vanished
    expected = Expected(value, FORMATS[dtype], fixed, is_fixed, scales=(f.peak, log_sum))
    return expected.map(lambda a: reduced(a, keepdims))


def _gradient(value, scales, dtype, zero, no_number, full):
    fixed = np.where(zero, 0.0, np.nan)
    is_fixed = zero | no_number
    return Expected(value, FORMATS[dtype], fixed, is_fixed, scales, rounded_once=dtype in SIXTEEN_BIT).map(
        full
    )


def softmax_backward(grad, y, axis=-1, *, temperature=1.0):
    """Expected y_j (g_j - sum g_k y_k) / T.

    The terms of the sum for j are g_j and the g_k y_k, and their factor is y_j / T.
    """
    y, dtype = _native(y)
    wide = dtype == DTYPES["float64"]
    rows, full, _ = rows_of(y, axis)
    zero = rows == 0
    with np.errstate(all="ignore"):
        g = np.where(zero, 0, rows_of(_native(grad)[0], axis)[0]).astype(np.float64)
        no_number = ~(np.isfinite(g) & np.isfinite(rows.astype(np.float64))).all(1, keepdims=True)
        if rows.shape[1] == 0:
            return _gradient(number(rows, wide), (), dtype, zero, no_number, full)
        g, p = number(np.where(no_number, 0.0, g), wide), number(np.where(no_number, 0, rows), wide)
        factor = p / number(float(temperature), wide)
        terms = g * p
        value = factor * (g - total(terms))
        scales = (factor * g, factor * largest(terms))
    return _gradient(value, scales, dtype, zero, no_number, full)


def log_softmax_backward(grad, log_y, axis=-1, *, temperature=1.0):
    """Expected (g_j - exp(log_y_j) sum g_k) / T.

    The terms of the sum for j are g_j and the exp(log_y_j) g_k, and their factor is 1 / T.
    """
    log_y, dtype = _native(log_y)
    wide = dtype == DTYPES["float64"]
    rows, full, _ = rows_of(log_y, axis)
    zero = rows == -np.inf
    with np.errstate(all="ignore"):
        g = np.where(zero, 0, rows_of(_native(grad)[0], axis)[0]).astype(np.float64)
        no_number = ~(np.isfinite(g) & ~np.isnan(rows.astype(np.float64))).all(1, keepdims=True)
        if rows.shape[1] == 0:
            return _gradient(number(rows, wide), (), dtype, zero, no_number, full)
        t = number(float(temperature), wide)
        g = number(np.where(no_number, 0.0, g), wide)
        p = exp(number(np.where(zero | no_number, 0, rows), wide))
        value = (g - p * total(g)) / t
        scales = (g / t, p * largest(g) / t)
    return _gradient(value, scales, dtype, zero, no_number, full)


def logsumexp_backward(grad, x, lse, axis=-1, *, temperature=1.0):
    """Expected g exp(x / T - lse) / T, measured in ULP of the result: it has no sum."""
    x, dtype = _native(x)
    wide = dtype == DTYPES["float64"]
    rows, full, _ = rows_of(x, axis)
    with np.errstate(all="ignore"):
        values = rows.astype(np.float64)
        g = _native(grad)[0].astype(np.float64).reshape(-1, 1)
        sums = _native(lse)[0].astype(np.float64).reshape(-1, 1)
        zero = values == -np.inf
        no_number = np.broadcast_to(~np.isfinite(g) | ~np.isfinite(sums), rows.shape) | ~np.isfinite(values)
        t = number(float(temperature), wide)
        gs = number(np.where(np.isfinite(g), g, 0.0), wide)
        shifted = number(np.where(no_number, 0.0, values), wide) / t - number(
            np.where(np.isfinite(sums), sums, 0.0), wide
        )
        value = gs * exp(shifted) / t
    return _gradient(value, (), dtype, zero, no_number, full)


FUNCTIONS = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "softmax_backward": softmax_backward,
    "log_softmax_backward": log_softmax_backward,
    "logsumexp_backward": logsumexp_backward,
}


def limit(name, dtype):
    """The contract: the largest error allowed to a function, in its unit."""
    if name.endswith("backward"):
        return 4.0
    return 0.51 if np.dtype(dtype) in SIXTEEN_BIT else 2.0
