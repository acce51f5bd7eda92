"""Cross-entropy on the CPU: loops 1 to 3 of the softmax, then a loss per row and, if wanted, its gradient.

With q[j] for the weight that a row's target puts on class j, the loss is

    sum q[j] (lse - x[j] / T) + z lse**2        and its gradient        ((sum q + 2 z lse) p[j] - q[j]) / T.

No nearly equal numbers are subtracted: lse - x[j] / T is log(s) + (m - x[j]) / T, neither of them
negative, and at the class k that may hold nearly all of the probability, sum q p[k] - q[k] is what
q holds elsewhere less sum q times the part of the others in s.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from ...columns import MOST as MOST_COLUMNS
from ...columns import gathered, plane_counted, plane_exponentials, scattered, tile, tiles_of
from ...confident import logs_of_parts, others_of
from ...elementary import coefficients, exponential, largest, least, shift_of, two_sum
from ...jit import INLINE, inline, kernel, parallel_kernel
from ...narrow import (
    MOST,
    columns_of,
    elements_at,
    exponentials_of,
    maxima_of,
    numbers_of,
    rows_numbers,
    rows_of,
    sums_of_columns,
)
from ...passes import row_exponentials, row_range, second_vector
from ...past_caches import (
    TWO_VECTORS,
    Ranged,
    loaded,
    nothing_found,
    range_found,
    row_of,
    write_part,
    write_row,
)
from ...summation import added_up, dot_push, dot_start, exact_push, sum_end
from ...tiles import (
    CONFIDENT,
    ROWS,
    TILE,
    exponentials_in,
    larger_tile,
    prefetch_distance,
    put,
    put_parts,
    reciprocal,
    rows_in_tile,
    shifts,
    shifts_of_lse,
)
from ...vector import (
    below,
    drained,
    filled,
    fma,
    lanes,
    load,
    load_part,
    max_across,
    maximum,
    prefetch,
    row_at,
    select,
    stack_array,
    stack_block,
    store,
    store_part,
    sum_across,
)

# Instead of a class: the row is ignored, or no class holds more than half of its probability.
IGNORED, NOBODY = -1, -2

# What lies at a row's class is asked for so many rows before: at any of the classes, which no hardware foresees.
ROWS_AHEAD = 128

# Sizes that float32 has as normal numbers.
NORMAL_32 = 2.0**-126, 2.0**127


@inline
def forward_rows(
    x,  # IN   (rows, n)
    target,  # IN   (rows,) each row's class, IGNORED where it does not count (see class_of); or None with q
    own,  # IN   (rows,) what q holds for that class beside spread; or one number for all; or None
    q,  # IN   (rows, n) class probabilities; or None
    weights,  # IN   (n,) what they are multiplied with; or None
    spread,  # IN   (n,) what every row's q holds besides; or None
    g,  # IN   (rows,) what gradients are multiplied with; or one number for all; or None
    z,  # IN   the factor of lse**2
    work,  # WORK (blocks, at least n and TILE) for exponentials; or None where dx holds them
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    block,  # IN   the row of work to use
    loss,  # OUT  (rows,)
    dx,  # OUT  (rows, n) or None
):
    n = x.shape[1]
    e = exponentials_in(work, dx)
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    m, bottom = stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    place, top = stack_array(np.int64, ROWS), stack_array(np.float64, ROWS)
    own_of, g_of = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    own_logit, far = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    e_own, others = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    whole, whole_lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    share_own, value = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    apart, both = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    log, lse = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, after = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    limit, none = stack_array(x, ROWS), stack_array(x, ROWS)
    unit, dx_own = stack_array(x, ROWS), stack_array(x, ROWS)
    i = start
    while i < stop:
        count = min(rows_in_tile(n, larger_tile(x) if dx is None else TILE), stop - i)
        ahead = prefetch_distance(x, count, stop - i - count)

        # loop 1: the maximum of every row, and the least element
        for r in range(count):
            place[r], own_of[r], g_of[r] = class_of(target, i + r), number(own, i + r), number(g, i + r)
            if place[r] != IGNORED:
                m[r], bottom[r] = row_range(x, row_at(x, i + r), None, 0, n)
                top[r] = m[r]
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row
        for r in range(count):
            if place[r] == IGNORED:
                total[r] = 1.0
                continue
            at, q_at = row_at(x, i + r), row_at(q, i + r)
            e_at = row_at(e, i + r) if work is None else row_at(e, block) + r * n
            own_logit[r] = top[r] if target is None else np.float64(element(x, at + place[r]))
            far[r], whole[r], whole_lost[r] = row_distance(x, at, q, q_at, weights, spread, n, m[r])
            shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
            total[r], lost[r] = row_exponentials(x, at, None, 0, n, e, e_at, shift, high, low, ahead)
            if dx is None:
                is_top = own_logit[r] == top[r] and (target is not None or 2.0 * largest(x) > total[r])
                apart[r] = others_of(x, at, n, m[r], is_top, shift, high, low, total[r], lost[r])
            else:
                if target is None:
                    place[r] = majority(e, e_at, n, total[r])
                if place[r] != NOBODY:
                    e_own[r] = element(e, e_at + place[r])
                    share_own[r] = share_of(e, q, q_at, weights, spread, place[r])
                    total[r], lost[r], others[r] = parted(e, e_at, n, place[r], total[r], lost[r])
                apart[r] = others[r] if own_logit[r] == top[r] and place[r] != NOBODY else -1.0
            both[r] = total[r] + lost[r]
        logs_of_parts(apart, both, count, x, log)
        losses_of(target, spread, own_of, top, own_logit, inverse, log, far, whole, z, count, lse, value)
        for r in range(count):
            loss[i + r] = 0.0 if place[r] == IGNORED else value[r]

        # loop 4: every exponential divided by the sum of its row, less its q
        if dx is not None:
            factors_of(
                g_of, own_of, whole, whole_lost, share_own, e_own, others, total, lost, lse, z, inverse, count, x,
                first, second, after, limit, none, unit, dx_own,
            )  # fmt: skip
            for r in range(count):
                q_at, dx_at = row_at(q, i + r), row_at(dx, i + r)
                e_at = row_at(e, i + r) if work is None else row_at(e, block) + r * n
                if place[r] == IGNORED:
                    row_filled(dx, dx_at, n, 0.0)
                    continue
                row_gradients(
                    e, e_at, n, (first[r], second[r]), after[r], limit[r], none[r],
                    q, q_at, weights, spread, unit[r], dx, dx_at,
                )  # fmt: skip
                if place[r] != NOBODY:
                    store_part(dx, dx_at + place[r], 1, filled(dx, dx_own[r]))
        i += count


def class_of(target, i):
    """The class of row i, which is not known beforehand where the target is probabilities.

    A target may come with the class that is ignored, for which it then has IGNORED.
    """


@overload(class_of, **INLINE)
def class_of_by_type(target, i):
    if target == types.none:
        return lambda target, i: NOBODY
    if isinstance(target, types.BaseTuple):
        return lambda target, i: IGNORED if target[0][i] == target[1] else target[0][i]
    return lambda target, i: target[i]


def number(numbers, i):
    """One of the numbers that rows have, or what all of them have, 0 where there are none."""


@overload(number, **INLINE)
def number_by_type(numbers, i):
    if numbers == types.none:
        return lambda numbers, i: 0.0
    return (
        (lambda numbers, i: numbers) if isinstance(numbers, types.Float) else (lambda numbers, i: numbers[i])
    )


@inline
def element(array, at):
    """One element in the computing type."""
    return sum_across(load_part(array, at, 1, 0.0))


@inline
def row_filled(y, at, n, value):
    v = filled(y, value)
    j = 0
    while j + lanes(y) <= n:
        store(y, at + j, v)
        j += lanes(y)
    if j < n:
        store_part(y, at + j, n - j, v)


# The weights q that a target puts on the classes.


def share(like, q, q_at, weights, spread, j):
    """A vector of q; None where nothing but the target's own class has weight."""


