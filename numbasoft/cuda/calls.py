"""Calls on device arrays: checks, layouts, results, and which kernels are launched.

What a call launches depends on dtypes, shapes, strides and options, not on addresses: it
is worked out once and kept, so that a repeated call costs little more than the launches.
Nothing here waits for the device or copies to the host.
"""

import math
import threading
from functools import cache, lru_cache, partial
from numbers import Real
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .. import checks, elementary
from . import arrays, copies, geometry, layout, split
from .arrays import describe
from .jit import SIMULATED, cuda, kernel

# log2(e) / T and 1 / T are float32 numbers for these temperatures.
SMALLEST, LARGEST = 1e-30, 1e30
MOST_BLOCKS = 2**31 - 1


class Step(NamedTuple):
    """A kernel with its launch configuration and its arguments; those that are ``Slot`` are filled in."""

    launch: Any
    arguments: tuple
    slots: tuple  # (place among the arguments, index of the array whose address goes there, bytes to add)


class Slot(NamedTuple):
    index: int
    offset: int = 0


class Prepared(NamedTuple):
    steps: tuple
    cells: int  # int64 of working memory


@cache
def compiled(factory, options, threads, ordinal):
    """A kernel, compiled for a device."""
    return kernel(*factory(*options), threads, options)


def step(ordinal, handle, factory, options, blocks, threads, most_threads, *arguments, shared=0):
    """The launch of a kernel, on a device and a stream; ``shared`` are bytes of memory for each block."""
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"x has so many rows that {blocks} thread blocks were needed; a GPU has {MOST_BLOCKS}"
        )
    launch = compiled(factory, options, most_threads, ordinal)
    stream = arrays.numba_stream(handle, ordinal)
    slots = tuple((i, *a) for i, a in enumerate(arguments) if isinstance(a, Slot))
    plain = [0 if isinstance(a, Slot) else a for a in arguments]
    return Step(launch[blocks, threads, stream, shared], launch.typed(plain), slots)


def run(prepared, addresses, work):
    """Launch all steps; ``addresses`` are those of the arrays, ``work()`` gives that of working memory."""
    if prepared.cells:
        addresses = (*addresses, work(prepared.cells))
    for launch, arguments, slots in prepared.steps:
        filled = list(arguments)
        for place, index, offset in slots:
            filled[place] = addresses[index] + offset
        launch(*filled)


# What is launched.


@cache
def room_of(ordinal):
    """What the current device has for rows that stay in shared memory; in the simulator nothing, unless a test does."""
    if SIMULATED:
        return geometry.Room(multiprocessors=1, most=0, together=0)
    device = cuda.current_context().device
    half = device.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR // 2 - device.RESERVED_SHARED_MEMORY_PER_BLOCK
    most = device.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return geometry.Room(device.MULTIPROCESSOR_COUNT, most, min(half, most))


def resident_launch(ordinal, rows, n, storage, aligned, in_pairs=False):
    """How to keep rows in shared memory; None where they do not fit, or are too few to fill the device.

    Few rows are done in segments, by more blocks, and stay in the L2 cache between the kernels.
    """
    room = room_of(ordinal)
    how = geometry.resident_launch(n, storage, aligned, room, in_pairs)
    return how if how and rows >= room.multiprocessors else None


