"""The bounds that numbasoft/elementary.py states for its polynomials and its table."""

import mpmath
import numpy as np

from numbasoft import elementary as el


def largest_relative_error(coefficients, limit):
    with mpmath.workprec(120):
        points = [limit * mpmath.mpf(k) / 500 for k in range(-500, 501)]
        return max(abs(horner([1, *coefficients], r) / mpmath.mpf(2) ** r - 1) for r in points)


def horner(coefficients, r):
    value = mpmath.mpf(0)
    for c in reversed(coefficients):
        value = value * r + c
    return value


def test_the_polynomial_for_float32():
    assert largest_relative_error([el.C1, el.C2, el.C3, el.C4], 0.125) < 2.0**-28


def test_the_polynomial_for_float64():
    names = [f"D{k}" for k in range(1, 12)]
    assert largest_relative_error([getattr(el, n) for n in names], 0.5) < 2.0**-57


def test_the_table_is_nearly_exact():
    with mpmath.workprec(120):
        for j, bits in enumerate(el.TABLE):
            entry = np.int32(bits + (j << 20)).view(np.float32)
            exact = mpmath.mpf(el.CENTRE) * mpmath.mpf(2) ** (mpmath.mpf(j) / 8)
            assert abs(mpmath.mpf(float(entry)) / exact - 1) < 0.08 * 2.0**-24
