"""log_softmax on the CPU, forward and backward: the five loops, a tile of rows at a time."""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...columns import MOST as MOST_COLUMNS
from ...columns import exchanged, gathered, plane_logarithms, plane_sum, scattered, tile, tiles_of
from ...elementary import coefficients, exponential, largest, shift_of
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...narrow import (
    MOST,
    columns_of,
    exponentials_of,
    logarithms_of_rows,
    maxima_of,
    parts_in,
    rows_of,
    sums_of_columns,
)
from ...passes import (
    difference,
    exact_for_logarithms,
    filled_if_empty,
    plain,
    row_differences,
    row_exponentials,
    row_logarithms,
    row_others,
    row_range,
    row_sum,
    row_sum_and_range,
    segment_sum,
)
from ...past_caches import (
    TWO_VECTORS,
    Ranged,
    loaded,
    nothing_found,
    range_found,
    row_of,
    write_row,
)
from ...split import (
    blocks_of,
    keeps_nothing,
    logarithm_of_row,
    next_unit,
    place,
    row_shift,
    row_total,
    segment_count,
    shared_exponentials,
    shared_maxima,
    shared_others,
)
from ...summation import two_parts
from ...tiles import (
    ROWS,
    in_two_parts,
    log_of_others,
    logarithms_of_sums,
    prefetch_distance,
    rows_in_tile,
    shifts,
    subtrahends,
)
from ...vector import (
    drained,
    filled,
    fma,
    lanes,
    load,
    load_part,
    max_across,
    maximum,
    narrowed,
    prefetch,
    row_at,
    select,
    splat,
    stack_array,
    stack_block,
    store,
    store_part,
    widened,
)


@inline
def forward_rows(
    x,  # IN   (rows, n)
    mask,  # IN   (rows, n) bytes, 0 where an element counts as -inf; or None
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n)
):
    n = x.shape[1]
    m, bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    logarithm, maximum = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    inverse = (inverse_high, inverse_low)
    first, second = stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    i = start
    while i < stop:
        count = min(rows_in_tile(n), stop - i)
        ahead = prefetch_distance(x, count, stop - i - count)

        # loop 1: the maximum of every row, and the least element
        for r in range(count):
            m[r], bottom[r] = row_range(x, row_at(x, i + r), mask, row_at(mask, i + r), n)
            maximum[r] = m[r]
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction)

        # loops 2 and 3: the sum of exp of every element after the shift
        for r in range(count):
            shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
            at, mask_at, y_at = row_at(x, i + r), row_at(mask, i + r), row_at(y, i + r)
            total[r], lost[r] = row_exponentials(
                x, at, mask, mask_at, n, None, 0, shift, high, low, ahead, exact_for_logarithms(x), y, y_at
            )

        # loop 4: the logarithm of every sum
        shift = (c, magic, rest, lowest, fraction)
        logarithms_of_tile(x, i, mask, count, m, maximum, total, lost, shift, high, low, logarithm)
        subtracted(maximum, logarithm, count, inverse, first, second)

        # loop 5: the maximum and the logarithm of the sum subtracted from every element
        for r in range(count):
            y_at = row_at(y, i + r)
            at, mask_at, parts = row_at(x, i + r), row_at(mask, i + r), (first[r], second[r])
            if not filled_if_empty(x, mask, mask_at, n, m[r], y, y_at, n, -np.inf):
                subtract_row(x, at, mask, mask_at, n, m[r], inverse, parts, y, y_at)
        i += count


