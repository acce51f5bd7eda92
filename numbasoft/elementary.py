"""exp for a softmax: 2**(d * log2(e) / T), scaled by a power of two that cancels later.

The shift by the maximum m happens inside the reduction: x / T * log2(e) and the same of m
are reduced separately, each in two parts, so that no rounded x - m (worth |x - m| / 2 ULP
of the result) ever exists. The maximum itself becomes 2**0 exactly, and its exponential,
the largest term of every sum, has no error. A common power of two is left in all
exponentials of a row; it cancels.

Constants wear the argument's type: each function has a float32 and a float64 body.

Sources: W. J. Cody and W. Waite, "Software Manual for the Elementary Functions", 1980
(reduction); P. T. P. Tang, "Table-driven implementation of the exponential function",
ACM TOMS 15 (1989) 144-157; S. Gal, "Computing elementary functions: a new approach for
achieving high accuracy and good performance", 1986 (a table whose entries are nearly exact).
"""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import overload

from .jit import INLINE, inline
from .vector import (
    exponent_and_mantissa,
    fma,
    low_bits_as_exponent,
    lowered,
    maximum,
    narrowed,
    operand,
    scaled_entry,
    select,
    splat,
    widened,
)

LOG2_E = Fraction("1.4426950408889634073599246810018921374266459541529859341354494069")

LOG2_E_32, LOG2_E_64 = float(np.float32(1.4426950408889634)), 1.4426950408889634
LOG2_E_REST_32 = float(LOG2_E - Fraction(LOG2_E_32))
LOG2_E_REST_64 = float(LOG2_E - Fraction(LOG2_E_64))

# Where |m| * log2(e) / T is larger than this the row's maximum is subtracted first. That is
# exact: x - m is exact for x in [m / 2, m], and below m / 2, more than 2**11 powers of two
# away, everything underflows to zero, in float64 too.
FAR = 4096.0

# The largest exponential of a row is 2**OFFSET (times CENTRE). One that must become a
# subnormal probability is then still a normal number when it is divided by the sum, and
# numbers below ``least`` are lost in any sum of up to 2**31 of them.
OFFSET_32, OFFSET_64 = 59.875, 200.0

# float32: 2**(j / 8) * CENTRE as bits, less j << 20 (see vector.scaled_entry). CENTRE cancels
# as the power of two does; with it all eight entries lie within 0.04 ULP of a float32.
CENTRE = 1.0877149105072021
TABLE = tuple(int(np.float32(CENTRE * 2.0 ** (j / 8)).view(np.int32)) - (j << 20) for j in range(8))

# Of exponentials so many powers of two above ``lowest`` no probability is left: 185 - 30 powers below the maximum's.
LOST_32 = 30.0

# Probabilities times two to this are normal numbers, all that are not 0.
RAISED = 90

MAX_32, MAX_64 = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)

# Adding and subtracting these rounds to 1/8 (float32) and to an integer (float64).
ROUND_32, ROUND_64 = 1.5 * 2.0**20, 1.5 * 2.0**52
BIAS_64 = 1023.0
# ... and this to 2**-20, so that a whole number and this much of a fraction fit in 53 bits.
FRACTION_64 = 1.5 * 2.0**32

# 2**r - 1 = r * (C1 + r * (C2 + ...)), relative error below 2**-28 for |r| <= 1/8 (float32)
# and below 2**-57 for |r| <= 1/2 (float64); tests/test_elementary.py measures both.
C1, C2, C3, C4 = 0.6931470632553101, 0.24022653698921204, 0.055531494319438934, 0.009618016891181469
D1, D2, D3 = 0.6931471805599453, 0.24022650695910133, 0.05550410866482223
D4, D5, D6 = 0.009618129107593338, 0.0013333558146391036, 0.00015403530458108313
D7, D8, D9 = 1.5252733795209373e-05, 1.3215434775077107e-06, 1.0178090931618263e-07
D10, D11 = 7.073872610148164e-09, 4.4493674908349806e-10

