"""The softmax family inside a caller's own ``@njit`` functions.

``softmax``, ``log_softmax``, ``logsumexp``, ``softmax_backward``, ``log_softmax_backward`` and ``logsumexp_backward`` are
called there by the same names, and give the same bits. This module says what Numba compiles for them.

- Arrays are float32 or float64; bool and integers are computed in float64.
- ``axis`` is an int or None.
- ``temperature`` is from 1e-290 to 1e290, for float32 from 1e-30 to 1e30.
- ``logsumexp`` of an array of one axis, or over all, is a number, and takes neither ``keepdims`` nor ``out``.
- No function takes ``stream``.

The kernels are those of calls from Python. They run in the thread that calls: ``prange`` around them is the
caller's. Rows that do not lie one behind the other are copied. What is wrong with the type of an argument is a
``TypingError`` while the caller is compiled, else a ``ValueError`` or ``AxisError`` before anything is written.

Examples
--------
>>> import numba
>>> import numpy as np
>>> import numbasoft
>>> @numba.njit
... def entropy(x):
...     return -(numbasoft.softmax(x) * numbasoft.log_softmax(x)).sum()
>>> round(entropy(np.zeros(4)), 4)
1.3863
"""

from fractions import Fraction

import numpy as np
from numba.core.errors import TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.core.types import Array, Boolean, Float, Integer, NoneType, Omitted, float32, float64
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic, overload
from numpy.exceptions import AxisError

from .checks import LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE, TEMPERATURES
from .elementary import LOG2_E, LOG2_E_64, LOG2_E_REST_64
from .jit import SURROUNDING, surrounding
from .launch import LARGEST_PLAIN, SMALLEST_PLAIN
from .ops.log_softmax import cpu as log_softmax_cpu
from .ops.log_softmax.api import log_softmax, log_softmax_backward
from .ops.logsumexp import cpu as logsumexp_cpu
from .ops.logsumexp.api import logsumexp, logsumexp_backward
from .ops.softmax import cpu as softmax_cpu
from .ops.softmax.api import softmax, softmax_backward
from .vector import fma

__all__: list[str] = []

# What is known of arguments while the caller is compiled


def is_none(kind):
    return kind is None or isinstance(kind, NoneType) or (isinstance(kind, Omitted) and kind.value is None)


def check_array(array, name):
    if not isinstance(array, Array) or array.ndim == 0:
        raise TypingError(f"{name} is {array}, but compiled code takes an array of at least one axis")
    if not isinstance(array.dtype, (Boolean, Integer)) and array.dtype not in (float32, float64):
        raise TypingError(
            f"{name} has dtype {array.dtype}, but must have dtype float32, float64, bool or int"
        )
    if not array.aligned:
        raise TypingError(
            f"{name} is a field of packed records, {array}, of which compiled code takes a copy only"
        )


def check_same(array, name, other, other_name):
    check_array(array, name)
    check_array(other, other_name)
    if (array.ndim, array.dtype) != (other.ndim, other.dtype):
        raise TypingError(f"{name} is {array}, but must have the axes and the dtype of {other_name}, {other}")


def check_options(axis, temperature):
    if not is_none(axis) and not isinstance(axis, (int, Integer, Omitted)):
        raise TypingError(f"axis is {axis}, but compiled code takes an int or None")
    if not isinstance(temperature, (float, Float, Integer, Omitted)):
        raise TypingError(f"temperature is {temperature}, but must be {TEMPERATURES}")


def check_mask(where, x):
    is_mask = isinstance(where, Array) and isinstance(where.dtype, Boolean) and where.ndim <= x.ndim
    if not is_none(where) and not is_mask:
        raise TypingError(f"where is {where}, but must be an array of bool with at most {x.ndim} axes")


def check_output(out, array):
    dtype = array.dtype if isinstance(array.dtype, Float) else float64
    if is_none(out):
        return
    if not isinstance(out, Array) or (out.ndim, out.dtype) != (array.ndim, dtype):
        raise TypingError(f"out is {out}, but must be an array of {array.ndim} axes and dtype {dtype}")
    if not out.mutable:
        raise TypingError("out is read-only, but must be writeable")


