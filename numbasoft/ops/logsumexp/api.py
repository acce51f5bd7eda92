"""logsumexp and its gradient, for callers: checks, shapes, allocation, choice of kernel."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...arrays import CALL, Array, Axis
from ...launch import (
    PARALLEL,
    SMALLEST,
    are_many,
    are_narrow,
    code_for_plain,
    computing_dtype,
    is_wide,
    launch,
    launch_columns,
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
    return code_for_plain(*run, (dtype, True), inputs, (like[0],), is_few), *factors


def logsumexp(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The logarithm of the sum of exponentials over one or more axes.

    .. math:: \mathrm{lse} = \log \sum_k \exp(x_k / T)

    Parameters
    ----------
    x : array_like, or an array on a CUDA device
        Logits of dtype float16, bfloat16, float32 or float64, which the result keeps;
        bool and integers are computed in float64. Any layout.
    axis : int, tuple of int or None, default -1
        The axes to sum over; None means all of them.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290.
    where : array_like of bool, optional
        Which elements take part, broadcast to the shape of ``x``.
    keepdims : bool, default False
        Whether the result keeps the reduced axes, with length 1.
    out : numpy.ndarray, optional
        Where to put the result, of its shape and dtype.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        At most 2 ULP of the largest of abs(result), abs(max / T) and abs(log sum) from the
        exact result in float32 and float64, and right next to 0; 0.51 ULP of the same in
        float16 and bfloat16. -inf for a row without elements; +inf where a row has +inf
        and no NaN. An array without axes where nothing else is left: ``float`` makes it a number.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``softmax``.

    References
    ----------
    P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
    softmax functions", IMA J. Numer. Anal. 41 (2021) 2311-2330.

    Notes
    -----
    Can be called in ``@njit`` functions (see ``numbasoft.overloads``).

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.logsumexp(np.array([[1.0, 2.0, 3.0], [1000.0, 1000.0, 1000.0]]))
    array([   3.40760596, 1001.09861229])
    """
    if (
        where is None
        and out is None
        and type(keepdims) is bool
        and stream is None
        and type(temperature) is float
    ):
        rows = arrays.plain_rows(x, axis)
        size = 0 if rows is None else rows.size
        is_few = 0 < size < PARALLEL and (size < SMALLEST or rows.shape[1] > WIDEST)
        if is_few or (size and are_many(rows)):
            plain = plain_kernel(x.dtype, temperature, is_few)
            if plain is not None:
                run, high, low, inverse_high, inverse_low = plain
                lse = np.empty(rows.shape[0], x.dtype)
                run(rows, None, high, low, inverse_high, inverse_low, lse)
                return lse if rows is x and not keepdims else reduced(lse, x, axis, keepdims)
        elif SMALLEST <= size <= CALL and arrays.is_plainly_computed(x.dtype, temperature):
            lse = np.empty(rows.shape[0], x.dtype)
            forward(rows, None, None, lse, elementary.scale_and_inverse(temperature, is_wide(x.dtype)))
            return reduced(lse, x, axis, keepdims)
    return any_logsumexp(x, axis, temperature, where, keepdims, out, stream)


def reduced(lse, x, axis, keepdims):
    """One number per row in the shape of x without its last axis, or without any where the axis is None."""
    kept = x.shape[:-1] if axis is not None else ()
    return lse.reshape(kept + (1,) * (x.ndim - len(kept)) if keepdims else kept)


def any_logsumexp(x, axis, temperature, where, keepdims, out, stream):
    """``logsumexp`` of whatever there is: checked, on the CPU or a device, of any dtype and layout."""
    simple = arrays.simplified(x, temperature, out) if stream is None else None
    if simple is not None:
        return logsumexp(simple[0], axis, temperature=simple[1], where=where, keepdims=keepdims, out=out)
    if arrays.on_device(stream, x=x, where=where, out=out):
        calls = arrays.device_calls()
        from .cuda import FORWARD

        return calls.forward(FORWARD, x, axis, temperature, where, out, stream, keepdims)
    x = checks.array(x, "x")
    dtype = checks.result_dtype(x.dtype, "x")
    axes = checks.axes(axis, x.ndim)
    t = checks.temperature(temperature)
    mask = None if where is None else checks.mask(where, x.shape)
    if not isinstance(keepdims, (bool, np.bool_)):
        raise TypeError(f"keepdims is {keepdims!r}, but must be True or False")
    outer = tuple(s for i, s in enumerate(x.shape) if i not in axes)
    shape = tuple(1 if i in axes else s for i, s in enumerate(x.shape)) if keepdims else outer
    if out is not None:
        inputs = [("x", x)] + ([] if mask is None else [("where", mask)])
        checks.out(out, shape, dtype, [])
        checks.apart(out, inputs)
    compute = computing_dtype(dtype, t)
    lse = np.full(math.prod(outer), -np.inf, np.float64 if is_wide(compute) else np.float32)
    if x.size:
        factors = elementary.scale_and_inverse(t, is_wide(compute))
        arrays.over_rows(
            lambda full, reduced: forward(*full, *reduced, factors), [x, mask, None], [lse], axes, compute,
            None if mask is not None else lambda full, reduced: forward_columns(full[0], *reduced, factors),
        )  # fmt: skip
    if out is None and lse.dtype == dtype:
        return lse.reshape(shape)
    if out is None:
        out = np.empty(shape, dtype)
    with np.errstate(over="ignore", under="ignore"):  # rounding to 16 bits may end at infinity, or at 0
        np.copyto(out, lse.reshape(shape), casting="same_kind")
    return out


