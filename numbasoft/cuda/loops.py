"""Loops 1 to 3 of softmax and of log_softmax as they are defined: one kernel per step, nothing fused.

x and y are (outer, n, inner) with the softmax axis in the middle: the last axis of a matrix
has inner = 1, its first axis has outer = 1. Every slice x[i, :, k] is one softmax. A thread
does one slice where a step ends in one number, else one element.
"""

import math

from numba import cuda


@cuda.jit
def maximum(
    x,  # IN   (outer, n, inner)
    m,  # OUT  (outer, inner)
):
    """loop 1: the maximum over the softmax axis"""
    outer, n, inner = x.shape
    t = cuda.grid(1)
    if t < outer * inner:
        i, k = t // inner, t % inner
        m[i, k] = -math.inf
        for j in range(n):
            m[i, k] = max(m[i, k], x[i, j, k])


@cuda.jit
def exponentials(
    x,  # IN   (outer, n, inner)
    m,  # IN   (outer, inner)
    e,  # OUT  (outer, n, inner)
):
    """loop 2: exp of every element after the shift"""
    outer, n, inner = x.shape
    t = cuda.grid(1)
    if t < outer * n * inner:
        i, j, k = t // inner // n, t // inner % n, t % inner
        e[i, j, k] = math.exp(x[i, j, k] - m[i, k])


@cuda.jit
def sums(
    e,  # IN   (outer, n, inner)
    s,  # OUT  (outer, inner)
):
    """loop 3: the sum over the softmax axis"""
    outer, n, inner = e.shape
    t = cuda.grid(1)
    if t < outer * inner:
        i, k = t // inner, t % inner
        s[i, k] = 0
        for j in range(n):
            s[i, k] += e[i, j, k]
