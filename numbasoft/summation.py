"""Sums over a row that lose nothing as rows grow, in an order fixed by the row's length.

A running sum is a pair of vectors: the sum, and what all its additions lost. At the end
the lanes are combined half with half.

Sources: T. J. Dekker, "A floating-point technique for extending the available
precision", Numer. Math. 18 (1971) 224-242 (sums of exponentials); T. Ogita, S. M. Rump,
S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005) 1955-1988.
"""

from numba import types
from numba.extending import overload

from .elementary import OFFSET_64, two_sum
from .jit import INLINE
from .vector import fma, folded, splat, sum_of_pairs, widened

# Sums of exponentials start at a number larger than any exponential, which is taken away at
# the end: so the sum is always the larger operand, and what an addition loses takes two
# operations instead of five. In float32 the halves of a vector are added first: that one
# rounding is at most 0.25 ULP of the row's largest exponential, because OFFSET_32 puts that
# just below a power of two. Collecting in float64 lanes took a quarter more time.
START_32, START_64 = 2.0**61, 2.0 ** (OFFSET_64 + 1)


def sum_start(like):
    """An empty sum of vectors of exponentials, for ``sum_push``."""


@overload(sum_start, **INLINE)
def sum_start_by_type(like):
    if like.element == types.float64:
        return lambda like: (splat(like, START_64), splat(like, 0.0))
    return lambda like: (splat(folded(like), START_32), splat(folded(like), 0.0))


def sum_push(total, v):
    """Add a vector of exponentials to a sum."""


@overload(sum_push, **INLINE)
def sum_push_by_type(total, v):
    return sum_push_64 if v.element == types.float64 else sum_push_32


def sum_push_32(total, v):
    v = folded(v)
    high = total[0] + v
    return high, total[1] + (v - (high - total[0]))


def sum_push_64(total, v):
    high = total[0] + v
    return high, total[1] + (v - (high - total[0]))


def sum_finish(total):
    """The sum of all lanes as two float64 numbers, the second a correction of the first."""


@overload(sum_finish, **INLINE)
def sum_finish_by_type(total):
    if total[0].element == types.float64:
        return lambda total: sum_of_pairs(total[0] - START_64, total[1])
    return lambda total: sum_of_pairs(widened(total[0]) - START_32, widened(total[1]))


def dot_start(like):
    """An empty sum for ``dot_push`` and ``exact_push``; sum it up with ``sum_of_pairs``."""


@overload(dot_start, **INLINE)
def dot_start_by_type(like):
    return dot_start_64 if like.element == types.float64 else dot_start_32


def dot_start_32(like):
    zero = splat(widened(like), 0.0)
    return zero, zero


def dot_start_64(like):
    zero = splat(like, 0.0)
    return zero, zero


def dot_push(total, a, b):
    """Add a * b to a sum of products, without the rounding of the product."""


@overload(dot_push, **INLINE)
def dot_push_by_type(total, a, b):
    return dot_push_64 if a.element == types.float64 else dot_push_32


def dot_push_32(total, a, b):
    return fma(widened(a), widened(b), total[0]), total[1]


def dot_push_64(total, a, b):
    product = a * b
    high, lost = two_sum(total[0], product)
    return high, total[1] + (lost + fma(a, b, 0.0 - product))


def exact_push(total, v):
    """Add a vector to a sum that may stay small, where ``sum_push`` is exact for large ones only."""


@overload(exact_push, **INLINE)
def exact_push_by_type(total, v):
    return exact_push_64 if v.element == types.float64 else exact_push_32


def exact_push_32(total, v):
    return total[0] + widened(v), total[1]


def exact_push_64(total, v):
    high, lost = two_sum(total[0], v)
    return high, total[1] + lost
