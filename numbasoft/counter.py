"""Random numbers that are a function of a key and a counter: the same on any thread, in any order.

Philox4x32-10 of J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011.
"""

import numpy as np

from .jit import inline

# Numba takes uint64 with a plain int for float64: every constant wears its type.
LOW, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIER_A, MULTIPLIER_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_A, WEYL_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

# Which numbers of a row's a function takes.
DRAW, NOISE = 0, 1


@inline
def philox(a, b, c, d, key_a, key_b):
    """Four random words of 32 bits from a counter of four and a key of two, all as uint64."""
    for _ in range(10):
        p, q = MULTIPLIER_A * a, MULTIPLIER_B * c
        a, b, c, d = (q >> SHIFT) ^ b ^ key_a, q & LOW, (p >> SHIFT) ^ d ^ key_b, p & LOW
        key_a, key_b = (key_a + WEYL_A) & LOW, (key_b + WEYL_B) & LOW
    return a, b, c, d


@inline
def uniforms(key, row, block, stream):
    """Two numbers between 0 and 1, odd multiples of 2**-53: the same for the same arguments."""
    key, row = np.uint64(key), np.uint64(row)
    a, b, c, d = philox(row & LOW, row >> SHIFT, np.uint64(block), np.uint64(stream), key & LOW, key >> SHIFT)
    return uniform(a, b), uniform(c, d)


@inline
def uniform(a, b):
    bits = (a >> np.uint64(6)) * np.uint64(1 << 26) + (b >> np.uint64(6))
    return (np.float64(bits) + 0.5) * 2.0**-52
