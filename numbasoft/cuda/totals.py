"""One number from many: their sum, a segment at a time, whatever their number; by a divisor, their mean.

A segment's sum is one of integers (see ``numbasoft.cuda.elementary``), relative to its own largest
term, so that it has no order. A single block then adds the segments in two parts of float64, in an
order that depends on nothing but how many there are, relative to the largest of all, so that a mean
does not overflow where the sum does. Which elements make up a segment depends on the storage type alone.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from . import geometry, jit
from .backend import (
    bits_of,
    from_bits,
    from_lane,
    largest_lane,
    loader,
    maximum,
    number,
    read_cell,
    reader,
    select,
    vector_of,
    write_cell,
    writer,
)
from .elementary import arithmetic, parts_of, two_sum
from .signatures import address, signature, size, whole
from .team import CELLS, exchanged, first_row, place, segment_of, team_maximum, team_sum

INFINITY = float("inf")
THREADS = 256  # of the blocks that add in two parts, but for the one that adds all segments
PAIR_CELLS, TOTAL_CELLS = 2 * THREADS, 2 * geometry.TOTAL_THREADS

# Of a segment: the largest term and the largest negated one, and the sum of all in two words.
LARGEST, LOWEST, TOTAL, REST = range(4)
FIELDS = 4


@jit.device
def plus(a, b):
    """The sum of two numbers, each in two parts; where it is not finite the first part tells."""
    s, lost = two_sum(a[0], b[0])
    return s, a[1] + b[1] + select(lost == lost, lost, 0.0)


@jit.device
def value_of(pair):
    return pair[0] + select(pair[0] - pair[0] == 0.0, pair[1], 0.0)


@jit.device
def block_sum(pair, pairs):
    """In thread 0 the sum over a block, of a power of two of threads, of numbers in two parts.

    ``pairs`` has two int64 for every thread, in shared memory.
    """
    thread = cuda.threadIdx.x
    half = cuda.blockDim.x // 2
    while half:
        pairs[2 * thread], pairs[2 * thread + 1] = bits_of(pair[0]), bits_of(pair[1])
        cuda.syncthreads()
        if thread < half:
            other = 2 * (thread + half)
            pair = plus(pair, (from_bits(pair[0], pairs[other]), from_bits(pair[1], pairs[other + 1])))
        cuda.syncthreads()
        half //= 2
    return pair


@jit.device
def warp_pairs(pair, lanes):
    """The sum over neighbouring threads of a warp, a power of two of them, of numbers in two parts, in each of them."""
    step = 1
    while step < lanes:
        pair = plus(pair, (from_lane(pair[0], step), from_lane(pair[1], step)))
        step *= 2
    return pair


@jit.device
def team_pairs(pair, team, cells, slot):
    """As ``warp_pairs``, over a team; takes two slots. The order depends on how many threads it has."""
    pair = warp_pairs(pair, min(team, 32))
    if team > 32:
        zero = number(pair[0], 0.0)
        high, low = (
            exchanged(pair[0], zero, team, cells, slot),
            exchanged(pair[1], zero, team, cells, slot + 1),
        )
        pair = warp_pairs((high, low), 32)
    return pair


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
        up = team_maximum(largest_lane(v), team, cells, 0)
        down = team_maximum(largest_lane(0.0 - v), team, cells, 1)
        m = maximum(up, down)
        lift = lift_for(m)
        total, rest = sum_below((v * lift) * lift, top_of(m, lift))
        total, rest = team_sum(total, team, cells, 2), team_sum(rest, team, cells, 3)
        if on and place(team) == 0:
            write_cell(field(work, segment, LARGEST), bits_of(up))
            write_cell(field(work, segment, LOWEST), bits_of(down))
            write_cell(field(work, segment, TOTAL), total)
            write_cell(field(work, segment, REST), rest)

    return write_sum


@lru_cache
def sums(kind, vectors):
    """The sums of the segments of an array of float32 or float64."""
    write_sum = partial_sums(kind)
    load = loader(kind, kind, vectors, False, 0.0)
    itemsize = geometry.ITEMSIZE[kind]

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
def total(kind, storage, raised=False):
    """The sum of all segments, divided and rounded once; 0 where the divisor is 0. ``raised``: exp of that."""
    a, of_segment = arithmetic("f8"), arithmetic(kind)
    lift_for, unlift_for, top_of = a.lift_for, a.unlift_for, a.top_of
    own_lift_for, own_unlift_for = of_segment.lift_for, of_segment.unlift_for
    own_top_of, pair_of = of_segment.top_of, of_segment.pair_of
    shift_of, wide_shift, wide_exponential = a.shift_of, a.wide_shift, a.wide_exponential
    log2_e, log2_e_rest = a.log2_e
    read_term, read, write = reader(kind, "f8"), reader("f8", "f8"), writer(storage)

    def segments_total(
        work,  # IN   FIELDS int64 for every segment
        segments,  # IN
        divisor,  # IN   what to divide by, unless an address is given
        divisor_at,  # IN   0, or the address of a float64 divisor
        result,  # OUT  address of a number
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        pairs = cuda.shared.array(TOTAL_CELLS, types.int64)
        divisor = vector_of(divisor)
        zero = number(divisor, 0.0)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        up, down = zero, zero
        i = thread
        while i < segments:
            up = maximum(up, read_term(field(work, i, LARGEST)))
            down = maximum(down, read_term(field(work, i, LOWEST)))
            i += threads
        up, down = team_maximum(up, threads, cells, 0), team_maximum(down, threads, cells, 1)
        m = maximum(up, down)
        lift = lift_for(m)
        top = top_of(m, lift)

        pair = zero, zero
        i = thread
        while i < segments:
            largest = maximum(read_term(field(work, i, LARGEST)), read_term(field(work, i, LOWEST)))
            back = lift * own_unlift_for(largest)
            scale = (own_top_of(largest, own_lift_for(largest)) / top) * back * back
            parts = parts_of(read_cell(field(work, i, TOTAL)), read_cell(field(work, i, REST)))
            term, rest = pair_of(m, parts)
            pair = plus(pair, (term * scale, rest * scale))
            i += threads
        pair = block_sum(pair, pairs)
        if thread == 0:
            if divisor_at != 0:
                divisor = read(divisor_at)
            value = (value_of(pair) / divisor) * top * unlift_for(m) * unlift_for(m)
            value = select(m < INFINITY, value, (up - down) / divisor)
            value = select(divisor == 0.0, 0.0, value)
            if raised:
                high, low = number(value, log2_e), number(value, log2_e_rest)
                shift = wide_shift(shift_of(zero, high, low), 0.0, high)
                root, other = wide_exponential(value, shift, high, low)
                value = root * other
            write(result, value)

    return segments_total, signature(address, whole, types.float64, address, address)


# How they are launched: ``one`` makes a launch of a factory, its options, blocks and threads, and of arguments.


def last_step(one, kind, storage, segments, divisor, work, result, divisor_at=0, raised=False):
    """The launch of ``total``."""
    threads, arguments = geometry.TOTAL_THREADS, (work, segments, divisor, divisor_at, result)
    options = (kind, storage, True) if raised else (kind, storage)
    return one(total, options, 1, threads, threads, *arguments)


def cells_for(kind, n):
    """The working memory for n numbers, in int64."""
    _, length = geometry.segments_launch(n, kind, False)
    return FIELDS * max(1, -(-n // max(1, length)))


def steps(one, kind, storage, n, x, divisor, work, result, divisor_at=0, raised=False):
    """The launches for the sum of n numbers, divided; ``raised``: for exp of that."""
    how, length = geometry.segments_launch(n, kind, False)
    segments = -(-n // length) if n else 0
    last = last_step(one, kind, storage, segments, divisor, work, result, divisor_at, raised)
    if not n:
        return (last,)
    arguments = x, n, how.team, segments, length, work
    blocks = how.blocks(segments)
    return one(sums, (kind, how.vectors), blocks, how.threads, geometry.MOST_THREADS, *arguments), last
