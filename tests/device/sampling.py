"""Draws in Numba's CUDA simulator: tests/test_cuda.py runs this as it runs simulated.py."""

import numpy as np
import pytest
from oracle import BFLOAT16, DTYPES
from simulated import forget, here, there

import numbasoft
from numbasoft import counter
from numbasoft.cuda import calls, copies, geometry, jit
from numbasoft.cuda.counter import fractions
from numbasoft.ops.sample import cuda as kernels

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def blocks(monkeypatch):
    """``blocks(threads, group)``: launches of so few threads; a barrier costs the simulator a millisecond each."""

    def patch(threads, group):
        monkeypatch.setattr(geometry, "draw_launch", lambda n, storage: (threads, group))
        monkeypatch.setattr(geometry, "relaxed_threads", lambda n: threads)
        forget()

    monkeypatch.setattr(copies, "THREADS", 16)
    patch(4, 2)
    yield patch
    forget()


def sample(x, **options):
    drawn = numbasoft.sample(there(x), **options)
    assert here(drawn).dtype == np.int64
    return here(drawn)


def same_as_on_the_cpu(x, **options):
    drawn = sample(x, **options)
    np.testing.assert_array_equal(drawn, numbasoft.sample(x, **options))
    return drawn


# --- random numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 7, -(2**63), 2**63 - 1, -1])
def test_random_numbers_are_those_of_the_cpu(key):
    for row, block in (0, 0), (2**40 + 3, 5), (12345, 2**31):
        for stream in counter.DRAW, counter.NOISE:
            got = fractions.fn(np.int64(key), np.int64(row), np.int64(block), stream)
            want = counter.uniforms(np.int64(key), row, block, stream)
            assert [int(g) % 2**64 / 2**64 for g in got] == list(want)


def test_draws_follow_the_probabilities(blocks):
    blocks(2, 2)
    p = np.array([0.4, 0.1, 0.3, 0.2])
    x = np.tile(np.log(p), (120, 1)).astype("f2")
    p = np.exp(x[0].astype("f8")) / np.exp(x[0].astype("f8")).sum()
    counts = np.bincount(same_as_on_the_cpu(x, rng=11), minlength=4)
    assert ((counts - 120 * p) ** 2 / (120 * p)).sum() < 16.27  # chi-square of 3 degrees, 1e-3


# --- the CPU's draws ---------------------------------------------------------------------------------------

OPTIONS = {
    "all": {}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.2},
    "every one": {"top_k": 5, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_draws_are_those_of_the_cpu(dtype, case, rng, blocks):
    x = rng.normal(0, 2, (2, 19)).astype(DTYPES[dtype])
    x[1, ::4] = -inf
    same_as_on_the_cpu(x, rng=5, **OPTIONS[case])


def test_draws_from_one_group_and_from_many(rng, blocks):
    for threads, group, n in (4, 4, 11), (8, 2, 40), (8, 4, 150):
        blocks(threads, group)
        same_as_on_the_cpu(rng.normal(0, 3, (1, n)).astype("f4"), rng=5, top_p=0.9)
    same_as_on_the_cpu(rng.normal(0, 3, (3, 1)), rng=5, top_k=1)


def test_real_launches(rng):
    same_as_on_the_cpu(rng.normal(0, 2, (1, 7)).astype("f4"), rng=2, top_k=3)
    assert geometry.draw_launch(200, "f4") == (64, 32)
    same_as_on_the_cpu(rng.normal(0, 2, (1, 200)).astype("f4"), rng=2)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(top_k=2), {0, 1}), (dict(top_p=0.5), {0, 1, 2}), (dict(top_k=5, top_p=0.4), {0, 1}),
        (dict(min_p=1), set(range(6))), (dict(top_k=99), set(range(6))), (dict(top_p=1e-300), {0}),
    ],
)  # fmt: skip
def test_of_equal_classes_the_first_are_kept(options, kept, blocks):
    assert set(same_as_on_the_cpu(np.zeros((5, 6), "f4"), rng=1, **options)) <= kept


def test_ties_at_the_bound(blocks):
    x = np.zeros((3, 9), "f4")
    x[:, 4] = 1  # e / (e + 8) is 0.254, and each of the others 0.093
    for options, kept in (
        (dict(top_k=3), {0, 1, 4}), (dict(top_p=0.34), {0, 4}), (dict(min_p=0.5), {4}),
        (dict(top_k=4, top_p=0.7), {0, 1, 4}),
    ):  # fmt: skip
        assert set(same_as_on_the_cpu(x, rng=3, **options)) <= kept


