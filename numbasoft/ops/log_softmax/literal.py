"""log_softmax as it is defined: one loop nest per step over the whole array, nothing fused.

x and y are (outer, n, inner) with the softmax axis in the middle: the last axis of a matrix
has inner = 1, its first axis has outer = 1. Every slice x[i, :, k] is one log_softmax.
"""

import math

import numpy as np
from numba import prange

from ...jit import parallel_kernel


@parallel_kernel
def log_softmax_loops(
    x,  # IN   (outer, n, inner)
    m,  # WORK (outer, inner)
    e,  # WORK (outer, n, inner), for loop 3 alone: the result is made without them
    s,  # WORK (outer, inner)
    log_s,  # WORK (outer, inner)
    y,  # OUT  (outer, n, inner)
):
    outer, n, inner = x.shape

    # loop 1: the maximum over the softmax axis
    for i in prange(outer):
        for k in range(inner):
            m[i, k] = -np.inf
            for j in range(n):
                m[i, k] = max(m[i, k], x[i, j, k])

    # loop 2: exp of every element after the shift
    for i in prange(outer):
        for j in range(n):
            for k in range(inner):
                e[i, j, k] = math.exp(x[i, j, k] - m[i, k])

    # loop 3: the sum over the softmax axis
    for i in prange(outer):
        for k in range(inner):
            s[i, k] = 0.0
            for j in range(n):
                s[i, k] += e[i, j, k]

    # loop 4: the log of every sum
    for i in prange(outer):
        for k in range(inner):
            log_s[i, k] = math.log(s[i, k])

    # loop 5: every element less its maximum and its log
    for i in prange(outer):
        for j in range(n):
            for k in range(inner):
                y[i, j, k] = x[i, j, k] - m[i, k] - log_s[i, k]