@overload(share, **INLINE)
def share_by_type(like, q, q_at, weights, spread, j):
    if q == types.none:
        if spread == types.none:
            return lambda like, q, q_at, weights, spread, j: None
        return lambda like, q, q_at, weights, spread, j: load(spread, j)
    if spread == types.none:
        return lambda like, q, q_at, weights, spread, j: load(q, q_at + j)
    return lambda like, q, q_at, weights, spread, j: fma(load(q, q_at + j), load(weights, j), load(spread, j))


def share_part(like, q, q_at, weights, spread, j, count):
    """As ``share``, for the last elements of a row."""


@overload(share_part, **INLINE)
def share_part_by_type(like, q, q_at, weights, spread, j, count):
    if q == types.none:
        if spread == types.none:
            return lambda like, q, q_at, weights, spread, j, count: None
        return lambda like, q, q_at, weights, spread, j, count: load_part(spread, j, count, 0.0)
    if spread == types.none:
        return lambda like, q, q_at, weights, spread, j, count: load_part(q, q_at + j, count, 0.0)
    return lambda like, q, q_at, weights, spread, j, count: fma(
        load_part(q, q_at + j, count, 0.0),
        load_part(weights, j, count, 0.0),
        load_part(spread, j, count, 0.0),
    )


def share_of(like, q, q_at, weights, spread, k):
    """One element of q, less what only the target's own class has."""


@overload(share_of, **INLINE)
def share_of_by_type(like, q, q_at, weights, spread, k):
    if q == types.none and spread == types.none:
        return lambda like, q, q_at, weights, spread, k: 0.0
    return lambda like, q, q_at, weights, spread, k: np.float64(
        sum_across(share_part(like, q, q_at, weights, spread, k, 1))
    )


def less(v, share, unit):
    """v - unit * share."""


@overload(less, **INLINE)
def less_by_type(v, share, unit):
    if share == types.none:
        return lambda v, share, unit: v
    return lambda v, share, unit: fma(share, 0.0 - unit, v)


# The loss.


def row_distance(x, at, q, q_at, weights, spread, n, m):
    """sum q[j] (m - x[j]), where a q of 0 counts as 0, and sum q in two parts."""


@overload(row_distance, **INLINE)
def row_distance_by_type(x, at, q, q_at, weights, spread, n, m):
    if q == types.none and spread == types.none:
        return lambda x, at, q, q_at, weights, spread, n, m: (0.0, 0.0, 0.0)
    return distance_of_row


def distance_of_row(x, at, q, q_at, weights, spread, n, m):
    one = filled(x, 1.0)
    whole, far = dot_start(one), dot_start(one)
    w = lanes(x)
    top = m * 0.25  # a difference may overflow though its quotient by T does not, a quarter of it never
    j = 0
    while j + w <= n:
        a = share(one, q, q_at, weights, spread, j)
        v = select(a == 0.0, m, load(x, at + j))
        far = dot_push(far, a, fma(v, -0.25, top))
        whole = dot_push(whole, a, one)
        j += w
    if j < n:
        a = share_part(one, q, q_at, weights, spread, j, n - j)
        v = select(a == 0.0, m, load_part(x, at + j, n - j, 0.0))
        far = dot_push(far, a, fma(v, -0.25, top))
        whole = dot_push(whole, a, one)
    distance, mass = sum_end(far), sum_end(whole)
    both = distance[0] if np.isinf(distance[0]) else distance[0] + distance[1]
    return both * 4.0, mass[0], mass[1]


@inline
def majority(e, at, n, total):
    """The class that holds more than half of a row's exponentials, or NOBODY."""
    if not 2.0 * largest(e) > total:
        return NOBODY
    w = lanes(e)
    j = 0
    while j + w <= n and max_across(load(e, at + j)) < largest(e):
        j += w
    while j < n and element(e, at + j) != largest(e):
        j += 1
    return j if j < n else NOBODY


@inline
def parted(e, at, n, k, total, lost):
    """A sum of exponentials in two parts, and the sum without the one at k, which may be overwritten.

    Beside a large gradient or weight the others matter, however little they are next to the one at k.
    """
    own = np.float64(element(e, at + k))
    others = (total - own) + lost
    if not others < total * CONFIDENT:
        return total, lost, others
    store_part(e, at + k, 1, filled(e, 0.0))
    s = dot_start(filled(e, 0.0))
    j = 0
    while j + lanes(e) <= n:
        s = exact_push(s, counted(load(e, at + j)))
        j += lanes(e)
    if j < n:
        s = exact_push(s, counted(load_part(e, at + j, n - j, 0.0)))
    both = sum_end(s)
    others = both[0] + both[1]
    total, lost = two_sum(own, others)
    return total, lost, others


