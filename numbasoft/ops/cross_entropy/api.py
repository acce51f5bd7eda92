"""Cross-entropy, its gradient and what else is made of log-probabilities, for callers."""

from __future__ import annotations

import contextlib
import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary, jit
from ...arrays import Array
from ...launch import (
    PARALLEL,
    are_narrow,
    code_for_few,
    code_for_plain,
    computing_dtype,
    is_past_caches,
    is_wide,
    launch,
    launch_columns,
    workspace,
)
from ...totals import total
from . import cpu

NO_CLASS = object()  # is ignored
INT64, INDICES = np.dtype(np.int64), 1 << 63
NORMAL = 2.0**-14, 2.0**15  # numbers in the range of all dtypes


@dataclass
class Rows:
    """A call's arguments, checked, as its kernels take them."""

    x: Array
    dtype: np.dtype[Any]
    compute: np.dtype[Any]
    axis: int
    outer: tuple[int, ...]  # the shape of one number per row
    temperature: float
    target: Array | None  # the class of every row
    q: Array | None  # or the probabilities of all classes
    own: Array | None
    weights: Array | None
    spread: Array | None
    z: float
    reduction: str
    divisor: float  # of a sum over rows, for their mean; 0 where none counts

    @property
    def wide(self):
        return is_wide(self.compute)

    @property
    def factors(self):
        """log2(e) / T and 1 / T, in two parts each."""
        return elementary.scale_and_inverse(self.temperature, self.wide)

    def reduced(self, loss):
        """The losses of all rows as the caller wants them."""
        if self.reduction == "none":
            return rounded(loss.reshape(self.outer), self.dtype)
        return one_number(total(loss), self.reduction, self.divisor, self.dtype)

    def layers(self, array):
        """An array of the logits' shape as (outer, n, inner) around their axis; ValueError where that takes a copy."""
        before, behind = self.outer[: self.axis], self.outer[self.axis :]
        shape = math.prod(before), array.shape[self.axis], math.prod(behind)
        return array.reshape(shape, copy=False)

    def per_row(self, grad):
        """What each row's gradient is multiplied with, given the gradient with respect to the result."""
        if self.reduction == "mean":
            grad = grad / self.divisor if self.divisor else np.zeros_like(grad)
        return repeated(grad, math.prod(self.outer)) if grad.ndim == 0 else grad.reshape(-1)


def one_number(value, reduction, divisor, dtype):
    """The sum of all losses, or their mean."""
    if reduction == "mean":
        value = value / divisor if divisor else 0.0
    return (
        np.array(value, dtype) if NORMAL[0] <= abs(value) <= NORMAL[1] else rounded(np.asarray(value), dtype)
    )


def repeated(value, rows):
    """One number for every row, without a copy of it for each."""
    return np.ndarray(rows, np.float64, np.array([value], np.float64), strides=(0,))


@lru_cache(maxsize=64)
def share_of_class(value, rows):
    """``repeated`` of what most calls have in common; it is from 0 to 1, and no -0.0, for which 0.0 would be found."""
    shares = repeated(value, rows)
    shares.flags.writeable = False
    return shares


def rounded(values, dtype):
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(dtype)


