"""Loops 4 and 5 for whoever needs a logarithm of a row's sum: logsumexp, log_softmax and the losses.

``gradient`` chooses the arithmetic (see ``numbasoft.cuda.elementary.arithmetic_of``); the sums must be of the same.
"""

from functools import lru_cache

from . import jit
from .backend import absolute, fma, mask_of, select
from .elementary import arithmetic_of, two_sum

INFINITY, NAN = float("inf"), float("nan")


@lru_cache
def results(storage, gradient=False):
    """Loop 4, and the maximum added to it."""
    a = arithmetic_of(storage, gradient)
    shift_of, exponential, log_of_sum = a.shift_of, a.exponential, a.log_of_sum

    @jit.device
    def result_of(m, second, maxima, total, high, low, inverse, inverse_rest):
        """m / T + log(sum); an infinite m is the result."""
        e = exponential(second, shift_of(m, high, low), high, low)
        log, log_rest = log_of_sum(m, maxima - 1, total, e)
        product = m * inverse
        s, lost = two_sum(product, log)
        lost = lost + (fma(m, inverse_rest, fma(m, inverse, 0.0 - product)) + log_rest)
        s = select(lost == lost, s + lost, s)
        return select(absolute(m) == INFINITY, m, s)

    return result_of


@lru_cache
def logarithms(storage, gradient=False):
    """Loop 5 for a thread's elements, and what it needs once for every row."""
    a = arithmetic_of(storage, gradient)
    shift_of, exponential, log_of_sum = a.shift_of, a.exponential, a.log_of_sum
    is_short = storage in ("f2", "b2") and not gradient

    @jit.device
    def log_of_row(m, second, maxima, total, high, low):
        """The log of the sum relative to the maximum, in two parts; NaN where there is no finite answer."""
        e = exponential(second, shift_of(m, high, low), high, low)
        log, lost = log_of_sum(m, maxima - 1, total, e)
        return select(absolute(m) < INFINITY, log, NAN), lost

    @jit.device
    def logarithm(v, m, inverse, inverse_rest, log, is_empty):
        """(v - m) / T - log, the difference and log in two parts each, so nothing is lost near 0."""
        # quarters: v - m may overflow though its quotient by T does not
        d, lost = two_sum(v * 0.25, m * -0.25)
        y = fma(d, inverse * 4.0, 0.0 - log[0])
        rest = fma(d, inverse_rest * 4.0, fma(lost, inverse * 4.0, 0.0 - log[1]))
        return select(mask_of(is_empty), -INFINITY, select(y == -INFINITY, y, y + rest))

    @jit.device
    def short_logarithm(v, m, inverse, inverse_rest, log, is_empty):
        """As ``logarithm``, for results of 16 bits."""
        y = fma(fma(v, 0.25, m * -0.25), inverse * 4.0, 0.0 - log[0])
        return select(mask_of(is_empty), -INFINITY, y)

    return log_of_row, short_logarithm if is_short else logarithm