def forward(x, mask, _, lse, factors):
    """logsumexp of the rows of x into lse."""
    if are_narrow(x, mask):
        launch(cpu.narrow, cpu.narrow_parallel, x.dtype, (x, *factors), (lse,), x.shape[0], x.size)
        return
    if split_rows(*x.shape):
        split_forward(x, mask, lse, factors)
        return
    inputs = x, mask, *factors
    launch(cpu.forward, cpu.forward_parallel, (x.dtype, mask is None), inputs, (lse,), x.shape[0], x.size)


def forward_columns(x, lse, factors):
    """logsumexp along the middle axis of x into lse."""
    launch_columns(cpu.columns, cpu.columns_parallel, x.dtype, (x, *factors), (lse,))


def split_forward(x, mask, lse, factors):
    """``forward`` for few long rows, each shared by all threads."""
    maxima, sums, turns = shared_work(x)
    work = maxima, sums, np.empty_like(sums), turns
    key, inputs = (x.dtype, mask is None), (x, mask, *factors)
    launch(cpu.shared, cpu.shared_parallel, key, inputs, (*work, lse), maxima.size, x.size)


def logsumexp_backward(
    grad: ArrayLike,
    x: ArrayLike,
    lse: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: float = 1.0,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to x, from that with respect to logsumexp's result.

    .. math:: dx_j = \frac{g}{T} \exp(x_j / T - \mathrm{lse})

    Parameters
    ----------
    grad : array_like
        g, the gradient with respect to ``lse``, of its shape, with or without the reduced axes.
    x : array_like
        What ``logsumexp`` was given, with -inf where a mask of its left elements out.
    lse : array_like
        What ``logsumexp`` returned, with or without the reduced axes.
    axis : int, tuple of int or None, default -1
        As given to ``logsumexp``.
    temperature : float, default 1.0
        As given to ``logsumexp``; the bound of errors is kept from 1e-140 to 1e140.
    out : numpy.ndarray, optional
        Where to put the result, of the shape of ``x``; may be ``x`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, within 4 ULP; exactly 0 where ``x`` is -inf. Where x / T exceeds lse by more than
        40, which the lse of all of x never allows, it may be infinite.

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
    >>> x = np.array([1.0, 2.0, 3.0])
    >>> numbasoft.logsumexp_backward(1.0, x, numbasoft.logsumexp(x))
    array([0.09003057, 0.24472847, 0.66524096])
    """
    if arrays.on_device(stream, grad=grad, x=x, lse=lse, out=out):
        calls = arrays.device_calls()
        from .cuda import BACKWARD

        return calls.logsumexp_backward(BACKWARD, grad, x, lse, axis, temperature, out, stream)
    grad, x, lse = checks.array(grad, "grad"), checks.array(x, "x"), checks.array(lse, "lse")
    dtype = checks.result_dtype(x.dtype, "x")
    axes = checks.axes(axis, x.ndim)
    t = checks.temperature(temperature)
    checks.result_dtype(grad.dtype, "grad")
    checks.result_dtype(lse.dtype, "lse")
    g = checks.reduced_shape(grad, "grad", x.shape, axes)
    s = checks.reduced_shape(lse, "lse", x.shape, axes)
    if out is None:
        dx = np.empty_like(x, dtype=dtype, subok=False)
    else:
        dx = out
        checks.out(out, x.shape, dtype, [("grad", grad), ("x", x), ("lse", lse)])
    if x.size == 0:
        return dx
    compute = computing_dtype(dtype, t)
    wide = is_wide(compute)
    g = np.array(g, np.float64).reshape(-1)
    s = np.array(s, np.float64 if wide else np.float32).reshape(-1)
    for v in g, s:
        v[np.isnan(v)] = np.nan  # some NaN would become a number when rounded to bfloat16
    reduced = [g, s]
    factors = (*elementary.scale(t, wide), t)
    arrays.over_rows(
        lambda full, reduced: backward(*full, *reduced, factors), [x, dx], reduced, axes, compute
    )
    return dx


def backward(x, dx, g, lse, factors):
    """The gradient of the rows of x into dx."""
    if split_rows(*x.shape):
        run, units = (cpu.backward_segments, cpu.backward_segments_parallel), segments_of(*x.shape)
        launch(*run, x.dtype, (g, x, lse, *factors), (dx,), units, x.size)
        return
    launch(cpu.backward, cpu.backward_parallel, x.dtype, (g, x, lse, *factors), (dx,), x.shape[0], x.size)
