"""Kernels in Numba's CUDA simulator: tests/test_cuda.py runs this with NUMBA_ENABLE_CUDASIM=1.

The literal kernels run here as they are; the production kernels run on the simulator's bodies
of the intrinsics (numbasoft.cuda.simulated). What only a GPU can show is in test_cuda_gpu.py:
the PTX itself, the error of ex2.approx, and memory.

Sums have no order, so the number of threads that share a row changes no bit; that is tested,
and the tests of accuracy then let one thread have a whole row, which is a thousand times faster here.
"""

import contextlib
import itertools
import sys
from types import SimpleNamespace

import elements_oracle
import numpy as np
import oracle
import pytest
from elements_oracle import ulps
from losses_oracle import plain_divergence
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
    some,
    subnormal_probabilities,
)

import numbasoft
from numbasoft.cuda import (
    arrays,
    calls,
    class_losses,
    copies,
    device,
    divergence,
    elementwise,
    fits,
    geometry,
    literal,
    sampling,
    team,
)
from numbasoft.cuda.elementary import arithmetic
from numbasoft.cuda.quotients import quotients

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
    for module in elementwise, divergence, class_losses, sampling, fits:
        clear_caches(module)
    calls.REPEATED.clear()


def clear_caches(module):
    for function in vars(module).values():
        getattr(function, "cache_clear", lambda: None)()


@pytest.fixture
def one_thread(monkeypatch):
    """Whole rows for single threads."""

    def rows_launch(n, storage, aligned, in_pairs=False, heavy=False):
        return geometry.Rows(max(1, geometry.vectors_spanned(n, storage, aligned)), 1, 1)

    monkeypatch.setattr(geometry, "rows_launch", rows_launch)
    monkeypatch.setattr(geometry, "segments_launch", lambda n, s, a, *_: (rows_launch(n, s, a), n))
    few_columns(monkeypatch)
    monkeypatch.setattr(geometry, "column_threads", lambda n, *_: geometry.COLUMNS)
    monkeypatch.setattr(copies, "THREADS", 16)
    monkeypatch.setattr(geometry, "TOTAL_THREADS", 2)
    forget()
    yield
    forget()


def few_columns(monkeypatch):
    """Two columns side by side in a block, and so a sixteenth of the threads."""
    for module in geometry, team:
        monkeypatch.setattr(module, "COLUMNS", 2)


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


@some(1, {"name,dtype": itertools.product(FORWARD + BACKWARD, DTYPES), "family": FAMILIES})
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
def test_sums_of_terms_that_are_rounded_alike(kind):
    """As in test_accuracy: where most terms are equal a sum would miss what rounding them lost."""
    dtype = np.float32 if kind == "f4" else np.float64
    a, rng = arithmetic(kind), np.random.default_rng(3)
    factor, quotient = quotients(kind)
    high, low = (np.array([v], dtype) for v in numbasoft.elementary.scale(1.0, kind == "f8"))
    for x in sample("repeated", rng, 100, 2048, np.dtype(dtype).name):
        m = x.max(keepdims=True)
        e, lost = a.exponential_and_rest.fn(x, a.shift_of.fn(m, high, low), high, low)
        total = numbasoft.cuda.elementary.parts_of.fn(*a.exact_sum_of.fn(e, lost))
        y = quotient.fn(e, factor.fn(m, total), False)
        exact = np.exp(x.astype(np.longdouble) - m)
        exact /= exact.sum()
        assert (abs(y - exact) / np.spacing(exact.astype(dtype))).max() <= 2


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
        patch.setattr(geometry, "SEGMENT_THREADS", 4)
        patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
        from numbasoft.cuda import split
        from numbasoft.ops.log_softmax import cuda as log_softmax
        from numbasoft.ops.softmax import cuda as softmax

        few = lambda storage: 2 * geometry.lanes(storage)  # noqa: E731
        for module in geometry, split, softmax, log_softmax:
            patch.setattr(module, "segment_length", few)
        clear(split, softmax, log_softmax)
        yield "segments", run(name, given, axis)
    clear(split, softmax, log_softmax)
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
    few_columns(monkeypatch)
    monkeypatch.setattr(geometry, "BLOCK", 16)  # a barrier costs the simulator a millisecond a thread
    monkeypatch.setattr(geometry, "column_threads", lambda n, *_: 2 * geometry.COLUMNS)
    forget()
    x = rng.normal(0, 3, (2, 21)).astype(DTYPES[dtype])
    given = arguments(name, x, rng)
    ways = dict(all_ways(name, given, -1, monkeypatch))
    for way, got in ways.items():
        assert np.ascontiguousarray(got).tobytes() == ways["team"].tobytes(), way
    check(ways["team"], getattr(oracle, name)(*given), limit(name, x.dtype))
    alone = run(name, [a[1:] for a in given])
    assert alone.tobytes() == ways["team"][1:].tobytes()


