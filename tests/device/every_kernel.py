"""Calls that launch every production kernel, on small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/device/every_kernel.py f4

and so with racecheck, initcheck and synccheck, and with f2, b2 and f8. tests/test_cuda_gpu.py runs all of
them; that no kernel is left out is tested without a GPU (launched.py).
"""

import contextlib
import sys

import numpy as np
from numba import cuda

import numbasoft
from numbasoft.cuda import calls, geometry
from numbasoft.cuda.arrays import NAME, bfloat16

ROWS = 3


def widths(storage, **held):
    """Of every number of vectors, aligned and not: a width for a warp and one for more; and of long rows.

    ``held`` says what of a row threads hold, as for ``geometry.rows_launch``.
    """
    lanes, found = geometry.lanes(storage), {}
    longest = geometry.MOST_THREADS * max(geometry.VECTORS[storage]) * lanes
    for n in range(1, longest):
        for aligned, width in ((False, n), (True, n * lanes)):
            how = geometry.rows_launch(width, storage, aligned, **held)
            if how and (aligned or width % lanes):
                found.setdefault((how.vectors, aligned, how.team > geometry.WARP), width)
    segments = longest + 1, longest + geometry.segment_length(storage) + lanes
    return sorted({*found.values(), *segments})


def call_those_in_shared_memory(storage):
    """Rows just too long for registers, aligned and not, and so many that they fill the device."""
    longest = geometry.MOST_THREADS * max(geometry.VECTORS[storage]) * geometry.lanes(storage)
    for n in longest + 1, longest + geometry.lanes(storage):
        x = zeros((calls.room_of(cuda.get_current_device().id).multiprocessors, n), storage)
        forward_and_backward(x, cuda.to_device(np.arange(n) % 3 > 0), -1)


def lengths(storage):
    """Of arrays without rows: of every number of vectors, aligned and not, and of more than a segment."""
    lanes, found = geometry.lanes(storage), {}
    for few in False, True:
        for n in range(1, 3 * geometry.segment_length(storage)):
            how, length = geometry.segments_launch(n, storage, n % lanes == 0, few)
            found.setdefault((how.vectors, n % lanes == 0, length < n), n)
    return sorted(found.values())


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


def of_two_classes(x):
    """Losses of which no element needs another."""
    numbasoft.logit(numbasoft.sigmoid(x))
    numbasoft.sigmoid_backward(x, x)
    one = cuda.to_device(np.ones((), "f8" if x.dtype == np.float64 else "f4"))
    numbasoft.binary_cross_entropy(x, x, reduction="none")
    numbasoft.binary_cross_entropy_backward(x, x, x, reduction="none")
    numbasoft.binary_cross_entropy(x, x)
    for g in one, 1.0:
        numbasoft.binary_cross_entropy_backward(g, x, x)


def divergences(x, storage, axis):
    numbasoft.kl_divergence(x, x, axis=axis)
    numbasoft.kl_divergence(x, x, axis=axis, reduction="none")
    g = zeros([n for i, n in enumerate(x.shape) if i != axis % x.ndim], storage)
    numbasoft.kl_divergence_backward(g, x, x, axis=axis, reduction="none")


def losses(x, axis, soft):
    """Cross-entropy of classes, or of probabilities, in all its kinds."""
    n, rows = x.shape[axis], x.size // x.shape[axis]
    target = x if soft else cuda.to_device(np.arange(rows) % n)
    weight = cuda.to_device(np.ones(n, "f4"))
    for options in {}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": weight}:
        numbasoft.cross_entropy(x, target, axis=axis, reduction="none", **options)
        numbasoft.cross_entropy_value_and_grad(x, target, axis=axis, reduction="none", **options)
        numbasoft.cross_entropy_value_and_grad(x, target, axis=axis, **options)


def log_likelihoods(x, storage):
    one = cuda.to_device(np.ones(()))
    numbasoft.perplexity(x, cuda.to_device(np.zeros(len(x), "i8")))
    for target in np.zeros(len(x), "u1"), np.zeros(len(x), "i8"):
        target = cuda.to_device(target)
        numbasoft.nll_loss(x, target)
        numbasoft.nll_loss(x, target, reduction="none")
        numbasoft.nll_loss_backward(one, x, target)


def draws(x, axis=-1):
    numbasoft.sample(x, axis=axis, rng=1)
    numbasoft.sample(x, axis=axis, rng=1, top_k=3, top_p=0.9, min_p=0.001)
    numbasoft.gumbel_softmax(x, axis=axis, rng=1, hard=True)


def temperatures(x, axis=-1):
    """No temperature fits best to logits that are all the same: that is told by every kernel."""
    target = cuda.to_device(np.zeros(x.size // x.shape[axis], "i8"))
    with contextlib.suppress(ValueError):
        numbasoft.fit_temperature(x, target, axis=axis)


def call_every_kernel(storage):
    for n in 1, 31, 203, 1003, 9001:
        temperatures(zeros((ROWS, n), storage))
    temperatures(zeros((37, 35), storage), 0)
    for n in 1, 31, 203, 1003, 9001:
        draws(zeros((ROWS, n), storage))
    draws(zeros((37, 35), storage), 0)
    for n in sorted({*widths(storage), *widths(storage, in_pairs=True)}):
        mask = cuda.to_device(np.arange(ROWS * n).reshape(ROWS, n) % 3 > 0)
        forward_and_backward(zeros((ROWS, n), storage), mask, -1)
    call_those_in_shared_memory(storage)
    for n in lengths(storage):
        of_two_classes(zeros(n, storage))
    for n in sorted({*widths(storage, in_pairs=True), *widths(storage, heavy=True)}):
        divergences(zeros((ROWS, n), storage), storage, -1)
    for n in widths(storage):
        losses(zeros((ROWS, n), storage), -1, soft=False)
    for n in widths(storage, in_pairs=geometry.SHARES):
        for soft in False, True:
            losses(zeros((ROWS, n), storage), -1, soft)
    for soft in False, True:
        losses(zeros((37, 35), storage), 0, soft)
    divergences(zeros((37, 35), storage), storage, 0)
    many = zeros((300, 5), storage)  # so that their sum takes more than a warp
    log_likelihoods(many, storage)
    divergences(many, storage, -1)
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
