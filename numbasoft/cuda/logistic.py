"""The softmax of two classes, element by element, for device code; the twin of ``numbasoft.logistic``."""

from functools import lru_cache
from types import SimpleNamespace

from .. import logistic
from . import jit
from .backend import absolute, number, select
from .elementary import arithmetic_of, polynomial_of


@lru_cache
def logistic_of(storage, gradient=False):
    """The device functions for results of a storage type."""
    a = arithmetic_of(storage, gradient)
    exponential, shift_of, largest = a.exponential, a.shift_of, a.largest
    terms = logistic.TERMS_64 if a.compute == "f8" else logistic.TERMS_32
    artanh = polynomial_of(tuple(1.0 / (2 * k + 1) for k in range(terms + 1)))

    @jit.device
    def small_exponential(v, high, low):
        """exp(-abs(v)) times ``largest``."""
        return exponential(0.0 - absolute(v), shift_of(number(high, 0.0), high, low), high, low)

    @jit.device
    def log_of_one_and(e):
        """log(1 + e / largest) for 0 <= e <= largest; within 2.5 ULP, also where e is small."""
        r = e * (1.0 / largest)
        s = r / (r + 2.0)
        return (s + s) * artanh(s * s)

    @jit.device
    def sides_of(v, e):
        """1 / (1 + exp(-v)) and 1 / (1 + exp(v)), from ``small_exponential``."""
        s = e + largest
        near, far = largest / s, e / s
        return select(v >= 0.0, near, far), select(v >= 0.0, far, near)

    @jit.device
    def logistic_function(v, high, low):
        """1 / (1 + exp(-v)) as 1 / (1 + e) or e / (1 + e) with e = exp(-abs(v))."""
        e = small_exponential(v, high, low)
        return select(v >= 0.0, largest, e) / (e + largest)

    return SimpleNamespace(
        compute=a.compute, small_exponential=small_exponential, log_of_one_and=log_of_one_and,
        sides_of=sides_of, logistic=logistic_function,
    )  # fmt: skip
