"""log_softmax as it is defined, on CUDA: one kernel per step over the whole array, nothing fused.

Loops 1 to 3 are those of softmax too and stand in numbasoft/cuda/loops.py; what loop 2 gives
is for loop 3 alone. x and y are (outer, n, inner) with the softmax axis in the middle; every
slice x[i, :, k] is one log_softmax.
"""

import math

from numba import cuda

from ...cuda.loops import exponentials, maximum, sums

__all__ = ["differences", "exponentials", "logarithms", "maximum", "sums"]


@cuda.jit
def logarithms(
    s,  # IN   (outer, inner)
    log_s,  # OUT  (outer, inner)
):
    """loop 4: the log of every sum"""
    outer, inner = s.shape
    t = cuda.grid(1)
    if t < outer * inner:
        i, k = t // inner, t % inner
        log_s[i, k] = math.log(s[i, k])


@cuda.jit
def differences(
    x,  # IN   (outer, n, inner)
    m,  # IN   (outer, inner)
    log_s,  # IN   (outer, inner)
    y,  # OUT  (outer, n, inner)
):
    """loop 5: every element less its maximum and its log"""
    outer, n, inner = x.shape
    t = cuda.grid(1)
    if t < outer * n * inner:
        i, j, k = t // inner // n, t // inner % n, t % inner
        y[i, j, k] = x[i, j, k] - m[i, k] - log_s[i, k]
