"""Temperatures at the exact minimum, and calibration errors worked out by hand."""

import numpy as np
import pytest

import numbasoft
from numbasoft import calibration, fit_temperature
from numbasoft.calibration import TemperatureScaler, calibration_error, reliability_curve
from numbasoft.ops.fit_temperature import api

mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed, which gives the exact answers here")


def drawn(rng, rows, classes, sharpness, dtype="f8"):
    """Logits that are ``sharpness`` times too large, and targets drawn from what they should be."""
    x = rng.normal(0, 2, (rows, classes))
    target = numbasoft.sample(x, rng=1)
    return (x * sharpness).astype(dtype), target


def test_two_classes_in_closed_form():
    # n rows say a, of which k are right: log(k / (n - k)) = (a - b) / T
    for right, n, gap in ((3, 4, 5.0), (51, 100, 0.1), (999, 1000, 1e-3), (2, 3, 1e4)):
        logits = np.tile([gap, 0.0], (n, 1))
        target = (np.arange(n) >= right).astype(int)
        assert fit_temperature(logits, target) == pytest.approx(gap / np.log(right / (n - right)), rel=1e-13)


def test_the_slope_is_zero_in_high_precision(rng):
    x, target = drawn(rng, 40, 6, 2.5)
    t = fit_temperature(x, target)

    def slope(b):
        result = mpmath.mpf(0)
        for row, k in zip(x, target, strict=True):
            e = [mpmath.exp(b * mpmath.mpf(v)) for v in row]
            result += mpmath.fdot(e, map(mpmath.mpf, row)) / mpmath.fsum(e) - mpmath.mpf(row[k])
        return result

    with mpmath.workdps(40):
        exact = 1 / mpmath.findroot(slope, 1 / mpmath.mpf(t))
        assert abs(t / exact - 1) < 1e-14


def is_nearest(t, x, target, tolerance=1e-14):
    """Whether the exact slope changes its sign that close to 1 / t."""

    def slope(b):
        result = mpmath.mpf(0)
        for row, k in zip(x.tolist(), target, strict=True):
            e = [mpmath.exp(b * (mpmath.mpf(v) - max(row))) for v in row]
            result += mpmath.fdot(e, [mpmath.mpf(v) - row[k] for v in row]) / mpmath.fsum(e)
        return result

    with mpmath.workdps(60):
        return slope((1 - tolerance) / mpmath.mpf(t)) < 0 < slope((1 + tolerance) / mpmath.mpf(t))


@pytest.mark.parametrize("exponent", [-950, -665, -400, -60, 60, 400, 665, 950])
def test_logits_of_any_size(exponent, rng):
    x, target = drawn(rng, 30, 5, 1.5)
    t = fit_temperature(x * 2.0**exponent, target)
    assert t == fit_temperature(x, target) * 2.0**exponent
    assert is_nearest(t, x * 2.0**exponent, target)


def test_rows_of_many_sizes(rng):
    x, target = drawn(rng, 20, 4, 1.5)
    more = np.eye(4)[:3] * [[1e200], [300.0], [1e-200]]  # all right, so that only the rest may be colder
    for some in [0], [1], [2], [0, 1, 2]:
        both = np.concatenate([x, more[some]])
        t = fit_temperature(both, [*target, *some])
        assert is_nearest(t, both, [*target, *some])
    sure = np.array([[50.0, 0]] * 1000 + [[1e-20, 0]])  # of terms of 1e-22 beside 1
    assert is_nearest(fit_temperature(sure, [0] * 1000 + [1]), sure, [0] * 1000 + [1])


