"""Calls of the kernels of the Kullback-Leibler divergence, on device arrays."""

import math
from functools import lru_cache, partial

import numpy as np

from .. import checks, elementary
from . import geometry, layout, split, totals
from .arrays import describe
from .calls import (
    FULL,
    PER_ROW,
    Call,
    Operand,
    Prepared,
    Slot,
    check_out,
    computing_storage,
    numbered,
    optional,
    step,
    upstream,
    working_memory,
)
from .elementwise import same_storage


def bound(prepared, known):
    """With the addresses of some slots, by index."""
    steps = []
    for one in prepared.steps:
        arguments = list(one.arguments)
        for place, index, offset in one.slots:
            if index in known:
                arguments[place] = known[index] + offset
        slots = tuple(s for s in one.slots if s[1] not in known)
        steps.append(one._replace(arguments=tuple(arguments), slots=slots))
    return Prepared(tuple(steps), 0)


# Of long rows: work for the sums of x, of y, and of the terms, behind the addresses of arrays.


def work_of(call, prepared, first):
    """Long rows' steps with the addresses of their working memory, whose slots begin at ``first``."""
    if not prepared.cells:
        return prepared
    cells = prepared.cells // 3
    base = working_memory(call.first, call.handle, call.keep)(prepared.cells)
    return bound(prepared, {first + i: base + 8 * cells * i for i in range(3)})


def segment_sums(one, x, x_pitch, work, storage, blocks, n, segments, numbers, others):
    """The maxima and sums of the segments of long rows."""
    threads, source = geometry.SEGMENT_THREADS, (x, x_pitch, 0, 0, 0)
    yield one(split.maxima, (storage, False), blocks, threads, threads, *source, n, segments, work)
    options, arguments = (storage, False, others, True), (*source, n, segments, *numbers, work)
    yield one(split.sums, options, blocks, threads, threads, *arguments)


@lru_cache(maxsize=4096)
def forward_steps(operation, storage, of_result, numbers, where_from, aligned, ordinal, handle):
    """``where_from`` is a layout of x, of y and of the result; ``numbers`` are log2(e) / T and 1 / T in parts."""
    x, y, result, of_x, of_y, work = map(Slot, range(6))

    one = partial(step, ordinal, handle)

    if isinstance(where_from, layout.Columns):
        outer, n, inner, (x_strides, y_strides, strides) = where_from
        blocks, threads = geometry.column_blocks(outer, inner), geometry.column_threads(n)
        arguments = x, *x_strides, y, *y_strides, n, inner, *numbers, result, strides[0], strides[2]
        most = geometry.column_bounds(storage, heavy=True)
        return Prepared((one(operation.columns, (storage, of_result), blocks, threads, most, *arguments),), 0)

    rows, n, (x_pitch, y_pitch, pitch), _ = where_from
    how = geometry.rows_launch(n, storage, aligned, heavy=True)
    if how:
        arguments = x, x_pitch, y, y_pitch, rows, n, how.team, *numbers, result, pitch
        options = storage, how.vectors, aligned, of_result
        blocks, most = how.blocks(rows), geometry.MOST_THREADS
        return Prepared((one(operation.rows, options, blocks, how.threads, most, *arguments),), 0)

    segments, threads = geometry.segments_of(n, storage), geometry.SEGMENT_THREADS
    blocks, scale = rows * segments, numbers[:2]
    steps = [
        *segment_sums(one, x, x_pitch, of_x, storage, blocks, n, segments, scale, True),
        *segment_sums(one, y, y_pitch, of_y, storage, blocks, n, segments, scale, True),
    ]
    terms, combine = operation.last
    arguments = x, x_pitch, y, y_pitch, n, segments, *numbers, of_x, of_y, work
    most = geometry.term_bounds(storage)
    steps += [one(terms, (storage, last), blocks, threads, most, *arguments) for last in (False, True)]
    arguments = segments, 0.0, work, result, pitch
    steps.append(one(combine, (storage, of_result), rows, threads, threads, *arguments))
    return Prepared(tuple(steps), 3 * blocks * split.FIELDS)


@lru_cache(maxsize=4096)
def backward_steps(operation, storage, of_grad, numbers, where_from, aligned, ordinal, handle):
    """``where_from`` is a layout of g, of x, of y and of the result; ``of_grad`` is None where numbers have g."""
    g, x, y, dy, of_x, of_y = map(Slot, range(6))
    if of_grad is None:
        g, of_grad = 0, storage

    one = partial(step, ordinal, handle)

    if isinstance(where_from, layout.Columns):
        outer, n, inner, (g_strides, x_strides, y_strides, strides) = where_from
        blocks, threads = geometry.column_blocks(outer, inner), geometry.column_threads(n)
        inputs = g, g_strides[0], g_strides[2], x, *x_strides, y, *y_strides
        arguments = *inputs, n, inner, *numbers, dy, *strides
        most = geometry.column_bounds(storage, heavy=True)
        return Prepared((one(operation.columns, (storage, of_grad), blocks, threads, most, *arguments),), 0)

    rows, n, (g_pitch, x_pitch, y_pitch, pitch), _ = where_from
    inputs = g, g_pitch, x, x_pitch, y, y_pitch
    how = geometry.rows_launch(n, storage, aligned, in_pairs=True)
    if how:
        arguments = *inputs, rows, n, how.team, *numbers, dy, pitch
        options = storage, how.vectors, aligned, of_grad
        blocks, most = how.blocks(rows), geometry.MOST_THREADS
        return Prepared((one(operation.rows, options, blocks, how.threads, most, *arguments),), 0)

    segments, threads = geometry.segments_of(n, storage), geometry.SEGMENT_THREADS
    blocks, scale = rows * segments, numbers[:2]
    arguments = *inputs, n, segments, *numbers, of_x, of_y, dy, pitch
    steps = (
        *segment_sums(one, x, x_pitch, of_x, storage, blocks, n, segments, scale, False),
        *segment_sums(one, y, y_pitch, of_y, storage, blocks, n, segments, scale, False),
        one(operation.last, (storage, of_grad), blocks, threads, geometry.MOST_THREADS, *arguments),
    )
    return Prepared(steps, 3 * blocks * split.FIELDS)


