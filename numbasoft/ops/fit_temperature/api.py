"""The temperature that calibrates a classifier, for callers: checks and a root on one axis."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...launch import launch
from ...totals import total
from . import cpu

STEPS = 200  # far more than bisection needs between the smallest and the largest float


def fit_temperature(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int = -100,
) -> float:
    r"""The temperature at which the softmax of held-out logits has the least cross-entropy.

    .. math:: T = \arg\min_{T > 0} \sum_i \left(\log \sum_k \exp(x_{ik} / T) - x_{i t_i} / T\right)

    Parameters
    ----------
    logits : array_like
        x, of dtype float16, bfloat16, float32 or float64, bool or integers; computed in float64.
    target : array_like of int
        The class of each row, of the shape of ``logits`` without ``axis``.
    axis : int, default -1
        The axis of the classes.
    ignore_index : int, default -100
        Rows of this class do not count.

    Returns
    -------
    float
        T, as near to the minimum as float64 tells it: 1e-12 relative, as a rule nearer.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``. ValueError also where there is no such temperature: no row counts, the
        logits hold NaN or +inf, the logit of a target is -inf, the targets are always the
        largest logits (the colder the better), or the logits are no better than equal ones.

    Notes
    -----
    The sum is convex in 1 / T. Its slope, the mean of x under the softmax less x at the target,
    is brought to zero by Newton's method inside a bracket; each step reads the logits once.

    References
    ----------
    C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks",
    ICML 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> logits = np.log([[0.99, 0.01]] * 4)  # says 99 %, is right in 3 of 4
    >>> round(numbasoft.fit_temperature(logits, [0, 0, 0, 1]), 12)  # log(99) / log(3)
    4.182658338644
    """
    x, y = checks.array(logits, "logits"), checks.array(target, "target")
    checks.result_dtype(x.dtype, "logits")
    axis = checks.class_axis(axis, x.shape, "logits")
    ignore_index = checks.integer(ignore_index, "ignore_index")
    outer = x.shape[:axis] + x.shape[axis + 1 :]
    y, _ = checks.class_indices(y, outer, "target", x.shape[axis], ignore_index, cpu.IGNORED)
    if not (y >= 0).any():
        raise ValueError(f"target has shape {outer}, but none of its rows counts: no temperature fits best")
    slope, curvature = np.zeros(y.size), np.zeros(y.size)

    def at(b):
        """The slope and curvature of the sum in b = 1 / T."""
        factors = elementary.scale(1 / b, True)

        def run(full, reduced):
            x, _ = full
            classes, *outputs = reduced
            inputs = x, classes, *factors
            launch(cpu.moments, cpu.moments_parallel, None, inputs, tuple(outputs), x.shape[0], x.size)

        arrays.over_rows(run, [x, None], [y, slope, curvature], (axis,), np.dtype(np.float64))
        return total(slope), total(curvature)

    return 1 / root(at)


def root(at):
    """Where the slope is zero, found by Newton's method between a negative and a positive one."""
    coldest, hottest = 2.0**400, 2.0**-400
    slope, _ = at(coldest)
    if not math.isfinite(slope):
        raise ValueError("logits hold NaN or infinity in a row that counts: no temperature fits best")
    if slope <= 0:
        raise ValueError("target is the largest logit of every row: the lower the temperature the better")
    if at(hottest)[0] >= 0:
        raise ValueError("target's logits are no larger than the others' on average: no temperature helps")
    low, high, b = 0.0, math.inf, 1.0
    for _ in range(STEPS):
        slope, curvature = at(b)
        if slope == 0:
            return b
        low, high = (b, high) if slope < 0 else (low, b)
        newton = b - slope / curvature if curvature > 0 else math.nan
        if abs(newton - b) <= 2.0**-52 * b:
            return newton
        b = (
            newton
            if low < newton < high
            else b * 4
            if high == math.inf
            else b / 4
            if low == 0
            else middle(low, high)
        )
        if not low < b < high:
            break
    return b


def middle(low, high):
    return math.sqrt(low) * math.sqrt(high)
