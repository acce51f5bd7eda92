"""Sampling on CUDA: a block draws from a row by its exponentials, which it computes anew whenever it passes them.

A weight is an exponential rounded to an integer, so that sums have no order: a draw is the same
whatever the launch. Classes are kept by a bound on their exponentials, and of those at the bound by their place.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...counter import DRAW, NOISE
from ...cuda import jit
from ...cuda.backend import (
    absolute,
    add_to_bins,
    as_integer,
    bits_of,
    count,
    fma,
    from_bits,
    high_product,
    integer_as,
    integer_sum,
    largest_lane,
    leading_zeros,
    loader,
    mask_of,
    maximum,
    number,
    placer,
    reader,
    select,
    spanner,
    storer,
    vector_of,
    write_cell,
    writer,
)
from ...cuda.counter import fractions
from ...cuda.elementary import arithmetic_of, carried, parts_of, two_sum
from ...cuda.geometry import DRAW_VECTORS, ITEMSIZE, VECTOR_BYTES, lanes
from ...cuda.operations import Sample
from ...cuda.quotients import quotients
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.team import CELLS, place, team_least, team_maximum, team_sum, warp_sum

INFINITY = float("inf")

# A pass over a row tells its exponentials apart by so many bits; bins are added up in two stages.
BIN_BITS = 8
BINS, STAGE = 1 << BIN_BITS, 1 << BIN_BITS // 2

# Where in the cells of a block the shares of a row and the sums of bins are.
SHARES, STAGES = 32, 64

# -2**64 / 3
LESS_THIRD = -6148914691236517205


@jit.device
def weight_sum(e, here, bound, unit):
    """The sum of the weights of a thread's elements."""
    return integer_sum(e * unit)[0]


@jit.device
def is_kept(e, here, bound):
    """Whether elements are kept; ``here`` holds up to the last of those at the bound."""
    return (e > bound) | ((e == bound) & here)


@jit.device
def kept_sum(e, here, bound, unit):
    """As ``weight_sum``, of those that are kept."""
    return integer_sum(select(is_kept(e, here, bound), e * unit, 0.0))[0]


@jit.device
def ties(e, here, bound, unit):
    """How many of a thread's elements are kept and at the bound."""
    return count((e == bound) & here)


