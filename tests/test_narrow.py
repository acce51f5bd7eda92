"""Rows no longer than a vector, which are done many at a time: the bits of a row done alone."""

import numpy as np
import pytest
from samples import assert_same_bits, one_by_one, rows_of_every_kind

import numbasoft

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, which has bfloat16")

DTYPES = ["float32", "float64", "float16", "bfloat16"]


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


# What may make a row's loss and gradient special besides its logits.
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1e-20},
    {"temperature": 1e25},
    {"z_loss": 0.01},
    {"weight": True},
    {"weight": True, "z_loss": 3.0, "temperature": 1e-5},
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 18))
def test_bits_of_the_cross_entropy_of_a_row_alone(dtype, n):
    rng = np.random.default_rng(n)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.concatenate([rows_of_every_kind(dtype, n, rng), np.zeros((3, n), dtype)])
    # as confident as needs the others' sum by itself, and a little less
    x = np.concatenate([x, np.pad(np.full((6, 1), 8.0), ((0, 0), (0, n - 1))).astype(dtype) + x[:6]])
    largest = np.where(np.isnan(x), -np.inf, x.astype(np.float64)).argmax(1)
    target = np.where(rng.random(len(x)) < 0.6, largest, rng.integers(0, n, len(x)))
    target[rng.random(len(x)) < 0.15] = -100
    numbers = [0.0, 1.0, -1.0, 1e-30, 1e30, -1e200, 1e300, 5e-324, np.inf, np.nan, 2.0**30]
    special = rng.choice(numbers, len(x))
    weight = rng.choice([0.0, 0.5, 1.0, 2.5, 1e-300, 1e300], n)
    for option in OPTIONS:
        more = {**option, "reduction": "none"}
        if "weight" in option:
            more["weight"] = weight
        loss = numbasoft.cross_entropy(x, target, **more)
        assert_same_bits(loss, one_by_one(numbasoft.cross_entropy, x, target, **more))
        value, dx = numbasoft.cross_entropy_value_and_grad(x, target, **more)
        alone = [
            numbasoft.cross_entropy_value_and_grad(x[i : i + 1], target[i : i + 1], **more)
            for i in range(len(x))
        ]
        assert_same_bits(value, np.concatenate([v for v, _ in alone]))
        assert_same_bits(dx, np.concatenate([d for _, d in alone]))
        place = x.copy()
        numbasoft.cross_entropy_value_and_grad(place, target, out=place, **more)
        assert_same_bits(place, dx)
        backward = numbasoft.cross_entropy_backward
        assert_same_bits(
            backward(special, x, target, **more), one_by_one(backward, special, x, target, **more)
        )
    assert not loss[target == -100].any() and not dx[target == -100].any()
    ids = np.maximum(target, 0)
    assert_same_bits(numbasoft.token_log_probs(x, ids), one_by_one(numbasoft.token_log_probs, x, ids))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_row_of_a_group_leaves_the_others_as_they_are(dtype):
    # what only some rows need is done for a group as soon as one of them needs it
    rng = np.random.default_rng(5)
    x, target = rng.normal(0, 1, (16, 6)).astype(dtype), rng.integers(0, 6, 16)
    g = np.ones(16)
    before = numbasoft.cross_entropy(x, target, reduction="none")
    dx_before = numbasoft.cross_entropy_backward(g, x, target, reduction="none")
    for kind in "confident", "gradient", "ignored", "NaN":
        y, t, h = x.copy(), target.copy(), g.copy()
        if kind == "confident":
            y[4, t[4]] += 60
        elif kind == "gradient":
            h[4] = 1e200
        elif kind == "ignored":
            t[4] = -100
        else:
            y[4] = np.nan
        loss = numbasoft.cross_entropy(y, t, reduction="none")
        dx = numbasoft.cross_entropy_backward(h, y, t, reduction="none")
        others = np.arange(16) != 4
        assert_same_bits(loss[others], before[others])
        assert_same_bits(dx[others], dx_before[others])
        assert not np.array_equal(dx[4], dx_before[4])


@pytest.mark.parametrize("rows", [8, 5000])
def test_cross_entropy_of_strided_rows_and_classes(rows):
    rng = np.random.default_rng(4)
    x, t = rng.normal(0, 3, (rows, 40)).astype(np.float32), rng.integers(0, 10, (rows, 3))
    part, target = x[:, 7:17], t[:, 1]
    alone = [
        numbasoft.cross_entropy_value_and_grad(part[i : i + 1], target[i : i + 1], reduction="none")
        for i in range(rows)
    ]
    expected = [np.concatenate(a) for a in zip(*alone, strict=True)]
    axis_0 = numbasoft.cross_entropy_value_and_grad(part.T, target.astype(np.int8), axis=0, reduction="none")
    assert_same_bits(axis_0[0], expected[0])
    assert_same_bits(axis_0[1], expected[1].T)
    untouched = np.zeros_like(x)
    loss, _ = numbasoft.cross_entropy_value_and_grad(part, target, reduction="none", out=untouched[:, 7:17])
    assert_same_bits(loss, expected[0])
    assert_same_bits(untouched[:, 7:17], expected[1])
    assert not untouched[:, :7].any() and not untouched[:, 17:].any()
    backward = numbasoft.cross_entropy_backward
    grads = rng.normal(0, 1, (rows, 3))
    for g in grads[:, 1], grads[::-1, 0], np.broadcast_to(grads[0, 0], rows):
        together = backward(g, part, target, reduction="none")
        assert_same_bits(together, one_by_one(backward, g, part, target, reduction="none"))
