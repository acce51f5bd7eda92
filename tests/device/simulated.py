"""Kernels in Numba's CUDA simulator: tests/test_cuda.py runs this with NUMBA_ENABLE_CUDASIM=1.

The literal kernels run here as they are; the production kernels run on the simulator's bodies
of the intrinsics (numbasoft.cuda.simulated). What only a GPU can show is in test_cuda_gpu.py:
the PTX itself, the error of ex2.approx, and memory.

Sums have no order, so the number of threads that share a row changes no bit; that is tested,
and the tests of accuracy then let one thread have a whole row, which is a thousand times faster here.
"""

import numpy as np
import oracle
import pytest
from numba import cuda, types
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from oracle import BFLOAT16, DTYPES, check, limit
from samples import (
    BACKWARD,
    FAMILIES,
    FORWARD,
    ends_of_log_softmax_backward,
    ends_of_logsumexp_backward,
    huge_logits,
    overflowing_gradients,
    sample,
)

import numbasoft
from numbasoft.cuda import calls, copies, device, geometry, literal
from numbasoft.cuda.elementary import arithmetic

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy stands in for a GPU, which warns not

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_forward = pytest.mark.parametrize("name", FORWARD)
by_name = pytest.mark.parametrize("name", FORWARD + BACKWARD)


def forget():
    for steps in calls.forward_steps, calls.backward_steps, calls.logsumexp_backward_steps:
        steps.cache_clear()
    calls.REPEATED.clear()


@pytest.fixture
def one_thread(monkeypatch):
    """Whole rows for single threads."""

    def rows_launch(n, storage, aligned, in_pairs=False):
        return geometry.Rows(max(1, geometry.vectors_spanned(n, storage, aligned)), 1, 1)

    monkeypatch.setattr(geometry, "rows_launch", rows_launch)
    monkeypatch.setattr(geometry, "segments_launch", lambda n, s, a: (rows_launch(n, s, a), n))
    monkeypatch.setattr(geometry, "column_threads", lambda n: geometry.COLUMNS)
    monkeypatch.setattr(copies, "THREADS", 16)
    forget()
    yield
    forget()


def there(array):
    """On the device, in the same layout."""
    lies_as_it_is = not array.flags.c_contiguous or array.base is not None
    return FakeCUDAArray(array) if lies_as_it_is else cuda.to_device(array)


def here(array):
    return array.copy_to_host()