# Rows


def extents(shape, axis):
    """The numbers of elements before, along and behind an axis."""


@overload(extents, jit_options=SURROUNDING)
def extents_by_type(shape, axis):
    return extents_of_all if is_none(axis) else extents_along


def extents_of_all(shape, axis):
    n = 1
    for size in shape:
        n *= size
    return 1, n, 1


def extents_along(shape, axis):
    if not -len(shape) <= axis < len(shape):
        raise AxisError("axis is out of range: it must be an axis of the array")
    axis %= len(shape)
    outer, n, inner = 1, 1, 1
    for k in range(len(shape)):
        if k < axis:
            outer *= shape[k]
        elif k == axis:
            n = shape[k]
        else:
            inner *= shape[k]
    return outer, n, inner


def as_floats(x):
    """An array of floats as it is, others as float64."""


@overload(as_floats, jit_options=SURROUNDING)
def as_floats_by_type(x):
    if isinstance(x.dtype, Float):
        return lambda x: x
    return lambda x: x.astype(np.float64)


@surrounding
def rows_of(x, outer, n, inner):
    """The rows of x one behind the other: x itself or a copy."""
    whole = np.ascontiguousarray(as_floats(x))
    return whole.reshape((outer, n)) if inner == 1 else rows_across(whole.reshape((outer, n, inner)))


@surrounding
def rows_across(x):
    """The rows of an (outer, n, inner) array that run along its middle, copied one behind the other."""
    outer, n, inner = x.shape
    rows = np.empty((outer * inner, n), x.dtype)
    for i in range(outer):
        for j in range(n):
            for k in range(inner):
                rows[i * inner + k, j] = x[i, j, k]
    return rows


@surrounding
def put_back(rows, outer, n, inner, y):
    """The inverse of ``rows_of``, into y, where these are rows already if ``inner`` is 1."""
    if inner != 1:
        across = y.reshape((outer, n, inner))
        for i in range(outer):
            for j in range(n):
                for k in range(inner):
                    across[i, j, k] = rows[i * inner + k, j]


def mask_rows(where, x, outer, n, inner):
    """The rows of a mask as bytes."""


@overload(mask_rows, jit_options=SURROUNDING)
def mask_rows_by_type(where, x, outer, n, inner):
    return (lambda where, x, outer, n, inner: None) if is_none(where) else rows_of_mask


def rows_of_mask(where, x, outer, n, inner):
    whole = np.ascontiguousarray(np.broadcast_to(where, x.shape)).view(np.uint8)
    return whole.reshape((outer, n)) if inner == 1 else rows_across(whole.reshape((outer, n, inner)))


# Everything is checked before anything is allocated: Numba frees nothing when an exception is raised.


def check_broadcast(where, x):
    """That a mask can be broadcast to the shape of x."""


@overload(check_broadcast, jit_options=SURROUNDING)
def check_broadcast_by_type(where, x):
    return (lambda where, x: None) if is_none(where) else is_broadcast


def is_broadcast(where, x):
    for k in range(where.ndim):
        if where.shape[where.ndim - 1 - k] not in (1, x.shape[x.ndim - 1 - k]):
            raise ValueError("where has a shape that does not broadcast to that of x")


def check_given(out, x):
    """That ``out`` has the shape of x, if there is one."""


@overload(check_given, jit_options=SURROUNDING)
def check_given_by_type(out, x):
    return (lambda out, x: None) if is_none(out) else has_shape


def has_shape(out, x):
    if x.shape != out.shape:
        raise ValueError("out has another shape than the result")


def check_apart(out, x):
    """That ``out``, if it is written directly, is x or shares no memory with it, unless x is copied before."""


@overload(check_apart, jit_options=SURROUNDING)
def check_apart_by_type(out, x):
    if is_none(out) or is_none(x) or out.layout != "C":
        return lambda out, x: None
    if isinstance(x.dtype, Boolean):
        return lambda out, x: are_apart(out, x, False)
    return (lambda out, x: are_apart(out, x, True)) if x.dtype == out.dtype else lambda out, x: None


