"""softmax on the CPU, forward and backward: the four loops, a tile of rows at a time."""

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...columns import MOST as MOST_COLUMNS
from ...columns import exchanged, gathered, plane_dot, plane_exponentials, scattered, tile, tiles_of
from ...elementary import DEEP, PLAIN, any_factor, deep_factor, divided, raising, shift_of
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...narrow import (
    MOST,
    columns_of,
    exponentials_of,
    maxima_of,
    parts_in,
    products_of_columns,
    rows_of,
    sums_of_columns,
)
from ...passes import (
    exact_for,
    filled_if_empty,
    row_dot,
    row_exponentials,
    row_probabilities,
    row_quotients,
    row_range,
    row_scaled,
    segment_dot,
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
    maximum_of_row,
    next_unit,
    place,
    row_shift,
    row_total,
    segment_count,
    shared_exponentials,
    shared_maxima,
)
from ...summation import two_parts
from ...tiles import (
    ROWS,
    choose_ways,
    exponentials_in,
    larger_tile,
    prefetch_distance,
    put,
    raised_reciprocals,
    reciprocal,
    reciprocals,
    rows_in_tile,
    shifts,
    way_of,
)
from ...vector import (
    drained,
    lanes,
    load,
    load_part,
    maximum,
    narrowed,
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
    work,  # WORK (blocks, at least n and LARGEST_TILE) for exponentials; or None where y holds them
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    block,  # IN   the row of work to use
    y,  # OUT  (rows, n)
):
    n = x.shape[1]
    e = exponentials_in(work, y)
    m, bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, way = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    i = start
    while i < stop:
        count = min(rows_in_tile(n, larger_tile(x)), stop - i)
        ahead = prefetch_distance(x, count, stop - i - count)

        # loop 1: the maximum of every row, and the least element, of the first tile
        if i == start:
            for r in range(count):
                m[r], bottom[r] = row_range(x, row_at(x, i + r), mask, row_at(mask, i + r), n)
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction, probabilities=True)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row
        for r in range(count):
            e_at = row_at(e, i + r) if work is None else row_at(e, block) + r * n
            shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
            total[r], lost[r] = row_exponentials(
                x, row_at(x, i + r), mask, row_at(mask, i + r), n,
                e, e_at, shift, high, low, ahead, exact_for(x),
            )  # fmt: skip
        reciprocals(total, lost, count, first, second)
        choose_ways(m, bottom, high, count, first, second, way)

        # loop 4: every element divided by the sum of its row; beside it loop 1 of the next tile
        for r in range(count):
            e_at = row_at(e, i + r) if work is None else row_at(e, block) + r * n
            y_at, k = row_at(y, i + r), i + count + r
            is_empty = filled_if_empty(x, mask, row_at(mask, i + r), n, m[r], y, y_at, n, 0.0)
            if k < stop and not is_empty:
                s = row_probabilities(
                    e, e_at, n, first[r], second[r], way_of(way, r), y, y_at,
                    x, row_at(x, k), mask, row_at(mask, k),
                )  # fmt: skip
                m[r], bottom[r] = s
            elif k < stop:
                m[r], bottom[r] = row_range(x, row_at(x, k), mask, row_at(mask, k), n)
            elif not is_empty:
                row_probabilities(e, e_at, n, first[r], second[r], way_of(way, r), y, y_at)
        i += count


@kernel
def forward(x, mask, work, high, low, y):
    forward_rows(x, mask, work, high, low, 0, x.shape[0], 0, y)


