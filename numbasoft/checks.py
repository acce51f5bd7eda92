"""What an argument must satisfy; every error of the package is worded here."""

import math
import numbers

import numpy as np
from numpy.exceptions import AxisError

SUPPORTED = "float16, bfloat16, float32, float64, bool and integers"
FLOATS = {
    np.dtype(np.float16),
    np.dtype(np.float32),
    np.dtype(np.float64),
}  # in the byte order of the machine

# A temperature beyond these has no 1 / T * log2(e) in float64.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-290, 1e290
TEMPERATURES = f"a positive finite number from {SMALLEST_TEMPERATURE} to {LARGEST_TEMPERATURE}"


def array(value, name):
    """The argument as a plain array; lists and scalars are taken as NumPy takes them."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, but must be a plain one: what its filled() gives, or its data, with where=~mask where a function takes that"
        )
    if hasattr(value, "__cuda_array_interface__") or hasattr(value, "__cuda_ndarray__"):
        raise TypeError(
            f"{name} is an array on a CUDA device, but this function takes arrays on the CPU only: pass a copy "
            "on the CPU (of CuPy's by get(), of PyTorch's by cpu(), of Numba's by copy_to_host())"
        )
    try:
        result = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name} cannot be made an array: {error}") from None
    return result


def result_dtype(dtype, name):
    """The dtype of a result for an argument of this dtype: floats keep theirs, integers become float64."""
    if dtype in FLOATS:
        return dtype
    if (dtype.kind == "f" and dtype.itemsize <= 8) or is_bfloat16(dtype):
        return dtype.newbyteorder("=")
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    loaded = "; bfloat16 from a .npy file needs .view(ml_dtypes.bfloat16)" if dtype.str == "|V2" else ""
    raise TypeError(f"{name} has dtype {dtype}, but must have one of {SUPPORTED}{loaded}")


def is_bfloat16(dtype):
    return dtype.kind == "V" and dtype.name == "bfloat16"


def axes(axis, ndim):
    """The axes to reduce, in ascending order and not negative; None means all of them."""
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    result = []
    for a in given:
        if isinstance(a, (bool, np.bool_)):
            raise TypeError(f"axis is {axis!r}, but must be an int, a tuple of ints or None")
        try:
            a = a.__index__()
        except (AttributeError, TypeError):
            raise TypeError(f"axis is {axis!r}, but must be an int, a tuple of ints or None") from None
        if not -ndim <= a < ndim:
            if ndim == 0 and a in (-1, 0):
                continue
            raise AxisError(a, ndim, "axis")
        result.append(a % ndim)
    if len(set(result)) != len(result):
        raise ValueError(f"axis is {axis!r}, but no axis may be given twice")
    return tuple(sorted(result))


def temperature(value):
    """The temperature as a float."""
    if type(value) is float and SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.ndarray):
        raise TypeError(f"temperature is an array of shape {value.shape}, but must be one number")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating)):
        raise TypeError(f"temperature is {value!r}, but must be {TEMPERATURES}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isnan(number) or not SMALLEST_TEMPERATURE <= number <= LARGEST_TEMPERATURE:
        shown = value if len(repr(value)) < 60 else f"{number}, as a float"
        raise ValueError(f"temperature is {shown!r}, but must be {TEMPERATURES}")
    return number


def mask(where, shape):
    """``where`` as bytes, broadcast to the shape of x."""
    if type(where) is np.ndarray and where.shape == shape and where.dtype == np.bool_:
        return where.view(np.uint8)
    if isinstance(where, np.ma.MaskedArray):
        raise TypeError("where is a masked array, but must be an array of bool")
    result = np.asarray(where)
    if result.dtype != np.bool_:
        raise TypeError(f"where has dtype {result.dtype}, but must have dtype bool")
    try:
        return np.broadcast_to(result, shape).view(np.uint8)
    except ValueError:
        raise ValueError(f"where has shape {result.shape}, which does not broadcast to x's {shape}") from None


def same_shape(value, name, other, other_name):
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {value.shape}, but must have the shape {other.shape} of {other_name}"
        )


def same_dtype(value, name, other, other_name):
    if value.dtype.newbyteorder("=") != other.dtype.newbyteorder("="):
        raise TypeError(
            f"{name} has dtype {value.dtype}, but must have the dtype {other.dtype} of {other_name}"
        )


def reduced_shape(value, name, shape, axes):
    """``value`` reshaped to the shape without the reduced axes; it may keep them with length 1."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    dropped = tuple(n for i, n in enumerate(shape) if i not in axes)
    if value.shape not in (kept, dropped):
        raise ValueError(f"{name} has shape {value.shape}, but must have shape {dropped} or {kept}")
    return value.reshape(dropped)


