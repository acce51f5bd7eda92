"""Copying blocks between layouts: a strided block of an array and a buffer of contiguous rows."""

import numpy as np
from numba import prange

from .jit import inline, kernel, parallel_kernel
from .launch import launch
from .vector import block_side, prefetch_to_write, row_at, transpose_block

TILE = 64  # elements of one side: the lines of both arrays stay in the first cache until used whole
LONG = 4  # elements of a row; in shorter ones NumPy takes longer for a row than for its elements
BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


@inline
def copy_rows(source, first, stop, to):
    """Copy the rows first <= i < stop tile by tile, so that every cache line is used whole."""
    side = block_side(source)
    columns, step, to_step = source.T, row_at(source.T, 1), row_at(to, 1)
    crossed = source.strides[0] == source.itemsize and to.strides[1] == to.itemsize
    # Of the array whose lines lie further apart few are open at a time: at distances
    # of a power of two they share one set of the first cache.
    near, far = (TILE, 2 * side) if abs(step) > abs(to_step) else (side, TILE)
    for i in range(first, stop, near):
        end = min(i + near, stop)
        for j in range(0, source.shape[1], far):
            last = min(j + far, source.shape[1])
            while crossed and j + 2 * side <= last:
                p = i
                if near == side:  # the lines to be written next: 5 %
                    for r in range(end, end + side):
                        prefetch_to_write(to, r * to_step + j)
                while p + side <= end:
                    transpose_block(columns, j * step + p, step, to, p * to_step + j, to_step)
                    p += side
                for r in range(p, end):
                    for c in range(j, j + 2 * side):
                        to[r, c] = source[r, c]
                j += 2 * side
            for c in range(j, last):
                for r in range(i, end):
                    to[r, c] = source[r, c]


@kernel
def copy_tiles(source, to):
    copy_rows(source, 0, source.shape[0], to)


@parallel_kernel
def copy_tiles_parallel(source, to, blocks):
    tiles = (source.shape[0] + TILE - 1) // TILE
    for b in prange(blocks):
        first, stop = b * tiles // blocks * TILE, (b + 1) * tiles // blocks * TILE
        copy_rows(source, first, min(stop, source.shape[0]), to)


def copy(to, source):
    """Copy a block of any layout and dtype into another of the same shape.

    NumPy's own copy takes 7 to 25 ns per element where the short axis is the contiguous one.
    """
    a, b = (as_matrix(source), as_matrix(to)) if source.dtype == to.dtype else (None, None)
    if a is None or b is None or a.shape != b.shape or 1 in a.shape or are_alike(a, b):
        assign(to, source)
        return
    if b.strides[0] == b.itemsize:
        a, b = a.T, b.T
    launch(copy_tiles, copy_tiles_parallel, a.dtype, (a,), (b,), -(-a.shape[0] // TILE), a.size)


def are_alike(a, b):
    """Whether both run along long rows, which NumPy copies twice as fast as ``copy_tiles``, whatever their steps."""
    return a.shape[1] >= LONG and all(abs(m.strides[1]) < abs(m.strides[0]) for m in (a, b))


def assign(to, source):
    """``copy`` by NumPy."""
    if to.dtype == source.dtype:
        np.copyto(to, source)
        return
    with np.errstate(over="ignore", under="ignore"):  # a float64 result may end at infinity, or at 0
        np.copyto(to, source, casting="unsafe")


def as_matrix(block):
    """The bits of a block as a matrix with its last axis as the columns, or None."""
    if block.ndim < 2 or not block.dtype.isnative or not block.flags.aligned or block.itemsize not in BITS:
        return None
    try:
        matrix = block.reshape((block.size // block.shape[-1], block.shape[-1]), copy=False)
    except ValueError:
        return None
    return matrix.view(BITS[block.itemsize])
