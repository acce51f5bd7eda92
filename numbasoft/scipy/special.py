"""``scipy.special.softmax``, ``log_softmax`` and ``logsumexp`` on numbasoft's kernels.

The signatures, the defaults (``axis=None``) and the semantics are those of SciPy 1.17, for NumPy arrays
and what NumPy makes an array of. Where the two differ:

- results are more accurate; only weighted sums in float64 are about as accurate as SciPy's;
- softmax and log_softmax take bool, and give float64 for every integer dtype, where SciPy gives float16
  for 8-bit integers and lets unsigned ones wrap around; they give an empty array for an empty array;
- a weight of 0 in logsumexp hides its element always; SciPy lets an infinity or a large number
  through where the rest of the sum is 0;
- weights that cancel give log 0 = -inf at any magnitude, where SciPy gives NaN from exp(710) on; weights of
  any magnitude count, where SciPy drops those whose exp underflows; a sum of nothing has sign 0;
- ml_dtypes' bfloat16 is a float among others; longdouble, masked arrays, and complex input of softmax and
  log_softmax raise TypeError.
"""

import math

import numpy as np

from .. import arrays, checks
from ..ops.log_softmax.api import log_softmax as log_softmax_of
from ..ops.logsumexp.api import logsumexp as logsumexp_of
from ..ops.softmax.api import softmax as softmax_of

__all__ = ["log_softmax", "logsumexp", "softmax"]

# Weights whose size is beyond these would let exp underflow where the product does not.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-100, 1e100


def softmax(x, axis=None):
    """Softmax, as ``scipy.special.softmax``.

    Formula: ``y_j = exp(x_j - m) / sum_k exp(x_k - m)`` with ``m = max_k x_k`` over `axis`.

    Parameters
    ----------
    x : array_like
        Real numbers. float16, bfloat16, float32 and float64 keep their dtype, integers and bool
        become float64.
    axis : int or tuple of ints, optional
        The axis or axes over which the result sums to 1. By default all.

    Returns
    -------
    ndarray or scalar
        An array with the shape of `x`; a scalar if `x` is one.

    Raises
    ------
    TypeError
        If `x` does not hold real numbers of at most 64 bits, or `axis` is not an integer.
    ValueError
        If `axis` names an axis twice.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    See Also
    --------
    numbasoft.softmax : with temperature, mask and given output.

    Examples
    --------
    >>> from numbasoft.scipy.special import softmax
    >>> softmax([[1.0, 2.0, 3.0], [1000.0, 1000.0, 1000.0]], axis=1).round(8)
    array([[0.09003057, 0.24472847, 0.66524096],
           [0.33333333, 0.33333333, 0.33333333]])
    """
    return softmax_of(x, axis)[()]


def log_softmax(x, axis=None):
    """Logarithm of softmax, as ``scipy.special.log_softmax``.

    Formula: ``y_j = x_j - m - log sum_k exp(x_k - m)`` with ``m = max_k x_k`` over `axis`.

    Parameters
    ----------
    x : array_like
        Real numbers. float16, bfloat16, float32 and float64 keep their dtype, integers and bool
        become float64.
    axis : int or tuple of ints, optional
        The axis or axes over which the exponentials of the result sum to 1. By default all.

    Returns
    -------
    ndarray or scalar
        An array with the shape of `x`; a scalar if `x` is one.

    Raises
    ------
    TypeError
        If `x` does not hold real numbers of at most 64 bits, or `axis` is not an integer.
    ValueError
        If `axis` names an axis twice.
    numpy.exceptions.AxisError
        If `x` has no such axis.

    See Also
    --------
    numbasoft.log_softmax : with temperature, mask and given output.

    Notes
    -----
    Beside +inf every smaller element gives -inf, and +inf itself NaN, as in SciPy. `numbasoft.log_softmax`
    gives NaN for the whole row.

    Examples
    --------
    >>> from numbasoft.scipy.special import log_softmax
    >>> log_softmax([1000.0, 1.0])
    array([   0., -999.])
    """
    x = checks.array(x, "x")
    y = log_softmax_of(x, axis)
    # One NaN in a row means that the whole row is, so one element of every row is looked at.
    if np.isnan(y[first_elements(y, checks.axes(axis, y.ndim))]).any():
        infinite = np.isposinf(logsumexp_of(x, axis, keepdims=True))
        np.putmask(y, infinite & (x < np.inf), -np.inf)
    return y[()]


