"""softmax for reading: the definitions, one loop nest per step, nothing clever.

A ladder of three steps, the first two here:

1. `softmax_naive` is the formula as written in textbooks. It overflows.
2. `softmax_stable` shifts by the maximum first. `softmax` and `log_softmax` do the same as four and
   five loop nests over the whole array, which is what a compiled library runs. Their loops stand in
   ``numbasoft/ops/softmax/literal.py`` and ``numbasoft/ops/log_softmax/literal.py``.
3. `numbasoft.softmax` and `numbasoft.log_softmax` take the same loops row by row, while the row is in
   cache, with an exp and a sum that lose nothing. Use these; the ones here are what they are
   compared with.
"""

import functools
import math
import types

import numpy as np

from . import checks
from .jit import kernel, parallel_region
from .ops.log_softmax.literal import log_softmax_loops
from .ops.softmax.literal import softmax_loops

__all__ = ["log_softmax", "softmax", "softmax_naive", "softmax_stable"]


def softmax_naive(x, axis=-1):
    """Softmax without the shift, to be seen failing.

    Formula: ``y_j = exp(x_j) / sum_k exp(x_k)`` along `axis`, one NumPy expression. exp overflows
    from 709.8 on (88.7 in float32) and inf / inf is NaN; where every exp underflows to 0, 0 / 0 is NaN too.

    Parameters
    ----------
    x : array_like
        float32 and float64 keep their dtype; float16, bfloat16, integers and bool become float64.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    ndarray
        A new array with the shape of `x`.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not an int.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    See Also
    --------
    softmax_stable : the same with the shift.

    Examples
    --------
    >>> import numpy as np
    >>> from numbasoft import literal
    >>> literal.softmax_naive([1.0, 2.0, 3.0]).round(8)
    array([0.09003057, 0.24472847, 0.66524096])
    >>> literal.softmax_naive([1000.0, 1000.0, 1000.0])
    array([nan, nan, nan])
    >>> literal.softmax_naive([-1000.0, -1000.0, -1000.0])
    array([nan, nan, nan])
    """
    x, axis = checked(x, axis)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(x) / np.sum(np.exp(x), axis, keepdims=True)


def softmax_stable(x, axis=-1):
    """Softmax with the shift, as one NumPy expression.

    Formula: ``z = x - max_k x_k``, then ``y_j = exp(z_j) / sum_k exp(z_k)`` along `axis`. The shift divides
    numerator and denominator by the same ``exp(max)``: the value stays, and no exp exceeds 1.

    Parameters
    ----------
    x : array_like
        float32 and float64 keep their dtype; float16, bfloat16, integers and bool become float64.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    ndarray
        A new array with the shape of `x`.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not an int.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    See Also
    --------
    softmax : the same steps as four loop nests.

    Examples
    --------
    >>> import numpy as np
    >>> from numbasoft import literal
    >>> literal.softmax_stable([1000.0, 1000.0, 1000.0])
    array([0.33333333, 0.33333333, 0.33333333])
    >>> literal.softmax_stable([-1.0, 10.0, 5000.0])
    array([0., 0., 1.])
    """
    x, axis = checked(x, axis)
    with np.errstate(invalid="ignore"):
        z = x - np.max(x, axis, keepdims=True, initial=-np.inf)
    return np.exp(z) / np.sum(np.exp(z), axis, keepdims=True)