def test_extreme_temperatures_and_logits(rng, blocks):
    x = rng.normal(0, 2, (2, 7)).astype("f4")
    np.testing.assert_array_equal(same_as_on_the_cpu(x, temperature=1e-35, rng=1), x.argmax(1))
    same_as_on_the_cpu(x, temperature=1e35, rng=1)
    x = np.full((3, 5), -inf, "f4")
    x[:, 2] = -3e38
    assert (same_as_on_the_cpu(x, rng=1) == 2).all()
    same_as_on_the_cpu(np.float32([[1e30, 1e30, -1e30, 1e30]]), rng=1, top_p=0.9)


def test_rows_without_probabilities(rng, blocks):
    x = rng.normal(0, 1, (6, 3)).astype("f4")
    x[1, 2], x[2, 0], x[3], x[4, :2] = nan, inf, -inf, (inf, nan)
    want = numbasoft.sample(np.where(np.isfinite(x), x, 0), rng=4)
    for options in {}, dict(top_k=2, top_p=0.5):
        drawn = sample(x, rng=4, **options)
        np.testing.assert_array_equal(drawn[1:5], [-1] * 4)
        assert (drawn[[0, 5]] >= 0).all()
    np.testing.assert_array_equal(sample(x, rng=4)[[0, 5]], want[[0, 5]])


# --- a row's draw depends on nothing else -------------------------------------------------------------------


def test_a_draw_depends_on_seed_row_number_and_row_alone(rng, blocks):
    x = rng.normal(0, 2, (4, 30)).astype("f4")
    options = dict(rng=9, top_k=20, top_p=0.95)
    drawn = same_as_on_the_cpu(x, **options)
    for threads, group in (8, 4), (8, 2):
        blocks(threads, group)
        np.testing.assert_array_equal(sample(x, **options), drawn)
    blocks(4, 2)
    np.testing.assert_array_equal(sample(x[:1], **options), drawn[:1])
    moved = np.zeros(x.size + 1, "f4")
    moved[1:] = x.ravel()
    np.testing.assert_array_equal(sample(moved[1:].reshape(x.shape), **options), drawn)
    np.testing.assert_array_equal(sample(x.T.copy(), axis=0, **options), drawn)


def test_layouts_and_dtypes(rng, blocks):
    x = rng.normal(0, 2, (2, 2, 5))
    for view, axis in (x, 1), (x[:, ::-2], -1), (x.T, 0), (x[0, 0], 0), (np.broadcast_to(x[:1], x.shape), 2):
        want = numbasoft.sample(view, axis=axis, rng=8, top_k=4)
        got = sample(view, axis=axis, rng=8, top_k=4)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)
    same_as_on_the_cpu(np.round(x[0]).astype("i4"), rng=8)
    assert sample(x[:0], rng=1).shape == (0, 2)
    first, second = np.random.default_rng(1), np.random.default_rng(1)
    np.testing.assert_array_equal(sample(x[0], rng=first), numbasoft.sample(x[0], rng=second))


