"""How arrays of any layout reach kernels that take rows.

Kernels work on 2-D arrays whose rows are contiguous along the reduced axes. Where an
array can be viewed so, it is. Rows along another axis have kernels of their own where they
lie side by side (see numbasoft.columns). Else (byte order, alignment, dtype, a mask, few or
long rows) blocks of rows are copied into a small buffer, done there and copied back: a
second pass over data that is in the cache, and no temporary of the input's size. Little,
up to ``LITTLE`` elements, is one such block whatever its layout, copied by NumPy.
"""

import math
from functools import cache
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy import ndarray
from numpy.typing import NDArray

from . import checks, transpose
from .launch import PARALLEL, are_many, computing_dtype, fill_vectors
from .vector.types import WIDEST

Array: TypeAlias = NDArray[Any]
Axis: TypeAlias = int | tuple[int, ...] | None

# Elements of a block. 2 MiB of float32 leave the second cache, but smaller blocks cut an array along another
# axis into pieces of few cache lines: a quarter as many measured 15 % slower.
BLOCK = 1 << 19
# Elements that one kernel call does at most, so that Ctrl-C is seen in between.
CALL = 1 << 26

# No more elements than this are copied to rows and back by NumPy: anything better costs more to set up.
LITTLE = 1 << 11

# Longer rows are added up in segments (see numbasoft.passes), which no kernel for columns does.
LONGEST_COLUMN = 1 << 14

BOOL, FLOAT32, FLOAT64 = np.dtype(np.bool_), np.dtype(np.float32), np.dtype(np.float64)
LAST = -1  # the default of axis


def plain_rows(x, axis):
    """The rows of x if they lie one behind the other along its last axis: the common case, told in 0.2 us. Else None."""
    if type(x) is not ndarray or not x.flags.carray:
        return None
    ndim = x.ndim
    if axis is LAST or (type(axis) is int and (axis == LAST or axis == ndim - 1)):
        if ndim == 2:
            return x
        return x.reshape(-1, x.shape[-1]) if ndim and x.size else None
    return x.reshape(1, -1) if axis is None else None


def plain_result(kernel, x, axis, temperature, where, out):
    """The result for plain rows, in 16 bits too and with a plain mask; None where they take the general path.

    ``kernel`` makes, of dtype, temperature, whether there is a mask and whether rows are few, a function of rows, the mask's
    bytes and the result, or None.
    """
    if type(temperature) is not float:
        return None
    rows, mask = plain_rows(x, axis), None
    is_few = rows is not None and 0 < rows.size < PARALLEL
    if not is_few and (rows is None or not are_many(rows)):
        return None
    if where is None and rows.size > LITTLE and rows.shape[1] <= WIDEST:
        return None
    if not takes_result(out, x):
        return None
    if where is not None:
        if type(where) is not ndarray or where.dtype is not BOOL or where.shape != x.shape:
            return None
        if not where.flags.c_contiguous or (out is not None and np.may_share_memory(out, where)):
            return None
        mask = where.view(np.uint8).reshape(rows.shape)
    run = kernel(x.dtype, temperature, mask is not None, is_few)
    if run is None:
        return None
    y = np.empty_like(x) if out is None else out
    run(rows, mask, y)
    return y


def is_computed(dtype, temperature):
    """Whether there are kernels for arrays of this dtype at this temperature, which may be any float."""
    is_allowed = checks.SMALLEST_TEMPERATURE <= temperature <= checks.LARGEST_TEMPERATURE
    is_float = dtype in checks.FLOATS or checks.is_bfloat16(dtype)
    return is_allowed and is_float and computing_dtype(dtype, temperature) == dtype


def is_plainly_computed(dtype, temperature):
    """As ``is_computed``, by kernels that take the arrays as they are, not as integers."""
    return dtype in (FLOAT32, FLOAT64) and is_computed(dtype, temperature)


def simplified(x, temperature, out):
    """A short way's arguments instead of these, of little that is no array of floats, or a temperature that is no float; or None."""
    array = checks.array(x, "x") if type(x) in (list, tuple, float, int) else x
    if type(array) is not ndarray:
        return None
    if out is None and array.dtype.kind in "biu" and array.size <= LITTLE:
        array = array.astype(np.float64)
    number = temperature if type(temperature) is float else checks.temperature(temperature)
    return None if array is x and number is temperature else (array, number)


