"""Calls of kernels that treat every element alike, on device arrays; the twin of ``numbasoft.elementwise``.

Arrays whose elements lie one behind the other, in any order of axes, are one long row; so are parts of
an array row by row. What lies otherwise, or is of another dtype than is computed in, is copied first.
"""

from functools import lru_cache, partial

import numpy as np

from .. import checks, elementary
from . import arrays, geometry, layout, operations, totals
from .arrays import describe
from .calls import (
    FULL,
    OWN,
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
)


@lru_cache(maxsize=4096)
def steps_of(operation, storage, extra, numbers, where_from, aligned, ordinal, handle):
    """One kernel: ``where_from`` has ``Rows`` of all arrays, the result last; ``extra`` are more of its options."""
    factory, few = operation
    rows, n, pitches, _ = where_from
    how, length = geometry.segments_launch(n, storage, aligned, few)
    segments = -(-n // length)
    *inputs, result = ((Slot(i), pitch) for i, pitch in enumerate(pitches))
    arguments = *sum(inputs, ()), rows, n, how.team, segments, length, *numbers, *result
    options = storage, how.vectors, aligned, *extra
    blocks = how.blocks(rows * segments)
    one = step(ordinal, handle, factory, options, blocks, how.threads, geometry.MOST_THREADS, *arguments)
    return Prepared((one,), 0)


def over_elements(call, operands, steps):
    """Launch ``steps(where_from, aligned)`` on operands of one shape, the last of them the result."""
    shape = operands[-1].view.shape
    operands = [in_order(call, o) if o.role is PER_ROW else o for o in operands]
    where_from = None
    if all(o.array.storage == o.storage for o in operands):
        itemsizes = [geometry.ITEMSIZE[o.storage] if o.role is FULL else 0 for o in operands]
        where_from = layout.of_elements(shape, [o.view.strides for o in operands], itemsizes)
    ready = operands
    if where_from is None:
        ready = [in_order(call, o, is_input=o is not operands[-1]) for o in operands]
        where_from = one_row(ready)
    addresses, aligned = placed(ready, where_from)
    call.launch(steps(where_from, aligned), addresses)
    if ready[-1] is not operands[-1]:
        call.copied(ready[-1].array, ready[-1].view, operands[-1].array, operands[-1].view)


def in_order(call, operand, is_input=True):
    """An operand in C order and of the storage that kernels take: itself, or a copy."""
    array, view, storage, role = operand
    source = view if role is FULL else array.shadow
    if array.storage == storage and (role in (PER_ROW, OWN) or view.flags.c_contiguous):
        return operand
    copy = call.temporary(source.shape, storage)
    if is_input:
        call.copied(array, source, copy, copy.shadow)
    return Operand(copy, np.broadcast_to(copy.shadow, view.shape), storage, role)


def one_row(operands):
    """The layout of operands in C order."""
    sizes = tuple(geometry.ITEMSIZE[o.storage] if o.role is FULL else 0 for o in operands)
    return layout.Rows(1, operands[-1].view.size, (0,) * len(sizes), sizes)


def placed(operands, where_from):
    """The addresses of operands, and whether their rows begin and end at multiples of 16 bytes."""
    addresses = tuple(o.view.ctypes.data for o in operands)
    full = [i for i, o in enumerate(operands) if o.role is FULL]
    aligned = layout.are_aligned(
        [addresses[i] for i in full],
        [where_from.pitches[i] for i in full] if where_from.rows > 1 else [],
        where_from.n,
        geometry.ITEMSIZE[operands[full[0]].storage],
    )
    return addresses, aligned


def same_storage(value, other):
    if value.storage != other.storage:
        raise TypeError(
            f"{value.name} has dtype {arrays.NAME[value.storage]}, but must have the dtype "
            f"{arrays.NAME[other.storage]} of {other.name}"
        )


def no_numbers(storage):
    return ()


def alike(operation, inputs, out, stream, numbers=no_numbers):
    """What an operation makes of arrays of one shape and dtype; ``numbers(storage)`` are its other arguments."""
    given, out = [describe(value, name) for name, value in inputs.items()], optional(out, "out")
    x = given[-1]
    for other in given[:-1]:
        checks.same_shape(other.shadow, other.name, x.shadow, x.name)
        same_storage(other, x)
    storage = x.result_storage
    if out is not None:
        check_out(out, x.shadow.shape, storage, given)
    with Call(x, stream, out=out, **dict(zip(inputs, given[:-1], strict=False))) as call:
        y = call.result(x.shadow.shape, storage) if out is None else out
        if y.shadow.size:
            of_kernel = numbers(storage)

            def steps(where_from, aligned):
                return steps_of(
                    operation, storage, (), of_kernel, where_from, aligned, call.ordinal, call.handle
                )

            over_elements(call, [Operand(a, a.shadow, storage, FULL) for a in (*given, y)], steps)
        return y.value


# Binary cross-entropy.


def of_two_classes(logits, target, pos_weight, reduction):
    """The arguments as device arrays, and the storage types of the result and to compute in."""
    x, t = describe(logits, "logits"), describe(target, "target")
    checks.same_shape(t.shadow, "target", x.shadow, "logits")
    weight = checks.not_negative(pos_weight, "pos_weight")
    checks.reduction(reduction)
    storage = computing = x.result_storage
    if t.storage in arrays.STORAGE.values() and t.storage != storage:
        computing = "f8" if "f8" in (t.storage, storage) else "f4"
    return x, t, storage, computing_storage(computing, weight or 1.0), weight


@lru_cache(maxsize=4096)
def binary_sum_steps(operation, storage, result_storage, numbers, divisor, n, aligned, ordinal, handle):
    """The sum of the losses of n logits and targets in C order, divided."""
    x, t, result, work = map(Slot, range(4))
    how, length = geometry.segments_launch(n, storage, aligned, operation.few)
    segments = -(-n // length) if n else 0
    kind = "f8" if storage == "f8" else "f4"
    one = partial(step, ordinal, handle)
    steps = [totals.last_step(one, kind, result_storage, segments, divisor, work, result)]
    if n:
        arguments = x, 0, t, 0, 1, n, how.team, segments, length, *numbers, work, 0
        options, blocks = (storage, how.vectors, aligned, True), how.blocks(segments)
        most = geometry.MOST_THREADS
        steps.insert(0, one(operation.kernel, options, blocks, how.threads, most, *arguments))
    return Prepared(tuple(steps), totals.FIELDS * max(1, segments))


def binary_cross_entropy(operation, logits, target, pos_weight, reduction, stream):
    x, t, result_storage, storage, weight = of_two_classes(logits, target, pos_weight, reduction)
    numbers = weight, *elementary.scale(1.0, storage == "f8")
    with Call(x, stream, target=t) as call:
        of_x, of_t = (Operand(a, a.shadow, storage, FULL) for a in (x, t))
        if reduction == "none":
            loss = call.result(x.shadow.shape, result_storage)

            def steps(where_from, aligned):
                return steps_of(
                    operation, storage, (False,), numbers, where_from, aligned, call.ordinal, call.handle
                )

            if x.shadow.size:
                over_elements(call, [of_x, of_t, Operand(loss, loss.shadow, storage, FULL)], steps)
            return loss.value
        n = x.shadow.size
        loss = call.result((), result_storage)
        divisor = float(n) if reduction == "mean" else 1.0
        ready = [in_order(call, o) if n else o for o in (of_x, of_t)]
        addresses, aligned = placed(ready, one_row(ready))
        prepared = binary_sum_steps(
            operation, storage, result_storage, numbers, divisor, n, aligned, call.ordinal, call.handle
        )
        call.launch(prepared, (*addresses, loss.address))
        return loss.value


def binary_cross_entropy_backward(operation, grad, logits, target, pos_weight, reduction, out, stream):
    x, t, result_storage, storage, weight = of_two_classes(logits, target, pos_weight, reduction)
    shape, n = x.shadow.shape, x.shadow.size
    g, grad = upstream(grad, reduction, shape)
    out = optional(out, "out")
    if out is not None:
        check_out(out, shape, result_storage, [x])
        checks.apart(out.shadow, [("grad", grad and grad.shadow), ("target", t.shadow)])
    divisor = float(n or 1) if reduction == "mean" else 1.0
    storage = computing_storage(storage, abs(g) / divisor if g else 1.0)
    if reduction == "none" and grad is not None and grad.storage != storage and storage in ("f2", "b2"):
        storage = "f4"  # what 16 bits may not hold
    with Call(x, stream, grad=grad, target=t, out=out) as call:
        dx = call.result(shape, result_storage) if out is None else out
        if not n:
            return dx.value
        precise = storage == "f8"
        numbers = weight, *elementary.scale(1.0, precise), *elementary.quotient(g, divisor, precise)
        of_x, of_t, of_dx = (Operand(a, a.shadow, storage, FULL) for a in (x, t, dx))
        of_grad = None
        if grad is None:
            of_g, of_grad = numbered((), (), shape), operations.NUMBER
        elif reduction == "none":
            of_g = Operand(grad, grad.shadow, storage, FULL)
        else:
            # a g for all may be as narrow as x; else it is taken in the computing type
            of_grad = storage if grad.storage == storage or precise else "f4"
            of_g = Operand(grad, np.broadcast_to(grad.shadow, shape), of_grad, PER_ROW)

        def steps(where_from, aligned):
            return steps_of(
                operation, storage, (of_grad,), numbers, where_from, aligned, call.ordinal, call.handle
            )

        over_elements(call, [of_x, of_t, of_g, of_dx], steps)
        return dx.value