@parallel_kernel
def forward_parallel(x, mask, work, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        forward_rows(x, mask, work, high, low, start, stop, np.int64(b), y)


class Quotients(NamedTuple):
    """The exponentials of a row, the reciprocal of their sum in two parts, and the way (see tiles.choose_ways)."""

    e: Any
    at: int
    first: float
    second: float
    way: float

    def value_at(self, j, count):
        e = loaded(self.e, self.at + j, count)
        if self.way == PLAIN:
            return divided(e, (self.first, self.second))
        if self.way == DEEP:
            return divided(e, deep_factor(self.first, self.second))
        return divided(e, any_factor(self.first, self.second))


@inline
def rows_past_caches(
    x,  # IN   (rows, n)
    work,  # WORK (blocks, at least n and LARGEST_TILE) for exponentials
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    block,  # IN   the row of work to use
    y,  # OUT  (rows, n) side by side
):
    n = x.shape[1]
    m, bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, way = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    next_m, next_bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    line, found = stack_array(x, TWO_VECTORS), stack_array(x, TWO_VECTORS)
    i, count = start, 0
    while i < stop or count > 0:
        before, count = count, min(rows_in_tile(n), stop - i)

        # loop 1: the maximum of every row, and the least element, of the first tile
        if i == start:
            for r in range(count):
                m[r], bottom[r] = row_range(x, row_at(x, i + r), None, 0, n)
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction, probabilities=True)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row;
        # beside them loop 4 of the tile before, and loop 1 of the next
        for r in range(count):
            e_at, shift = row_at(work, block) + r * n, (c[r], magic[r], rest[r], lowest[r], fraction[r])
            quotients = Quotients(work, e_at, first[r], second[r], way_of(way, r))
            row = row_of(quotients, y, i - before + r, r < before, start, stop, line)
            # where no more rows come, the last stands for them
            ranged = Ranged(x, row_at(x, min(i + count + r, stop - 1)), nothing_found(found))
            total[r], lost[r] = row_exponentials(
                x, row_at(x, i + r), None, 0, n,
                work, e_at, shift, high, low, 0, exact_for(x), None, 0, (row, ranged),
            )  # fmt: skip
            next_m[r], next_bottom[r] = range_found(ranged, n)

        # loop 4 by itself: rows that no row of this tile is beside
        for r in range(count, before):
            quotients = Quotients(work, row_at(work, block) + r * n, first[r], second[r], way_of(way, r))
            write_row(row_of(quotients, y, i - before + r, True, start, stop, line), found)
        reciprocals(total, lost, count, first, second)
        choose_ways(m, bottom, high, count, first, second, way)
        for r in range(count):
            m[r], bottom[r] = next_m[r], next_bottom[r]
        i += count
    drained()


@kernel
def past_caches(x, work, high, low, y):
    """``forward`` for results larger than the last cache (see numbasoft.past_caches)."""
    rows_past_caches(x, work, high, low, 0, x.shape[0], 0, y)