@inline
def logarithms_of_tile(
    x,  # IN   (rows, n)
    i,  # IN   the tile's first row
    mask,  # IN   (rows, n) bytes or None
    count,  # IN   how many rows
    m,  # IN   (ROWS,) as all of these: the maximum, and the same in float64
    maximum,
    total,  # IN   the sum of the exponentials in two parts
    lost,
    shift,  # IN   what it is of, in parts
    high,  # IN   log2(e) / T in two parts
    low,
    logarithm,  # OUT  log sum exp((x - m) / T)
):
    logarithms_of_sums(total, lost, maximum, count, x, logarithm)
    for r in range(count):
        if logarithm[r] < 0.0:
            of_row = (shift[0][r], shift[1][r], shift[2][r], shift[3][r], shift[4][r])
            at, mask_at = row_at(x, i + r), row_at(mask, i + r)
            s = row_others(x, at, mask, mask_at, x.shape[1], m[r], of_row, high, low)
            logarithm[r] = log_of_others(s[0], s[1], x)
        if m[r] == np.inf:
            logarithm[r] = np.nan


@inline
def subtracted(maximum, logarithm, count, inverse, first, second):
    """What loop 5 subtracts in every row, in two parts: m + l, or where T is not 1 l alone."""
    if inverse[0] == 1.0 and inverse[1] == 0.0:
        subtrahends(maximum, logarithm, count, first, second)
    else:
        in_two_parts(logarithm, count, first, second)


@inline
def subtract_row(x, at, mask, mask_at, n, m, inverse, parts, y, y_at):
    """Loop 5 over a row or a segment."""
    if inverse[0] == 1.0 and inverse[1] == 0.0:
        row_differences(x, at, mask, mask_at, n, parts, y, y_at)
    else:
        row_logarithms(x, at, mask, mask_at, n, m, inverse, parts, y, y_at)


@kernel
def forward(x, mask, high, low, inverse_high, inverse_low, y):
    forward_rows(x, mask, high, low, inverse_high, inverse_low, 0, x.shape[0], y)


@parallel_kernel
def forward_parallel(x, mask, high, low, inverse_high, inverse_low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        forward_rows(x, mask, high, low, inverse_high, inverse_low, start, stop, y)


class Differences(NamedTuple):
    """The logits of a row and what is to be subtracted from them, in two parts."""

    x: Any
    at: int
    first: float
    second: float

    def value_at(self, j, count):
        return difference(loaded(self.x, self.at + j, count), self.first, self.second)


@inline
def rows_past_caches(
    x,  # IN   (rows, n)
    high,  # IN   log2(e) in two parts: T is 1
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n) side by side
):
    n = x.shape[1]
    m, bottom, next_m = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    logarithm, maximum = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    line, found = stack_array(x, TWO_VECTORS), stack_array(x, TWO_VECTORS)
    i, count = start, 0
    while i < stop or count > 0:
        before, count = count, min(rows_in_tile(n), stop - i)

        # loop 1: the maximum of every row, and the least element, of the first tile
        for r in range(count):
            if i == start:
                m[r], bottom[r] = row_range(x, row_at(x, i + r), None, 0, n)
            maximum[r] = m[r]
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction)

        # loops 2 and 3: the sum of exp of every element after the shift;
        # beside them loop 5 of the tile before, and loop 1 of the next
        for r in range(count):
            k, shift = i - before + r, (c[r], magic[r], rest[r], lowest[r], fraction[r])
            differences = Differences(x, row_at(x, k), first[r], second[r])
            row = row_of(differences, y, k, r < before, start, stop, line)
            # where no more rows come, the last stands for them
            ranged = Ranged(x, row_at(x, min(i + count + r, stop - 1)), nothing_found(found))
            total[r], lost[r] = row_exponentials(
                x, row_at(x, i + r), None, 0, n,
                None, 0, shift, high, low, 0, exact_for_logarithms(x), None, 0, (row, ranged),
            )  # fmt: skip
            next_m[r], bottom[r] = range_found(ranged, n)

        # loop 5 by itself: rows that no row of this tile is beside
        for r in range(count, before):
            k = i - before + r
            differences = Differences(x, row_at(x, k), first[r], second[r])
            write_row(row_of(differences, y, k, True, start, stop, line), found)

        # loop 4: the logarithm of every sum
        shift = (c, magic, rest, lowest, fraction)
        logarithms_of_tile(x, i, None, count, m, maximum, total, lost, shift, high, low, logarithm)
        subtrahends(maximum, logarithm, count, first, second)
        for r in range(count):
            m[r] = next_m[r]
        i += count
    drained()


