"""log_softmax as it is defined, on CUDA: one kernel per step over the whole array, nothing fused.

x and y are (outer, n, inner) with the softmax axis in the middle: the last axis of a matrix
has inner = 1, its first axis has outer = 1. Every slice x[i, :, k] is one log_softmax. A
thread does one slice where a step ends in one number, else one element.
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
    e,  # OUT  (outer, n, inner), for loop 3 alone: the result is made without them
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