@lru_cache
def place_of(storage, quantity, of_all):
    """The function that finds where a part of the sum of a quantity over a row ends; ``of_all``: a part of 2**64."""
    exponential = arithmetic_of(storage, gradient=True).exponential
    compute = arithmetic_of(storage, gradient=True).compute
    vectors, per_vector, itemsize = DRAW_VECTORS[storage], lanes(storage), ITEMSIZE[storage]
    load, load_one = (loader(storage, compute, v, False, -INFINITY) for v in (vectors, 1))
    within, within_one = spanner(storage, vectors), spanner(storage, 1)
    read = reader(storage, compute)

    @jit.device
    def sum_over(at, n, last, group, numbers):
        """The sum over n elements that a group of threads shares."""
        shift, high, low, unit, bound = numbers
        thread = place(group)
        total = at - at
        while thread * per_vector < n + per_vector:
            e = exponential(load(at, at, thread, group, n), shift, high, low)
            total += quantity(e, within(at, thread, group, 0, last + 1), bound, unit)
            thread += vectors * group
        return warp_sum(total, group)

    @jit.device
    def share_out(at, begin, n, last, group, numbers, cells):
        """Leave the sums of the groups' shares of n elements in the cells; how long a share is."""
        all_lanes = cuda.blockDim.x // group * per_vector
        length = (n + all_lanes - 1) // all_lanes * per_vector
        i = cuda.threadIdx.x // group
        first = min(i * length, n)
        start = begin + first
        share = sum_over(at + start * itemsize, min(length, n - first), last - start, group, numbers)
        cuda.syncthreads()
        if place(group) == 0:
            cells[SHARES + i] = share
        cuda.syncthreads()
        return length

    @jit.device
    def first_beyond(at, n, last, group, part, numbers, cells):
        """The first element at which the sum exceeds a part of it: a number, or a part of 2**64."""
        shift, high, low, unit, bound = numbers
        begin = n - n
        is_first = is_wide = True
        while is_wide:
            length = share_out(at, begin, n, last, group, numbers, cells)
            i = begin - begin
            if of_all and is_first:
                total = begin - begin
                while i < cuda.blockDim.x // group:
                    total += cells[SHARES + i]
                    i += 1
                part = high_product(part, total)
                i = begin - begin
            while i < cuda.blockDim.x // group - 1 and part >= cells[SHARES + i]:
                part -= cells[SHARES + i]
                i += 1
            begin += i * length
            n = min(length, n - i * length)
            is_first, is_wide = False, n > (group - 1) * per_vector

        # a vector to a thread
        thread, start = place(group), at + begin * itemsize
        e = exponential(load_one(start, start, thread, group, n), shift, high, low)
        share = quantity(e, within_one(start, thread, group, 0, last + 1 - begin), bound, unit)
        cuda.syncthreads()
        if cuda.threadIdx.x < group:
            cells[SHARES + thread] = share
        cuda.syncthreads()
        i = begin - begin
        while i < group - 1 and part >= cells[SHARES + i]:
            part -= cells[SHARES + i]
            i += 1

        # one by one
        j = max(begin, begin + i * per_vector - (start & (VECTOR_BYTES - 1)) // itemsize)
        searching = True
        while searching:
            e = exponential(read(at + j * itemsize), shift, high, low)
            part -= quantity(e, mask_of(j <= last), bound, unit)
            searching = part >= 0 and j < begin + n - 1
            if searching:
                j += 1
        return j

    return first_beyond


@lru_cache
def selection(storage):
    """The function that keeps the first classes, by their number or by the sum of their weights."""
    a = arithmetic_of(storage, gradient=True)
    exponential, largest = a.exponential, a.largest
    vectors, per_vector = DRAW_VECTORS[storage], lanes(storage)
    load = loader(storage, a.compute, vectors, False, -INFINITY)
    within = spanner(storage, vectors)
    first_beyond = place_of(storage, ties, False)

    @jit.device
    def tally(at, n, last, amount, numbers, lowest, step, used, bins, cells):
        """The sums of what is kept by the bits of the exponentials, and of the sums in two stages."""
        shift, high, low, _, bound = numbers
        cuda.syncthreads()
        i = cuda.threadIdx.x
        while i < BINS:
            bins[i] = 0
            i += cuda.blockDim.x
        cuda.syncthreads()
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            e = exponential(load(at, at, thread, cuda.blockDim.x, n), shift, high, low)
            here = within(at, thread, cuda.blockDim.x, 0, last + 1)
            amounts = select(is_kept(e, here, bound), fma(e, amount[0], amount[1]), 0.0)
            add_to_bins(bins, e, amounts, lowest, step, used)
            thread += vectors * cuda.blockDim.x
        cuda.syncthreads()
        i = cuda.threadIdx.x
        while i < BINS // STAGE:
            total = lowest - lowest
            for k in range(STAGE):
                total += bins[i * STAGE + k]
            cells[STAGES + i] = total
            i += cuda.blockDim.x
        cuda.syncthreads()

    @jit.device
    def keep(at, n, last, group, by_weight, wanted, numbers, bins, cells):
        """The bound, and the last at the bound, that keep so many of the kept, or by weight a part of 2**64."""
        shift, high, low, unit, bound = numbers
        zero, ones = number(unit, 0.0), number(unit, 1.0)
        of_weight = mask_of(by_weight)
        amount = select(of_weight, unit, zero), select(of_weight, zero, ones)
        lowest = bits_of(bound)
        start = lowest
        step = above = found = one = total = lowest - lowest
        while (bits_of(number(bound, largest)) - lowest) >> step >= BINS:
            step += 1
        used = step - step + BINS
        is_first = is_short = True
        is_whole = False
        while is_short:
            tally(at, n, last, amount, numbers, start, step, used, bins, cells)
            if is_first:
                is_first = False
                for i in range(BINS // STAGE):
                    total += cells[STAGES + i]
                if by_weight:
                    wanted = max((high_product(wanted, total * 2) + 1) >> 1, 1)
            is_short = total > wanted
            if is_short:
                # the bin, from the top, in which the sum reaches what is wanted
                i = step - step + BINS // STAGE - 1
                while i > 0 and above + cells[STAGES + i] < wanted:
                    above += cells[STAGES + i]
                    i -= 1
                k = i * STAGE + STAGE - 1
                while k > i * STAGE and above + bins[k] < wanted:
                    above += bins[k]
                    k -= 1
                found = bins[k]
                start += k << step
                one = integer_sum(fma(from_bits(bound, start), amount[0], amount[1]))[0]
                # all of the bin are kept if it just reaches that or has a single class
                is_whole = above + found <= wanted or found < 2 * one
                is_short = step > 0 and not is_whole
                bits = min(step, BIN_BITS)
                step -= bits
                used = step - step + 1 << bits
        if total > wanted:
            if start > lowest:
                last = n - 1
            bound = from_bits(bound, start)
            if not is_whole:
                some = (wanted - above + one - 1) // one
                if some * one < found:
                    numbers = shift, high, low, unit, bound
                    last = first_beyond(at, n, last, group, some - 1, numbers, cells)
        return bound, last

    return keep


@lru_cache
def draw(storage, filtered):
    """One class per row, of all or of those that are kept."""
    a = arithmetic_of(storage, gradient=True)
    vectors, per_vector = DRAW_VECTORS[storage], lanes(storage)
    load = loader(storage, a.compute, vectors, False, -INFINITY)
    shift_of = a.shift_of
    first_beyond = place_of(storage, kept_sum if filtered else weight_sum, True)
    keep = selection(storage)
    kind = number_type(a.compute)

    def draw_class(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        n,  # IN   classes
        group,  # IN   threads that share a part of a row
        key,  # IN   of all random numbers
        top_k,  # IN   how many classes are kept at most
        has_p,  # IN   whether a part of the sum is kept only
        top_p,  # IN   which, times 2**64
        least,  # IN   the least exponential that is kept
        unit,  # IN   what makes an exponential a weight
        high,  # IN   log2(e) / T in two parts
        low,
        drawn,  # OUT  address of an int64 for every row: its class, -1 where it has no probabilities
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        bins = cuda.shared.array(BINS, types.int64)
        row = cuda.blockIdx.x
        at = x + row * x_pitch
        high, low, unit, bound = vector_of(high), vector_of(low), vector_of(unit), vector_of(least)

        # the maximum of the row
        m = number(high, -INFINITY)
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            m = maximum(m, largest_lane(load(at, at, thread, cuda.blockDim.x, n)))
            thread += vectors * cuda.blockDim.x
        m = team_maximum(m, cuda.blockDim.x, cells, 0)
        j = at - at - 1
        if count(absolute(m) < INFINITY) > 0:
            shift = shift_of(m, high, low)
            all_of, last = at - at + n, at - at + n - 1
            if filtered:
                # first by top_k, then by top_p
                for by_weight in range(2):
                    limit = top_p if by_weight else top_k
                    if (has_p != 0) if by_weight else (top_k < all_of):
                        numbers = shift, high, low, unit, bound
                        bound, last = keep(
                            at, all_of, last, group, by_weight > 0, limit, numbers, bins, cells
                        )

            # the sum of the weights, and where a random part of it ends
            numbers = shift, high, low, unit, bound
            fraction, _ = fractions(key, row, 0, DRAW)
            j = first_beyond(at, all_of, last, group, fraction, numbers, cells)
        if cuda.threadIdx.x == 0:
            write_cell(drawn + row * 8, j)

    return draw_class, signature(
        address, whole, size, size, whole, whole, whole, whole, kind, kind, kind, kind, address
    )


@lru_cache
def noise(kind):
    """The function that adds a Gumbel number to a logit."""
    a = arithmetic_of(kind)
    log_near, log_of = a.log_near, a.log_of

    @jit.device
    def with_noise(v, fraction):
        """v - log(-log(u)), rounded once, for a fraction of 2**64."""
        # u is 1 + f, from 2/3 to 4/3, times a power of two: f is exact also next to 1
        steps = leading_zeros(fraction)
        f = fraction << steps
        if f < LESS_THIRD:
            f <<= 1
            steps += 1
        high = integer_as(v, f)
        low = integer_as(v, f - as_integer(high))
        log, log_rest = log_near(high * 2.0**-64, low * 2.0**-64, 0.0 - integer_as(v, steps))
        g, rest = log_of(0.0 - log, 0.0 - log_rest)
        s, lost = two_sum(v, 0.0 - g)
        return select(lost == lost, s + (lost - rest), s)

    return with_noise


@lru_cache
def relaxed(kind):
    """softmax of logits with Gumbel noise, which are written in the place of the result first."""
    a = arithmetic_of(kind)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    factor, quotient = quotients(kind)
    with_noise = noise(kind)
    vectors, per_vector, itemsize = DRAW_VECTORS[kind], lanes(kind), ITEMSIZE[kind]
    load, store = loader(kind, kind, vectors, False, -INFINITY), storer(kind, kind, vectors, False)
    read, write = reader(kind, kind), writer(kind)
    like = number_type(kind)

    def relaxed_softmax(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        n,  # IN   classes
        key,  # IN   of all random numbers
        high,  # IN   log2(e) / T in two parts
        low,
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, threads = cuda.blockIdx.x, cuda.blockDim.x
        x_at, at = x + row * x_pitch, y + row * y_pitch
        high, low = vector_of(high), vector_of(low)

        # loop 1: the noise, and the maximum of the row
        m = number(high, -INFINITY)
        thread = cuda.threadIdx.x
        while 2 * thread < n:
            j = 2 * thread * itemsize
            first, second = fractions(key, row, thread, NOISE)
            v = with_noise(read(x_at + j), first)
            write(at + j, v)
            m = maximum(m, v)
            if 2 * thread + 1 < n:
                v = with_noise(read(x_at + j + itemsize), second)
                write(at + j + itemsize, v)
                m = maximum(m, v)
            thread += threads
        m = team_maximum(m, threads, cells, 0)
        cuda.syncthreads()  # what other threads have written is read below

        # loops 2 and 3: the sum of exp of every element after the shift
        shift = shift_of(m, high, low)
        total, rest = at - at, at - at
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            part = sum_of(exponential(load(at, at, thread, threads, n), shift, high, low))
            total += part[0]
            rest += part[1]
            thread += vectors * threads
        high_parts, low_parts, rest_high, rest_low = parts_of(total, rest)
        r = factor(
            m,
            carried(
                team_sum(high_parts, threads, cells, 1),
                team_sum(low_parts, threads, cells, 2),
                team_sum(rest_high, threads, cells, 3),
                team_sum(rest_low, threads, cells, 4),
            ),
        )

        # loops 2 and 4: exp of every element divided by the sum
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            e = exponential(load(at, at, thread, threads, n), shift, high, low)
            store(at, at, thread, threads, n, True, quotient(e, r, False))
            thread += vectors * threads

    return relaxed_softmax, signature(address, whole, size, whole, like, like, address, whole)


@lru_cache
def hardened(storage):
    """1 at the first of the largest elements of a row and 0 elsewhere; NaN everywhere where one is NaN."""
    compute = arithmetic_of(storage).compute
    vectors, per_vector = DRAW_VECTORS[storage], lanes(storage)
    load, store = (
        loader(storage, compute, vectors, False, -INFINITY),
        storer(storage, compute, vectors, False),
    )
    places_of, within = placer(storage, compute, vectors), spanner(storage, vectors)
    kind = number_type(compute)

    def hardened_softmax(
        y,  # IN   address of the first row
        y_pitch,  # IN   bytes from row to row
        n,  # IN   classes
        nothing,  # IN   -inf
        drawn,  # OUT  address of the first row
        drawn_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        threads = cuda.blockDim.x
        at, drawn_at = y + cuda.blockIdx.x * y_pitch, drawn + cuda.blockIdx.x * drawn_pitch
        m = vector_of(nothing)
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            m = maximum(m, largest_lane(load(at, at, thread, threads, n)))
            thread += vectors * threads
        m = team_maximum(m, threads, cells, 0)

        # the first that equals it: float32 does not count a long row, but the elements of one pass of the block
        places = places_of(at, cuda.threadIdx.x, threads)
        j = at - at + n
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector and j == n:
            is_largest = load(at, at, thread, threads, n) == m
            if count(is_largest) > 0:
                before = (thread - cuda.threadIdx.x) * per_vector
                j = before - as_integer(largest_lane(select(is_largest, 0.0 - places, -INFINITY)))
            thread += vectors * threads
        j = team_least(j, threads, cells, 1)
        zero = m - m  # NaN in a row of NaN, where none equals it
        one = zero + number(m, 1.0)
        thread = cuda.threadIdx.x
        while thread * per_vector < n + per_vector:
            chosen = select(within(at, thread, threads, j, j + 1), one, zero)
            store(drawn_at, at, thread, threads, n, True, chosen)
            thread += vectors * threads

    return hardened_softmax, signature(address, whole, size, kind, address, whole)


SAMPLE = Sample(draw, relaxed, hardened)