def checked(
    logits, target, axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction,
    names=("logits", "target"), only_classes=False,
):  # fmt: skip
    """The arguments of all functions here; what is wrong with one is raised before anything is written."""
    x, y = checks.array(logits, names[0]), checks.array(target, names[1])
    dtype = checks.result_dtype(x.dtype, names[0])
    axis = checks.class_axis(axis, x.shape, names[0])
    t = checks.temperature(temperature)
    classes = x.shape[axis]
    outer = x.shape[:axis] + x.shape[axis + 1 :]
    weight = checks.class_weight(weight, classes)
    ignore_index = None if ignore_index is NO_CLASS else checks.integer(ignore_index, "ignore_index")
    smoothing = checks.between(label_smoothing, "label_smoothing", 0, 1)
    z = checks.not_negative(z_loss, "z_loss")
    checks.reduction(reduction)
    is_class = only_classes or y.dtype.kind in "biu" or y.shape == outer
    own = q = weights = spread = None
    rows = math.prod(outer)
    kept, w = 1.0, weight
    if smoothing:  # what a class has of q is rounded once
        kept, w = np.longdouble(1) - smoothing, np.asarray([1.0] if weight is None else weight, np.longdouble)
    if is_class:
        y, has_ignored = checks.class_indices(y, outer, names[1], classes, ignore_index, cpu.IGNORED)
        compute = computing_dtype(dtype, t)
        count = divisor = rows - (int(np.count_nonzero(y == cpu.IGNORED)) if has_ignored else 0)
        if weight is None:
            own = share_of_class(float(kept), rows)
        else:
            index = np.maximum(y, 0) if has_ignored else y
            of_rows = weight[index]
            own = (w * kept).astype(np.float64)[index] if smoothing else of_rows
            divisor = total(np.where(y == cpu.IGNORED, 0.0, of_rows) if has_ignored else of_rows)
            if reduction == "mean" and count:
                z = z * (divisor / count)  # the mean of lse**2 is over rows, whatever their weights
    else:
        q, divisor = y, rows
        compute = probabilities(x, q, dtype, axis, t, names)
    if smoothing or (q is not None and weight is not None):
        floats = np.float64 if is_wide(compute) else np.float32
        share = w * smoothing / classes
        spread = np.full(classes, share[0], floats) if weight is None else share.astype(floats)
        weights = None if q is None else np.broadcast_to(w * kept, classes).astype(floats)
    return Rows(
        x, dtype, compute, axis, outer, t, None if q is not None else y, q, own, weights, spread, z,
        reduction, divisor,
    )  # fmt: skip


def probabilities(x, q, dtype, axis, t, names):
    """Check the probabilities of all classes; the dtype to compute in."""
    of_target = checks.result_dtype(q.dtype, names[1])
    checks.same_shape(q, names[1], x, names[0])
    both = {dtype, of_target}
    wider = np.dtype(np.float32) if len(both) > 1 and all(d.itemsize == 2 for d in both) else None
    compute = computing_dtype(wider or max(both, key=lambda d: d.itemsize), t)
    outer = x.shape[:axis] + x.shape[axis + 1 :]
    least, sums = np.zeros(math.prod(outer)), np.ones(math.prod(outer))

    def check(full, reduced):
        q, _ = full
        launch(cpu.check, cpu.check_parallel, q.dtype, (q,), reduced, q.shape[0], q.size)

    if q.size:
        arrays.over_rows(check, [q, None], [least, sums], (axis,), of_target)
    checks.distributions(least, sums, names[1], outer, of_target)
    return compute


def is_zero(value):
    """Whether a number that is most often 0.0 is that."""
    return type(value) is float and value == 0.0


@lru_cache(maxsize=256)
def plain_kernel(dtype, temperature, is_narrow, has_gradient, is_few):
    """The kernel for plain rows, and the factors that it takes; or None where they take the general path."""
    if not arrays.is_plainly_computed(dtype, temperature):
        return None
    like, factors = np.empty((1, 1), dtype), elementary.scale_and_inverse(temperature, is_wide(dtype))
    inputs = like, np.empty(1, np.int64), 0, 1.0, True, 0.0, *factors
    outputs = np.empty(1), like if has_gradient else None
    run = (cpu.plain_narrow, cpu.plain_narrow_parallel) if is_narrow else (cpu.plain, cpu.plain_parallel)
    return code_for_plain(*run, (dtype, has_gradient), inputs, outputs, is_few), factors