@lru_cache(maxsize=4096)
def forward_steps(operation, storage, temperature, masked, where_from, aligned, ordinal, handle):
    """``where_from`` is a layout of x, of the mask if there is one, and of the result."""
    numbers = elementary.scale(temperature, storage == "f8")
    if operation.others:
        numbers += elementary.inverse(temperature, storage == "f8")
    x, mask, y, work = Slot(0), Slot(1) if masked else 0, Slot(1 + masked), Slot(2 + masked)

    one = partial(step, ordinal, handle)

    if isinstance(where_from, layout.Columns):
        outer, n, inner, strides = where_from
        of_mask = strides[1] if masked else (0, 0, 0)
        of_y = (strides[-1][0], strides[-1][2]) if operation.reduced else strides[-1]
        blocks, threads = geometry.column_blocks(outer, inner), geometry.column_threads(n)
        arguments = x, *strides[0], mask, *of_mask, n, inner, *numbers, y, *of_y
        most = geometry.column_bounds(storage, heavy=False, masked=masked)
        return Prepared((one(operation.columns, (storage, masked), blocks, threads, most, *arguments),), 0)

    rows, n, pitches, steps = where_from
    of_mask = (mask, pitches[1], steps[1]) if masked else (0, 0, 0)
    source, result = (x, pitches[0], *of_mask), (y, pitches[-1])
    how = geometry.rows_launch(n, storage, aligned, in_pairs=masked)
    if how:
        options = (storage, how.vectors, aligned, masked)
        arguments = *source, rows, n, how.team, *numbers, *result
        blocks, most = how.blocks(rows), geometry.row_bounds(how.vectors, storage, masked)
        return Prepared((one(operation.rows, options, blocks, how.threads, most, *arguments),), 0)

    how = resident_launch(ordinal, rows, n, storage, aligned)
    if how:
        options, arguments = (storage, aligned, masked), (*source, n, how.slots, *numbers, *result)
        launched = operation.resident, options, rows, how.threads, geometry.RESIDENT_BOUNDS
        return Prepared((one(*launched, *arguments, shared=how.shared),), 0)

    segments, threads = geometry.segments_of(n, storage), geometry.SEGMENT_THREADS
    blocks = rows * segments
    first = one(split.maxima, (storage, masked), blocks, threads, threads, *source, n, segments, work)
    options = (storage, masked, operation.others)
    arguments = *source, n, segments, *numbers[:2], work
    most = geometry.sum_bounds(storage, masked, operation.others)
    second = one(split.sums, options, blocks, threads, most, *arguments)
    if operation.reduced:
        arguments = segments, *numbers, work, *result
        third = one(operation.last, (storage,), rows, threads, threads, *arguments)
    else:
        arguments = *source, n, segments, *numbers, work, *result
        third = one(operation.last, (storage, masked), blocks, threads, threads, *arguments)
    return Prepared((first, second, third), blocks * split.FIELDS)


@lru_cache(maxsize=4096)
def backward_steps(operation, storage, temperature, where_from, aligned, ordinal, handle):
    """``where_from`` is a layout of g, of y and of the result."""
    g, y, dx, work = map(Slot, range(4))
    numbers = (1 / temperature,)
    if not operation.product:
        numbers = (*elementary.scale(1.0, storage == "f8"), 1 / temperature)

    one = partial(step, ordinal, handle)

    if isinstance(where_from, layout.Columns):
        outer, n, inner, (of_g, of_y, of_dx) = where_from
        blocks, threads = geometry.column_blocks(outer, inner), geometry.column_threads(n)
        arguments = g, *of_g, y, *of_y, n, inner, *numbers, dx, *of_dx
        most = geometry.column_bounds(storage, heavy=True)
        return Prepared((one(operation.columns, (storage,), blocks, threads, most, *arguments),), 0)

    rows, n, pitches, _ = where_from
    source, result = (g, pitches[0], y, pitches[1]), (dx, pitches[2])
    how = geometry.rows_launch(n, storage, aligned, in_pairs=True)
    if how:
        arguments = *source, rows, n, how.team, *numbers, *result
        blocks, most = how.blocks(rows), geometry.most_threads(how.vectors, storage, in_pairs=True)
        options = (storage, how.vectors, aligned)
        return Prepared((one(operation.rows, options, blocks, how.threads, most, *arguments),), 0)

    how = resident_launch(ordinal, rows, n, storage, aligned, in_pairs=True)
    if how:
        arguments = *source, n, how.slots, *numbers, *result
        launched = operation.resident, (storage, aligned), rows, how.threads, geometry.RESIDENT_BOUNDS
        return Prepared((one(*launched, *arguments, shared=how.shared),), 0)

    segments, threads = geometry.segments_of(n, storage), geometry.SEGMENT_THREADS
    blocks = rows * segments
    steps = [
        one(split.terms, (storage, operation.product, last), blocks, threads, threads,
            *source, n, segments, 0.0, work)
        for last in (False, True)
    ]  # fmt: skip
    arguments = *source, n, segments, *numbers, work, *result
    steps.append(one(operation.last, (storage,), blocks, threads, threads, *arguments))
    return Prepared(tuple(steps), blocks * split.FIELDS)


