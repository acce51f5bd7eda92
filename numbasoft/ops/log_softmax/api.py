"""log_softmax and its gradient, for callers: checks, shapes, allocation, choice of kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...arrays import CALL, LAST, Array, Axis
from ...launch import (
    PARALLEL,
    SMALLEST,
    are_many,
    are_narrow,
    code_for_plain,
    computing_dtype,
    is_past_caches,
    is_wide,
    launch,
    launch_columns,
    launch_plain_columns,
    segments_of,
    shared_work,
    split_rows,
)
from ...vector.types import WIDEST
from . import cpu


@lru_cache(maxsize=256)
def plain_kernel(dtype, temperature, is_few):
    """For plain rows: the kernel, log2(e) / T and 1 / T; or None where they take the general path."""
    if not arrays.is_plainly_computed(dtype, temperature):
        return None
    like, factors = np.empty((1, 1), dtype), elementary.scale_and_inverse(temperature, is_wide(dtype))
    run, inputs = (cpu.forward, cpu.forward_parallel), (like, None, *factors)
    return code_for_plain(*run, (dtype, True), inputs, (like,), is_few), *factors


@lru_cache(maxsize=256)
def masked_or_half_kernel(dtype, temperature, has_mask, is_few):
    """As ``plain_kernel``, in 16 bits too and with a mask: a function of rows, mask and result, or None."""
    if not arrays.is_computed(dtype, temperature):
        return None
    like, mask = arrays.kernel_view(np.empty((1, 1), dtype)), np.empty((1, 1), np.uint8) if has_mask else None
    factors, kind = elementary.scale_and_inverse(temperature, is_wide(dtype)), like.dtype
    forward, inputs = (cpu.forward, cpu.forward_parallel), (like, mask, *factors)
    code = code_for_plain(*forward, (kind, not has_mask), inputs, (like,), is_few)

    def run(rows, mask, y):
        code(rows.view(kind), mask, *factors, y.reshape(rows.shape).view(kind))

    return run


def log_softmax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The logarithm of softmax along one or more axes, without ever forming a probability.

    .. math:: y_j = x_j / T - \log \sum_k \exp(x_k / T)

    Parameters
    ----------
    x : array_like, or an array on a CUDA device
        Logits of dtype float16, bfloat16, float32 or float64, which the result keeps;
        bool and integers are computed in float64. Any layout.
    axis : int, tuple of int or None, default -1
        The axes over which the exponentials of the result sum to 1; None means all of them.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290.
    where : array_like of bool, optional
        Which elements take part, broadcast to the shape of ``x``. The others get -inf,
        whatever they hold.
    out : numpy.ndarray, optional
        Where to put the result, of its shape and dtype; may be ``x`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        Log-probabilities, of the shape of ``x``. At most 2 ULP from the exact result in
        float32 and float64, also next to 0, and 0.51 ULP in float16 and bfloat16.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``softmax``.

    Notes
    -----
    A row with NaN or +inf, or with nothing but -inf, is NaN; a row of which ``where``
    keeps nothing is -inf. The five loops are those of ``numbasoft.literal.log_softmax``. Can be called
    in ``@njit`` functions (see ``numbasoft.overloads``).

    References
    ----------
    P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
    softmax functions", IMA J. Numer. Anal. 41 (2021) 2311-2330.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.log_softmax(np.array([-1.0, 10.0, 5000.0]))
    array([-5001., -4990.,     0.])
    """
    if type(x) is ndarray and where is None and stream is None and type(temperature) is float:
        rows = x if x.ndim == 2 and axis is LAST and x.flags.carray else arrays.plain_rows(x, axis)
        if rows is not None and (out is None or arrays.takes_result(out, x)):
            size = rows.size
            is_few = 0 < size < PARALLEL and (size < SMALLEST or rows.shape[1] > WIDEST)
            if is_few or are_many(rows):
                plain = plain_kernel(x.dtype, temperature, is_few)
                if plain is not None:
                    run, high, low, inverse_high, inverse_low = plain
                    y = np.empty_like(x) if out is None else out
                    result = y if rows is x else y.reshape(rows.shape)
                    run(rows, None, high, low, inverse_high, inverse_low, result)
                    return y
            elif SMALLEST <= size <= CALL and arrays.is_plainly_computed(x.dtype, temperature):
                y = np.empty_like(x) if out is None else out
                factors = elementary.scale_and_inverse(temperature, is_wide(x.dtype))
                forward(rows, None, y.reshape(rows.shape), factors, out is not None)
                return y
    y = (
        arrays.plain_result(masked_or_half_kernel, x, axis, temperature, where, out)
        if stream is None
        else None
    )
    return any_log_softmax(x, axis, temperature, where, out, stream) if y is None else y


