"""Sampling from logits, for callers: checks, random keys, choice of kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ... import arrays, checks, elementary, jit
from ...arrays import Array
from ...launch import computing_dtype, is_wide, launch, workspace
from . import cpu

# So many elements of a softmax take as long as one here.
DRAW_COST, CUT_COST, NOISE_COST = (
    2,
    8,
    64,
)  # the second where not all classes are kept, the last with noise for each


def sample(
    logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    rng: int | np.random.Generator | None = None,
    stream: Any = None,
) -> Array:
    r"""Draw one class, or token, per row from the softmax of logits.

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, bool or integers. -inf rules a class out.
    axis : int, default -1
        The axis of the classes.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290; applied before anything is left out.
    top_k : int, optional
        Only the k most probable classes are drawn; of equal ones the first.
    top_p : float, optional
        Only the fewest most probable classes that together have at least this part, above 0
        and at most 1, of what top_k and min_p leave; of equal ones the first.
    min_p : float, optional
        Only classes that are at least this part, from 0 to 1, as probable as the most probable one.
    rng : int or numpy.random.Generator, optional
        A seed, or a generator from which one is drawn. By default every call has a seed of its own.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        int64, of the shape of ``logits`` without ``axis``; for logits on a CUDA device an array of
        their kind there.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype.
    ValueError
        A number is out of its range, there are no classes, or a row has no probabilities:
        NaN, +inf or nothing but -inf (the first such row is named). On a CUDA device, whose
        logits the host does not look at, such a row raises nothing: its draw is -1.
    numpy.exceptions.AxisError
        The axis is out of range.

    Notes
    -----
    A draw is a function of the seed, the number of the row (its place among the rows in C order)
    and the row's logits: the other rows, their number and the number of threads do not matter.
    There is one row of exponentials per thread, and no array of probabilities. A class of
    probability below 2**-149 is never drawn. Random numbers are Philox4x32-10's, by counter.

    On a CUDA device the random numbers are the same, and a draw depends on seed, number and
    logits of its row alone, too: a block of threads sums a row's exponentials as integers of 46
    bits (38 in rows of ten million), so a class with less than half a unit of the last of these
    bits of the largest probability is never drawn. The draw is the CPU's unless rounding decides:
    a random number falls next to the boundary of two classes, or a class next to a limit, or
    logits differ but not their exponentials. That is rare: in float32 some rows in a million.
    Nothing of the logits' size is stored where rows are contiguous, whatever lies between them;
    logits of other layouts, integers, and those of temperatures beyond 1e-30 and 1e30 are copied first.

    References
    ----------
    J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; A. Holtzman et
    al., "The curious case of neural text degeneration", ICLR 2020 (top_p); M. N. Nguyen et al.,
    "Turning up the heat: min-p sampling for creative and coherent LLM outputs", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> logits = np.log([[0.5, 0.3, 0.2]] * 10_000)
    >>> (np.bincount(numbasoft.sample(logits, rng=7)) / 10_000).round(2)
    array([0.5, 0.3, 0.2])
    >>> np.bincount(numbasoft.sample(logits, top_k=1, rng=7))
    array([10000])
    """
    if arrays.on_device(stream, logits=logits):
        calls = device_calls()
        given = calls.checked(logits, axis, temperature)
        limits = kept(top_k, top_p, min_p)
        return calls.draw(device_kernels(), given, key_of(rng), *limits, stream)
    x, axis, outer, compute, t = checked(logits, axis, temperature)
    n = x.shape[axis]
    k, p, least = kept(top_k, top_p, min_p)
    cost = DRAW_COST if top_k is top_p is min_p is None else CUT_COST
    key = key_of(rng)
    rows = math.prod(outer)
    drawn = np.zeros(rows, np.int64)
    high, low = elementary.scale(t, is_wide(compute))

    def run(full, reduced):
        x, _ = full
        row, drawn = reduced
        work = workspace(min(x.shape[0], jit.threads()), x.shape[1], x.dtype)
        inputs = x, row, key, min(k or n, n), p, least, high, low
        launch(cpu.draw, cpu.draw_parallel, x.dtype, inputs, (work, drawn), x.shape[0], cost * x.size)

    if rows:
        arrays.over_rows(run, [x, None], [np.arange(rows), drawn], (axis,), compute)
    bad = np.flatnonzero(drawn < 0)
    if bad.size:
        at = tuple(map(int, np.unravel_index(bad[0], outer))) if outer else ()
        where = f"row {at if len(at) > 1 else at[0]}" if at else "its row"
        raise ValueError(
            f"logits holds NaN, +inf or nothing but -inf in {where}: no probabilities to draw from"
        )
    return drawn.reshape(outer)


def gumbel_softmax(
    logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    hard: bool = False,
    rng: int | np.random.Generator | None = None,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    r"""Softmax of logits with Gumbel noise: a draw of a class, relaxed to a differentiable vector.

    .. math:: y = \mathrm{softmax}\left((x + G) / T\right), \qquad G_j = -\log(-\log u_j)

    Parameters
    ----------
    logits : array_like, or an array on a CUDA device
        x, of dtype float16, bfloat16, float32 or float64, which the result keeps; bool and
        integers are computed in float64.
    axis : int, default -1
        The axis of the classes.
    temperature : float, default 1.0
        T, from 1e-290 to 1e290; the colder, the closer to one class.
    hard : bool, default False
        Whether to return the drawn class as 1 and all others as 0.
    rng : int or numpy.random.Generator, optional
        A seed, or a generator from which one is drawn. By default every call has a seed of its own.
    out : numpy.ndarray, optional
        Where to put the result, of the shape and dtype of ``logits``; may be ``logits`` itself.
    stream : optional
        For arrays on a CUDA device: the stream to launch into, of any library or as its number;
        by default the current one of the library that the arrays are from.

    Returns
    -------
    numpy.ndarray
        y, of the shape of ``logits``. Its gradient is ``softmax_backward(grad, y,
        temperature=T)``, for ``hard`` with the y of ``hard=False`` and the same seed. A row that
        holds NaN, +inf or nothing but -inf is NaN, as softmax's is, for ``hard`` too.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As ``softmax``.

    Notes
    -----
    A row's result is a function of the seed, the number of the row and its logits, as for ``sample``.

    On a CUDA device u is the same, and x + G is rounded as on the CPU, to float32 for 16 bits: in
    float32 a neighbouring number comes out for less than one in a hundred elements, in float64,
    where the CPU's logarithms are rounded, for one in three. A result is so within
    ``3 + 4 * max(abs(x + G)) / T`` ULP of the CPU's; rounded to 16 bits it is mostly the same.
    For 16 bits, and where rows are not contiguous, it is computed in arrays of its own.

    References
    ----------
    E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017;
    C. J. Maddison, A. Mnih, Y. W. Teh, "The concrete distribution", ICLR 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import numbasoft
    >>> y = numbasoft.gumbel_softmax(np.zeros((2, 3)), hard=True, rng=1)
    >>> y.sum(axis=-1)
    array([1., 1.])
    """
    if not isinstance(hard, (bool, np.bool_)):
        raise TypeError(f"hard is {checks.shown(hard)}, but must be True or False")
    if arrays.on_device(stream, logits=logits, out=out):
        calls = device_calls()
        given = calls.checked(logits, axis, temperature)
        return calls.relaxed(device_kernels(), given, key_of(rng), hard, out, stream)
    x, axis, outer, compute, t = checked(logits, axis, temperature)
    dtype = checks.result_dtype(x.dtype, "logits")
    key = key_of(rng)
    if out is None:
        y = np.empty_like(x, dtype=dtype, subok=False)
    else:
        y = out
        checks.out(out, x.shape, dtype, [("logits", x)])
    high, low = elementary.scale(t, is_wide(compute))

    def run(full, reduced):
        x, y = full
        inputs = x, *reduced, key, high, low
        launch(cpu.relaxed, cpu.relaxed_parallel, x.dtype, inputs, (y,), x.shape[0], NOISE_COST * x.size)

    if x.size:
        arrays.over_rows(run, [x, y], [np.arange(math.prod(outer))], (axis,), compute)
    if hard and x.size:
        is_lost, drawn = np.isnan(y.take([0], axis)), y.argmax(axis=axis, keepdims=True)
        y[...] = 0
        np.put_along_axis(y, drawn, np.asarray(1, dtype), axis)
        np.copyto(y, np.asarray(np.nan, dtype), where=is_lost)
    return y


def device_calls():
    arrays.device_calls()
    from ...cuda import sampling

    return sampling


def device_kernels():
    from .cuda import SAMPLE

    return SAMPLE


def kept(top_k, top_p, min_p):
    """How many classes are kept at most (None: all), and the least part of all and of the largest probability."""
    k = None if top_k is None else checks.integer(top_k, "top_k")
    if k is not None and k < 1:
        raise ValueError(f"top_k is {k}, but must be at least 1")
    p = 1.0 if top_p is None else checks.between(top_p, "top_p", 0, 1)
    if not p:
        raise ValueError("top_p is 0, but must be above 0")
    return k, p, 0.0 if min_p is None else checks.between(min_p, "min_p", 0, 1)


def checked(logits, axis, temperature):
    """The logits, the axis and the shape of the rest, the dtype to compute in and the temperature."""
    x = checks.array(logits, "logits")
    dtype = checks.result_dtype(x.dtype, "logits")
    axis = checks.class_axis(axis, x.shape, "logits")
    t = checks.temperature(temperature)
    compute = computing_dtype(dtype, t)
    outer = x.shape[:axis] + x.shape[axis + 1 :]
    return x, axis, outer, np.dtype(np.float32) if compute.itemsize == 2 else compute, t


def key_of(rng):
    """64 random bits as an int that a kernel takes: of a seed always the same, of a generator the next."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(-(2**63), 2**63))
    if rng is not None:
        if isinstance(rng, (bool, np.bool_)) or not hasattr(rng, "__index__"):
            raise TypeError(
                f"rng is {checks.shown(rng)}, but must be an int, a numpy.random.Generator or None"
            )
        rng = checks.integer(rng, "rng")
        if rng < 0:
            raise ValueError(f"rng is {rng}, but a seed must not be negative")
    return int(np.random.SeedSequence(rng).generate_state(1, np.uint64)[0].astype(np.int64))
