"""Few long rows: every row in segments, each done by a block of its own.

A kernel does one step of a softmax for all segments; what a segment has found it leaves in
its FIELDS int64 of a work array, and every block of the next kernel combines those of its
row. A maximum and a sum of integers have no order: the bits are those of a row done whole.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from . import jit
from .backend import (
    bits_of,
    count,
    fma,
    from_bits,
    largest_lane,
    loader,
    maximum,
    number,
    read_cell,
    select,
    vector_of,
    write_cell,
)
from .elementary import PART_BITS, arithmetic_of, carried, parts_of
from .geometry import ITEMSIZE, SEGMENT_VECTORS, segment_length
from .layout import LONGEST_COLUMN
from .masked import masked_loader
from .signatures import address, number_type, signature, size, whole
from .team import CELLS, team_maximum, team_sum

INFINITY = float("inf")

# Of a segment: the maximum, the largest element below it, how many elements the mask keeps; the
# sum of integers in two words, how many elements are the row's maximum. In a backward pass: the
# largest term and the largest of the negated terms; the sum in two words.
MAXIMUM, SECOND, KEPT, TOTAL, REST, MAXIMA = range(6)
FIELDS = 6


# Units that hold the sum of any column are too large for the rounding of more terms than those to go unseen:
# the sum of a segment has room for smaller ones. float64's are small enough.
FINER = {"f4": 5, "f8": 0}


@jit.device
def row_of(segments):
    """The row that this block has a segment of, and which."""
    return cuda.blockIdx.x // segments, cuda.blockIdx.x % segments


@jit.device
def segment_place(segments, length, n):
    """The row that this block has a segment of, the segment's first element, and how many it has."""
    row, segment = row_of(segments)
    begin = segment * length
    return row, begin, min(length, n - begin)


@jit.device
def field(work, segment, which):
    """Where a number of a segment stands; segments are counted over all rows."""
    return work + (segment * FIELDS + which) * 8


@jit.device
def maximum_of(like, work, row, segments, which, cells, slot):
    """The largest of a number over the segments of a row."""
    value = number(like, -INFINITY)
    i = cuda.threadIdx.x
    while i < segments:
        value = maximum(value, from_bits(like, read_cell(field(work, row * segments + i, which))))
        i += cuda.blockDim.x
    return team_maximum(value, cuda.blockDim.x, cells, slot)


@jit.device
def second_of(m, work, row, segments, cells, slot):
    """The largest element of a row below its maximum m."""
    value = number(m, -INFINITY)
    i = cuda.threadIdx.x
    while i < segments:
        at = row * segments + i
        first = from_bits(m, read_cell(field(work, at, MAXIMUM)))
        second = from_bits(m, read_cell(field(work, at, SECOND)))
        value = maximum(value, select(first < m, first, second))
        i += cuda.blockDim.x
    return team_maximum(value, cuda.blockDim.x, cells, slot)


@jit.device
def count_over(work, row, segments, which, cells, slot):
    """The sum of a count over the segments of a row."""
    value = row - row
    i = cuda.threadIdx.x
    while i < segments:
        value += read_cell(field(work, row * segments + i, which))
        i += cuda.blockDim.x
    return team_sum(value, cuda.blockDim.x, cells, slot)


@lru_cache
def finer(compute):
    """Of a row of n: what its terms are multiplied by before they are rounded, and the bits that makes."""
    most = FINER[compute]

    @jit.device
    def factor_and_bits(n):
        bits = most if n > LONGEST_COLUMN else 0
        return 1 << bits, bits

    return factor_and_bits


def terms_summed(arithmetic, rounded):
    """The function that adds up the exponentials of a thread's elements, ``rounded`` or as exact as softmax's."""
    exponential, sum_of = arithmetic.exponential, arithmetic.sum_of
    exponential_and_rest, exact_sum_of = arithmetic.exponential_and_rest, arithmetic.exact_sum_of

    @jit.device
    def sum_of_rounded(v, shift, high, low, factor):
        return sum_of(exponential(v, shift, high, low) * factor)

    @jit.device
    def sum_of_exact(v, shift, high, low, factor):
        e, lost = exponential_and_rest(v, shift, high, low)
        return exact_sum_of(e * factor, lost * factor)

    return sum_of_rounded if rounded else sum_of_exact


@jit.device
def in_units(total, rest, bits):
    """A part of a sum in finer units in those of all sums, and what that leaves beside what else is left."""
    return total >> bits, rest + (total & ((1 << bits) - 1))


@jit.device
def write_sum(work, segment, total, rest, bits):
    """Leave the sum of a segment."""
    total, rest = in_units(total, rest, bits)
    write_cell(field(work, segment, TOTAL), total)
    write_cell(field(work, segment, REST), rest)


@lru_cache
def settled(compute):
    """A sum of what ``in_units`` gives, in parts: of finer units so many as make one are one, the rest is rounded.

    Once for a row, so that no bit depends on where it was cut.
    """
    most, half = FINER[compute], 1 << FINER[compute] >> 1

    @jit.device
    def settle(high, low, rest_high, rest_low):
        if most:
            rest = (rest_high << PART_BITS) + rest_low
            low += (rest + half) >> most
            rest_high, rest_low = rest - rest, rest - rest
        return carried(high, low, rest_high, rest_low)

    return settle