def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False):
    """Logarithm of a sum of exponentials, as ``scipy.special.logsumexp``.

    Formula: ``log sum_j b_j exp(a_j)`` over `axis`, with every ``b_j = 1`` where `b` is not given.

    Parameters
    ----------
    a : array_like
        Real or complex numbers.
    axis : int or tuple of ints, optional
        The axis or axes to sum over. By default all.
    b : array_like, optional
        Weights, real or complex, of either sign, broadcast with `a`. An element with weight 0 is absent,
        whatever it holds.
    keepdims : bool, default False
        Whether the axes summed over stay in the result with length 1.
    return_sign : bool, default False
        Whether to return the logarithm of the sum's magnitude, and its sign beside it. Without it a
        negative sum of real terms gives NaN.

    Returns
    -------
    res : ndarray or scalar
        The result, in the common dtype of `a` and `b` (float64 for integers and bool); real if
        `return_sign`.
    sgn : ndarray or scalar
        Only if `return_sign`: -1, 0 or 1, for complex terms a number of magnitude 1 or 0.

    Raises
    ------
    TypeError
        If `a` or `b` does not hold real numbers of at most 64 bits or complex ones of at most 128, or
        `axis` is not an integer.
    ValueError
        If `a` and `b` cannot be broadcast together, or `axis` names an axis twice.
    numpy.exceptions.AxisError
        If `a` has no such axis.

    See Also
    --------
    numbasoft.logsumexp : for real numbers without weights; with temperature, mask and given output.

    Notes
    -----
    Weighted and complex sums are ``logsumexp(Re a) + log sum_j w_j p_j`` with ``p = softmax(Re a)`` and
    ``w_j = b_j exp(i Im a_j)``, computed in float64. Only a sum whose terms cancel magnifies
    rounding errors, by ``sum_j abs(w_j) p_j / abs(sum_j w_j p_j)``.

    Examples
    --------
    >>> from numbasoft.scipy.special import logsumexp
    >>> float(logsumexp([1000.0, 1000.0]))
    1000.6931471805599
    >>> res, sgn = logsumexp([1.0, 2.0], b=[1.0, -1.0], return_sign=True)
    >>> round(float(res), 12), float(sgn)
    (1.541324854613, -1.0)
    """
    a, b, dtype = operands(a, b)
    axes = checks.axes(axis, a.ndim)
    is_complex = dtype.kind == "c"
    if b is None and not is_complex:
        res = logsumexp_of(a, axes, keepdims=bool(keepdims))
        return (res[()], sign_of_sum(res)[()]) if return_sign else res[()]

    b = np.broadcast_to(1.0, a.shape) if b is None else b
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        res, total = log_weighted_sums(a, b, axes, np.complex128 if is_complex else np.float64)
        sgn = np.where(total == 0, 0, total / np.abs(total)) if is_complex else np.sign(total)
    if is_complex and not return_sign:
        res = with_imaginary(res, np.arctan2(total.imag, total.real))
    elif not return_sign:
        res = np.where(sgn < 0, np.nan, res)
    shape = [1 if d in axes else n for d, n in enumerate(a.shape) if keepdims or d not in axes]
    sgn = sgn.astype(dtype).reshape(shape)
    res = res.astype(sgn.real.dtype if return_sign else dtype).reshape(shape)
    return (res[()], sgn[()]) if return_sign else res[()]