@lru_cache(maxsize=4096)
def logsumexp_backward_steps(operation, storage, reduced, temperature, where_from, aligned, ordinal, handle):
    """``where_from`` is a layout of g, of x, of lse and of the result."""
    g, x, lse, dx = map(Slot, range(4))
    precise = storage == "f8"
    numbers = (
        *elementary.scale(temperature, precise),
        *elementary.in_three(temperature, precise),
        1 / temperature,
    )
    if isinstance(where_from, layout.Columns):
        outer, n, inner, (of_g, of_x, of_lse, of_dx) = where_from
        arguments = g, of_g[0], of_g[2], x, *of_x, lse, of_lse[0], of_lse[2], n, inner, *numbers, dx, *of_dx
        blocks, threads = geometry.column_blocks(outer, inner), geometry.column_threads(n)
        factory, options, most = operation[1], (storage, reduced), geometry.MOST_COLUMN_THREADS
    else:
        rows, n, (of_g, of_x, of_lse, of_dx), _ = where_from
        how, length = geometry.segments_launch(n, storage, aligned)
        segments = -(-n // length)
        arguments = (g, of_g, x, of_x, lse, of_lse, rows, n, how.team, segments, length, *numbers, dx, of_dx)
        blocks, threads = how.blocks(rows * segments), how.threads
        aligned = aligned and segments == 1
        factory, options, most = (
            operation[0],
            (storage, how.vectors, aligned, reduced),
            geometry.most_threads(how.vectors, storage),
        )
    return Prepared((step(ordinal, handle, factory, options, blocks, threads, most, *arguments),), 0)


# Working memory.


class Scratch(threading.local):
    def __init__(self):
        self.arrays = {}


scratch = Scratch()
of_graphs: list[Any] = []  # of which nobody tells when they are gone


def fresh(shape, storage, like, handle, keep):
    """An array for one call on arrays like this one, in ``keep`` until its kernels are launched.

    A graph is launched again, into any stream: what is captured keeps its arrays for good.
    PyTorch sees to that itself.
    """
    home = arrays.NUMBA if like.home is arrays.OTHER else like.home
    if home is arrays.TORCH or not arrays.is_capturing(handle):
        keep.append(home.empty(shape, storage, like, handle))
        return keep[-1]
    with arrays.allocation_while_capturing():
        of_graphs.append(home.empty(shape, storage, like, handle))
    return of_graphs[-1]


def working_memory(like, handle, keep):
    """A function that gives the address of so many int64 of the device that ``like`` is on.

    CuPy and PyTorch keep memory for reuse in the order of a stream. Numba would wait for the
    device to free it: here it stays with the stream.
    """

    def address(cells):
        if like.home in (arrays.CUPY, arrays.TORCH) or arrays.is_capturing(handle):
            return arrays.quick_look(fresh((cells,), "i8", like, handle, keep))[0]
        key = like.ordinal, handle
        array = scratch.arrays.get(key)
        if array is None or array.size < cells:
            array = scratch.arrays[key] = cuda.device_array(cells, np.int64)
        return arrays.quick_look(array)[0]

    return address


# The calls.


class Call:
    """What all calls on device arrays share: where they run, and how arrays reach the kernels."""

    def __init__(self, first, stream, **given):
        self.first = first
        self.given = [first] + [a for a in given.values() if a is not None]
        for other in self.given[1:]:
            if other.ordinal != first.ordinal:
                raise ValueError(
                    f"{other.name} is on device {other.ordinal} and {first.name} on device {first.ordinal}, "
                    "but all arrays must be on one device"
                )
        self.ordinal = first.ordinal
        self.keep, self.launched, self.has_copies = [], [], False
        if stream is None:
            self.handle = first.home.current_stream(self.ordinal)
        else:
            self.handle = arrays.handle_of(stream)

    def __enter__(self):
        self.device = None
        if not SIMULATED and arrays.device_count() > 1:
            self.device = cuda.gpus[self.ordinal]
            self.device.__enter__()
        try:
            arrays.numba_stream(self.handle, self.ordinal)
            for array in self.given:
                arrays.wait_for(array, self.handle, self.ordinal)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error):
        if self.device is not None:
            self.device.__exit__(*error)

    def result(self, shape, storage):
        value = self.first.home.empty(shape, storage, self.first, self.handle)
        return describe(value, "out")

    def temporary(self, shape, storage):
        """An array for this call alone, that is not given back before its kernels are launched."""
        self.has_copies = True
        return describe(fresh(shape, storage, self.first, self.handle, self.keep), "a temporary array")

    def launch(self, prepared, addresses):
        self.launched.append(prepared)
        run(prepared, addresses, working_memory(self.first, self.handle, self.keep))

    def copied(self, source, view, target, target_view):
        """Copy elements; views are shadows of one shape, done part by part where too many axes have gaps."""
        axes = [(n, (a, b)) for n, a, b in zip(view.shape, view.strides, target_view.strides, strict=True)]
        axes = layout.merged(axes)
        if len(axes) > layout.MOST_AXES:
            n, cut = min((n, i) for i, n in enumerate(view.shape) if n > 1)
            for i in range(n):
                part = (*[slice(None)] * cut, i, ...)
                self.copied(source, view[part], target, target_view[part])
            return
        lengths, (from_, to) = layout.five(axes, 2)
        blocks = -(-view.size // copies.THREADS)
        arguments = Slot(0), *from_, *lengths[1:], view.size, Slot(1), *to
        options, threads = (source.storage, target.storage), copies.THREADS
        one = step(self.ordinal, self.handle, copies.copy, options, blocks, threads, threads, *arguments)
        run(Prepared((one,), 0), (view.ctypes.data, target_view.ctypes.data), None)

    def over(self, axes, operands, steps, extra=(), columns=True):
        """Launch ``steps(where_from, aligned)`` on operands of one shape, copied where they must be.

        The last of them is the result. ``extra`` are addresses that kernels take besides; ``columns`` is
        whether they take rows that lie along another axis.
        """
        shape = operands[-1].view.shape
        where_from = None
        if all(o.array.storage == o.storage for o in operands):
            itemsizes = [geometry.ITEMSIZE[o.storage] if o.role is FULL else 0 for o in operands]
            where_from = layout.plan(shape, axes, [o.view.strides for o in operands], itemsizes)
        if where_from and (columns or isinstance(where_from, layout.Rows)):
            addresses = tuple(o.view.ctypes.data for o in operands)
            full = [i for i, o in enumerate(operands) if o.role is FULL]
            aligned = isinstance(where_from, layout.Rows) and layout.are_aligned(
                [addresses[i] for i in full],
                [where_from.pitches[i] for i in full] if where_from.rows > 1 else [],
                where_from.n,
                geometry.ITEMSIZE[operands[full[0]].storage],
            )
            self.launch(steps(where_from, aligned), (*addresses, *extra))
            return
        n = math.prod(shape[a] for a in axes)
        rows = math.prod(shape) // n
        copies_ = [self.as_rows(o, axes, rows, n, is_input=o is not operands[-1]) for o in operands]
        self.over((1,), [c for c, _, _ in copies_], steps, extra)
        result, of_copy, of_result = copies_[-1]
        if of_copy is not None:
            self.copied(result.array, of_copy, operands[-1].array, of_result)

    def as_rows(self, operand, axes, rows, n, is_input):
        """An operand as contiguous rows: the copy, and the elements of both that belong together."""
        array, view, storage, role = operand
        if role is OWN:
            return (
                operand._replace(view=np.broadcast_to(array.shadow.reshape(rows, 1), (rows, n))),
                None,
                None,
            )
        moved = with_last(view, axes)
        if role is PER_ROW:
            moved = moved[(..., *[slice(1)] * len(axes))]
        copy = self.temporary((rows, 1 if role is PER_ROW else n), storage)
        of_copy = copy.shadow.reshape(moved.shape)
        if is_input:
            self.copied(array, moved, copy, of_copy)
        return Operand(copy, np.broadcast_to(copy.shadow, (rows, n)), storage, role), of_copy, moved


# What an operand has for every row: n elements, bytes of a mask, or one element; or one of a contiguous array
# that the call has made itself, which is never copied.
FULL, MASK, PER_ROW, OWN = "full", "mask", "per row", "own"


class Operand(NamedTuple):
    """A ``Device`` array, its view over the shape of a call, and what kernels take of it."""

    array: Any
    view: np.ndarray
    storage: str
    role: str


def with_last(view, axes):
    """A view with the reduced axes last."""
    return view.transpose([i for i in range(view.ndim) if i not in axes] + list(axes))


def computing_storage(storage, temperature):
    """What kernels are given: the arrays' storage type, or float64 where float32 has no log2(e) / T."""
    return storage if SMALLEST <= temperature <= LARGEST else "f8"


def check_out(out, shape, storage, inputs):
    """As ``checks.out``, for device arrays."""
    if out.storage != storage:
        raise TypeError(
            f"out has dtype {arrays.NAME[out.storage]}, but must have dtype {arrays.NAME[storage]}"
        )
    checks.out(out.shadow, shape, out.shadow.dtype, [(a.name, a.shadow) for a in inputs])


def numbered(outer, axis, shape):
    """An operand that no kernel touches, one byte for every row: its strides count rows."""
    rows = SimpleNamespace(storage="i1", shadow=arrays.shadow(0, outer, None, np.dtype(np.int8)))
    return Operand(rows, np.broadcast_to(np.expand_dims(rows.shadow, axis), shape), "i1", OWN)


def upstream(grad, reduction, shape, axis=None):
    """The gradient with respect to losses of this shape: a number and None, or 1 and a device array."""
    if not isinstance(grad, Real):
        grad = describe(grad, "grad")
        checks.upstream_shape(grad.shadow.shape, reduction, shape, axis)
        return 1.0, grad
    checks.upstream_shape((), reduction, shape, axis)
    return checks.real(grad, "grad", "a number or an array"), None


def optional(value, name):
    return None if value is None else describe(value, name)


# Repeated calls: what was launched for arrays of these kinds, shapes, strides and alignments.
REPEATED: dict[Any, Any] = {}
MOST_REPEATED = 4096
PLAIN = {int, float, bool, str, tuple, type(None), np.int64, np.float64}


class Known(NamedTuple):
    prepared: Prepared
    extents: tuple  # how far every array reaches from its address
    in_place: bool  # whether the result may be an input
    like: Any  # of the kind and on the device of the first array, for working memory
    device: Any  # to enter, where there are several


def repeated_key(operation, inputs, out, *options, stream=None):
    """What a launch depends on, and the addresses; None where that is not known without a closer look."""
    kinds, addresses, low = [], [], []
    for array in (*inputs, out):
        found = arrays.quick_look(array)
        if found is None:
            return None, ()
        addresses.append(found[0])
        kinds.append(found[1])
        low.append(found[0] % geometry.VECTOR_BYTES)
    types = [*map(type, options)]
    if not PLAIN.issuperset(types):
        return None, ()
    if tuple in types:
        types += [type(part) for o in options if type(o) is tuple for part in o]
    home, ordinal = kinds[0][:2]
    handle = home.current_stream(ordinal) if stream is None else arrays.handle_of(stream)
    return (operation, tuple(kinds), tuple(low), handle, options, tuple(types)), addresses


def repeat(key, addresses):
    """Launch again what was launched for this key, unless the result may overlap an input."""
    known = REPEATED.get(key)
    if known is None:
        return False
    prepared, extents, in_place, like, device = known
    y, (y_low, y_high), kinds = addresses[-1], extents[-1], key[1]
    for a, (low, high), kind in zip(addresses[:-1], extents, kinds, strict=False):
        apart = a + high <= y + y_low or y + y_high <= a + low
        if not apart and not (in_place and a == y and kind == kinds[-1]):
            return False
    keep = []
    work = working_memory(like, key[3], keep) if prepared.cells else None
    if device is None:
        run(prepared, addresses, work)
    else:
        with device:
            run(prepared, addresses, work)
    return True


def remember(key, addresses, call, described, in_place=True):
    """Keep what a call has launched, if it made no copies."""
    if key is None or call.has_copies or len(call.launched) != 1:
        return
    if len(REPEATED) >= MOST_REPEATED:
        REPEATED.clear()
    bounds = [np.lib.array_utils.byte_bounds(d.shadow) for d in described]
    extents = tuple((low - a, high - a) for (low, high), a in zip(bounds, addresses, strict=True))
    like = SimpleNamespace(home=call.first.home, ordinal=call.ordinal)
    REPEATED[key] = Known(call.launched[0], extents, in_place, like, call.device)


def forward(operation, x, axis, temperature, where, out, stream, keepdims=False):
    """softmax, log_softmax or logsumexp of a device array."""
    key = None
    if out is not None:
        given = (x,) if where is None else (x, where)
        key, addresses = repeated_key(operation, given, out, axis, temperature, keepdims, stream=stream)
        if repeat(key, addresses):
            return out
    x, where, out = describe(x, "x"), optional(where, "where"), optional(out, "out")
    shape = x.shadow.shape
    axes = checks.axes(axis, len(shape))
    t = checks.temperature(temperature)
    mask = None if where is None else checks.mask(where.shadow, shape)
    if not isinstance(keepdims, (bool, np.bool_)):
        raise TypeError(f"keepdims is {keepdims!r}, but must be True or False")
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    result_shape = shape
    if operation.reduced:
        result_shape = kept if keepdims else tuple(n for i, n in enumerate(shape) if i not in axes)
    if out is not None:
        inputs = [x] if where is None else [x, where]
        check_out(out, result_shape, x.result_storage, inputs)
        if operation.reduced and any(np.may_share_memory(out.shadow, a.shadow) for a in inputs):
            raise ValueError("out shares memory with an input, but must not")
    with Call(x, stream, where=where, out=out) as call:
        y = call.result(result_shape, x.result_storage) if out is None else out
        if y.shadow.size == 0:
            return y.value
        storage = computing_storage(x.result_storage, t)
        over = y.shadow.reshape(kept) if operation.reduced else y.shadow
        if x.shadow.size:
            operands = [Operand(x, x.shadow, storage, FULL)]
            over = np.broadcast_to(over, shape)
        else:  # logsumexp of empty rows: kernels with n = 0, which read nothing of what stands for x
            operands, mask = [Operand(y, over, storage, FULL)], None
        if mask is not None:
            operands.append(Operand(where, mask, "b1", MASK))
        operands.append(Operand(y, over, storage, PER_ROW if operation.reduced else FULL))

        def steps(where_from, aligned):
            if not x.shadow.size:
                where_from = where_from._replace(n=0)
            masked = mask is not None
            return forward_steps(
                operation, storage, t, masked, where_from, aligned and not masked, call.ordinal, call.handle
            )

        call.over(axes, operands, steps)
        if key:
            described = (x, y) if where is None else (x, where, y)
            remember(key, addresses, call, described, in_place=not operation.reduced)
        return y.value


def backward(operation, grad, y, y_name, axis, temperature, out, stream):
    """The gradient of softmax or log_softmax for device arrays."""
    key = None
    if out is not None:
        key, addresses = repeated_key(operation, (grad, y), out, axis, temperature, stream=stream)
        if repeat(key, addresses):
            return out
    grad, y, out = describe(grad, "grad"), describe(y, y_name), optional(out, "out")
    checks.same_shape(grad.shadow, "grad", y.shadow, y_name)
    if grad.storage != y.storage:
        raise TypeError(
            f"grad has dtype {arrays.NAME[grad.storage]}, but must have the dtype "
            f"{arrays.NAME[y.storage]} of {y_name}"
        )
    axes = checks.axes(axis, y.shadow.ndim)
    t = checks.temperature(temperature)
    if out is not None:
        check_out(out, y.shadow.shape, y.result_storage, [grad, y])
    with Call(y, stream, grad=grad, out=out) as call:
        dx = call.result(y.shadow.shape, y.result_storage) if out is None else out
        if y.shadow.size == 0:
            return dx.value
        storage = computing_storage(y.result_storage, t)

        def steps(where_from, aligned):
            return backward_steps(operation, storage, t, where_from, aligned, call.ordinal, call.handle)

        call.over(axes, [Operand(a, a.shadow, storage, FULL) for a in (grad, y, dx)], steps)
        if key:
            remember(key, addresses, call, (grad, y, dx))
        return dx.value


def logsumexp_backward(operation, grad, x, lse, axis, temperature, out, stream):
    """The gradient of logsumexp for device arrays."""
    key = None
    if out is not None:
        key, addresses = repeated_key(operation, (grad, x, lse), out, axis, temperature, stream=stream)
        if repeat(key, addresses):
            return out
    grad, x, lse, out = describe(grad, "grad"), describe(x, "x"), describe(lse, "lse"), optional(out, "out")
    shape = x.shadow.shape
    axes = checks.axes(axis, len(shape))
    t = checks.temperature(temperature)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    for array in grad, lse:
        checks.reduced_shape(array.shadow, array.name, shape, axes)
    if out is not None:
        check_out(out, shape, x.result_storage, [grad, x, lse])
    with Call(x, stream, grad=grad, lse=lse, out=out) as call:
        dx = call.result(shape, x.result_storage) if out is None else out
        if x.shadow.size == 0:
            return dx.value
        storage = computing_storage(x.result_storage, t)
        # g and lse may both be as narrow as x; else they are taken in the computing type
        narrow = grad.storage == lse.storage == storage
        reduced = storage if narrow or storage == "f8" else "f4"
        of_grad, of_lse = (np.broadcast_to(a.shadow.reshape(kept), shape) for a in (grad, lse))

        def steps(where_from, aligned):
            return logsumexp_backward_steps(
                operation, storage, reduced, t, where_from, aligned, call.ordinal, call.handle
            )

        operands = [
            Operand(grad, of_grad, reduced, PER_ROW),
            Operand(x, x.shadow, storage, FULL),
            Operand(lse, of_lse, reduced, PER_ROW),
            Operand(dx, dx.shadow, storage, FULL),
        ]
        call.over(axes, operands, steps)
        if key:
            remember(key, addresses, call, (grad, x, lse, dx))
        return dx.value