@kernel
def past_caches(x, high, low, y):
    """``forward`` where T is 1 for results larger than the last cache (see numbasoft.past_caches)."""
    rows_past_caches(x, high, low, 0, x.shape[0], y)


@parallel_kernel
def past_caches_parallel(x, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        rows_past_caches(x, high, low, b * rows // blocks, (b + 1) * rows // blocks, y)


@inline
def narrow_rows(
    x,  # IN   (rows, n) no longer than a vector
    high,  # IN   log2(e) in two parts: T is 1
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n)
):
    n, w = x.shape[1], lanes(x)
    columns, e, exact = stack_block(x.dtype, MOST), stack_block(x, MOST), exact_for_logarithms(x)
    part, rest = parts_in(exact, e, stack_block(x, MOST), stack_block(x, MOST))
    top, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(x, ROWS), stack_array(x, ROWS)
    for i in range(start, stop, w):
        columns_of(x, i, stop - i, columns)

        # loop 1: the maximum of every row, and the least element
        m = maxima_of(columns, n)

        # loops 2 to 4: exp of every element after the shift, the sum of every row and its logarithm
        exponentials_of(columns, n, shift_of(m, high, low), high, low, exact, e, part, rest)
        logarithms_of_rows(columns, e, rest, n, m, top, logarithm)
        for r in range(w):
            if top[r] == np.inf:
                logarithm[r] = np.nan
        subtrahends(top, logarithm, w, first, second)

        # loop 5: the maximum and the logarithm of the sum subtracted from every element
        one, two = load(first, 0), load(second, 0)
        for at in range(0, n * w, w):
            store(columns, at, difference(load(columns, at), one, two))
        rows_of(columns, y, i, stop - i)


@kernel
def narrow(x, high, low, y):
    """``forward`` for rows no longer than a vector where T is 1 (see numbasoft.narrow)."""
    narrow_rows(x, high, low, 0, x.shape[0], y)


@parallel_kernel
def narrow_parallel(x, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        narrow_rows(x, high, low, b * rows // blocks, (b + 1) * rows // blocks, y)


@inline
def column_tiles(
    x,  # IN   (outer, n, inner)
    high,  # IN   log2(e) in two parts: T is 1
    low,
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    y,  # OUT  (outer, n, inner)
):
    n, w, room = x.shape[1], lanes(x), work[block]
    m = stack_array(x, MOST_COLUMNS)
    top, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(x, ROWS), stack_array(x, ROWS)
    for u in range(start, stop):
        i, k, width = tile(x, planes, u)

        # loop 1: the maximum of every row, and the least element, of the first tile
        if u == start:
            gathered(x[i], k, width, room, 0, m)
        for p in range(0, width, w):
            # loops 2 to 4: the sum of exp of every element after the shift, and its logarithm
            plane_logarithms(room, p * n, n, load(m, p), high, low, exact_for_logarithms(x), top, logarithm)
            for r in range(w):
                if top[r] == np.inf:
                    logarithm[r] = np.nan
            subtrahends(top, logarithm, w, first, second)

            # loop 5: the maximum and the logarithm of the sum subtracted from every element
            one, two = load(first, 0), load(second, 0)
            for at in range(p * n, (p + w) * n, w):
                store(room, at, difference(load(room, at), one, two))

        # beside writing the result loop 1 of the next tile
        if u + 1 < stop:
            next_i, next_k, next_width = tile(x, planes, u + 1)
            exchanged(room, None, y[i], k, width, x[next_i], next_k, next_width, m)
        else:
            scattered(room, None, y[i], k, 0, width)


@kernel
def columns(x, high, low, planes, work, y):
    """``forward`` along an axis with others behind it, where T is 1 (see numbasoft.columns)."""
    column_tiles(x, high, low, planes, work, 0, tiles_of(x, planes, lanes(x)), 0, y)


@parallel_kernel
def columns_parallel(x, high, low, planes, work, y, blocks):
    tiles = tiles_of(x, planes, lanes(x))
    for b in prange(blocks):
        start, stop = b * tiles // blocks, (b + 1) * tiles // blocks
        column_tiles(x, high, low, planes, work, start, stop, np.int64(b), y)


@inline
def shared_rows(
    x,  # IN   (rows, n) few and long
    mask,  # IN   (rows, n) bytes or None
    high,  # IN   log2(e) / T in two parts
    low,
    inverse,  # IN   1 / T in two parts
    maxima,  # WORK (segments of all rows,), see numbasoft.split
    sums,  # WORK (segments of all rows, 2)
    others,  # WORK (segments of all rows, 2)
    turns,  # WORK (...,) counters
    y,  # OUT  (rows, n)
    block,  # IN   the thread, of so many
    blocks,
):
    # loop 1: the maximum of every row
    shared_maxima(x, mask, maxima, sums, turns, block, blocks)

    # loops 2 and 3: the sum of exp of every element after the shift
    exact = exact_for_logarithms(x)
    shared_exponentials(x, mask, maxima, high, low, exact, None, sums, turns, block, blocks)
    shared_others(x, mask, maxima, high, low, sums, others, turns, block, blocks)

    # loops 4 and 5: the logarithm of every sum; the maximum and it subtracted from every element
    unit = next_unit(turns, 3, block, blocks, maxima.size)
    while unit < maxima.size:
        subtract_segment(x, mask, maxima, sums, others, inverse, unit, y)
        unit = next_unit(turns, 3, block, blocks, maxima.size)


@inline
def subtract_segment(x, mask, maxima, sums, others, inverse, unit, y):
    n = x.shape[1]
    i, first, count = place(unit, n)
    maximum, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    one, two = stack_array(x, ROWS), stack_array(x, ROWS)
    at, mask_at, y_at = row_at(x, i) + first, row_at(mask, i) + first, row_at(y, i) + first
    if keeps_nothing(maxima, i, n) and filled_if_empty(
        x, mask, mask_at, count, -np.inf, y, y_at, count, -np.inf
    ):
        return
    m, log = logarithm_of_row(x, maxima, sums, others, i)
    maximum[0], logarithm[0] = m, log if m < np.inf else np.nan
    subtracted(maximum, logarithm, 1, inverse, one, two)
    subtract_row(x, at, mask, mask_at, count, m, inverse, (one[0], two[0]), y, y_at)


@kernel
def shared(x, mask, high, low, inverse_high, inverse_low, maxima, sums, others, turns, y):
    """``forward`` for few long rows, each shared by all threads (see numbasoft.split)."""
    shared_rows(x, mask, high, low, (inverse_high, inverse_low), maxima, sums, others, turns, y, 0, 1)


@parallel_kernel
def shared_parallel(x, mask, high, low, inverse_high, inverse_low, maxima, sums, others, turns, y, blocks):
    blocks = blocks_of(turns, blocks)
    for b in prange(blocks):
        shared_rows(
            x,
            mask,
            high,
            low,
            (inverse_high, inverse_low),
            maxima,
            sums,
            others,
            turns,
            y,
            np.int64(b),
            blocks,
        )


# A sum of gradients larger than this may lift a probability below the smallest float to a normal
# number; then its root is squared.
LARGE = 2.0**30
# The quotient of a smaller one by ``largest`` might underflow; then the exponentials are divided.
SMALL = 2.0**-30
# A logarithm above this, which no softmax gives, has an infinite exponential here.
ABOVE = 40.0
# A sum of float64 gradients that overflows is taken of gradients this much smaller.
SMALLER = 2.0**-40


@inline
def backward_rows(
    g,  # IN   (rows, n) the gradient with respect to log_y
    log_y,  # IN   (rows, n) what forward gave
    high,  # IN   log2(e) in two parts
    low,
    inverse,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) (g - exp(log_y) * sum g) / T
):
    n = g.shape[1]
    shift = row_shift(log_y, 0.0, high, low)  # of a maximum of 0: none
    for i in range(start, stop):
        g_at, at, dx_at = row_at(g, i), row_at(log_y, i), row_at(dx, i)
        g_ahead, ahead = prefetch_distance(g, 1, stop - i - 1), prefetch_distance(log_y, 1, stop - i - 1)
        total, least, most = row_sum_and_range(g, g_at, log_y, at, n)
        if inverse == 1.0 and SMALL <= abs(total[0]) < LARGE and least >= shift[3] and most <= ABOVE:
            plain_gradients(g, g_at, log_y, at, n, total, shift, high, low, g_ahead, ahead, dx, dx_at)
            continue
        size = 1.0
        if not np.isfinite(total[0]):
            total, size = row_sum(g, g_at, log_y, at, n, SMALLER), 1.0 / SMALLER
        gradients_of(g, g_at, log_y, at, n, total, size, shift, high, low, (inverse, inverse_low), dx, dx_at)


@inline
def plain_gradients(g, g_at, log_y, at, n, total, shift, high, low, g_ahead, ahead, dx, dx_at):
    """g - exp(log_y) * total over a row none of whose probabilities underflows: the bits of ``gradients_of``."""
    w = lanes(g)
    c = coefficients(filled(g, 0.0))
    unit = 1.0 / largest(g)
    t = two_parts((total[0] * unit, total[1] * unit), g)
    shift = plain(shift)
    j = 0
    while j + w <= n:
        prefetch(g, g_at + j + g_ahead)
        prefetch(log_y, at + j + ahead)
        e = exponential(load(log_y, at + j), shift, high, low, c)
        store(dx, dx_at + j, fma(e, 0.0 - t[0], load(g, g_at + j)) - e * t[1])
        j += w
    if j < n:
        e = exponential(load_part(log_y, at + j, n - j, 0.0), shift, high, low, c)
        a = load_part(g, g_at + j, n - j, 0.0)
        store_part(dx, dx_at + j, n - j, fma(e, 0.0 - t[0], a) - e * t[1])


@inline
def gradients_of(g, g_at, log_y, at, n, total, size, shift, high, low, inverse, dx, dx_at):
    """(g - exp(log_y) * total * size) / T over a row or a segment of it."""
    if inverse[0] == 1.0 and size == 1.0 and abs(total[0]) < LARGE:
        part = 1.0 / largest(g) if abs(total[0]) < SMALL else 1.0
        other_part = 1.0 / largest(g) / part
        both = two_parts((total[0] * other_part, total[1] * other_part), g)
        row_gradients(g, g_at, log_y, at, n, both, part, shift, high, low, None, dx, dx_at)
    else:
        is_root = not abs(total[0]) * size * max(inverse[0], 1.0) < LARGE
        part = 0.5 if is_root else 1.0
        of_part = row_shift(log_y, 0.0, high * part, low * part)
        numbers = factors(g, total, size, is_root, inverse)
        row_gradients(g, g_at, log_y, at, n, numbers, 1.0, of_part, high * part, low * part, True, dx, dx_at)


def factors(like, total, size, is_root, inverse):
    """What makes p / T * sum g of e, which is ``largest`` times p or, where ``is_root``, p's square root.

    With (a, b, unit) it is (a * e + b) * (unit * e); a and b are in two parts in float64.
    """


@overload(factors, **INLINE)
def factors_by_type(like, total, size, is_root, inverse):
    return factors_64 if like.dtype == types.float64 else factors_32


def factors_32(like, total, size, is_root, inverse):
    # for float64, where none of this over- or underflows
    s = (total[0] + total[1]) * size * inverse[0] / largest(like)
    return (s / largest(like), 0.0, inverse[0]) if is_root else (0.0, s, inverse[0])


def factors_64(like, total, size, is_root, inverse):
    # no step may overflow, nor be a subnormal that a later one enlarges, for T from 1e-140 to 1e140
    if is_root:
        s, unit = size * SMALLER / largest(like), 1.0 / SMALLER / largest(like)
    else:
        s = 2.0**-100 if abs(total[0]) * min(inverse[0], 1.0) > 2.0**-800 else 1.0
        unit = 1.0 / s / largest(like)
    t = filled(like, total[0] * s)
    high = t * inverse[0]
    low = fma(t, inverse[0], 0.0 - high) + fma(t, inverse[1], filled(like, total[1] * s * inverse[0]))
    zero = filled(like, 0.0)
    low = select(maximum(low, 0.0 - low) < np.inf, low, zero)
    # where g / T might overflow, though the difference does not, all is done a power of two smaller
    exponent = min(math.frexp(inverse[0])[1], 1000) if inverse[0] > 1.0 else 0
    ends = (1.0 if exponent > 0 else np.inf), 2.0**-exponent, 2.0**exponent
    if is_root:
        return high, low, zero, zero, unit, inverse[0], ends
    return zero, zero, high, low, unit, inverse[0], ends


@inline
def row_gradients(g, g_at, log_y, at, n, total, part, shift, high, low, is_divided, dx, dx_at):
    w = lanes(g)
    c = coefficients(filled(g, 0.0))
    j = 0
    while j + w <= n:
        v = load(log_y, at + j)
        e = probability(v, shift, high, low, c) * part
        store(dx, dx_at + j, gradient(load(g, g_at + j), v, e, total, is_divided))
        j += w
    if j < n:
        v = load_part(log_y, at + j, n - j, 0.0)
        e = probability(v, shift, high, low, c) * part
        a = load_part(g, g_at + j, n - j, 0.0)
        store_part(dx, dx_at + j, n - j, gradient(a, v, e, total, is_divided))


def gradient(g, v, e, total, is_divided):
    """(g - p * total) / T, 0 where v is -inf: there the probability p is exactly 0.

    Where ``is_divided`` is None T is 1 and p or the total was multiplied by 1 / ``largest``; else
    ``total`` are ``factors``.
    """


@overload(gradient, **INLINE)
def gradient_by_type(g, v, e, total, is_divided):
    if is_divided == types.none:
        return undivided
    return divided_64 if g.element == types.float64 else divided_32


def undivided(g, v, e, total, is_divided):
    return select(v == -np.inf, 0.0, fma(e, 0.0 - total[0], g) - e * total[1])


def divided_64(g, v, e, total, is_divided):
    a0, a1, b0, b1, unit, inverse, (limit, down, up) = total
    is_large = maximum(g, 0.0 - g) > limit
    size = select(is_large, splat(g, down), 1.0)
    p = e * unit
    high = fma(e, a0, b0)
    low = fma(e, a1, b1) + fma(e, a0, b0 - high)
    low = select(maximum(low, 0.0 - low) < np.inf, low, 0.0)
    d = fma(p, 0.0 - high * size, g * (size * inverse)) - p * (low * size)
    return select(v == -np.inf, 0.0, select(is_large, d * up, d))


def divided_32(g, v, e, total, is_divided):
    # in float64: a subnormal difference must not be rounded before it is enlarged
    a, b, inverse = total
    p = widened(e)
    dx = fma(p, 0.0 - fma(p, a, splat(p, b)), widened(g) * inverse)
    return select(v == -np.inf, 0.0, narrowed(dx))


@inline
def probability(v, shift, high, low, c):
    """exp(v) times ``largest``: 0 far below the smallest float, inf above exp(40)."""
    e = select(v < shift[3], 0.0, exponential(v, plain(shift), high, low, c))
    return select(v > ABOVE, np.inf, e)


@kernel
def backward(g, log_y, high, low, inverse, inverse_low, dx):
    backward_rows(g, log_y, high, low, inverse, inverse_low, 0, g.shape[0], dx)


@parallel_kernel
def backward_parallel(g, log_y, high, low, inverse, inverse_low, dx, blocks):
    rows = g.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        backward_rows(g, log_y, high, low, inverse, inverse_low, start, stop, dx)


@inline
def narrow_backward_rows(
    g,  # IN   (rows, n) no longer than a vector: the gradient with respect to log_y
    log_y,  # IN   (rows, n) what forward gave
    high,  # IN   log2(e) in two parts
    low,
    inverse,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) (g - exp(log_y) * sum g) / T
):
    n, w = g.shape[1], lanes(g)
    of_g, of_log_y = stack_block(g.dtype, MOST), stack_block(g.dtype, MOST)
    e = stack_block(g, MOST)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(g, ROWS), stack_array(g, ROWS)
    unit = 1.0 / largest(g)
    shift = row_shift(log_y, 0.0, high, low)
    for i in range(start, stop, w):
        columns_of(g, i, stop - i, of_g)
        columns_of(log_y, i, stop - i, of_log_y)
        deepest, most = filled(g, -np.inf), filled(g, -np.inf)
        for at in range(0, n * w, w):
            v = load(of_log_y, at)
            store(e, at, select(v == -np.inf, 0.0, load(of_g, at)))
            deepest, most = maximum(0.0 - v, deepest), maximum(v, most)
        sums_of_columns(e, None, n, False, total, lost)
        is_plain = inverse == 1.0 and 0.0 - max_across(deepest) >= shift[3] and max_across(most) <= ABOVE
        for r in range(w):
            is_plain &= SMALL <= abs(total[r]) < LARGE
            first[r], second[r] = two_parts((total[r] * unit, lost[r] * unit), g)
        if not is_plain:
            backward_rows(g, log_y, high, low, inverse, inverse_low, i, min(i + w, stop), dx)
            continue
        exponentials_of(of_log_y, n, plain(shift), high, low, None, e, None, None)
        one, two = load(first, 0), load(second, 0)
        for at in range(0, n * w, w):
            v = load(e, at)
            store(of_g, at, fma(v, 0.0 - one, load(of_g, at)) - v * two)
        rows_of(of_g, dx, i, stop - i)


@kernel
def narrow_backward(g, log_y, high, low, inverse, inverse_low, dx):
    """``backward`` for rows no longer than a vector (see numbasoft.narrow)."""
    narrow_backward_rows(g, log_y, high, low, inverse, inverse_low, 0, g.shape[0], dx)


@parallel_kernel
def narrow_backward_parallel(g, log_y, high, low, inverse, inverse_low, dx, blocks):
    rows = g.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        narrow_backward_rows(g, log_y, high, low, inverse, inverse_low, start, stop, dx)


@inline
def backward_column_tiles(
    g,  # IN   (outer, n, inner) the gradient with respect to log_y
    log_y,  # IN   (outer, n, inner) what forward gave, T is 1
    high,  # IN   log2(e) in two parts
    low,
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, 2 n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    left,  # OUT  (outer, inner) at a tile's first row not 0 where the tile is left as it is: the sums of its gradients are too large
    dx,  # OUT  (outer, n, inner) g - exp(log_y) * sum g
):
    n, w, room = g.shape[1], lanes(g), work[block]
    m = stack_array(g, MOST_COLUMNS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, part = stack_array(g, ROWS), stack_array(g, ROWS), stack_array(g, ROWS)
    half = n * planes * w
    unit = 1.0 / largest(g)
    shift = row_shift(room, 0.0, high, low)
    c = coefficients(filled(g, 0.0))
    for u in range(start, stop):
        i, k, width = tile(g, planes, u)
        gathered(g[i], k, width, room, 0, m)
        gathered(log_y[i], k, width, room, half, m)
        is_plain = True
        for p in range(0, width, w):
            plane_sum(room, p * n, room, half + p * n, n, total, lost)
            for r in range(w):
                is_plain &= abs(total[r]) < LARGE
                is_small = abs(total[r]) < SMALL
                part[r], other_part = (unit, 1.0) if is_small else (1.0, unit)
                first[r], second[r] = two_parts((total[r] * other_part, lost[r] * other_part), g)
            both, part_of_rows = (load(first, 0), load(second, 0)), load(part, 0)
            for at in range(p * n, (p + w) * n, w):
                v = load(room, half + at)
                e = probability(v, shift, high, low, c) * part_of_rows
                store(room, at, gradient(load(room, at), v, e, both, None))
        left[i, k] = 0 if is_plain else 1
        if is_plain:
            scattered(room, None, dx[i], k, 0, width)


@kernel
def backward_columns(g, log_y, high, low, planes, work, left, dx):
    """``backward`` along an axis with others behind it, where T is 1 (see numbasoft.columns)."""
    tiles = tiles_of(g, planes, lanes(g))
    backward_column_tiles(g, log_y, high, low, planes, work, 0, tiles, 0, left, dx)


@parallel_kernel
def backward_columns_parallel(g, log_y, high, low, planes, work, left, dx, blocks):
    tiles = tiles_of(g, planes, lanes(g))
    for b in prange(blocks):
        start, stop = b * tiles // blocks, (b + 1) * tiles // blocks
        backward_column_tiles(g, log_y, high, low, planes, work, start, stop, np.int64(b), left, dx)


@inline
def sum_of_segment(g, log_y, factor, unit, sums):
    i, first, count = place(unit, g.shape[1])
    g_at, at = row_at(g, i) + first, row_at(log_y, i) + first
    sums[unit, 0], sums[unit, 1] = segment_sum(g, g_at, log_y, at, count, factor)


@kernel
def sums_of_gradients(g, log_y, factor, sums):
    """sum g times a power of two, segment by segment, for few long rows (see numbasoft.split)."""
    for unit in range(sums.shape[0]):
        sum_of_segment(g, log_y, factor, unit, sums)


@parallel_kernel
def sums_of_gradients_parallel(g, log_y, factor, sums, blocks):
    for unit in prange(sums.shape[0]):
        sum_of_segment(g, log_y, factor, np.int64(unit), sums)


@inline
def backward_segment(g, log_y, high, low, inverse, inverse_low, sums, smaller_sums, unit, dx):
    n = g.shape[1]
    i, first, count = place(unit, n)
    total, size = row_total(g, sums, unit - unit % segment_count(n), n), 1.0
    if not np.isfinite(total[0]):
        total, size = row_total(g, smaller_sums, unit - unit % segment_count(n), n), 1.0 / SMALLER
    g_at, at, dx_at = row_at(g, i) + first, row_at(log_y, i) + first, row_at(dx, i) + first
    shift = row_shift(log_y, 0.0, high, low)
    gradients_of(g, g_at, log_y, at, count, total, size, shift, high, low, (inverse, inverse_low), dx, dx_at)


@kernel
def backward_segments(g, log_y, high, low, inverse, inverse_low, sums, smaller_sums, dx):
    """(g - exp(log_y) * sum g) / T, segment by segment, for few long rows.

    ``smaller_sums`` are those of g times ``SMALLER``, for rows whose sum overflows.
    """
    for unit in range(sums.shape[0]):
        backward_segment(g, log_y, high, low, inverse, inverse_low, sums, smaller_sums, unit, dx)


@parallel_kernel
def backward_segments_parallel(g, log_y, high, low, inverse, inverse_low, sums, smaller_sums, dx, blocks):
    for unit in prange(sums.shape[0]):
        backward_segment(g, log_y, high, low, inverse, inverse_low, sums, smaller_sums, np.int64(unit), dx)