def softmax(x, axis=-1):
    """Softmax as four loop nests over the whole array.

    Formula, along `axis`:

    1. ``m   = max_j x_j``
    2. ``e_j = exp(x_j - m)``
    3. ``s   = sum_j e_j``
    4. ``y_j = e_j / s``

    Every step is finished for the whole array before the next one begins, and what it computes is kept
    in an array: this is the definition, and the baseline for `numbasoft.softmax`, which gives the same
    in less time and memory and with a smaller error.

    Parameters
    ----------
    x : array_like
        float32 and float64 keep their dtype; float16, bfloat16, integers and bool become float64.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    ndarray
        A new C-ordered array with the shape of `x`.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not an int.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    Notes
    -----
    With n elements along the axis and unit roundoff u, the relative error is at most about
    ``(n + 2 + 2 (max x - min x)) u`` [1]_. The order of the loops is that of the reference implementation
    of PyTorch.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and softmax
       functions", IMA J. Numer. Anal. 41 (2021) 2311-2330.

    Examples
    --------
    >>> from numbasoft import literal
    >>> literal.softmax([1.0, 2.0, 3.0]).round(8)
    array([0.09003057, 0.24472847, 0.66524096])
    >>> literal.softmax([[0.0, 1000.0], [0.0, 1000.0]], axis=0)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    x, axis = checked(x, axis)
    rows = as_rows(x, axis)
    m, e, s, y = per_row(rows), np.empty_like(rows), per_row(rows), np.empty_like(rows)
    run(softmax_loops, rows, m, e, s, y)
    return y.reshape(x.shape)


def log_softmax(x, axis=-1):
    """log_softmax as five loop nests over the whole array.

    Formula, along `axis`:

    1. ``m   = max_j x_j``
    2. ``e_j = exp(x_j - m)``
    3. ``s   = sum_j e_j``
    4. ``l   = log(s)``
    5. ``y_j = x_j - m - l``

    The exponentials serve the sum alone, and a subtraction takes the place of the division. A
    probability that would underflow to 0 keeps its finite logarithm.

    Parameters
    ----------
    x : array_like
        float32 and float64 keep their dtype; float16, bfloat16, integers and bool become float64.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    ndarray
        A new C-ordered array with the shape of `x`.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not an int.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    Notes
    -----
    Near 0 these loops lose what `numbasoft.log_softmax` keeps: for ``[0, -40]`` in float64 the sum rounds to
    1 and the first result to 0, where -4.2e-18 is right. The order of the loops is that of the
    reference implementation of PyTorch.

    Examples
    --------
    >>> import numpy as np
    >>> from numbasoft import literal
    >>> y = literal.log_softmax([-1.0, 10.0, 5000.0])
    >>> y
    array([-5001., -4990.,     0.])
    >>> np.exp(y)
    array([0., 0., 1.])
    """
    x, axis = checked(x, axis)
    rows = as_rows(x, axis)
    m, e, s, log_s, y = per_row(rows), np.empty_like(rows), per_row(rows), per_row(rows), np.empty_like(rows)
    run(log_softmax_loops, rows, m, e, s, log_s, y)
    return y.reshape(x.shape)


# Around the loops


def checked(x, axis):
    """x as a plain array of float32 or float64, and axis counted from the front."""
    x = checks.array(x, "x")
    dtype = checks.result_dtype(x.dtype, "x")
    if not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis is {axis!r}, but must be an int: the loops run along one axis")
    axis, *_ = checks.axes(axis, x.ndim) or (0,)
    # Writeable, although nothing writes to it: Numba would compile the loops again for read-only arrays.
    return np.require(x, dtype if dtype == np.float32 else np.float64, "CAW"), axis


def as_rows(x, axis):
    """x as (outer, n, inner), with the softmax axis in the middle."""
    n = x.shape[axis] if x.ndim else 1
    return x.reshape(math.prod(x.shape[:axis]), n, math.prod(x.shape[axis + 1 :]))


def per_row(rows):
    """An array for one number per row."""
    outer, _, inner = rows.shape
    return np.empty((outer, inner), rows.dtype)


def run(loops, *arrays):
    with parallel_region() as allowed:
        (loops if allowed else in_one_thread(loops))(*arrays)


@functools.cache
def in_one_thread(loops):
    """The same loops, compiled for where no parallel region may be entered (see jit.py).

    prange is range without threads, so no second text is needed; a second name is, by which the
    caches tell the two machine codes apart.
    """
    func = loops.py_func
    return kernel(types.FunctionType(func.__code__, func.__globals__, f"{func.__name__}_in_one_thread"))
