"""One number from many: the sum of numbers that are not negative, a segment at a time, whatever their number.

A segment's sum is one of integers (see ``numbasoft.cuda.elementary``), relative to its own largest
term. A single block then adds the segments in an order that depends on nothing but how many there
are, relative to the largest of all, so that a mean does not overflow where the sum does. Which
elements make up a segment depends on the storage type alone.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from . import jit
from .backend import (
    bits_of,
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
    writer,
)
from .calls import step
from .elementary import arithmetic, parts_of, two_sum
from .geometry import ITEMSIZE, TOTAL_THREADS
from .signatures import address, number_type, signature, size, whole
from .team import CELLS, first_row, place, segment_of, team_maximum, team_sum

INFINITY = float("inf")

# Of a segment: the largest term, and the sum of all in two words.
LARGEST, TOTAL, REST = range(3)
FIELDS = 3
PAIR_CELLS = 2 * TOTAL_THREADS


@jit.device
def field(work, segment, which):
    return work + (segment * FIELDS + which) * 8


@lru_cache
def partial_sums(kind):
    """The function that leaves the sum of a segment's terms in ``work``."""
    a = arithmetic(kind)
    lift_for, top_of, sum_below = a.lift_for, a.top_of, a.sum_below

    @jit.device
    def write_sum(v, team, cells, on, work, segment):
        m = team_maximum(largest_lane(v), team, cells, 0)
        lift = lift_for(m)
        total, rest = sum_below((v * lift) * lift, top_of(m, lift))
        total, rest = team_sum(total, team, cells, 1), team_sum(rest, team, cells, 2)
        if on and place(team) == 0:
            write_cell(field(work, segment, LARGEST), bits_of(m))
            write_cell(field(work, segment, TOTAL), total)
            write_cell(field(work, segment, REST), rest)

    return write_sum


@lru_cache
def sums(storage, vectors, aligned):
    """The sums of the segments of an array of float32 or float64."""
    write_sum = partial_sums(storage)
    load = loader(storage, storage, vectors, aligned, 0.0)
    itemsize = ITEMSIZE[storage]

    def segment_totals(
        x,  # IN   address of the first element
        n,  # IN   elements
        team,  # IN   threads that share a segment
        segments,  # IN
        length,  # IN   elements of a segment
        work,  # OUT  FIELDS int64 for every segment
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        _, on, begin, inside = segment_of(team, 1, n, segments, length)
        at = x + begin * itemsize
        v = load(at, at, place(team), team, inside)
        write_sum(v, team, cells, on, work, first_row(team))

    return segment_totals, signature(address, whole, size, size, size, address)


@lru_cache
def total(kind, storage):
    """The sum of the segments' sums times a factor, as one number of a storage type."""
    a = arithmetic(kind)
    lift_for, unlift_for, top_of, pair_of = a.lift_for, a.unlift_for, a.top_of, a.pair_of
    write = writer(storage)
    like = number_type(kind)

    def segments_total(
        work,  # IN   FIELDS int64 for every segment
        segments,  # IN
        factor,  # IN   in two parts
        factor_rest,
        result,  # OUT  address of a number
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        pairs = cuda.shared.array(PAIR_CELLS, types.int64)
        factor, factor_rest = vector_of(factor), vector_of(factor_rest)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        m = number(factor, 0.0)
        i = thread
        while i < segments:
            m = maximum(m, from_bits(m, read_cell(field(work, i, LARGEST))))
            i += threads
        m = team_maximum(m, threads, cells, 0)
        lift = lift_for(m)
        top = top_of(m, lift)

        s, lost = number(factor, 0.0), number(factor, 0.0)
        i = thread
        while i < segments:
            largest = from_bits(m, read_cell(field(work, i, LARGEST)))
            own = lift_for(largest)
            back = lift * unlift_for(largest)
            scale = (top_of(largest, own) / top) * back * back
            parts = parts_of(read_cell(field(work, i, TOTAL)), read_cell(field(work, i, REST)))
            term, rest = pair_of(m, parts)
            s, s_lost = two_sum(s, term * scale)
            lost = lost + fma(rest, scale, s_lost)
            i += threads
        half = threads // 2
        while half:
            pairs[2 * thread], pairs[2 * thread + 1] = bits_of(s), bits_of(lost)
            cuda.syncthreads()
            if thread < half:
                other = 2 * (thread + half)
                s, s_lost = two_sum(s, from_bits(s, pairs[other]))
                lost = lost + (s_lost + from_bits(s, pairs[other + 1]))
            cuda.syncthreads()
            half //= 2

        value = fma(s, factor, fma(s, factor_rest, lost * factor))
        value = value * top * unlift_for(m) * unlift_for(m)
        if thread == 0:
            write(result, select(m < INFINITY, value, m))

    return segments_total, signature(address, size, like, like, address)


def total_step(kind, storage, segments, factor, work, result, ordinal, handle):
    """The launch of ``total``; ``factor`` is in two parts."""
    arguments = work, segments, *factor, result
    return step(total, (kind, storage), 1, TOTAL_THREADS, TOTAL_THREADS, ordinal, handle, *arguments)