@inline
def losses_of(
    target,  # IN   None where it is probabilities
    spread,  # IN   None where nothing but the target's own class has weight
    own,  # IN   (ROWS,) as all of these, for the rows of a tile: what q holds for the target's class beside spread
    m,  # IN   the maximum
    own_logit,  # IN   that of the target's class
    inverse,  # IN   1 / T
    log,  # IN   log sum exp((x - m) / T)
    far,  # IN   what row_distance gave
    whole,
    z,  # IN   the factor of lse**2
    count,  # IN   how many rows
    lse,  # OUT  (ROWS,) log sum exp(x / T)
    value,  # OUT  (ROWS,) the loss; nothing in it is negative but what a caller made so
):
    for r in range(0, count, 8):
        top, log_s = load(m, r), load(log, r)
        of_row = top * inverse + log_s
        v = value_of(target, load(own, r), top, load(own_logit, r), inverse, log_s)
        v = with_distance(target, spread, v, load(whole, r), log_s, load(far, r) * inverse)
        store(lse, r, of_row)
        store(value, r, v + of_row * z * of_row if z != 0.0 else v)


def value_of(target, own, m, own_logit, inverse, log):
    """The loss at the targets' own classes."""


@overload(value_of, **INLINE)
def value_of_by_type(target, own, m, own_logit, inverse, log):
    if target == types.none:
        return lambda target, own, m, own_logit, inverse, log: None
    return value_of_class


def value_of_class(target, own, m, own_logit, inverse, log):
    apart = m * 0.25 - own_logit * 0.25
    quarter = apart * inverse
    only_log = own * log
    # the distance may overflow though its product does not
    near, beyond = own * (quarter * 4.0 + log), only_log + own * apart * inverse * 4.0
    return select(own == 0.0, only_log, select(quarter < 2.0**1000, near, beyond))


def with_distance(target, spread, value, whole, log, distance):
    """A loss and that at all classes, where these have weight."""


@overload(with_distance, **INLINE)
def with_distance_by_type(target, spread, value, whole, log, distance):
    if target == types.none:
        return lambda target, spread, value, whole, log, distance: whole * log + distance
    if spread == types.none:
        return lambda target, spread, value, whole, log, distance: value
    return lambda target, spread, value, whole, log, distance: select(
        whole == 0.0, value, value + (whole * log + distance)
    )


# The gradient.


def two_product(a, b, like):
    """a * b and what its rounding lost, as far as nothing overflows; 0 where float32 does not tell."""


@overload(two_product, **INLINE)
def two_product_by_type(a, b, like):
    if like.dtype == types.float64:
        return two_product_64
    return lambda a, b, like: (a * b, 0.0)


def two_product_64(a, b, like):
    p = a * b
    lost = fma(a, b, 0.0 - p)
    return p, select(size(lost) < np.inf, lost, 0.0)


@inline
def size(v):
    return maximum(v, 0.0 - v)


def factors_safe(like, product, factor):
    """Where a reciprocal times a factor can be one number: nothing underflows and what is 0 stays 0."""


@overload(factors_safe, **INLINE)
def factors_safe_by_type(like, product, factor):
    smallest, most = (2.0**-900, 2.0**140) if like.dtype == types.float64 else (2.0**-100, 2.0**30)
    return lambda like, product, factor: (size(product) > smallest) & (size(factor) < most)


def lift(like):
    """What makes every probability a normal number."""


@overload(lift, **INLINE)
def lift_by_type(like):
    wide = getattr(like, "dtype", None) or like.element
    number = 2.0**400 if wide == types.float64 else 2.0**60
    return lambda like: number


@inline
def counted(e):
    """A vector of exponentials, 0 where one counts as 0."""
    return select(e < least(e), 0.0, e)


@inline
def gradient_at(p, others, q, elsewhere, mass, mass_and, extra):
    """mass_and p - q of one class, where others is 1 - p and elsewhere is mass - q: from the smaller terms."""
    return select(p > 0.5, elsewhere - mass * others + extra * p, mass_and * p - q)


@inline
def factors_of(
    g,  # IN   (ROWS,) as all of these, for the rows of a tile: what gradients are multiplied with
    own,  # IN   what q holds for the target's class beside spread
    whole,  # IN   what spread or, without a target, q sums to, in two parts
    whole_lost,
    share_own,  # IN   what it holds at the target's class, or that of the majority
    e_own,  # IN   the exponential there, the sum of the others, and of all in two parts
    others,
    total,
    lost,
    lse,  # IN   log sum exp(x / T)
    z,  # IN   the factor of lse**2
    inverse,  # IN   1 / T
    count,  # IN   how many rows
    like,  # IN   of the computing type
    first,  # OUT  (ROWS,) what exponentials are multiplied with for the gradient, in two parts
    second,
    after,  # OUT  and what with thereafter
    limit,  # OUT  below this exponentials count as 0 and give none
    none,
    unit,  # OUT  g / T
    dx_own,  # OUT  the gradient at the target's class, or that of the majority
):
    """What makes the gradients ((sum q + 2 z lse) p - q) g / T of exponentials, as suits the size of the factor."""
    zero = filled(g, 0.0)
    for r in range(0, count, 8):
        u, unit_lost = two_product(load(g, r), inverse, like)
        mass, mass_lost = two_sum(load(whole, r), load(own, r))
        extra = load(lse, r) * (2.0 * z) if z != 0.0 else zero
        mass_and, lost_and = two_sum(mass, extra)
        factor, rounding = two_product(u, mass_and, like)
        rest = unit_lost * mass_and + u * (lost_and + (mass_lost + load(whole_lost, r))) + rounding
        put(unit, r, u)

        share, s = load(share_own, r), load(total, r) + load(lost, r)
        e = load(e_own, r)
        p, others_p = select(e < least(like), 0.0, e) / s, load(others, r) / s
        elsewhere = (load(whole, r) - share) + load(whole_lost, r)
        put(dx_own, r, u * gradient_at(p, others_p, share + load(own, r), elsewhere, mass, mass_and, extra))

        one, two = reciprocal(load(total, r), load(lost, r), like)
        is_safe = factors_safe(like, one * factor, factor)
        product, product_lost = two_product(one, factor, like)
        product_rest = one * rest + two * factor + product_lost
        is_large = size(factor) > 1.0
        up, down = select(is_large, lift(like), zero + 1.0), select(is_large, 1.0 / lift(like), zero + 1.0)
        put_parts(
            first, second, r, select(is_safe, product, one * up), select(is_safe, product_rest, two * up)
        )
        put(after, r, select(is_safe, 1.0, factor * down))
        put(limit, r, select(is_safe, zero, least(like)))
        put(none, r, select((one == one) & (factor == factor), zero, np.nan))


