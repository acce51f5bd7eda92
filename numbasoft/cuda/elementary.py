"""exp and log for device code, and sums that are exact.

As in ``numbasoft.elementary`` the shift by the maximum m happens inside the reduction:
x / T * log2(e) and the same of m are reduced separately, each in two parts, so that no
rounded x - m (worth |x - m| / 2 ULP of the result) ever exists. A common power of two,
``largest``, is left in all exponentials of a row; it cancels.

A sum is a sum of integers: every term is rounded to a multiple of a 2**44th (float64: a
2**93rd) of the largest possible one and added in 64 bits. Such a sum is off by less than
n / 2**45 of the largest term whatever the values (in float32 by n / 2**49 where a row is
longer than 2**16, see ``numbasoft.cuda.split``), and it has **no order**: its bits depend
neither on the threads that share a row, nor on its alignment or axis, nor on the GPU. A
logarithm near 0 needs the sum of the others without the maximum; it is taken relative to
the largest of the others.

Compilers fuse a product with what it is added to where they like, in every kernel otherwise.
So that a row has the same bits in all of them, sums here and in ops/*/cuda.py take a product as
``fma`` does, or as ``plus`` and ``minus`` do; but for products that are exact.

Every function is made for a kind of arithmetic: "f4" and "f8" follow the contract for
float32 and float64; "h4" is float32 for results that are rounded to 16 bits.

Sources: those of ``numbasoft.elementary``; for sums in fixed point, U. W. Kulisch,
W. L. Miranker, "Computer Arithmetic in Theory and Practice", 1981.
"""

from functools import lru_cache
from types import SimpleNamespace

from .. import elementary
from . import jit
from .backend import (
    absolute,
    as_integer,
    exp2_approximate,
    exponent,
    first_half_power,
    fma,
    integer_as,
    integer_sum,
    integer_sum_of_rests,
    maximum,
    minus,
    number,
    plus,
    power_of_two_above,
    second_half_power,
    select,
    times_power,
)

# Where |m| * log2(e) / T is larger than this the maximum is subtracted first, which is exact for
# all elements that matter (see numbasoft.elementary.FAR).
FAR = elementary.FAR

# 2**r - 1 = r * (C1 + r * (C2 + ...)) for |r| <= 0.5006, relative error below 2**-28 (float32).
C1, C2, C3 = 0.6931471824645996, 0.24022647738456726, 0.05550359562039375
C4, C5, C6 = 0.009618503972887993, 0.0013391003012657166, 0.0001532745809527114
D1, D2, D3, D4 = elementary.D1, elementary.D2, elementary.D3, elementary.D4
D5, D6, D7, D8 = elementary.D5, elementary.D6, elementary.D7, elementary.D8
D9, D10, D11 = elementary.D9, elementary.D10, elementary.D11

INFINITY, NAN = float("inf"), float("nan")

# Where x / T - lse is farther from the best c / T - lse than this, it decides: the result is 0 or infinite.
BEYOND = 4500.0

# Integers of 64 bits hold the sum of a part of a row; the sum of all parts needs more.
PART_BITS = 24
PART, PART_MASK = 2.0**PART_BITS, 2**PART_BITS - 1

# By kind: the power of two of the largest exponential, so that one which becomes a subnormal
# probability is a normal number and what stands for exp(-inf) is 0 in every quotient; what rounds
# to integers, and what rounds to a fraction that a whole number can stand beside; the exponent's
# bias; the largest term of a sum of integers; log(2) in two parts, the first with zeros at its
# end; how many terms of the logarithm's series; when and how products are scaled; and the
# smallest normal number, of which the smallest of all is ``epsilon``.
KINDS = {
    "f4": dict(
        offset=44.0, magic=1.5 * 2.0**23, fraction=1.5 * 2.0**13, bias=127.0, unit=2.0**44,
        log_2=(0.693145751953125, 1.4286068203094172e-06), terms=5,
        tiny=2.0**-70, lift=2.0**40, huge=2.0**120, smallest=2.0**-126, epsilon=2.0**-23,
    ),
    "f8": dict(
        offset=200.0, magic=1.5 * 2.0**52, fraction=1.5 * 2.0**32, bias=1023.0, unit=2.0**46,
        log_2=(0.6931471803691238, 1.9082149292705877e-10), terms=13,
        tiny=2.0**-800, lift=2.0**400, huge=2.0**1000, smallest=2.0**-1022, epsilon=2.0**-52,
    ),
}  # fmt: skip
KINDS["h4"] = KINDS["f4"]