def takes_result(out, x):
    """Whether a call of which x is plain may write to ``out``, if there is one: of the shape of x, and apart from it."""
    if out is None or out is x:
        return True
    if type(out) is not ndarray or out.dtype is not x.dtype or out.shape != x.shape:
        return False
    flags = out.flags
    if not flags.carray:
        return False
    if flags.owndata and x.flags.owndata:  # told in a third of the time of may_share_memory
        return True
    return are_of_two_owners(x, out) or not np.may_share_memory(out, x)


def are_of_two_owners(a, b):
    """Whether two arrays are views of different ones, and so apart: most are, and it takes half the time to tell."""
    owner, other = a.base, b.base
    owner, other = a if owner is None else owner, b if other is None else other
    if type(owner) is not ndarray or type(other) is not ndarray or owner is other:
        return False
    return owner.flags.owndata and other.flags.owndata


def plain_pair(a, b, axis, out):
    """``plain_rows`` of two inputs of the same shape and dtype, of which ``out`` may be the result, or None twice."""
    rows = plain_rows(a, axis)
    if (
        rows is None
        or type(b) is not ndarray
        or b.shape != a.shape
        or b.dtype is not a.dtype
        or not b.flags.carray
    ):
        return None, None
    if out is not None and not (takes_result(out, a) and takes_result(out, b)):
        return None, None
    return rows, b if rows is a else b.reshape(rows.shape)


def on_device(stream, **given):
    """Whether the arrays of a call are on a CUDA device: all of them or none."""
    if stream is None:
        for value in given.values():
            if value is not None and type(value) is not ndarray:
                break
        else:
            return False
    homes = {name: lives_on_device(value) for name, value in given.items() if value is not None}
    if homes and all(homes.values()):
        return True
    if not any(homes.values()):
        if stream is not None:
            raise TypeError(f"stream is {stream!r}, but {next(iter(homes))} is not on a CUDA device")
        return False
    there, here = (next(name for name, is_there in homes.items() if is_there is b) for b in (True, False))
    raise TypeError(f"{there} is on a CUDA device and {here} is not, but all arrays must be in one place")


CUDA_DEVICES = 2, 13  # as DLPack numbers them: device memory and managed memory


def lives_on_device(value):
    """Whether an argument is an array on a CUDA device; nothing of it is copied to find out."""
    if isinstance(value, (ndarray, np.generic, float, int, list, tuple)):
        return False
    if getattr(value, "__cuda_ndarray__", False):  # Numba's, and its simulator's
        return True
    if getattr(value, "is_cuda", False) is True:  # PyTorch's, in a tenth of the time of what follows
        return True
    if hasattr(value, "__dlpack_device__"):  # a tensor that requires grad has no interface to look at
        return value.__dlpack_device__()[0] in CUDA_DEVICES
    return hasattr(value, "__cuda_array_interface__")


def device_calls():
    """``numbasoft.cuda.calls``, where there is a device to call."""
    require, calls = device_modules()
    require()
    return calls


@cache
def device_modules():
    from . import cuda

    cuda.require()
    from .cuda import calls

    return cuda.require, calls


def kernel_view(array):
    """An array as kernels take it: 16-bit floats as integers (see numbasoft.vector)."""
    if array.dtype.itemsize == 2 and array.dtype.kind != "u" and array.dtype.kind != "i":
        return array.view(np.int16 if array.dtype.kind == "f" else np.uint16)
    return array


def as_rows(array, axes):
    """The (rows, n) view of an array, or None if there is no such view with contiguous rows."""
    if not array.dtype.isnative or not array.flags.aligned:
        return None
    if axes and axes[0] == array.ndim - len(axes) and array.size and array.flags.c_contiguous:
        return array if array.ndim == 2 > len(axes) else array.reshape(-1, math.prod(array.shape[axes[0] :]))
    if 0 < array.size <= LITTLE:  # to find out whether there is one takes as long as a copy
        return None
    if array.size and axes and array.shape[axes[-1]] > 1 and array.strides[axes[-1]] != array.itemsize:
        return None
    n = math.prod(array.shape[a] for a in axes)
    moved = array if axes == trailing(array.ndim, len(axes)) else last(array, axes)
    rows = array.size // n if n else math.prod(s for i, s in enumerate(array.shape) if i not in axes)
    try:
        view = moved.reshape((rows, n), copy=False)
    except ValueError:
        return None
    if n > 1 and view.strides[1] != view.itemsize:
        return None
    return view


