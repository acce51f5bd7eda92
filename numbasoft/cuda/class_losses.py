"""Losses over classes of device arrays: checks, results, and which kernels are launched.

A call is: what the weights, the targets and the mean say (if there are any), the rows, and
the sum over rows. Nothing here waits for the device, so what it holds cannot be refused: the
kernels give NaN for it.
"""

import math
import numbers
from functools import lru_cache, partial
from typing import Any, NamedTuple

from .. import checks, elementary
from . import arrays, calls, geometry, layout, operations, split, totals
from .arrays import describe
from .calls import FULL, Operand, Prepared, Slot
from .classes import address_of, five_axes, places_of, tally

CELL = 8  # bytes


class Loss(NamedTuple):
    """What the launches of a call depend on besides the layout of its logits."""

    kernels: operations.ClassLoss
    storage: str  # that rows are read in
    target: str  # what the target puts on the classes: one of the names in operations.py
    gradient: bool
    valued: bool  # whether the loss is asked for
    temperature: float
    classes: int
    rows: int
    reduction: str
    result: str  # storage of the result
    sign: float  # 1, or -1 for log-probabilities
    smoothing: float
    z: float
    places: Any  # of class indices: storage, strides and lengths along five axes, and what is ignored
    weight: Any  # storage, and bytes from one to the next
    tolerance: float  # of the sums of probabilities
    g: float  # the gradient that is passed on, unless it is in an array
    g_at: Any  # its storage, and whether there is one for every row
    raised: bool = False  # whether the result is exp of the mean

    @property
    def compute(self):
        return "f8" if self.storage == "f8" else "f4"

    @property
    def of_classes(self):
        return self.places is not None

    @property
    def loss_storage(self):
        return self.result if self.in_result else self.compute

    @property
    def in_result(self):
        """Whether the rows' losses are the result."""
        return self.valued and self.reduction == "none"

    @property
    def held(self):
        """What a thread holds of a row besides its logits, for the geometry."""
        return 0 if self.target == operations.CLASS else geometry.SHARES

    @property
    def weighted(self):
        """Whether the classes have weights of their own, or shares of what is spread."""
        return self.weight is not None or self.target in (operations.SPREAD, operations.WEIGHTED)

    @property
    def parts(self):
        """What the target keeps, and what every class has of the rest."""
        return 1.0 - self.smoothing, self.smoothing / self.classes

    @property
    def counts(self):
        """Whether it takes the targets to know what a mean divides by."""
        return self.reduction == "mean" and self.of_classes