@surrounding
def are_apart(out, x, may_be_one):
    step = x.itemsize
    for k in range(x.ndim - 1, -1, -1):
        if x.shape[k] != 1 and x.strides[k] != step:
            return  # not one behind the other: it is copied
        step *= x.shape[k]
    a, b = out.ctypes.data, x.ctypes.data
    if a < b + x.size * x.itemsize and b < a + out.size * out.itemsize and not (may_be_one and a == b):
        raise ValueError("out overlaps an input, but must be the same array, or share no memory")


def room_for(x, out):
    """Where the result is made, in C order: ``out`` if that is, else new."""


@overload(room_for, jit_options=SURROUNDING)
def room_by_type(x, out):
    if not is_none(out) and out.layout == "C":
        return lambda x, out: out
    dtype = np.float32 if x.dtype == float32 else np.float64
    return lambda x, out: np.empty(x.shape, dtype)


def finished(y, out):
    """``out`` with the result y if there is one, else y."""


@overload(finished, jit_options=SURROUNDING)
def finished_by_type(y, out):
    if is_none(out):
        return lambda y, out: y
    return (lambda y, out: out) if out.layout == "C" else copied_to_out


def copied_to_out(y, out):
    for index in np.ndindex(y.shape):
        out[index] = y[index]
    return out


def numbers(values, count, like):
    """One number for each row, from an array of the reduced shape or one number: in float32 where x, ``like``, is, else float64."""


@overload(numbers, jit_options=SURROUNDING)
def numbers_by_type(values, count, like):
    dtype = np.float32 if isinstance(like, Array) and like.dtype == float32 else np.float64
    if isinstance(values, Array):
        return lambda values, count, like: np.ascontiguousarray(values).reshape(values.size).astype(dtype)
    return lambda values, count, like: np.full(count, values, dtype)


@intrinsic
def to_read(typingctx, array):
    """An array as kernels declare their inputs, of any layout; or None."""
    kind = array if array == NoneType("none") else Array(array.dtype, array.ndim, "A", readonly=True)
    return kind(array), as_it_is


@intrinsic
def to_write(typingctx, array):
    """An array as kernels declare their outputs."""
    return Array(array.dtype, array.ndim, "A")(array), as_it_is


def as_it_is(context, builder, sig, args):
    return impl_ret_borrowed(context, builder, sig.return_type, args[0])


# Temperatures

LOG2_E_LEAST = float(LOG2_E - Fraction(LOG2_E_64) - Fraction(LOG2_E_REST_64))

BEYOND = f"temperature must be {TEMPERATURES}"
BEYOND_32 = (
    f"temperature must be a number from {SMALLEST_PLAIN} to {LARGEST_PLAIN} in compiled code with float32"
)


def checked(temperature, like):
    """A temperature as a float64."""


@overload(checked, jit_options=SURROUNDING)
def checked_by_type(temperature, like):
    return checked_32 if like.dtype == float32 else checked_64


def checked_64(temperature, like):
    t = np.float64(temperature)
    if not SMALLEST_TEMPERATURE <= t <= LARGEST_TEMPERATURE:
        raise ValueError(BEYOND)
    return t


def checked_32(temperature, like):
    t = np.float64(temperature)
    if not SMALLEST_PLAIN <= t <= LARGEST_PLAIN:
        raise ValueError(BEYOND_32)
    return t


@surrounding
def quotient(a, b, c, t):
    """(a + b + c) / t as the sum of two float64, each correctly rounded but for a chance of some 2**-45, or where it is subnormal."""
    down = 2.0**-512 if t > 2.0**512 else 1.0  # so that nothing is subnormal
    t *= down
    high = a / t
    low = rest_of(high, a, b, c, t)
    if high + low != high:
        high += low
        low = rest_of(high, a, b, c, t)
    return high * down, low * down


@surrounding
def rest_of(high, a, b, c, t):
    """(a + b + c) / t - high."""
    r = fma(-high, t, a)  # exact
    s = r + b
    lost = (r - (s - (s - r))) + (b - (s - r)) + c
    low = s / t
    return low + (fma(-low, t, s) + lost) / t