def plain_classes(x, target, axis, ignore_index, reduction):
    """The rows of plain logits or log-probabilities with a class each, and what is ignored; or None."""
    rows = None if axis is None else arrays.plain_rows(x, axis)
    if rows is None or rows.size == 0 or type(reduction) is not str:
        return None
    if type(target) is not np.ndarray or target.dtype is not INT64 or target.shape != x.shape[:-1]:
        return None
    if not target.flags.carray or reduction not in checks.REDUCTIONS:
        return None
    if ignore_index is NO_CLASS:
        return rows, cpu.IGNORED  # which rows must not have then, as plain_losses sees by their count
    is_plain = type(ignore_index) is int and -INDICES <= ignore_index < INDICES
    return (rows, ignore_index) if is_plain else None


def plain_losses(
    logits, target, axis, ignore_index, z_loss, temperature, reduction, grad=1.0, has_gradient=False, out=None
):
    """The losses of plain rows, whose classes have neither weights nor smoothing, and gradients; or None.

    What is returned is a ``cpu.summary``, the losses in float64 and the gradient.
    It is None, too, where something is wrong with an argument: the general path says what.
    """
    if type(logits) is not np.ndarray or logits.size > arrays.CALL:
        return None
    if type(temperature) is not float or type(z_loss) is not float or not 0.0 <= z_loss < math.inf:
        return None
    plain = plain_classes(logits, target, axis, ignore_index, reduction)
    if plain is None or (out is not None and not arrays.takes_result(out, logits)):
        return None
    if out is not None and np.may_share_memory(out, target):
        return None
    rows, ignored = plain
    to = out if out is None or rows is logits else out.reshape(rows.shape)
    if to is not None and is_past_caches(rows, to):
        return None
    kernel = plain_kernel(logits.dtype, temperature, are_narrow(rows), has_gradient, rows.size < PARALLEL)
    if kernel is None:
        return None
    run, factors = kernel
    dx, loss = out, np.empty(len(rows))
    if has_gradient and out is None:
        dx = np.empty_like(logits)
        to = dx.reshape(rows.shape)
    result = run(rows, target.reshape(-1), ignored, grad, reduction == "mean", z_loss, *factors, loss, to)
    if result[0] < 0 or (ignore_index is NO_CLASS and result[0] < loss.size):  # only asked without a gradient
        return None
    return *result, loss, dx


def plain_picked(log_probs, target, axis, ignore_index, reduction):
    """``plain_losses`` from log-probabilities."""
    plain = plain_classes(log_probs, target, axis, ignore_index, reduction)
    if plain is None or log_probs.dtype not in (np.float32, np.float64):
        return None
    rows, ignored = plain
    if len(rows) >= PARALLEL:
        return None
    loss = np.empty(len(rows))
    inputs = rows, target.reshape(-1), ignored
    result = code_for_few(cpu.plain_picked, log_probs.dtype, inputs, (loss,))(*inputs, loss)
    return None if result[0] < 0 else (*result, loss, None)


def result_of_plain(plain, reduction, x):
    """The losses of plain rows of x as the caller wants them."""
    count, value, is_normal, loss, _ = plain
    if reduction == "none":
        loss = loss.reshape(x.shape[:-1])
        return loss.astype(x.dtype, copy=False) if is_normal else rounded(loss, x.dtype)
    return one_number(value, reduction, count, x.dtype)


def device_losses():
    arrays.device_calls()
    from ...cuda import class_losses

    return class_losses


def device_kernels():
    from .cuda import LOSS

    return LOSS


