"""Rows so wide that float32 has some of their probabilities as subnormal numbers: right, alike in all kernels, and fast."""

import numba
import numpy as np
import pytest
from samples import assert_same_bits
from test_fast_paths import run_fresh
from test_past_caches import assert_written_past, no_caches, threads  # noqa: F401

import numbasoft
from numbasoft.vector import load, lowered, store


@numba.njit
def all_lowered(v, powers, result):
    for j in range(0, v.size, 16):
        store(result, j, lowered(load(v, j), powers))


@pytest.mark.parametrize("powers", [40, 90])
def test_numbers_made_subnormal_by_integers(powers, rng):
    v = 2.0 ** rng.uniform(powers - 152, 30, 1 << 16)
    v[:5] = 0.0, np.inf, 2.0 ** (powers - 126), 2.0 ** (powers - 149), 2.0 ** (powers - 150)
    ties = np.arange(4096) + 0.5
    v[8 : 8 + ties.size] = ties * 2.0 ** (powers - 149)
    v = v.astype(np.float32)
    result = np.empty_like(v)
    all_lowered(v, powers, result)
    exact = np.ldexp(v.astype(np.float64), -powers)
    expected = exact.astype(np.float32)
    assert np.count_nonzero((expected > 0) & (expected < 2.0**-126)) > 10_000
    finite = np.isfinite(v)  # infinity is no quotient of exponentials
    np.testing.assert_array_equal(result[finite], expected[finite])


def wide_rows(rng, rows, n, dtype="f4"):
    """Rows with elements from 0 to 130 below their maximum, so many that each kind of small number is there, and others."""
    x = -rng.uniform(0, 130, (rows, n))
    x[::3] = rng.normal(0, 10, x[::3].shape)  # on both sides of what counts as deep
    x[:, rng.integers(n)] = 3
    x[1::5] += rng.normal(0, 100)
    x = x.astype(np.float32).astype(dtype)
    if rows > 6:
        x[6, 0] = np.nan
        x[5, n - 1] = -np.inf
        x[4] = -np.inf
    return x


@pytest.mark.parametrize("n", [3, 16, 100, 1000, 20_000])
def test_subnormal_probabilities_are_right(n, rng):
    x = wide_rows(rng, 40, n)
    y = numbasoft.softmax(x)
    rows = [i for i in range(40) if i not in (4, 6)]
    assert np.isnan(y[[4, 6]]).all()
    w = x[rows].astype(np.longdouble)
    e = np.exp(w - w.max(axis=1, keepdims=True))
    exact = e / e.sum(axis=1, keepdims=True)
    unit = np.maximum(np.spacing(exact.astype(np.float32)), np.float32(2.0**-149))
    assert (abs(y[rows] - exact) / unit).max() < 2
    if n >= 100:
        assert np.count_nonzero((y > 0) & (y < 2.0**-126)) > 300


# rows done a lane each, few in one call, with threads, and shared by these
@pytest.mark.parametrize(
    ("rows", "n"), [(40, 2), (40, 9), (40, 16), (7, 16), (40, 17), (40, 1000), (200, 3000), (3, 70_001)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_subnormal_probabilities_are_the_same_everywhere(dtype, rows, n, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x = wide_rows(rng, rows, n, dtype)
    y = numbasoft.softmax(x)
    for i in range(min(rows, 20)):
        assert_same_bits(numbasoft.softmax(x[i]), y[i])
    assert_same_bits(numbasoft.softmax(np.ascontiguousarray(x.T), 0).T, y)
    assert_same_bits(numbasoft.softmax(x, out=x.copy()), y)
    everything = np.ones(x.shape, bool)
    assert_same_bits(numbasoft.softmax(x, where=everything), y)
    around = np.full((rows, 3 * n), 7, x.dtype)
    around[:, n : 2 * n] = x
    assert_same_bits(numbasoft.softmax(around[:, n : 2 * n]), y)


@pytest.mark.parametrize("n", [17, 300, 1000, 4100])
@pytest.mark.usefixtures("no_caches", "threads")
def test_subnormal_probabilities_are_the_same_past_the_caches(n, rng):
    x = wide_rows(rng, 61, n)
    expected = numbasoft.softmax(x)
    assert_written_past(lambda out: numbasoft.softmax(x, out=out), expected, "softmax", 3)


# What rows with small probabilities are multiplied with is changed, to be seen where it is used.
CHANGED = """
import json
import numpy as np
from numbasoft import elementary, passes
from numbasoft.jit import inline

@inline
def twice(first, second):
    return first + first, second + second, elementary.RAISED

@inline
def thrice(first, second):
    return first * np.float32(3), second, None

passes.deep_factor, passes.any_factor = twice, thrice
import numbasoft

x = np.random.default_rng(0).normal(0, 3, (7, 100)).astype("f4")
x[1, 5], x[2, 99], x[3, 50], x[4, 7] = -np.inf, -120, -50, -25
x[5] *= 20
x[6] += 1e5
mask = np.ones(x.shape, bool)
mask[6, 3] = False
flat = np.zeros((3, 1200), "f4")  # whose sums are 1200 times the largest exponential
flat[:, 0] = -25, -35, -90
found = [numbasoft.softmax(x, where=mask), numbasoft.softmax(flat)]
print(json.dumps([y.sum(axis=1).round().tolist() for y in found]))
"""


def test_rows_take_the_shortest_way(tmp_path):
    plain, deep, other = 1, 2, 3
    expected = [plain, other, deep, other, plain, deep, other], [plain, other, deep]
    assert run_fresh(CHANGED, tmp_path) == list(expected)
