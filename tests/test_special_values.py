"""NaN, infinities, masks and empty rows by the contract, and the worked examples every build reproduces."""

import numpy as np
import oracle
import pytest
from oracle import DTYPES
from samples import FORWARD

import numbasoft

nan, inf = np.nan, np.inf

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_forward = pytest.mark.parametrize("name", FORWARD)

# Short rows, rows of several vectors with a remainder, and rows that may take the path of long ones.
WIDTHS = [5, 77, 2000, 300_000]


def exactly(got, want):
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want)


# row: (softmax, log_softmax, logsumexp); None stands for any finite number
TABLE = {
    "a NaN": ([0.0, nan, 1.0], (nan, nan, nan)),
    "a NaN beside +inf": ([inf, nan, 1.0], (nan, nan, nan)),
    "a NaN beside -inf": ([-inf, nan, -inf], (nan, nan, nan)),
    "+inf": ([0.0, inf, 1.0], (nan, nan, inf)),
    "two +inf": ([inf, 0.0, inf], (nan, nan, inf)),
    "+inf beside -inf": ([-inf, inf, -inf], (nan, nan, inf)),
    "all -inf": ([-inf, -inf, -inf], (nan, nan, -inf)),
}


@pytest.mark.parametrize("case", TABLE)
@by_dtype
@by_forward
def test_rows_without_a_finite_answer(name, dtype, case):
    row, answers = TABLE[case]
    want = answers[FORWARD.index(name)]
    x = np.array([[1, 2, 3], row, [3, 2, 1]]).astype(DTYPES[dtype])
    for axis, array in ((-1, x), (0, np.ascontiguousarray(x.T))):
        got = np.asarray(getattr(numbasoft, name)(array, axis)).astype(np.float64)
        got = got if axis == -1 else got.T
        exactly(got[1], np.full(np.shape(got[1]), want))
        assert np.isfinite(got[[0, 2]]).all(), "the neighbours of a special row must not see it"


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("special", [nan, inf, -inf])
@by_dtype
@by_forward
def test_one_special_value_anywhere_in_a_row(name, dtype, special, n, rng):
    # at the start, in the remainder of a vector, at the seams of tiles: wherever it is, it counts
    x = rng.normal(0, 3, n).astype(DTYPES[dtype])
    places = sorted({0, 1, n // 2, n - 2, n - 1})
    if special == -inf:
        x[places[1:]] = -inf
        got = getattr(numbasoft, name)(x)
        return oracle.check(got, getattr(oracle, name)(x), oracle.limit(name, x.dtype))
    for place in places:
        row = x.copy()
        row[place] = special
        got = getattr(numbasoft, name)(row)
        exactly(got, np.full(np.shape(got), inf if (name, special) == ("logsumexp", inf) else nan))
    return None


@by_dtype
def test_minus_infinity_is_exactly_absent(dtype):
    x = np.array([1, -inf, 2, -inf, 0.5]).astype(DTYPES[dtype])
    soft, logs = numbasoft.softmax(x), numbasoft.log_softmax(x)
    exactly(soft[[1, 3]], [0, 0])
    exactly(logs[[1, 3]], [-inf, -inf])
    assert np.isfinite(logs[[0, 2, 4]].astype(float)).all()
    for name in FORWARD:
        got = getattr(numbasoft, name)(x)
        oracle.check(got, getattr(oracle, name)(x), oracle.limit(name, DTYPES[dtype]))


@pytest.mark.parametrize("n", [1, 2, 9, 100])
@by_dtype
def test_one_finite_element(dtype, n):
    for place in {0, n // 2, n - 1}:
        for value in (0.0, -3.25, 100.0, 3e38 if dtype not in ("float16",) else 6e4):
            x = np.full(n, -inf).astype(DTYPES[dtype])
            x[place] = value
            exactly(numbasoft.softmax(x)[place], 1)
            exactly(numbasoft.log_softmax(x)[place], 0)
            exactly(numbasoft.logsumexp(x), x[place].astype(np.float64))


@by_dtype
def test_rows_of_length_zero(dtype):
    x = np.empty((4, 0), DTYPES[dtype])
    assert numbasoft.softmax(x).shape == numbasoft.log_softmax(x).shape == (4, 0)
    exactly(numbasoft.logsumexp(x), np.full(4, -inf))
    exactly(numbasoft.logsumexp(x, keepdims=True), np.full((4, 1), -inf))
    exactly(numbasoft.logsumexp(x.T, 0), np.full(4, -inf))
    exactly(numbasoft.logsumexp(x, None), -inf)
    assert numbasoft.logsumexp(x, 0).shape == (0,)


# --- masks -------------------------------------------------------------------------------------------------


@by_dtype
def test_a_mask_that_keeps_nothing(dtype):
    x = np.array([[1, 2, 3], [nan, inf, -inf], [3, 2, 1]]).astype(DTYPES[dtype])
    where = np.array([[True] * 3, [False] * 3, [True] * 3])
    for axis, a, w in ((-1, x, where), (0, x.T, where.T)):
        pick = (lambda r: r[1]) if axis == -1 else (lambda r: r.T[1])
        exactly(pick(numbasoft.softmax(a, axis, where=w)), [0, 0, 0])
        exactly(pick(numbasoft.log_softmax(a, axis, where=w)), [-inf] * 3)
        exactly(numbasoft.logsumexp(a, axis, where=w)[1], -inf)
        assert np.isfinite(numbasoft.logsumexp(a, axis, where=w)[[0, 2]].astype(float)).all()


@pytest.mark.parametrize("behind", [nan, inf, -inf, 1e4])
@by_dtype
@by_forward
def test_what_stands_behind_a_mask_changes_nothing(name, dtype, behind, rng):
    for n in (3, 50, 1000):
        x = rng.normal(0, 3, (6, n)).astype(DTYPES[dtype])
        where = rng.random((6, n)) < 0.7
        where[:, 0] = True
        other = np.where(where, x, np.array(behind).astype(DTYPES[dtype]))
        for axis, a, b, w in ((-1, x, other, where), (0, x.T.copy(), other.T.copy(), where.T.copy())):
            one = getattr(numbasoft, name)(a, axis, where=w)
            two = getattr(numbasoft, name)(b, axis, where=w)
            assert one.tobytes() == two.tobytes()
            oracle.check(one, getattr(oracle, name)(a, axis, where=w), oracle.limit(name, DTYPES[dtype]))


@by_dtype
@by_forward
def test_a_mask_is_minus_infinity_in_effect(name, dtype, rng):
    # also in rows that hold NaN or inf, or nothing but -inf where the mask keeps
    for n in (4, 65, 3000):
        x = rng.normal(0, 3, (7, n)).astype(DTYPES[dtype])
        x[1, 0], x[2, 0], x[3], x[4, 1] = nan, inf, -inf, -inf
        where = rng.random((7, n)) < 0.6
        where[:, :2] = True
        masked = getattr(numbasoft, name)(x, where=where)
        replaced = getattr(numbasoft, name)(np.where(where, x, np.array(-inf).astype(x.dtype)))
        np.testing.assert_array_equal(masked.astype(np.float64), replaced.astype(np.float64))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (1, 5), (3, 1, 1), (3, 1, 5), (3, 4, 5)])
@by_forward
def test_masks_broadcast(name, shape, rng):
    x = rng.normal(0, 3, (3, 4, 5))
    where = rng.random(shape) < 0.7
    for axis in (-1, 0, (1, 2), None):
        got = getattr(numbasoft, name)(x, axis, where=where)
        full = getattr(numbasoft, name)(x, axis, where=np.broadcast_to(where, x.shape).copy())
        assert got.tobytes() == full.tobytes()
        oracle.check(got, getattr(oracle, name)(x, axis, where=where), 2)


@by_forward
def test_a_python_bool_as_mask(name):
    x = np.array([1.0, 2.0, 3.0])
    exactly(getattr(numbasoft, name)(x, where=True), getattr(numbasoft, name)(x))
    nothing = getattr(numbasoft, name)(x, where=False)
    exactly(nothing, np.full(nothing.shape, 0 if name == "softmax" else -inf))


# --- backward passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [nan, inf, -inf, 1e4])
@pytest.mark.parametrize("n", [3, 40, 1000])
@by_dtype
def test_softmax_backward_of_a_probability_of_zero(dtype, n, junk, rng):
    dtype = DTYPES[dtype]
    y = oracle.softmax(rng.normal(0, 2, (5, n)).astype(dtype)).floats().astype(dtype)
    y[:, 1::2] = 0
    y[4] = 0
    grad = rng.standard_normal((5, n)).astype(dtype)
    spoiled = np.where(y == 0, np.array(junk).astype(dtype), grad)
    for axis, g, s, p in ((-1, grad, spoiled, y), (0, grad.T.copy(), spoiled.T.copy(), y.T.copy())):
        got = numbasoft.softmax_backward(s, p, axis)
        exactly(got[p == 0], np.zeros((p == 0).sum()))
        exactly(got, numbasoft.softmax_backward(g, p, axis).astype(np.float64))
        oracle.check(got, oracle.softmax_backward(g, p, axis), 4)


@pytest.mark.parametrize("junk", [nan, inf, -inf, 1e4])
@pytest.mark.parametrize("n", [3, 40, 1000])
@by_dtype
def test_log_softmax_backward_of_a_probability_of_zero(dtype, n, junk, rng):
    dtype = DTYPES[dtype]
    log_y = oracle.log_softmax(rng.normal(0, 2, (5, n)).astype(dtype)).floats().astype(dtype)
    log_y[:, 1::2] = -inf
    log_y[4] = -inf
    grad = rng.standard_normal((5, n)).astype(dtype)
    spoiled = np.where(log_y == -inf, np.array(junk).astype(dtype), grad)
    for axis, g, s, p in ((-1, grad, spoiled, log_y), (0, grad.T.copy(), spoiled.T.copy(), log_y.T.copy())):
        got = numbasoft.log_softmax_backward(s, p, axis)
        exactly(got[p == -inf], np.zeros((p == -inf).sum()))
        exactly(got, numbasoft.log_softmax_backward(g, p, axis).astype(np.float64))
        oracle.check(got, oracle.log_softmax_backward(g, p, axis), 4)


@by_dtype
def test_logsumexp_backward_of_a_probability_of_zero(dtype):
    dtype = DTYPES[dtype]
    x = np.array([[1, -inf, 2], [-inf, -inf, -inf], [0, 0, -inf]]).astype(dtype)
    lse = oracle.logsumexp(x).floats().astype(dtype)
    for grad in ([1, 1, 1], [nan, inf, nan]):
        got = numbasoft.logsumexp_backward(np.array(grad).astype(dtype), x, lse)
        exactly(got[x == -inf], np.zeros(5))


@pytest.mark.parametrize("function", ["softmax_backward", "log_softmax_backward"])
@by_dtype
def test_nan_in_a_gradient_that_counts_reaches_its_row_only(function, dtype):
    y = np.array([[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]])
    y = (np.log(y) if function.startswith("log") else y).astype(DTYPES[dtype])
    grad = np.array([[1, 2], [nan, 1], [0, 3]]).astype(DTYPES[dtype])
    got = getattr(numbasoft, function)(grad, y).astype(np.float64)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


# --- worked examples ---------------------------------------------------------------------------------------


def test_one_two_three():
    y = numbasoft.softmax([1, 2, 3])
    assert y == pytest.approx([0.09003057, 0.24472847, 0.66524096], abs=5e-9)
    assert y.sum() == pytest.approx(1, abs=2e-16)
    assert y.dtype == np.float64


@pytest.mark.parametrize("value", [1000, -1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_thirds_where_the_naive_formula_gives_nan(dtype, value):
    x = np.full(3, value, dtype)
    with np.errstate(all="ignore"):
        assert np.isnan(np.exp(x) / np.exp(x).sum()).all()
    exactly(numbasoft.softmax(x), np.full(3, np.array(1 / 3, dtype), np.float64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_log_that_a_log_of_softmax_cannot_give(dtype):
    x = np.array([-1, 10, 5000], dtype)
    exactly(numbasoft.softmax(x), [0, 0, 1])
    with np.errstate(divide="ignore"):
        exactly(np.log(numbasoft.softmax(x)), [-inf, -inf, 0])
    exactly(numbasoft.log_softmax(x), [-5001, -4990, 0])
    exactly(np.exp(numbasoft.log_softmax(x)), [0, 0, 1])


LOGITS = np.array([55.8906, -114.5621, 6.3440, -30.2473, -44.1440], np.float32)


def test_temperature_keeps_a_loss_finite():
    target = 2
    one_hot = np.eye(5, dtype=np.float32)[target]
    with np.errstate(all="ignore"):
        naive = np.exp(LOGITS) / np.exp(LOGITS).sum()
        assert naive[1] == 0
        assert np.isnan(-(one_hot * np.log(naive)).sum())
        assert np.exp(LOGITS / 10) == pytest.approx(
            [2.6748e02, 1.0584e-05, 1.8859e00, 4.8571e-02, 1.2102e-02], rel=5e-5
        )
    for temperature, loss in ((1, 49.5466), (10, 4.9619)):
        from_logs = -numbasoft.log_softmax(LOGITS, temperature=temperature)[target]
        from_sum = numbasoft.logsumexp(LOGITS, temperature=temperature) - LOGITS[target] / temperature
        assert from_logs == pytest.approx(loss, abs=5e-5)
        assert from_sum == pytest.approx(loss, abs=5e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1, 10, 1e3, 1e6])
def test_a_loss_from_logits_is_finite_at_every_temperature(temperature):
    assert np.isfinite(numbasoft.log_softmax(LOGITS, temperature=temperature)).all()


def test_probabilities_add_up(rng):
    x = rng.normal(0, 5, (100, 13))
    y = numbasoft.softmax(x)
    assert (y >= 0).all()
    assert y.sum(1) == pytest.approx(np.ones(100), abs=1e-15)
    # the mass of {i, j} is the sum of the two: the pair merged into one logit by logsumexp gives the same
    merged = np.concatenate([numbasoft.logsumexp(x[:, :2], keepdims=True), x[:, 2:]], 1)
    assert numbasoft.softmax(merged)[:, 0] == pytest.approx(y[:, 0] + y[:, 1], rel=1e-13)


def test_the_derivative_with_respect_to_the_own_logit(rng):
    p = numbasoft.softmax(rng.normal(0, 2, 9))
    jacobian = np.stack([numbasoft.softmax_backward(row, p) for row in np.eye(9)])
    assert np.diag(jacobian) == pytest.approx(p * (1 - p), rel=1e-13)
    assert jacobian == pytest.approx(np.diag(p) - np.outer(p, p), abs=1e-16)


@pytest.mark.parametrize("targets", ["one-hot", "soft"])
def test_the_gradient_of_cross_entropy_is_p_minus_y(targets, rng):
    z = rng.normal(0, 2, (6, 9))
    y = np.eye(9)[rng.integers(9, size=6)] if targets == "one-hot" else rng.dirichlet(np.ones(9), 6)
    got = numbasoft.log_softmax_backward(-y, numbasoft.log_softmax(z))
    assert got == pytest.approx(numbasoft.softmax(z) - y, abs=1e-15)


def test_attention_scaling_keeps_the_softmax_from_saturating(rng):
    # q.k has variance d: undivided, the largest weight is near 1; divided by sqrt(d) it is spread
    d = 512
    scores = rng.standard_normal((200, d)) @ rng.standard_normal((d, 64))
    assert scores.var() == pytest.approx(d, rel=0.1)
    assert np.median(numbasoft.softmax(scores).max(1)) > 0.9
    assert np.median(numbasoft.softmax(scores, temperature=d**0.5).max(1)) < 0.25


def test_log_softmax_of_logits_that_overflow_at_a_small_temperature():
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(
        numbasoft.log_softmax(np.array([0, -largest], np.float32), temperature=3e-9), [0, -np.inf]
    )
    for x, t in (np.array([0, -1e38, -1], np.float32), 1e-20), (np.array([0, -1.7e308, -1]), 3e-20):
        y = numbasoft.log_softmax(x, temperature=t)
        assert y[0] == 0 and y[1] == -np.inf and np.isfinite(y[2])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "x"), [(np.float32, [-3.3e38, 0.6e38]), (np.float64, [-1.77e308, 1.5e307])]
)
def test_log_softmax_where_a_difference_overflows_but_not_its_quotient(dtype, x, rows):
    x = np.tile(np.array(x, dtype), (rows, 1))
    want = (x[0, 0] / 10 - x[0, 1] / 10, 0)
    np.testing.assert_allclose(numbasoft.log_softmax(x, temperature=10), np.tile(want, (rows, 1)), rtol=1e-6)


def test_out_may_be_x_seen_through_another_stride_of_a_single_row():
    a = np.arange(5, dtype=np.float32)
    expected = numbasoft.softmax(a)
    numbasoft.softmax(a.reshape(1, 5), out=a[None, :])
    np.testing.assert_array_equal(a, expected)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_no_floating_point_error_is_raised_where_results_are_rounded_to_float32(name):
    # at such a temperature float32 is computed in float64
    x = np.array([[3e38, 0.0, -9.5e-39]], np.float32)
    with np.errstate(all="raise"):
        y = getattr(numbasoft, name)(x, temperature=1e-40)
    np.testing.assert_array_equal(y, [[1, 0, 0]] if name == "softmax" else [[0, -np.inf, -np.inf]])