@pytest.fixture
def one_thread_a_segment(monkeypatch):
    """Segments of a million float32, each in a single thread."""
    from numbasoft.cuda import split
    from numbasoft.ops.cross_entropy import cuda as cross_entropy
    from numbasoft.ops.kl_divergence import cuda as divergence
    from numbasoft.ops.log_softmax import cuda as log_softmax
    from numbasoft.ops.softmax import cuda as softmax

    modules = split, log_softmax, softmax, cross_entropy, divergence
    for vectors in geometry.SEGMENT_VECTORS, geometry.LAST_VECTORS, geometry.PIECE_VECTORS:
        monkeypatch.setitem(vectors, "f4", 1 << 18)
    monkeypatch.setattr(geometry, "SEGMENT_THREADS", 1)
    clear(*modules)
    yield
    monkeypatch.undo()
    clear(*modules)


def test_very_long_rows_of_terms_below_the_unit(one_thread_a_segment):
    check_terms_below_the_unit()


def check_terms_below_the_unit():
    # so many halves of a unit were several ULP: all are rounded in one direction
    n, dtype = 10_000_000, np.float32
    x = np.full((1, n), np.log(2.0**-45), dtype)
    x[0, 0] = 0
    exact = np.exp(x[0, :2].astype(np.longdouble))
    total = 1 + (n - 1) * exact[1]
    got = run("softmax", [x])[0, [0, 1, -1]]
    want = exact[[0, 1, 1]] / total
    assert (abs(got - want) / np.spacing(want.astype(dtype))).max() < 2
    x[0, 1:] -= 1
    x[0, 1] = -1
    total = np.exp(x[0, :3].astype(np.longdouble)) @ [1, 1, n - 2]
    got = run("log_softmax", [x])[0, 0]
    assert abs(got + np.log(total)) < 2 * np.spacing(np.log(total).astype(dtype))
    # of the gradient the largest term is 1, and the others' signs are the same
    y = np.full((1, n), 2.0**-45 * 1.98, dtype)
    y[0, 0] = 1
    g = np.ones_like(y)
    total = 1 + (n - 1) * np.longdouble(y[0, 1])
    got = run("softmax_backward", [g, y])[0, 0]
    assert abs(got - (1 - total)) < 4 * np.spacing(dtype(1))
    got = run("log_softmax_backward", [y, np.zeros_like(y)])[0, 0]
    assert abs(got - (1 - total)) < 4 * np.spacing(dtype(1))


def test_very_long_rows_of_losses_below_the_unit(one_thread_a_segment):
    n, dtype = 6_000_000, np.float32
    x = np.full((1, n), -40, dtype)
    x[0, :2] = 0, -1 - 2**-22
    q = np.full_like(x, 0.999 * 2.0**-44 / 40)
    q[0, :2] = 0, 1 - 2**-23
    a, b, small = np.longdouble(x[0, 1]), np.longdouble(q[0, 1]), (n - 2) * np.longdouble(q[0, 2])
    lse = np.log(1 + np.exp(a) + (n - 2) * np.exp(np.longdouble(-40)))
    want = b * (lse - a) + small * (lse + 40)
    got = call("cross_entropy", x, q, reduction="none")[0]
    assert abs(got - want) < 2 * np.spacing(dtype(want))
    # the largest term is above 1, and those of the classes that p rules out are their probabilities
    x[0, 1:] = -inf
    y = np.full_like(x, np.log(0.99 * 2.0**-44))
    y[0, :2] = -1.99, np.log1p(-np.exp(-1.99))
    want = np.log(np.exp(y[0, :3].astype(np.longdouble)) @ [1, 1, n - 2]) - y[0, 0]
    got = call("kl_divergence", x, y, reduction="none")[0]
    assert abs(got - want) < 2 * np.spacing(dtype(want))


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
    compare_backward("softmax_backward", [subnormal_probabilities(dtype)], temperature)


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


@some(3, {"name": FORWARD + BACKWARD, "view": VIEWS})
def test_layouts(name, view, rng, one_thread):
    x = VIEWS[view](rng.normal(0, 3, (4, 2, 6)))
    for axis in (0, -1, (0, 2)):
        plain = arguments(name, np.ascontiguousarray(x), rng, axis)
        want = getattr(numbasoft, name)(*plain, axis)
        given = [x if p.shape == x.shape and np.array_equal(p, x) else p for p in plain]
        got = run(name, given, axis)
        np.testing.assert_allclose(got, want, rtol=2e-15, atol=1e-300)


def test_more_axes_than_a_copy_takes(rng, one_thread):
    x = rng.normal(0, 3, (2, 3, 1, 2, 2, 2, 3))
    for axis in (0, 3, 5), (1, 4, 6):
        np.testing.assert_allclose(run("softmax", [x], axis), numbasoft.softmax(x, axis), rtol=2e-15)


def test_a_stride_that_is_never_taken_may_be_any(one_thread):
    x = np.lib.stride_tricks.as_strided(np.arange(3.0), (1, 3), (3, 8))
    np.testing.assert_array_equal(run("softmax", [x]), numbasoft.softmax(np.arange(3.0))[None])


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