def arithmetic_of(storage, gradient=False):
    """The arithmetic for results of a storage type.

    Gradients of 16 bits are held to float32's error beside the one of their rounding.
    """
    if storage in ("f4", "f8"):
        return arithmetic(storage)
    return arithmetic("f4" if gradient else "h4")


@jit.device
def two_sum(a, b):
    """a + b as the rounded sum and what the rounding lost (Knuth).

    With + and - ptxas would fuse a product given as a or b, and count what its rounding lost as lost here.
    """
    s = plus(a, b)
    z = minus(s, a)
    return s, plus(minus(a, minus(s, z)), minus(b, z))


@jit.device
def parts_of(total, rest):
    """A sum of integers and of what their rounding left, each cut in two."""
    return total >> PART_BITS, total & PART_MASK, rest >> PART_BITS, rest & PART_MASK


@jit.device
def carried(high, low, rest_high, rest_low):
    """Sums of the results of ``parts_of`` as it would have given them for the sum of all."""
    return (
        high + (low >> PART_BITS),
        low & PART_MASK,
        rest_high + (rest_low >> PART_BITS),
        rest_low & PART_MASK,
    )


@jit.device
def tail_32(r):
    """C2 + r * (C3 + ...)."""
    q = fma(r, C6, C5)
    q = fma(q, r, C4)
    q = fma(q, r, C3)
    return fma(q, r, C2)


@jit.device
def polynomial_32(r):
    return fma(tail_32(r), r, C1)


@jit.device
def powers_64(s):
    """D3 + s * (D5 + ...) and D2 + s * (D4 + ...): half as long a chain of operations that wait for each other."""
    odd, even = fma(s, D11, D9), fma(s, D10, D8)
    odd, even = fma(odd, s, D7), fma(even, s, D6)
    odd, even = fma(odd, s, D5), fma(even, s, D4)
    return fma(odd, s, D3), fma(even, s, D2)


@jit.device
def tail_64(r):
    """D2 + r * (D3 + ...)."""
    odd, even = powers_64(r * r)
    return fma(odd, r, even)


@jit.device
def polynomial_64(r):
    s = r * r
    odd, even = powers_64(s)
    return fma(even, r, fma(odd, s, D1))


def polynomial_of(series):
    """The function series[0] + z * (series[1] + ...), without a loop, whose constants NVVM would choose by jumps."""
    first, rest = series[0], series[1] if len(series) == 2 else polynomial_of(series[1:])

    @jit.device
    def last(z):
        return fma(z, rest, first)

    @jit.device
    def polynomial(z):
        return fma(rest(z), z, first)

    return last if len(series) == 2 else polynomial