def run(name, arrays, axis=-1, **options):
    options = {k: there(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return here(getattr(numbasoft, name)(*map(there, arrays), axis, **options))


def arguments(name, x, rng, axis=-1, temperature=1.0):
    """What a function takes; the results of forward passes come from the CPU."""
    if name in FORWARD:
        return [x]
    forward = getattr(numbasoft, name.removesuffix("_backward"))
    y = np.asarray(forward(x, axis, temperature=temperature))
    grad = rng.standard_normal(y.shape).astype(x.dtype)
    return [grad, x, y] if name == "logsumexp_backward" else [grad, y]


def compare(name, x, rng, axis=-1, temperature=1.0):
    given = arguments(name, x, rng, axis, temperature)
    got = run(name, given, axis, temperature=temperature)
    want = getattr(oracle, name)(*given, axis, temperature=temperature)
    check(got, want, limit(name, x.dtype), f"{name} {x.dtype} axis {axis}")
    return given, got


# --- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@by_dtype
@by_name
def test_every_family_of_rows(name, dtype, family, rng, one_thread):
    temperature = 0.7 if family in ("offset", "ramp", "magnitudes") else 1.0
    compare(name, sample(family, rng, 4, 201, dtype), rng, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.1, 1 / 3, 3.0, 1e3])
@by_dtype
@by_name
def test_temperatures(name, dtype, temperature, rng, one_thread):
    x = (1e3 + rng.normal(0, 5, (4, 33))).astype(DTYPES[dtype])
    compare(name, x, rng, temperature=temperature)


@pytest.mark.parametrize(
    ("dtype", "temperature"), [("float32", 1e-35), ("float16", 1e35), ("float64", 1e-290)]
)
@by_forward
def test_extreme_temperatures_go_by_float64(name, dtype, temperature, rng, one_thread):
    compare(name, sample("magnitudes", rng, 3, 17, dtype), rng, temperature=temperature)


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_exponential(kind):
    dtype = np.float32 if kind == "f4" else np.float64
    a, rng = arithmetic(kind), np.random.default_rng(1)
    for m, temperature in ((0.0, 1.0), (3.7, 0.7), (-55.0, 1.0), (1e3, 3.0), (1e4, 1.0), (-1e6, 0.3)):
        depth = (80 if kind == "f4" else 650) * temperature
        x = (m - rng.uniform(0, depth, 200_000)).astype(dtype)
        m = np.array([m], dtype)
        high, low = (np.array([v], dtype) for v in numbasoft.elementary.scale(temperature, kind == "f8"))
        e = a.exponential.fn(x, a.shift_of.fn(m, high, low), high, low)
        exact = np.exp((x.astype(np.longdouble) - m.astype(np.longdouble)) / np.longdouble(temperature))
        unit = np.spacing(exact.astype(dtype))
        assert (abs(e / np.longdouble(a.largest) - exact) / unit).max() < 1.2
        for power in (-90.0, 0.0, 120.0):
            shift = a.wide_shift.fn(a.shift_of.fn(m, high, low), dtype(power), high)
            root, other = a.wide_exponential.fn(x, shift, high, low)
            e = root.astype(np.longdouble) * other * np.longdouble(2) ** -power
            assert (abs(e - exact) / unit).max() < 1.2


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_log1p(kind):
    mp = pytest.importorskip("mpmath")
    dtype, a, rng = (np.float32 if kind == "f4" else np.float64), arithmetic(kind), np.random.default_rng(2)
    lowest = -30 if kind == "f4" else -290
    q = np.concatenate([10.0 ** rng.uniform(lowest, 7, 700), rng.uniform(0, 4, 700)]).astype(dtype)
    extra = rng.choice([0, 1, 2, 5, 1000], q.size).astype(dtype)
    high, low = a.log1p_of.fn(extra, q, q * dtype(0))
    with mp.workprec(200):
        for n, v, h, rest in zip(extra, q, high, low, strict=True):
            exact = mp.log1p(mp.mpf(float(n)) + mp.mpf(float(v)))
            assert abs(mp.mpf(float(h)) + mp.mpf(float(rest)) - exact) < 0.05 * np.spacing(h)


@pytest.mark.parametrize("n", [2, 3, 1000, 70_000])
def test_a_sum_of_integers_is_as_exact_as_it_says(n):
    # equal terms are the worst case: every rounding has the same sign
    a = arithmetic("f4")
    for value in (1.0, 0.3, 2.0**-20 / 3, 2.0**-40 / 3):
        e = np.full(n, value * a.largest, np.float32)
        s, lost = a.pair_of.fn(e, numbasoft.cuda.elementary.parts_of.fn(*a.sum_of.fn(e)))
        assert abs(s[0] + np.float64(lost[0]) - e.astype(np.float64).sum() / a.largest) <= n / 2**44


# --- the same bits however a row is shared out -------------------------------------------------------------


def all_ways(name, given, axis, monkeypatch):
    """The result by threads of one warp, by whole rows in single threads, in segments, and as columns."""
    yield "team", run(name, given, axis)
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "SEGMENT_THREADS", 32)
        patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
        from numbasoft.cuda import split
        from numbasoft.ops.log_softmax import cuda as log_softmax
        from numbasoft.ops.softmax import cuda as softmax

        few = lambda storage: 2 * geometry.lanes(storage)  # noqa: E731
        for module in geometry, split, softmax, log_softmax:
            patch.setattr(module, "segment_length", few)
        forget()
        for module in split, softmax, log_softmax:
            for factory in vars(module).values():
                getattr(factory, "cache_clear", lambda: None)()
        calls.compiled.cache_clear()
        yield "segments", run(name, given, axis)
    for module in split, softmax, log_softmax:
        for factory in vars(module).values():
            getattr(factory, "cache_clear", lambda: None)()
    calls.compiled.cache_clear()
    forget()
    flipped = [np.ascontiguousarray(a.T) if a.ndim == 2 else a for a in given]
    got = run(name, flipped, 0)
    yield "columns", got.T if got.ndim == 2 else got
    shifted = []
    for a in given:
        memory = np.zeros(a.size + 1, a.dtype)
        memory[1:] = a.ravel()
        shifted.append(memory[1:].reshape(a.shape))
    yield "unaligned", run(name, shifted, axis)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in FORWARD + BACKWARD]
    + [("softmax", "bfloat16"), ("log_softmax", "float64"), ("softmax_backward", "float16")],
)
def test_the_bits_depend_on_the_row_alone(name, dtype, rng, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", 32)  # a barrier costs the simulator a millisecond a thread
    monkeypatch.setattr(geometry, "column_threads", lambda n: 2 * geometry.COLUMNS)
    forget()
    x = rng.normal(0, 3, (2, 21)).astype(DTYPES[dtype])
    given = arguments(name, x, rng)
    ways = dict(all_ways(name, given, -1, monkeypatch))
    for way, got in ways.items():
        assert np.ascontiguousarray(got).tobytes() == ways["team"].tobytes(), way
    check(ways["team"], getattr(oracle, name)(*given), limit(name, x.dtype))
    alone = run(name, [a[1:] for a in given])
    assert alone.tobytes() == ways["team"][1:].tobytes()


@pytest.mark.parametrize(("name", "n"), [("softmax", 3), ("softmax", 600), ("log_softmax_backward", 130)])
def test_real_launches_of_every_kind(name, n, rng):
    # by part of a warp, by a warp, and by several warps that meet in shared memory
    x = rng.normal(0, 3, (3 if n < 100 else 1, n)).astype(np.float32)
    compare(name, x, rng)


# --- special values and masks ------------------------------------------------------------------------------

TABLE = {
    "a NaN": ([0.0, nan, 1.0], (nan, nan, nan)),
    "a NaN beside +inf": ([inf, nan, 1.0], (nan, nan, nan)),
    "+inf": ([0.0, inf, 1.0], (nan, nan, inf)),
    "two +inf": ([inf, 0.0, inf], (nan, nan, inf)),
    "all -inf": ([-inf, -inf, -inf], (nan, nan, -inf)),
}


@by_dtype
@by_forward
def test_special_rows(name, dtype, one_thread):
    rows = [row for row, _ in TABLE.values()]
    want = [answers[FORWARD.index(name)] for _, answers in TABLE.values()]
    x = np.array([[1, 2, 3], *rows]).astype(DTYPES[dtype])
    got = run(name, [x]).astype(float)
    assert np.isfinite(got[0]).all()
    for row, answer in zip(got[1:], want, strict=True):
        np.testing.assert_array_equal(row, np.full(np.shape(row), answer))


@by_dtype
def test_exact_answers(dtype, one_thread):
    d = DTYPES[dtype]
    x = np.array([[1, -inf, 2], [-inf, 3, -inf], [5, 5, 5]]).astype(d)
    soft, logs, lse = (run(name, [x]).astype(float) for name in FORWARD)
    assert soft[0, 1] == 0 and logs[0, 1] == -inf
    np.testing.assert_array_equal(soft[1], [0, 1, 0])
    assert logs[1, 1] == 0 and lse[1] == 3
    assert soft[2, 0] == soft[2, 1] == soft[2, 2] == np.array(1 / 3).astype(d)
    if dtype == "float64":
        (y,) = run("log_softmax", [np.array([[0.0, -40.0]])])
        assert y[0] == pytest.approx(-4.248354255291589e-18, rel=1e-15)


@pytest.mark.parametrize("axis", [-1, 0])
@by_dtype
@by_forward
def test_masks(name, dtype, axis, rng, one_thread):
    d = DTYPES[dtype]
    x = rng.normal(0, 3, (4, 9)).astype(d)
    where = rng.random((4, 9)) < 0.6
    where[:, 0], where[2] = True, False
    other = np.where(where, x, np.array(nan).astype(d))
    if axis == 0:
        x, other, where = x.T.copy(), other.T.copy(), where.T.copy()
    got = run(name, [other], axis, where=where)
    check(got, getattr(oracle, name)(x, axis, where=where), limit(name, d))
    row = np.moveaxis(got, axis, -1)[2] if name != "logsumexp" else got[2]
    assert (np.asarray(row).astype(float) == (0 if name == "softmax" else -inf)).all()


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (3, 1, 5)])
def test_masks_broadcast(shape, rng, one_thread):
    x, where = rng.normal(0, 3, (3, 4, 5)), rng.random(shape) < 0.7
    for axis in (-1, 1):
        got = run("softmax", [x], axis, where=np.array(where))
        check(got, oracle.softmax(x, axis, where=where), 2)