def test_memory_of_pytorch_belongs_to_the_stream_that_is_launched_into(monkeypatch):
    # not to one of its pool, which is what its ExternalStream of 0 is
    current = ["current"]

    @contextlib.contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    of_cuda = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=7), default_stream=lambda device: "default",
        ExternalStream=lambda handle, device: handle or "of the pool", stream=within,
    )  # fmt: skip
    torch = SimpleNamespace(
        cuda=of_cuda, float32="float32", device=lambda *which: which, empty=lambda *a, **o: current[-1]
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    for handle, stream in (7, "current"), (0, "default"), (1, "default"), (9, 9):
        assert arrays.TORCH.empty((2,), "f4", SimpleNamespace(ordinal=0), handle) == stream


def test_the_current_stream_of_cupy_is_that_of_the_array_s_device(monkeypatch):
    of_cuda = SimpleNamespace(get_current_stream=lambda device=0: SimpleNamespace(ptr=100 + device))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=of_cuda))
    assert arrays.CUPY.current_stream(1) == 101


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
        (lambda x: numbasoft.softmax(x, stream=-5), ValueError, "stream is -5"),
        (lambda x: numbasoft.softmax(x, stream=2**64), ValueError, "stream is 18446744073709551616"),
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


# --- element by element ------------------------------------------------------------------------------------

LOGITS = [0.0, -0.0, 1e-30, -1e-8, 0.3, -2.5, 17.0, -40.0, 88.0, -95.0, 103.0, -103.5, 700.0, -745.0]


def call(name, *given, **options):
    result = getattr(numbasoft, name)(*(there(np.asarray(a)) for a in given), **options)
    return here(result)


def logits_and_targets(rng, dtype, n=120):
    x = np.concatenate([LOGITS, rng.normal(0, 3, n), rng.normal(0, 30, n)])
    x = np.clip(x, -700 if dtype == "float64" else -90, 700).astype(DTYPES[dtype])
    t = rng.random(x.size).astype(x.dtype)
    t[::3], t[1::3] = 0, 1
    return x, t


@pytest.fixture
def many_digits():
    import mpmath

    with mpmath.workdps(60):
        yield


def bound(dtype, forward=True):
    """16-bit results are rounded once: forward passes from what is accurate to 2**-18, gradients from float32."""
    return 0.51 if dtype in ("float16", "bfloat16") else 2.5 if forward else 4


@by_dtype
def test_sigmoid_and_logit(dtype, rng, one_thread, many_digits):
    x, _ = logits_and_targets(rng, dtype)
    y = call("sigmoid", x)
    assert ulps(y, elements_oracle.sigmoid(x)) < bound(dtype)
    g = rng.standard_normal(x.size).astype(x.dtype)
    assert ulps(call("sigmoid_backward", g, y), elements_oracle.sigmoid_backward(g, y)) < bound(dtype)
    p = np.concatenate(
        [rng.random(150), 0.5 + rng.normal(0, 1e-2, 50), [0.25, 0.5, 0.75, 1e-5, 6e-8, 0.9999]]
    )
    lowest = {"float64": [1e-300, 5e-324, 1e-310], "float16": []}.get(dtype, [1e-38, 1e-40])
    p = np.concatenate([p, lowest]).astype(x.dtype)
    p = p[(p > 0) & (p < 1)]
    assert ulps(call("logit", p), elements_oracle.logit(p)) < bound(dtype)
    special = np.array([0, 1, 0.5, -1, 2, nan, inf]).astype(x.dtype)
    np.testing.assert_array_equal(call("logit", special).astype(float), [-inf, inf, 0, nan, nan, nan, nan])
    special = np.array([-inf, inf, nan, -3e4]).astype(x.dtype)
    np.testing.assert_array_equal(call("sigmoid", special).astype(float), [0, 1, nan, 0])


@by_dtype
def test_binary_cross_entropy(dtype, rng, one_thread, many_digits):
    x, t = logits_and_targets(rng, dtype)
    pairs = elements_oracle.binary_cross_entropy(x, t, 1.5)
    assert ulps(call("binary_cross_entropy", x, t, pos_weight=1.5, reduction="none"), pairs) < (
        0.51 if bound(dtype) < 1 else 4
    )
    for reduction, divisor in ("sum", 1), ("mean", x.size):
        total = sum(v for v, _ in pairs) / divisor
        got = call("binary_cross_entropy", x, t, pos_weight=1.5, reduction=reduction)
        assert got.shape == () and ulps(got, [(total, total)]) < (0.51 if bound(dtype) < 1 else 2.5)
    g = rng.standard_normal(x.size).astype(x.dtype)
    got = call("binary_cross_entropy_backward", g, x, t, pos_weight=1.5, reduction="none")
    pairs = elements_oracle.binary_cross_entropy_backward(g, x, t, 1.5)
    assert ulps(got, pairs) < bound(dtype, False)
    for of_grad in x.dtype, np.float32, np.float64:
        for reduction, divisor in ("sum", 1), ("mean", x.size):
            g = np.asarray(0.7).astype(of_grad)
            got = call("binary_cross_entropy_backward", g, x, t, reduction=reduction)
            each = np.full(x.size, float(g)) / divisor
            pairs = elements_oracle.binary_cross_entropy_backward(each, x, t)
            assert got.dtype == x.dtype and ulps(got, pairs) < bound(dtype, False)