@lru_cache
def arithmetic(kind):
    """The device functions of a kind of arithmetic."""
    k = SimpleNamespace(**KINDS[kind])
    offset, fraction_magic, unit, huge = k.offset, k.fraction, k.unit, k.huge
    magic = k.magic + k.bias + offset
    largest, is_wide = 2.0**offset, kind == "f8"
    lowest_power = offset + k.bias - 3.0
    tiny, lift = k.tiny, k.lift
    wide_magic, widest_power = k.magic + 2.0 * k.bias, 2.0 * k.bias - 4.0
    one_power = k.magic + k.bias
    most = (2.0 - 2.0**-23) * 2.0**127 if k.bias == 127.0 else elementary.MAX_64
    log_2, log_2_rest = k.log_2
    log2_e, log2_e_rest = elementary.scale(1.0, kind == "f8")
    to_unit, from_unit = unit / largest, 1.0 / unit
    polynomial, tail, slope = (polynomial_64, tail_64, D1) if kind == "f8" else (polynomial_32, tail_32, C1)
    series = tuple(2.0 / (2 * i + 3) for i in range(k.terms))
    low_unit = 2.0**-47 if kind == "f8" else 0.0

    @jit.device
    def split_shift(centre, near, high, low, power):
        """The shift by ``centre`` and then by ``near``, whose unit in powers of two is high + low."""
        p = fma(near, high, fraction_magic) - fraction_magic
        rest = 0.0 - fma(near, low, fma(near, high, 0.0 - p))
        return centre, 0.0 - p, rest, (p - lowest_power) / power

    @jit.device
    def shift_of(m, high, low):
        """What ``exponential`` takes for rows whose maximum is m."""
        is_far = absolute(m * high) >= FAR
        return split_shift(select(is_far, m, 0.0), select(is_far, 0.0, m), high, low, high)

    @jit.device
    def shift_of_lse(lse, temperature, inverse, high):
        """As ``shift_of``, for exp(x / T - lse); T is the sum of three numbers, ``inverse`` is 1 / T.

        That alone would not do: lse - c / T, with c about lse * T, is (lse * T - c) / T.
        """
        t, t_rest, t_last = temperature
        is_far = absolute(lse) >= FAR
        c = select(is_far, lse * t, 0.0)
        c = select(c > most, most, select(c < -most, -most, c))
        product = lse * t_rest
        rest, rest_lost = two_sum(fma(lse, t, 0.0 - c), product)
        rest_lost = rest_lost + fma(lse, t_last, fma(lse, t_rest, 0.0 - product))
        near = rest * inverse
        lost = (fma(0.0 - near, t, rest) + fma(0.0 - near, t_rest, rest_lost)) * inverse
        near, lost = select(is_far, near, lse), select(is_far, lost, 0.0)
        # where c is that far off, it is the nearest number all the same, and all others are farther off
        lost = select(absolute(near) < BEYOND, lost, 0.0)
        near = select(near > BEYOND, BEYOND, select(near < -BEYOND, -BEYOND, near))
        is_infinite = absolute(lse) == INFINITY
        c, near = select(is_infinite, lse, c), select(is_infinite, 0.0, near)
        centre, fraction, rest, lowest = split_shift(c, near, log2_e, log2_e_rest, high)
        return centre, fraction, fma(0.0 - lost, log2_e, rest), lowest

    @jit.device
    def factor_and_power(v):
        """v as a factor below 2 (from 1 on, for v from 2**-80 or 2**-900 on) and the n of a power of two 2**n."""
        n = exponent(power_of_two_above(absolute(v))) - 1.0
        return times_power(v, one_power - n), n

    @jit.device
    def wide_shift(shift, power, high):
        """What ``wide_exponential`` takes for exp((x - m) / T) * 2**power, power being a whole number."""
        centre, fraction, rest, _ = shift
        fraction, unit = fraction + power, 1.0 / high
        lowest, highest = (-widest_power - fraction) * unit, (widest_power - fraction) * unit
        return centre, fraction, rest, lowest, highest

    @jit.device
    def wide_exponential(x, shift, high, low):
        """exp((x - m) / T) * 2**power as the product of a number and a power of two.

        Each is about a root of it: times a factor between them, nothing over- or underflows that the
        result does not. Error below 0.8 ULP; NaN stays NaN.
        """
        centre, fraction, rest, lowest, highest = shift
        d = maximum(lowest, x - centre)
        d = select(d > highest, highest, d)
        t = fma(d, high, fraction) + wide_magic
        r = fma(d, high, (wide_magic - t) + fraction) + fma(d, low, rest)
        return fma(polynomial(r), r, 1.0) * first_half_power(t), second_half_power(t)

    @jit.device
    def exponential(x, shift, high, low):
        """exp((x - m) / T) times ``largest``; error below 0.8 ULP.

        NaN stays NaN; from -inf comes a tiny number whose quotient by a sum is 0.
        """
        centre, fraction, rest, lowest = shift
        d = maximum(lowest, x - centre)
        t = fma(d, high, fraction) + magic
        r = fma(d, high, (magic - t) + fraction) + fma(d, low, rest)
        return times_power(fma(polynomial(r), r, 1.0), t)

    @jit.device
    def exponential_and_rest(x, shift, high, low):
        """As ``exponential``, with an error below 0.7 ULP, and what its last rounding lost.

        Where many elements are equal, those losses are, and their sum may be as large as that.
        """
        centre, fraction, rest, lowest = shift
        d = maximum(lowest, x - centre)
        t = fma(d, high, fraction) + magic
        r = fma(d, high, (magic - t) + fraction) + fma(d, low, rest)
        # the first term apart: what its product and its sum with 1 lose is known
        first = fma(r, slope, 1.0)
        others = fma(tail(r) * r, r, fma(r, slope, 1.0 - first))
        e = first + others
        return times_power(e, t), times_power((first - e) + others, t)

    @jit.device
    def exact_sum_of(e, rest):
        """As ``sum_of``, of exponentials and what their roundings lost."""
        # the rests first: their registers are then free for integers
        more = integer_sum_of_rests(rest * to_unit)
        total, low = integer_sum(e * to_unit)
        if is_wide:
            low += more
        else:
            total += more
        return total, low

    @jit.device
    def short_exponential_and_rest(x, shift, high, low):
        e = short_exponential(x, shift, high, low)
        return e, e

    @jit.device
    def short_sum_of(e, rest):
        """As ``exact_sum_of``, where what is lost does not matter."""
        return integer_sum(e * to_unit)

    @jit.device
    def plain_shift(m, high, low):
        return (m,)

    @jit.device
    def short_exponential(x, shift, high, low):
        """As ``exponential``, in three instructions, with a relative error of 2**-18."""
        return exp2_approximate(fma(x - shift[0], high, offset))

    @jit.device
    def sum_of(e):
        """The sum of a thread's exponentials, as integers."""
        return integer_sum(e * to_unit)

    @jit.device
    def pair_of(like, total):
        """A sum as ``parts_of`` gives it in two parts, the largest possible term being 1."""
        high, low, rest_high, rest_low = total
        first = integer_as(like, high)
        second = integer_as(like, high - as_integer(first)) * PART + integer_as(like, low)
        if low_unit != 0.0:
            rest = integer_as(like, rest_high) * PART + integer_as(like, rest_low)
            second = fma(rest, low_unit, second)
        s, lost = two_sum(first * PART, second)
        return s * from_unit, lost * from_unit

    @jit.device
    def reciprocal(s, lost):
        """1 / (s + lost) / ``largest`` in two parts: what an exponential is multiplied by."""
        r = 1.0 / s
        rest = fma(0.0 - r, lost, fma(0.0 - r, s, 1.0))
        return r * (1.0 / largest), (r * rest) * (1.0 / largest)

    @jit.device
    def log_of_quotient(f, f_lost, d, d_lost, steps):
        """2 artanh(f / d) + steps * log(2) in two parts, for abs(f / d) <= 1/5; f and d have two parts."""
        v = f / d
        v_lost = (fma(0.0 - v, d_lost, fma(0.0 - v, d, f)) + f_lost) / d
        z = v * v
        p = fma(z, series[-1], series[-2])
        for c in series[-3::-1]:
            p = fma(p, z, c)
        tail = fma(p, v * z, v_lost + v_lost)
        high, high_lost = two_sum(steps * log_2, v + v)
        return two_sum(high, high_lost + fma(steps, log_2_rest, tail))

    @jit.device
    def log_near(f, f_lost, steps):
        """log(1 + f + f_lost) + steps * log(2) in two parts, for abs(f) <= 1/2."""
        d, d_lost = two_sum(f, number(f, 2.0))  # f / (2 + f)
        return log_of_quotient(f, f_lost, d, d_lost + f_lost, steps)

    @jit.device
    def log_of(s, lost):
        """log(s + lost) in two parts."""
        power = power_of_two_above(s * (2.0 / 3.0))
        f, f_lost = two_sum(s / power - 1.0, lost / power)
        return log_near(f, f_lost, exponent(power))

    @jit.device
    def log1p_of(extra, q, lost):
        """log(1 + extra + q + lost) in two parts, for a whole number and a pair, none below 0."""
        s, s_lost = two_sum(extra + 1.0, q)
        return log_of(s, s_lost + lost)

    @jit.device
    def log_of_sum(like, extra, total, e):
        """log(sum exp((x - m) / T)) in two parts.

        The sum has 1 + extra times the maximum and ``total``, a sum relative to the largest of
        the others, whose own exponential (relative to m) is e.
        """
        s, lost = pair_of(like, total)
        q = e * s
        q_lost = fma(e, lost, fma(e, s, 0.0 - q))
        return log1p_of(integer_as(like, extra), q * (1.0 / largest), q_lost * (1.0 / largest))

    @jit.device
    def lift_for(a):
        """What to multiply both factors of products by whose largest is a: none under- or overflows."""
        return select(a < tiny, lift, select(a > huge, 0.25, number(a, 1.0)))

    @jit.device
    def unlift_for(a):
        """1 / ``lift_for``, without a division."""
        return select(a < tiny, 1.0 / lift, select(a > huge, 4.0, number(a, 1.0)))

    @jit.device
    def top_of(a, scale):
        """A power of two that no term exceeds; a is the largest term, lifted twice by ``scale``."""
        return power_of_two_above((a * scale) * scale)

    @jit.device
    def finer_sum_of(p, lost, top, factor):
        """As ``signed_sum_of``, with so many integers for one of its."""
        scale = unit / top
        a, b = integer_sum((p * scale) * factor), integer_sum((lost * scale) * factor)
        return a[0] + b[0], a[1] + b[1]

    @jit.device
    def signed_sum_of(p, lost, top):
        """The sum of a thread's terms p + lost, none above ``top``, as integers."""
        return finer_sum_of(p, lost, top, 1.0)

    @jit.device
    def finer_sum_below(p, top, factor):
        """As ``finer_sum_of``, of terms without lost parts."""
        return integer_sum((p * (unit / top)) * factor)

    @jit.device
    def sum_below(p, top):
        """As ``signed_sum_of``, of terms without lost parts."""
        return finer_sum_below(p, top, 1.0)

    if kind == "h4":
        shift_of, exponential = plain_shift, short_exponential
        exponential_and_rest, exact_sum_of = short_exponential_and_rest, short_sum_of
    return SimpleNamespace(
        compute="f8" if kind == "f8" else "f4", largest=largest, log2_e=(log2_e, log2_e_rest), shift_of=shift_of, shift_of_lse=shift_of_lse, exponential=exponential,
        factor_and_power=factor_and_power, wide_shift=wide_shift, wide_exponential=wide_exponential,
        exponential_and_rest=exponential_and_rest, exact_sum_of=exact_sum_of, sum_of=sum_of, pair_of=pair_of, reciprocal=reciprocal, log1p_of=log1p_of, log_of_sum=log_of_sum,
        lift_for=lift_for, unlift_for=unlift_for, top_of=top_of, signed_sum_of=signed_sum_of, finer_sum_of=finer_sum_of, finer_sum_below=finer_sum_below, sum_below=sum_below,
        tiny=tiny, lift=lift, smallest=k.smallest, epsilon=k.epsilon, log_of_quotient=log_of_quotient, log_near=log_near, log_of=log_of,
    )  # fmt: skip