@lru_cache
def summed_over(compute):
    """The function that adds what ``in_units`` has given for the segments of a row."""
    settle = settled(compute)

    @jit.device
    def sum_over(work, row, segments, cells, slot):
        """The sum over the segments of a row, in parts; takes four slots."""
        high, low, rest_high, rest_low = row - row, row - row, row - row, row - row
        i = cuda.threadIdx.x
        while i < segments:
            at = row * segments + i
            parts = parts_of(read_cell(field(work, at, TOTAL)), read_cell(field(work, at, REST)))
            high += parts[0]
            low += parts[1]
            rest_high += parts[2]
            rest_low += parts[3]
            i += cuda.blockDim.x
        return settle(
            team_sum(high, cuda.blockDim.x, cells, slot),
            team_sum(low, cuda.blockDim.x, cells, slot + 1),
            team_sum(rest_high, cuda.blockDim.x, cells, slot + 2),
            team_sum(rest_low, cuda.blockDim.x, cells, slot + 3),
        )

    return sum_over


@lru_cache
def maxima(storage, masked):
    """Loop 1: the maximum of every segment, and what else a row needs to know before its sum."""
    load = masked_loader(storage, SEGMENT_VECTORS[storage], False, masked)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]

    def segment_maxima(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        segments,  # IN   of a row
        work,  # OUT  FIELDS int64 for every segment
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch + begin * itemsize
        mask_at = mask + row * mask_pitch + begin * mask_step
        v, kept = load(at, mask_at, mask_step, thread, team, inside)
        if masked:
            kept = team_sum(kept, team, cells, 2)
        m = team_maximum(largest_lane(v), team, cells, 0)
        below = largest_lane(select(v < m, v, -INFINITY))
        second = team_maximum(below, team, cells, 1)
        if thread == 0:
            unit = cuda.blockIdx.x
            write_cell(field(work, unit, MAXIMUM), bits_of(m))
            write_cell(field(work, unit, SECOND), bits_of(second))
            write_cell(field(work, unit, KEPT), kept)

    return segment_maxima, signature(address, whole, address, whole, whole, size, size, address)


@lru_cache
def sums(storage, masked, others, gradient=False):
    """Loops 2 and 3: the sum of exp of every element after the shift, or of all but the maxima."""
    a = arithmetic_of(storage, gradient)
    shift_of, sum_of_terms, finer_of = a.shift_of, terms_summed(a, others or gradient), finer(a.compute)
    load = masked_loader(storage, SEGMENT_VECTORS[storage], False, masked)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    def segment_sums(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        work,  # OUT  FIELDS int64 for every segment
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch + begin * itemsize
        high, low = vector_of(high), vector_of(low)
        mask_at = mask + row * mask_pitch + begin * mask_step
        v, _ = load(at, mask_at, mask_step, thread, team, inside)
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        maxima = row - row
        if others:
            maxima = team_sum(count(v == m), team, cells, 2)
            v = select(v < m, v, -INFINITY)
            second = second_of(m, work, row, segments, cells, 1)
            m = select(second > -INFINITY, second, m)
        factor, bits = finer_of(n)
        total, rest = sum_of_terms(v, shift_of(m, high, low), high, low, factor)
        total, rest = team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4)
        if thread == 0:
            unit = cuda.blockIdx.x
            write_sum(work, unit, total, rest, bits)
            write_cell(field(work, unit, MAXIMA), maxima)

    return segment_sums, signature(address, whole, address, whole, whole, size, size, kind, kind, address)


@lru_cache
def terms(storage, product, last):
    """The sum of a gradient's terms: g * y where ``product`` is true, else g; none where y is ``nothing``.

    First the largest terms of every segment; with ``last`` the sums.
    """
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, finer_sum_of, finer_of = a.lift_for, a.top_of, a.finer_sum_of, finer(a.compute)
    nothing = 0.0 if product else -INFINITY
    load_g = loader(storage, a.compute, SEGMENT_VECTORS[storage], False, 0.0)
    load_y = loader(storage, a.compute, SEGMENT_VECTORS[storage], False, nothing)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    like = number_type(a.compute)

    def segment_terms(
        g,  # IN   address of the first row of the gradient
        g_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of what forward gave
        y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        segments,  # IN   of a row
        zero,  # IN   0, of the computing type
        work,  # OUT  FIELDS int64 for every segment
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = y + row * y_pitch + begin * itemsize
        v = load_y(at, at, thread, team, inside)
        d = load_g(g + row * g_pitch + begin * itemsize, at, thread, team, inside)
        d = select(v == nothing, 0.0, d)
        zero = vector_of(zero)
        unit = cuda.blockIdx.x
        if last:
            largest = maximum_of(zero, work, row, segments, MAXIMUM, cells, 0)
            largest = maximum(largest, maximum_of(zero, work, row, segments, SECOND, cells, 1))
            lift = lift_for(largest)
            d, v = d * lift, v * lift
            p = d * v if product else d * lift
            lost = fma(d, v, 0.0 - p) if product else p - p
            factor, bits = finer_of(n)
            total, rest = finer_sum_of(p, lost, top_of(largest, lift), factor)
            total = team_sum(total, team, cells, 2)
            rest = team_sum(rest, team, cells, 3)
            if thread == 0:
                write_sum(work, unit, total, rest, bits)
        else:
            p = d * v if product else d
            up = team_maximum(largest_lane(p), team, cells, 0)
            down = team_maximum(largest_lane(0.0 - p), team, cells, 1)
            if thread == 0:
                write_cell(field(work, unit, MAXIMUM), bits_of(up))
                write_cell(field(work, unit, SECOND), bits_of(down))

    return segment_terms, signature(address, whole, address, whole, size, size, like, address)