@by_dtype
def test_binary_cross_entropy_of_special_values(dtype, one_thread):
    d = DTYPES[dtype]
    x = np.array([inf, inf, -inf, -inf, nan, 0, 0, 0, 1, 1]).astype(d)
    t = np.array([1, 0, 0, 1, 1, -0.5, 1.5, nan, inf, -100]).astype(d)
    want = [0, inf, 0, inf, nan, nan, nan, nan, nan, nan]
    np.testing.assert_array_equal(call("binary_cross_entropy", x, t, reduction="none").astype(float), want)
    g = np.ones(10).astype(d)
    got = call("binary_cross_entropy_backward", g, x, t, reduction="none").astype(float)
    np.testing.assert_array_equal(got, [0, 1, 0, -1, nan, nan, nan, nan, nan, nan])
    for reduction in "sum", "mean":
        assert call("binary_cross_entropy", x[:4], t[:4], reduction=reduction) == inf
        assert np.isnan(call("binary_cross_entropy", x, t, reduction=reduction).astype(float))
        assert call("binary_cross_entropy", x[:1], t[:1], reduction=reduction) == 0
        assert call("binary_cross_entropy", x[:0], t[:0], reduction=reduction) == 0


@pytest.mark.parametrize(("dtype", "sizes"), [("float32", (3e38, 1e-40)), ("float64", (1.5e308, 1e-315))])
def test_means_of_huge_and_of_tiny_losses(dtype, sizes, rng, one_thread, monkeypatch):
    # neither does the sum overflow where the mean does not, nor is anything lost among subnormal numbers
    few_elements_a_segment(monkeypatch)
    for size in sizes:
        x = (size * rng.uniform(0.5, 1, 100)).astype(dtype)
        got = call("binary_cross_entropy", x, np.zeros_like(x)) if size > 1 else None
        if size < 1:
            x = np.log(x.astype(np.longdouble)).astype(dtype)  # log(1 + exp(x)) is about exp(x)
            got = call("binary_cross_entropy", x, np.zeros_like(x))
            x = np.exp(x.astype(np.longdouble))
        exact = (x.astype(np.longdouble) / 100).sum()
        assert abs(got - exact) <= 2 * np.spacing(exact.astype(dtype))


def few_elements_a_segment(monkeypatch):
    monkeypatch.setattr(geometry, "segments_launch", lambda n, s, a, *_: (geometry.Rows(9, 1, 1), 8 * 2))
    forget()


TWO_CLASSES = {
    "sigmoid": 1, "sigmoid_backward": 2, "logit": 1, "binary_cross_entropy": 2, "binary_cross_entropy_backward": 3,
}  # fmt: skip
by_element = pytest.mark.parametrize("name", TWO_CLASSES)


def of_two_classes(name, rng, shape, dtype="float32"):
    """Arrays that a function takes, and its options."""
    given = [rng.random(shape).astype(dtype) for _ in range(TWO_CLASSES[name])]
    return given, {"reduction": "none"} if name.startswith("binary") else {}


@pytest.mark.parametrize("view", VIEWS)
@by_element
def test_elements_in_any_layout(name, view, rng, one_thread):
    given, options = of_two_classes(name, rng, (4, 2, 6))
    parts = [VIEWS[view](a) for a in given]
    got = call(name, *parts, **options)
    want = call(name, *map(np.ascontiguousarray, parts), **options)
    assert got.tobytes() == want.tobytes() and got.shape == parts[0].shape
    mixed = call(name, *parts[:-1], np.ascontiguousarray(parts[-1]), **options)
    assert mixed.tobytes() == want.tobytes()
    if name.startswith("binary"):
        options["reduction"] = "mean"
        parts = [np.ones((), "float32"), *parts[1:]] if name.endswith("backward") else parts
        got = call(name, *parts, **options)
        assert got.tobytes() == call(name, *(np.array(a, order="C") for a in parts), **options).tobytes()