# artanh(s) = s + s**3 * (L1 + s**2 * (L2 + ...)) to 2**-44 for |s| <= 3 - 2 sqrt(2): the series.
L1, L2, L3, L4, L5, L6, L7 = (1 / k for k in (3, 5, 7, 9, 11, 13, 15))
LOG_2 = 0.6931471805599453


@lru_cache(maxsize=256)
def scale(temperature, wide):
    """log2(e) / T as the sum of two numbers of the computing type, never rounded to one."""
    return in_two(LOG2_E / Fraction(temperature), wide)


def power_scale(b):
    """As ``scale`` in float64, for b = 1 / T, which may also be 0 or infinity: there as large as can be."""
    if 0 < b < math.inf:
        return scale(1 / b, True)
    return (2.0**1023 if b else 0.0), 0.0


@lru_cache(maxsize=256)
def inverse(temperature, wide):
    """1 / T as the sum of two numbers of the computing type."""
    return in_two(1 / Fraction(temperature), wide)


def scale_and_inverse(temperature, wide):
    """log2(e) / T and 1 / T, in two parts each."""
    return *scale(temperature, wide), *inverse(temperature, wide)


def quotient(a, b, wide):
    """a / b as the sum of two numbers of the computing type, whose range it is in; or what is not finite."""
    if not math.isfinite(a / b):
        return a / b, 0.0
    return in_two(Fraction(a) / Fraction(b), wide)


def in_two(value, wide):
    rounded = float if wide else lambda v: float(np.float32(float(v)))
    high = rounded(value)
    return high, rounded(value - Fraction(high))


def in_three(value, wide):
    """A float as the sum of three numbers of the computing type, exactly."""
    high, low = in_two(Fraction(value), wide)
    return high, low, value - high - low


def coefficients(like):
    """What ``exponential`` takes for vectors like this one, made once before a loop."""


@overload(coefficients, **INLINE)
def coefficients_by_type(like):
    if like.element == types.float64:
        return coefficients_64
    return lambda like: (operand(like, C1), operand(like, C2), operand(like, C3), operand(like, C4))


def coefficients_64(like):
    return (
        operand(like, D1), operand(like, D2), operand(like, D3), operand(like, D4),
        operand(like, D5), operand(like, D6), operand(like, D7), operand(like, D8),
        operand(like, D9), operand(like, D10), operand(like, D11),
    )  # fmt: skip


def exponential(x, shift, high, low, c):
    """exp((x - m) / T) of a vector, times the power of two that its row's shift leaves in.

    ``shift`` is what ``shift_of`` gave for the row's maximum m, ``high`` and ``low`` are
    log2(e) / T. Error at most 0.6 ULP; NaN stays NaN; far below m it is 0, but for a shift that is
    ``bounded``: there nothing is so far below.
    """


@overload(exponential, **INLINE)
def exponential_by_type(x, shift, high, low, c):
    return exponential_64 if x.element == types.float64 else exponential_32


def exponential_32(x, shift, high, low, c):
    q, product, power = parts_32(x, shift, high, low, c)
    return fma(q, product, power)


def exponential_64(x, shift, high, low, c):
    r, power = reduced_64(x, shift, high, low)
    return of_reduced(r, power, c)


def exponential_in_parts(x, shift, high, low, c, rest):
    """As ``exponential``, and what adds up to it without the last rounding: a part, and one added to ``rest``.

    Where many elements are equal, what is lost in that rounding is, and their sum misses as much.
    """


@overload(exponential_in_parts, **INLINE)
def exponential_in_parts_by_type(x, shift, high, low, c, rest):
    return in_parts_64 if x.element == types.float64 else in_parts_32


def in_parts_32(x, shift, high, low, c, rest):
    q, product, power = parts_32(x, shift, high, low, c)
    return fma(q, product, power), power, fma(q, product, rest)


