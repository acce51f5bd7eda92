"""Rows no longer than a vector, which are done many at a time: the bits of a row done alone."""

import numpy as np
import pytest

import numbasoft

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, which has bfloat16")

DTYPES = ["float32", "float64", "float16", "bfloat16"]


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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 18))
def test_bits_of_a_row_alone(dtype, n):
    rng = np.random.default_rng(n)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = rows_of_every_kind(dtype, n, rng)
    for function in numbasoft.softmax, numbasoft.log_softmax, numbasoft.logsumexp:
        for t in 1.0, 0.7:
            result = function(x, temperature=t)
            assert_same_bits(result, one_by_one(function, x, temperature=t))
            if function is not numbasoft.logsumexp:
                place = x.copy()
                assert_same_bits(function(place, temperature=t, out=place), result)
    finite = x[np.isfinite(numbasoft.logsumexp(x).astype(np.float64))]
    for forward, backward in (
        (numbasoft.softmax, numbasoft.softmax_backward),
        (numbasoft.log_softmax, numbasoft.log_softmax_backward),
    ):
        y = forward(finite)
        g = rng.normal(0, 1, y.shape).astype(dtype)
        # one row alone in its group is beyond the plain formulas, then all may be plain
        for scale in 1e4, 1.0:
            g[0] *= dtype.type(scale)
            for t in 1.0, 0.7:
                result = backward(g, y, temperature=t)
                assert_same_bits(result, one_by_one(backward, g, y, temperature=t))
                for place in 0, 1:
                    given = [g.copy(), y.copy()]
                    assert_same_bits(backward(*given, temperature=t, out=given[place]), result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_zeros(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    y = np.full((16, 4), 0.25, dtype)
    y[8:, 1:] = tiny
    g = np.full((16, 4), -0.0, dtype)
    g[1::2, 1] = -tiny
    y[12:, 0] = 0
    assert_same_bits(numbasoft.softmax_backward(g, y), one_by_one(numbasoft.softmax_backward, g, y))


@pytest.mark.parametrize("rows", [8, 5000])
def test_strided_rows_and_other_axes(rows):
    rng = np.random.default_rng(3)
    x = rng.normal(0, 3, (rows, 40)).astype(np.float32)
    part = x[:, 7:17]
    expected = one_by_one(numbasoft.softmax, part)
    assert_same_bits(numbasoft.softmax(part), expected)
    assert_same_bits(numbasoft.softmax(part.T, axis=0), expected.T)
    assert_same_bits(numbasoft.softmax(np.asfortranarray(part)), expected)
    untouched = np.zeros_like(x)
    numbasoft.softmax(part, out=untouched[:, 7:17])
    assert_same_bits(untouched[:, 7:17], expected)
    assert not untouched[:, :7].any() and not untouched[:, 17:].any()
