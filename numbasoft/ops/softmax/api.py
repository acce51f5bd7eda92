"""softmax and its gradient, for callers: checks, shapes, allocation, choice of kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary, jit
from ...arrays import CALL, LAST, Array, Axis
from ...launch import (
    LONGEST_WORK,
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
    workspace,
)
from ...vector.types import WIDEST
from . import cpu


@lru_cache(maxsize=256)
def plain_kernel(dtype, temperature, is_few):
    """For plain rows: the kernel, and log2(e) / T in two parts; or None where they take the general path."""
    if not arrays.is_plainly_computed(dtype, temperature):
        return None
    like, factors = np.empty((1, 1), dtype), elementary.scale(temperature, is_wide(dtype))
    run, inputs = (cpu.forward, cpu.forward_parallel), (like, None, None, *factors)
    return code_for_plain(*run, (dtype, True), inputs, (like,), is_few), *factors


@lru_cache(maxsize=256)
def masked_or_half_kernel(dtype, temperature, has_mask, is_few):
    """As ``plain_kernel``, in 16 bits too and with a mask: a function of rows, mask and result, or None."""
    if not arrays.is_computed(dtype, temperature):
        return None
    like, mask = arrays.kernel_view(np.empty((1, 1), dtype)), np.empty((1, 1), np.uint8) if has_mask else None
    factors, is_half = elementary.scale(temperature, is_wide(dtype)), dtype.itemsize == 2
    inputs, kind = (like, mask, workspace(1, 1) if is_half else None, *factors), like.dtype
    code = code_for_plain(cpu.forward, cpu.forward_parallel, (kind, not has_mask), inputs, (like,), is_few)

    def run(rows, mask, y):
        blocks = 1 if is_few else min(len(rows), jit.threads())
        work = workspace(blocks, rows.shape[1]) if is_half else None
        code(rows.view(kind), mask, work, *factors, y.reshape(rows.shape).view(kind))

    return run


def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""Softmax along one or more axes.

    .. math:: y_j = \frac{\exp(x_j / T)}{\sum_k \exp(x_k / T)}

    Parameters
    ----------
    x : array_like, or an array on a CUDA device
        Logits of dtype float16, bfloat16, float32 or float64, which the result keeps;
        bool and integers are computed in float64. Any layout.
    axis : int, tuple of int or None, default -1
        The axes over which the result sums to 1; None means all of them.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290. It is applied inside the exponential, in higher precision.
    where : array_like of bool, optional
        Which elements take part, broadcast to the shape of ``x``. The others count as
        -inf and get the probability 0, whatever they hold.
    out : numpy.ndarray, optional
        Where to put the result, of its shape and dtype; may be ``x`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        Probabilities, of the shape of ``x``. At most 2 ULP from the exact result in
        float32 and float64, and 0.51 ULP in float16 and bfloat16, whatever the length.

    Raises
    ------
    TypeError
        ``x``, ``where``, ``out``, ``axis`` or ``temperature`` has a wrong type or dtype.
    ValueError
        ``temperature`` is out of range, an axis is repeated, ``where`` does not broadcast,
        ``out`` has a wrong shape, is read-only, or overlaps an input in part.
    numpy.exceptions.AxisError
        An axis is out of range.

    Notes
    -----
    A row with NaN or +inf, or with nothing but -inf, is NaN; a row of which ``where``
    keeps nothing is 0. The four loops are those of ``numbasoft.literal.softmax``. Can be called
    in ``@njit`` functions (see ``numbasoft.overloads``).

    References
    ----------
    P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
    softmax functions", IMA J. Numer. Anal. 41 (2021) 2311-2330.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.softmax(np.array([1.0, 2.0, 3.0]))
    array([0.09003057, 0.24472847, 0.66524096])
    """
    if type(x) is ndarray and where is None and stream is None and type(temperature) is float:
        rows = x if x.ndim == 2 and axis is LAST and x.flags.carray else arrays.plain_rows(x, axis)
        if rows is not None and (out is None or arrays.takes_result(out, x)):
            size = rows.size
            is_few = 0 < size < PARALLEL and (size < SMALLEST or rows.shape[1] > WIDEST)
            if is_few or are_many(rows):
                plain = plain_kernel(x.dtype, temperature, is_few)
                if plain is not None:
                    run, high, low = plain
                    y = np.empty_like(x) if out is None else out
                    run(rows, None, None, high, low, y if rows is x else y.reshape(rows.shape))
                    return y
            elif SMALLEST <= size <= CALL and arrays.is_plainly_computed(x.dtype, temperature):
                y = np.empty_like(x) if out is None else out
                factors = elementary.scale(temperature, is_wide(x.dtype))
                forward(rows, None, y.reshape(rows.shape), *factors, out is not None)
                return y
    y = (
        arrays.plain_result(masked_or_half_kernel, x, axis, temperature, where, out)
        if stream is None
        else None
    )
    return any_softmax(x, axis, temperature, where, out, stream) if y is None else y