@pytest.mark.parametrize("name", ["sample", "gumbel_softmax"])
@pytest.mark.parametrize(
    ("shape", "options", "error", "sentence"),
    [
        ((2, 0), {}, ValueError, "at least one class"), ((2, 3), dict(axis=2), IndexError, "axis 2"),
        ((2, 3), dict(temperature=0), ValueError, "temperature is 0"),
        ((2, 3), dict(rng="seed"), TypeError, "rng is 'seed'"),
        ((2, 3), dict(top_k=0), ValueError, "top_k is 0"), ((2, 3), dict(top_p=0), ValueError, "top_p is 0"),
        ((2, 3), dict(min_p=2), ValueError, "min_p is 2"), ((2, 3), dict(hard=1), TypeError, "hard is 1"),
        ((2, 3), dict(out=np.zeros((3, 2))), ValueError, "out has shape"),
    ],
)  # fmt: skip
def test_errors_come_before_any_launch(name, shape, options, error, sentence, monkeypatch):
    own = {"sample": {"top_k", "top_p", "min_p"}, "gumbel_softmax": {"hard", "out"}}
    if set(options) & set().union(*own.values()) - own[name]:
        return
    monkeypatch.setattr(calls, "run", None)
    options = {k: there(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with pytest.raises(error, match=sentence):
        getattr(numbasoft, name)(there(np.ones(shape)), **options)
    with pytest.raises(TypeError, match=r"is on a CUDA device and .* is not"):
        numbasoft.gumbel_softmax(there(np.ones((2, 3))), out=np.ones((2, 3)))


# --- softmax with noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_noise_is_rounded_once(kind, rng):
    mp = pytest.importorskip("mpmath")
    dtype, add = np.dtype(kind).type, kernels.noise(kind).fn
    given = [2**11, 3 << 11, -(2**11), -(3 << 11), 2**63 - 2**11, -(2**63) + 2**11, 6148914691236517888]
    given += [int(v) * 2**12 + 2**11 for v in rng.integers(-(2**51), 2**51, 200)]
    with mp.workprec(120):
        for fraction in given:
            for x in 0.0, 3.25:
                exact = x - mp.log(-mp.log(mp.mpf(fraction % 2**64) / 2**64))
                (z,) = add(np.array([x], dtype), np.int64(fraction))
                # near 0 to an ULP of 1: there it matters no more
                assert abs(mp.mpf(float(z)) - exact) < 0.51 * np.spacing(dtype(max(1, abs(z))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_with_noise_is_that_of_the_cpu(dtype, rng, blocks):
    x = rng.normal(0, 2, (2, 13)).astype(DTYPES[dtype])
    for options in {"temperature": 0.8}, {"hard": True}:
        got, want = here(numbasoft.gumbel_softmax(there(x), rng=5, **options)), numbasoft.gumbel_softmax(
            x, rng=5, **options
        )  # fmt: skip
        assert got.dtype == x.dtype
        tolerance = 32 * float(np.spacing(np.array(1, x.dtype))) / (16 if x.itemsize == 2 else 1)
        np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=tolerance)


def test_noise_in_other_layouts(rng, blocks):
    x = rng.normal(0, 2, (2, 3, 2)).astype("f4")
    x[0, 1, 1], x[1, 2, 1] = -inf, nan
    for hard in False, True:
        want = numbasoft.gumbel_softmax(x, axis=1, rng=3, hard=hard)
        got = here(numbasoft.gumbel_softmax(there(x), axis=1, rng=3, hard=hard))
        np.testing.assert_allclose(got, want, rtol=3e-6)
    plain = here(numbasoft.gumbel_softmax(there(x), rng=3))
    for view in x[:, :, ::-1], x[::2]:
        want = numbasoft.gumbel_softmax(view, rng=3)
        np.testing.assert_allclose(here(numbasoft.gumbel_softmax(there(view), rng=3)), want, rtol=3e-6)
    blocks(2, 2)
    d = there(x.copy())
    assert numbasoft.gumbel_softmax(d, rng=3, out=d) is d
    assert here(d).tobytes() == plain.tobytes()
    out = np.zeros((2, 3, 4), BFLOAT16)[..., ::2]
    d = there(out)
    numbasoft.gumbel_softmax(there(x.astype(BFLOAT16)), rng=3, out=d, hard=True)
    want = numbasoft.gumbel_softmax(x.astype(BFLOAT16), rng=3, hard=True)
    np.testing.assert_array_equal(here(d).astype("f8"), want.astype("f8"))  # NaN equals itself there
    assert here(numbasoft.gumbel_softmax(there(x[:0]), rng=3)).shape == (0, 3, 2)


def test_one_class_of_a_row_that_float32_does_not_count(monkeypatch):
    n = 2**24 + 3
    for module in geometry, kernels:
        monkeypatch.setitem(module.DRAW_VECTORS, "f4", 1 << 18)
    kernels.hardened.cache_clear()
    kernel, signature = kernels.hardened("f4")
    try:
        launch = jit.kernel(kernel, signature, 2)[1, 2, 0]
    finally:
        kernels.hardened.cache_clear()
    y = np.zeros(n, "f4")
    y[-2:] = 0.5
    launch(y.ctypes.data, 0, n, -inf, y.ctypes.data, 0)
    assert np.flatnonzero(y) == n - 2
