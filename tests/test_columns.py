"""Rows along an axis with others behind it, done by kernels of their own: the bits of a row done alone."""

import numpy as np
import pytest
from samples import assert_same_bits, one_by_one, rows_of_every_kind

import numbasoft
from numbasoft import arrays, launch

pytest.importorskip("hypothesis", reason="hypothesis is not installed, which draws the examples")
from hypothesis import given, settings
from hypothesis import strategies as st

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, which has bfloat16")

DTYPES = ["float32", "float64", "float16", "bfloat16"]

# Less than a vector, with and without a rest, and around the 256 elements of a block of exponentials.
LENGTHS = [1, 2, 5, 8, 9, 15, 16, 17, 33, 255, 256, 257, 280, 531]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_little():
    """Else it is copied to rows."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(arrays, "LITTLE", 0)
        yield


@pytest.fixture
def never_staged(monkeypatch):
    """Fail where arrays would be copied block by block to rows."""

    def staged(*arguments):
        raise AssertionError("copied to rows")

    monkeypatch.setattr(arrays, "stage", staged)


def across(rows, outer):
    """Rows as an (outer, n, inner) array along whose middle axis they lie."""
    return np.ascontiguousarray(rows.reshape(outer, -1, rows.shape[1]).swapaxes(1, 2))


def along(columns):
    """The inverse of ``across``."""
    return columns.swapaxes(1, 2).reshape(-1, columns.shape[1])


def some_rows(dtype, n, rng):
    """Of every kind, 45: in three layers 15 side by side, or 45 in one, which is more than two vectors and a part."""
    x = rows_of_every_kind(dtype, n, rng)
    return np.concatenate([x, x])[:45]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_bits_of_a_row_alone(dtype, n, never_staged):
    rng = np.random.default_rng(n)
    x = some_rows(np.dtype(getattr(ml_dtypes, dtype, dtype)), n, rng)
    for function in numbasoft.softmax, numbasoft.logsumexp, numbasoft.log_softmax:
        for t in (1.0,) if function is numbasoft.log_softmax else (1.0, 0.7):
            alone = one_by_one(function, x, temperature=t)
            for outer in 1, 3:
                columns = across(x, outer)
                result = function(columns, 1, temperature=t)
                if function is numbasoft.logsumexp:
                    assert_same_bits(result.reshape(-1), alone)
                    continue
                assert_same_bits(along(result), alone)
                assert_same_bits(function(columns, 1, temperature=t, out=columns), result)


@pytest.mark.parametrize(("dtype", "depths"), [("float32", (126, 130)), ("float64", (844, 848))])
def test_bits_where_the_least_element_is_about_as_low_as_counts(dtype, depths, rng, never_staged):
    # kernels for columns raise what is lower to that; those for rows only do so where the least element is
    x = rng.normal(0, 1, (128, 40)) + rng.normal(0, 100, (128, 1))
    x[:, 7] = x.max(axis=1) - np.linspace(*depths, 128)
    x = x.astype(dtype)
    for function in numbasoft.softmax, numbasoft.log_softmax:
        assert_same_bits(function(np.ascontiguousarray(x.T), 0).T, one_by_one(function, x))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_bits_of_a_gradient_alone(dtype, n, however_few):
    rng = np.random.default_rng(n)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = some_rows(dtype, n, rng)
    x = x[np.isfinite(numbasoft.logsumexp(x).astype(np.float64))][:30]
    for forward, backward in (
        (numbasoft.softmax, numbasoft.softmax_backward),
        (numbasoft.log_softmax, numbasoft.log_softmax_backward),
    ):
        y = forward(x)
        g = rng.normal(0, 1, y.shape).astype(dtype)
        # sums that are 0, tiny and large, and rows that only the formulas for every case do right
        g[1], g[2], g[3] = 0, g[3] * dtype.type(1e-6), g[3] * dtype.type(1e4)
        g[4:7] = g[4:7].astype(np.float64) * [[1e-10], [1e-20], [1e-40]]
        for special in None, np.inf, np.nan, float(ml_dtypes.finfo(dtype).max):
            if special is not None:
                g[7] = special
            alone = one_by_one(backward, g, y)
            for outer in 1, 3:
                given = across(g, outer), across(y, outer)
                result = backward(*given, 1)
                assert_same_bits(along(result), alone)
                for place in given:
                    copies = [a.copy() for a in given]
                    out = copies[0] if place is given[0] else copies[1]
                    assert_same_bits(backward(*copies, 1, out=out), result)


def test_plain_gradients_are_not_copied_to_rows(never_staged):
    rng = np.random.default_rng(0)
    for dtype in "float32", "float64", "float16":
        x, g = (rng.normal(0, 1, (40, 300)).astype(dtype) for _ in range(2))
        g[:, 5] = 0  # a row that is ignored
        numbasoft.softmax_backward(g, numbasoft.softmax(x, 0), 0)
        numbasoft.log_softmax_backward(g, numbasoft.log_softmax(x, 0), 0)


@pytest.fixture
def as_rows(monkeypatch):
    """The shapes that gradients were copied to rows in, in order."""
    seen = []
    done_as_rows = arrays.done_as_rows

    def spy(run, *more):
        def run_and_note(full, reduced):
            seen.append(full[0].shape)
            run(full, reduced)

        done_as_rows(run_and_note, *more)

    monkeypatch.setattr(arrays, "done_as_rows", spy)
    return seen


def test_only_the_tiles_that_need_it_are_copied_to_rows(as_rows, never_staged):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(0, 1, (3, 10, 3000)).astype(np.float32) for _ in range(2))
    y = numbasoft.softmax(x, 1)
    g[1, 4, 700] = np.inf
    numbasoft.softmax_backward(g, y, 1)
    assert len(as_rows) == 1 and as_rows[0][0] <= 128


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("shape", [(900, 5, 17), (1, 5, 14_001)])
def test_tiles_far_apart_are_copied_to_rows_together(shape, as_rows, never_staged):
    """One by one, those of 100,000 small layers took three seconds."""
    rng = np.random.default_rng(0)
    x, g = (rng.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    g[::2, 3, ::300] = np.nan
    y = numbasoft.softmax(x, 1)
    rows = [np.ascontiguousarray(along(a)) for a in (g, y)]
    assert_same_bits(
        along(numbasoft.softmax_backward(g, y, 1)), one_by_one(numbasoft.softmax_backward, *rows)
    )
    assert len(as_rows) == 1
    expected = numbasoft.softmax_backward(g, y, 1)
    assert_same_bits(numbasoft.softmax_backward(g, y, 1, out=g), expected)


OPTIONS = [{}, {"temperature": 0.7}, {"z_loss": 0.01}, {"weight": True, "z_loss": 3.0, "temperature": 1e-5}]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_bits_of_the_cross_entropy_of_a_row_alone(dtype, n, never_staged):
    rng = np.random.default_rng(n)
    x = some_rows(np.dtype(getattr(ml_dtypes, dtype, dtype)), n, rng)
    x[:6] += np.pad(np.full((6, 1), 8.0), ((0, 0), (0, n - 1))).astype(x.dtype)
    largest = np.where(np.isnan(x), -np.inf, x.astype(np.float64)).argmax(1)
    target = np.where(rng.random(len(x)) < 0.6, largest, rng.integers(0, n, len(x)))
    target[rng.random(len(x)) < 0.15] = -100
    special = rng.choice([0.0, 1.0, -1.0, 1e-30, 1e30, -1e200, 5e-324, np.inf, np.nan], len(x))
    weight = rng.choice([0.0, 0.5, 1.0, 2.5, 1e-300, 1e300], n)
    for option in OPTIONS:
        more = {**option, "reduction": "none"}
        if "weight" in option:
            more["weight"] = weight
        loss = one_by_one(numbasoft.cross_entropy, x, target, **more)
        alone = [
            numbasoft.cross_entropy_value_and_grad(x[i : i + 1], target[i : i + 1], **more)
            for i in range(len(x))
        ]
        backward = numbasoft.cross_entropy_backward
        from_special = one_by_one(backward, special, x, target, **more)
        for outer in 1, 3:
            columns, classes = across(x, outer), target.reshape(outer, -1)
            assert_same_bits(numbasoft.cross_entropy(columns, classes, axis=1, **more).reshape(-1), loss)
            grads = backward(special.reshape(outer, -1), columns, classes, axis=1, **more)
            assert_same_bits(along(grads), from_special)
            value, dx = numbasoft.cross_entropy_value_and_grad(columns, classes, axis=1, out=columns, **more)
            assert_same_bits(value.reshape(-1), np.concatenate([v for v, _ in alone]))
            assert_same_bits(along(dx), np.concatenate([d for _, d in alone]))
    ids = np.maximum(target, 0)
    assert_same_bits(
        numbasoft.token_log_probs(across(x, 3), ids.reshape(3, -1), axis=1).reshape(-1),
        one_by_one(numbasoft.token_log_probs, x, ids),
    )


@pytest.fixture
def however_few(monkeypatch):
    """Columns are done by their kernels, however few lie side by side."""
    monkeypatch.setattr(launch, "LEAST_FILLED", dict.fromkeys(launch.LEAST_FILLED, 0))


@pytest.mark.parametrize("inner", [1, 3, 7, 16, 50, 63, 64, 65, 127, 128, 129, 200, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_tiles_of_every_width_in_arrays_with_gaps(dtype, inner, however_few):
    rng = np.random.default_rng(inner)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    grown = rng.normal(0, 3, (4, 23, inner + 9)).astype(dtype)
    x = grown[::2, 1:-1, 4 : 4 + inner]
    expected = one_by_one(numbasoft.softmax, x.swapaxes(1, 2).reshape(-1, 21))
    assert_same_bits(along(numbasoft.softmax(x, 1)), expected)
    assert_same_bits(
        along(numbasoft.softmax(x[:, ::-1], 1)[:, ::-1]),
        one_by_one(numbasoft.softmax, along(x[:, ::-1]))[:, ::-1],
    )
    before = grown.copy()
    numbasoft.softmax(x, 1, out=x)
    assert_same_bits(along(x), expected)
    before[::2, 1:-1, 4 : 4 + inner] = x
    assert_same_bits(grown, before)


@pytest.mark.parametrize(
    ("dtype", "few", "enough"),
    [("float32", 7, 8), ("float64", 4, 5), ("float16", 10, 11), ("bfloat16", 20, 22)],
)
def test_columns_that_leave_vectors_nearly_empty_are_copied_to_rows(dtype, few, enough, monkeypatch):
    seen = []
    stage = arrays.stage
    monkeypatch.setattr(arrays, "stage", lambda *given: (seen.append(given[1][0].shape), stage(*given)))
    x = np.random.default_rng(0).normal(0, 3, (9, 30, enough))
    x = x.astype(getattr(ml_dtypes, dtype, dtype))
    for inner in few, enough:
        columns = x[:, :, :inner]
        alone = one_by_one(numbasoft.softmax, np.ascontiguousarray(along(columns)))
        assert_same_bits(along(numbasoft.softmax(columns, 1)), alone)
    assert seen == [(9, 30, few)]


def test_several_axes_and_fortran_order(never_staged):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 3, (6, 5, 4, 70)).astype(np.float32)
    rows = x.transpose(0, 3, 1, 2).reshape(-1, 20)
    alone = one_by_one(numbasoft.softmax, rows).reshape(6, 70, 5, 4)
    assert_same_bits(numbasoft.softmax(x, (1, 2)), alone.transpose(0, 2, 3, 1))
    matrix = rng.normal(0, 3, (300, 40)).astype(np.float32)
    assert_same_bits(numbasoft.softmax(np.asfortranarray(matrix)), one_by_one(numbasoft.softmax, matrix))
    assert_same_bits(numbasoft.logsumexp(x, (1, 2)).reshape(-1), one_by_one(numbasoft.logsumexp, rows))


def test_rows_longer_than_a_segment_are_copied_to_rows():
    x = np.random.default_rng(2).normal(0, 3, (arrays.LONGEST_COLUMN + 1, 20)).astype(np.float32)
    assert_same_bits(numbasoft.softmax(x, 0).T, one_by_one(numbasoft.softmax, np.ascontiguousarray(x.T)))
    x = x[:-1]
    assert_same_bits(numbasoft.softmax(x, 0).T, one_by_one(numbasoft.softmax, np.ascontiguousarray(x.T)))


NUMBERS = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-40,
    1e30,
    -1e30,
    3e38,
    5e-324,
    1e-7,
    88.7,
    -103.9,
    -745.1,
]


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80) | st.sampled_from([256, 600]), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-6, 1.0, 30.0, 1000.0]),
    power=st.integers(-45, 38),
    special=st.sampled_from([0.0, 0.0, 0.02, 0.6]),
)
def test_bits_of_rows_whatever_numbers_they_hold(seed, shape, dtype, spread, power, special):
    """Of logits, and of gradients from those that are tiny to those whose sums overflow."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x, g = rng.normal(0, spread, shape), rng.normal(0, 1, shape) * 10.0**power
    x, g = (
        np.where(rng.random(shape) < special, rng.choice(NUMBERS, shape), a).astype(dtype) for a in (x, g)
    )
    rows, of_g = np.ascontiguousarray(along(x)), np.ascontiguousarray(along(g))
    for forward, backward in (
        (numbasoft.softmax, numbasoft.softmax_backward),
        (numbasoft.log_softmax, numbasoft.log_softmax_backward),
    ):
        y = forward(rows)
        assert_same_bits(along(forward(x, 1)), y)
        for given_y in y, rows:
            expected = backward(of_g, given_y)
            assert_same_bits(along(backward(g, across(given_y, shape[0]), 1)), expected)
    assert_same_bits(numbasoft.logsumexp(x, 1).reshape(-1), numbasoft.logsumexp(rows))


def test_calls_in_pieces(monkeypatch):
    monkeypatch.setattr(arrays, "CALL", 4000)
    rng = np.random.default_rng(3)
    for shape in (3, 50, 200), (30, 20, 40), (1, 5000, 20):
        x, target = (
            rng.normal(0, 3, shape).astype(np.float32),
            rng.integers(0, shape[1], (shape[0], shape[2])),
        )
        rows, classes = along(x), target.reshape(-1)
        assert_same_bits(along(numbasoft.softmax(x, 1)), one_by_one(numbasoft.softmax, rows))
        assert_same_bits(
            numbasoft.cross_entropy(x, target, axis=1, reduction="none").reshape(-1),
            one_by_one(numbasoft.cross_entropy, rows, classes, reduction="none"),
        )
        g = rng.normal(0, 1, shape).astype(np.float32)
        g[0, 1, 3] = np.inf
        y = numbasoft.softmax(x, 1)
        assert_same_bits(
            along(numbasoft.softmax_backward(g, y, 1)),
            one_by_one(numbasoft.softmax_backward, along(g), along(y)),
        )
