"""softmax for reading, on CUDA: one kernel per step, nothing clever.

Loops 1 to 3 stand in ``numbasoft/cuda/loops.py``, the others in
``numbasoft/ops/softmax/cuda_literal.py`` and ``numbasoft/ops/log_softmax/cuda_literal.py``,
beside the CPU's loops in ``literal.py``. They run in Numba's CUDA simulator too
(``NUMBA_ENABLE_CUDASIM=1``), without a GPU.
`numbasoft.softmax` takes the same steps with a row in registers; use that.
"""

import contextlib
import math

import numpy as np
from numba import cuda

from .. import checks
from ..ops.log_softmax import cuda_literal as log_softmax_steps
from ..ops.softmax import cuda_literal as softmax_steps
from . import require
from .arrays import device_count, ordinal_of
from .jit import SIMULATED

__all__ = ["log_softmax", "softmax"]

THREADS = 128


def softmax(x, axis=-1):
    """Softmax of a device array as four kernels, one for every step.

    Formula, along `axis`: ``m = max_j x_j``, ``e_j = exp(x_j - m)``, ``s = sum_j e_j``, ``y_j = e_j / s``.

    Parameters
    ----------
    x : device array
        C-ordered, float32 or float64, with ``__cuda_array_interface__``.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    numba.cuda device array
        A new array with the shape and dtype of `x`.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not an int.
    ValueError
        If `x` is not C-ordered.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    Notes
    -----
    With n elements along the axis and unit roundoff u, the relative error is at most about
    ``(n + 2 + 2 (max x - min x)) u``, as that of the CPU's literal form.

    Examples
    --------
    On a machine with a GPU (or with ``NUMBA_ENABLE_CUDASIM=1``), so not run as a doctest::

        from numba import cuda
        y = numbasoft.cuda.literal.softmax(cuda.to_device(np.array([1.0, 2.0, 3.0])))
        y.copy_to_host().round(8)  # array([0.09003057, 0.24472847, 0.66524096])
    """
    x, rows = checked(x, axis)
    with device_of(x):
        m, e, s, y = per_row(rows), like(rows), per_row(rows), like(rows)
        run(softmax_steps.maximum, m.size, rows, m)
        run(softmax_steps.exponentials, rows.size, rows, m, e)
        run(softmax_steps.sums, s.size, e, s)
        run(softmax_steps.quotients, rows.size, e, s, y)
        return y.reshape(*x.shape)


def log_softmax(x, axis=-1):
    """log_softmax of a device array as five kernels, one for every step.

    Formula, along `axis`: ``m = max_j x_j``, ``e_j = exp(x_j - m)``, ``s = sum_j e_j``, ``l = log(s)``,
    ``y_j = x_j - m - l``.

    Parameters
    ----------
    x : device array
        C-ordered, float32 or float64, with ``__cuda_array_interface__``.
    axis : int, default -1
        The softmax axis.

    Returns
    -------
    numba.cuda device array
        A new array with the shape and dtype of `x`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    Notes
    -----
    Near 0 these loops lose what `numbasoft.log_softmax` keeps, as the CPU's literal form does.

    Examples
    --------
    Not run as a doctest, see `softmax`::

        y = numbasoft.cuda.literal.log_softmax(cuda.to_device(np.array([-1.0, 10.0, 5000.0])))
        y.copy_to_host()  # array([-5001., -4990.,     0.])
    """
    x, rows = checked(x, axis)
    with device_of(x):
        m, e, s, log_s, y = per_row(rows), like(rows), per_row(rows), per_row(rows), like(rows)
        run(log_softmax_steps.maximum, m.size, rows, m)
        run(log_softmax_steps.exponentials, rows.size, rows, m, e)
        run(log_softmax_steps.sums, s.size, e, s)
        run(log_softmax_steps.logarithms, s.size, s, log_s)
        run(log_softmax_steps.differences, rows.size, rows, m, log_s, y)
        return y.reshape(*x.shape)


def checked(x, axis):
    """x as a Numba device array, and as (outer, n, inner) with the softmax axis in the middle."""
    require()
    x = cuda.as_cuda_array(x) if not getattr(x, "__cuda_ndarray__", False) else x
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x has dtype {x.dtype}, but must have dtype float32 or float64")
    if not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis is {axis!r}, but must be an int: the loops run along one axis")
    axis, *_ = checks.axes(axis, len(x.shape)) or (0,)
    n = x.shape[axis] if x.shape else 1
    try:
        return x, x.reshape(math.prod(x.shape[:axis]), n, math.prod(x.shape[axis + 1 :]))
    except NotImplementedError:  # numba-cuda's, where to reshape would be to copy
        raise ValueError(f"x has strides {x.strides}, but must be C-ordered") from None


def device_of(x):
    """What to enter to launch kernels on the device that x is on."""
    if SIMULATED or device_count() == 1:
        return contextlib.nullcontext()
    return cuda.gpus[ordinal_of(x.device_ctypes_pointer.value)]


def like(rows):
    return cuda.device_array(rows.shape, rows.dtype)


def per_row(rows):
    """An array for one number per row."""
    outer, _, inner = rows.shape
    return cuda.device_array((outer, inner), rows.dtype)


def run(step, threads, *arrays):
    """One step: as many threads as there is work."""
    if threads:
        step[-(-threads // THREADS), THREADS](*arrays)