def in_two(high, low, like):
    """A number in two float64 as two of the computing type."""


@overload(in_two, jit_options=SURROUNDING)
def in_two_by_type(high, low, like):
    return (lambda high, low, like: (high, low)) if like.dtype == float64 else in_two_32


def in_two_32(high, low, like):
    rounded = np.float64(np.float32(high))
    return rounded, np.float64(np.float32((high - rounded) + low))


@surrounding
def scale(t, like):
    """As ``elementary.scale``."""
    high, low = quotient(LOG2_E_64, LOG2_E_REST_64, LOG2_E_LEAST, t)
    return in_two(high, low, like)


@surrounding
def inverse(t, like):
    """As ``elementary.inverse``."""
    high, low = quotient(1.0, 0.0, 0.0, t)
    return in_two(high, low, like)


# The functions


@surrounding
def softmax_rows(x, mask, t, y):
    high, low = scale(t, x)
    softmax_cpu.forward(to_read(x), to_read(mask), None, high, low, to_write(y))


@surrounding
def log_softmax_rows(x, mask, t, y):
    high, low = scale(t, x)
    inverse_high, inverse_low = inverse(t, x)
    log_softmax_cpu.forward(to_read(x), to_read(mask), high, low, inverse_high, inverse_low, to_write(y))


@surrounding
def softmax_gradients(g, y, t, dx):
    softmax_cpu.backward(to_read(g), to_read(y), 1.0 / t, to_write(dx))


@surrounding
def log_softmax_gradients(g, log_y, t, dx):
    high, low = scale(1.0, g)
    inverse_high, inverse_low = quotient(1.0, 0.0, 0.0, t)
    log_softmax_cpu.backward(to_read(g), to_read(log_y), high, low, inverse_high, inverse_low, to_write(dx))


def forward(run):
    """What is compiled for softmax or log_softmax."""

    def by_type(x, axis=-1, temperature=1.0, where=None, out=None):
        check_array(x, "x")
        check_options(axis, temperature)
        check_mask(where, x)
        check_output(out, x)

        def compiled(x, axis=-1, temperature=1.0, where=None, out=None):
            outer, n, inner = extents(x.shape, axis)
            t = checked(temperature, x)
            check_broadcast(where, x)
            check_given(out, x)
            check_apart(out, x)
            check_apart(out, where)
            y = room_for(x, out)
            if y.size > 0:
                rows = rows_of(x, outer, n, inner)
                mask = mask_rows(where, x, outer, n, inner)
                result = y.reshape((outer, n)) if inner == 1 else np.empty(rows.shape, y.dtype)
                run(rows, mask, t, result)
                put_back(result, outer, n, inner, y)
            return finished(y, out)

        return compiled

    return by_type


overload(softmax, jit_options=SURROUNDING)(forward(softmax_rows))
overload(log_softmax, jit_options=SURROUNDING)(forward(log_softmax_rows))


@surrounding
def lse_of_rows(x, axis, temperature, where):
    outer, n, inner = extents(x.shape, axis)
    t = checked(temperature, x)
    check_broadcast(where, x)
    lse = numbers(-np.inf, outer * inner, x)
    if x.size > 0:
        rows = rows_of(x, outer, n, inner)
        mask = mask_rows(where, x, outer, n, inner)
        high, low = scale(t, rows)
        inverse_high, inverse_low = inverse(t, rows)
        logsumexp_cpu.forward(
            to_read(rows), to_read(mask), high, low, inverse_high, inverse_low, to_write(lse)
        )
    return lse


@overload(logsumexp, jit_options=SURROUNDING)
def logsumexp_by_type(x, axis=-1, temperature=1.0, where=None):
    check_array(x, "x")
    check_options(axis, temperature)
    check_mask(where, x)
    if x.ndim == 1 or is_none(axis):
        return lambda x, axis=-1, temperature=1.0, where=None: lse_of_rows(x, axis, temperature, where)[0]

    def compiled(x, axis=-1, temperature=1.0, where=None):
        return lse_of_rows(x, axis, temperature, where).reshape(without(x.shape, axis))

    return compiled


