"""fit_temperature in Numba's CUDA simulator: tests/test_cuda.py runs this as it runs simulated.py."""

import numpy as np
import pytest
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from oracle import DTYPES
from simulated import clear, forget, there

import numbasoft
from numbasoft.calibration import TemperatureScaler, calibration_error, reliability_curve
from numbasoft.cuda import arrays, calls, classes, copies, fits, geometry, totals
from numbasoft.ops.fit_temperature import cuda as kernels

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def teams(monkeypatch):
    """``teams(threads, block)``: so many threads to a row, and few in all else."""

    def patch(team, threads):
        monkeypatch.setattr(geometry, "moment_launch", lambda n: (team, threads))
        forget()

    monkeypatch.setattr(geometry, "TOTAL_THREADS", 2)
    monkeypatch.setattr(geometry, "segments_launch", lambda n, *_: (geometry.Rows(n // 2 + 1, 1, 1), n))
    for module in totals, classes:
        monkeypatch.setattr(module, "THREADS", 2)
    monkeypatch.setattr(copies, "THREADS", 16)
    clear(totals, classes)
    patch(1, 1)
    yield patch
    monkeypatch.undo()
    clear(totals, classes)


def rows_and_targets(rng, rows, classes, dtype="float64", sharpness=2.0):
    x = rng.normal(0, 1.5, (rows, classes))
    target = x.argmax(1)
    target[0] = x[0].argmin()
    return (x * sharpness).astype(DTYPES[dtype]), target


def fit(x, target, **options):
    return numbasoft.fit_temperature(there(x), there(np.asarray(target)), **options)


def moments(x, target, b, unit=1.0, axis=-1, **options):
    """The slope and curvature of the sum over rows, from one launch."""
    options = dict(dict(ignore_index=-100, stream=None), **options)
    target = there(np.asarray(target))
    return fits.fit(kernels.MOMENTS, lambda at, rows: at(b, unit), there(x), target, axis, **options)


def exact_moments(x, target, b):
    x = x.astype(np.longdouble)
    e = np.exp(b * (x - x.max(1, keepdims=True)))
    p, d = e / e.sum(1, keepdims=True), x - x[np.arange(len(x)), target][:, None]
    mean = (p * d).sum(1, keepdims=True)
    return mean.sum(), (p * (d - mean) ** 2).sum()


# --- accuracy ----------------------------------------------------------------------------------------------


@by_dtype
def test_temperatures_are_those_of_the_cpu(dtype, rng, teams):
    x, target = rows_and_targets(rng, 9, 4, dtype)
    x[2, 3], target[2] = -inf, 0
    x[5], target[5] = nan, -100
    assert fit(x, target) == pytest.approx(numbasoft.fit_temperature(x, target), rel=1e-13)


@pytest.mark.parametrize("exponent", [-950, -400, 400, 950])
def test_logits_of_any_size(exponent, rng, teams):
    x, target = rows_and_targets(rng, 6, 3)
    assert fit(x * 2.0**exponent, target) == fit(x, target) * 2.0**exponent


def test_the_slope_is_zero_in_high_precision(rng, teams):
    mp = pytest.importorskip("mpmath")
    teams(2, 2)
    x, target = rows_and_targets(rng, 8, 5)
    t = fit(x, target)
    with mp.workdps(40):

        def slope(b):
            result = mp.mpf(0)
            for row, k in zip(x.tolist(), target, strict=True):
                e = [mp.exp(b * mp.mpf(v)) for v in row]
                result += mp.fdot(e, [mp.mpf(v) - row[k] for v in row]) / mp.fsum(e)
            return result

        assert slope((1 - 1e-14) / mp.mpf(t)) < 0 < slope((1 + 1e-14) / mp.mpf(t))


def test_a_confident_row_loses_nothing(teams):
    x = np.array([[60.0, 0.0, -1.0]])
    slope, curvature = moments(x, [0], 1.0)
    e = np.exp([-60.0, -61.0])
    assert slope == pytest.approx(-60 * e[0] - 61 * e[1], rel=1e-15)
    assert curvature == pytest.approx(3600 * e[0] + 3721 * e[1], rel=1e-15)
    assert moments(x, [0], inf) == (0, 0)
    assert moments(x, [1], inf, 0.5) == (30, 0)
    assert moments(np.array([[3.0, -inf, 1.0]]), [2], 0.0) == (1, 1)


# --- the same bits however a row is shared out, and wherever it lies ---------------------------------------


@pytest.mark.parametrize(("team", "threads", "n"), [(1, 2, 7), (2, 8, 9), (4, 4, 50), (64, 64, 200)])
def test_moments_by_teams(team, threads, n, rng, teams):
    teams(team, threads)
    rows = 3 if team < 32 else 1
    x, target = rows_and_targets(rng, rows, n, "float32")
    got = moments(x, target, 0.7, 0.5)
    slope, curvature = exact_moments(x, target, 0.7)
    np.testing.assert_allclose(got, [float(slope / 2), float(curvature / 4)], rtol=1e-14)


def test_a_real_launch(rng):
    assert geometry.moment_launch(9) == (4, 128)
    x, target = rows_and_targets(rng, 2, 9, "float32")
    slope, curvature = exact_moments(x, target, 0.7)
    np.testing.assert_allclose(moments(x, target, 0.7), [float(slope), float(curvature)], rtol=1e-14)


@by_dtype
def test_the_bits_depend_on_the_rows_alone(dtype, rng, teams):
    teams(2, 2)
    x, target = rows_and_targets(rng, 4, 11, dtype)
    want = moments(x, target, 0.7)
    teams(2, 8)  # four rows in a block
    assert moments(x, target, 0.7) == want
    assert moments(x.T.copy(), target, 0.7, axis=0) == want
    memory = np.zeros(x.size + 1, x.dtype)
    memory[1:] = x.ravel()
    assert moments(memory[1:].reshape(x.shape), target, 0.7) == want
    for view in (x.repeat(2, 1)[:, ::2], x[:, ::-1].copy()[:, ::-1], x.repeat(2, 0)[::2]):
        assert moments(view, target, 0.7) == want
    both = x.reshape(2, 2, 11), target.reshape(2, 2)
    assert moments(*both, 0.7) == want
    assert moments(both[0].transpose(0, 2, 1).copy(), both[1], 0.7, axis=1) == want
    apart = np.asfortranarray(both[1].astype(np.int16))
    assert moments(both[0], apart, 0.7) == want
    one = moments(x[1:2].copy(), target[1:2], 0.7)
    ignored = np.full(4, 99)
    ignored[1] = target[1]
    assert moments(x, ignored, 0.7, ignore_index=99) == one


def test_classes_with_gaps_along_too_many_axes(rng, teams):
    shape = 1, 2, 2, 2, 2, 2, 2
    target = np.zeros(np.multiply(shape, 2), np.int16)[(slice(None, None, 2),) * 7]
    x = rng.normal(0, 1, (*shape, 3))
    target[...] = x.argmax(-1)
    target[0, 0] = x[0, 0].argmin(-1)
    assert classes.five_axes(target.shape, target.strides) is None
    assert moments(x, target, 0.5) == moments(x, target.copy(), 0.5)
    target[0, 1, 1, 1, 0, 1, 0] = 3
    with pytest.raises(ValueError, match=r"target is 3 at \(0, 1, 1, 1, 0, 1, 0\), but must be from 0 to 2"):
        fit(x, target)


def test_integers_and_numbers_of_every_kind(rng, teams):
    x = rng.integers(-9, 9, (6, 4))
    target = x.argmax(1)
    target[0] = x[0].argmin()
    want = numbasoft.fit_temperature(x, target)
    for logits, classes_ in (x.astype("i1"), target.astype("u1")), (x, target.astype("u8")):
        assert fit(logits, classes_) == pytest.approx(want, rel=1e-13)
    assert type(fit(x, target)) is float


# --- what the device alone knows, and errors ---------------------------------------------------------------

REFUSED = {
    "separable": ([[2.0, 1.0], [0.0, 1.0]], [0, 1]),
    "useless": ([[2.0, 1.0], [0.0, 1.0]], [1, 0]),
    "NaN": ([[2.0, nan], [0.0, 1.0]], [1, 0]),
    "infinity": ([[2.0, inf], [0.0, 1.0]], [0, 0]),
    "impossible": ([[2.0, -inf], [0.0, 1.0]], [1, 0]),
    "nothing": ([[2.0, 1.0]], [-100]),
    "no rows": (np.zeros((0, 2)), np.zeros(0, int)),
    "out of range": ([[2.0, 1.0]] * 3, [0, 2, 5]),
    "below": (np.zeros((2, 2, 3)), [[0, 1], [2, -1]]),
    "huge": ([[nan, 1.0]], [2**62]),
    "one row": ([1.0, 0.0], 2),
    "one useless row": ([1.0, 0.0], 1),
    "too hot": (np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 2e290, [0] * 4),
    "too cold": (np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 1e-295, [0] * 4),
    "subnormal": (np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 1e-310, [0] * 4),
    "no classes": (np.zeros((2, 0)), [0, 0]),
    "shape": (np.zeros((2, 3)), [0, 0, 0]),
    "floats": (np.zeros((2, 3)), [0.0, 0.0]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cpu_refuses_is_refused_with_the_same_words(case, teams):
    x, target = map(np.asarray, REFUSED[case])
    with pytest.raises((ValueError, TypeError)) as want:
        numbasoft.fit_temperature(x, target)
    with pytest.raises(want.type) as got:
        fit(x, target)
    assert str(got.value) == str(want.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(axis=2), IndexError, "axis 2"),
        (dict(ignore_index=0.5), TypeError, "ignore_index is 0.5"),
        (dict(stream="main"), TypeError, "stream is 'main'"),
    ],
)
def test_errors_come_before_any_launch(options, kind, message, monkeypatch):
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(kind, match=message):
        fit(np.zeros((2, 3)), [0, 1], **options)
    for given in (there(np.zeros((2, 3))), [0, 1]), (np.zeros((2, 3)), there(np.zeros(2, int))):
        with pytest.raises(TypeError, match=r"is on a CUDA device and .* is not"):
            numbasoft.fit_temperature(*given)


def test_a_stream_that_is_captured_cannot_be_waited_for(monkeypatch):
    monkeypatch.setattr(arrays, "is_capturing", lambda handle: True)
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(RuntimeError, match="waits for the device, but its stream is being captured"):
        fit(np.zeros((2, 3)), [0, 1])


# --- calibration -------------------------------------------------------------------------------------------


def test_the_scaler(rng, teams):
    x, target = rows_and_targets(rng, 8, 3, "float32")
    scaler = TemperatureScaler()
    assert scaler.fit(there(x), there(target)) is scaler
    assert scaler.temperature_ == fit(x, target)
    p = scaler.predict_proba(there(x[:1]))
    assert isinstance(p, FakeCUDAArray)
    want = numbasoft.softmax(x[:1], temperature=scaler.temperature_)
    np.testing.assert_allclose(p.copy_to_host(), want, rtol=1e-6)
    with pytest.raises(TypeError, match="which has no argmax: pass CuPy's or PyTorch's"):
        scaler.predict(there(x))


def test_what_takes_arrays_on_the_cpu_only_says_so():
    p, target = there(np.full((2, 2), 0.5)), there(np.zeros(2, int))
    for call in calibration_error, reliability_curve:
        for given in (p, target), (np.full((2, 2), 0.5), target):
            with pytest.raises(TypeError, match=r"is an array on a CUDA device.*pass a copy on the CPU"):
                call(*given)