@lru_cache(maxsize=4096)
def mean_steps(kind, storage, n, divisor, ordinal, handle):
    """The sum of n numbers, divided."""
    x, result, work = map(Slot, range(3))
    one = partial(step, ordinal, handle)
    return Prepared(totals.steps(one, kind, storage, n, x, divisor, work, result), totals.cells_for(kind, n))


def checked(p_logits, q_logits, axis, temperature, reduction):
    x, y = describe(p_logits, "p_logits"), describe(q_logits, "q_logits")
    checks.same_shape(y.shadow, "q_logits", x.shadow, "p_logits")
    same_storage(y, x)
    axis = checks.class_axis(axis, x.shadow.shape, "p_logits")
    t = checks.temperature(temperature)
    checks.reduction(reduction)
    before, after = x.shadow.shape[:axis], x.shadow.shape[axis + 1 :]
    return x, y, axis, t, before + after, (*before, 1, *after)


def forward(operation, p_logits, q_logits, axis, temperature, reduction, stream):
    x, y, axis, t, outer, kept = checked(p_logits, q_logits, axis, temperature, reduction)
    storage = computing_storage(x.result_storage, t)
    kind = "f8" if storage == "f8" else "f4"
    precise = kind == "f8"
    numbers = elementary.scale_and_inverse(t, precise)
    rows = math.prod(outer)
    with Call(x, stream, q_logits=y) as call:
        result = call.result(outer if reduction == "none" else (), x.result_storage)
        each, of_each = result, x.result_storage
        if reduction != "none":
            each, of_each = call.temporary(outer, kind), kind

        def steps(where_from, aligned):
            prepared = forward_steps(
                operation, storage, of_each, numbers, where_from, aligned, call.ordinal, call.handle
            )
            return work_of(call, prepared, 3)

        if x.shadow.size:
            view = np.broadcast_to(each.shadow.reshape(kept), x.shadow.shape)
            operands = [Operand(a, a.shadow, storage, FULL) for a in (x, y)]
            call.over((axis,), [*operands, Operand(each, view, of_each, PER_ROW)], steps)
        if reduction != "none":
            divisor = float(rows) if reduction == "mean" else 1.0
            prepared = mean_steps(kind, x.result_storage, rows, divisor, call.ordinal, call.handle)
            call.launch(prepared, (each.address, result.address))
        return result.value


def backward(operation, grad, p_logits, q_logits, axis, temperature, reduction, out, stream):
    x, y, axis, t, outer, kept = checked(p_logits, q_logits, axis, temperature, reduction)
    g, grad = upstream(grad, reduction, outer, axis)
    out = optional(out, "out")
    shape = x.shadow.shape
    if out is not None:
        check_out(out, shape, x.result_storage, [y])
        checks.apart(out.shadow, [("grad", grad and grad.shadow), ("p_logits", x.shadow)])
    divisor = t * (math.prod(outer) if reduction == "mean" else 1)
    storage = computing_storage(x.result_storage, t)
    storage = computing_storage(storage, divisor / abs(g) if g else divisor)
    with Call(y, stream, grad=grad, p_logits=x, out=out) as call:
        dy = call.result(shape, x.result_storage) if out is None else out
        if not x.shadow.size:
            return dy.value
        precise = storage == "f8"
        numbers = *elementary.scale(t, precise), *elementary.quotient(g, divisor, precise)
        of_grad = None
        if grad is None:
            operands = [numbered(outer, axis, shape)]
        else:
            # g may be as narrow as the logits; else it is taken in the computing type
            of_grad = storage if grad.storage == storage or precise else "f4"
            if grad.storage != of_grad:
                given, grad = grad, call.temporary(grad.shadow.shape, of_grad)
                call.copied(given, given.shadow, grad, grad.shadow)
            view = grad.shadow.reshape(kept) if reduction == "none" else grad.shadow
            operands = [Operand(grad, np.broadcast_to(view, shape), of_grad, PER_ROW)]
        operands += [Operand(a, a.shadow, storage, FULL) for a in (x, y, dy)]

        def steps(where_from, aligned):
            prepared = backward_steps(
                operation, storage, of_grad, numbers, where_from, aligned, call.ordinal, call.handle
            )
            return work_of(call, prepared, 4)

        call.over((axis,), operands, steps)
        return dy.value
