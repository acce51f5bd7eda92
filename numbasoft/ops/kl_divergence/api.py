"""The Kullback-Leibler divergence of two softmaxes and its gradient, for callers."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...arrays import Array
from ...launch import computing_dtype, is_wide, launch
from ...totals import total
from . import cpu

VALUE_COST, GRADIENT_COST = 4, 2  # so many elements of a softmax take as long as one here


def checked(p_logits, q_logits, axis, temperature, reduction):
    x, y = checks.array(p_logits, "p_logits"), checks.array(q_logits, "q_logits")
    dtype = checks.result_dtype(x.dtype, "p_logits")
    checks.result_dtype(y.dtype, "q_logits")
    checks.same_shape(y, "q_logits", x, "p_logits")
    checks.same_dtype(y, "q_logits", x, "p_logits")
    axis = checks.class_axis(axis, x.shape, "p_logits")
    t = checks.temperature(temperature)
    checks.reduction(reduction)
    if x.dtype != dtype:  # bool and integers
        x, y = x.astype(dtype), y.astype(dtype)
    return x, y, dtype, axis, t, x.shape[:axis] + x.shape[axis + 1 :]


def kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    reduction: str = "mean",
    stream: Any = None,
) -> Array:
    r"""The Kullback-Leibler divergence of two softmaxes, from their logits.

    .. math:: D(p \| q) = \sum_j p_j (\log p_j - \log q_j), \qquad
        p = \mathrm{softmax}(x / T),\ q = \mathrm{softmax}(y / T)

    Parameters
    ----------
    p_logits : array_like, or an array on a CUDA device
        x, the logits of p: in distillation the teacher's. Of dtype float16, bfloat16, float32
        or float64, which the result keeps; bool and integers are computed in float64.
    q_logits : array_like
        y, the logits of q: the student's; of the shape and dtype of ``p_logits``.
    axis : int, default -1
        The axis of the classes.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290, for both.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum over rows by their number; of no rows it is 0.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        One number, or for "none" one per row, not negative; within 4 ULP of itself, also where
        p and q are nearly equal and its terms all but cancel. A class of probability 0 under p
        does not count; one that only q rules out gives +inf.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        An argument has a wrong type, dtype or shape, or is out of its range.

    References
    ----------
    G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015,
    arXiv:1503.02531.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.kl_divergence(np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.5, 0.5], [0.5, 0.5]]), reduction="none")
    array([0.        , 0.13081204])
    """
    if arrays.on_device(stream, p_logits=p_logits, q_logits=q_logits):
        arrays.device_calls()
        from ...cuda import divergence as device
        from .cuda import FORWARD

        return device.forward(FORWARD, p_logits, q_logits, axis, temperature, reduction, stream)
    x, y, dtype, axis, t, outer = checked(p_logits, q_logits, axis, temperature, reduction)
    compute = computing_dtype(dtype, t)
    wide = is_wide(compute)
    factors = elementary.scale_and_inverse(t, wide)
    divergence = np.zeros(math.prod(outer))

    def run(full, reduced):
        x, y, _ = full
        inputs, rows, size = (x, y, *factors), x.shape[0], VALUE_COST * x.size
        launch(cpu.forward, cpu.forward_parallel, x.dtype, inputs, reduced, rows, size)

    if x.size:
        arrays.over_rows(run, [x, y, None], [divergence], (axis,), compute)
    with np.errstate(over="ignore", under="ignore"):
        if reduction == "none":
            return divergence.reshape(outer).astype(dtype)
        value = total(divergence) / (len(divergence) or 1 if reduction == "mean" else 1)
        return np.asarray(value).astype(dtype)


def kl_divergence_backward(
    grad: ArrayLike,
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    reduction: str = "mean",
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to q's logits, from that with respect to ``kl_divergence``'s result.

    .. math:: dy_j = \frac{g}{T} (q_j - p_j)

    Parameters
    ----------
    grad : array_like
        g, of the shape of what ``kl_divergence`` returned; where the logits are on a CUDA device, a
        number or an array there.
    p_logits, q_logits : array_like
        As given to ``kl_divergence``.
    axis, temperature, reduction :
        As given to ``kl_divergence``.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``q_logits``; may be ``q_logits`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dy, of the shape of ``q_logits``, within 4 ULP of its larger term.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``kl_divergence``; or ``grad`` or ``out`` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.kl_divergence_backward(1.0, np.log([0.25, 0.75]), np.zeros(2))
    array([ 0.25, -0.25])
    """
    of_grad = None if isinstance(grad, Real) else grad  # a number goes with arrays of any place
    if arrays.on_device(stream, grad=of_grad, p_logits=p_logits, q_logits=q_logits, out=out):
        arrays.device_calls()
        from ...cuda import divergence as device
        from .cuda import BACKWARD

        return device.backward(BACKWARD, grad, p_logits, q_logits, axis, temperature, reduction, out, stream)
    x, y, dtype, axis, t, outer = checked(p_logits, q_logits, axis, temperature, reduction)
    g = checks.upstream(grad, reduction, outer, axis)
    if out is None:
        dy = np.empty_like(y, dtype=dtype, subok=False)
    else:
        dy = out
        checks.out(out, y.shape, dtype, [("q_logits", y)])
        checks.apart(out, [("grad", grad), ("p_logits", x)])
    if not x.size:
        return dy
    rows = math.prod(outer)
    g = np.broadcast_to(g, outer).reshape(-1) / (t * (rows if reduction == "mean" else 1))
    compute = computing_dtype(dtype, t)
    high, low = elementary.scale(t, is_wide(compute))

    def run(full, reduced):
        x, y, dy = full
        inputs = *reduced, x, y, high, low
        launch(
            cpu.backward, cpu.backward_parallel, x.dtype, inputs, (dy,), x.shape[0], GRADIENT_COST * x.size
        )

    arrays.over_rows(run, [x, y, dy], [g], (axis,), compute)
    return dy