@inline
def row_gradients(e, e_at, n, factor, after, limit, none, q, q_at, weights, spread, unit, dx, dx_at):
    """e * factor * after - unit * q for a row, from what ``factors_of`` gave."""
    if limit == 0.0:
        row_products(e, e_at, n, factor, q, q_at, weights, spread, unit, dx, dx_at)
        return
    one = filled(e, 1.0)
    j = 0
    while j < n:
        v = load_part(e, e_at + j, n - j, 0.0)
        p = select(v < limit, none, fma(v, factor[0], v * factor[1]) * after)
        a = share_part(one, q, q_at, weights, spread, j, n - j)
        store_part(dx, dx_at + j, n - j, less(p, a, unit))
        j += lanes(e)


@inline
def row_products(e, e_at, n, factor, q, q_at, weights, spread, unit, dx, dx_at):
    w = lanes(e)
    one = filled(e, 1.0)
    if n < w:
        v = load_part(e, e_at, n, 0.0)
        a = share_part(one, q, q_at, weights, spread, 0, n)
        store_part(dx, dx_at, n, less(fma(v, factor[0], v * factor[1]), a, unit))
        return
    # as in ``passes.row_scaled``
    first, last = load(e, e_at), load(e, e_at + n - w)
    j = second_vector(e, e_at, n)
    while j + w < n:
        v = load(e, e_at + j)
        a = share(one, q, q_at, weights, spread, j)
        store(dx, dx_at + j, less(fma(v, factor[0], v * factor[1]), a, unit))
        j += w
    a = share(one, q, q_at, weights, spread, 0)
    store(dx, dx_at, less(fma(first, factor[0], first * factor[1]), a, unit))
    a = share(one, q, q_at, weights, spread, n - w)
    store(dx, dx_at + n - w, less(fma(last, factor[0], last * factor[1]), a, unit))


@kernel
def forward(x, target, own, q, weights, spread, g, z, work, high, low, ih, il, loss, dx):
    """Losses, and gradients unless dx is None."""
    forward_rows(
        x, target, own, q, weights, spread, g, z, work, high, low, ih, il, 0, x.shape[0], 0, loss, dx
    )