@surrounding
def without(shape, axis):
    """A shape without one of its axes."""
    kept = shape[1:]
    for k in range(len(kept)):
        kept = tuple_setitem(kept, k, shape[k if k < axis % len(shape) else k + 1])
    return kept


def backward(run, name):
    """What is compiled for the gradient of softmax or log_softmax."""

    def check(grad, y, axis, temperature, out):
        check_same(grad, "grad", y, name)
        check_options(axis, temperature)
        check_output(out, y)

    @surrounding
    def gradient(grad, y, axis, temperature, out):
        if grad.shape != y.shape:
            raise ValueError("grad has another shape than what the forward pass returned")
        outer, n, inner = extents(y.shape, axis)
        t = checked(temperature, y)
        check_given(out, y)
        check_apart(out, grad)
        check_apart(out, y)
        dx = room_for(y, out)
        if y.size > 0:
            g, rows = rows_of(grad, outer, n, inner), rows_of(y, outer, n, inner)
            result = dx.reshape((outer, n)) if inner == 1 else np.empty(rows.shape, dx.dtype)
            run(g, rows, t, result)
            put_back(result, outer, n, inner, dx)
        return finished(dx, out)

    return check, gradient


check_softmax, softmax_gradient = backward(softmax_gradients, "y")
check_log_softmax, log_softmax_gradient = backward(log_softmax_gradients, "log_y")


@overload(softmax_backward, jit_options=SURROUNDING)
def softmax_backward_by_type(grad, y, axis=-1, temperature=1.0, out=None):
    check_softmax(grad, y, axis, temperature, out)
    return lambda grad, y, axis=-1, temperature=1.0, out=None: softmax_gradient(
        grad, y, axis, temperature, out
    )


@overload(log_softmax_backward, jit_options=SURROUNDING)
def log_softmax_backward_by_type(grad, log_y, axis=-1, temperature=1.0, out=None):
    check_log_softmax(grad, log_y, axis, temperature, out)
    return lambda grad, log_y, axis=-1, temperature=1.0, out=None: log_softmax_gradient(
        grad, log_y, axis, temperature, out
    )


def check_reduced(values, name, x, axis):
    ndim = 0 if is_none(axis) else x.ndim - 1
    is_right = isinstance(values, Array) and values.ndim == ndim and isinstance(values.dtype, Float)
    if not is_right and not (ndim == 0 and isinstance(values, (Float, Integer))):
        raise TypingError(f"{name} is {values}, but must be what logsumexp returns for x, {x}")


@overload(logsumexp_backward, jit_options=SURROUNDING)
def logsumexp_backward_by_type(grad, x, lse, axis=-1, temperature=1.0, out=None):
    check_array(x, "x")
    check_reduced(grad, "grad", x, axis)
    check_reduced(lse, "lse", x, axis)
    check_options(axis, temperature)
    check_output(out, x)

    def compiled(grad, x, lse, axis=-1, temperature=1.0, out=None):
        outer, n, inner = extents(x.shape, axis)
        check_reduced_shape(grad, x, axis)
        check_reduced_shape(lse, x, axis)
        t = checked(temperature, x)
        check_given(out, x)
        check_apart(out, x)
        dx = room_for(x, out)
        if x.size > 0:
            rows = rows_of(x, outer, n, inner)
            g, s = numbers(grad, outer * inner, t), numbers(lse, outer * inner, x)
            high, low = scale(t, rows)
            result = dx.reshape((outer, n)) if inner == 1 else np.empty(rows.shape, dx.dtype)
            logsumexp_cpu.backward(to_read(g), to_read(rows), to_read(s), high, low, t, to_write(result))
            put_back(result, outer, n, inner, dx)
        return finished(dx, out)

    return compiled


def check_reduced_shape(values, x, axis):
    """That there is a number for each row."""


@overload(check_reduced_shape, jit_options=SURROUNDING)
def check_reduced_shape_by_type(values, x, axis):
    return are_reduced if isinstance(values, Array) and values.ndim > 0 else lambda values, x, axis: None


def are_reduced(values, x, axis):
    if values.shape != without(x.shape, axis):
        raise ValueError("grad and lse must have the shape of x without the axis")
