"""The temperature that fits device arrays: the numbers that the host finds it by.

The host waits for the device at every step, for two numbers; so what the arrays hold can be refused, as on the CPU.
"""

import math
from functools import lru_cache, partial

import numpy as np

from .. import checks, elementary
from . import arrays, calls, classes, geometry, layout, totals
from .arrays import describe
from .calls import FULL, Operand, Prepared, Slot

CELL = 8  # bytes

# The first cells of the working memory: the sums of slopes and of curvatures.
SUMS = 2


@lru_cache(maxsize=4096)
def class_steps(places, rows, n, ordinal, handle):
    """The launch that finds the class of every row; after the target's address comes that of the classes."""
    storage, strides, lengths, ignored = places
    threads = totals.THREADS
    arguments = (
        Slot(0), *strides, *lengths[1:], rows, n, ignored is not None, ignored or 0, 0, 1.0, Slot(1), 0,
    )  # fmt: skip
    one = calls.step(
        ordinal, handle, classes.tally, (storage,), -(-rows // threads), threads, threads, *arguments
    )
    return Prepared((one,), 0)


@lru_cache(maxsize=4096)
def moment_steps(operation, storage, rows, n, pitch, ordinal, handle):
    """The launches for both sums; after the address of the logits come that of working memory, and three numbers."""
    one = partial(calls.step, ordinal, handle)
    of_classes, slopes, curvatures, sums = parts(rows)
    x, unit, high, low = Slot(0), Slot(2), Slot(3), Slot(4)

    def at(cell):
        return Slot(1, cell * CELL)

    team, threads = geometry.moment_launch(n)
    arguments = x, pitch, rows, n, team, at(of_classes), unit, high, low, at(slopes), at(curvatures)
    blocks, most = -(-rows // (threads // team)), geometry.moment_bounds()
    launches = [one(operation.rows, (storage,), blocks, threads, most, *arguments)]
    for i, values in enumerate((slopes, curvatures)):
        launches += totals.steps(one, "f8", "f8", rows, at(values), 1.0, at(sums), at(i))
    return Prepared(tuple(launches), 0)


def parts(rows):
    """The first cells of the classes, the slopes and the curvatures of all rows, and of what sums take."""
    return tuple(SUMS + i * rows for i in range(4))


def fit(operation, minimum, logits, target, axis, ignore_index, stream):
    """``fit_temperature`` of device arrays; ``minimum`` finds it by a function that gives the two numbers."""
    x, y = describe(logits, "logits"), describe(target, "target")
    shape, storage = x.shadow.shape, x.result_storage
    axis = checks.class_axis(axis, shape, "logits")
    ignore_index = checks.integer(ignore_index, "ignore_index")
    n, outer = shape[axis], shape[:axis] + shape[axis + 1 :]
    checks.class_target(y.shadow.shape, outer, arrays.NAME[y.storage], "target")
    places, rows = classes.places_of(y, ignore_index), math.prod(outer)
    if not rows:
        checks.some_count(np.empty(0), outer, "target")
    with calls.Call(x, stream, target=y) as call:
        if arrays.is_capturing(call.handle):
            raise RuntimeError("fit_temperature waits for the device, but its stream is being captured")
        of_call = call.ordinal, call.handle
        x_at, pitch = in_rows(call, x, storage, axis, rows, n)
        of_classes, *_, sums = parts(rows)
        memory = calls.working_memory(call.first, call.handle, call.keep)
        work = memory(sums + totals.cells_for("f8", rows))
        call.launch(
            class_steps(places, rows, n, *of_call), (classes.address_of(y, call), work + of_classes * CELL)
        )

        def at(b, unit):
            numbers = unit, *elementary.power_scale(b)
            call.launch(moment_steps(operation, storage, rows, n, pitch, *of_call), (x_at, work, *numbers))
            slope, curvature = map(float, arrays.fetched(work, SUMS, np.float64, call.handle))
            if b == math.inf and not 0 < slope < math.inf:  # it may be for the classes
                found = arrays.fetched(work + of_classes * CELL, rows, np.int64, call.handle)
                refuse(y, found, outer, n, ignore_index, call.handle)
            return slope, curvature

        return minimum(at, rows)


def in_rows(call, x, storage, axis, rows, n):
    """The address of logits in rows without gaps, and the bytes from row to row; a copy where they lie otherwise."""
    itemsize = geometry.ITEMSIZE[storage]
    if x.storage == storage:
        where_from = layout.plan(x.shadow.shape, (axis,), [x.strides], [itemsize])
        if isinstance(where_from, layout.Rows):
            return x.address, where_from.pitches[0]
    operand, _, _ = call.as_rows(Operand(x, x.shadow, storage, FULL), (axis,), rows, n, is_input=True)
    return operand.array.address, n * itemsize


def refuse(y, found, outer, n, ignore_index, handle):
    """Raise what is wrong with the classes of all rows, if anything is."""
    bad = np.flatnonzero(found == classes.NO_CLASS)
    if bad.size:
        at = np.unravel_index(bad[0], outer) if outer else ()
        element = y.shadow[(*(slice(i, i + 1) for i in at), ...)]  # a view, of which nothing is read
        (value,) = arrays.fetched(element.ctypes.data, 1, element.dtype, handle)
        raise ValueError(checks.no_class(value, bad[0], outer, y.name, n, ignore_index))
    checks.some_count(found, outer, y.name)