def operands(a, b):
    """a and b (or None) as arrays of one shape, and the dtype of the result."""
    given = {"a": a} if b is None else {"a": a, "b": b}
    found = {name: checks.array(value, name) for name, value in given.items()}
    for name, array in found.items():
        if array.dtype.kind != "c" or array.dtype.itemsize > 16:
            checks.result_dtype(array.dtype, name)
    # A Python number yields to the dtype of the other operand, as everywhere in NumPy.
    weak = (bool, int, float, complex)
    try:
        dtype = np.result_type(*[v if type(v) in weak else found[name] for name, v in given.items()])
    except TypeError:
        raise TypeError(
            f"b has dtype {found['b'].dtype}, but must have one that goes with {found['a'].dtype} of a"
        ) from None
    if dtype.kind in "biu":
        dtype = np.dtype(np.float64)
    if b is None:
        return np.atleast_1d(found["a"]), None, dtype
    try:
        a, b = np.broadcast_arrays(found["a"], found["b"])
    except ValueError:
        raise ValueError(
            f"b has shape {found['b'].shape}, but must broadcast with the shape {found['a'].shape} of a"
        ) from None
    return np.atleast_1d(a), np.atleast_1d(b), dtype


def first_elements(array, axes):
    """The index of the first element of every row along `axes`."""
    return tuple(slice(1) if d in axes else slice(None) for d in range(array.ndim))


def sign_of_sum(log_sum):
    """The sign of a sum of exponentials: 1 unless it is 0 or NaN."""
    return np.where(np.isnan(log_sum), log_sum, log_sum > -np.inf).astype(log_sum.dtype)


def log_weighted_sums(a, b, axes, number):
    """`log_weighted_sum` over `axes`, by blocks of rows whose intermediate arrays stay in the cache."""
    a, b = arrays.last(a, axes), arrays.last(b, axes)
    outer, inner = a.shape[: a.ndim - len(axes)], a.shape[a.ndim - len(axes) :]
    n = math.prod(inner)
    log_size, total = np.empty(outer), np.empty(outer, number)
    for index in arrays.blocks(outer, max(1, arrays.BLOCK // max(1, n))):
        rows = [v[index].astype(number, order="C") for v in (a, b)]
        rows = [v.reshape(*v.shape[: len(outer)], n) for v in rows]
        log_size[index], total[index] = log_weighted_sum(*rows)
    return log_size, total


def log_weighted_sum(a, b):
    """log(abs(s)) for s = sum b exp(a) over the last axis, and s divided by a positive number.

    With p = softmax(Re a) and w = b exp(i Im a) the sum is exp(logsumexp(Re a)) times sum w p. The
    latter is also 1 + sum (w - 1) p, which keeps the digits of the logarithm where it is near 0.
    """
    size = np.abs(b)
    if not size.all():
        absent = size == 0
        a, size = np.where(absent, -np.inf, a), np.where(absent, 1, size)
    if not (size.min(initial=1) >= SMALLEST_WEIGHT and size.max(initial=1) <= LARGEST_WEIGHT):
        extreme = (size < SMALLEST_WEIGHT) | (size > LARGEST_WEIGHT) & (size < np.inf)
        a, b = np.where(extreme, a + np.log(size), a), np.where(extreme, b / size, b)

    w = b
    if np.iscomplexobj(a):
        turn = 1j * np.where(a.real == -np.inf, 0, a.imag)
        w = b * np.exp(turn)
    p = softmax_of(a.real)
    total = np.sum(w * p, axis=-1)
    log_total = np.log(np.abs(total))
    near_one = np.abs(total - 1) < 0.5
    if near_one.any():
        w_less_one = b * np.expm1(turn) + (b - 1) if np.iscomplexobj(a) else b - 1
        excess = np.sum(w_less_one * p, axis=-1)
        log_near_one = np.log1p(excess.real * (2 + excess.real) + excess.imag**2) / 2
        log_total = np.where(near_one, log_near_one, log_total)
    scale = logsumexp_of(a.real)
    log_size = scale + log_total

    # Infinities and NaN among the terms: those of exp and log are SciPy's rule for them.
    special = ~(np.isfinite(total) & np.isfinite(scale))
    if special.any():
        terms = np.where(b == 1, np.exp(a), b * np.exp(a))  # (1 + 0j) * inf is inf + nan j
        total = np.where(special, np.sum(terms, axis=-1), total)
        log_size = np.where(special, np.log(np.abs(total)), log_size)
    return log_size, total


def with_imaginary(real, imaginary):
    """Not real + 1j * imaginary, which makes NaN beside an infinity."""
    z = np.empty(real.shape, np.complex128)
    z.real = real
    z.imag = np.where(imaginary == -np.pi, np.pi, imaginary)
    return z
