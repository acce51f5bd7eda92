"""Long rows read once: what a thread has loaded it keeps, in shared memory where its registers end.

Every thread has slots of 16 bytes for itself and keeps vectors in the storage type, so that 16 bits
stay 16 bits; neighbouring threads have neighbouring slots, and no barrier stands between what is put
there and what is taken. A row has one block. A maximum and a sum of integers have no order: the bits
are those of a row that is held in registers or done in segments (see numbasoft.cuda.split).
"""

from functools import lru_cache

from numba import cuda

from . import jit
from .backend import (
    count,
    fma,
    holder,
    largest_lane,
    loader,
    maximum,
    number,
    recaller,
    room,
    select,
)
from .elementary import arithmetic_of, parts_of
from .geometry import (
    RESIDENT_LAST_VECTORS,
    RESIDENT_MASKED_VECTORS,
    RESIDENT_PAIR_VECTORS,
    RESIDENT_VECTORS,
)
from .masked import masked_loader
from .split import finer, in_units, settled, terms_summed
from .team import team_maximum, team_sum

INFINITY = float("inf")


@lru_cache
def first_loops(storage, aligned, masked, others):
    """Loops 1 to 3 of a row, and the function that takes a thread's elements again after them."""
    a = arithmetic_of(storage)
    shift_of, sum_of_terms = a.shift_of, terms_summed(a, others)
    finer_of, settle = finer(a.compute), settled(a.compute)
    at_once = (RESIDENT_MASKED_VECTORS if masked else RESIDENT_VECTORS)[storage]
    in_hand = RESIDENT_LAST_VECTORS[storage]
    load, hold = masked_loader(storage, at_once, aligned, masked, True), holder(storage, at_once)
    recall = recaller(storage, a.compute, in_hand, -INFINITY)

    @jit.device
    def loops(at, mask_at, mask_step, n, slots, high, low, cells):
        """The maximum, what of the others is needed, the sum in parts, and how many elements the mask keeps."""
        memory, team = room(), cuda.blockDim.x

        # loop 1: the maximum of the row, and the largest of the others
        m = number(high, -INFINITY)
        second, kept = m, at - at
        i = cuda.threadIdx.x
        while i < slots:
            v, keeps = load(at, mask_at, mask_step, i, team, n)
            hold(memory, 0, i, team, slots, v)
            kept += keeps
            top = largest_lane(v)
            both = maximum(m, top)
            if others:
                below = largest_lane(select(v < top, v, -INFINITY))
                second = maximum(select(m < both, m, second), select(top < both, top, below))
            m = both
            i += at_once * team
        first = m
        m = team_maximum(first, team, cells, 0)
        if others:
            second = team_maximum(select(first < m, first, second), team, cells, 1)
        if masked:
            kept = team_sum(kept, team, cells, 2)

        # loops 2 and 3: the sum of exp of every element after the shift, or of all but the maxima
        shift = shift_of(m, high, low)
        if others:
            shift = shift_of(select(second > -INFINITY, second, m), high, low)
        factor, bits = finer_of(n)
        total, rest, maxima = at - at, at - at, at - at
        i = cuda.threadIdx.x
        while i < slots:
            v = recall(memory, 0, i, team, slots)
            if others:
                maxima += count(v == m)
                v = select(v < m, v, -INFINITY)
            part = sum_of_terms(v, shift, high, low, factor)
            total += part[0]
            rest += part[1]
            i += in_hand * team
        total, rest = in_units(total, rest, bits)
        total, rest = team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4)
        if others:
            maxima = team_sum(maxima, team, cells, 5)
        high_part, low_part, rest_high, rest_low = parts_of(total, rest)
        return m, second, maxima, settle(high_part, low_part, rest_high, rest_low), kept

    return loops, recall


@lru_cache
def first_terms(storage, product, aligned):
    """The largest terms of a gradient and the sum of all, g * y where ``product`` is true, else g.

    And the functions that take a thread's y and g again after them.
    """
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, finer_sum_of = a.lift_for, a.top_of, a.finer_sum_of
    finer_of, settle = finer(a.compute), settled(a.compute)
    nothing = 0.0 if product else -INFINITY
    at_once, in_hand = RESIDENT_PAIR_VECTORS[storage], RESIDENT_LAST_VECTORS[storage]
    load_g = loader(storage, a.compute, at_once, aligned, 0.0, True)
    load_y = loader(storage, a.compute, at_once, aligned, nothing, True)
    hold = holder(storage, at_once)
    recall_g = recaller(storage, a.compute, in_hand, 0.0)
    recall_y = recaller(storage, a.compute, in_hand, nothing)

    @jit.device
    def terms(g, y, n, slots, zero, cells):
        """The largest term, the largest of the negated ones, what lifts them, and the sum in parts."""
        memory, team = room(), cuda.blockDim.x

        # the largest terms, for the scale of the sum
        up = number(zero, -INFINITY)
        down = up
        i = cuda.threadIdx.x
        while i < slots:
            v = load_y(y, y, i, team, n)
            d = load_g(g, y, i, team, n)
            d = select(v == nothing, 0.0, d)
            hold(memory, 0, i, team, slots, v)
            hold(memory, slots, i, team, slots, d)
            p = d * v if product else d
            up, down = maximum(up, largest_lane(p)), maximum(down, largest_lane(0.0 - p))
            i += at_once * team
        up, down = team_maximum(up, team, cells, 0), team_maximum(down, team, cells, 1)
        largest = maximum(up, down)
        lift = lift_for(largest)

        # the sum of the terms
        top = top_of(largest, lift)
        factor, bits = finer_of(n)
        total, rest = y - y, y - y
        i = cuda.threadIdx.x
        while i < slots:
            v = recall_y(memory, 0, i, team, slots) * lift
            d = recall_g(memory, slots, i, team, slots) * lift
            p = d * v if product else d * lift
            part = finer_sum_of(p, fma(d, v, 0.0 - p) if product else p - p, top, factor)
            total += part[0]
            rest += part[1]
            i += in_hand * team
        total, rest = in_units(total, rest, bits)
        total, rest = team_sum(total, team, cells, 2), team_sum(rest, team, cells, 3)
        high_part, low_part, rest_high, rest_low = parts_of(total, rest)
        return up, down, lift, settle(high_part, low_part, rest_high, rest_low)

    return terms, recall_y, recall_g