def in_parts_64(x, shift, high, low, c, rest):
    r, power = reduced_64(x, shift, high, low)
    return in_parts_of_reduced(r, power, c, rest)


@inline
def in_parts_of_reduced(r, power, c, rest):
    """The second half of ``exponential_in_parts`` in float64, for loops that do one half after the other."""
    first, others = powers_64(r, c)
    e = first + others
    return e * power, e * power, fma((first - e) + others, power, rest)


@inline
def of_reduced(r, power, c):
    """The second half of ``exponential`` in float64."""
    first, others = powers_64(r, c)
    return (first + others) * power


def not_below(lowest, d):
    """d, but nothing less than ``lowest``, unless that is None."""


@overload(not_below, **INLINE)
def not_below_by_type(lowest, d):
    if lowest == types.none:
        return lambda lowest, d: d
    return lambda lowest, d: maximum(lowest, d)


def zero_below(lowest, d, power):
    """0 where d is ``lowest`` or less, else the power.

    A power that small would do as well, but products with it are subnormal, and take the CPU several times as long.
    """


@overload(zero_below, **INLINE)
def zero_below_by_type(lowest, d, power):
    if lowest == types.none:
        return lambda lowest, d, power: power
    return lambda lowest, d, power: select(d <= lowest, 0.0, power)


@inline
def parts_32(x, shift, high, low, c):
    """Three numbers whose fma is the exponential; their product is at most a 22nd of it."""
    centre, magic, rest, lowest, _ = shift
    moved = x - centre
    d = not_below(lowest, moved)
    # the rest counts here too: r and with it the product would be twice as large, and so what their sum loses
    t = fma(d, high, rest) + magic
    r = fma(d, high, magic - t) + fma(d, low, rest)
    q = fma(r, c[3], c[2])
    q = fma(q, r, c[1])
    power = zero_below(lowest, moved, scaled_entry(t, TABLE))
    return fma(q, r, c[0]), power * r, power


@inline
def reduced_64(x, shift, high, low):
    """The first half of an exponential: r, and a power of two whose product with 2**r it is."""
    centre, magic, rest, lowest, fraction = shift
    moved = x - centre
    d = not_below(lowest, moved)
    t = fma(d, high, fraction) + magic
    r = fma(d, high, (magic - t) + fraction) + fma(d, low, rest)
    return r, zero_below(lowest, moved, low_bits_as_exponent(t))


@inline
def powers_64(r, c):
    """2**r as the sum of two numbers, the larger one first."""
    # even and odd powers apart: half as long a chain of operations that wait for each other
    s = r * r
    odd = fma(s, c[10], c[8])
    even = fma(s, c[9], c[7])
    odd = fma(odd, s, c[6])
    even = fma(even, s, c[5])
    odd = fma(odd, s, c[4])
    even = fma(even, s, c[3])
    odd = fma(odd, s, c[2])
    even = fma(even, s, c[1])
    # the first term apart: what its product and its sum with 1 lose is known
    first = fma(r, c[0], 1.0)
    return first, fma(fma(odd, r, even), s, fma(r, c[0], 1.0 - first))


@inline
def logarithm(v):
    """log of a float64 vector from 1 + 2**-12 to 2**64, relative error below 2**-40; NaN stays NaN.

    2 artanh((f - 1) / (f + 1)) + k log 2 for v = 2**k f: enough for results in float32.
    """
    k, f = exponent_and_mantissa(v)
    s = (f - 1.0) / (f + 1.0)
    t = s * s
    p = fma(t, L7, L6)
    p = fma(p, t, L5)
    p = fma(p, t, L4)
    p = fma(p, t, L3)
    p = fma(p, t, L2)
    p = fma(p, t, L1)
    log_f = fma(p * t, s, s) * 2.0
    return fma(k, LOG_2, log_f) + v * 0.0