@parallel_kernel
def forward_parallel(x, target, own, q, weights, spread, g, z, work, high, low, ih, il, loss, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        forward_rows(
            x, target, own, q, weights, spread, g, z, work, high, low, ih, il, i, j, np.int64(b), loss, dx
        )


class Gradients(NamedTuple):
    """The exponentials of a row and what ``factors_of`` gave for it."""

    e: Any
    at: int
    first: float
    second: float
    after: float
    limit: float
    none: float
    unit: float
    spread: Any
    place: int
    own: float

    def value_at(self, j, count):
        if self.place == IGNORED:
            return filled(self.e, 0.0)
        v = loaded(self.e, self.at + j, count)
        p = select(v < self.limit, self.none, fma(v, self.first, v * self.second) * self.after)
        p = less(p, spread_at(self.spread, j, count), self.unit)
        k = self.place - j
        is_own = (0 <= k) & (k < lanes(self.e))
        return select(below(p, k), p, select(below(p, k + 1), self.own, p)) if is_own else p

    def common_at(self, j):
        v = load(self.e, self.at + j)
        return less(fma(v, self.first, v * self.second), spread_at(self.spread, j, None), self.unit)

    def uncommon_after(self, j, end):
        if self.limit != 0.0 or self.place == IGNORED:  # where ``limit`` is 0, ``after`` is 1
            return j
        if self.place < j:
            return end
        return min(j + (self.place - j) // lanes(self.e) * lanes(self.e), end)


def spread_at(spread, j, count):
    """A vector of what every row's q holds, or its first elements; or None."""


@overload(spread_at, **INLINE)
def spread_at_by_type(spread, j, count):
    if spread == types.none:
        return lambda spread, j, count: None
    return lambda spread, j, count: loaded(spread, j, count)


@inline
def rows_past_caches(
    x,  # IN   (rows, n)
    target,  # IN   (rows,) each row's class, IGNORED where it does not count
    own,  # IN   (rows,) what q holds for that class beside spread
    spread,  # IN   (n,) what every row's q holds besides; or None
    g,  # IN   (rows,) what gradients are multiplied with
    z,  # IN   the factor of lse**2
    work,  # WORK (blocks, at least n and LARGEST_TILE) for exponentials
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    block,  # IN   the row of work to use
    loss,  # OUT  (rows,)
    dx,  # OUT  (rows, n) side by side
):
    n = x.shape[1]
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    m, bottom, next_m = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    c, magic = stack_array(x, ROWS), stack_array(x, ROWS)
    rest, lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    place, top = stack_array(np.int64, ROWS), stack_array(np.float64, ROWS)
    own_of, g_of = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    own_logit, far = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    e_own, others = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    whole, whole_lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    share_own, value = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    apart, both = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    log, lse = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, after = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    limit, none = stack_array(x, ROWS), stack_array(x, ROWS)
    unit, dx_own = stack_array(x, ROWS), stack_array(x, ROWS)
    line, found = stack_array(x, TWO_VECTORS), stack_array(x, TWO_VECTORS)
    i, count = start, 0
    while i < stop or count > 0:
        before, count = count, min(rows_in_tile(n), stop - i)

        # loop 1: the maximum of every row, and the least element, of the first tile
        for r in range(count):
            if i == start:
                m[r], bottom[r] = row_range(x, row_at(x, i + r), None, 0, n)
            top[r], own_of[r], g_of[r] = m[r], own[i + r], g[i + r]
        shifts(m, bottom, count, high, low, c, magic, rest, lowest, fraction)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row;
        # beside them loop 4 of the tile before, and loop 1 of the next
        for r in range(max(count, before)):
            at, e_at, k = row_at(x, i + r), row_at(work, block) + r * n, i - before + r
            values = Gradients(
                work,
                e_at,
                first[r],
                second[r],
                after[r],
                limit[r],
                none[r],
                unit[r],
                spread,
                place[r],
                dx_own[r],
            )
            row = row_of(values, dx, k, r < before, start, stop, line)
            if r >= count:
                write_row(row, found)
                continue
            # where no more rows come, the last stands for them
            ranged = Ranged(x, row_at(x, min(i + count + r, stop - 1)), nothing_found(found))
            place[r] = target[i + r]
            if place[r] == IGNORED:
                write_part(row, ranged, 0, n)
                total[r] = 1.0
            else:
                own_logit[r] = np.float64(element(x, at + place[r]))
                far[r], whole[r], whole_lost[r] = row_distance(x, at, None, 0, None, spread, n, m[r])
                shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
                total[r], lost[r] = row_exponentials(
                    x, at, None, 0, n, work, e_at, shift, high, low, 0, None, None, 0, (row, ranged)
                )
                e_own[r] = element(work, e_at + place[r])
                share_own[r] = share_of(work, None, 0, None, spread, place[r])
                total[r], lost[r], others[r] = parted(work, e_at, n, place[r], total[r], lost[r])
                apart[r] = others[r] if own_logit[r] == top[r] else -1.0
                both[r] = total[r] + lost[r]
            next_m[r], bottom[r] = range_found(ranged, n)
        logs_of_parts(apart, both, count, x, log)
        losses_of(target, spread, own_of, top, own_logit, inverse, log, far, whole, z, count, lse, value)
        factors_of(
            g_of, own_of, whole, whole_lost, share_own, e_own, others, total, lost, lse, z, inverse, count, x,
            first, second, after, limit, none, unit, dx_own,
        )  # fmt: skip
        for r in range(count):
            loss[i + r] = 0.0 if place[r] == IGNORED else value[r]
            m[r] = next_m[r]
        i += count
    drained()


@kernel
def past_caches(x, target, own, spread, g, z, work, high, low, ih, il, loss, dx):
    """``forward`` with gradients larger than the last cache, where the target is a class (see numbasoft.past_caches)."""
    rows_past_caches(x, target, own, spread, g, z, work, high, low, ih, il, 0, x.shape[0], 0, loss, dx)


@parallel_kernel
def past_caches_parallel(x, target, own, spread, g, z, work, high, low, ih, il, loss, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        rows_past_caches(x, target, own, spread, g, z, work, high, low, ih, il, i, j, np.int64(b), loss, dx)


@inline
def narrow_rows(
    x,  # IN   (rows, n) no longer than a vector
    target,  # IN   (rows,) each row's class, IGNORED where it does not count (see class_of)
    own,  # IN   (rows,) what q holds for that class; it holds nothing else; or one number for all
    g,  # IN   (rows,) what gradients are multiplied with; or one number for all; or None
    z,  # IN   the factor of lse**2
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    loss,  # OUT  (rows,)
    dx,  # OUT  (rows, n) or None
):
    n, w = x.shape[1], lanes(x)
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    columns, e = stack_block(x.dtype, MOST), stack_block(x, MOST)
    place, own_of, g_of = stack_array(x, ROWS), stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    top, own_logit = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    e_own, others = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    apart, both = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    log, lse = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    value, zeros = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, after = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    limit, none = stack_array(x, ROWS), stack_array(x, ROWS)
    unit, dx_own = stack_array(x, ROWS), stack_array(x, ROWS)
    for i in range(start, stop, w):
        count = min(w, stop - i)
        columns_of(x, i, count, columns)
        for r in range(count):
            place[r] = class_of(target, i + r)
        k = load(place, 0)
        rows_numbers(own, i, count, own_of)
        rows_numbers(g, i, count, g_of)

        # loop 1: the maximum of every row, and the least element
        m = maxima_of(columns, n)
        numbers_of(m, top)
        numbers_of(elements_at(columns, n, k), own_logit)

        # loops 2 and 3: exp of every element after the shift, and the sum of every row
        exponentials_of(columns, n, shift_of(m, high, low), high, low, None, e, None, None)
        numbers_of(filled(x, largest(x)) if dx is None else elements_at(e, n, k), e_own)
        sums_of_columns(e, None, n, True, total, lost)
        parted_columns(e, n, k, top, own_logit, e_own, total, lost, others, apart, both)
        logs_of_parts(apart, both, w, x, log)
        losses_of(target, None, own_of, top, own_logit, inverse, log, zeros, zeros, z, w, lse, value)
        for r in range(count):
            loss[i + r] = 0.0 if place[r] == IGNORED else value[r]

        # loop 4: every exponential divided by the sum of its row, less its q
        if dx is not None:
            factors_of(
                g_of, own_of, zeros, zeros, zeros, e_own, others, total, lost, lse, z, inverse, w, x,
                first, second, after, limit, none, unit, dx_own,
            )  # fmt: skip
            one, two, three = load(first, 0), load(second, 0), load(after, 0)
            below, instead, at_own = load(limit, 0), load(none, 0), load(dx_own, 0)
            for j in range(n):
                v = load(e, j * w)
                p = select(v < below, instead, fma(v, one, v * two) * three)
                store(columns, j * w, select(k == j, at_own, select(k == IGNORED, 0.0, p)))
            rows_of(columns, dx, i, count)


@inline
def parted_columns(
    e,  # IN   the exponentials of a group of rows, column by column, of n columns
    n,
    k,  # IN   the class of every row
    m,  # IN   (ROWS,) as all of these: the maximum
    own_logit,  # IN   that of the class
    e_own,  # IN   the exponential there
    total,  # IN OUT   the sum of all in two parts
    lost,
    others,  # OUT  the sum of the others
    apart,  # OUT  that where the class has the maximum, else -1
    both,  # OUT  the sum of all
):
    """As ``parted``, for every row of a group."""
    w = lanes(e)
    if any_confident(w, m, own_logit, e_own, total, lost, others, apart, both):
        rest = stack_block(e, MOST)
        alone, alone_lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
        for j in range(n):
            store(rest, j * w, select(k == j, 0.0, counted(load(e, j * w))))
        sums_of_columns(rest, None, n, False, alone, alone_lost)
        put_apart(w, m, own_logit, e_own, alone, alone_lost, total, lost, others, apart, both)


@inline
def any_confident(w, m, own_logit, e_own, total, lost, others, apart, both):
    """The sums without the classes, of w rows, and whether any is so small that it is to be summed by itself."""
    most = filled(total, 0.0)
    for r in range(0, w, 8):
        s = load(total, r)
        v = (s - load(e_own, r)) + load(lost, r)
        is_top = load(own_logit, r) == load(m, r)
        most = maximum(select(is_top, s * CONFIDENT - v, 0.0), most)
        store(others, r, v)
        store(apart, r, select(is_top, v, -1.0))
        store(both, r, s + load(lost, r))
    return max_across(most) > 0.0


@inline
def put_apart(w, m, own_logit, e_own, alone, alone_lost, total, lost, others, apart, both):
    """The sums ``alone`` of the other exponentials into those rows that need them."""
    for r in range(0, w, 8):
        s, v = load(total, r), load(others, r)
        is_alone = (load(own_logit, r) == load(m, r)) & (v < s * CONFIDENT)
        v = select(is_alone, load(alone, r) + load(alone_lost, r), v)
        high, low = two_sum(load(e_own, r), v)
        store(others, r, v)
        store(apart, r, select(is_alone, v, load(apart, r)))
        store(both, r, select(is_alone, high + low, load(both, r)))
        store(total, r, select(is_alone, high, s))
        store(lost, r, select(is_alone, low, load(lost, r)))


@kernel
def narrow(x, target, own, g, z, high, low, ih, il, loss, dx):
    """``forward`` for rows no longer than a vector whose target is a class alone (see numbasoft.narrow)."""
    narrow_rows(x, target, own, g, z, high, low, ih, il, 0, x.shape[0], loss, dx)


@parallel_kernel
def narrow_parallel(x, target, own, g, z, high, low, ih, il, loss, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        narrow_rows(x, target, own, g, z, high, low, ih, il, i, j, loss, dx)


# Plain rows, each of one class: the classes are looked at here, and the losses added up.


@inline
def counted_rows(target, ignored, n):
    """How many rows are not of the class that is ignored; -1 where there is another that is none of n."""
    count = target.size
    for i in range(target.size):
        k = target[i]
        if k == ignored:
            count -= 1
        elif k < 0 or k >= n:
            return -1
    return count


@inline
def of_each(grad, is_mean, count):
    """What the gradient of every loss is multiplied with, from that of their sum or mean."""
    return grad / count if is_mean and count > 0 else grad


@inline
def summary(count, loss):
    """What kernels for plain rows return: how many count, the sum of their losses, and whether float32 has all as normal numbers."""
    is_normal = True
    for i in range(loss.size):
        size = abs(loss[i])
        is_normal = is_normal and (size == 0.0 or NORMAL_32[0] <= size <= NORMAL_32[1])
    return count, added_up(loss), is_normal


@kernel
def plain(x, target, ignored, grad, is_mean, z, high, low, ih, il, loss, dx):
    """``forward``, and a ``summary``; or a count of -1, and nothing is written, where a class is none."""
    rows, n = x.shape
    count = counted_rows(target, ignored, n)
    if count < 0:
        return count, 0.0, False
    classes, g = (target, ignored), of_each(grad, is_mean, count)
    forward_rows(x, classes, 1.0, None, None, None, g, z, None, high, low, ih, il, 0, rows, 0, loss, dx)
    return summary(count, loss)


@parallel_kernel
def plain_parallel(x, target, ignored, grad, is_mean, z, high, low, ih, il, loss, dx, blocks):
    rows, n = x.shape
    count = counted_rows(target, ignored, n)
    if count < 0:
        return count, 0.0, False
    g = of_each(grad, is_mean, count)
    for b in prange(blocks):
        i, j, block = b * rows // blocks, (b + 1) * rows // blocks, np.int64(b)
        classes = target, ignored
        forward_rows(x, classes, 1.0, None, None, None, g, z, None, high, low, ih, il, i, j, block, loss, dx)
    return summary(count, loss)


@kernel
def plain_narrow(x, target, ignored, grad, is_mean, z, high, low, ih, il, loss, dx):
    """``plain``, by ``narrow``."""
    rows, n = x.shape
    count = counted_rows(target, ignored, n)
    if count < 0:
        return count, 0.0, False
    classes, g = (target, ignored), of_each(grad, is_mean, count)
    narrow_rows(x, classes, 1.0, g, z, high, low, ih, il, 0, rows, loss, dx)
    return summary(count, loss)


@parallel_kernel
def plain_narrow_parallel(x, target, ignored, grad, is_mean, z, high, low, ih, il, loss, dx, blocks):
    rows, n = x.shape
    count = counted_rows(target, ignored, n)
    if count < 0:
        return count, 0.0, False
    g = of_each(grad, is_mean, count)
    for b in prange(blocks):
        i, j, classes = b * rows // blocks, (b + 1) * rows // blocks, (target, ignored)
        narrow_rows(x, classes, 1.0, g, z, high, low, ih, il, i, j, loss, dx)
    return summary(count, loss)


@kernel
def plain_picked(log_p, target, ignored, loss):
    """``plain`` of log-probabilities: the losses are what they have at the classes."""
    n = log_p.shape[1]
    count = counted_rows(target, ignored, n)
    if count < 0:
        return count, 0.0, False
    for i in range(target.size):
        loss[i] = 0.0 if target[i] == ignored else 0.0 - log_p[i, target[i]]
    return summary(count, loss)


@inline
def column_tiles(
    x,  # IN   (outer, n, inner)
    target,  # IN   (outer, inner) each row's class, IGNORED where it does not count
    own,  # IN   (outer, inner) what q holds for that class; it holds nothing else
    g,  # IN   (outer, inner) what gradients are multiplied with; or None
    z,  # IN   the factor of lse**2
    high,  # IN   log2(e) / T in two parts
    low,
    inverse_high,  # IN   1 / T in two parts
    inverse_low,
    planes,  # IN   how many planes a tile has
    work,  # WORK (blocks, n times the rows of a tile)
    start,  # IN   the tiles to do: start <= u < stop
    stop,
    block,  # IN   the row of work to use
    loss,  # OUT  (outer, inner)
    dx,  # OUT  (outer, n, inner) or None
):
    n, w, room = x.shape[1], lanes(x), work[block]
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    m, place = stack_array(x, MOST_COLUMNS), stack_array(np.int64, ROWS)
    own_of, g_of = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    top, own_logit = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    alone, alone_lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    e_own, others = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    apart, both = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    log, lse = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    value, zeros = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    first, second, after = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    limit, none, ignored = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    unit, dx_own = stack_array(x, ROWS), stack_array(x, ROWS)
    for u in range(start, stop):
        i, k, width = tile(x, planes, u)

        # loop 1: the maximum of every row, and the least element
        gathered(x[i], k, width, room, 0, m)
        for p in range(0, width, w):
            at, count = p * n, min(w, width - p)
            numbers_of(load(m, p), top)
            for r in range(count):
                place[r], own_of[r], g_of[r] = (
                    target[i, k + p + r],
                    own[i, k + p + r],
                    number_at(g, i, k + p + r),
                )
                ignored[r] = 1.0 if place[r] == IGNORED else 0.0
                own_logit[r] = 0.0 if place[r] == IGNORED else room[at + place[r] * w + r]

            # loops 2 and 3: exp of every element after the shift, and the sum of every row
            plane_exponentials(
                room, at, n, shift_of(load(m, p), high, low), high, low, None, room, total, lost
            )
            for r in range(count):
                e_own[r] = (
                    largest(x) if dx is None else 0.0 if place[r] == IGNORED else room[at + place[r] * w + r]
                )
            if any_confident(w, top, own_logit, e_own, total, lost, others, apart, both):
                # the gradient at the classes is dx_own, so that their exponentials may go
                for r in range(count):
                    if place[r] != IGNORED:
                        room[at + place[r] * w + r] = 0.0
                plane_counted(room, at, n, alone, alone_lost)
                put_apart(w, top, own_logit, e_own, alone, alone_lost, total, lost, others, apart, both)
            logs_of_parts(apart, both, w, x, log)
            losses_of(target, None, own_of, top, own_logit, inverse, log, zeros, zeros, z, w, lse, value)
            for r in range(count):
                loss[i, k + p + r] = 0.0 if place[r] == IGNORED else value[r]

            # loop 4: every exponential divided by the sum of its row, less its q
            if dx is not None:
                factors_of(
                    g_of, own_of, zeros, zeros, zeros, e_own, others, total, lost, lse, z, inverse, w, x,
                    first, second, after, limit, none, unit, dx_own,
                )  # fmt: skip
                one, two, three = load(first, 0), load(second, 0), load(after, 0)
                below, instead, is_ignored = load(limit, 0), load(none, 0), load(ignored, 0) == 1.0
                for j in range(at, at + n * w, w):
                    v = load(room, j)
                    v = select(v < below, instead, fma(v, one, v * two) * three)
                    store(room, j, select(is_ignored, 0.0, v))
                for r in range(count):
                    if place[r] != IGNORED:
                        room[at + place[r] * w + r] = dx_own[r]
        if dx is not None:
            scattered(room, None, dx[i], k, 0, width)


def number_at(numbers, i, k):
    """As ``number``, of a matrix."""


@overload(number_at, **INLINE)
def number_at_by_type(numbers, i, k):
    if numbers == types.none:
        return lambda numbers, i, k: 0.0
    return lambda numbers, i, k: numbers[i, k]


@kernel
def columns(x, target, own, g, z, high, low, ih, il, planes, work, loss, dx):
    """``forward`` along an axis with others behind it, for targets that are a class alone (see numbasoft.columns)."""
    tiles = tiles_of(x, planes, lanes(x))
    column_tiles(x, target, own, g, z, high, low, ih, il, planes, work, 0, tiles, 0, loss, dx)


@parallel_kernel
def columns_parallel(x, target, own, g, z, high, low, ih, il, planes, work, loss, dx, blocks):
    tiles = tiles_of(x, planes, lanes(x))
    for b in prange(blocks):
        i, j = b * tiles // blocks, (b + 1) * tiles // blocks
        column_tiles(x, target, own, g, z, high, low, ih, il, planes, work, i, j, np.int64(b), loss, dx)


# The gradient from a saved log-sum-exp.


@inline
def rows_from_lse(
    x,  # IN   (rows, n)
    lse,  # IN   (rows,) log sum exp(x / T), in the computing type
    target,  # IN   (rows,) each row's class, IGNORED where it does not count
    own,  # IN   (rows,) what q holds for that class beside spread
    spread,  # IN   (n,) what every row's q holds besides; or None
    whole,  # IN   the sum of spread
    g,  # IN   (rows,) what gradients are multiplied with
    z,  # IN   the factor of lse**2
    high,  # IN   log2(e) / T in two parts
    low,
    temperature,  # IN   T, and 1 / T in two parts
    inverse_high,
    inverse_low,
    start,  # IN   the rows to do: start <= i < stop
    stop,
    dx,  # OUT  (rows, n)
):
    n = x.shape[1]
    inverse = np.float64(inverse_high) + np.float64(inverse_low)
    c, magic, rest = stack_array(x, ROWS), stack_array(x, ROWS), stack_array(x, ROWS)
    lowest, fraction = stack_array(x, ROWS), stack_array(x, ROWS)
    for i in range(start, stop):
        r = (i - start) % ROWS
        if r == 0:
            shifts_of_lse(lse, i, min(ROWS, stop - i), temperature, high, c, magic, rest, lowest, fraction)
        at, dx_at, k = row_at(x, i), row_at(dx, i), target[i]
        if k == IGNORED:
            row_filled(dx, dx_at, n, 0.0)
            continue
        shift = (c[r], magic[r], rest[r], lowest[r], fraction[r])
        unit = g[i] * inverse if np.isfinite(lse[i]) else np.nan
        extra = 2.0 * z * lse[i] if z != 0.0 else 0.0
        mass = own[i] + whole
        factor = unit * (mass + extra)
        ahead = prefetch_distance(x, 1, stop - i - 1)
        if abs(factor) <= 1.0:
            scale = factor / largest(x)
            both = row_from_lse(x, at, n, k, shift, high, low, scale, spread, unit, ahead, dx, dx_at)
        else:
            up = lift(x)
            scales = up / largest(x), factor / up, 0.0 if factor == factor else np.nan
            both = row_from_lse(x, at, n, k, shift, high, low, scales, spread, unit, ahead, dx, dx_at)
        share_k = share_of(x, None, 0, None, spread, k)
        # what counts as 0 is in their sum
        others = 0.0 if both[1] < n * least(x) else both[1]
        p_k, others_p = both[0] / largest(x), others / largest(x)
        q_k, elsewhere = own[i] + share_k, whole - share_k
        own_gradient = gradient_at(p_k, others_p, q_k, elsewhere, mass, mass + extra, extra)
        store_part(dx, dx_at + k, 1, filled(dx, unit * own_gradient))


@inline
def from_lse(v, shift, high, low, c):
    """exp(v / T - lse) times ``largest``, infinite where that is too large."""
    d = v - shift[0]
    # 0 may have been multiplied by an infinity, where the shift is so far that it is rounded to whole powers of two
    e = select(d <= shift[3], 0.0, exponential(v, shift, high, low, c))
    # a limit of v itself, known before the loop, would be rounded by many powers of two where logits are huge
    return select(fma(d, high, shift[4]) > 60.0, np.inf, e)


@inline
def row_from_lse(x, at, n, k, shift, high, low, scale, spread, unit, ahead, dx, dx_at):
    """The gradient of all classes, right but at k; the exponential of k and the sum of those of the others.

    That of k may be all but nothing less than the sum of all.
    """
    w = lanes(x)
    one = filled(x, 1.0)
    c = coefficients(one)
    total = dot_start(one)
    own, end = k - k % w, n - n % w
    e_own = 0.0
    j = 0
    for stop in (own, end):
        while j + w <= stop:
            prefetch(x, at + j + ahead)
            e, p = summed_and_scaled(from_lse(load(x, at + j), shift, high, low, c), scale)
            total = exact_push(total, e)
            store(dx, dx_at + j, less(p, share(one, None, 0, None, spread, j), unit))
            j += w
        # the vector with k, then what is left at the end
        if j < n:
            e, p = summed_and_scaled(
                from_lse(load_part(x, at + j, n - j, -np.inf), shift, high, low, c), scale
            )
            is_other, lane = below(e, max(k - j, 0)), below(e, max(k - j + 1, 0))
            e_own += np.float64(sum_across(select(is_other, 0.0, select(lane, counted(e), 0.0))))
            total = exact_push(total, select(is_other, e, select(lane, 0.0, e)))
            store_part(dx, dx_at + j, n - j, less(p, share_part(one, None, 0, None, spread, j, n - j), unit))
            j += w
    s = sum_end(total)
    return e_own, s[0] + s[1]


def summed_and_scaled(e, scale):
    """Exponentials as they are added up, and times the factor of their gradients, which may be in two parts.

    With ``scale`` in two parts the factor is so large that what counts as 0 would come to light.
    """


@overload(summed_and_scaled, **INLINE)
def summed_and_scaled_by_type(e, scale):
    return scaled_twice if isinstance(scale, types.BaseTuple) else scaled_once


def scaled_once(e, scale):
    return e, e * scale


def scaled_twice(e, scale):
    e = counted(e)
    return e, select(e == 0.0, scale[2], e * scale[0] * scale[1])


@kernel
def backward(x, lse, target, own, spread, whole, g, z, high, low, t, ih, il, dx):
    rows_from_lse(x, lse, target, own, spread, whole, g, z, high, low, t, ih, il, 0, x.shape[0], dx)


@parallel_kernel
def backward_parallel(x, lse, target, own, spread, whole, g, z, high, low, t, ih, il, dx, blocks):
    rows = x.shape[0]
    for b in prange(blocks):
        i, j = b * rows // blocks, (b + 1) * rows // blocks
        rows_from_lse(x, lse, target, own, spread, whole, g, z, high, low, t, ih, il, i, j, dx)


@inline
def check_rows(
    q,  # IN   (rows, n)
    start,  # IN   the rows to do: start <= i < stop
    stop,
    least,  # OUT  (rows,) the smallest element, the largest number where there is none
    sums,  # OUT  (rows,) the sum of all elements
):
    n = q.shape[1]
    w = lanes(q)
    for i in range(start, stop):
        at = row_at(q, i)
        top = filled(q, -np.inf)
        total = dot_start(top)
        j = 0
        while j + w <= n:
            v = load(q, at + j)
            top = maximum(0.0 - v, top)
            total = exact_push(total, v)
            j += w
        if j < n:
            v = load_part(q, at + j, n - j, 0.0)
            top = maximum(0.0 - v, top)
            total = exact_push(total, v)
        s = sum_end(total)
        least[i], sums[i] = -np.float64(max_across(top)), s[0] + s[1]


@kernel
def check(q, least, sums):
    """What tells whether rows are probabilities: their smallest elements and their sums."""
    check_rows(q, 0, q.shape[0], least, sums)


@parallel_kernel
def check_parallel(q, least, sums, blocks):
    rows = q.shape[0]
    for b in prange(blocks):
        check_rows(q, b * rows // blocks, (b + 1) * rows // blocks, least, sums)


# Log-probabilities at the classes of rows, and the gradient there.


@inline
def picked_rows(
    log_p,  # IN   (outer, n, inner)
    target,  # IN   (outer * inner,) each row's class, IGNORED where it does not count
    own,  # IN   (outer * inner,) what its loss is multiplied with
    start,  # IN   the rows to do: start <= i < stop
    stop,
    loss,  # OUT  (outer * inner,)
):
    inner = log_p.shape[2]
    i = start
    while i < stop:
        layer = log_p[i // inner]
        first = i % inner
        for k in range(first, min(inner, first + stop - i)):
            if i + ROWS_AHEAD < stop:
                prefetch(layer, row_at(layer, max(target[i + ROWS_AHEAD], 0)) + k + ROWS_AHEAD)
            value = 0.0
            if target[i] != IGNORED and own[i] != 0.0:
                value = own[i] * (0.0 - at_class(layer, target[i], k))
            loss[i] = value
            i += 1


def at_class(layer, j, k):
    """One element of a matrix in float64."""


@overload(at_class, **INLINE)
def at_class_by_type(layer, j, k):
    if isinstance(layer.dtype, types.Float):
        return lambda layer, j, k: np.float64(layer[j, k])
    return lambda layer, j, k: np.float64(element(layer[j], row_at(layer[j], k)))


@kernel
def picked(log_p, target, own, loss):
    picked_rows(log_p, target, own, 0, target.size, loss)


@parallel_kernel
def picked_parallel(log_p, target, own, loss, blocks):
    rows = target.size
    for b in prange(blocks):
        picked_rows(log_p, target, own, b * rows // blocks, (b + 1) * rows // blocks, loss)


@kernel
def placed(target, values, dx):
    """Each row's number to where its class is in dx, an (outer, n, inner) array, if it has one."""
    inner = dx.shape[2]
    for i in range(target.size):
        if target[i] != IGNORED:
            dx[i // inner, target[i], i % inner] = values[i]