def output(rows, out, inputs):
    """Where gradients go: new, or given by the caller."""
    if out is None:
        return np.empty_like(rows.x, dtype=rows.dtype, subok=False)
    checks.out(out, rows.x.shape, rows.dtype, [("logits", rows.x)])
    checks.apart(out, inputs)
    return out


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    stream: Any = None,
) -> Array:
    r"""The cross-entropy of a target and the softmax of logits, from the logits.

    .. math:: \mathrm{loss} = \sum_j q_j \left(\mathrm{lse} - x_j / T\right) + z\,\mathrm{lse}^2,
        \qquad \mathrm{lse} = \log \sum_k \exp(x_k / T)

    For the class t, ``q_j = w_j ((1 - eps) [j = t] + eps / C)`` except that the first term has
    the weight of t alone; for class probabilities y, ``q_j = w_j ((1 - eps) y_j + eps / C)``.

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, which the result keeps; bool and
        integers are computed in float64. Any layout.
    target : array_like
        Either the class of each row: integers of the shape of ``logits`` without ``axis``; or
        probabilities of all classes: floats of the shape of ``logits``, not negative, each row
        with a sum of 1 (within 2**-10; 2**-8 in float16 and 2**-5 in bfloat16).
    axis : int, default -1
        The axis of the classes; 1 for PyTorch's (N, C, d1, ...).
    weight : array_like, optional
        w, one finite number per class, not negative; default 1.
    ignore_index : int, default -100
        Rows of this class have loss 0 and gradient 0, whatever their logits hold. For class
        indices only.
    label_smoothing : float, default 0.0
        eps, from 0 to 1: the part of the target that is spread over all C classes.
    z_loss : float, default 0.0
        z, which draws the log-sum-exp towards 0. Its mean is over the rows that are not
        ignored, whatever their weights.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum over rows by the sum of the weights of their classes; for
        probabilities, by the number of rows. "none" returns the loss of every row.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        One number, or for "none" one per row. At most 4 ULP of the largest term from the
        exact result in float32 and float64, also next to 0; rounded once in float16 and
        bfloat16. +inf where a class of probability 0 has weight.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype.
    ValueError
        A class is out of range (the first one is named), a probability is negative, a row
        of them does not sum to 1, a shape does not fit, there are no classes, or a number
        is out of its range.
    numpy.exceptions.AxisError
        The axis is out of range.

    Notes
    -----
    The semantics are PyTorch's, with one exception: where no row counts (all are ignored,
    the batch is empty or all weights are 0), "mean" gives 0 and gradients of 0, not NaN. A
    batch of padding then changes no sum over batches and no parameter. The sum over rows
    has a fixed order, so the same rows give the same bits with any number of threads.

    Arrays on a CUDA device are all on it, ``weight`` too, and so is the result. Nothing of them
    is looked at by the host: a class that is out of range, a row that holds no probabilities
    and a weight that is negative or not finite raise nothing. The row's loss and gradient are
    NaN, and so is a sum or mean over it; a class out of range is never used as an index.

    References
    ----------
    C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016
    (label smoothing); A. Chowdhery et al., "PaLM: scaling language modeling with pathways",
    JMLR 24 (2023) 240 (z_loss).

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> logits = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, 0.0]])
    >>> numbasoft.cross_entropy(logits, [2, 0])
    array(0.20380298)
    >>> numbasoft.cross_entropy(logits, [2, 1], reduction="none")
    array([4.07605964e-01, 1.00000000e+03])
    """
    if weight is None and stream is None and is_zero(label_smoothing):
        plain = plain_losses(logits, target, axis, ignore_index, z_loss, temperature, reduction)
        if plain is not None:
            return result_of_plain(plain, reduction, logits)
    if arrays.on_device(stream, logits=logits, target=target, weight=weight):
        return device_losses().value(
            device_kernels(), logits, target, stream, axis=axis, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
    rows = checked(
        logits, target, axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction
    )
    return rows.reduced(losses(rows, None, None))


def cross_entropy_value_and_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    out: Array | None = None,
    stream: Any = None,
) -> tuple[Array, Array]:
    r"""``cross_entropy`` and its gradient with respect to the logits, in one go.

    .. math:: dx_j = \frac{1}{T} \left(\left(\sum_k q_k + 2 z\,\mathrm{lse}\right) p_j - q_j\right)

    Parameters
    ----------
    logits, target : array_like
        As given to ``cross_entropy``.
    axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction :
        As given to ``cross_entropy``.
    out : numpy.ndarray, optional
        Where to put the gradient, of the shape and dtype of ``logits``; may be ``logits`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    loss : numpy.ndarray
        What ``cross_entropy`` returns.
    grad : numpy.ndarray
        Its gradient, of the shape of ``logits``; for "none" that of each row's own loss. At
        most 4 ULP of the largest term from the exact result. At the target's class that is
        less the sum of the others' probabilities: it does not vanish in a confident row.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``; or ``out`` does not fit, or overlaps an argument.

    Notes
    -----
    On the CPU one row per thread is taken as room to work, in float32 for 16-bit logits, and else
    where a gradient goes to an ``out`` larger than the last cache; others take none. On a CUDA device
    there are some 16 bytes for every row, 24 for every class where they have weights, and less than
    2 % of the logits where rows are too long for registers.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> loss, grad = numbasoft.cross_entropy_value_and_grad(np.array([1.0, 2.0, 3.0]), 2)
    >>> grad
    array([ 0.09003057,  0.24472847, -0.33475904])
    >>> numbasoft.cross_entropy_value_and_grad(np.array([50.0, 0.0]), 0)[1]
    array([-1.92874985e-22,  1.92874985e-22])
    """
    if weight is None and stream is None and is_zero(label_smoothing):
        plain = plain_losses(
            logits, target, axis, ignore_index, z_loss, temperature, reduction, has_gradient=True, out=out
        )
        if plain is not None:
            return result_of_plain(plain, reduction, logits), plain[-1]
    if arrays.on_device(stream, logits=logits, target=target, weight=weight, out=out):
        return device_losses().value_and_grad(
            device_kernels(), logits, target, out, stream, axis=axis, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
    rows = checked(
        logits, target, axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction
    )
    dx = output(rows, out, [("target", target), ("weight", weight)])
    loss = losses(rows, rows.per_row(np.ones(())), dx, out is not None)
    return rows.reduced(loss), dx


def cross_entropy_backward(
    grad: ArrayLike,
    logits: ArrayLike,
    target: ArrayLike,
    *,
    lse: ArrayLike | None = None,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to the logits, from that with respect to ``cross_entropy``'s result.

    .. math:: dx_j = \frac{g}{T} \left(\left(\sum_k q_k + 2 z\,\mathrm{lse}\right) p_j - q_j\right)

    Parameters
    ----------
    grad : array_like
        g, of the shape of what ``cross_entropy`` returned; where the logits are on a CUDA device,
        a number or an array there.
    logits, target : array_like
        As given to ``cross_entropy``.
    lse : array_like, optional
        What ``logsumexp`` gives for the logits, the axis and the temperature, with or without
        the axis. It spares a traversal of the logits, which here gains little: exponentials take
        most of the time, and without ``lse`` other axes and short rows have kernels of their own.
        The gradient is then that of the ``lse`` as given: its rounding to float32 is worth up to
        ``abs(lse) / 2`` ULP. With class probabilities, and on a CUDA device, it is not needed and
        not used.
    axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction :
        As given to ``cross_entropy``.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``logits``; may be ``logits`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        dx, of the shape of ``logits``, within 4 ULP of the largest term.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy_value_and_grad``; or ``grad`` or ``lse`` has a wrong shape.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> x = np.array([1.0, 2.0, 3.0])
    >>> numbasoft.cross_entropy_backward(1.0, x, 2, lse=numbasoft.logsumexp(x))
    array([ 0.09003057,  0.24472847, -0.33475904])
    """
    is_plain = type(grad) is float and lse is None and type(reduction) is str and reduction != "none"
    if is_plain and weight is None and stream is None and is_zero(label_smoothing):
        plain = plain_losses(
            logits, target, axis, ignore_index, z_loss, temperature, reduction,
            grad=grad, has_gradient=True, out=out,
        )  # fmt: skip
        if plain is not None:
            return plain[-1]
    of_grad = None if isinstance(grad, numbers.Real) else grad  # a number goes with arrays of any place
    if arrays.on_device(stream, logits=logits, target=target, grad=of_grad, lse=lse, weight=weight, out=out):
        return device_losses().backward(
            device_kernels(), grad, logits, target, lse, out, stream, axis=axis, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
    rows = checked(
        logits, target, axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction
    )
    g = rows.per_row(checks.upstream(grad, rows.reduction, rows.outer, rows.axis))
    if lse is not None:
        lse = checks.array(lse, "lse")
        checks.result_dtype(lse.dtype, "lse")
        s = checks.reduced_shape(lse, "lse", rows.x.shape, (rows.axis,))
    inputs = [("grad", grad), ("target", target), ("weight", weight), ("lse", lse)]
    dx = output(rows, out, inputs)
    if lse is None or rows.q is not None:
        losses(rows, g, dx, out is not None)
    elif rows.x.size:
        s = np.array(s, np.float64 if rows.wide else np.float32).reshape(-1)
        s[np.isnan(s)] = np.nan  # some NaN would become a number when rounded to bfloat16
        gradients_from_lse(rows, s, g, dx)
    return dx


def losses(rows, g, dx, is_given=False):
    """The loss of every row and, unless dx is None, its gradient times g into dx, which is new or given by the caller."""
    loss = np.zeros(math.prod(rows.outer))
    if rows.x.size == 0:
        return loss
    # in the order that `call` takes them apart
    reduced = [a for a in (rows.target, rows.own, g) if a is not None] + [loss]

    def call(full, numbers):
        x, q, dx = full
        numbers = list(numbers)
        loss = numbers.pop()
        g = None if dx is None else numbers.pop()
        target, own = numbers if q is None else (None, None)
        if q is None and rows.spread is None and are_narrow(x):
            inputs = x, target, own, g, rows.z, *rows.factors
            launch(
                cpu.narrow, cpu.narrow_parallel, (x.dtype, dx is None), inputs, (loss, dx), x.shape[0], x.size
            )
            return
        if q is None and is_given and is_past_caches(x, dx):
            work = workspace(min(x.shape[0], jit.threads()), x.shape[1], x.dtype)
            inputs = x, target, own, rows.spread, g, rows.z, work, *rows.factors
            run = cpu.past_caches, cpu.past_caches_parallel
            launch(*run, (x.dtype, rows.spread is None), inputs, (loss, dx), x.shape[0], x.size)
            return
        has_work = dx is not None and x.itemsize == 2
        work = workspace(min(x.shape[0], jit.threads()), x.shape[1]) if has_work else None
        inputs = x, target, own, q, rows.weights, rows.spread, g, rows.z, work, *rows.factors
        key = x.dtype, q is None, rows.weights is None, rows.spread is None, dx is None
        launch(cpu.forward, cpu.forward_parallel, key, inputs, (loss, dx), x.shape[0], x.size)

    def along_columns(full, numbers):
        x, _, dx = full
        target, own, *g, loss = numbers
        inputs = x, target, own, g[0] if g else None, rows.z, *rows.factors
        launch_columns(cpu.columns, cpu.columns_parallel, (x.dtype, dx is None), inputs, (loss, dx))

    is_class_alone = rows.q is None and rows.spread is None
    arrays.over_rows(
        call,
        [rows.x, rows.q, dx],
        reduced,
        (rows.axis,),
        rows.compute,
        along_columns if is_class_alone else None,
    )
    return loss


def gradients_from_lse(rows, lse, g, dx):
    """The gradient of every row times g into dx, from the logarithms of their sums."""
    whole = 0.0 if rows.spread is None else float(rows.spread.sum(dtype=np.float64))
    high, low, *inverse = rows.factors

    def call(full, numbers):
        x, dx = full
        lse, target, own, g = numbers
        inputs = x, lse, target, own, rows.spread, whole, g, rows.z, high, low, rows.temperature, *inverse
        key = x.dtype, rows.spread is None
        launch(cpu.backward, cpu.backward_parallel, key, inputs, (dx,), x.shape[0], x.size)

    arrays.over_rows(call, [rows.x, dx], [lse, rows.target, rows.own, g], (rows.axis,), rows.compute)


def token_log_probs(
    logits: ArrayLike,
    ids: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    stream: Any = None,
) -> Array:
    r"""The log-probability of one class, or token, per row: log_softmax at the given places only.

    .. math:: y = x_{\mathrm{id}} / T - \log \sum_k \exp(x_k / T)

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, which the result keeps; bool and
        integers are computed in float64. Any layout.
    ids : array_like of int
        One class per row, of the shape of ``logits`` without ``axis``.
    axis : int, default -1
        The axis of the classes.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        One number per row, within 4 ULP of the larger of its two terms, also next to 0.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``; no class is ignored. On a CUDA device an id that is out of range
        raises nothing and gives NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.token_log_probs(np.array([[1.0, 2.0, 3.0], [50.0, 0.0, 0.0]]), [2, 0])
    array([-4.07605964e-01, -3.85749970e-22])
    """
    plain = (
        None if stream is not None else plain_losses(logits, ids, axis, NO_CLASS, 0.0, temperature, "none")
    )
    if plain is not None:
        _, _, _, loss, _ = plain
        np.subtract(0.0, loss, out=loss)
        return result_of_plain(plain, "none", logits)
    if arrays.on_device(stream, logits=logits, ids=ids):
        return device_losses().value(
            device_kernels(), logits, ids, stream, axis=axis, weight=None, ignore_index=None,
            label_smoothing=0.0, z_loss=0.0, temperature=temperature, reduction="none",
            names=("logits", "ids"), only_classes=True, sign=-1.0, has_ignored=False,
        )  # fmt: skip
    rows = checked(logits, ids, axis, None, NO_CLASS, 0.0, 0.0, temperature, "none", ("logits", "ids"), True)
    return rows.reduced(0.0 - losses(rows, None, None))


def perplexity(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    temperature: float = 1.0,
    stream: Any = None,
) -> float:
    r"""The perplexity of target tokens under a language model's logits: exp of their mean cross-entropy.

    Parameters
    ----------
    logits, target : array_like
        As given to ``cross_entropy``; the target holds class indices.
    axis : int, default -1
        The axis of the classes.
    ignore_index : int, default -100
        Rows of this class do not count.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    float
        At least 1, which is also the perplexity of no token at all; computed in float64. For arrays
        on a CUDA device an array of one float64 and no axes, on it: the host does not wait for it.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``. On a CUDA device a class that is out of range, or a row that holds no
        probabilities, raises nothing and gives NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.perplexity(np.zeros((5, 32)), [0, 1, 2, 3, -100])
    32.0
    """
    plain = None
    if stream is None:
        plain = plain_losses(logits, target, axis, ignore_index, 0.0, temperature, "mean")
    if plain is not None:
        return exponential_of_mean(plain[1], plain[0])
    if arrays.on_device(stream, logits=logits, target=target):
        options = axis, ignore_index, temperature
        return device_losses().perplexity(device_kernels(), logits, target, stream, *options)
    rows = checked(logits, target, axis, None, ignore_index, 0.0, 0.0, temperature, "mean", only_classes=True)
    return exponential_of_mean(total(losses(rows, None, None)), rows.divisor)


def exponential_of_mean(value, divisor):
    """exp of a mean, from the sum."""
    mean = value / divisor if divisor else 0.0
    if mean < 700:
        return float(np.exp(mean))
    with np.errstate(over="ignore"):
        return float(np.exp(mean))


def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    stream: Any = None,
) -> Array:
    r"""The negative log-likelihood of class indices, from log-probabilities.

    .. math:: \mathrm{loss} = -w_t \log p_t

    Parameters
    ----------
    log_probs : array_like, or an array on a CUDA device
        What ``log_softmax`` returned; floats of any layout, whose dtype the result keeps.
    target : array_like of int
        The class of each row, of the shape of ``log_probs`` without ``axis``.
    axis : int, default -1
        The axis of the classes.
    weight, ignore_index, reduction :
        As given to ``cross_entropy``.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        One number, or for "none" one per row. A row whose class has weight 0 has loss 0.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``cross_entropy``; on a CUDA device a class out of range, or a weight that is none, raises
        nothing and gives NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), [1, 0], reduction="none")
    array([0.28768207, 0.69314718])
    """
    if weight is None and stream is None:
        plain = plain_picked(log_probs, target, axis, ignore_index, reduction)
        if plain is not None:
            return result_of_plain(plain, reduction, log_probs)
    if arrays.on_device(stream, log_probs=log_probs, target=target, weight=weight):
        options = axis, weight, ignore_index, reduction
        return device_losses().picked(device_kernels(), None, log_probs, target, stream, *options)
    rows = of_classes(log_probs, target, axis, weight, ignore_index, reduction)
    loss = np.zeros(rows.target.size)
    if loss.size:
        inputs = *layers_and_classes(rows), rows.own
        launch(cpu.picked, cpu.picked_parallel, inputs[0].dtype, inputs, (loss,), loss.size, loss.size)
    return rows.reduced(loss)


def nll_loss_backward(
    grad: ArrayLike,
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    stream: Any = None,
) -> Array:
    r"""The gradient of a loss with respect to the log-probabilities, from that with respect to ``nll_loss``'s result.

    .. math:: d_j = -g\, w_t\, [j = t]

    Parameters
    ----------
    grad : array_like
        g, of the shape of what ``nll_loss`` returned; where ``log_probs`` is on a CUDA device, a
        number or an array there.
    log_probs, target : array_like
        As given to ``nll_loss``.
    axis, weight, ignore_index, reduction :
        As given to ``nll_loss``.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        The gradient, of the shape of ``log_probs``: 0 but at each row's class.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``nll_loss``; or ``grad`` has a wrong shape.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> numbasoft.nll_loss_backward(1.0, np.log([[0.25, 0.75], [0.5, 0.5]]), [1, 0])
    array([[ 0. , -0.5],
           [-0.5,  0. ]])
    """
    of_grad = None if isinstance(grad, numbers.Real) else grad
    if arrays.on_device(stream, log_probs=log_probs, target=target, weight=weight, grad=of_grad):
        options = axis, weight, ignore_index, reduction
        return device_losses().picked(device_kernels(), grad, log_probs, target, stream, *options)
    rows = of_classes(log_probs, target, axis, weight, ignore_index, reduction)
    g = rows.per_row(checks.upstream(grad, rows.reduction, rows.outer, rows.axis))
    result = np.zeros(rows.x.shape, rows.dtype)
    if rows.target.size:
        values = rounded(np.where(rows.own != 0, 0.0 - rows.own * g, 0.0), rows.dtype)
        bits = np.dtype(f"u{rows.dtype.itemsize}")
        inputs, outputs = (rows.target, values.view(bits)), (rows.layers(result).view(bits),)
        code_for_few(cpu.placed, bits, inputs, outputs)(*inputs, *outputs)
    return result


def of_classes(log_probs, target, axis, weight, ignore_index, reduction):
    """The checked arguments of functions of log-probabilities and classes."""
    return checked(
        log_probs, target, axis, weight, ignore_index, 0.0, 0.0, 1.0, reduction,
        ("log_probs", "target"), True,
    )  # fmt: skip


def layers_and_classes(rows):
    """Log-probabilities as (outer, n, inner), for kernels, and each row's class; or only those at the classes, and 0."""
    x = rows.x
    if x.dtype == rows.dtype and x.flags.aligned:
        with contextlib.suppress(ValueError):
            return arrays.kernel_view(rows.layers(x)), rows.target
    index = np.maximum(rows.target, 0).reshape(*rows.outer[: rows.axis], 1, *rows.outer[rows.axis :])
    chosen = np.take_along_axis(x, index, rows.axis).astype(rows.dtype)
    return arrays.kernel_view(chosen.reshape(-1, 1, 1)), np.minimum(rows.target, 0)
