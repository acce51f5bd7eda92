"""The logarithm of a row's sum, also where one term is nearly all of it."""

import math

from numba import types
from numba.extending import overload

from .elementary import largest, logarithm
from .jit import INLINE, inline
from .passes import row_others
from .tiles import CONFIDENT, log_of_others
from .vector import filled, load, max_across, maximum, select, store


@inline
def log_of_total(x, at, n, m, is_top, shift, high, low, total, lost):
    """log(sum exp(x - m)), where a sum that m dominates by far is taken once more without it."""
    return log_of_parts(others_of(x, at, n, m, is_top, shift, high, low, total, lost), total + lost, x)


@inline
def others_of(x, at, n, m, is_top, shift, high, low, total, lost):
    """The sum without one maximum where ``is_top``, else -1."""
    rest = (total - largest(x)) + lost
    if is_top and rest < total * CONFIDENT:
        s = row_others(x, at, None, 0, n, m, shift, high, low)
        return s[0] + s[1]
    return rest if is_top else -1.0


@inline
def log_of_parts(others, total, like):
    """log(sum exp(x - m)) from the sum, or from that without one maximum where it is not -1."""
    return math.log(total / largest(like)) if others == -1.0 else log_of_others(others, 0.0, like)


def logs_of_parts(others, total, count, like, logs):
    """``log_of_parts`` for every row of a tile."""


@overload(logs_of_parts, **INLINE)
def logs_of_parts_by_type(others, total, count, like, logs):
    return logs_of_parts_64 if like.dtype == types.float64 else logs_of_parts_32


def logs_of_parts_64(others, total, count, like, logs):
    for r in range(count):
        logs[r] = log_of_parts(others[r], total[r], like)


def logs_of_parts_32(others, total, count, like, logs):
    most = filled(others, 0.0)
    for r in range(0, count, 8):
        v = load(others, r)
        rest, whole = v * (1.0 / largest(like)), load(total, r) * (1.0 / largest(like))
        store(logs, r, logarithm(select(rest < 0.0, whole, rest + 1.0)))
        most = maximum(select(v < 0.0, 0.0, CONFIDENT * largest(like) - v), most)
    if max_across(most) > 0.0:
        for r in range(count):
            if 0.0 <= others[r] < CONFIDENT * largest(like):
                logs[r] = log_of_others(others[r], 0.0, like)
