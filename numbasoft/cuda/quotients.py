"""Loop 4 of softmax: every exponential divided by the sum."""

from functools import lru_cache

from . import jit
from .backend import fma, mask_of, select
from .elementary import arithmetic_of

INFINITY, NAN = float("inf"), float("nan")


@lru_cache
def quotients(storage):
    """Loop 4 for a thread's elements, and what it needs once for every row."""
    a = arithmetic_of(storage)
    pair_of, reciprocal = a.pair_of, a.reciprocal

    @jit.device
    def factor(m, total):
        """1 / sum in two parts; NaN where the row has no finite answer."""
        s, lost = pair_of(m, total)
        r, r_rest = reciprocal(s, lost)
        return select(m < INFINITY, r, NAN), r_rest

    @jit.device
    def quotient(e, factor, is_empty):
        return select(mask_of(is_empty), 0.0, fma(e, factor[0], e * factor[1]))

    return factor, quotient