def columns_order(array, axes):
    """The axes before and behind ``axes`` in memory, if they can be told apart and there are any behind; or None."""
    if len(axes) == 1 and axes[0] < array.ndim - 1 and array.flags.c_contiguous:
        return range(axes[0]), range(axes[0] + 1, array.ndim)
    step = min([abs(array.strides[a]) for a in axes], default=0)
    others = [i for i in range(array.ndim) if i not in axes]
    behind = [i for i in others if abs(array.strides[i]) < step]
    before = others[: len(others) - len(behind)]
    return (before, behind) if behind and before + behind == others else None


def as_columns(array, order, shape):
    """The (outer, n, inner) view of an array, or None if there is no such view with inner contiguous."""
    if not array.dtype.isnative or not array.flags.aligned:
        return None
    try:
        view = array.transpose(order).reshape(shape, copy=False)
    except ValueError:
        return None
    return view if view.strides[2] == view.itemsize else None


def trailing(ndim, count):
    return tuple(range(ndim - count, ndim))


def last(array, axes):
    """A view with the reduced axes last, the others in their order."""
    others = tuple(i for i in range(array.ndim) if i not in axes)
    return array.transpose(others + axes)


def over_rows(run, full, reduced, axes, dtype, along_columns=None):
    """Call ``run`` on 2-D blocks of rows that together make up the arrays.

    ``full`` are arrays of the input's shape, the last of them written unless it is None;
    None stands for an argument that is not there. ``reduced`` are contiguous 1-D arrays
    with one element per row. ``run(full_blocks, reduced_blocks)`` gets (rows, n) arrays of
    ``dtype`` (a mask: bytes).
    """
    full = [a if a is None or type(a) is ndarray else a.view(ndarray) for a in full]
    views = [None if a is None else rows_for_kernels(a, axes, dtype, i > 0) for i, a in enumerate(full)]
    are_rows = [a is None or view is not None for a, view in zip(full, views, strict=True)]
    if all(are_rows):
        rows, n = views[0].shape
        step = max(1, CALL // max(1, n))
        if step >= rows:
            run(views, reduced)
            return
        for start in range(0, rows, step):
            part = slice(start, start + step)
            run([None if v is None else v[part] for v in views], [r[part] for r in reduced])
    elif full[0].size <= LITTLE:
        at_once(run, full, reduced, axes, dtype)
    elif along_columns is None or not over_columns(along_columns, run, full, reduced, axes, dtype):
        stage(run, full, views, reduced, axes, dtype)


def rows_for_kernels(array, axes, dtype, may_be_mask):
    """The rows of an array as kernels for ``dtype`` take them, or None."""
    if array.dtype != dtype and not (may_be_mask and array.dtype == np.uint8):
        return None
    view = as_rows(array, axes)
    return None if view is None else kernel_view(view)


def over_columns(along_columns, run, full, reduced, axes, dtype):
    """Call ``along_columns`` on (outer, n, inner) views of the arrays if there are any; whether it was called.

    ``reduced`` are then (outer, inner). What it returns are tiles that it has left to ``run``, for ``done_as_rows``.
    """
    like = full[0]
    order = columns_order(like, axes)
    if order is None:
        return False
    outer, n, inner = shape = [
        math.prod([like.shape[a] for a in part]) for part in (order[0], axes, order[1])
    ]
    views = []
    for array in full:
        if array is not None and array.dtype != dtype:
            return False
        view = None if array is None else as_columns(array, (*order[0], *axes, *order[1]), shape)
        if view is None and array is not None:
            return False
        views.append(None if view is None else kernel_view(view))
    if n > LONGEST_COLUMN or not fill_vectors(inner, dtype):
        return False
    reduced = [r.reshape((outer, inner)) for r in reduced]
    high, wide = max(1, CALL // (n * inner)), max(1, CALL // n)
    for i in range(0, outer, high):
        for k in range(0, inner, wide):
            part = slice(i, i + high), slice(None), slice(k, k + wide)
            some = [None if v is None else v[part] for v in views]
            left = along_columns(some, [r[part[0], part[2]] for r in reduced])
            if left is not None:
                done_as_rows(run, some, *left)
    return True


def done_as_rows(run, full, places, starts, wide):
    """Call ``run`` on some rows of (outer, n, inner) arrays, of which the last is written.

    They are those from ``starts`` along inner on, as many as ``wide`` says or there are, at ``places`` along outer.
    Together they are copied to rows and back: there may be as many starts as rows, each with a few elements.
    """
    moved = [v.swapaxes(1, 2) for v in full]
    _, inner, n = moved[0].shape
    step = max(1, BLOCK // (n * min(wide, inner)))
    for first in range(0, len(places), step):
        k = starts[first : first + step, None] + np.arange(min(wide, inner))
        i = np.broadcast_to(places[first : first + step, None], k.shape)
        index = i[k < inner], k[k < inner]
        rows = [np.ascontiguousarray(v[index]) for v in moved[:-1]]
        run([*rows, rows[0]], [])
        moved[-1][index] = rows[0]


def at_once(run, full, reduced, axes, dtype):
    """``over_rows`` for little: copied to rows and back as a whole."""
    order = *[i for i in range(full[0].ndim) if i not in axes], *axes
    n = math.prod([full[0].shape[a] for a in axes])
    rows: list[Any] = []
    for array in full[:-1]:
        copy = None
        if array is not None:
            kind = np.uint8 if rows and array.dtype == np.uint8 else dtype
            copy = kernel_view(array.transpose(order).astype(kind, order="C").reshape(-1, n))
        rows.append(copy)
    output, first = full[-1], rows[0]
    run([*rows, None if output is None else first], reduced)
    if output is not None:
        output = output.transpose(order)
        transpose.assign(output, first.view(dtype).reshape(output.shape))


def stage(run, full, views, reduced, axes, dtype):
    """``over_rows`` by way of buffers, for the arrays that have no view as rows: a mask may be the only one."""
    moved = [None if a is None else last(a, axes) for a in full]
    shape = next(a.shape for a in moved if a is not None)
    outer, inner = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
    n = math.prod(inner)
    most = max(1, min(math.prod(outer), BLOCK // max(1, n)))
    buffers: list[Any] = [None] * len(full)
    for i, (a, view) in enumerate(zip(moved, views, strict=True)):
        if a is not None and view is None:
            kind = np.dtype(np.uint8) if i > 0 and a.dtype == np.uint8 else dtype
            is_in_place = i == len(full) - 1 and buffers[0] is not None
            buffers[i] = buffers[0] if is_in_place else buffer(most, n, kind)
    done = 0
    for index in blocks(outer, most):
        rows = math.prod(part_shape(outer, index))
        work = []
        for i, (a, b) in enumerate(zip(moved, buffers, strict=True)):
            if b is None:
                work.append(None if a is None else views[i][done : done + rows])
                continue
            if i < len(full) - 1:
                part = a[(*index, ...)]
                transpose.copy(b[:rows].reshape(part.shape), part)
            work.append(kernel_view(b[:rows]))
        run(work, [r[done : done + rows] for r in reduced])
        if buffers[-1] is not None:
            part = moved[-1][(*index, ...)]
            transpose.copy(part, buffers[-1][:rows].reshape(part.shape))
        done += rows


def buffer(rows, n, dtype):
    """A buffer of rows whose distance is no power of two: such rows would share a few cache lines."""
    return np.empty((rows, n + 32), dtype)[:, :n] if n >= 256 else np.empty((rows, n), dtype)


def part_shape(outer, index):
    return [len(range(*i.indices(n))) for i, n in zip(index, outer, strict=True)]


def blocks(outer, most):
    """Indices that cut the leading axes into parts of at most ``most`` rows, in order."""
    split = len(outer)
    size = 1
    while split and size * outer[split - 1] <= most:
        split -= 1
        size *= outer[split]
    whole = (slice(None),) * (len(outer) - split)
    if split == 0:
        yield whole
        return
    step = max(1, most // max(1, size))
    leading = [range(n) for n in outer[: split - 1]]
    for fixed in product(*leading):
        for start in range(0, outer[split - 1], step):
            yield (*(slice(i, i + 1) for i in fixed), slice(start, start + step), *whole)