@parallel_kernel
def past_caches_parallel(x, work, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        rows_past_caches(x, work, high, low, b * rows // blocks, (b + 1) * rows // blocks, np.int64(b), y)


@inline
def narrow_rows(
    x,  # IN   (rows, n) no longer than a vector
    high,  # IN   log2(e) / T in two parts
    low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    y,  # OUT  (rows, n)
):
    n, w = x.shape[1], lanes(x)
    columns, e, exact = stack_block(x.dtype, MOST), stack_block(x, MOST), exact_for(x)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(x, ROWS), stack_array(x, ROWS)
    part, rest = parts_in(exact, e, stack_block(x, MOST), stack_block(x, MOST))
    for i in range(start, stop, w):
        columns_of(x, i, stop - i, columns)

        # loop 1: the maximum of every row, and the least element
        shift = shift_of(maxima_of(columns, n), high, low)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row
        exponentials_of(columns, n, shift, high, low, exact, e, part, rest)
        sums_of_columns(part, rest, n, True, total, lost)
        raised_reciprocals(total, lost, w, first, second)

        # loop 4: every element divided by the sum of its row
        factor = any_factor(load(first, 0), load(second, 0))
        for at in range(0, n * w, w):
            store(columns, at, divided(load(e, at), factor))
        rows_of(columns, y, i, stop - i)


@kernel
def narrow(x, high, low, y):
    """``forward`` for rows no longer than a vector (see numbasoft.narrow)."""
    narrow_rows(x, high, low, 0, x.shape[0], y)


@parallel_kernel
def narrow_parallel(x, high, low, y, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        narrow_rows(x, high, low, b * rows // blocks, (b + 1) * rows // blocks, y)


@inline
def column_tiles(
    x,  # IN   (outer, n, inner)
    high,  # IN   log2(e) / T in two parts
    low,
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    y,  # OUT  (outer, n, inner)
):
    n, w, room = x.shape[1], lanes(x), work[block]
    m, first, second = (
        stack_array(x, MOST_COLUMNS),
        stack_array(x, MOST_COLUMNS),
        stack_array(x, MOST_COLUMNS),
    )
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    for u in range(start, stop):
        i, k, width = tile(x, planes, u)

        # loop 1: the maximum of every row, and the least element, of the first tile
        if u == start:
            gathered(x[i], k, width, room, 0, m)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row
        for p in range(0, width, w):
            shift = shift_of(load(m, p), high, low)
            plane_exponentials(room, p * n, n, shift, high, low, exact_for(x), room, total, lost)
            for r in range(0, w, 8):
                one, two = reciprocal(load(total, r), load(lost, r), first)
                put(first, p + r, one * raising(first))
                put(second, p + r, two * raising(first))

        # loop 4: every element divided by the sum of its row; beside it loop 1 of the next tile
        if u + 1 < stop:
            next_i, next_k, next_width = tile(x, planes, u + 1)
            exchanged(room, (first, second), y[i], k, width, x[next_i], next_k, next_width, m)
        else:
            scattered(room, (first, second), y[i], k, 0, width)


@kernel
def columns(x, high, low, planes, work, y):
    """``forward`` along an axis with others behind it (see numbasoft.columns)."""
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
    e,  # WORK (rows, n) for exponentials: y itself, or None to compute them twice
    maxima,  # WORK (segments of all rows,), see numbasoft.split
    sums,  # WORK (segments of all rows, 2)
    turns,  # WORK (...,) counters
    y,  # OUT  (rows, n)
    block,  # IN   the thread, of so many
    blocks,
):
    # loop 1: the maximum of every row
    shared_maxima(x, mask, maxima, sums, turns, block, blocks)

    # loops 2 and 3: exp of every element after the shift, and the sum of every row
    shared_exponentials(x, mask, maxima, high, low, exact_for(x), e, sums, turns, block, blocks)

    # loop 4: every element divided by the sum of its row
    unit = next_unit(turns, 2, block, blocks, maxima.size)
    while unit < maxima.size:
        divide_segment(x, mask, maxima, high, low, sums, e, unit, y)
        unit = next_unit(turns, 2, block, blocks, maxima.size)


@inline
def divide_segment(x, mask, maxima, high, low, sums, e, unit, y):
    n = x.shape[1]
    i, first, count = place(unit, n)
    at, mask_at, y_at = row_at(x, i) + first, row_at(mask, i) + first, row_at(y, i) + first
    if keeps_nothing(maxima, i, n) and filled_if_empty(x, mask, mask_at, count, -np.inf, y, y_at, count, 0.0):
        return
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    one, two = stack_array(x, ROWS), stack_array(x, ROWS)
    total[0], lost[0] = row_total(x, sums, unit - unit % segment_count(n), n)
    raised_reciprocals(total, lost, 1, one, two)
    factor = any_factor(one[0], two[0])
    if e is None:
        shift = row_shift(x, maximum_of_row(maxima, i, n), high, low)
        row_quotients(x, at, mask, mask_at, count, shift, high, low, factor, y, y_at)
    else:
        row_scaled(y, y_at, count, factor, y, y_at)


@kernel
def shared(x, mask, high, low, e, maxima, sums, turns, y):
    """``forward`` for few long rows, each shared by all threads (see numbasoft.split)."""
    shared_rows(x, mask, high, low, e, maxima, sums, turns, y, 0, 1)


@parallel_kernel
def shared_parallel(x, mask, high, low, e, maxima, sums, turns, y, blocks):
    blocks = blocks_of(turns, blocks)
    for b in prange(blocks):
        shared_rows(x, mask, high, low, e, maxima, sums, turns, y, np.int64(b), blocks)


@inline
def backward_rows(
    g,  # IN   (rows, n) the gradient with respect to y
    y,  # IN   (rows, n) what forward gave
    inverse,  # IN   1 / T
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) y * (g - sum g y) / T
):
    n = y.shape[1]
    for i in range(start, stop):
        g_at, at, dx_at = row_at(g, i), row_at(y, i), row_at(dx, i)
        # 0 times infinity is NaN: where this sum is finite, every g is
        dot = row_dot(g, g_at, y, at, n, None)
        if not abs(dot[0] + dot[1]) < safe_mean(y):
            dot = row_dot(g, g_at, y, at, n, True)
        gradients_of(g, g_at, y, at, n, dot, inverse, dx, dx_at)


@inline
def gradients_of(g, g_at, y, at, n, dot, inverse, dx, dx_at):
    """y * (g - dot) / T over a row or a segment of it."""
    if inverse == 1.0 and abs(dot[0] + dot[1]) < safe_mean(y):
        row_gradients(g, g_at, y, at, n, two_parts(dot, y), None, dx, dx_at)
    else:
        row_gradients(g, g_at, y, at, n, dot, inverse, dx, dx_at)


# No finite element of the computing type less a number smaller than this overflows.
SAFE_32, SAFE_64 = 2.0**100, 2.0**960


def safe_mean(like):
    """SAFE_32 or SAFE_64."""


@overload(safe_mean, **INLINE)
def safe_mean_by_type(like):
    return (lambda like: SAFE_64) if like.dtype == types.float64 else (lambda like: SAFE_32)


@inline
def row_gradients(g, g_at, y, at, n, mean, inverse, dx, dx_at):
    w = lanes(y)
    j = 0
    while j + w <= n:
        store(dx, dx_at + j, gradient(load(g, g_at + j), load(y, at + j), mean, inverse))
        j += w
    if j < n:
        a, v = load_part(g, g_at + j, n - j, 0.0), load_part(y, at + j, n - j, 0.0)
        store_part(dx, dx_at + j, n - j, gradient(a, v, mean, inverse))


def gradient(g, y, mean, inverse):
    """y * (g - mean) / T, 0 where y is exactly 0; ``inverse`` is 1 / T, or None for 1."""


@overload(gradient, **INLINE)
def gradient_by_type(g, y, mean, inverse):
    if inverse == types.none:
        return lambda g, y, mean, inverse: select(y == 0.0, 0.0, y * ((g - mean[0]) - mean[1]))
    return divided_64 if y.element == types.float64 else divided_32


def divided_32(g, y, mean, inverse):
    # in float64, where no difference overflows nor is rounded to a subnormal that 1 / T enlarges
    dx = widened(y) * (widened(g) - (mean[0] + mean[1])) * inverse
    return select(y == 0.0, 0.0, narrowed(dx))


def divided_64(g, y, mean, inverse):
    # of the two products the first must not overflow, nor be a subnormal that the second enlarges
    d = (g - mean[0]) - mean[1]
    quarter = (g * 0.25 - mean[0] * 0.25) - mean[1] * 0.25
    is_too_large = maximum(d, 0.0 - d) == np.inf
    y4 = select(is_too_large, y * 4.0, y)
    d = select(is_too_large, quarter, d)
    is_large = maximum(d, 0.0 - d) > 2.0**60
    dx = y4 * select(is_large, d, d * inverse) * select(is_large, splat(d, inverse), 1.0)
    return select(y == 0.0, 0.0, dx)


@kernel
def backward(g, y, inverse, dx):
    backward_rows(g, y, inverse, 0, y.shape[0], dx)


@parallel_kernel
def backward_parallel(g, y, inverse, dx, blocks):
    rows = y.shape[0]
    for b in prange(blocks):
        backward_rows(g, y, inverse, b * rows // blocks, (b + 1) * rows // blocks, dx)


@inline
def narrow_backward_rows(
    g,  # IN   (rows, n) no longer than a vector: the gradient with respect to y
    y,  # IN   (rows, n) what forward gave
    inverse,  # IN   1 / T
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) y * (g - sum g y) / T
):
    n, w = y.shape[1], lanes(y)
    of_g, of_y = stack_block(g.dtype, MOST), stack_block(y.dtype, MOST)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(y, ROWS), stack_array(y, ROWS)
    for i in range(start, stop, w):
        columns_of(g, i, stop - i, of_g)
        columns_of(y, i, stop - i, of_y)
        products_of_columns(of_g, of_y, n, total, lost)
        is_plain = inverse == 1.0
        for r in range(w):
            is_plain &= abs(total[r] + lost[r]) < safe_mean(y)
            first[r], second[r] = two_parts((total[r], lost[r]), y)
        if not is_plain:
            backward_rows(g, y, inverse, i, min(i + w, stop), dx)
            continue
        mean = load(first, 0), load(second, 0)
        for at in range(0, n * w, w):
            store(of_y, at, gradient(load(of_g, at), load(of_y, at), mean, None))
        rows_of(of_y, dx, i, stop - i)


@kernel
def narrow_backward(g, y, inverse, dx):
    """``backward`` for rows no longer than a vector (see numbasoft.narrow)."""
    narrow_backward_rows(g, y, inverse, 0, y.shape[0], dx)


@parallel_kernel
def narrow_backward_parallel(g, y, inverse, dx, blocks):
    rows = y.shape[0]
    for b in prange(blocks):
        narrow_backward_rows(g, y, inverse, b * rows // blocks, (b + 1) * rows // blocks, dx)


@inline
def backward_column_tiles(
    g,  # IN   (outer, n, inner) the gradient with respect to y
    y,  # IN   (outer, n, inner) what forward gave, T is 1
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, 2 n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    left,  # OUT  (outer, inner) at a tile's first row not 0 where the tile is left as it is: its gradients are too large for the plain formula
    dx,  # OUT  (outer, n, inner) y * (g - sum g y)
):
    n, w, room = y.shape[1], lanes(y), work[block]
    m = stack_array(y, MOST_COLUMNS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second = stack_array(y, ROWS), stack_array(y, ROWS)
    half = n * planes * w
    for u in range(start, stop):
        i, k, width = tile(y, planes, u)
        gathered(g[i], k, width, room, 0, m)
        gathered(y[i], k, width, room, half, m)
        is_plain = True
        for p in range(0, width, w):
            plane_dot(room, p * n, room, half + p * n, n, total, lost)
            for r in range(w):
                is_plain &= abs(total[r] + lost[r]) < safe_mean(y)
                first[r], second[r] = two_parts((total[r], lost[r]), y)
            mean = load(first, 0), load(second, 0)
            for at in range(p * n, (p + w) * n, w):
                store(room, at, gradient(load(room, at), load(room, half + at), mean, None))
        left[i, k] = 0 if is_plain else 1
        if is_plain:
            scattered(room, None, dx[i], k, 0, width)


@kernel
def backward_columns(g, y, planes, work, left, dx):
    """``backward`` along an axis with others behind it, where T is 1 (see numbasoft.columns)."""
    backward_column_tiles(g, y, planes, work, 0, tiles_of(y, planes, lanes(y)), 0, left, dx)


@parallel_kernel
def backward_columns_parallel(g, y, planes, work, left, dx, blocks):
    tiles = tiles_of(y, planes, lanes(y))
    for b in prange(blocks):
        start, stop = b * tiles // blocks, (b + 1) * tiles // blocks
        backward_column_tiles(g, y, planes, work, start, stop, np.int64(b), left, dx)


@inline
def dot_of_segment(g, y, unless_zero, unit, sums):
    i, first, count = place(unit, y.shape[1])
    at, g_at = row_at(y, i) + first, row_at(g, i) + first
    sums[unit, 0], sums[unit, 1] = segment_dot(g, g_at, y, at, count, unless_zero)


@kernel
def dots(g, y, unless_zero, sums):
    """sum g y, segment by segment, for few long rows (see numbasoft.split)."""
    for unit in range(sums.shape[0]):
        dot_of_segment(g, y, unless_zero, unit, sums)


@parallel_kernel
def dots_parallel(g, y, unless_zero, sums, blocks):
    for unit in prange(sums.shape[0]):
        dot_of_segment(g, y, unless_zero, np.int64(unit), sums)


@inline
def backward_segment(g, y, inverse, sums, unit, dx):
    n = y.shape[1]
    i, first, count = place(unit, n)
    dot = row_total(y, sums, unit - unit % segment_count(n), n)
    at, g_at, dx_at = row_at(y, i) + first, row_at(g, i) + first, row_at(dx, i) + first
    gradients_of(g, g_at, y, at, count, dot, inverse, dx, dx_at)


@kernel
def backward_segments(g, y, inverse, sums, dx):
    """y * (g - sum g y) / T, segment by segment, for few long rows."""
    for unit in range(sums.shape[0]):
        backward_segment(g, y, inverse, sums, unit, dx)


@parallel_kernel
def backward_segments_parallel(g, y, inverse, sums, dx, blocks):
    for unit in prange(sums.shape[0]):
        backward_segment(g, y, inverse, sums, np.int64(unit), dx)