@by_element
def test_the_bits_of_an_element_depend_on_it_alone(name, rng, monkeypatch):
    given, options = of_two_classes(name, rng, (150,))
    whole = call(name, *given, **options)
    alone = [call(name, *(a[i : i + 1].copy() for a in given), **options)[0] for i in (0, 77, 149)]
    assert [whole[0], whole[77], whole[149]] == alone
    for shift in 1, 2, 3:
        memory = [np.zeros(a.size + 4, a.dtype) for a in given]
        for k, (m, a) in enumerate(zip(memory, given, strict=True)):
            m[shift + k % 2 :][: a.size] = a
        moved = [m[shift + k % 2 :][: a.size] for k, (m, a) in enumerate(zip(memory, given, strict=True))]
        assert call(name, *moved, **options).tobytes() == whole.tobytes()
    monkeypatch.setattr(geometry, "segments_launch", lambda n, s, a, *_: (geometry.Rows(1, 32, 32), 31 * 4))
    forget()
    assert call(name, *given, **options).tobytes() == whole.tobytes()
    forget()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_bits_of_a_mean_depend_on_the_elements_alone(dtype, rng, monkeypatch):
    x, t = (rng.normal(0, 3, 60).astype(DTYPES[dtype]), rng.random(60).astype(DTYPES[dtype]))
    monkeypatch.setattr(geometry, "TOTAL_THREADS", 4)
    lanes = geometry.lanes({"float32": "f4", "float64": "f8"}.get(dtype, "b2"))
    results = set()
    for threads, vectors in (1, 5), (2, 3), (8, 1):  # who does a segment's elements is no matter
        monkeypatch.setattr(
            geometry, "segments_launch",
            lambda n, s, a, *_, v=vectors, t=threads: (geometry.Rows(v, t, t), 4 * lanes),
        )  # fmt: skip
        forget()
        for shift in 0, 3:
            arrays = []
            for a in x, t:
                memory = np.zeros(a.size + 4, a.dtype)
                memory[shift : shift + a.size] = a
                arrays.append(memory[shift : shift + a.size])
            results.add(call("binary_cross_entropy", *arrays).tobytes())
        results.add(call("binary_cross_entropy", x.reshape(10, 6), t.reshape(10, 6)).tobytes())
    assert len(results) == 1
    forget()


@by_element
def test_real_launches_element_by_element(name, rng):
    # by part of a warp, and by several warps in two segments, of which the last one is short
    for n in 3, 1100 if name in ("logit", "binary_cross_entropy_backward") else 4200:
        given, options = of_two_classes(name, rng, (n,))
        got = call(name, *given, **options)
        np.testing.assert_allclose(got, getattr(numbasoft, name)(*given, **options), rtol=1e-6, atol=1e-7)


def test_a_real_launch_of_a_mean(rng, monkeypatch):
    x, t = rng.normal(0, 3, 130).astype("f4"), rng.random(130).astype("f4")
    monkeypatch.setattr(geometry, "VECTORS", {"f4": (1, 1, 1)})
    monkeypatch.setattr(geometry, "SEGMENT_THREADS", 64)
    monkeypatch.setattr(geometry, "TOTAL_THREADS", 64)
    forget()
    got = call("binary_cross_entropy", x, t)
    np.testing.assert_allclose(got, numbasoft.binary_cross_entropy(x, t), rtol=2e-7)


def test_elements_of_other_dtypes(rng, one_thread):
    x = rng.normal(0, 3, (3, 5))
    np.testing.assert_array_equal(call("sigmoid", np.arange(3)), call("sigmoid", np.arange(3.0)))
    for target in rng.random((3, 5)) < 0.5, rng.integers(0, 2, (3, 5)), rng.random((3, 5)).astype("f4"):
        for dtype in "f8", "f4", BFLOAT16:
            given = x.astype(dtype)
            wanted = numbasoft.binary_cross_entropy(given, target, reduction="none")
            got = call("binary_cross_entropy", given, target, reduction="none")
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(
                got.astype(float), wanted.astype(float), rtol=1e-2 if dtype == BFLOAT16 else 1e-6
            )
            one = call("binary_cross_entropy", given, target)
            assert one.dtype == wanted.dtype
            got = call("binary_cross_entropy_backward", np.float32(1), given, target)
            assert got.dtype == wanted.dtype
            wanted = numbasoft.binary_cross_entropy_backward(1.0, given, target)
            np.testing.assert_allclose(
                got.astype(float), wanted.astype(float), rtol=1e-2 if dtype == BFLOAT16 else 1e-5
            )