class Room:
    """How a call's working memory is divided, in cells."""

    def __init__(self, loss):
        self.cells = 0
        classes = loss.classes + 2
        self.places = self.take(loss.rows * loss.of_classes)
        self.tallies = self.take(-(-loss.rows // totals.THREADS) * operations.TALLY * loss.counts)
        self.divisor, self.numbers = self.take(1), self.take(2)
        self.checked, self.own, self.spread = (self.take(classes * loss.weighted) for _ in range(3))
        self.losses = self.take(loss.rows * (not loss.in_result))
        self.sums = self.take(totals.cells_for(loss.compute, loss.rows))
        self.segments = self.cells

    def take(self, cells):
        begin = self.cells
        self.cells += cells
        return begin

    def with_segments(self, loss):
        """All cells, with those of long rows."""
        if geometry.rows_launch(loss.classes, loss.storage, False, loss.held):
            return self.cells
        units = loss.rows * geometry.segments_of(loss.classes, loss.storage)
        fields = units * split.FIELDS * operations.REGIONS[loss.target]
        return self.cells + fields + loss.rows * operations.NUMBERS


def preparation(loss, room, one, at, target, weight, g):
    """What comes before the rows, and what they take of it: the factor of gradients and another one of z_loss."""
    threads, itemsize = totals.THREADS, geometry.ITEMSIZE[loss.compute]
    before = []
    kept, shared = loss.parts
    if loss.weighted:
        storage, step = loss.weight or ("f8", 0)
        arguments = (
            weight if loss.weight else 0, step, loss.classes, kept, shared, at(room.checked), at(room.own),
            at(room.spread, 2 * itemsize), at(room.spread),
        )  # fmt: skip
        before.append(
            one(loss.kernels.class_weights, (loss.compute, storage), 1, threads, threads, *arguments)
        )
    blocks = -(-loss.rows // threads)
    if loss.of_classes:
        storage, strides, lengths, ignored = loss.places
        checked = at(room.checked) if loss.weight else 0
        tallies = at(room.tallies) if loss.counts else 0
        arguments = (
            target, *strides, *lengths[1:], loss.rows, loss.classes, ignored is not None, ignored or 0,
            checked, 1.0, at(room.places), tallies,
        )  # fmt: skip
        before.append(one(tally, (storage,), blocks, threads, threads, *arguments))
    unit, units, units_pitch, z_at = loss.g, 0, 0, 0
    if loss.counts or (loss.reduction == "mean" and loss.gradient and loss.g_at):
        g_storage = loss.g_at[0] if loss.g_at else "f8"
        tallies, by_weight = (at(room.tallies), loss.weight is not None) if loss.counts else (0, False)
        arguments = (
            tallies, blocks, by_weight, loss.rows, loss.g, g if loss.g_at else 0,
            at(room.numbers), at(room.divisor),
        )  # fmt: skip
        before.append(one(loss.kernels.scales, (loss.compute, g_storage), 1, threads, threads, *arguments))
        units = at(room.numbers)
        z_at = at(room.numbers, itemsize) if by_weight else 0
    elif loss.reduction == "mean":
        unit = loss.g / loss.rows
    elif loss.g_at:
        units, units_pitch = g, itemsize * loss.g_at[1]
    if not loss.gradient:
        unit, units, units_pitch = 0.0, 0, 0
    return before, (unit, units, units_pitch), z_at


@lru_cache(maxsize=4096)
def steps(loss, where_from, aligned, ordinal, handle):
    """All launches of a call. ``where_from`` is a layout of x, of probabilities, of the rows and of the gradient.

    After the addresses of these come those of the target, of the weights, of g, of the result
    and of the working memory.
    """
    has_q, room = not loss.of_classes, Room(loss)
    x, q, dx = Slot(0), Slot(1) if has_q else 0, Slot(2 + has_q) if loss.gradient else 0
    first = 2 + has_q + loss.gradient
    target, weight, g, result, work = (Slot(i) for i in range(first, first + 5))

    def at(cell, offset=0):
        return Slot(work.index, cell * CELL + offset)

    one = partial(calls.step, ordinal, handle)

    before, units, z_at = preparation(loss, room, one, at, target, weight, g)
    losses = result if loss.in_result else at(room.losses)
    scale = (*elementary.scale(loss.temperature, loss.storage == "f8"),)
    factors = *scale, *elementary.inverse(loss.temperature, loss.storage == "f8")
    own = at(room.own) if loss.weighted else 0
    spread = at(room.spread, 2 * geometry.ITEMSIZE[loss.compute]) if loss.weighted else 0
    places = at(room.places) if loss.of_classes else 0
    kept, shared = loss.parts
    of_class = loss.sign * kept, shared, loss.smoothing, loss.z, z_at
    options = loss.storage, loss.target, loss.gradient, loss.loss_storage
    if isinstance(where_from, layout.Columns):
        outer, n, inner, strides = where_from
        of_q, of_row = strides[1] if has_q else (0, 0, 0), strides[1 + has_q]
        of_dx = strides[-1] if loss.gradient else (0, 0, 0)
        arguments = (
            x, *strides[0], q, *of_q, loss.tolerance, places, own, spread, of_row[0], of_row[2], n, inner,
            *factors, *of_class, *units, losses, dx, *of_dx,
        )  # fmt: skip
        most = geometry.loss_column_bounds(loss.storage)
        blocks = geometry.column_blocks(outer, inner)
        threads = geometry.column_threads(n, geometry.LOSS_COLUMN_THREADS)
        main = [one(loss.kernels.columns, options, blocks, threads, most, *arguments)]
    else:
        rows, n, pitches, _ = where_from
        of_x, of_q = (x, pitches[0]), (q, pitches[1] if has_q else 0)
        of_dx = dx, pitches[-1] if loss.gradient else 0
        how = geometry.rows_launch(n, loss.storage, aligned, loss.held)
        if how:
            arguments = (
                *of_x, *of_q, loss.tolerance, places, own, spread, rows, n, how.team, *factors, *of_class,
                *units, losses, *of_dx,
            )  # fmt: skip
            options = *options, how.vectors, aligned
            most = geometry.loss_row_bounds(how.vectors, loss.storage, loss.held, loss.gradient)
            main = [one(loss.kernels.rows, options, how.blocks(rows), how.threads, most, *arguments)]
        else:
            main = long_rows(loss, room, one, at, n, of_x, of_q, of_dx, places, own, spread, factors, of_class,
                             units, losses)  # fmt: skip
    after = []
    if loss.valued and loss.reduction != "none":
        after = summed(loss, room, one, at, result)
    return Prepared((*before, *main, *after), 0)


def long_rows(
    loss, room, one, at, n, of_x, of_q, of_dx, places, own, spread, factors, of_class, unit, losses
):  # fmt: skip
    """Maxima and sums of segments, what q holds of them, the rows' losses, the segments' gradients."""
    segments, threads = geometry.segments_of(n, loss.storage), geometry.SEGMENT_THREADS
    units, work = loss.rows * segments, at(room.segments)
    source, storage, target = (*of_x, 0, 0, 0, n, segments), loss.storage, loss.target
    shared = of_class[1]

    def step(factory, options, blocks, *arguments, most=threads):
        return one(factory, options, blocks, threads, most, *arguments)

    result = [
        step(split.maxima, (storage, False), units, *source, work),
        step(split.sums, (storage, False, True, loss.gradient), units, *source, *factors[:2], work),
    ]
    if target != operations.CLASS:
        arguments, most = (
            (*of_x, *of_q, own, spread, n, segments, units, shared, work),
            geometry.loss_share_bounds(storage),
        )
        for last in False, True:
            options = storage, target, loss.gradient, last
            result.append(step(loss.kernels.segment_shares, options, units, *arguments, most=most))
    arguments = (
        *of_x, loss.tolerance, places, own, spread, segments, units, *factors, *of_class, *unit, work, losses,
    )  # fmt: skip
    options, most = (storage, target, loss.gradient, loss.loss_storage), geometry.loss_combine_bounds(storage)
    result.append(step(loss.kernels.combine, options, loss.rows, *arguments, most=most))
    if loss.gradient:
        arguments = (
            *of_x, *of_q, places, own, spread, n, segments, units, *factors[:2], shared, work, *of_dx,
        )  # fmt: skip
        result.append(step(loss.kernels.segments, (storage, target), units, *arguments))
    return result


def summed(loss, room, one, at, result):
    """The sum or the mean of all rows' losses."""
    divisor, divisor_at = 1.0, 0
    if loss.reduction == "mean":
        divisor, divisor_at = float(loss.rows), at(room.divisor) if loss.counts else 0
    return totals.steps(
        one, loss.compute, loss.result, loss.rows, at(room.losses), divisor, at(room.sums), result, divisor_at,
        loss.raised,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def picked_steps(loss, strides, lengths, step, inner, ordinal, handle):
    """``steps`` for log-probabilities, which need no sum; the gradient has no gaps and ``inner`` rows side by side."""
    room = Room(loss)
    x, dx, target, weight, g, result = (Slot(i) for i in range(6))

    def at(cell, offset=0):
        return Slot(6, cell * CELL + offset)

    one, threads = partial(calls.step, ordinal, handle), totals.THREADS
    launches, units, _ = preparation(loss, room, one, at, target, weight, g)
    places, own = at(room.places), at(room.own) if loss.weighted else 0
    if loss.valued:
        losses = result if loss.in_result else at(room.losses)
        arguments = x, *strides, step, *lengths[1:], loss.rows, places, own, 1.0, losses
        options, blocks = (loss.storage, loss.loss_storage), -(-loss.rows // threads)
        launches.append(one(loss.kernels.picked, options, blocks, threads, threads, *arguments))
        if loss.reduction != "none":
            launches += summed(loss, room, one, at, result)
    if loss.gradient:
        total = loss.rows * loss.classes
        arguments = loss.classes, inner, total, places, own, *units, dx
        blocks = -(-total // threads)
        launches.append(one(loss.kernels.placed, (loss.storage,), blocks, threads, threads, *arguments))
    return Prepared(tuple(launches), 0)


# Calls.


class Given(NamedTuple):
    """The arguments of a call, checked as far as they are on the host."""

    x: Any
    target: Any
    weight: Any
    axis: int
    outer: tuple[int, ...]
    loss: Loss

    def inputs(self):
        return [("target", self.target), ("weight", self.weight)]


def checked(
    kernels, logits, target, axis, weight, ignore_index, label_smoothing, z_loss, temperature, reduction,
    names=("logits", "target"), only_classes=False, sign=1.0, has_ignored=True,
):  # fmt: skip
    x, y = describe(logits, names[0]), describe(target, names[1])
    shape = x.shadow.shape
    axis = checks.class_axis(axis, shape, names[0])
    t = checks.temperature(temperature)
    classes, outer = shape[axis], shape[:axis] + shape[axis + 1 :]
    weight = calls.optional(weight, "weight")
    if weight is not None:
        checks.weight_shape(weight.shadow.shape, classes)
    ignore_index = checks.integer(ignore_index, "ignore_index") if has_ignored else None
    smoothing = checks.between(label_smoothing, "label_smoothing", 0, 1)
    z = checks.not_negative(z_loss, "z_loss")
    checks.reduction(reduction)
    is_integer = y.storage in arrays.INTEGERS.values()
    result = x.result_storage
    places, tolerance = None, 0.0
    if only_classes or is_integer or y.shadow.shape == outer:
        checks.class_target(y.shadow.shape, outer, arrays.NAME[y.storage], names[1])
        places = places_of(y, ignore_index)
        storage = calls.computing_storage(result, t)
        kind = (
            operations.CLASS
            if not smoothing
            else operations.SMOOTHED
            if weight is None
            else operations.SPREAD
        )
    else:
        checks.same_shape(y.shadow, names[1], x.shadow, names[0])
        tolerance = checks.sum_tolerance(arrays.NAME[y.storage])
        both = {result, y.storage}
        wider = "f4" if both == {"f2", "b2"} else max(both, key=geometry.ITEMSIZE.get)
        storage = calls.computing_storage(wider, t)
        kind = operations.WEIGHTED if smoothing or weight is not None else operations.PROBABILITIES
    of_weight = None if weight is None else (weight.storage, weight.shadow.strides[0])
    loss = Loss(
        kernels, storage, kind, False, True, t, classes, math.prod(outer), reduction, result, sign, smoothing, z, places,
        of_weight, tolerance, 1.0, None,
    )  # fmt: skip
    return Given(x, y, weight, axis, outer, loss)


def passed_on(given, grad, call):
    """What of ``Loss`` says how the gradient is passed on, and its address."""
    loss = given.loss
    if isinstance(grad, numbers.Real) or not loss.rows:
        return loss, 0
    storage, per_row = grad.storage, loss.reduction == "none"
    if loss.reduction != "mean" and not (storage == loss.compute and grad.shadow.flags.c_contiguous):
        copy = call.temporary(grad.shadow.shape, loss.compute)
        call.copied(grad, grad.shadow, copy, copy.shadow)
        grad, storage = copy, loss.compute
    return loss._replace(g_at=(storage, per_row)), grad.address


def run(given, call, grad, dx, valued=True):
    """Launch all of a call: the loss, if it is ``valued``, and the gradient into dx, unless that is None."""
    loss, g_address = passed_on(given, grad, call)
    if isinstance(grad, numbers.Real):
        loss = loss._replace(g=float(grad))
    loss = loss._replace(gradient=dx is not None, valued=valued)
    per_row = loss.reduction == "none"
    value = call.result(given.outer if per_row else (), loss.result) if valued else None
    room = Room(loss)
    cells = room.with_segments(loss)
    work = calls.working_memory(call.first, call.handle, call.keep)(max(1, cells))
    if not loss.rows:
        if valued and not per_row:
            empty(loss, room, call, value.address, work)
        return value
    x, y = given.x, given.target
    operands = [Operand(x, x.shadow, loss.storage, FULL)]
    if not loss.of_classes:
        operands.append(Operand(y, y.shadow, loss.storage, FULL))
    operands.append(calls.numbered(given.outer, given.axis, x.shadow.shape))
    if dx is not None:
        operands.append(Operand(dx, dx.shadow, loss.storage, FULL))
    target = address_of(y, call) if loss.of_classes else y.address
    extra = target, 0 if given.weight is None else given.weight.address, g_address
    extra = *extra, value.address if valued else 0, work

    def launches(where_from, aligned):
        return steps(loss, where_from, aligned, call.ordinal, call.handle)

    call.over((given.axis,), operands, launches, extra)
    return value


def empty(loss, room, call, result, work):
    """The loss of no rows: 0."""

    one = partial(calls.step, call.ordinal, call.handle)

    def at(cell, offset=0):
        return Slot(1, cell * CELL + offset)

    last = summed(loss._replace(places=None), room, one, at, Slot(0))
    calls.run(Prepared(tuple(last), 0), (result, work), None)


def output(given, call, out):
    return call.result(given.x.shadow.shape, given.loss.result) if out is None else out


def check_out(given, out, besides=()):
    if out is not None:
        calls.check_out(out, given.x.shadow.shape, given.loss.result, [given.x])
        inputs = [*given.inputs(), *besides]
        checks.apart(
            out.shadow, [(name, a and a.shadow) for name, a in inputs if isinstance(a, arrays.Device)]
        )


def value(kernels, logits, target, stream, **options):
    """``cross_entropy``, or ``token_log_probs``, of device arrays."""
    given = checked(kernels, logits, target, **options)
    with calls.Call(given.x, stream, target=given.target, weight=given.weight) as call:
        return run(given, call, 1.0, None).value


def perplexity(kernels, logits, target, stream, axis, ignore_index, temperature):
    """exp of the mean of ``cross_entropy`` of device arrays, in float64."""
    options = axis, None, ignore_index, 0.0, 0.0, temperature, "mean"
    given = checked(kernels, logits, target, *options, only_classes=True)
    given = given._replace(loss=given.loss._replace(result="f8", raised=True))
    with calls.Call(given.x, stream, target=given.target) as call:
        return run(given, call, 1.0, None).value


def value_and_grad(kernels, logits, target, out, stream, **options):
    given = checked(kernels, logits, target, **options)
    out = calls.optional(out, "out")
    check_out(given, out)
    with calls.Call(given.x, stream, target=given.target, weight=given.weight, out=out) as call:
        dx = output(given, call, out)
        return run(given, call, 1.0, dx).value, dx.value


def backward(kernels, grad, logits, target, lse, out, stream, **options):
    given = checked(kernels, logits, target, **options)
    loss = given.loss
    if isinstance(grad, numbers.Real):
        checks.upstream_shape((), loss.reduction, given.outer, given.axis)
        grad, of_grad = checks.real(grad, "grad", "a number or an array"), None
    else:
        grad = of_grad = describe(grad, "grad")
        checks.upstream_shape(grad.shadow.shape, loss.reduction, given.outer, given.axis)
    lse = calls.optional(lse, "lse")
    if lse is not None:
        checks.reduced_shape(lse.shadow, "lse", given.x.shadow.shape, (given.axis,))
    out = calls.optional(out, "out")
    check_out(given, out, [("grad", of_grad), ("lse", lse)])
    besides = dict(target=given.target, weight=given.weight, grad=of_grad, lse=lse, out=out)
    with calls.Call(given.x, stream, **besides) as call:
        dx = output(given, call, out)
        run(given, call, grad, dx, valued=False)
        return dx.value


def rows_of(x, given):
    """How the rows of log-probabilities lie, as ``five_axes``."""
    return five_axes(given.outer, [s for i, s in enumerate(x.shadow.strides) if i != given.axis])


def picked(kernels, grad, log_probs, target, stream, axis, weight, ignore_index, reduction):
    """``nll_loss``, or with a gradient ``nll_loss_backward``, of device arrays."""
    given = checked(
        kernels, log_probs, target, axis, weight, ignore_index, 0.0, 0.0, 1.0, reduction,
        ("log_probs", "target"), True,
    )  # fmt: skip
    x, loss = given.x, given.loss
    has_gradient = grad is not None
    of_grad = None
    if isinstance(grad, numbers.Real):
        grad = checks.real(grad, "grad", "a number or an array")
    elif has_gradient:
        grad = of_grad = describe(grad, "grad")
    if has_gradient:
        shape = () if of_grad is None else grad.shadow.shape
        checks.upstream_shape(shape, loss.reduction, given.outer, given.axis)
    besides = dict(target=given.target, weight=given.weight, grad=of_grad)
    with calls.Call(x, stream, **besides) as call:
        loss, g_address = passed_on(given, 1.0 if grad is None else grad, call)
        if has_gradient and of_grad is None:
            loss = loss._replace(g=grad)
        loss = loss._replace(gradient=has_gradient, valued=not has_gradient)
        shape = x.shadow.shape if has_gradient else given.outer if loss.reduction == "none" else ()
        result = call.result(shape, loss.result)
        room = Room(loss)
        work = calls.working_memory(call.first, call.handle, call.keep)(max(1, room.cells))
        if not loss.rows:
            if result.shadow.size:
                empty(loss, room, call, result.address, work)
            return result.value
        found = rows_of(x, given)
        if x.storage != loss.storage or found is None:  # bool and integers; gaps along too many axes
            copy = call.temporary(x.shadow.shape, loss.storage)
            call.copied(x, x.shadow, copy, copy.shadow)
            x, found = copy, rows_of(copy, given)
        strides, lengths = found
        inner = math.prod(given.outer[given.axis :])
        step = x.shadow.strides[given.axis]
        prepared = picked_steps(loss, strides, lengths, step, inner, call.ordinal, call.handle)
        inputs = x.address, result.address, address_of(given.target, call)
        weight = 0 if given.weight is None else given.weight.address
        call.launch(prepared, (*inputs, weight, g_address, result.address, work))
        return result.value
