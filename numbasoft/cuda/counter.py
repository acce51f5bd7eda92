"""The random numbers of ``numbasoft.counter`` for device code."""

import numpy as np

from .. import counter
from . import jit

LOW, SHIFT = counter.LOW, counter.SHIFT

philox = jit.device(counter.philox)


@jit.device
def fractions(key, row, block, stream):
    """Two fractions of 2**64, odd multiples of 2**11: those of ``counter.uniforms``."""
    key, row = np.uint64(key), np.uint64(row)
    a, b, c, d = philox(row & LOW, row >> SHIFT, np.uint64(block), np.uint64(stream), key & LOW, key >> SHIFT)
    return fraction(a, b), fraction(c, d)


@jit.device
def fraction(a, b):
    return (np.int64(a) >> 6 << 38) + (np.int64(b) >> 6 << 12) + 2**11
