"""sigmoid, its gradient and its inverse, for callers: checks, allocation, choice of kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary
from ...arrays import Array
from ...elementwise import over_elements
from ...launch import PARALLEL, code_for_few, is_wide, launch
from . import cpu


@lru_cache
def few_elements(kernel, dtype):
    """For few plain numbers: a kernel's machine code, and log2(e) in two parts if it takes that; or None where it is not for them."""
    if not arrays.is_plainly_computed(dtype, 1.0):
        return None
    like = np.empty((1, 1), dtype)
    factors = elementary.scale(1.0, is_wide(dtype)) if kernel is cpu.forward else ()
    inputs = (like, like) if kernel is cpu.backward else (like, *factors)
    return code_for_few(kernel, dtype, inputs, (like,)), factors


def plain_result(kernel, x, out):
    """What a kernel makes of few plain numbers, or None."""
    row = arrays.plain_rows(x, None)
    if row is None or not 0 < row.size < PARALLEL or not (out is None or arrays.takes_result(out, x)):
        return None
    few = few_elements(kernel, x.dtype)
    if few is None:
        return None
    y = np.empty_like(x) if out is None else out
    few[0](row, *few[1], y.reshape(1, -1))
    return y


def sigmoid(x: ArrayLike, *, out: Array | None = None, stream: Any = None) -> Array:
    r"""The logistic function, which is the softmax of (x, 0) in its first element.

    .. math:: y = \frac{1}{1 + \exp(-x)}

    Parameters
    ----------
    x : array_like, or an array on a CUDA device
        Logits of dtype float16, bfloat16, float32 or float64, which the result keeps;
        bool and integers are computed in float64.
    out : numpy.ndarray, optional
        Where to put the result, of its shape and dtype; may be ``x`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        Probabilities, of the shape of ``x``. At most 2.5 ULP from the exact result in float32
        and float64, rounded once in float16 and bfloat16; gradual underflow is honoured.

    Raises
    ------
    TypeError
        ``x`` or ``out`` has a wrong type or dtype.
    ValueError
        ``out`` has a wrong shape, is read-only, or overlaps ``x`` in part.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.sigmoid(np.array([-1000.0, 0.0, 2.0]))
    array([0.        , 0.5       , 0.88079708])
    """
    few = plain_result(cpu.forward, x, out) if stream is None else None
    if few is not None:
        return few
    if arrays.on_device(stream, x=x, out=out):
        arrays.device_calls()
        from ...cuda.elementwise import alike
        from .cuda import FORWARD

        return alike(FORWARD, {"x": x}, out, stream, lambda storage: elementary.scale(1.0, storage == "f8"))
    x = checks.array(x, "x")
    y = output(x, checks.result_dtype(x.dtype, "x"), out, [("x", x)])
    high, low = elementary.scale(1.0, is_wide(y.dtype))
    over_elements(
        lambda full, y: launch(
            cpu.forward, cpu.forward_parallel, y.dtype, (*full, high, low), (y,), y.shape[0], y.size
        ),
        [x], y, y.dtype,
    )  # fmt: skip
    return y


def sigmoid_backward(grad: ArrayLike, y: ArrayLike, *, out: Array | None = None, stream: Any = None) -> Array:
    r"""The gradient of a loss with respect to x, from that with respect to sigmoid's result.

    .. math:: dx = g\, y\, (1 - y)

    Parameters
    ----------
    grad : array_like
        g, the gradient with respect to ``y``, of its shape and dtype.
    y : array_like
        What ``sigmoid`` returned.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``y``; may be ``grad`` or ``y`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, of the shape of ``y``.

    Raises
    ------
    TypeError, ValueError
        As ``sigmoid``; or ``grad`` has another shape or dtype than ``y``.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.sigmoid_backward(np.array([1.0, 2.0]), np.array([0.5, 0.25]))
    array([0.25 , 0.375])
    """
    if stream is None:
        g, row = arrays.plain_pair(grad, y, None, out)
        few = few_elements(cpu.backward, y.dtype) if row is not None and 0 < row.size < PARALLEL else None
        if few is not None:
            dx = np.empty_like(y) if out is None else out
            few[0](g, row, dx.reshape(1, -1))
            return dx
    if arrays.on_device(stream, grad=grad, y=y, out=out):
        arrays.device_calls()
        from ...cuda.elementwise import alike
        from .cuda import BACKWARD

        return alike(BACKWARD, {"grad": grad, "y": y}, out, stream)
    grad, y = checks.array(grad, "grad"), checks.array(y, "y")
    dtype = checks.result_dtype(y.dtype, "y")
    checks.same_shape(grad, "grad", y, "y")
    checks.same_dtype(grad, "grad", y, "y")
    dx = output(y, dtype, out, [("grad", grad), ("y", y)])
    over_elements(
        lambda full, dx: launch(
            cpu.backward, cpu.backward_parallel, dx.dtype, tuple(full), (dx,), dx.shape[0], dx.size
        ),
        [grad, y], dx, dtype,
    )  # fmt: skip
    return dx


def logit(p: ArrayLike, *, out: Array | None = None, stream: Any = None) -> Array:
    r"""The inverse of ``sigmoid``: the logarithm of the odds.

    .. math:: x = \log \frac{p}{1 - p}

    Parameters
    ----------
    p : array_like, or an array on a CUDA device
        Probabilities, of a dtype as for ``sigmoid``.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``p``; may be ``p`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        -inf for 0, inf for 1, NaN outside of [0, 1]; right next to 1/2, where it is 0.

    Raises
    ------
    TypeError, ValueError
        As ``sigmoid``.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.logit(np.array([0.0, 0.5, 0.75, 1.0]))
    array([      -inf, 0.        , 1.09861229,        inf])
    """
    few = plain_result(cpu.logit, p, out) if stream is None else None
    if few is not None:
        return few
    if arrays.on_device(stream, p=p, out=out):
        arrays.device_calls()
        from ...cuda.elementwise import alike
        from .cuda import LOGIT

        return alike(LOGIT, {"p": p}, out, stream)
    p = checks.array(p, "p")
    x = output(p, checks.result_dtype(p.dtype, "p"), out, [("p", p)])
    computing = np.dtype(np.float32) if x.itemsize == 2 else x.dtype
    over_elements(
        lambda full, x: launch(
            cpu.logit, cpu.logit_parallel, x.dtype, tuple(full), (x,), x.shape[0], x.size
        ),
        [p], x, computing,
    )  # fmt: skip
    return x


def output(x, dtype, out, inputs):
    """Where the result goes: new, or given by the caller."""
    if out is None:
        return np.empty_like(x, dtype=dtype, subok=False)
    checks.out(out, x.shape, dtype, inputs)
    return out