@by_dtype
def test_gradients_of_probabilities_of_zero(dtype, rng, one_thread):
    d = DTYPES[dtype]
    y = oracle.softmax(rng.normal(0, 2, (3, 40)).astype(d)).floats().astype(d)
    y[:, 1::2] = 0
    log_y = np.where(y == 0, -inf, np.log(np.where(y == 0, 1, y.astype(float)))).astype(d)
    grad = np.where(y == 0, np.array(nan).astype(d), rng.standard_normal(y.shape).astype(d))
    for name, given in (("softmax_backward", y), ("log_softmax_backward", log_y)):
        got = run(name, [grad, given])
        assert (got[:, 1::2].astype(float) == 0).all()
        check(got, getattr(oracle, name)(grad, given), limit(name, d))
        spoiled = grad.copy()
        spoiled[1, 0] = inf
        got = run(name, [spoiled, given]).astype(float)
        assert np.isfinite(got[[0, 2]]).all() and np.isnan(got[1, 0])


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e25, 1e37])
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_tiny_and_huge_gradients(name, size, rng, one_thread):
    y = arguments(name, rng.normal(0, 3, (3, 50)).astype(np.float32), rng)[1]
    grad = (size * rng.standard_normal(y.shape)).astype(np.float32)
    for temperature in (1.0, 0.1, 30.0):
        want = getattr(oracle, name)(grad, y, temperature=temperature)
        check(run(name, [grad, y], temperature=temperature), want, 4, f"T {temperature}")