def test_the_root_takes_few_steps(rng, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return total(*args)

    total = api.total
    monkeypatch.setattr(api, "total", counted)
    for sharpness in (0.3, 1, 5, 1e-9, 1e9):
        for rows, classes in (300, 2), (200, 1000):
            x, target = drawn(rng, rows, classes, sharpness)
            calls.clear()
            fit_temperature(x, target)
            assert len(calls) <= 2 * 10
    calls.clear()
    x = np.concatenate([x, [[*[0.0] * 999, 1e200]]])  # along whose tail Newton's method would creep
    fit_temperature(x, [*target, 999])
    assert len(calls) <= 2 * 30


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_temperature_of_overconfident_logits(dtype, rng):
    x, target = drawn(rng, 2000, 30, 2.5, dtype)
    t = fit_temperature(x, target)
    assert 2.3 < t < 2.7
    assert t == pytest.approx(fit_temperature(x.astype("f8"), target), rel=1e-14)
    assert t == fit_temperature(x.T.copy(), target, axis=0)
    loss = [numbasoft.cross_entropy(x.astype("f8"), target, temperature=t * s) for s in (0.999, 1, 1.001)]
    assert loss[1] < min(loss[0], loss[2])
    before, after = (
        calibration_error(numbasoft.softmax(x.astype("f8"), temperature=s), target) for s in (1, t)
    )
    assert before > 0.1 and after < 0.03


def test_ignored_rows_and_ruled_out_classes_do_not_count(rng):
    x, target = drawn(rng, 300, 5, 2.0)
    t = fit_temperature(x, target)
    more = np.concatenate([x, np.full((2, 5), np.nan)])
    assert fit_temperature(more, [*target, -100, -100]) == t
    wider = np.concatenate([x, np.full((300, 3), -np.inf)], axis=1)
    assert fit_temperature(wider, target) == pytest.approx(t, rel=1e-13)


BAD_FITS = {
    "equal": ([[2.0, 2.0], [0.0, 0.0]], [0, 1], "all temperatures fit equally well"),
    "one class": ([[2.0], [0.0]], [0, 0], "all temperatures fit equally well"),
    "separable": ([[2.0, 1.0], [0.0, 1.0]], [0, 1], "the lower the temperature the better"),
    "useless": ([[2.0, 1.0], [0.0, 1.0]], [1, 0], "no temperature helps"),
    "NaN": ([[2.0, np.nan], [0.0, 1.0]], [1, 0], "hold NaN or infinity"),
    "impossible": ([[2.0, -np.inf], [0.0, 1.0]], [1, 0], "hold NaN or infinity"),
    "too far": ([[1.7e308, -1.7e308], [1, 2]], [1, 1], "differ by more than float64 holds"),
    "too hot": (
        np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 2e290,
        [0] * 4,
        "best temperature is above 1e\\+290",
    ),
    "too cold": (
        np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 1e-295,
        [0] * 4,
        "best temperature is below 1e-290",
    ),
    "subnormal": (
        np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * 1e-310,
        [0] * 4,
        "best temperature is below 1e-290",
    ),
    "nothing": ([[2.0, 1.0]], [-100], "none of its rows counts"),
    "out of range": ([[2.0, 1.0]], [2], "target is 2 at 0, but must be from 0 to 1"),
    "no classes": (np.zeros((2, 0)), [0, 0], "at least one class"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_where_there_is_no_temperature(case):
    logits, target, message = BAD_FITS[case]
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, target)


def test_the_scaler(rng):
    x, target = drawn(rng, 500, 4, 3.0)
    scaler = TemperatureScaler()
    with pytest.raises(ValueError, match="call fit first"):
        scaler.predict_proba(x)
    assert scaler.fit(x, target) is scaler
    assert scaler.temperature_ == fit_temperature(x, target)
    np.testing.assert_array_equal(
        scaler.predict_proba(x), numbasoft.softmax(x, temperature=scaler.temperature_)
    )
    np.testing.assert_array_equal(scaler.predict(x), x.argmax(1))
    assert "temperature_=" in repr(scaler)


class OnDevice:
    """Looks like an array on a CUDA device, without memory that the host could read."""

    __cuda_array_interface__ = property(lambda self: {"shape": (2, 3), "typestr": "<f4", "version": 3})

    def __array__(self, *args, **kwargs):
        raise AssertionError("a hidden copy")


class WithArgmax(OnDevice):
    def argmax(self, axis=None):
        return "on the device", axis


def test_predictions_of_arrays_on_a_device_stay_there():
    assert TemperatureScaler().predict(WithArgmax()) == ("on the device", -1)
    with pytest.raises(
        TypeError, match="OnDevice, which has no argmax: pass CuPy's or PyTorch's array, or a copy"
    ):
        TemperatureScaler().predict(OnDevice())


@pytest.mark.parametrize("given", [(OnDevice(), [0]), ([[0.5, 0.5]], OnDevice())])
def test_arrays_on_a_device_are_to_be_copied_first(given):
    for call in calibration_error, reliability_curve, calibration.plot_reliability:
        with pytest.raises(
            TypeError, match=r"on a CUDA device, but .* on the CPU only: pass a copy on the CPU"
        ):
            call(*given)


def test_scikit_learn_can_clone_the_scaler():
    base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed, which does the cloning")
    assert (
        repr(base.clone(TemperatureScaler().fit([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [0, 0, 0])))
        == "TemperatureScaler()"
    )
    with pytest.raises(ValueError, match="params has alpha, but TemperatureScaler has no parameters"):
        TemperatureScaler().set_params(alpha=1)


# rows of two classes; the first is always predicted
P = np.array([0.95, 0.9, 0.85, 0.7, 0.65, 0.6, 0.55, 0.55])
Y = np.array([0, 0, 1, 0, 1, 0, 1, 1])
PROBABILITIES = np.stack([P, 1 - P], axis=1)


def test_errors_by_hand():
    # bins of a fifth: three rows in (0.8, 1], three in (0.6, 0.8] less the one at 0.6, three in (0.4, 0.6]
    gaps = [abs(1 / 3 - (0.6 + 0.55 + 0.55) / 3), abs(1 / 2 - 0.675), abs(2 / 3 - 0.9)]
    counts = [3, 2, 3]
    chosen = dict(bins=5)
    assert calibration_error(PROBABILITIES, Y, **chosen) == pytest.approx(np.dot(gaps, counts) / 8)
    assert calibration_error(PROBABILITIES, Y, norm="maximum", **chosen) == pytest.approx(max(gaps))
    curve = reliability_curve(PROBABILITIES, Y, **chosen)
    np.testing.assert_array_equal(curve.count, [0, 0, 3, 2, 3])
    np.testing.assert_allclose(curve.accuracy, [np.nan, np.nan, 1 / 3, 1 / 2, 2 / 3])
    np.testing.assert_allclose(curve.edges, np.linspace(0, 1, 6))
    # with two classes the second's probability mirrors the first's, bin edges aside
    assert calibration_error(PROBABILITIES, Y, norm="classwise", bins=1) == pytest.approx(abs(P.mean() - 0.5))


def test_bins_of_equal_mass(rng):
    curve = reliability_curve(PROBABILITIES, Y, bins=4, strategy="mass")
    np.testing.assert_array_equal(curve.count, [2, 2, 2, 2])
    np.testing.assert_allclose(curve.confidence, [0.55, 0.625, 0.775, 0.925])
    order = rng.permutation(8)
    again = reliability_curve(PROBABILITIES[order], Y[order], bins=4, strategy="mass")
    np.testing.assert_allclose(again.accuracy, curve.accuracy)
    same = np.full((10, 2), 0.5)  # ties stay together
    assert reliability_curve(same, np.arange(10) % 2, bins=3, strategy="mass").count.max() == 10


def test_what_is_calibrated_has_no_error(rng):
    q = numbasoft.softmax(rng.normal(0, 2, (40_000, 5)))
    target = numbasoft.sample(np.log(q), rng=9)
    for norm in ("expected", "classwise"):
        for strategy in ("width", "mass"):
            assert calibration_error(q, target, norm=norm, strategy=strategy) < 0.01
    assert calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert calibration_error(np.eye(3), [1, 2, 0]) == 1


@pytest.mark.parametrize(
    ("probabilities", "target", "options", "kind", "message"),
    [
        ([0.5, 0.5], [0], {}, ValueError, "probabilities has shape"),
        ([[0.5, 0.6]], [0], {}, ValueError, "probabilities sums to 1.1 in row 0"),
        ([[1.5, -0.5]], [0], {}, ValueError, "probabilities holds -0.5"),
        ([[0.5, 0.5]], [2], {}, ValueError, "target is 2 at 0"),
        ([[0.5, 0.5]], [0, 1], {}, ValueError, "target has shape"),
        ([[0.5, 0.5]], [0.0], {}, TypeError, "target has dtype"),
        ([[0.5, 0.5]], [0], dict(bins=0), ValueError, "bins is 0"),
        ([[0.5, 0.5]], [0], dict(bins=2.5), TypeError, "bins is 2.5"),
        ([[0.5, 0.5]], [0], dict(strategy="quantile"), ValueError, "strategy is 'quantile'"),
        ([[0.5, 0.5]], [0], dict(norm="l2"), ValueError, "norm is 'l2'"),
        (np.zeros((0, 2)), np.zeros(0, int), {}, ValueError, "at least one row"),
    ],
)
def test_bad_arguments(probabilities, target, options, kind, message):
    with pytest.raises(kind, match=message):
        calibration_error(probabilities, target, **options)


def test_plots():
    matplotlib = pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed, which draws the diagrams"
    )
    matplotlib.use("Agg")
    ax = calibration.plot_reliability(PROBABILITIES, Y, bins=5)
    assert [round(bar.get_height(), 6) for bar in ax.patches[:3]] == [0.333333, 0.5, 0.666667]
    assert "expected calibration error" in ax.get_title()
    other = calibration.plot_confidence(PROBABILITIES, Y, bins=5, ax=ax.figure.add_subplot())
    assert other.figure is ax.figure
    assert sum(bar.get_height() for bar in other.patches) == pytest.approx(1)
    matplotlib.pyplot.close(ax.figure)
