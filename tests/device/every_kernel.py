"""Calls that launch every production kernel, on small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/device/every_kernel.py f4

and so with racecheck, initcheck and synccheck, and with f2, b2 and f8. tests/test_cuda_gpu.py runs all of
them; that no kernel is left out is tested without a GPU (launched.py).
"""

import sys

import numpy as np
from numba import cuda

import numbasoft
from numbasoft.cuda import geometry
from numbasoft.cuda.arrays import NAME, bfloat16

ROWS = 3


def widths(storage):
    """Of every number of vectors, aligned and not, in pairs and not: a width for a warp and one for more."""
    lanes, found = geometry.lanes(storage), {}
    longest = geometry.MOST_THREADS * max(geometry.VECTORS[storage]) * lanes
    for in_pairs in False, True:
        for n in range(1, longest):
            for aligned, width in ((False, n), (True, n * lanes)):
                how = geometry.rows_launch(width, storage, aligned, in_pairs)
                if how and (aligned or width % lanes):
                    found.setdefault((how.vectors, aligned, in_pairs, how.team > geometry.WARP), width)
    segments = longest + 1, longest + geometry.segment_length(storage) + lanes
    return sorted({*found.values(), *segments})


def zeros(shape, storage):
    if storage == "b2":  # which NumPy does not hand out
        return cuda.to_device(np.zeros(shape, np.uint16)).view(bfloat16())
    return cuda.to_device(np.zeros(shape, NAME[storage]))


def forward_and_backward(x, mask, axis):
    for where in None, mask:
        y = numbasoft.softmax(x, axis, where=where)
        log_y = numbasoft.log_softmax(x, axis, where=where)
        lse = numbasoft.logsumexp(x, axis, where=where)
    numbasoft.softmax_backward(x, y, axis)
    numbasoft.log_softmax_backward(x, log_y, axis)
    numbasoft.logsumexp_backward(lse, x, lse, axis)


def call_every_kernel(storage):
    for n in widths(storage):
        mask = cuda.to_device(np.arange(ROWS * n).reshape(ROWS, n) % 3 > 0)
        forward_and_backward(zeros((ROWS, n), storage), mask, -1)
    mask = cuda.to_device(np.arange(37 * 35).reshape(37, 35) % 3 > 0)
    forward_and_backward(zeros((37, 35), storage), mask, 0)
    # what no kernel reads in place: two axes apart, integers, and temperatures that only float64 holds
    numbasoft.softmax(zeros((5, 7, 9), storage), (0, 2))
    numbasoft.softmax(zeros((5, 7), "i4"))
    numbasoft.softmax(zeros((5, 7), storage), temperature=1e-35 if storage == "f4" else 1.0)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        call_every_kernel(given)
    cuda.synchronize()