def any_log_softmax(x, axis, temperature, where, out, stream):
    """``log_softmax`` of whatever there is: checked, on the CPU or a device, of any dtype and layout."""
    simple = arrays.simplified(x, temperature, out) if stream is None else None
    if simple is not None:
        return log_softmax(simple[0], axis, temperature=simple[1], where=where, out=out)
    if arrays.on_device(stream, x=x, where=where, out=out):
        calls = arrays.device_calls()
        from .cuda import FORWARD

        return calls.forward(FORWARD, x, axis, temperature, where, out, stream)
    x = checks.array(x, "x")
    dtype = checks.result_dtype(x.dtype, "x")
    axes = checks.axes(axis, x.ndim)
    t = checks.temperature(temperature)
    mask = None if where is None else checks.mask(where, x.shape)
    if out is None:
        y = np.empty_like(x, dtype=dtype, subok=False)
    else:
        y = out
        checks.out(out, x.shape, dtype, [("x", x)] + ([] if mask is None else [("where", mask)]))
    if x.size == 0:
        return y
    compute = computing_dtype(dtype, t)
    factors = elementary.scale_and_inverse(t, is_wide(compute))
    arrays.over_rows(
        lambda full, _: forward(*full, factors, out is not None), [x, mask, y], [], axes, compute,
        None if mask is not None or t != 1.0 else lambda full, _: forward_columns(*full, factors),
    )  # fmt: skip
    return y


def forward(x, mask, y, factors, is_given):
    """log_softmax of the rows of x into y, which is new or given by the caller."""
    is_plain = mask is None and factors[2:] == (1.0, 0.0)
    if is_plain and are_narrow(x):
        launch(cpu.narrow, cpu.narrow_parallel, x.dtype, (x, *factors[:2]), (y,), x.shape[0], x.size)
        return
    if split_rows(*x.shape):
        split_forward(x, mask, y, factors)
        return
    if is_plain and is_given and is_past_caches(x, y):
        run = cpu.past_caches, cpu.past_caches_parallel
        launch(*run, x.dtype, (x, *factors[:2]), (y,), x.shape[0], x.size)
        return
    inputs = x, mask, *factors
    launch(cpu.forward, cpu.forward_parallel, (x.dtype, mask is None), inputs, (y,), x.shape[0], x.size)


def forward_columns(x, _, y, factors):
    """log_softmax along the middle axis of x into y."""
    launch_columns(cpu.columns, cpu.columns_parallel, x.dtype, (x, *factors[:2]), (y,))


def split_forward(x, mask, y, factors):
    """``forward`` for few long rows, each shared by all threads."""
    maxima, sums, turns = shared_work(x)
    work = maxima, sums, np.empty_like(sums), turns
    key, inputs = (x.dtype, mask is None), (x, mask, *factors)
    launch(cpu.shared, cpu.shared_parallel, key, inputs, (*work, y), maxima.size, x.size)


def backward_factors_of(temperature, wide):
    """log2(e) and 1 / T in two parts each, the latter in float64."""
    return *elementary.scale(1.0, wide), *elementary.inverse(temperature, True)


@lru_cache(maxsize=256)
def plain_gradient(dtype, temperature, is_few):
    """As ``plain_kernel``, for the gradient: the kernel and ``backward_factors_of``."""
    if not arrays.is_plainly_computed(dtype, temperature):
        return None
    like, factors = np.empty((1, 1), dtype), backward_factors_of(temperature, is_wide(dtype))
    run = cpu.backward, cpu.backward_parallel
    return code_for_plain(*run, dtype, (like, like, *factors), (like,), is_few), *factors