def compare_backward(name, given, temperature):
    """All at once: a launch costs the simulator more than a row."""
    given = [np.concatenate(arrays) for arrays in zip(*given, strict=True)]
    got = run(name, given, temperature=temperature)
    want = getattr(oracle, name)(*given, temperature=temperature)
    check(got, want, limit(name, got.dtype), f"{name} T {temperature}")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-5, 1e20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_log_softmax_backward_at_the_ends_of_the_range(dtype, temperature, rng, one_thread):
    # the same arguments as on the CPU; bfloat16 has float32's range
    given = ends_of_log_softmax_backward(rng, DTYPES["float32" if dtype == "bfloat16" else dtype])
    given = [[a[::2].astype(DTYPES[dtype]) for a in arrays] for arrays in given]  # some of all kinds
    compare_backward("log_softmax_backward", given, temperature)


@pytest.mark.parametrize("n", [1, 5, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_of_gradients_that_overflows(dtype, n, one_thread):
    g, log_y = overflowing_gradients(n, DTYPES[dtype])
    given = (g, log_y), (g, log_y * 40), (abs(g), log_y), (abs(g), log_y * 40)
    for temperature in (1.0, 4.0, 0.5):
        compare_backward("log_softmax_backward", given, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3, 1e5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_backward_at_the_ends_of_the_range(dtype, temperature, one_thread):
    # differences that overflow, and that are subnormal until 1 / T enlarges them
    dtype = DTYPES[dtype]
    y = np.array([[0.75, 0.25], [1, 0], [2.0**-20, 1]], dtype)
    most, least = 0.99 * np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    given = [
        (g * np.ones_like(y), y) for g in np.array([[-most, most], [least, 3 * least], [most, 0]], dtype)
    ]
    compare_backward("softmax_backward", given, temperature)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.5, 1e28, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_backward_at_the_ends_of_the_range(dtype, temperature, one_thread):
    given = [
        arguments
        for size in (1e-3, 1.0, 1e10)
        for arguments in ends_of_logsumexp_backward(DTYPES[dtype], size, temperature)
    ]
    compare_backward("logsumexp_backward", given, temperature)


@pytest.mark.parametrize("temperature", [0.7, 3.0, 10.0, 1e5, 1e-5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_backward_of_huge_logits(dtype, temperature, rng, one_thread):
    given = [a[::6] for a in huge_logits(rng, DTYPES[dtype], temperature)]
    compare_backward("logsumexp_backward", [given], temperature)


# --- layouts, dtypes, results ------------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda a: a.T,
    "every other row": lambda a: a[::2],
    "every other element": lambda a: a[..., ::2],
    "reversed": lambda a: a[:, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "part": lambda a: a[1:, :, 1:5],
}


@pytest.mark.parametrize("view", VIEWS)
@by_name
def test_layouts(name, view, rng, one_thread):
    x = VIEWS[view](rng.normal(0, 3, (4, 2, 6)))
    for axis in (0, -1, (0, 2)):
        plain = arguments(name, np.ascontiguousarray(x), rng, axis)
        want = getattr(numbasoft, name)(*plain, axis)
        given = [x if p.shape == x.shape and np.array_equal(p, x) else p for p in plain]
        got = run(name, given, axis)
        np.testing.assert_allclose(got, want, rtol=2e-15, atol=1e-300)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint64"])
@by_forward
def test_integers_become_float64(name, dtype, one_thread):
    x = np.array([[0, 1, 1, 0], [1, 100, 3, 2]]).astype(dtype)
    got = run(name, [x])
    assert got.dtype == np.float64
    check(got, getattr(oracle, name)(x.astype(float)), 2)


def test_out_and_in_place(rng, one_thread):
    for axis, x in (
        (-1, rng.normal(0, 3, (3, 7))),
        (0, rng.normal(0, 3, (7, 3))),
        ((0, 2), rng.random((2, 3, 4))),
    ):
        want = numbasoft.softmax(x, axis)
        d, out = there(x), there(np.empty_like(x))
        assert numbasoft.softmax(d, axis, out=out) is out
        np.testing.assert_allclose(here(out), want, rtol=1e-15)
        assert numbasoft.softmax(d, axis, out=d) is d
        np.testing.assert_allclose(here(d), want, rtol=1e-15)
        grad = there(np.ones_like(x))
        assert numbasoft.softmax_backward(grad, d, axis, out=grad) is grad
        np.testing.assert_allclose(here(grad), 0, atol=1e-15)


def test_repeated_calls_skip_the_checks_and_nothing_else(rng, one_thread, monkeypatch):
    x, out = there(rng.normal(0, 3, (3, 8))), there(np.zeros((3, 8)))
    numbasoft.softmax(x, out=out)
    other, second = there(rng.normal(0, 3, (3, 8))), there(np.zeros((3, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(calls, "describe", None)
        assert numbasoft.softmax(other, out=second) is second
    np.testing.assert_allclose(here(second), numbasoft.softmax(here(other)), rtol=1e-15)
    for change in {"axis": 0}, {"temperature": 2.0}:
        numbasoft.softmax(other, out=second, **change)
        np.testing.assert_allclose(here(second), numbasoft.softmax(here(other), **change), rtol=1e-15)
    memory = there(np.zeros((4, 8)))
    with pytest.raises(ValueError, match="out overlaps x"):
        numbasoft.softmax(memory[:3], out=memory[1:])
    assert numbasoft.softmax(other, out=other) is other
    numbasoft.softmax_backward(x, out, out=second)
    want = here(second)
    numbasoft.softmax_backward(x, out, out=second)
    np.testing.assert_array_equal(here(second), want)


def test_logsumexp_shapes(rng, one_thread):
    x = rng.normal(0, 3, (2, 3, 4))
    for axis in (0, 1, -1, (0, 1), None):
        for keepdims in (False, True):
            got = run("logsumexp", [x], axis, keepdims=keepdims)
            want = numbasoft.logsumexp(x, axis, keepdims=keepdims)
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-15)
    out = there(np.empty((3, 4)).T)
    numbasoft.logsumexp(there(x.transpose(2, 1, 0)), -1, out=out)
    np.testing.assert_allclose(here(out), numbasoft.logsumexp(x, 0).T, rtol=1e-15)


def test_logsumexp_backward_takes_wider_lse_and_grad(rng, one_thread):
    x = rng.normal(0, 3, (3, 20)).astype(BFLOAT16)
    lse = numbasoft.logsumexp(x.astype(np.float32))
    for grad in np.ones(3, np.float32), np.ones((3, 1)), np.ones(3, BFLOAT16):
        got = run("logsumexp_backward", [grad, x, lse])
        want = numbasoft.logsumexp_backward(grad, x, lse)
        np.testing.assert_array_equal(got.astype(float), want.astype(float))


@by_forward
def test_empty_arrays(name):
    for shape, axis in (((0, 3), -1), ((3, 0), -1), ((0, 3), 0), ((2, 0, 3), 1), ((0,), None)):
        got = run(name, [np.empty(shape)], axis)
        want = getattr(numbasoft, name)(np.empty(shape), axis)
        np.testing.assert_array_equal(got, want)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: numbasoft.softmax(x, 2), IndexError, "axis"),
        (lambda x: numbasoft.softmax(x, "0"), TypeError, "axis is '0'"),
        (lambda x: numbasoft.softmax(x, temperature=0), ValueError, "temperature is 0"),
        (lambda x: numbasoft.softmax(x, out=there(np.empty((3, 4)))), ValueError, r"out has shape \(3, 4\)"),
        (
            lambda x: numbasoft.softmax(x, out=there(np.empty((2, 3), "f4"))),
            TypeError,
            "out has dtype float32",
        ),
        (lambda x: numbasoft.softmax(x, where=there(np.ones((2, 3)))), TypeError, "where has dtype float64"),
        (lambda x: numbasoft.softmax(x, where=there(np.ones(4, bool))), ValueError, "where has shape"),
        (lambda x: numbasoft.logsumexp(x, keepdims=1), TypeError, "keepdims is 1"),
        (lambda x: numbasoft.logsumexp(x, out=x), ValueError, "out has shape"),
        (lambda x: numbasoft.softmax_backward(there(np.ones((3, 2))), x), ValueError, "grad has shape"),
        (lambda x: numbasoft.softmax_backward(there(np.ones((2, 3), "f4")), x), TypeError, "grad has dtype"),
        (lambda x: numbasoft.logsumexp_backward(x, x, x), ValueError, "grad has shape"),
        (lambda x: numbasoft.softmax(there(np.ones(3, complex))), TypeError, "x has dtype complex128"),
        (lambda x: numbasoft.softmax(x, stream="main"), TypeError, "stream is 'main'"),
        (lambda x: numbasoft.softmax(x, out=np.empty((2, 3))), TypeError, "out is not"),
    ],
)
def test_errors_come_before_any_launch(call, error, sentence, monkeypatch):
    x = there(np.ones((2, 3)))
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(error, match=sentence) as caught:
        call(x)
    assert "\n" not in str(caught.value)


def test_overlap(monkeypatch):
    memory = there(np.zeros(20))
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(ValueError, match="out overlaps x"):
        numbasoft.softmax(memory[:16], out=memory[4:])


# --- what people read and build on -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_literal_kernels(axis, dtype, rng):
    x = rng.normal(0, 3, (2, 5, 3)).astype(dtype)
    for name in ("softmax", "log_softmax"):
        got = here(getattr(literal, name)(there(x), axis))
        assert got.dtype == dtype and got.shape == x.shape
        np.testing.assert_allclose(
            got, getattr(numbasoft.literal, name)(x, axis), rtol=1e-5 if dtype == "float32" else 1e-13
        )


def test_literal_worked_examples():
    y = here(literal.softmax(there(np.array([1.0, 2.0, 3.0]))))
    np.testing.assert_allclose(y, [0.09003057, 0.24472847, 0.66524096], atol=5e-9)
    x = np.array([-1.0, 10.0, 5000.0])
    np.testing.assert_array_equal(here(literal.softmax(there(x))), [0, 0, 1])
    np.testing.assert_array_equal(here(literal.log_softmax(there(x))), [-5001, -4990, 0])
    with pytest.raises(TypeError, match="x has dtype int64"):
        literal.softmax(there(np.arange(3)))
    with pytest.raises(TypeError, match=r"axis is \(0,\)"):
        literal.softmax(there(x), (0,))


def test_the_documented_kernel(rng):
    code = device.__doc__.partition("::\n\n")[2].partition("\n    attention_weights[")[0]
    namespace = {}
    exec("\n".join(line[4:] for line in code.splitlines()), namespace)
    queries, keys, d = 3, 50, 16
    scores = rng.normal(0, 4, (2 * queries, keys)).astype(np.float32)
    weights = there(np.zeros_like(scores))
    rows = len(scores)
    # the simulator keeps the launch in the kernel
    namespace["attention_weights"][-(-rows // 4), 128](there(scores), np.float32(d**-0.5), queries, weights)
    allowed = np.arange(keys) <= np.arange(rows)[:, None] % queries
    scaled = scores * np.float32(d**-0.5)
    check(here(weights), oracle.softmax(scaled, where=allowed), 2)


@pytest.mark.parametrize(("kind", "team"), [("f4", 1), ("f4", 64), ("f8", 4)])
def test_device_functions(kind, team, rng):
    dtype = np.float32 if kind == "f4" else np.float64
    n = 21
    vectors = -(-(n + 4) // (geometry.lanes(kind) * team))
    load, store = device.loader(kind, vectors), device.storer(kind, vectors)
    softmax, log_softmax, logsumexp = device.softmax(kind), device.log_softmax(kind), device.logsumexp(kind)
    CELLS, threads = device.CELLS, max(32, team)

    @cuda.jit
    def kernel(x, soft, logs, lse):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread = device.first_row(team), device.place(team)
        on = row < x.shape[0]
        row = min(row, x.shape[0] - 1)
        at = device.address_of_row(x, row)
        v = load(at, at, thread, team, n)
        y = softmax(v, team, cells)
        store(device.address_of_row(soft, row), at, thread, team, n, on, y)
        cuda.syncthreads()
        y = log_softmax(v, team, cells)
        store(device.address_of_row(logs, row), at, thread, team, n, on, y)
        cuda.syncthreads()
        y = logsumexp(v, team, cells)
        if on and thread == 0:
            lse[row] = device.first(y)

    x = rng.normal(0, 3, (2, n)).astype(dtype)
    outs = [there(np.zeros_like(x)), there(np.zeros_like(x)), there(np.zeros(2, dtype))]
    kernel[-(-2 // (threads // team)), threads](there(x), *outs)
    for name, out in zip(FORWARD, outs, strict=True):
        check(here(out), getattr(oracle, name)(x), 2)
        assert here(out).tobytes() == run(name, [x]).tobytes(), "the bits of the library's own functions"


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_push_and_merge(kind, rng):
    dtype = np.float32 if kind == "f4" else np.float64
    push, merge = device.push(kind).fn, device.merge(kind).fn
    x = rng.normal(0, 20, 4000).astype(dtype)
    halves = []
    for half in np.split(x, 2):
        m, s, lost = np.array([-inf], dtype), np.zeros(1, dtype), np.zeros(1, dtype)
        for piece in np.split(half, 50):
            m, s, lost = push(m, s, lost, piece)
        halves.append((m, s, lost))
    m, s, lost = merge(*halves[0], *halves[1])
    assert m[0] == x.max()
    exact = np.exp(x.astype(np.longdouble) - x.max()).sum()
    assert abs(s[0] + np.longdouble(lost[0]) - exact) <= 3 * np.spacing(dtype(exact))
    exp, log1p = device.exp_below(kind).fn, device.log1p(kind).fn
    np.testing.assert_allclose(
        exp(np.array([-1, -2], dtype), np.zeros(1, dtype)), np.exp([-1, -2]), rtol=3e-7
    )
    np.testing.assert_allclose(log1p(np.array([1e-9, 2], dtype)), np.log1p([1e-9, 2]), rtol=3e-7)


def test_device_factories_name_what_is_wrong():
    with pytest.raises(ValueError, match="kind is 'f2'"):
        device.softmax("f2")
    with pytest.raises(ValueError, match="kind is 'i4'"):
        device.loader("i4", 1)
