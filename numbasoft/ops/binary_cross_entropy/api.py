"""Binary cross-entropy and its gradient, for callers: checks, allocation, choice of kernel."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...arrays import Array
from ...elementwise import ROW, over_elements
from ...launch import computing_dtype, is_wide, launch
from ...totals import total
from . import cpu

VALUE_COST = 2  # so many elements of a softmax take as long as one here


def checked(logits, target, pos_weight, reduction):
    """The arguments as arrays, the dtype of the result and that to compute in."""
    x, t = checks.array(logits, "logits"), checks.array(target, "target")
    dtype = checks.result_dtype(x.dtype, "logits")
    of_target = checks.result_dtype(t.dtype, "target") if t.dtype.kind not in "biu" else dtype
    checks.same_shape(t, "target", x, "logits")
    checks.probability(t, "target")
    weight = checks.not_negative(pos_weight, "pos_weight")
    checks.reduction(reduction)
    computing = dtype
    if of_target != dtype:
        computing = np.dtype(np.float64 if 8 in (dtype.itemsize, of_target.itemsize) else np.float32)
    return x, t, dtype, computing_dtype(computing, weight or 1.0), weight


def binary_cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    pos_weight: float = 1.0,
    reduction: str = "mean",
    stream: Any = None,
) -> Array:
    r"""The cross-entropy of two classes from one logit, that of the positive class.

    .. math:: \mathrm{loss} = w\, t \log(1 + \exp(-x)) + (1 - t) \log(1 + \exp(x))

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, which the result keeps; bool and
        integers are computed in float64.
    target : array_like
        t, the probability of the positive class: from 0 to 1, of the shape of ``logits``;
        floats, integers or bool.
    pos_weight : float, default 1.0
        w, the weight of the positive class, finite and not negative.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum by the number of elements; of none at all it is 0.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        One number, or for "none" one per element, within 4 ULP, also next to 0.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype.
    ValueError
        ``target`` has another shape or an element outside of [0, 1] (the first one is named),
        ``pos_weight`` is negative, or the reduction is unknown.

    Notes
    -----
    ``binary_cross_entropy_backward`` is its gradient. Inputs that are not contiguous, or of
    different dtypes, are copied. On a CUDA device, where targets are not looked at before, the loss and
    the gradient of an element whose target is outside of [0, 1] are NaN, and so are a mean and a sum with it.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.binary_cross_entropy(np.array([0.0, 50.0, -1000.0]), [1, 1, 0], reduction="none")
    array([6.93147181e-01, 1.92874985e-22, 0.00000000e+00])
    """
    if arrays.on_device(stream, logits=logits, target=target):
        arrays.device_calls()
        from ...cuda import elementwise
        from .cuda import FORWARD

        return elementwise.binary_cross_entropy(FORWARD, logits, target, pos_weight, reduction, stream)
    x, t, dtype, computing, weight = checked(logits, target, pos_weight, reduction)
    loss = np.empty(x.shape, dtype) if reduction == "none" else None
    sums = np.zeros(-(-x.size // ROW))
    high, low = elementary.scale(1.0, is_wide(computing))
    done = 0

    def run(full, loss):
        nonlocal done
        rows = len(full[0])
        inputs, outputs = (*full, weight, high, low), (sums[done : done + rows], loss)
        key = full[0].dtype, loss is None
        launch(cpu.forward, cpu.forward_parallel, key, inputs, outputs, rows, VALUE_COST * full[0].size)
        done += rows

    over_elements(run, [x, t], loss, computing)
    if loss is not None:
        return loss
    value = total(sums) if x.size else 0.0
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(value / x.size if reduction == "mean" and x.size else value).astype(dtype)


def binary_cross_entropy_backward(
    grad: ArrayLike,
    logits: ArrayLike,
    target: ArrayLike,
    *,
    pos_weight: float = 1.0,
    reduction: str = "mean",
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to the logits, from that with respect to ``binary_cross_entropy``'s result.

    .. math:: dx = g \left((1 - t)\, p - w\, t\, (1 - p)\right), \qquad p = \mathrm{sigmoid}(x)

    Parameters
    ----------
    grad : array_like
        g, of the shape of what ``binary_cross_entropy`` returned; where the logits are on a CUDA device, a
        number or an array there.
    logits, target : array_like
        As given to ``binary_cross_entropy``.
    pos_weight, reduction :
        As given to ``binary_cross_entropy``.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``logits``; may be ``logits`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, of the shape of ``logits``, within 4 ULP of the larger term: a confident logit has
        a gradient.

    Raises
    ------
    TypeError, ValueError
        As ``binary_cross_entropy``; or ``grad`` or ``out`` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.binary_cross_entropy_backward(2.0, np.array([0.0, 50.0]), [0, 1])
    array([ 5.00000000e-01, -1.92874985e-22])
    """
    of_grad = None if isinstance(grad, Real) else grad  # a number goes with arrays of any place
    if arrays.on_device(stream, grad=of_grad, logits=logits, target=target, out=out):
        arrays.device_calls()
        from ...cuda import elementwise
        from .cuda import BACKWARD

        return elementwise.binary_cross_entropy_backward(
            BACKWARD, grad, logits, target, pos_weight, reduction, out, stream
        )
    x, t, dtype, computing, weight = checked(logits, target, pos_weight, reduction)
    g = checks.upstream(grad, reduction, x.shape)
    if out is None:
        dx = np.empty_like(x, dtype=dtype, subok=False)
    else:
        dx = out
        checks.out(out, x.shape, dtype, [("logits", x)])
        checks.apart(out, [("grad", grad), ("target", target)])
    one = float(g) / (x.size or 1) if reduction == "mean" else float(g) if reduction == "sum" else None
    if one is not None:
        computing = computing_dtype(computing, abs(one) or 1.0)
    elif computing.itemsize == 2 and checks.array(grad, "grad").dtype != computing:
        computing = np.dtype(np.float32)  # 16 bits may not hold g
    high, low = elementary.scale(1.0, is_wide(computing))

    def run(full, dx):
        x, t, *g = full
        inputs = (*g, x, t, weight, high, low) if one is None else (one, x, t, weight, high, low)
        launch(cpu.backward, cpu.backward_parallel, (x.dtype, one is None), inputs, (dx,), len(x), x.size)

    over_elements(run, [x, t] if one is not None else [x, t, g], dx, computing)
    return dx
