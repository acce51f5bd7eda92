"""The temperature that calibrates a classifier, for callers: checks and a root on one axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...launch import launch
from ...totals import total
from . import cpu

STEPS = 200  # far more than bisection needs between the smallest and the largest temperature
HOTTEST, COLDEST = 1 / checks.LARGEST_TEMPERATURE, 1 / checks.SMALLEST_TEMPERATURE


def fit_temperature(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    stream: Any = None,
) -> float:
    r"""The temperature at which the softmax of held-out logits has the least cross-entropy.

    .. math:: T = \arg\min_{T > 0} \sum_i \left(\log \sum_k \exp(x_{ik} / T) - x_{i t_i} / T\right)

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, bool or integers; computed in float64.
    target : array_like of int
        The class of each row, of the shape of ``logits`` without ``axis``.
    axis : int, default -1
        The axis of the classes.
    ignore_index : int, default -100
        Rows of this class do not count.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    float
        T, as near to the minimum as float64 tells it: 1e-12 relative, as a rule nearer.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``. ValueError also where there is no such temperature: no row counts, the
        logits hold NaN or +inf, the logit of a target is -inf, the targets are always the
        largest logits (the colder the better), the logits are no better than equal ones, or
        the best temperature is not from 1e-290 to 1e290, as temperatures must be.
    RuntimeError
        The stream is being captured in a graph.

    Notes
    -----
    The sum is convex in 1 / T. Its slope, the mean of x under the softmax less x at the target,
    is brought to zero by Newton's method inside a bracket, in seven or eight steps as a rule; each
    reads the logits.

    Arrays on a CUDA device are both on it. Unlike other functions this one waits for the device: at
    every step two numbers are copied to the host. So it refuses what it refuses on the CPU. There are 24 bytes
    of room for every row, and a copy of the logits where their rows are not contiguous. The last digit
    or two of T may differ from the CPU's.

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
    if arrays.on_device(stream, logits=logits, target=target):
        return device_fits().fit(device_kernels(), minimum, logits, target, axis, ignore_index, stream)
    x, y = checks.array(logits, "logits"), checks.array(target, "target")
    checks.result_dtype(x.dtype, "logits")
    axis = checks.class_axis(axis, x.shape, "logits")
    ignore_index = checks.integer(ignore_index, "ignore_index")
    outer = x.shape[:axis] + x.shape[axis + 1 :]
    y, _ = checks.class_indices(y, outer, "target", x.shape[axis], ignore_index, cpu.IGNORED)
    checks.some_count(y, outer, "target")
    slope, curvature = np.zeros(y.size), np.zeros(y.size)

    def at(b, unit):
        def run(full, reduced):
            x, _ = full
            classes, *outputs = reduced
            inputs = x, classes, unit, *elementary.power_scale(b)
            launch(cpu.moments, cpu.moments_parallel, None, inputs, tuple(outputs), x.shape[0], x.size)

        arrays.over_rows(run, [x, None], [y, slope, curvature], (axis,), np.dtype(np.float64))
        return total(slope), total(curvature)

    return minimum(at, y.size)


def device_fits():
    arrays.device_calls()
    from ...cuda import fits

    return fits


def device_kernels():
    from .cuda import MOMENTS

    return MOMENTS


def minimum(at, rows):
    """The temperature at which the sum over so many rows is least.

    ``at(b, unit)`` gives its slope and curvature in b = 1 / T for logits times ``unit``, a power of two.
    """
    coldest, _ = at(math.inf, 1.0)
    if not math.isfinite(coldest):
        raise ValueError(
            "logits hold NaN or infinity in a row that counts, or differ by more than float64 holds: "
            "no temperature fits best"
        )
    hottest, _ = at(0.0, 1.0)
    if coldest == hottest == 0:
        raise ValueError("logits are equal in every row that counts: all temperatures fit equally well")
    if coldest == 0:
        raise ValueError("target is the largest logit of every row: the lower the temperature the better")
    if hottest >= 0:
        raise ValueError("target's logits are no larger than the others' on average: no temperature helps")
    # negative in the cold: between subnormal logits even that is not cold enough
    b = root(at, coldest, power_of_two(rows / (coldest - hottest))) if coldest > 0 else COLDEST
    if b == HOTTEST:
        most = checks.LARGEST_TEMPERATURE
        raise ValueError(
            f"logits are so large that the best temperature is above {most}, the largest allowed"
        )
    if b == COLDEST:
        least = checks.SMALLEST_TEMPERATURE
        raise ValueError(
            f"logits are so close to each other that the best temperature is below {least}, the smallest allowed"
        )
    return 1 / b


def root(at, at_infinity, b):
    """Where the slope is zero, or the end of the range that is next to there.

    The slope is that at infinity less what falls from row to row like exp(-b * distance): Newton's
    method, from b on, is for the logarithm of that, or it would creep along such a tail.
    """
    low, high, stride = 0.0, math.inf, 4.0
    for _ in range(STEPS):
        b = min(max(b, HOTTEST), COLDEST)
        unit = power_of_two(b)
        slope, curvature = at(b, unit)
        if slope == 0 or (slope > 0 and b == HOTTEST) or (slope < 0 and b == COLDEST):
            return b
        low, high = (b, high) if slope < 0 else (low, b)
        newton, top = math.nan, at_infinity * unit
        if curvature > 0 and slope < top < math.inf:
            newton = b + math.log1p(-slope / top) * ((top - slope) / curvature) * unit
        if abs(newton - b) <= 2.0**-52 * b:
            return newton
        if low < newton < high:
            b = newton
        elif low == 0 or high == math.inf:
            b = b * stride if low else b / stride
            stride *= stride
        else:
            b = math.sqrt(low) * math.sqrt(high)
            if not low < b < high:
                break
    return b


def power_of_two(b):
    """The largest power of two not above a positive number, inside the range."""
    return 2.0 ** (math.frexp(min(max(b, HOTTEST), COLDEST))[1] - 1)
