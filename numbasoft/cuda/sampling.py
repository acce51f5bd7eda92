"""Draws from device arrays: checks, results, and which kernels are launched; the twin of ``numbasoft.ops.sample.api``.

Nothing here waits for the device, so a row without probabilities cannot be refused.
"""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from .. import checks, elementary
from . import calls, geometry
from .arrays import describe
from .calls import FULL, OWN, Operand, Prepared, Slot
from .elementary import arithmetic

# A weight has at most so many bits, and the sum of a row's fewer than 62.
WEIGHT_BITS, SUM_BITS = 46, 62
# What is a smaller part of the largest probability has no weight.
NOTHING = 2.0**-60
# A block passes over whole rows, by indices of 32 bits that also count what it has in hand behind a row's end.
LONGEST = 2**31 - 2**15


class Given(NamedTuple):
    """The arguments of a call, checked."""

    x: Any
    axis: int
    outer: tuple[int, ...]
    temperature: float
    storage: str  # that rows are read in

    @property
    def compute(self):
        return "f8" if self.storage == "f8" else "f4"

    def operand(self):
        return Operand(self.x, self.x.shadow, self.storage, FULL)

    def per_row(self, array):
        """A contiguous array of one element a row as an operand of the shape of the logits."""
        over = np.broadcast_to(np.expand_dims(array.shadow, self.axis), self.x.shadow.shape)
        return Operand(array, over, array.storage, OWN)


def checked(logits, axis, temperature):
    x = describe(logits, "logits")
    shape = x.shadow.shape
    axis = checks.class_axis(axis, shape, "logits")
    if shape[axis] > LONGEST:
        raise ValueError(f"logits has {shape[axis]} elements in a row; kernels that draw count to {LONGEST}")
    t = checks.temperature(temperature)
    storage = calls.computing_storage(x.result_storage, t)
    return Given(x, axis, shape[:axis] + shape[axis + 1 :], t, storage)


@lru_cache(maxsize=4096)
def draw_steps(operation, storage, temperature, top_k, top_p, min_p, where_from, ordinal, handle):
    """The launch of a draw; after the addresses of logits and result comes the key."""
    kind = "f8" if storage == "f8" else "f4"
    rows, n, (pitch, _), _ = where_from
    x, drawn, key = map(Slot, range(3))
    largest = arithmetic(kind).largest
    unit = 2.0 ** min(WEIGHT_BITS, SUM_BITS - n.bit_length()) / largest
    filtered = (top_k or n) < n or top_p < 1 or min_p > 0
    has_p = filtered and top_p < 1
    part = int(math.ldexp(top_p, 64)) if has_p else 0
    threads, group = geometry.draw_launch(n, storage)
    arguments = (
        x, pitch, n, group, key, min(top_k or n, n), has_p, signed(part), max(min_p, NOTHING) * largest, unit,
        *elementary.scale(temperature, kind == "f8"), drawn,
    )  # fmt: skip
    most = geometry.draw_bounds(storage)
    one = calls.step(ordinal, handle, operation.draw, (storage, filtered), rows, threads, most, *arguments)
    return Prepared((one,), 0)


def signed(value):
    """The int64 of the bits of a uint64."""
    return value - (value >> 63 << 64)


def draw(operation, given, key, top_k, top_p, min_p, stream):
    """``sample`` of device arrays."""
    with calls.Call(given.x, stream) as call:
        drawn = call.result(given.outer, "i8")
        if drawn.shadow.size:
            of_call = call.ordinal, call.handle
            launches = partial(draw_steps, operation, given.storage, given.temperature, top_k, top_p, min_p)

            def steps(where_from, aligned):
                return launches(where_from, *of_call)

            operands = given.operand(), given.per_row(drawn)
            call.over((given.axis,), operands, steps, (key,), columns=False)
        return drawn.value


@lru_cache(maxsize=4096)
def relaxed_steps(operation, kind, temperature, where_from, ordinal, handle):
    """The launch for logits with noise; after the addresses of logits and result comes the key."""
    rows, n, (x_pitch, y_pitch), _ = where_from
    x, y, key = map(Slot, range(3))
    threads, most = geometry.relaxed_threads(n), geometry.RELAXED_THREADS
    arguments = x, x_pitch, n, key, *elementary.scale(temperature, kind == "f8"), y, y_pitch
    one = calls.step(ordinal, handle, operation.relaxed, (kind,), rows, threads, most, *arguments)
    return Prepared((one,), 0)


@lru_cache(maxsize=4096)
def hardened_steps(operation, storage, where_from, ordinal, handle):
    rows, n, (y_pitch, drawn_pitch), _ = where_from
    threads, most = geometry.relaxed_threads(n), geometry.RELAXED_THREADS
    arguments = Slot(0), y_pitch, n, -math.inf, Slot(1), drawn_pitch
    one = calls.step(ordinal, handle, operation.hardened, (storage,), rows, threads, most, *arguments)
    return Prepared((one,), 0)


def relaxed(operation, given, key, hard, out, stream):
    """``gumbel_softmax`` of device arrays."""
    x, kind = given.x, given.compute
    shape, out = x.shadow.shape, calls.optional(out, "out")
    if out is not None:
        calls.check_out(out, shape, x.result_storage, [x])
    with calls.Call(x, stream, out=out) as call:
        y = call.result(shape, x.result_storage) if out is None else out
        if not y.shadow.size:
            return y.value

        def steps(where_from, aligned):
            of_call = where_from, call.ordinal, call.handle
            return relaxed_steps(operation, kind, given.temperature, *of_call)

        def last_steps(where_from, aligned):
            return hardened_steps(operation, y.storage, where_from, call.ordinal, call.handle)

        axes, operands = (given.axis,), [Operand(a, a.shadow, kind, FULL) for a in (x, y)]
        call.over(axes, operands, steps, (key,), columns=False)
        if hard:
            operands = [Operand(y, y.shadow, y.storage, FULL) for _ in range(2)]
            call.over(axes, operands, last_steps, columns=False)
        return y.value