def out(value, shape, dtype, inputs):
    """An output given by the caller: its type, shape, dtype, and that it shares no memory it must not."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"out is a {type(value).__name__}, but must be a numpy array")
    if value.shape != shape:
        raise ValueError(f"out has shape {value.shape}, but must have shape {shape}")
    if value.dtype != dtype:
        raise TypeError(f"out has dtype {value.dtype}, but must have dtype {dtype}")
    if not value.flags.writeable:
        raise ValueError("out is read-only, but must be writeable")
    if overlaps_itself(value):
        raise ValueError(f"out has strides {value.strides}, but no two of its elements may share memory")
    for name, array in inputs:
        if shares_part(array, value):
            raise ValueError(
                f"out overlaps {name}, but must be the same array in the same layout, or share no memory"
            )


def overlaps_itself(value):
    """Whether two elements of an array may share memory (for sure not, when False)."""
    extent = value.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(value.strides, value.shape, strict=True) if n > 1):
        if stride < extent:
            return value.size > 0
        extent = stride * (n - 1) + extent
    return False


def shares_part(array, value):
    """Whether an input shares memory with an output without being the same array."""
    if not np.may_share_memory(array, value):
        return False
    a, b = array.__array_interface__, value.__array_interface__
    same_layout = array.shape == value.shape and array.dtype == value.dtype
    same_layout = same_layout and all(
        n == 1 or s == t for n, s, t in zip(value.shape, array.strides, value.strides, strict=True)
    )
    if a["data"][0] == b["data"][0] and same_layout:
        return False
    try:
        return bool(np.shares_memory(array, value, max_work=10_000))
    except np.exceptions.TooHardError:
        return True


def real(value, name, accepted):
    """One real number as a float; ``accepted`` says in words what is."""
    if type(value) is float:  # an abstract class takes a microsecond to ask
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating)):
        raise TypeError(f"{name} is {shown(value)}, but must be {accepted}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value):
    """A value in an error: what it is, but no page of it."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    text = repr(value)
    return text if len(text) < 60 and "\n" not in text else f"something long of type {type(value).__name__}"


def between(value, name, low, high):
    """A real number from low to high."""
    accepted = f"a number from {low} to {high}"
    number = real(value, name, accepted)
    if not low <= number <= high:
        raise ValueError(f"{name} is {shown(value)}, but must be {accepted}")
    return number


def not_negative(value, name):
    """A real number that is finite and not negative."""
    accepted = "a finite number that is not negative"
    number = real(value, name, accepted)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {shown(value)}, but must be {accepted}")
    return number


def integer(value, name):
    """An int, of Python or NumPy; no bool."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {shown(value)}, but must be an int")
    return int(value)


def one_of(value, name, allowed):
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is {shown(value)}, but must be {words}")
    return value


REDUCTIONS = ("none", "mean", "sum")


def reduction(value):
    """What becomes of the losses of all rows or elements."""
    return one_of(value, "reduction", REDUCTIONS)


def upstream(grad, reduction, shape, axis=None):
    """The gradient with respect to a loss in float64: one number, or for "none" one per loss.

    The losses have this shape; the gradient may keep the axis that they lack with length 1.
    """
    g = array(grad, "grad")
    result_dtype(g.dtype, "grad")
    upstream_shape(g.shape, reduction, shape, axis)
    return g.astype(np.float64).reshape(shape if reduction == "none" else ())


def upstream_shape(given, reduction, shape, axis=None):
    """As ``upstream``, of the gradient's shape alone."""
    if reduction != "none" and given:
        raise ValueError(f"grad has shape {given}, but must be one number for reduction {reduction!r}")
    kept = shape if axis is None else (*shape[:axis], 1, *shape[axis:])
    if reduction == "none" and given not in (shape, kept):
        raise ValueError(f"grad has shape {given}, but must have shape {shape} for reduction 'none'")


def class_axis(axis, shape, name):
    """The one axis that the classes of an array lie along, not negative; there is at least one class."""
    if axis is None or isinstance(axis, tuple):
        raise TypeError(f"axis is {axis!r}, but must be one int: the axis of the classes")
    if not shape:
        raise ValueError(f"{name} is a single number, but must have an axis of classes")
    (result,) = axes(axis, len(shape))
    if shape[result] == 0:
        raise ValueError(f"{name} has shape {shape}, but must have at least one class along axis {result}")
    return result


