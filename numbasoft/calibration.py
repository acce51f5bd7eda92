"""Calibration: whether probabilities mean what they say, and the temperature that makes them do so.

Of a classifier that says 80 %, four of five answers should be right. ``TemperatureScaler`` divides logits
by the temperature that fits held-out data best; ``calibration_error``, ``reliability_curve`` and
``plot_reliability`` tell how far probabilities are from what happens. The plots need matplotlib.

References
----------
C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017;
M. P. Naeini, G. F. Cooper, M. Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
binning", AAAI 2015 (the expected and maximum error); J. Nixon et al., "Measuring calibration in deep
learning", CVPR workshops 2019 (classwise, equal-mass bins).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import arrays, checks
from .ops.fit_temperature.api import fit_temperature
from .ops.softmax.api import softmax

__all__ = [
    "ReliabilityCurve",
    "TemperatureScaler",
    "calibration_error",
    "fit_temperature",
    "plot_confidence",
    "plot_reliability",
    "reliability_curve",
]

NORMS = ("expected", "maximum", "classwise")
STRATEGIES = ("width", "mass")


class TemperatureScaler:
    """Softmax at the temperature that fits held-out logits best, in the manner of scikit-learn.

    Attributes
    ----------
    temperature_ : float
        What ``fit`` found; above 1 for a classifier that was too sure of itself.

    Examples
    --------
    >>> import numpy as np
    >>> from numbasoft.calibration import TemperatureScaler
    >>> logits = np.log([[0.99, 0.01]] * 4)  # says 99 %, is right in 3 of 4
    >>> TemperatureScaler().fit(logits, [0, 0, 0, 1]).predict_proba(logits[:1])
    array([[0.75, 0.25]])
    """

    temperature_: float

    def fit(self, logits: ArrayLike, target: ArrayLike) -> TemperatureScaler:
        """Find the temperature from logits (rows, classes) and the classes of the rows; see ``fit_temperature``.

        Both may be on a CUDA device, as may the logits of ``predict_proba``.
        """
        self.temperature_ = fit_temperature(logits, target)
        return self

    def predict_proba(self, logits: ArrayLike) -> NDArray[Any]:
        """The softmax of logits at the temperature found."""
        if not hasattr(self, "temperature_"):
            raise ValueError("this TemperatureScaler has no temperature yet: call fit first")
        return softmax(logits, temperature=self.temperature_)

    def predict(self, logits: ArrayLike) -> NDArray[Any]:
        """The most probable class of each row, which no temperature changes.

        Of an array on a CUDA device as its own ``argmax`` gives it, on the device; Numba's have none.
        """
        if not arrays.lives_on_device(logits):
            return np.argmax(checks.array(logits, "logits"), axis=-1)
        kind = type(logits)
        if not hasattr(kind, "argmax"):
            raise TypeError(
                f"logits is a {kind.__module__}.{kind.__qualname__}, which has no argmax: pass CuPy's or "
                "PyTorch's array, or a copy on the CPU"
            )
        return kind.argmax(logits, -1)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """No parameters: what ``sklearn.base.clone`` asks for."""
        return {}

    def set_params(self, **params: Any) -> TemperatureScaler:
        """Nothing to set."""
        if params:
            raise ValueError(f"params has {', '.join(params)}, but TemperatureScaler has no parameters")
        return self

    def __repr__(self) -> str:
        found = getattr(self, "temperature_", None)
        return "TemperatureScaler()" if found is None else f"TemperatureScaler(): temperature_={found:.6g}"


class ReliabilityCurve(NamedTuple):
    """What predictions say and what happens, bin by bin; NaN in bins that nothing falls into."""

    confidence: NDArray[np.float64]  # the mean probability of the predicted class
    accuracy: NDArray[np.float64]  # how many of the predictions are right
    count: NDArray[np.int64]  # how many predictions there are
    edges: NDArray[
        np.float64
    ]  # one more than bins; a bin holds what is above its lower edge, up to the upper


def checked(probabilities, target, bins, strategy):
    p = checks.array(probabilities, "probabilities")
    dtype = checks.result_dtype(p.dtype, "probabilities")
    if p.ndim != 2 or not p.shape[1]:
        raise ValueError(f"probabilities has shape {p.shape}, but must have shape (rows, classes)")
    wide = p.astype(np.float64)
    least = wide.min(axis=1, initial=np.inf)
    checks.distributions(least, wide.sum(axis=1), "probabilities", p.shape[:1], dtype)
    bins = checks.integer(bins, "bins")
    if bins < 1:
        raise ValueError(f"bins is {bins}, but must be at least 1")
    checks.one_of(strategy, "strategy", STRATEGIES)
    y = None
    if target is not None:
        y = checks.array(target, "target")
        y, _ = checks.class_indices(y, p.shape[:1], "target", p.shape[1], None, -1)
    if not len(p):
        raise ValueError(f"probabilities has shape {p.shape}, but there must be at least one row")
    return wide, y, bins


def binned(values, bins, strategy):
    """The edges of the bins, and the bin of each value: lower edge < value <= upper edge."""
    if strategy == "width":
        edges = np.linspace(0, 1, bins + 1)
    else:  # equal values share a bin, whatever their order
        edges = np.quantile(values, np.linspace(0, 1, bins + 1))
        edges[0], edges[-1] = 0, 1
    return edges, np.searchsorted(edges[1:-1], values, side="left")


def in_bins(values, happened, bins, strategy):
    """The mean of values, how often the event happened, and the number, per bin."""
    edges, index = binned(values, bins, strategy)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(index, values, bins) / count
        rates = np.bincount(index, happened, bins) / count
    return ReliabilityCurve(means, rates, count, edges)


def reliability_curve(
    probabilities: ArrayLike,
    target: ArrayLike,
    *,
    bins: int = 15,
    strategy: str = "width",
) -> ReliabilityCurve:
    """How often predictions are right, by how sure they are.

    Parameters
    ----------
    probabilities : array_like
        What a classifier says, (rows, classes); rows sum to 1.
    target : array_like of int
        The class of each row.
    bins : int, default 15
        How many parts the predicted class's probability is cut into.
    strategy : {"width", "mass"}, default "width"
        Bins of equal width, or with equally many rows (ties stay together).

    Returns
    -------
    ReliabilityCurve
        ``confidence``, ``accuracy``, ``count`` and ``edges``.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or shape, or is out of its range; or there is no row.

    Examples
    --------
    >>> from numbasoft.calibration import reliability_curve
    >>> curve = reliability_curve([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], [0, 0, 1], bins=2)
    >>> curve.accuracy
    array([       nan, 0.66666667])
    """
    p, y, bins = checked(probabilities, target, bins, strategy)
    return in_bins(p.max(axis=1), p.argmax(axis=1) == y, bins, strategy)


def calibration_error(
    probabilities: ArrayLike,
    target: ArrayLike,
    *,
    norm: str = "expected",
    bins: int = 15,
    strategy: str = "width",
) -> float:
    """How far probabilities are from what happens.

    Parameters
    ----------
    probabilities : array_like
        What a classifier says, (rows, classes); rows sum to 1.
    target : array_like of int
        The class of each row.
    norm : {"expected", "maximum", "classwise"}, default "expected"
        The mean over predictions of abs(accuracy - confidence) of their bins; the largest of
        these over bins; or the mean over classes of the first, for the probability of each
        class instead of that of the predicted one.
    bins : int, default 15
        How many bins.
    strategy : {"width", "mass"}, default "width"
        Bins of equal width, or with equally many rows (ties stay together).

    Returns
    -------
    float
        From 0, which is calibrated, to 1.

    Raises
    ------
    TypeError, ValueError
        As ``reliability_curve``; or the norm is unknown.

    Examples
    --------
    >>> from numbasoft.calibration import calibration_error
    >>> round(calibration_error([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], [0, 0, 1]), 6)
    0.1
    """
    checks.one_of(norm, "norm", NORMS)
    p, y, bins = checked(probabilities, target, bins, strategy)
    if norm == "classwise":
        curves = [in_bins(p[:, k], y == k, bins, strategy) for k in range(p.shape[1])]
    else:
        curves = [in_bins(p.max(axis=1), p.argmax(axis=1) == y, bins, strategy)]
    gaps = [np.abs(np.nan_to_num(c.accuracy - c.confidence)) for c in curves]
    if norm == "maximum":
        return float(gaps[0].max())
    return float(np.mean([np.average(g, weights=c.count) for g, c in zip(gaps, curves, strict=True)]))


def axes_to_draw_on(ax):
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib", name="matplotlib"
        ) from None
    return pyplot.subplots(figsize=(4.5, 4.5))[1] if ax is None else ax


def plot_reliability(
    probabilities: ArrayLike,
    target: ArrayLike,
    *,
    bins: int = 15,
    strategy: str = "width",
    ax: Any = None,
) -> Any:
    """Draw a reliability diagram: accuracy over confidence, and the gap to the diagonal.

    Parameters
    ----------
    probabilities, target, bins, strategy :
        As given to ``reliability_curve``.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure if not given.

    Returns
    -------
    matplotlib.axes.Axes
        Where it was drawn.

    Raises
    ------
    TypeError, ValueError
        As ``reliability_curve``.
    ModuleNotFoundError
        There is no matplotlib.

    Examples
    --------
    >>> from numbasoft.calibration import plot_reliability
    >>> ax = plot_reliability([[0.9, 0.1], [0.6, 0.4]], [0, 1])  # doctest: +SKIP
    """
    curve = reliability_curve(probabilities, target, bins=bins, strategy=strategy)
    error = calibration_error(probabilities, target, bins=bins, strategy=strategy)
    ax = axes_to_draw_on(ax)
    some = curve.count > 0
    left, width = curve.edges[:-1][some], np.diff(curve.edges)[some]
    accuracy, confidence = curve.accuracy[some], curve.confidence[some]
    ax.bar(left, accuracy, width, align="edge", color="#4878a8", edgecolor="white", label="accuracy")
    ax.bar(
        left, confidence - accuracy, width, accuracy, align="edge",
        color="#d65f5f", alpha=0.35, edgecolor="#d65f5f", label="gap to confidence",
    )  # fmt: skip
    ax.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_title(f"expected calibration error {error:.1%}")
    ax.legend(loc="upper left", frameon=False)
    return ax


def plot_confidence(
    probabilities: ArrayLike,
    target: ArrayLike | None = None,
    *,
    bins: int = 15,
    ax: Any = None,
) -> Any:
    """Draw a histogram of how sure predictions are; with the target, also lines for mean confidence and accuracy.

    Parameters
    ----------
    probabilities : array_like
        What a classifier says, (rows, classes); rows sum to 1.
    target : array_like of int, optional
        The class of each row.
    bins : int, default 15
        How many bins, of equal width.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure if not given.

    Returns
    -------
    matplotlib.axes.Axes
        Where it was drawn.

    Raises
    ------
    TypeError, ValueError
        As ``reliability_curve``.
    ModuleNotFoundError
        There is no matplotlib.

    Examples
    --------
    >>> from numbasoft.calibration import plot_confidence
    >>> ax = plot_confidence([[0.9, 0.1], [0.6, 0.4]])  # doctest: +SKIP
    """
    p, y, bins = checked(probabilities, target, bins, "width")
    ax = axes_to_draw_on(ax)
    top = p.max(axis=1)
    ax.hist(
        top,
        np.linspace(0, 1, bins + 1),
        weights=np.full(len(top), 1 / len(top)),
        color="#4878a8",
        edgecolor="white",
    )
    ax.axvline(top.mean(), color="0.2", linewidth=1, label=f"mean confidence {top.mean():.1%}")
    if y is not None:
        accuracy = (p.argmax(axis=1) == y).mean()
        ax.axvline(accuracy, color="#d65f5f", linestyle="--", linewidth=1, label=f"accuracy {accuracy:.1%}")
    ax.set(xlim=(0, 1), xlabel="confidence", ylabel="part of the rows")
    ax.legend(loc="upper left", frameon=False)
    return ax
