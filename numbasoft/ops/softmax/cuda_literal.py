"""softmax as it is defined, on CUDA: one kernel per step over the whole array, nothing fused.

Loops 1 to 3 are those of log_softmax too and stand in numbasoft/cuda/loops.py. x and y are
(outer, n, inner) with the softmax axis in the middle; every slice x[i, :, k] is one softmax.
"""

from numba import cuda

from ...cuda.loops import exponentials, maximum, sums

__all__ = ["exponentials", "maximum", "quotients", "sums"]


@cuda.jit
def quotients(
    e,  # IN   (outer, n, inner)
    s,  # IN   (outer, inner)
    y,  # OUT  (outer, n, inner)
):
    """loop 4: every element divided by its sum"""
    outer, n, inner = e.shape
    t = cuda.grid(1)
    if t < outer * n * inner:
        i, j, k = t // inner // n, t // inner % n, t % inner
        y[i, j, k] = e[i, j, k] / s[i, k]
