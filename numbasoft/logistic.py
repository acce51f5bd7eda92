"""The softmax of two classes, element by element: exp(-abs(x)) and log(1 + exp(-abs(x))) of vectors."""

from numba import types
from numba.extending import overload

from .elementary import coefficients, exponential, largest, shift_of
from .jit import INLINE, inline
from .tiles import first_lanes
from .vector import filled, fma, maximum, stack_array

# log(1 + r) = 2 atanh(s), s = r / (2 + r) <= 1/3, and atanh(s) = s + s**3 / 3 + s**5 / 5 + ...
TERMS_32, TERMS_64 = 8, 17


@inline
def no_shift(x, high, low):
    """The shift for exponentials of what is at most 0, for ``small_exponential``."""
    return first_lanes(shift_of(filled(x, 0.0), high, low), stack_array(x, 80))


@inline
def small_exponential(v, shift, high, low):
    """exp(-abs(v)) times ``largest``."""
    return exponential(0.0 - maximum(v, 0.0 - v), shift, high, low, coefficients(v))


def log_of_one_and(e, like):
    """log(1 + e / largest) for 0 <= e <= largest; within 2.5 ULP, also where e is small."""


@overload(log_of_one_and, **INLINE)
def log_of_one_and_by_type(e, like):
    terms = TERMS_64 if e.element == types.float64 else TERMS_32
    series = tuple(1.0 / (2 * k + 1) for k in range(terms, -1, -1))

    def body(e, like):
        r = e / largest(like)
        s = r / (r + 2.0)
        square = s * s
        p = square * series[0] + series[1]
        for c in series[2:]:
            p = fma(p, square, c)
        return s * p * 2.0

    return body