def any_softmax(x, axis, temperature, where, out, stream):
    """``softmax`` of whatever there is: checked, on the CPU or a device, of any dtype and layout."""
    simple = arrays.simplified(x, temperature, out) if stream is None else None
    if simple is not None:
        return softmax(simple[0], axis, temperature=simple[1], where=where, out=out)
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
    high, low = elementary.scale(t, is_wide(compute))
    arrays.over_rows(
        lambda full, _: forward(*full, high, low, out is not None), [x, mask, y], [], axes, compute,
        None if mask is not None else lambda full, _: forward_columns(*full, high, low),
    )  # fmt: skip
    return y


def forward(x, mask, y, high, low, is_given):
    """softmax of the rows of x into y, which is new or given by the caller."""
    rows, n = x.shape
    if are_narrow(x, mask):
        launch(cpu.narrow, cpu.narrow_parallel, x.dtype, (x, high, low), (y,), rows, x.size)
        return
    is_half = y.itemsize == 2
    if split_rows(rows, n) or (is_half and n > LONGEST_WORK):
        split_forward(x, mask, y, high, low)
        return
    if mask is None and is_given and is_past_caches(x, y):
        work = workspace(min(rows, jit.threads()), n, x.dtype)
        inputs = x, work, high, low
        launch(cpu.past_caches, cpu.past_caches_parallel, x.dtype, inputs, (y,), rows, x.size)
        return
    work = workspace(min(rows, jit.threads()), n) if is_half else None
    inputs = x, mask, work, high, low
    launch(cpu.forward, cpu.forward_parallel, (x.dtype, mask is None), inputs, (y,), rows, x.size)


def forward_columns(x, _, y, high, low):
    """softmax along the middle axis of x into y."""
    launch_columns(cpu.columns, cpu.columns_parallel, x.dtype, (x, high, low), (y,))


def split_forward(x, mask, y, high, low):
    """``forward`` for few long rows, each shared by all threads."""
    e = None if y.itemsize == 2 else y
    maxima, sums, turns = shared_work(x)
    key, inputs = (x.dtype, mask is None, e is None), (x, mask, high, low)
    launch(cpu.shared, cpu.shared_parallel, key, inputs, (e, maxima, sums, turns, y), maxima.size, x.size)


@lru_cache(maxsize=256)
def plain_gradient(dtype, temperature, is_few):
    """As ``plain_kernel``, for the gradient: the kernel and 1 / T."""
    if not arrays.is_plainly_computed(dtype, temperature):
        return None
    like, inverse = np.empty((1, 1), dtype), 1 / temperature
    run = cpu.backward, cpu.backward_parallel
    return code_for_plain(*run, dtype, (like, like, inverse), (like,), is_few), inverse


def softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to the logits, from that with respect to softmax's result.

    .. math:: dx_j = \frac{y_j}{T} \left(g_j - \sum_k g_k y_k\right)

    Parameters
    ----------
    grad : array_like
        g, the gradient with respect to ``y``, of its shape and dtype.
    y : array_like
        What ``softmax`` returned.
    axis : int, tuple of int or None, default -1
        As given to ``softmax``.
    temperature : float, default 1.0
        As given to ``softmax``; the bound of errors is kept from 1e-140 to 1e140.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``y``; may be ``grad`` or ``y`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, within 4 ULP of the larger of the result and the largest term of its sum. Where
        ``y`` is exactly 0 it is exactly 0 and ``grad`` does not count, even if it is NaN.

    Raises
    ------
    TypeError
        An argument has a wrong type, or ``grad`` another dtype than ``y``.
    ValueError
        ``grad`` has another shape than ``y``, or see ``softmax``.
    numpy.exceptions.AxisError
        An axis is out of range.

    Notes
    -----
    Can be called in ``@njit`` functions (see ``numbasoft.overloads``).

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> y = numbasoft.softmax(np.array([1.0, 2.0, 3.0]))
    >>> numbasoft.softmax_backward(np.array([1.0, 0.0, 0.0]), y)
    array([ 0.08192507, -0.02203304, -0.05989202])
    """
    if stream is None and type(temperature) is float:
        g, rows = arrays.plain_pair(grad, y, axis, out)
        size = 0 if rows is None else rows.size
        is_few = 0 < size < PARALLEL and (size < SMALLEST or rows.shape[1] > WIDEST)
        if is_few or (size and are_many(rows)):
            plain = plain_gradient(y.dtype, temperature, is_few)
            if plain is not None:
                run, inverse = plain
                dx = np.empty_like(y) if out is None else out
                run(g, rows, inverse, dx if rows is y else dx.reshape(rows.shape))
                return dx
        elif SMALLEST <= size <= CALL and arrays.is_plainly_computed(y.dtype, temperature):
            dx = np.empty_like(y) if out is None else out
            backward(g, rows, dx.reshape(rows.shape), 1 / temperature)
            return dx
    return any_softmax_backward(grad, y, axis, temperature, out, stream)


def any_softmax_backward(grad, y, axis, temperature, out, stream):
    """``softmax_backward`` of whatever there is."""
    if arrays.on_device(stream, grad=grad, y=y, out=out):
        calls = arrays.device_calls()
        from .cuda import BACKWARD

        return calls.backward(BACKWARD, grad, y, "y", axis, temperature, out, stream)
    grad, y = checks.array(grad, "grad"), checks.array(y, "y")
    dtype = checks.result_dtype(y.dtype, "y")
    checks.same_shape(grad, "grad", y, "y")
    checks.same_dtype(grad, "grad", y, "y")
    axes = checks.axes(axis, y.ndim)
    t = checks.temperature(temperature)
    if out is None:
        dx = np.empty_like(y, dtype=dtype, subok=False)
    else:
        dx = out
        checks.out(out, y.shape, dtype, [("grad", grad), ("y", y)])
    if y.size == 0:
        return dx
    if y.dtype != dtype:  # bool and integers
        grad, y = grad.astype(dtype), y.astype(dtype)
    compute = computing_dtype(dtype, t)
    arrays.over_rows(
        lambda full, _: backward(*full, 1 / t), [grad, y, dx], [], axes, compute,
        None if t != 1.0 else lambda full, _: backward_columns(*full),
    )  # fmt: skip
    return dx


def backward(g, y, dx, inverse):
    """The gradient of the rows of y into dx."""
    if are_narrow(y):
        inputs = g, y, inverse
        launch(cpu.narrow_backward, cpu.narrow_backward_parallel, y.dtype, inputs, (dx,), y.shape[0], y.size)
        return
    if split_rows(*y.shape):
        split_backward(g, y, dx, inverse)
        return
    launch(cpu.backward, cpu.backward_parallel, y.dtype, (g, y, inverse), (dx,), y.shape[0], y.size)


def backward_columns(g, y, dx):
    """The gradient along the middle axis of y into dx, but for the parts returned."""
    run = cpu.backward_columns, cpu.backward_columns_parallel
    return launch_plain_columns(*run, y.dtype, (g, y), dx)


def split_backward(g, y, dx, inverse):
    """``backward`` for few long rows, each shared by all threads."""
    sums, size = np.empty((segments_of(*y.shape), 2)), y.size
    for unless_zero in None, True:  # as in cpu.backward_rows
        key = y.dtype, unless_zero
        launch(cpu.dots, cpu.dots_parallel, key, (g, y, unless_zero), (sums,), len(sums), size)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.abs(sums).sum() < (cpu.SAFE_64 if is_wide(y.dtype) else cpu.SAFE_32):
                break
    inputs = g, y, inverse, sums
    launch(cpu.backward_segments, cpu.backward_segments_parallel, y.dtype, inputs, (dx,), len(sums), size)