def shift_of(m, high, low):
    """The shift of the rows whose maxima are the lanes of m: what ``exponential`` takes.

    c is m where m is far from zero and then x - c is exact, else 0. m / T * log2(e), less
    what c took, is split into a part that goes into ``magic`` (and ``fraction``) and moves
    the exponent, and a rest of at most 1/16 (float32) or 2**-21 (float64).
    """


@overload(shift_of, **INLINE)
def shift_of_by_type(m, high, low):
    return shift_of_64 if m.element == types.float64 else shift_of_32


def shift_of_32(m, high, low):
    c, near = near_part(m, high)
    return split_32(c, near, high, low, high)


def shift_of_64(m, high, low):
    c, near = near_part(m, high)
    return split_64(c, near, high, low, high)


@inline
def split_32(c, near, unit, rest_of_unit, high):
    """The shift by c and then by ``near``, whose unit in powers of two is unit + rest_of_unit."""
    k = (near * unit + ROUND_32) - ROUND_32
    rest = 0.0 - fma(near, rest_of_unit, fma(near, unit, 0.0 - k))
    return c, (ROUND_32 + OFFSET_32) - k, rest, (k - (OFFSET_32 + 125.0)) / high, 0.0 - k


@inline
def split_64(c, near, unit, rest_of_unit, high):
    k = (near * unit + FRACTION_64) - FRACTION_64
    rest = 0.0 - fma(near, rest_of_unit, fma(near, unit, 0.0 - k))
    magic = splat(near, ROUND_64 + BIAS_64 + OFFSET_64)
    return c, magic, rest, (k - (OFFSET_64 + 1021.0)) / high, 0.0 - k


@inline
def bounded(shift, bottom):
    """A shift of which ``lowest`` is -inf in rows where nothing is as low, as their least elements tell.

    Of -inf, which may fill up a row's last vector, ``exponential`` then makes NaN, to be left out of what is kept.
    """
    c, magic, rest, lowest, fraction = shift
    return c, magic, rest, select(bottom - c >= lowest, -np.inf, lowest), fraction


# How loop 4 divides by a sum whose reciprocal is known in two parts. Where float32 may have a probability as a subnormal
# number, the reciprocal is raised, so that nothing is subnormal on the way: that would lose digits, and it takes the
# CPU many times as long. Rows without probabilities as small as 2**-73 need that not: what a subnormal product with
# the second part loses there lies too far below the first product to change a rounding. All ways give the same results.
PLAIN, ANY, DEEP = 0.0, 1.0, 2.0


def raising(like):
    """What raises a reciprocal."""


@overload(raising, **INLINE)
def raising_by_type(like):
    number = 1.0 if like.dtype == types.float64 else 2.0**RAISED
    return lambda like: number


def is_wide_type(kind):
    return kind == types.float64 or getattr(kind, "element", None) == types.float64


def deep_factor(first, second):
    """From a raised reciprocal, for rows without NaN: fastest with subnormal results, which are not made by arithmetic."""


@overload(deep_factor, **INLINE)
def deep_factor_by_type(first, second):
    if is_wide_type(first):
        return lambda first, second: (first, second)
    return lambda first, second: (first, second, RAISED)


def any_factor(first, second):
    """From a raised reciprocal, for all rows: slower with subnormal results, faster without."""


@overload(any_factor, **INLINE)
def any_factor_by_type(first, second):
    if is_wide_type(first):
        return lambda first, second: (first, second)
    return lambda first, second: (first, second, None)


def divided(e, factor):
    """Exponentials times the reciprocal of their sum: in two parts, or one of these two factors."""


@overload(divided, **INLINE)
def divided_by_type(e, factor):
    if len(factor) == 2:
        return lambda e, factor: fma(e, factor[0], e * factor[1])
    if factor[2] == types.none:
        return lambda e, factor: fma(e, factor[0], e * factor[1]) * 2.0**-RAISED
    return lambda e, factor: lowered(fma(e, factor[0], e * factor[1]), RAISED)


