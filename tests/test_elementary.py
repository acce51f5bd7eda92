"""The bounds that numbasoft/elementary.py states for its polynomials and its table."""

import numba
import numpy as np
import pytest

from numbasoft import elementary as el
from numbasoft.vector import load, store

mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed, which gives the exact answers here")


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


@numba.njit
def logarithms(v, result):
    for j in range(0, v.size, 8):
        store(result, j, el.logarithm(load(v, j)))


def test_the_logarithm(rng):
    v = 2.0 ** np.concatenate([rng.uniform(np.log2(1 + 2**-12), 1, 4000), rng.uniform(0.001, 64, 4000)])
    v[:4] = [np.nan, np.inf, 2.0, np.sqrt(2.0)]
    result = np.empty_like(v)
    logarithms(v, result)
    assert np.isnan(result[:2]).all()
    with mpmath.workprec(120):
        errors = [
            abs(y / mpmath.log(x) - 1) for x, y in zip(v[2:].tolist(), result[2:].tolist(), strict=True)
        ]
    assert max(errors) < 2.0**-40
