"""logsumexp on the CPU, forward and backward: the first four loops of log_softmax, one result per row."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...columns import MOST as MOST_COLUMNS
from ...columns import gathered, plane_logarithms, tile, tiles_of
from ...elementary import coefficients, exponential, largest, shift_of, shift_of_lse, two_sum
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...narrow import MOST, columns_of, exponentials_of, logarithms_of_rows, maxima_of, parts_in
from ...passes import exact_for_logarithms, row_exponentials, row_others, row_range
from ...split import (
    blocks_of,
    logarithm_of_row,
    place,
    segment_count,
    shared_exponentials,
    shared_maxima,
    shared_others,
)
from ...tiles import (
    ROWS,
    first_lanes,
    larger_tile,
    log_of_others,
    logarithms_of_sums,
    prefetch_distance,
    rows_in_tile,
    shifts,
)
from ...vector import (
    filled,
    fma,
    lanes,
    load,
    load_part,
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

# Gradients larger than this may lift a probability below the smallest float to a normal number.
LARGE = 2.0**30


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
    lse,  # OUT  (rows,) log sum exp(x / T), float32 for 16-bit x
):
    n = x.shape[1]
    m, bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    logarithm, maximum = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    i = start
    while i < stop:
        count = min(rows_in_tile(n, larger_tile(x)), stop - i)
        ahead = prefetch_distance(x, count, stop - i - count)

        # loop 1: the maximum of every row, and the least element
        for r in range(count):
            m[r], bottom[r] = row_range(x, row_at(x, i + r), mask, row_at(mask, i + r), n)
            maximum[r] = m[r]
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction)

        # loops 2 and 3: the sum of exp of every element after the shift
        for r in range(count):
            shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
            at, mask_at = row_at(x, i + r), row_at(mask, i + r)
            total[r], lost[r] = row_exponentials(
                x, at, mask, mask_at, n, None, 0, shift, high, low, ahead, exact_for_logarithms(x)
            )

        # loop 4: the logarithm of every sum
        logarithms_of_sums(total, lost, maximum, count, x, logarithm)
        for r in range(count):
            if logarithm[r] < 0.0:
                shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
                at, mask_at = row_at(x, i + r), row_at(mask, i + r)
                s = row_others(x, at, mask, mask_at, n, m[r], shift, high, low)
                logarithm[r] = log_of_others(s[0], s[1], x)
        sums_of(maximum, logarithm, count, inverse_high, inverse_low)
        for r in range(count):
            lse[i + r] = logarithm[r]
        i += count


@inline
def sums_of(maximum, logarithm, count, inverse_high, inverse_low):
    """m / T + l into l, but for an infinite m, which is the result unless NaN was in the sum."""
    for r in range(count):
        if np.isinf(maximum[r]):
            logarithm[r] = np.nan if np.isnan(logarithm[r]) else maximum[r]
            maximum[r] = 0.0
    for r in range(0, count, 8):
        m, log = load(maximum, r), load(logarithm, r)
        product = m * inverse_high
        total, lost = two_sum(product, log)
        lost = lost + fma(m, inverse_low, fma(m, inverse_high, 0.0 - product))
        store(logarithm, r, select(lost == lost, total + lost, total))


@kernel
def forward(x, mask, high, low, inverse_high, inverse_low, lse):
    forward_rows(x, mask, high, low, inverse_high, inverse_low, 0, x.shape[0], lse)


@parallel_kernel
def forward_parallel(x, mask, high, low, inverse_high, inverse_low, lse, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        forward_rows(x, mask, high, low, inverse_high, inverse_low, start, stop, lse)


@inline
def narrow_rows(
    x,  # IN   (rows, n) no longer than a vector
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    lse,  # OUT  (rows,) log sum exp(x / T), float32 for 16-bit x
):
    n, w = x.shape[1], lanes(x)
    columns, e, exact = stack_block(x.dtype, MOST), stack_block(x, MOST), exact_for_logarithms(x)
    part, rest = parts_in(exact, e, stack_block(x, MOST), stack_block(x, MOST))
    top, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    for i in range(start, stop, w):
        columns_of(x, i, stop - i, columns)

        # loop 1: the maximum of every row, and the least element
        m = maxima_of(columns, n)

        # loops 2 to 4: exp of every element after the shift, the sum of every row and its logarithm
        exponentials_of(columns, n, shift_of(m, high, low), high, low, exact, e, part, rest)
        logarithms_of_rows(columns, e, rest, n, m, top, logarithm)
        sums_of(top, logarithm, w, inverse_high, inverse_low)
        for r in range(min(w, stop - i)):
            lse[i + r] = logarithm[r]


@kernel
def narrow(x, high, low, inverse_high, inverse_low, lse):
    """``forward`` for rows no longer than a vector (see numbasoft.narrow)."""
    narrow_rows(x, high, low, inverse_high, inverse_low, 0, x.shape[0], lse)


@parallel_kernel
def narrow_parallel(x, high, low, inverse_high, inverse_low, lse, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        narrow_rows(x, high, low, inverse_high, inverse_low, start, stop, lse)


@inline
def column_tiles(
    x,  # IN   (outer, n, inner)
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    lse,  # OUT  (outer, inner) log sum exp(x / T), float32 for 16-bit x
):
    n, w, room = x.shape[1], lanes(x), work[block]
    m = stack_array(x, MOST_COLUMNS)
    top, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    for u in range(start, stop):
        i, k, width = tile(x, planes, u)

        # loop 1: the maximum of every row, and the least element
        gathered(x[i], k, width, room, 0, m)

        # loops 2 to 4: the sum of exp of every element after the shift, and its logarithm
        for p in range(0, width, w):
            plane_logarithms(room, p * n, n, load(m, p), high, low, exact_for_logarithms(x), top, logarithm)
            sums_of(top, logarithm, w, inverse_high, inverse_low)
            for r in range(min(w, width - p)):
                lse[i, k + p + r] = logarithm[r]


@kernel
def columns(x, high, low, inverse_high, inverse_low, planes, work, lse):
    """``forward`` along an axis with others behind it (see numbasoft.columns)."""
    tiles = tiles_of(x, planes, lanes(x))
    column_tiles(x, high, low, inverse_high, inverse_low, planes, work, 0, tiles, 0, lse)


@parallel_kernel
def columns_parallel(x, high, low, inverse_high, inverse_low, planes, work, lse, blocks):
    tiles = tiles_of(x, planes, lanes(x))
    for b in prange(blocks):
        start, stop = b * tiles // blocks, (b + 1) * tiles // blocks
        column_tiles(x, high, low, inverse_high, inverse_low, planes, work, start, stop, np.int64(b), lse)


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
    lse,  # OUT  (rows,)
    block,  # IN   the thread, of so many
    blocks,
):
    # loop 1: the maximum of every row
    shared_maxima(x, mask, maxima, sums, turns, block, blocks)

    # loops 2 and 3: the sum of exp of every element after the shift
    exact = exact_for_logarithms(x)
    shared_exponentials(x, mask, maxima, high, low, exact, None, sums, turns, block, blocks)
    shared_others(x, mask, maxima, high, low, sums, others, turns, block, blocks)

    # loop 4: the logarithm of every sum
    if block == 0:
        maximum, logarithm = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
        for i in range(x.shape[0]):
            maximum[0], logarithm[0] = logarithm_of_row(x, maxima, sums, others, i)
            sums_of(maximum, logarithm, 1, *inverse)
            lse[i] = logarithm[0]


@kernel
def shared(x, mask, high, low, inverse_high, inverse_low, maxima, sums, others, turns, lse):
    """``forward`` for few long rows, each shared by all threads (see numbasoft.split)."""
    shared_rows(x, mask, high, low, (inverse_high, inverse_low), maxima, sums, others, turns, lse, 0, 1)


@parallel_kernel
def shared_parallel(x, mask, high, low, inverse_high, inverse_low, maxima, sums, others, turns, lse, blocks):
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
            lse,
            np.int64(b),
            blocks,
        )


@inline
def backward_rows(
    g,  # IN   (rows,) the gradient with respect to lse, in float64
    x,  # IN   (rows, n)
    lse,  # IN   (rows,) what forward gave, in the computing type
    high,  # IN   log2(e) / T in two parts
    low,
    temperature,  # IN   T
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n) g * exp(x / T - lse) / T
):
    for i in range(start, stop):
        at, dx_at = row_at(x, i), row_at(dx, i)
        gradients_of(g[i], x, at, x.shape[1], lse[i], high, low, temperature, dx, dx_at)


@inline
def gradients_of(g, x, at, n, lse, high, low, temperature, dx, dx_at):
    """g * exp(x / T - lse) / T over a row or a segment of it."""
    # A probability too small for a float may matter beside a large g: then its root is squared.
    inverse = 1.0 / temperature
    is_root = abs(g) * max(inverse, 1.0) > LARGE
    part = 0.5 if is_root else 1.0
    s = shift_of_lse(filled(x, lse * part), temperature / part, high * part)
    shift = first_lanes(s, stack_array(x, 80))
    limit = g * np.inf if g != 0.0 else 0.0
    if np.isfinite(lse) and 1.0 / LARGE < abs(g * inverse) and not is_root:
        factor = (g * inverse / largest(x), limit)
        row_gradients(x, at, n, factor, shift, high, low, dx, dx_at)
    else:
        factors = four_factors(g, inverse, largest(x), is_root, limit)
        row_gradients(x, at, n, factors, shift, high * part, low * part, dx, dx_at)


@inline
def row_gradients(x, at, n, factor, shift, high, low, dx, dx_at):
    w = lanes(x)
    c = coefficients(filled(x, 0.0))
    j = 0
    while j + w <= n:
        store(dx, dx_at + j, gradient(load(x, at + j), factor, shift, high, low, c))
        j += w
    if j < n:
        v = load_part(x, at + j, n - j, -np.inf)
        store_part(dx, dx_at + j, n - j, gradient(v, factor, shift, high, low, c))


@inline
def four_factors(g, inverse, size, is_root, limit):
    """Four numbers a, b, c, d that make (a * e) * (b * e + c) * d = p * g / T, for T from 1e-140 to 1e140.

    e is ``size`` times p or, where ``is_root``, times p's square root. The fifth is the
    result where log2(e / size) is above the sixth.
    """
    # 1 / T enlarges before anything is subnormal, and makes smaller at the end
    first, last = max(inverse, 1.0), min(inverse, 1.0)
    if is_root:
        return 2.0**40 / size, g / size * 2.0**-40 * first, 0.0, last, limit, 30.0
    if last < 2.0**-800:
        return 1.0 / size, 0.0, g, last, limit, 60.0
    if abs(g * first) < 1.0:
        return 1.0, 0.0, g * first, last / size, limit, 60.0
    return 1.0, 0.0, g / size * first, last, limit, 60.0


def gradient(v, factor, shift, high, low, c):
    """The exponential times one factor (with the result where it is too large) or ``four_factors``."""


@overload(gradient, **INLINE)
def gradient_by_type(v, factor, shift, high, low, c):
    if len(factor) == 2:
        return plain_gradient
    return gradient_64 if v.element == types.float64 else gradient_32


def plain_gradient(v, factor, shift, high, low, c):
    d = v - shift[0]
    e = select(d < shift[3], 0.0, exponential(v, shift, high, low, c))
    return select(fma(d, high, shift[4]) > 60.0, factor[1], e * factor[0])


def gradient_32(v, factor, shift, high, low, c):
    e = at_most_largest(v, shift, high, low, c)
    return limited(v, e, narrowed(product(widened(e), factor)), factor, shift, high)


def gradient_64(v, factor, shift, high, low, c):
    e = at_most_largest(v, shift, high, low, c)
    return limited(v, e, product(e, factor), factor, shift, high)


@inline
def at_most_largest(v, shift, high, low, c):
    """exp(v / T - lse) times ``largest``: 0 far below the smallest float and for -inf."""
    e = select(v - shift[0] < shift[3], 0.0, exponential(v, shift, high, low, c))
    return select(v == -np.inf, 0.0, e)


@inline
def product(e, factor):
    return (e * factor[0]) * fma(e, factor[1], splat(e, factor[2])) * factor[3]


@inline
def limited(v, e, dx, factor, shift, high):
    """The gradient where e is 0 and where it is too large for what ``exponential`` can give."""
    dx = select(fma(v - shift[0], high, shift[4]) > factor[5], factor[4], dx)
    return select(e == 0.0, 0.0, dx)


@kernel
def backward(g, x, lse, high, low, temperature, dx):
    backward_rows(g, x, lse, high, low, temperature, 0, x.shape[0], dx)


@parallel_kernel
def backward_parallel(g, x, lse, high, low, temperature, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        start, stop = b * rows // blocks, (b + 1) * rows // blocks
        backward_rows(g, x, lse, high, low, temperature, start, stop, dx)


@inline
def backward_segment(g, x, lse, high, low, temperature, unit, dx):
    i, first, count = place(unit, x.shape[1])
    at, dx_at = row_at(x, i) + first, row_at(dx, i) + first
    gradients_of(g[i], x, at, count, lse[i], high, low, temperature, dx, dx_at)


@kernel
def backward_segments(g, x, lse, high, low, temperature, dx):
    """``backward`` segment by segment, for few long rows (see numbasoft.split)."""
    for unit in range(x.shape[0] * segment_count(x.shape[1])):
        backward_segment(g, x, lse, high, low, temperature, unit, dx)


@parallel_kernel
def backward_segments_parallel(g, x, lse, high, low, temperature, dx, blocks):
    for unit in prange(x.shape[0] * segment_count(x.shape[1])):
        backward_segment(g, x, lse, high, low, temperature, np.int64(unit), dx)