def without_lost(shift, high):
    """A shift for probabilities alone: elements count as 0 from where these do, not only where no sum of them counts."""


@overload(without_lost, **INLINE)
def without_lost_by_type(shift, high):
    if shift[0].element == types.float64:
        return lambda shift, high: shift
    return higher_lowest


def higher_lowest(shift, high):
    c, magic, rest, lowest, fraction = shift
    return c, magic, rest, lowest + LOST_32 / high, fraction


def shift_of_lse(lse, temperature, high):
    """As ``shift_of``, for exp(x / T - lse): ``exponential`` then is that times ``largest``."""


@overload(shift_of_lse, **INLINE)
def shift_of_lse_by_type(lse, temperature, high):
    return shift_of_lse_64 if lse.element == types.float64 else shift_of_lse_32


def shift_of_lse_32(lse, temperature, high):
    wide = widened(lse)
    c = narrowed(far_part_of_lse(wide, temperature, MAX_32))
    near, _, infinite = near_part_of_lse(wide, temperature, widened(c), MAX_32)
    rounded = narrowed(near)
    shift = split_32(c * narrowed(infinite), rounded, LOG2_E_32, LOG2_E_REST_32, high)
    return moved(shift, narrowed(near - widened(rounded)), LOG2_E_32)


def shift_of_lse_64(lse, temperature, high):
    c = far_part_of_lse(lse, temperature, MAX_64)
    near, lost, infinite = near_part_of_lse(lse, temperature, c, MAX_64)
    return moved(split_64(c * infinite, near, LOG2_E_64, LOG2_E_REST_64, high), lost, LOG2_E_64)


@inline
def moved(shift, near, unit):
    """A shift, and besides by a little."""
    return shift[0], shift[1], fma(near, -unit, shift[2]), shift[3], shift[4]


@inline
def far_part_of_lse(lse, temperature, most):
    """c, about lse * T where lse is far from zero, else 0, of at most the largest number."""
    c = select(maximum(lse, 0.0 - lse) >= FAR, lse * temperature, 0.0)
    return select(c > most, most, select(c < -most, -most, c))


@inline
def near_part_of_lse(lse, temperature, c, most):
    """lse - c / T in two parts, for c in the computing type, and a factor for c.

    That is 1, or infinity where the difference is so large that c alone decides.
    """
    is_near = c == 0.0
    rest = select(is_near, 0.0, fma(lse, temperature, 0.0 - c))
    is_beyond = maximum(rest, 0.0 - rest) > most * 2.0**-20
    near = rest / temperature
    lost = fma(near, -temperature, rest) / temperature
    near, lost = select(is_near, lse, near), select(is_near, 0.0, lost)
    infinite = select(is_beyond, splat(lse, np.inf), 1.0)
    return select(is_beyond, 0.0, near), select(is_beyond, 0.0, lost), infinite


@inline
def near_part(m, high):
    """(c, m - c): c is m where m is far from zero, else 0."""
    t = m * high
    is_far = maximum(t, 0.0 - t) >= FAR
    return select(is_far, m, 0.0), select(is_far, 0.0, m)


@inline
def two_sum(a, b):
    """a + b as the rounded sum and what the rounding lost (Knuth)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


def largest(like):
    """The exponential of a row's maximum, whatever the row: 2**OFFSET, times CENTRE in float32."""


@overload(largest, **INLINE)
def largest_by_type(like):
    factor = (
        2.0**OFFSET_64 if like.dtype == types.float64 else float(np.float32(CENTRE * 2.0**0.875)) * 2.0**59
    )
    return lambda like: factor


def least(like):
    """The exponential below which it counts as 0: those of elements a little above ``lowest`` are smaller than this."""


@overload(least, **INLINE)
def least_by_type(like):
    element = like.dtype if isinstance(like, types.Array) else like.element
    number = 2.0**-1020 if element == types.float64 else 2.0**-123
    return lambda like: number