def log_softmax_backward(
    grad: ArrayLike,
    log_y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to the logits, from that with respect to log_softmax's result.

    .. math:: dx_j = \frac{1}{T} \left(g_j - \exp(\log y_j) \sum_k g_k\right)

    Parameters
    ----------
    grad : array_like
        g, the gradient with respect to ``log_y``, of its shape and dtype.
    log_y : array_like
        What ``log_softmax`` returned.
    axis : int, tuple of int or None, default -1
        As given to ``log_softmax``.
    temperature : float, default 1.0
        As given to ``log_softmax``; the bound of errors is kept from 1e-140 to 1e140.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``log_y``; may be ``grad`` or
        ``log_y`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, within 4 ULP of the larger of the result and the largest of the terms ``g[j]``
        and ``exp(log_y[j]) * g[k]``. Where ``log_y`` is -inf it is exactly 0 and ``grad``
        does not count, even if it is NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``softmax_backward``.

    Notes
    -----
    Can be called in ``@njit`` functions (see ``numbasoft.overloads``).

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> log_y = numbasoft.log_softmax(np.array([1.0, 2.0, 3.0]))
    >>> numbasoft.log_softmax_backward(np.array([0.0, 0.0, -1.0]), log_y)
    array([ 0.09003057,  0.24472847, -0.33475904])
    """
    if stream is None and type(temperature) is float:
        g, rows = arrays.plain_pair(grad, log_y, axis, out)
        size = 0 if rows is None else rows.size
        is_few = 0 < size < PARALLEL and (size < SMALLEST or rows.shape[1] > WIDEST)
        if is_few or (size and are_many(rows)):
            plain = plain_gradient(log_y.dtype, temperature, is_few)
            if plain is not None:
                run, high, low, inverse, inverse_low = plain
                dx = np.empty_like(log_y) if out is None else out
                result = dx if rows is log_y else dx.reshape(rows.shape)
                run(g, rows, high, low, inverse, inverse_low, result)
                return dx
        elif SMALLEST <= size <= CALL and arrays.is_plainly_computed(log_y.dtype, temperature):
            dx = np.empty_like(log_y) if out is None else out
            factors = backward_factors_of(temperature, is_wide(log_y.dtype))
            backward(g, rows, dx.reshape(rows.shape), *factors)
            return dx
    return any_log_softmax_backward(grad, log_y, axis, temperature, out, stream)


def any_log_softmax_backward(grad, log_y, axis, temperature, out, stream):
    """``log_softmax_backward`` of whatever there is."""
    if arrays.on_device(stream, grad=grad, log_y=log_y, out=out):
        calls = arrays.device_calls()
        from .cuda import BACKWARD

        return calls.backward(BACKWARD, grad, log_y, "log_y", axis, temperature, out, stream)
    grad, log_y = checks.array(grad, "grad"), checks.array(log_y, "log_y")
    dtype = checks.result_dtype(log_y.dtype, "log_y")
    checks.same_shape(grad, "grad", log_y, "log_y")
    checks.same_dtype(grad, "grad", log_y, "log_y")
    axes = checks.axes(axis, log_y.ndim)
    t = checks.temperature(temperature)
    if out is None:
        dx = np.empty_like(log_y, dtype=dtype, subok=False)
    else:
        dx = out
        checks.out(out, log_y.shape, dtype, [("grad", grad), ("log_y", log_y)])
    if log_y.size == 0:
        return dx
    if log_y.dtype != dtype:  # bool and integers
        grad, log_y = grad.astype(dtype), log_y.astype(dtype)
    compute = computing_dtype(dtype, t)
    factors = backward_factors_of(t, is_wide(compute))
    arrays.over_rows(
        lambda full, _: backward(*full, *factors), [grad, log_y, dx], [], axes, compute,
        None if t != 1.0 else lambda full, _: backward_columns(*full, factors),
    )  # fmt: skip
    return dx


def backward(g, log_y, dx, *factors):
    """The gradient of the rows of log_y into dx."""
    if split_rows(*log_y.shape):
        split_backward(g, log_y, dx, factors)
        return
    run = cpu.backward, cpu.backward_parallel
    if are_narrow(g):
        run = cpu.narrow_backward, cpu.narrow_backward_parallel
    launch(*run, g.dtype, (g, log_y, *factors), (dx,), g.shape[0], g.size)


def backward_columns(g, log_y, dx, factors):
    """The gradient along the middle axis of log_y into dx, but for the parts returned."""
    run = cpu.backward_columns, cpu.backward_columns_parallel
    return launch_plain_columns(*run, g.dtype, (g, log_y, *factors[:2]), dx)


def split_backward(g, log_y, dx, factors):
    """``backward`` for few long rows, each shared by all threads."""
    units, key = segments_of(*g.shape), g.dtype

    def sums_of(factor):
        sums = np.empty((units, 2))
        run = cpu.sums_of_gradients, cpu.sums_of_gradients_parallel
        launch(*run, key, (g, log_y, factor), (sums,), units, g.size)
        return sums

    sums = smaller_sums = sums_of(1.0)
    if not np.abs(sums).max() < 1e300:  # then a row's may overflow
        smaller_sums = sums_of(cpu.SMALLER)
    inputs = g, log_y, *factors, sums, smaller_sums
    launch(cpu.backward_segments, cpu.backward_segments_parallel, key, inputs, (dx,), units, g.size)
