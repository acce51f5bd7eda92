"""The logarithm of a row's sum, also where one term is nearly all of it."""

import math

from .elementary import largest
from .jit import inline
from .passes import row_others
from .tiles import CONFIDENT, log_of_others


@inline
def log_of_total(x, at, n, m, is_top, shift, high, low, total, lost):
    """log(sum exp(x - m)), where a sum that m dominates by far is taken once more without it."""
    rest = (total - largest(x)) + lost
    if is_top and rest < total * CONFIDENT:
        s = row_others(x, at, None, 0, n, m, shift, high, low)
        return log_of_parts(x, True, s[0] + s[1], 0.0)
    return log_of_parts(x, is_top, rest, total + lost)


@inline
def log_of_parts(like, is_top, others, total):
    """log(sum exp(x - m)) from the sum, or from that without one maximum where ``is_top``."""
    return log_of_others(others, 0.0, like) if is_top else math.log(total / largest(like))
