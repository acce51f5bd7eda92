"""The loops of a softmax over one row: each function here is one pass over a row.

A row is ``n`` elements that lie side by side, the first at element ``at`` of its array.
What a pass does to its row, in which order, depends on n and on the values alone.

The four loops of softmax are ``row_range`` (loop 1), ``row_exponentials`` (loops 2
and 3 in one traversal, which measured 12 to 15 % faster than two) and ``row_scaled``
(loop 4, and with it loop 1 of a row to come). log_softmax and logsumexp keep no
exponentials, and sum those of a confident row by ``row_others`` once more.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .elementary import (
    DEEP,
    PLAIN,
    any_factor,
    coefficients,
    deep_factor,
    divided,
    exponential,
    exponential_in_parts,
    in_parts_of_reduced,
    least,
    of_reduced,
    reduced_64,
    two_sum,
)
from .jit import INLINE, inline
from .summation import (
    dot_push,
    dot_start,
    exact_push,
    rest_push,
    rest_start,
    rest_where,
    sum_end,
    sum_joined,
    sum_push,
    sum_push_stored,
    sum_start,
)
from .vector import (
    aligned_after,
    any_kept_of,
    below,
    filled,
    fma,
    lanes,
    load,
    load_kept,
    load_kept_part,
    load_part,
    max_across,
    maximum,
    minimum,
    prefetch,
    prefetch_to_write,
    select,
    stack_block,
    store,
    store_part,
)

# A long row is summed in at most 64 segments, each a multiple of SEGMENT elements, whose sums
# are combined in order; threads share a row by segments. SEGMENT is a multiple of every block.
SEGMENT = 16384
MOST_SEGMENTS = 64

# Loop 3 follows loop 2 after this many elements, from the first cache: with both in one loop the
# additions wait for exponentials and keep the next ones out of the CPU's queue.
BLOCK = 256

# Other work is done between so many exponentials, if there is any: stores that wait for memory are few at a time.
PART = 128

# Rows of fewer vectors are taken from their first element on.
LEAST_ALIGNED = 16

# Lines are asked for so many elements before exponentials are written to them.
WRITE_AHEAD = 1024


@inline
def segment_length(n):
    """How many elements of a row of n are summed at a time: fixed by n alone."""
    return SEGMENT * max(1, (n + SEGMENT * MOST_SEGMENTS - 1) // (SEGMENT * MOST_SEGMENTS))


@inline
def row_range(x, at, mask, mask_at, n):
    """Loop 1: the maximum of a row, and its least element. NaN is passed over; the sum brings it to light."""
    w = lanes(x)
    even = filled(x, -np.inf), filled(x, np.inf)
    odd = even
    j = 0
    while j + 2 * w <= n:
        even = range_with(even, x, at + j, mask, mask_at + j)
        odd = range_with(odd, x, at + j + w, mask, mask_at + j + w)
        j += 2 * w
    if j + w <= n:
        even = range_with(even, x, at + j, mask, mask_at + j)
        j += w
    if j < n and n >= w:
        odd = range_with(odd, x, at + n - w, mask, mask_at + n - w)
    elif j < n:
        odd = range_with_part(odd, x, at, mask, mask_at, n)
    return range_across((maximum(even[0], odd[0]), minimum(even[1], odd[1])))


def range_with(m, x, at, mask, mask_at):
    """The largest and the least number so far in every lane, with a vector of x, if x is not None. NaN is passed over."""


@overload(range_with, **INLINE)
def range_with_by_type(m, x, at, mask, mask_at):
    if x == types.none:
        return lambda m, x, at, mask, mask_at: m
    return range_with_vector


def range_with_vector(m, x, at, mask, mask_at):
    v = load_kept(x, at, mask, mask_at)
    return maximum(v, m[0]), minimum(v, m[1])


def range_with_part(m, x, at, mask, mask_at, n):
    """As ``range_with``, with the first n elements of a vector, and -inf."""


@overload(range_with_part, **INLINE)
def range_with_part_by_type(m, x, at, mask, mask_at, n):
    if x == types.none:
        return lambda m, x, at, mask, mask_at, n: m
    return range_with_part_of_vector


def range_with_part_of_vector(m, x, at, mask, mask_at, n):
    v = load_kept_part(x, at, mask, mask_at, n)
    return maximum(v, m[0]), minimum(v, m[1])


@inline
def range_across(m):
    """The largest number of all lanes, and the least."""
    return max_across(m[0]), 0.0 - max_across(0.0 - m[1])


@inline
def segment_exponentials(
    x, at, mask, mask_at, n, e, e_at, shift, high, low, ahead, exact=None, result=None, result_at=0,
    beside=None, first=0,
):  # fmt: skip
    """Loops 2 and 3 over one segment: exp of every element, kept in e (or None), and their sum.

    Unless ``exact`` is None the sum is that of exponentials before they were rounded. ``result``
    is what a later loop writes, if that is not e: its lines are asked for here. What else is done
    meanwhile, ``beside``, is told which elements of the row come next; ``first`` is that of the segment.
    """
    total = sum_start(filled(x, 0.0))
    block, kept = blocks_in(e, stack_block(x, BLOCK))
    c = coefficients(filled(x, 0.0))
    w = lanes(x)
    # The last vector may overlap the one before; it is read before that overwrites it in place.
    last = load_kept(x, at + n - w, mask, mask_at + n - w) if n >= w else filled(x, 0.0)
    j = 0
    while j + w <= n:
        start = block_start(e, e_at + j)
        stop, rest = block_beside(
            beside, first + j,
            x, at + j, mask, mask_at + j, min(BLOCK, n - j), shift, high, low, c, ahead, exact, rest_start(exact, last),
            e, kept, e_at + j, block, start, result, result_at + j,
        )  # fmt: skip
        total = sum_push_stored(total, block, start, stop)
        total = rest_push(total, rest)
        j += stop - start
    if j < n and n >= w:
        v, part, rest = exponential_of(exact, last, shift, high, low, c, rest_start(exact, last))
        store(e, e_at + n - w, v)
        is_done = below(v, j + w - n)
        total = sum_push(total, select(is_done, 0.0, part))
        total = rest_push(total, rest_where(is_done, 0.0, rest))
    elif j < n:
        v = load_kept_part(x, at, mask, mask_at, n)
        v, part, rest = exponential_of(exact, v, shift, high, low, c, rest_start(exact, v))
        store_part(e, e_at, n, v)
        total = sum_push(total, select(below(v, n), part, 0.0))
        total = rest_push(total, rest_where(below(v, n), rest, 0.0))
    return sum_end(total)


def block_beside(
    beside, first,
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    """``block_exponentials``, and before each of its parts other work on elements of which ``first`` is the block's."""