def class_weight(value, classes):
    """One weight per class as float64, or None."""
    if value is None:
        return None
    weight = array(value, "weight")
    result_dtype(weight.dtype, "weight")
    weight_shape(weight.shape, classes)
    weight = weight.astype(np.float64)
    bad = np.flatnonzero(~((weight >= 0) & (weight < np.inf)))
    if bad.size:
        raise ValueError(f"weight is {weight[bad[0]]} at {bad[0]}, but must be finite and not negative")
    return weight


def weight_shape(shape, classes):
    if shape != (classes,):
        raise ValueError(f"weight has shape {shape}, but must have shape ({classes},): one per class")


def class_target(given, shape, dtype, name):
    """Class indices have a shape and a dtype (by name) for one of them per row."""
    if not str(dtype).startswith(("int", "uint")):
        raise TypeError(f"{name} has dtype {dtype}, but must hold integers: class indices")
    if given != shape:
        hint = " (probabilities of classes must be floats)" if len(given) == len(shape) + 1 else ""
        raise ValueError(
            f"{name} has shape {given}, but must have shape {shape}, that of the logits without their classes{hint}"
        )


def class_indices(target, shape, name, classes, ignore_index, ignored):
    """Class indices as contiguous int64, one per row, and ``ignored`` where they equal ignore_index.

    ``shape`` is the logits' without the classes. ``ignore_index`` None: nothing is ignored.
    """
    if target.shape != shape or target.dtype.kind not in "iu":  # to ask by name takes 5 us
        class_target(target.shape, shape, target.dtype.newbyteorder("="), name)
    rows = np.ascontiguousarray(target).reshape(-1)
    if rows.size == 0:
        return np.empty(0, np.int64), False
    if (
        0 <= np.minimum.reduce(rows)
        and np.maximum.reduce(rows) < classes
        and not (ignore_index is not None and ignore_index >= 0)
    ):
        return rows.astype(np.int64, copy=False), False
    left_out = np.zeros(rows.shape, bool) if ignore_index is None else rows == ignore_index
    bad = np.flatnonzero(~(((rows >= 0) & (rows < classes)) | left_out))
    if bad.size:
        raise ValueError(no_class(rows[bad[0]], bad[0], shape, name, classes, ignore_index))
    result = rows.astype(np.int64)
    result[left_out] = ignored
    return result, bool(left_out.any())


def no_class(value, row, shape, name, classes, ignore_index):
    """What to say of the class of a row that there is not."""
    at = tuple(map(int, np.unravel_index(row, shape)))
    where = f" at {at if len(at) > 1 else at[0]}" if at else ""
    besides = "" if ignore_index is None else f", or ignore_index={ignore_index}"
    return f"{name} is {value}{where}, but must be from 0 to {classes - 1}{besides}"


def some_count(classes, shape, name):
    """At least one row is not ignored; its class is not negative."""
    if not (classes >= 0).any():
        raise ValueError(f"{name} has shape {shape}, but none of its rows counts: no temperature fits best")


def sum_tolerance(dtype):
    """How far the sum of probabilities may be from 1: by rounding to the dtype (by name), and others' errors."""
    return {"bfloat16": 2.0**-5, "float16": 2.0**-8}.get(dtype, 2.0**-10)


def distributions(least, sums, name, shape, dtype):
    """Refuse probabilities of which an element is negative, or a row does not sum to 1."""
    tolerance = sum_tolerance(dtype.name)
    are_good = (least >= 0) & (np.abs(sums - 1) <= tolerance)
    if are_good.all():
        return
    bad = np.flatnonzero(~are_good)
    i = bad[0]
    at = tuple(map(int, np.unravel_index(i, shape)))
    row = f" in row {at if len(at) > 1 else at[0]}" if at else ""
    if least[i] < 0:
        raise ValueError(f"{name} holds {least[i]:.6g}{row}, but probabilities must not be negative")
    raise ValueError(f"{name} sums to {sums[i]:.6g}{row}, but must sum to 1 within {tolerance}")


def apart(value, inputs):
    """An output given by the caller shares no memory with these inputs."""
    for name, given in inputs:
        if given is not None and value.size and np.may_share_memory(value, given):
            raise ValueError(f"out shares memory with {name}, but must not")


def probability(value, name):
    """Every element of an array is from 0 to 1."""
    if value.size and not (value.min() >= 0 and value.max() <= 1):
        inside = (value >= 0) & (value <= 1)
        first = int(np.flatnonzero(~inside)[0])
        at = tuple(map(int, np.unravel_index(first, value.shape)))
        where = f" at {at if len(at) > 1 else at[0]}" if at else ""
        raise ValueError(f"{name} is {value[at]}{where}, but must be from 0 to 1")
