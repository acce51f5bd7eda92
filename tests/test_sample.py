"""Draws follow the probabilities, keep to what is left in, and depend on seed, row number and row alone."""

import numba
import numpy as np
import pytest
from oracle import DTYPES

import numbasoft
from numbasoft import gumbel_softmax, sample
from numbasoft.counter import philox, uniforms

pytest.importorskip("scipy", reason="SciPy is not installed, which tests the draws")
from scipy import stats

P = np.array([0.4, 0.02, 0.3, 0.03, 0.15, 0.1])
ROWS = 30_000
LEFT = {
    "all": ({}, [0, 1, 2, 3, 4, 5]),
    "top_k": ({"top_k": 3}, [0, 2, 4]),
    "top_p": ({"top_p": 0.75}, [0, 2, 4]),
    "top_p of a whole": ({"top_p": 0.7 - 1e-6}, [0, 2]),
    "min_p": ({"min_p": 0.24}, [0, 2, 4, 5]),
    "top_p of what top_k leaves": ({"top_k": 4, "top_p": 0.6}, [0, 2]),
    "top_k above the classes": ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
}


def test_philox_gives_its_published_numbers():
    # the known answers of Random123, the authors' own implementation
    for words, answer in (
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        assert [int(w) for w in philox(*map(np.uint64, words))] == answer


def test_uniforms_are_uniform_and_never_0_or_1():
    u = np.array([uniforms(12345, row, 0, 0) for row in range(4000)])
    assert 0 < u.min() and u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.05


@pytest.mark.parametrize("case", LEFT)
def test_draws_follow_the_probabilities(case):
    options, left = LEFT[case]
    logits = np.tile(np.log(P) * 0.7, (ROWS, 1)).astype("f4")
    drawn = sample(logits, temperature=0.7, rng=11, **options)
    assert drawn.dtype == np.int64 and drawn.shape == (ROWS,)
    counts = np.bincount(drawn, minlength=len(P))
    assert counts.sum() == counts[left].sum() == ROWS
    if len(left) > 1:
        assert stats.chisquare(counts[left], P[left] / P[left].sum() * ROWS).pvalue > 1e-3


def test_wide_rows(rng):
    x = rng.normal(0, 1, 40_000).astype("f4")
    p = numbasoft.softmax(x.astype("f8"))
    drawn = sample(np.broadcast_to(x, (3000, 40_000)), rng=3)
    # by deciles of the probability
    edges = np.searchsorted(p.cumsum(), np.linspace(0, 1, 11)[1:-1])
    parts = np.bincount(np.searchsorted(edges, drawn), minlength=10)
    wanted = np.diff(np.concatenate([[0], p.cumsum()[edges], [1]]))
    assert stats.chisquare(parts, wanted * 3000).pvalue > 1e-3
    top = np.argsort(-p, kind="stable")
    assert np.isin(sample(np.broadcast_to(x, (300, 40_000)), top_k=50, rng=4), top[:50]).all()
    nucleus = top[: np.searchsorted(p[top].cumsum(), 0.5) + 1]
    assert np.isin(sample(np.broadcast_to(x, (300, 40_000)), top_p=0.5, rng=4), nucleus).all()


def test_of_equal_classes_the_first_are_kept():
    x = np.zeros((2000, 6), "f4")
    assert set(sample(x, top_k=2, rng=0)) == {0, 1}
    assert set(sample(x, top_p=0.5, rng=0)) == {0, 1, 2}
    x[:, 4] = 1  # e / (e + 5) is 0.352, and each of the others 0.13
    assert set(sample(x, top_k=3, rng=0)) == {0, 1, 4}
    assert set(sample(x, top_p=0.45, rng=0)) == {0, 4}
    assert set(sample(x, min_p=1, rng=0)) == {4}


def test_what_is_ruled_out_is_never_drawn():
    x = np.full((5000, 4), -np.inf, "f4")
    x[:, 2] = -1e30
    assert (sample(x, rng=1) == 2).all()
    x[:, 1] = -1e30
    assert set(sample(x, rng=1)) == {1, 2}
    assert sample(np.array([3.0]), rng=1) == 0


def test_a_draw_depends_on_seed_row_number_and_row_alone(rng):
    x = rng.normal(0, 2, (400, 300)).astype("f4")
    options = dict(top_k=100, top_p=0.95, temperature=1.3)
    drawn = sample(x, rng=5, **options)
    np.testing.assert_array_equal(drawn[:7], sample(x[:7], rng=5, **options))
    others = x.copy()
    others[::2] = 0
    np.testing.assert_array_equal(drawn[1::2], sample(others, rng=5, **options)[1::2])
    np.testing.assert_array_equal(drawn, sample(x.T.copy(), axis=0, rng=5, **options))
    np.testing.assert_array_equal(drawn.reshape(20, 20), sample(x.reshape(20, 20, 300), rng=5, **options))
    assert (drawn != sample(x, rng=6, **options)).mean() > 0.5
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        np.testing.assert_array_equal(drawn, sample(x, rng=5, **options))
    finally:
        numba.set_num_threads(before)
    first, second = np.random.default_rng(1), np.random.default_rng(1)
    np.testing.assert_array_equal(sample(x, rng=first), sample(x, rng=second))
    assert (sample(x, rng=first) != sample(x, rng=1)).any()
    assert (sample(x) != sample(x)).any()


def test_sixteen_bits_and_extreme_temperatures(rng):
    x = rng.normal(0, 2, (50, 40)).astype("f2")
    np.testing.assert_array_equal(sample(x, rng=1), sample(x.astype("f4"), rng=1))
    np.testing.assert_array_equal(sample(x, temperature=1e-200, rng=1), x.argmax(1))
    assert len(set(sample(x, temperature=1e200, rng=1))) > 10


def test_gumbel_softmax():
    logits = np.tile(np.log(P), (ROWS, 1)).astype("f4")
    y = gumbel_softmax(logits, temperature=0.5, rng=2)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)
    counts = np.bincount(y.argmax(1), minlength=len(P))
    assert stats.chisquare(counts, P * ROWS).pvalue > 1e-3
    hard = gumbel_softmax(logits, temperature=0.5, hard=True, rng=2)
    np.testing.assert_array_equal(hard, np.eye(6)[y.argmax(1)])
    np.testing.assert_array_equal(gumbel_softmax(logits[:9], temperature=0.5, rng=2), y[:9])
    place = logits[:9].copy()
    assert gumbel_softmax(place, temperature=0.5, rng=2, out=place) is place
    np.testing.assert_array_equal(place, y[:9])
    # the noise itself: y's logits less x, up to a constant of the row, is a difference of Gumbel numbers: logistic
    noise = 0.5 * (np.log(y[:, 0].astype("f8")) - np.log(y[:, 2])) - np.log(P[0] / P[2])
    assert stats.kstest(noise[np.isfinite(noise)], "logistic").pvalue > 1e-3