@overload(block_beside, **INLINE)
def block_beside_by_type(
    beside, first,
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    return block_alone if beside == types.none else block_in_parts


def block_alone(
    beside, first,
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    return block_exponentials(
        x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
    )  # fmt: skip


def block_in_parts(
    beside, first,
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    j = 0
    while j < n:
        beside_exponentials(beside, first + j, first + j + PART)
        start, rest = block_exponentials(
            x, at + j, mask, mask_at + j, min(PART, n - j), shift, high, low, c, ahead, exact, rest,
            e, kept, e_at + j, block, start, result, result_at + j,
        )  # fmt: skip
        j += PART
    return start, rest


def beside_exponentials(beside, start, stop):
    """Do other work before elements ``start`` to ``stop`` of a row, and less than a vector at its end, are done.

    ``stop`` may lie behind the row's end. See numbasoft.past_caches, which says what there is.
    """


def block_exponentials(
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    """Loop 2 over the whole vectors of at most BLOCK elements, for ``segment_exponentials``.

    What loop 3 sums goes to ``block`` from ``start`` on. Returned are where it ends and ``rest``.
    """


@overload(block_exponentials, **INLINE)
def block_exponentials_by_type(
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    return block_exponentials_64 if x.dtype == types.float64 else block_exponentials_32


def block_exponentials_32(
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    w = lanes(x)
    j, k = 0, start
    while j + w <= n:
        prefetch(x, at + j + ahead)
        v = load_kept(x, at + j, mask, mask_at + j)
        v, part, rest = exponential_of(exact, v, shift, high, low, c, rest)
        prefetch_to_write(e, e_at + j + WRITE_AHEAD)
        prefetch_to_write(result, result_at + j)
        store(kept, e_at + j, v)
        store(block, k, part)
        j += w
        k += w
    return k, rest


def block_exponentials_64(
    x, at, mask, mask_at, n, shift, high, low, c, ahead, exact, rest, e, kept, e_at, block, start, result, result_at
):  # fmt: skip
    # half of the work after the other: of chains of operations as long as both few fit into the CPU's queue
    w = lanes(x)
    powers = stack_block(x, BLOCK)
    j = 0
    while j + w <= n:
        prefetch(x, at + j + ahead)
        r, power = reduced_64(load_kept(x, at + j, mask, mask_at + j), shift, high, low)
        prefetch_to_write(e, e_at + j + WRITE_AHEAD)
        prefetch_to_write(result, result_at + j)
        store(block, start + j, r)
        store(powers, j, power)
        j += w
    j, k = 0, start
    while j + w <= n:
        v, part, rest = exponential_of_reduced(exact, load(block, k), load(powers, j), c, rest)
        store(kept, e_at + j, v)
        store(block, k, part)
        j += w
        k += w
    return k, rest


def exponential_of_reduced(exact, r, power, c, rest):
    """As ``exponential_of``, its second half."""


@overload(exponential_of_reduced, **INLINE)
def exponential_of_reduced_by_type(exact, r, power, c, rest):
    if exact == types.none:
        return rounded_of_reduced
    return lambda exact, r, power, c, rest: in_parts_of_reduced(r, power, c, rest)


def rounded_of_reduced(exact, r, power, c, rest):
    e = of_reduced(r, power, c)
    return e, e, None


def exact_for(x):
    """Not None where probabilities are to be as exact as float32 and float64 allow."""


@overload(exact_for, **INLINE)
def exact_for_by_type(x):
    return (lambda x: None) if x.dtype.bitwidth == 16 else (lambda x: True)


def exact_for_logarithms(x):
    """Not None where a logarithm needs what the sum misses: in float32 it is within 2 ULP without."""


@overload(exact_for_logarithms, **INLINE)
def exact_for_logarithms_by_type(x):
    return (lambda x: True) if x.dtype == types.float64 else (lambda x: None)


def exponential_of(exact, v, shift, high, low, c, rest):
    """exp of a vector, what is summed of it at once, and ``rest`` with what is besides."""


@overload(exponential_of, **INLINE)
def exponential_of_by_type(exact, v, shift, high, low, c, rest):
    return rounded if exact == types.none else in_parts


def rounded(exact, v, shift, high, low, c, rest):
    e = exponential(v, shift, high, low, c)
    return e, e, None


def in_parts(exact, v, shift, high, low, c, rest):
    return exponential_in_parts(v, shift, high, low, c, rest)


def blocks_in(e, on_stack):
    """Where what loop 3 sums waits for it, and where else exponentials are kept.

    float64 waits in e, if there is one. float32 is read back by halves of a vector, and those wait until a store to two
    lines of the cache is done, as stores to e may be: on the stack none is.
    """


@overload(blocks_in, **INLINE)
def blocks_in_by_type(e, on_stack):
    if is_float64(e):
        return lambda e, on_stack: (e, None)
    return lambda e, on_stack: (on_stack, e)


def is_float64(array):
    return array != types.none and array.dtype == types.float64


def block_start(e, e_at):
    """Where a block begins that would be at ``e_at`` in e."""


@overload(block_start, **INLINE)
def block_start_by_type(e, e_at):
    return (lambda e, e_at: e_at) if is_float64(e) else (lambda e, e_at: 0)


@inline
def is_plain(shift):
    """Whether a row's shift needs neither c nor ``lowest`` (see elementary.bounded)."""
    return shift[0] == 0.0 and shift[3] == -np.inf


def plain(shift):
    """A shift that ``is_plain``, known as such: that saves a subtraction, a comparison and two registers."""


@overload(plain, **INLINE)
def plain_by_type(shift):
    zero = np.float64 if shift[0] == types.float64 else np.float32
    return lambda shift: (zero(0.0), shift[1], shift[2], None, shift[4])


@inline
def row_exponentials(
    x,
    at,
    mask,
    mask_at,
    n,
    e,
    e_at,
    shift,
    high,
    low,
    ahead,
    exact=None,
    result=None,
    result_at=0,
    beside=None,
):
    """Loops 2 and 3 over a row, as ``segment_exponentials``: the sum in two parts."""
    length = segment_length(n)
    total = 0.0
    lost = 0.0
    j = 0
    while j < n:
        count, x_at, m_at, k_at, r_at = min(length, n - j), at + j, mask_at + j, e_at + j, result_at + j
        if is_plain(shift):
            s = segment_exponentials(
                x,
                x_at,
                mask,
                m_at,
                count,
                e,
                k_at,
                plain(shift),
                high,
                low,
                ahead,
                exact,
                result,
                r_at,
                beside,
                j,
            )
        else:
            s = segment_exponentials(
                x, x_at, mask, m_at, count, e, k_at, shift, high, low, ahead, exact, result, r_at, beside, j
            )
        total, lost = sum_joined(x, total, lost, s)
        j += count
    return total, lost


@inline
def segment_others(x, at, mask, mask_at, n, m, shift, high, low):
    """The sum of exp over one segment without the row's maximum (see tiles.CONFIDENT).

    What counts as 0 is left out: a large weight may multiply the logarithm.
    """
    total = dot_start(filled(x, 0.0))
    c = coefficients(filled(x, 0.0))
    w = lanes(x)
    j = 0
    while j + w <= n:
        v = load_kept(x, at + j, mask, mask_at + j)
        e = exponential(v, shift, high, low, c)
        total = exact_push(total, select((v == m) | (e < least(e)), 0.0, e))
        j += w
    if j < n:
        v = load_kept_part(x, at + j, mask, mask_at + j, n - j)
        e = exponential(v, shift, high, low, c)
        e = select((v == m) | (e < least(e)), 0.0, e)
        total = exact_push(total, select(below(v, n - j), e, 0.0))
    return sum_end(total)


@inline
def row_others(x, at, mask, mask_at, n, m, shift, high, low):
    """The sum of exp over a row without its maximum, in two parts."""
    length = segment_length(n)
    total = 0.0
    lost = 0.0
    j = 0
    while j < n:
        s = segment_others(x, at + j, mask, mask_at + j, min(length, n - j), m, shift, high, low)
        total, lost = sum_joined(x, total, lost, s)
        j += length
    return total, lost


@inline
def second_vector(array, at, n):
    """Where vectors between the first of a row and its last begin, if order does not matter and they may overlap.

    Each fills a line of the cache (of 16 bits, half of one); a load of two lines takes twice as long. Short rows gain nothing.
    """
    w = lanes(array)
    return aligned_after(array, at) if n >= LEAST_ALIGNED * w else w


@inline
def row_probabilities(e, e_at, n, first, second, way, y, at, x=None, x_at=0, mask=None, mask_at=0):
    """Loop 4 from what ``tiles.choose_ways`` chose, and beside it loop 1."""
    if way == PLAIN:
        return row_scaled(e, e_at, n, (first, second), y, at, x, x_at, mask, mask_at)
    if way == DEEP:
        return row_scaled(e, e_at, n, deep_factor(first, second), y, at, x, x_at, mask, mask_at)
    return row_scaled(e, e_at, n, any_factor(first, second), y, at, x, x_at, mask, mask_at)


@inline
def row_scaled(e, e_at, n, factor, y, at, x=None, x_at=0, mask=None, mask_at=0):
    """Loop 4: every exponential divided by the sum (see ``elementary.divided``).

    Beside it, unless x is None, loop 1 over a row of x, whose range is returned: next to stores it takes no time.
    """
    w = lanes(y)
    m = filled(y, -np.inf), filled(y, np.inf)
    if n < w:
        a = load_part(e, e_at, n, 0.0)
        store_part(y, at, n, divided(a, factor))
        return range_across(range_with_part(m, x, x_at, mask, mask_at, n))
    # The first and the last vector may overlap others; they are read before those overwrite them in place.
    first, last = load(e, e_at), load(e, e_at + n - w)
    m = range_with(range_with(m, x, x_at, mask, mask_at), x, x_at + n - w, mask, mask_at + n - w)
    j = second_vector(e, e_at, n)
    while j + w < n:
        m = range_with(m, x, x_at + j, mask, mask_at + j)
        a = load(e, e_at + j)
        store(y, at + j, divided(a, factor))
        j += w
    store(y, at, divided(first, factor))
    store(y, at + n - w, divided(last, factor))
    return range_across(m)


def largest_safe(x):
    """Up to this no difference of two elements overflows the computing type."""


@overload(largest_safe, **INLINE)
def largest_safe_by_type(x):
    safe = float(np.finfo(np.float64 if x.dtype == types.float64 else np.float32).max) / 4
    return lambda x: safe


@inline
def row_quotients(x, at, mask, mask_at, n, shift, high, low, factor, y, y_at):
    """Loops 2 and 4 once more from x, where the exponentials were not kept."""
    w = lanes(x)
    c = coefficients(filled(x, 0.0))
    j = 0
    while j + w <= n:
        a = exponential(load_kept(x, at + j, mask, mask_at + j), shift, high, low, c)
        store(y, y_at + j, divided(a, factor))
        j += w
    if j < n:
        a = exponential(load_kept_part(x, at + j, mask, mask_at + j, n - j), shift, high, low, c)
        store_part(y, y_at + j, n - j, divided(a, factor))


@inline
def logarithm(v, m, reduced, inverse, logarithms):
    """(v - m) / T - l: the difference and l in two parts each, so nothing is lost near 0."""
    d, lost = two_sum(v * reduced, 0.0 - m * reduced)
    y = fma(d, inverse[0], 0.0 - logarithms[0])
    rest = fma(d, inverse[1], fma(lost, inverse[0], 0.0 - logarithms[1]))
    return select(y == -np.inf, y, y + rest)


def difference(v, first, second):
    """v less a number in two parts. Where v is near the first, that subtraction is exact.

    Else it rounds, which float64 cannot spare: its logarithms are not exact beyond their last place.
    """


@overload(difference, **INLINE)
def difference_by_type(v, first, second):
    return difference_64 if v.element == types.float64 else difference_32


def difference_32(v, first, second):
    return (v - first) - second


def difference_64(v, first, second):
    d, lost = two_sum(v, 0.0 - first)
    return d + (select(lost == lost, lost, 0.0) - second)


@inline
def row_differences(x, at, mask, mask_at, n, subtrahend, y, y_at):
    """Loop 5 of log_softmax where T is 1: x[j] - (m + l) for every element, m + l in two parts."""
    w = lanes(x)
    if n < w:
        v = load_kept_part(x, at, mask, mask_at, n)
        store_part(y, y_at, n, difference(v, subtrahend[0], subtrahend[1]))
        return
    # as in ``row_scaled``
    first, last = load_kept(x, at, mask, mask_at), load_kept(x, at + n - w, mask, mask_at + n - w)
    j = second_vector(y, y_at, n)
    while j + w < n:
        v = load_kept(x, at + j, mask, mask_at + j)
        store(y, y_at + j, difference(v, subtrahend[0], subtrahend[1]))
        j += w
    store(y, y_at, difference(first, subtrahend[0], subtrahend[1]))
    store(y, y_at + n - w, difference(last, subtrahend[0], subtrahend[1]))


@inline
def row_logarithms(x, at, mask, mask_at, n, m, inverse, logarithms, y, y_at):
    """Loop 5 of log_softmax with any T: (x[j] - m) / T - l for every element."""
    w = lanes(x)
    # x[j] - m may overflow though its quotient by T does not, and two_sum where m is huge: both are made smaller
    reduced = 0.25 if inverse[0] < 1.0 or abs(np.float64(m)) > largest_safe(x) else 1.0
    inverse = (inverse[0] / reduced, inverse[1] / reduced)
    j = 0
    while j + w <= n:
        v = load_kept(x, at + j, mask, mask_at + j)
        store(y, y_at + j, logarithm(v, m, reduced, inverse, logarithms))
        j += w
    if j < n:
        v = load_kept_part(x, at + j, mask, mask_at + j, n - j)
        store_part(y, y_at + j, n - j, logarithm(v, m, reduced, inverse, logarithms))


def counted(a, b, unless_zero):
    """a, or 0 where b is 0 and ``unless_zero`` is not None: infinity and NaN do not count there."""


@overload(counted, **INLINE)
def counted_by_type(a, b, unless_zero):
    if unless_zero == types.none:
        return lambda a, b, unless_zero: a
    return lambda a, b, unless_zero: select(b == 0.0, 0.0, a)


@inline
def segment_dot(a, a_at, b, b_at, n, unless_zero):
    """The sum of a[j] * b[j] over a segment in two parts."""
    total = dot_start(filled(b, 0.0))
    w = lanes(b)
    j = 0
    while j + w <= n:
        v = load(b, b_at + j)
        total = dot_push(total, counted(load(a, a_at + j), v, unless_zero), v)
        j += w
    if j < n:
        v = load_part(b, b_at + j, n - j, 0.0)
        total = dot_push(total, counted(load_part(a, a_at + j, n - j, 0.0), v, unless_zero), v)
    return sum_end(total)


@inline
def row_dot(a, a_at, b, b_at, n, unless_zero):
    """The sum of a[j] * b[j] over a row in two parts."""
    length = segment_length(n)
    total = 0.0
    lost = 0.0
    j = 0
    while j < n:
        s = segment_dot(a, a_at + j, b, b_at + j, min(length, n - j), unless_zero)
        total, lost = sum_joined(b, total, lost, s)
        j += length
    return total, lost


@inline
def segment_sum(a, a_at, b, b_at, n, factor):
    """The sum of factor * a[j] over a segment in two parts; where b[j] is -inf, a[j] does not count."""
    factor = filled(b, factor)
    total = dot_start(factor)
    w = lanes(b)
    j = 0
    while j + w <= n:
        v = load(b, b_at + j)
        total = dot_push(total, select(v == -np.inf, 0.0, load(a, a_at + j)), factor)
        j += w
    if j < n:
        v = load_part(b, b_at + j, n - j, -np.inf)
        total = dot_push(total, select(v == -np.inf, 0.0, load_part(a, a_at + j, n - j, 0.0)), factor)
    return sum_end(total)


@inline
def row_sum(a, a_at, b, b_at, n, factor):
    """The sum of factor * a[j] over a row in two parts; where b[j] is -inf, a[j] does not count."""
    length = segment_length(n)
    total = 0.0
    lost = 0.0
    j = 0
    while j < n:
        s = segment_sum(a, a_at + j, b, b_at + j, min(length, n - j), factor)
        total, lost = sum_joined(b, total, lost, s)
        j += length
    return total, lost


@inline
def row_sum_and_range(a, a_at, b, b_at, n):
    """What ``row_sum`` gives for a factor of 1, and the least and the largest b[j] apart from NaN."""
    length = segment_length(n)
    w = lanes(b)
    total = 0.0
    lost = 0.0
    most, least = filled(b, -np.inf), filled(b, np.inf)
    first = 0
    while first < n:
        count = min(length, n - first)
        part = dot_start(most)
        j = first
        while j + w <= first + count:
            v = load(b, b_at + j)
            part = exact_push(part, select(v == -np.inf, 0.0, load(a, a_at + j)))
            most, least = maximum(v, most), minimum(v, least)
            j += w
        rest = first + count - j
        if rest > 0:
            v = load_part(b, b_at + j, rest, np.inf)
            part = exact_push(part, select(v == -np.inf, 0.0, load_part(a, a_at + j, rest, 0.0)))
            most, least = maximum(load_part(b, b_at + j, rest, -np.inf), most), minimum(v, least)
        total, lost = sum_joined(b, total, lost, sum_end(part))
        first += count
    most, least = range_across((most, least))
    return (total, lost), least, most


def nothing_kept(x, mask, mask_at, n):
    """Whether a mask keeps nothing of n elements."""


@overload(nothing_kept, **INLINE)
def nothing_kept_by_type(x, mask, mask_at, n):
    if mask == types.none:
        return lambda x, mask, mask_at, n: False

    def body(x, mask, mask_at, n):
        for j in range(0, n, lanes(x)):
            if any_kept_of(x, mask, mask_at + j, n - j):
                return False
        return True

    return body


def filled_if_empty(x, mask, mask_at, n, m, y, at, count, value):
    """Whether a mask keeps nothing of a row whose maximum is m; then count elements of y get a value."""


@overload(filled_if_empty, **INLINE)
def filled_if_empty_by_type(x, mask, mask_at, n, m, y, at, count, value):
    if mask == types.none:  # nothing to compile: that takes a quarter of a second
        return lambda x, mask, mask_at, n, m, y, at, count, value: False
    return fill_if_empty


def fill_if_empty(x, mask, mask_at, n, m, y, at, count, value):
    if m != -np.inf or not nothing_kept(x, mask, mask_at, n):
        return False
    w = lanes(y)
    v = filled(y, value)
    j = 0
    while j + w <= count:
        store(y, at + j, v)
        j += w
    if j < count:
        store_part(y, at + j, count - j, v)
    return True