def test_elements_in_place(rng, one_thread):
    x, t = rng.random((3, 7)), rng.random((3, 7))
    for name in "sigmoid", "logit":
        d, want = there(x.copy()), getattr(numbasoft, name)(x)
        assert getattr(numbasoft, name)(d, out=d) is d
        np.testing.assert_allclose(here(d), want, rtol=1e-15)
        columns = there(np.zeros((7, 3)).T)
        assert getattr(numbasoft, name)(there(x), out=columns) is columns
        np.testing.assert_allclose(here(columns), want, rtol=1e-15)
    for name in "grad", "y":
        given = {"grad": there(x.copy()), "y": there(t.copy())}
        numbasoft.sigmoid_backward(**given, out=given[name])
        np.testing.assert_allclose(here(given[name]), numbasoft.sigmoid_backward(x, t), rtol=1e-15)
    d = there(x.copy())
    assert numbasoft.binary_cross_entropy_backward(there(np.ones(())), d, there(t), out=d) is d
    np.testing.assert_allclose(here(d), numbasoft.binary_cross_entropy_backward(1.0, x, t), rtol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_gradient_may_be_a_number(reduction, rng, one_thread):
    x, y, t = *rng.normal(0, 3, (2, 4, 3)), rng.random((4, 3))
    view = there(np.asfortranarray(x))
    for g in 0.3, -2, np.float32(1e-3), 1e300, 0.0:
        want = numbasoft.binary_cross_entropy_backward(g, x, t, reduction=reduction)
        got = numbasoft.binary_cross_entropy_backward(g, view, there(t), reduction=reduction)
        np.testing.assert_allclose(here(got), want, rtol=1e-14)
        for axis in -1, 0:
            chosen = dict(axis=axis, reduction=reduction, temperature=0.7)
            want = numbasoft.kl_divergence_backward(g, x, y, **chosen)
            got = numbasoft.kl_divergence_backward(g, view, there(y), **chosen)
            np.testing.assert_allclose(here(got), want, rtol=1e-12)
    one = numbasoft.binary_cross_entropy_backward(2.0, there(x[0, 0]), there(t[0, 0]), reduction="none")
    np.testing.assert_allclose(
        here(one), numbasoft.binary_cross_entropy_backward(2.0, x[0, 0], t[0, 0], reduction="none")
    )


def test_gradients_and_weights_that_the_logits_dtype_does_not_hold(one_thread):
    x, t = np.array([-7.0, 2.0, 0.0]), np.array([0.0, 1.0, 0.0])
    g = np.float32([65536, 1e5, 1])
    for dtype in np.float16, BFLOAT16:
        given = x.astype(dtype), t.astype(dtype)
        want = numbasoft.binary_cross_entropy_backward(g, x, t, reduction="none")
        got = call("binary_cross_entropy_backward", g, *given, reduction="none")
        np.testing.assert_array_equal(got, want.astype(dtype))
    for weight in 1e39, 1e-40:
        given = x.astype("f4"), t.astype("f4")
        chosen = dict(pos_weight=weight, reduction="none")
        got = call("binary_cross_entropy", *given, **chosen)
        np.testing.assert_array_equal(got, numbasoft.binary_cross_entropy(x, t, **chosen).astype("f4"))


@by_element
def test_no_elements(name):
    for shape in (0,), (3, 0), (0, 2):
        given, options = of_two_classes(name, np.random.default_rng(0), shape)
        assert call(name, *given, **options).shape == shape


BAD_ELEMENTS = {
    "sigmoid's out": (lambda x: numbasoft.sigmoid(x, out=there(np.zeros(3))), ValueError, "out has shape"),
    "sigmoid's overlap": (lambda x: numbasoft.sigmoid(x[:, :2], out=x[:, 1:]), ValueError, "out overlaps x"),
    "logit's out": (lambda x: numbasoft.logit(x, out=there(np.zeros((2, 3), "f4"))), TypeError, "out has dtype float32"),
    "grad's shape": (lambda x: numbasoft.sigmoid_backward(x[:1], x), ValueError, "grad has shape"),
    "grad's dtype": (lambda x: numbasoft.sigmoid_backward(there(np.zeros((2, 3), "f4")), x), TypeError, "grad has dtype float32"),
    "target's shape": (lambda x: numbasoft.binary_cross_entropy(x, x[:1]), ValueError, "target has shape"),
    "target on the CPU": (lambda x: numbasoft.binary_cross_entropy(x, [[0.0, 1, 0]] * 2), TypeError, "target is not"),
    "pos_weight": (lambda x: numbasoft.binary_cross_entropy(x, x, pos_weight=-1), ValueError, "pos_weight is -1"),
    "reduction": (lambda x: numbasoft.binary_cross_entropy(x, x, reduction="all"), ValueError, "reduction is 'all'"),
    "a bool": (lambda x: numbasoft.binary_cross_entropy_backward(True, x, x), TypeError, "grad is True"),
    "a number": (lambda x: numbasoft.binary_cross_entropy_backward(1.0, x, x, reduction="none"), ValueError, "grad has shape"),
    "one grad": (lambda x: numbasoft.binary_cross_entropy_backward(x, x, x), ValueError, "grad has shape"),
    "out is target": (lambda x: numbasoft.binary_cross_entropy_backward(there(np.ones(())), there(np.ones((2, 3))), x, out=x), ValueError, "out shares memory with target"),
    "complex": (lambda x: numbasoft.sigmoid(there(np.ones(3, complex))), TypeError, "x has dtype complex128"),
    "stream": (lambda x: numbasoft.sigmoid(x, stream="main"), TypeError, "stream is 'main'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ELEMENTS)
def test_errors_of_elements_come_before_any_launch(case, monkeypatch):
    make, error, sentence = BAD_ELEMENTS[case]
    x = there(np.ones((2, 3)))
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(error, match=sentence) as caught:
        make(x)
    assert "\n" not in str(caught.value)


# --- divergences -------------------------------------------------------------------------------------------

LOGITS_OF_TWO = {
    "random": lambda rng, n: rng.normal(0, 3, (2, 3, n)),
    "wide": lambda rng, n: rng.normal(0, 30, (2, 3, n)),
    "offset": lambda rng, n: np.array([1e4, -1e3])[:, None, None] + rng.normal(0, 5, (2, 3, n)),
    "near": lambda rng, n: rng.normal(0, 3, (3, n)) + rng.normal(0, 0.01, (2, 1, n)),
    "confident": lambda rng, n: rng.normal(0, 1, (2, 3, n)) + 60 * (np.arange(n) == 1),
}


@pytest.mark.parametrize(
    ("dtype", "family"),
    [(dtype, family) for dtype in ("float32", "float64") for family in LOGITS_OF_TWO]
    + [("float16", "near"), ("bfloat16", "wide")],
)
def test_divergences(dtype, family, rng, one_thread, many_digits):
    # the forward pass is right where p and q are near each other, which is where a sum of p log(p / q) is not
    for temperature in 1.0, 0.7:
        x, y = LOGITS_OF_TWO[family](rng, 20).astype(DTYPES[dtype])
        pairs = elements_oracle.kl_divergence(x, y, temperature)
        got = call("kl_divergence", x, y, temperature=temperature, reduction="none")
        limit = 0.51 if dtype in ("float16", "bfloat16") else 4
        assert ulps(got, [(v, v) for v, _ in pairs]) < limit, temperature
        mean = sum(v for v, _ in pairs) / 3
        assert ulps(call("kl_divergence", x, y, temperature=temperature), [(mean, mean)]) < limit
        g = rng.standard_normal(3).astype(x.dtype)
        pairs = elements_oracle.kl_divergence_backward(g, x, y, temperature)
        got = call("kl_divergence_backward", g, x, y, temperature=temperature, reduction="none")
        assert ulps(got, pairs) < bound(dtype, False)


@pytest.mark.parametrize("temperature", [1e-35, 1e35])
def test_divergences_at_extreme_temperatures(temperature, rng, one_thread):
    x, y = (temperature * rng.normal(0, 2, (2, 3, 20)).clip(-3, 3)).astype("f4")
    wanted, slopes = plain_divergence(x, y, temperature=temperature, reduction="none")
    got = call("kl_divergence", x, y, temperature=temperature, reduction="none")
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    slopes = (slopes / 3).astype("f4").astype("f8")
    got = call("kl_divergence_backward", np.float32(1), x, y, temperature=temperature)
    np.testing.assert_allclose(got, slopes, rtol=1e-5, atol=1e-7 * abs(slopes).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_divergences_of_special_rows(dtype, one_thread):
    rows = [
        ([0, -inf, 1], [0, -inf, 1], 0), ([0, 1, 2], [0, -inf, 2], inf), ([0, nan, 1], [0, 1, 1], nan),
        ([0, 1, 2], [0, inf, 2], nan), ([0, 1, 2], [-inf] * 3, nan), ([-inf] * 3, [0, 1, 2], nan),
        ([inf, 0, 1], [0, 1, 2], nan), ([0, 1, -inf], [0, 1, inf], nan), ([0, 1, 2], [nan, 1, 2], nan),
        ([1, 2, 3], [1, 2, 3], 0), ([5, 5, -inf], [5, 5, 5], np.log(1.5)),
    ]  # fmt: skip
    x, y = (np.array([row[i] for row in rows]).astype(DTYPES[dtype]) for i in (0, 1))
    for axis in -1, 0:
        given = (x, y) if axis else (np.ascontiguousarray(x.T), np.ascontiguousarray(y.T))
        got = call("kl_divergence", *given, axis=axis, reduction="none").astype(float)
        np.testing.assert_allclose(got, [row[2] for row in rows], rtol=1e-2, atol=0)
        grad = np.ones(len(rows)).astype(x.dtype)
        dy = call("kl_divergence_backward", grad, *given, axis=axis, reduction="none").astype(float)
        dy = dy if axis else dy.T
        for row, slope in zip(rows, dy, strict=True):
            assert np.isnan(slope).all() if np.isnan(row[2]) else np.isfinite(slope).all()
        assert not dy[0].any() and not dy[9].any()


@pytest.mark.parametrize(("dtype", "n"), [("float32", 11), ("bfloat16", 17)])
def test_the_bits_of_a_divergence_depend_on_the_row_alone(dtype, n, rng, monkeypatch):
    from numbasoft.cuda import split
    from numbasoft.ops.kl_divergence import cuda as kl

    few_columns(monkeypatch)
    monkeypatch.setattr(geometry, "BLOCK", 8)
    monkeypatch.setattr(geometry, "column_threads", lambda n, *_: 2 * geometry.COLUMNS)
    monkeypatch.setattr(copies, "THREADS", 16)
    forget()
    x, y = rng.normal(0, 3, (2, 2, n)).astype(DTYPES[dtype])
    g = rng.standard_normal(2).astype(x.dtype)

    def both(x, y, g, axis=-1):
        chosen = dict(axis=axis, reduction="none", temperature=0.7)
        back = call("kl_divergence_backward", g, x, y, **chosen)
        divergence = call("kl_divergence", x, y, **chosen)
        return divergence.tobytes(), np.ascontiguousarray(back if axis else back.T).tobytes()

    whole = both(x, y, g)
    np.testing.assert_allclose(
        np.frombuffer(whole[0], x.dtype).astype(float),
        plain_divergence(x, y, temperature=0.7, reduction="none")[0],
        rtol=1e-2 if dtype == "bfloat16" else 1e-6,
    )
    assert both(*(np.ascontiguousarray(a.T) for a in (x, y)), g, 0) == whole, "columns"
    memory = [np.zeros(a.size + 1, a.dtype) for a in (x, y)]
    for m, a in zip(memory, (x, y), strict=True):
        m[1:] = a.ravel()
    assert both(memory[0][1:].reshape(x.shape), y, g) == whole, "unaligned"
    alone = tuple(part[len(part) // 2 :] for part in whole)
    assert both(x[1:].copy(), y[1:].copy(), g[1:].copy()) == alone
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "SEGMENT_THREADS", 4)
        patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
        patch.setattr(split, "segment_length", lambda storage: 2 * geometry.lanes(storage))
        patch.setattr(kl, "segment_length", lambda storage: 2 * geometry.lanes(storage))
        patch.setattr(geometry, "segment_length", lambda storage: 2 * geometry.lanes(storage))
        patch.setattr(kl, "piece_length", lambda storage: geometry.lanes(storage))
        clear(split, kl)
        assert both(x, y, g) == whole, "segments"
    clear(split, kl)


def clear(*modules):
    """Forget the kernels of these modules and all launches."""
    for module in modules:
        clear_caches(module)
    calls.compiled.cache_clear()
    forget()


def test_divergences_in_any_layout(rng, one_thread):
    x, y = rng.normal(0, 3, (2, 4, 2, 6))
    for view, axis in ("transposed", -1), ("part", 1):
        a, b = VIEWS[view](x), VIEWS[view](y)
        wanted, _ = plain_divergence(a, b, axis=axis, reduction="none")
        got = call("kl_divergence", a, b, axis=axis, reduction="none")
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        g = rng.normal(size=wanted.shape).astype("f4").astype("f8")
        _, wanted = plain_divergence(a, b, g, axis=axis, reduction="none")
        got = call("kl_divergence_backward", g, a, b, axis=axis, reduction="none")
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)
    for reduction in "mean", "sum":
        wanted, slopes = plain_divergence(x, y, 0.5, axis=1, reduction=reduction)
        np.testing.assert_allclose(
            call("kl_divergence", x, y, axis=1, reduction=reduction), wanted, rtol=1e-13
        )
        got = call("kl_divergence_backward", np.float16(0.5), x, y, axis=1, reduction=reduction)
        np.testing.assert_allclose(got, slopes, rtol=1e-12, atol=1e-15)
    d = there(y.copy())
    assert numbasoft.kl_divergence_backward(there(np.ones(())), there(x), d, out=d) is d
    np.testing.assert_allclose(here(d), plain_divergence(x, y)[1], rtol=1e-12, atol=1e-15)
    x, y = np.arange(6).reshape(2, 3), np.ones((2, 3), int)
    np.testing.assert_allclose(call("kl_divergence", x, y), float(plain_divergence(x, y)[0]))
    empty = np.zeros((0, 3))
    assert call("kl_divergence", empty, empty) == 0
    assert call("kl_divergence", empty, empty, reduction="none").shape == (0,)
    assert call("kl_divergence_backward", np.float64(1), empty, empty).shape == (0, 3)


def test_real_launches_of_divergences(rng):
    # by a warp, and by several warps that meet in shared memory
    for n in 3, 300:
        x, y = rng.normal(0, 3, (2, 1, n)).astype("f4")
        got = call("kl_divergence", x, y, reduction="none")
        wanted, slopes = plain_divergence(x, y, reduction="none")
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
        got = call("kl_divergence_backward", np.ones(1, "f4"), x, y, reduction="none")
        np.testing.assert_allclose(got, slopes, rtol=1e-5, atol=1e-7)


BAD_DIVERGENCES = {
    "q's shape": (lambda x: numbasoft.kl_divergence(x, x[:1]), ValueError, "q_logits has shape"),
    "q's dtype": (lambda x: numbasoft.kl_divergence(x, there(np.ones((2, 3), "f4"))), TypeError, "q_logits has dtype float32"),
    "no classes": (lambda x: numbasoft.kl_divergence(x[:, :0], x[:, :0]), ValueError, "at least one class"),
    "axis": (lambda x: numbasoft.kl_divergence(x, x, axis=(0, 1)), TypeError, "axis is"),
    "temperature": (lambda x: numbasoft.kl_divergence(x, x, temperature=0), ValueError, "temperature is 0"),
    "reduction": (lambda x: numbasoft.kl_divergence(x, x, reduction="batchmean"), ValueError, "reduction is"),
    "grad": (lambda x: numbasoft.kl_divergence_backward(x, x, x), ValueError, "grad has shape"),
    "out": (lambda x: numbasoft.kl_divergence_backward(there(np.ones(())), x, there(np.ones((2, 3))), out=x), ValueError, "out shares memory with p_logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DIVERGENCES)
def test_errors_of_divergences_come_before_any_launch(case, monkeypatch):
    make, error, sentence = BAD_DIVERGENCES[case]
    x = there(np.ones((2, 3)))
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(error, match=sentence) as caught:
        make(x)
    assert "\n" not in str(caught.value)