BAD = {
    "top_k 0": (dict(top_k=0), ValueError, "top_k is 0, but must be at least 1"),
    "top_k float": (dict(top_k=2.0), TypeError, "top_k is 2.0, but must be an int"),
    "top_p 0": (dict(top_p=0), ValueError, "top_p is 0, but must be above 0"),
    "top_p 1.5": (dict(top_p=1.5), ValueError, "top_p is 1.5"),
    "min_p": (dict(min_p=-0.1), ValueError, "min_p is -0.1"),
    "temperature": (dict(temperature=0), ValueError, "temperature is 0"),
    "seed": (dict(rng=-1), ValueError, "rng is -1, but a seed must not be negative"),
    "rng": (dict(rng="seed"), TypeError, "rng is 'seed'"),
    "axis": (dict(axis=5), np.exceptions.AxisError, "axis 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        sample(np.zeros((2, 3)), **options)


def test_rows_without_probabilities():
    for value in (np.nan, np.inf, -np.inf):
        x = np.zeros((2, 3, 4))
        x[1, 2] = value
        with pytest.raises(ValueError, match=r"in row \(1, 2\): no probabilities to draw from"):
            sample(x, rng=1)
    with pytest.raises(ValueError, match="at least one class"):
        sample(np.zeros((2, 0)))
    assert sample(np.zeros((0, 3))).shape == (0,)
    for hard in False, True:
        x = np.array([[0, np.nan], [-np.inf, -np.inf], [0, np.inf], [0, -np.inf]])
        for dtype in DTYPES.values():
            y = gumbel_softmax(x.astype(dtype), hard=hard, rng=1)
            np.testing.assert_array_equal(y.astype("f8"), [[np.nan] * 2] * 3 + [[1, 0]])
            y = gumbel_softmax(x.astype(dtype).T, axis=0, hard=hard, rng=1)
            np.testing.assert_array_equal(y.astype("f8").T, [[np.nan] * 2] * 3 + [[1, 0]])
    with pytest.raises(TypeError, match="hard is 1"):
        gumbel_softmax(np.zeros(3), hard=1)
    with pytest.raises(ValueError, match="out has shape"):
        gumbel_softmax(np.zeros(3), out=np.zeros(4))
