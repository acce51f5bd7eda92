"""log_softmax on CUDA, forward and backward: the five loops over a row that a team of threads holds."""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import (
    absolute,
    count,
    exponent,
    fma,
    gatherer,
    largest_lane,
    loader,
    maximum,
    number,
    power_of_two_above,
    room,
    scatterer,
    select,
    storer,
    vector_of,
)
from ...cuda.elementary import arithmetic_of, parts_of
from ...cuda.geometry import (
    ITEMSIZE,
    LAST_VECTORS,
    RESIDENT_LAST_VECTORS,
    SEGMENT_VECTORS,
    STRIDED_LANES,
    segment_length,
)
from ...cuda.logs import logarithms
from ...cuda.masked import masked_gatherer, masked_loader
from ...cuda.operations import Backward, Forward
from ...cuda.resident import first_loops, first_terms
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.split import (
    KEPT,
    MAXIMA,
    MAXIMUM,
    SECOND,
    count_over,
    maximum_of,
    second_of,
    segment_place,
    summed_over,
)
from ...cuda.team import (
    CELLS,
    COLUMN_CELLS,
    column_maximum,
    column_of,
    column_sum,
    row_place,
    team_maximum,
    team_sum,
)

INFINITY, NAN = float("inf"), float("nan")


@lru_cache
def forward(storage, vectors, aligned, masked):
    """Rows that fit into the registers of a team."""
    a = arithmetic_of(storage)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    log_of_row, logarithm = logarithms(storage)
    load = masked_loader(storage, vectors, aligned, masked)
    store = storer(storage, a.compute, vectors, aligned)
    kind = number_type(a.compute)

    def log_softmax_forward(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = row_place(rows, team)
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)
        v, kept = load(at, mask + row * mask_pitch, mask_step, thread, team, n)

        # loop 1: the maximum of the row, and the largest of the others
        m = team_maximum(largest_lane(v), team, cells, 0)
        maxima = team_sum(count(v == m), team, cells, 1)
        others = select(v < m, v, -INFINITY)
        second = team_maximum(largest_lane(others), team, cells, 2)

        # loop 2: exp of every other element after the shift
        e = exponential(others, shift_of(select(second > -INFINITY, second, m), high, low), high, low)

        # loop 3: the sum over the others
        total, rest = sum_of(e)
        total, rest = team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4)

        # loop 4: the log of the sum
        log = log_of_row(m, second, maxima, parts_of(total, rest), high, low)

        # loop 5: every element less the maximum and the log
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        is_empty = False
        if masked:
            is_empty = team_sum(kept, team, cells, 5) == 0
        result = logarithm(v, m, inverse, inverse_rest, log, is_empty)
        store(y + row * y_pitch, at, thread, team, n, on, result)

    return log_softmax_forward, signature(
        address, whole, address, whole, whole, whole, size, size, kind, kind, kind, kind, address, whole
    )


@lru_cache
def forward_columns(storage, masked):
    """Rows that lie along another axis: 32 of them side by side, read four times."""
    a = arithmetic_of(storage)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    log_of_row, logarithm = logarithms(storage)
    gather, scatter = masked_gatherer(storage, masked), scatterer(storage)
    kind = number_type(a.compute)

    def log_softmax_columns(
        x,  # IN   address of the first element
        x_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        x_step,
        x_inner,
        mask,  # IN   address of the first element's mask
        mask_outer,  # IN   as of x
        mask_step,
        mask_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        y,  # OUT  address of the first element
        y_outer,  # IN   as of x
        y_step,
        y_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, k, start, share, on = column_of(inner)
        at, mask_at = x + i * x_outer + k * x_inner, mask + i * mask_outer + k * mask_inner
        y_at = y + i * y_outer + k * y_inner
        high, low = vector_of(high), vector_of(low)

        # loop 1: the maximum of the column, and the largest of the others
        m = number(high, -INFINITY)
        kept = i - i
        j = start
        while j < n:
            v, keeps = gather(at, x_step, mask_at, mask_step, j, share, n)
            kept += keeps
            m = maximum(m, largest_lane(v))
            j += share * STRIDED_LANES
        m = column_maximum(m, cells)
        second = number(high, -INFINITY)
        maxima = i - i
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
            second = maximum(second, largest_lane(select(v < m, v, -INFINITY)))
            maxima += count(v == m)
            j += share * STRIDED_LANES
        second, maxima = column_maximum(second, cells), column_sum(maxima, cells)

        # loops 2 and 3: the sum of exp of every other element after the shift
        shift = shift_of(select(second > -INFINITY, second, m), high, low)
        total, rest = i - i, i - i
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
            part = sum_of(exponential(select(v < m, v, -INFINITY), shift, high, low))
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES

        # loop 4: the log of the sum
        total, rest = column_sum(total, cells), column_sum(rest, cells)
        log = log_of_row(m, second, maxima, parts_of(total, rest), high, low)

        # loop 5: every element less the maximum and the log
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        is_empty = False
        if masked:
            is_empty = column_sum(kept, cells) == 0
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
            result = logarithm(v, m, inverse, inverse_rest, log, is_empty)
            scatter(y_at, y_step, j, share, n, on, result)
            j += share * STRIDED_LANES

    return log_softmax_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind, kind, kind, kind,
        address, whole, whole, whole,
    )  # fmt: skip


@lru_cache
def resident(storage, aligned, masked):
    """Rows that fit into the shared memory of a block (see numbasoft.cuda.resident)."""
    compute = arithmetic_of(storage).compute
    log_of_row, logarithm = logarithms(storage)
    in_hand = RESIDENT_LAST_VECTORS[storage]
    first_three, recall = first_loops(storage, aligned, masked, True)
    store = storer(storage, compute, in_hand, aligned)
    kind = number_type(compute)

    def log_softmax_resident(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        slots,  # IN   vectors for which there is room
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, team = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)

        # loops 1 to 3: the maximum, and the sum of exp of every other element after the shift
        mask_at = mask + row * mask_pitch
        m, second, maxima, total, kept = first_three(at, mask_at, mask_step, n, slots, high, low, cells)

        # loop 4: the log of the sum
        log = log_of_row(m, second, maxima, total, high, low)

        # loop 5: every element less the maximum and the log
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        is_empty = False
        if masked:
            is_empty = kept == 0
        memory, y_at = room(), y + row * y_pitch
        while thread < slots:
            v = recall(memory, 0, thread, team, slots)
            result = logarithm(v, m, inverse, inverse_rest, log, is_empty)
            store(y_at, at, thread, team, n, True, result)
            thread += in_hand * team

    return log_softmax_resident, signature(
        address, whole, address, whole, whole, size, size, kind, kind, kind, kind, address, whole
    )


@lru_cache
def subtract(storage, masked):
    """Loops 4 and 5 for a segment of a long row (see numbasoft.cuda.split)."""
    a = arithmetic_of(storage)
    log_of_row, logarithm = logarithms(storage)
    sum_over = summed_over(a.compute)
    held, at_once = SEGMENT_VECTORS[storage], LAST_VECTORS[storage]
    load = masked_loader(storage, at_once, False, masked)
    store = storer(storage, a.compute, at_once, False)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    def log_softmax_subtract(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        work,  # IN   what the segments' maxima and sums are
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch + begin * itemsize
        high, low = vector_of(high), vector_of(low)
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        second = second_of(m, work, row, segments, cells, 1)
        maxima = count_over(work, row, segments, MAXIMA, cells, 2)
        total = sum_over(work, row, segments, cells, 3)
        log = log_of_row(m, second, maxima, total, high, low)
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        is_empty = False
        if masked:
            is_empty = count_over(work, row, segments, KEPT, cells, 7) == 0
        # the row is loaded only now, part by part: held through the sums it takes 178 registers with a mask
        mask_at, y_at = mask + row * mask_pitch + begin * mask_step, y + row * y_pitch + begin * itemsize
        while thread < held * team:
            v, _ = load(at, mask_at, mask_step, thread, team, inside)
            result = logarithm(v, m, inverse, inverse_rest, log, is_empty)
            store(y_at, at, thread, team, inside, True, result)
            thread += at_once * team

    return log_softmax_subtract, signature(
        address, whole, address, whole, whole, size, size, kind, kind, kind, kind, address, address, whole
    )


# Room for the number of terms beside the largest 1 / T, by which no gradient up to LARGE overflows.
ROOM, LARGE = 2.0**-16, 2.0**20


@lru_cache
def gradients(storage):
    """(g - exp(log_y) * sum g) / T for a thread's elements, and what it needs once for every row."""
    a = arithmetic_of(storage, gradient=True)
    pair_of, top_of, shift_of = a.pair_of, a.top_of, a.shift_of
    wide_shift, wide_exponential = a.wide_shift, a.wide_exponential

    @jit.device
    def share_of_row(up, down, lift, total, inverse, high, low):
        """What ``gradient`` needs of a row: sum g / T as a factor and, in the shift, a power of two; and a size.

        It is made from the largest terms and the sum of all, lifted twice. Where g is larger than LARGE its
        quotient by T may overflow, though the difference does not: there all is done smaller by that size.
        """
        s, lost = pair_of(up, total)
        # where a term is infinite or NaN, up - down is what any sum of the terms is
        is_finite = maximum(up, down) < INFINITY
        s, lost = select(is_finite, s, up - down), select(is_finite, lost, 0.0)
        factor = fma(s * ROOM, inverse, (lost * ROOM) * inverse)
        power = exponent(top_of(maximum(up, down), lift)) - exponent(lift * lift * ROOM)
        shift = wide_shift(shift_of(number(high, 0.0), high, low), power, high)
        size = maximum(power_of_two_above(inverse), number(inverse, 1.0))
        return factor, shift, size, 1.0 / size

    @jit.device
    def gradient(g, log_y, share, inverse, high, low):
        """(g - exp(log_y) * sum g) / T; 0 where log_y is -inf."""
        factor, shift, size, smaller = share
        e, power = wide_exponential(log_y, shift, high, low)
        is_large = absolute(g) > LARGE
        smaller = select(is_large, smaller, 1.0)
        d = fma(0.0 - (e * smaller) * factor, power, (g * smaller) * inverse)
        return select(log_y == -INFINITY, 0.0, select(is_large, d * size, d))

    return share_of_row, gradient


@lru_cache
def backward(storage, vectors, aligned):
    """Gradients of rows that fit into the registers of a team."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, signed_sum_of = a.lift_for, a.top_of, a.signed_sum_of
    share_of_row, gradient = gradients(storage)
    load_g = loader(storage, a.compute, vectors, aligned, 0.0)
    load_y = loader(storage, a.compute, vectors, aligned, -INFINITY)
    store = storer(storage, a.compute, vectors, aligned)
    kind = number_type(a.compute)

    def log_softmax_backward(
        g,  # IN   address of the first row of the gradient with respect to log_y
        g_pitch,  # IN   bytes from row to row
        log_y,  # IN   address of the first row of what forward gave
        log_y_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        high,  # IN   log2(e) in two parts
        low,
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first row: (g - exp(log_y) * sum g) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = row_place(rows, team)
        at = log_y + row * log_y_pitch
        v = load_y(at, at, thread, team, n)
        d = load_g(g + row * g_pitch, at, thread, team, n)
        d = select(v == -INFINITY, 0.0, d)

        # the largest gradients, for the scale of the sum
        up = team_maximum(largest_lane(d), team, cells, 0)
        down = team_maximum(largest_lane(0.0 - d), team, cells, 1)
        largest = maximum(up, down)
        lift = lift_for(largest)

        # the sum of g over the row
        p = (d * lift) * lift
        total, rest = signed_sum_of(p, p - p, top_of(largest, lift))
        total, rest = team_sum(total, team, cells, 2), team_sum(rest, team, cells, 3)

        # every g less its share of that
        high, low, inverse = vector_of(high), vector_of(low), vector_of(inverse)
        share = share_of_row(up, down, lift, parts_of(total, rest), inverse, high, low)
        result = gradient(d, v, share, inverse, high, low)
        store(dx + row * dx_pitch, at, thread, team, n, on, result)

    return log_softmax_backward, signature(
        address, whole, address, whole, whole, size, size, kind, kind, kind, address, whole
    )


@lru_cache
def backward_columns(storage):
    """Gradients of rows that lie along another axis: 32 of them side by side, read three times."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, signed_sum_of = a.lift_for, a.top_of, a.signed_sum_of
    share_of_row, gradient = gradients(storage)
    gather_g, gather_y = gatherer(storage, a.compute, 0.0), gatherer(storage, a.compute, -INFINITY)
    scatter = scatterer(storage)
    kind = number_type(a.compute)

    def log_softmax_backward_columns(
        g,  # IN   address of the first element of the gradient with respect to log_y
        g_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        g_step,
        g_inner,
        log_y,  # IN   address of the first element of what forward gave
        log_y_outer,  # IN   as of g
        log_y_step,
        log_y_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) in two parts
        low,
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first element: (g - exp(log_y) * sum g) / T
        dx_outer,  # IN   as of g
        dx_step,
        dx_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, k, start, share, on = column_of(inner)
        g_at = g + i * g_outer + k * g_inner
        log_y_at = log_y + i * log_y_outer + k * log_y_inner
        dx_at = dx + i * dx_outer + k * dx_inner
        high, low, inverse = vector_of(high), vector_of(low), vector_of(inverse)

        # the largest gradients, for the scale of the sum
        up = number(inverse, -INFINITY)
        down = up
        j = start
        while j < n:
            v = gather_y(log_y_at, log_y_step, j, share, n)
            d = select(v == -INFINITY, 0.0, gather_g(g_at, g_step, j, share, n))
            up, down = maximum(up, largest_lane(d)), maximum(down, largest_lane(0.0 - d))
            j += share * STRIDED_LANES
        up, down = column_maximum(up, cells), column_maximum(down, cells)
        largest = maximum(up, down)
        lift = lift_for(largest)
        top = top_of(largest, lift)

        # the sum of g over the column
        total, rest = i - i, i - i
        j = start
        while j < n:
            v = gather_y(log_y_at, log_y_step, j, share, n)
            d = select(v == -INFINITY, 0.0, gather_g(g_at, g_step, j, share, n))
            p = (d * lift) * lift
            part = signed_sum_of(p, p - p, top)
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES
        total, rest = column_sum(total, cells), column_sum(rest, cells)
        of_column = share_of_row(up, down, lift, parts_of(total, rest), inverse, high, low)

        # every g less its share of that
        j = start
        while j < n:
            v = gather_y(log_y_at, log_y_step, j, share, n)
            d = gather_g(g_at, g_step, j, share, n)
            result = gradient(d, v, of_column, inverse, high, low)
            scatter(dx_at, dx_step, j, share, n, on, result)
            j += share * STRIDED_LANES

    return log_softmax_backward_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind, kind, kind,
        address, whole, whole, whole,
    )  # fmt: skip


@lru_cache
def backward_resident(storage, aligned):
    """Gradients of rows that fit into the shared memory of a block (see numbasoft.cuda.resident)."""
    compute = arithmetic_of(storage, gradient=True).compute
    share_of_row, gradient = gradients(storage)
    in_hand = RESIDENT_LAST_VECTORS[storage]
    terms, recall, recall_g = first_terms(storage, False, aligned)
    store = storer(storage, compute, in_hand, aligned)
    kind = number_type(compute)

    def log_softmax_backward_resident(
        g,  # IN   address of the first row of the gradient with respect to log_y
        g_pitch,  # IN   bytes from row to row
        log_y,  # IN   address of the first row of what forward gave
        log_y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        slots,  # IN   vectors of each row for which there is room
        high,  # IN   log2(e) in two parts
        low,
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first row: (g - exp(log_y) * sum g) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, team = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        at = log_y + row * log_y_pitch
        high, low, inverse = vector_of(high), vector_of(low), vector_of(inverse)

        # the largest gradients, and the sum of g over the row
        up, down, lift, total = terms(g + row * g_pitch, at, n, slots, inverse, cells)
        share = share_of_row(up, down, lift, total, inverse, high, low)

        # every g less its share of that
        memory, dx_at = room(), dx + row * dx_pitch
        while thread < slots:
            v, d = recall(memory, 0, thread, team, slots), recall_g(memory, slots, thread, team, slots)
            store(dx_at, at, thread, team, n, True, gradient(d, v, share, inverse, high, low))
            thread += in_hand * team

    return log_softmax_backward_resident, signature(
        address, whole, address, whole, size, size, kind, kind, kind, address, whole
    )


@lru_cache
def backward_segments(storage):
    """Gradients of a segment of a long row (see numbasoft.cuda.split)."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, sum_over = a.lift_for, summed_over(a.compute)
    share_of_row, gradient = gradients(storage)
    held, at_once = SEGMENT_VECTORS[storage], LAST_VECTORS[storage]
    load_g = loader(storage, a.compute, at_once, False, 0.0)
    load_y = loader(storage, a.compute, at_once, False, -INFINITY)
    store = storer(storage, a.compute, at_once, False)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    def log_softmax_backward_segments(
        g,  # IN   address of the first row of the gradient with respect to log_y
        g_pitch,  # IN   bytes from row to row
        log_y,  # IN   address of the first row of what forward gave
        log_y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) in two parts
        low,
        inverse,  # IN   1 / T
        work,  # IN   what the segments' largest gradients and sums are
        dx,  # OUT  address of the first row: (g - exp(log_y) * sum g) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = log_y + row * log_y_pitch + begin * itemsize
        high, low, inverse = vector_of(high), vector_of(low), vector_of(inverse)
        up = maximum_of(inverse, work, row, segments, MAXIMUM, cells, 0)
        down = maximum_of(inverse, work, row, segments, SECOND, cells, 1)
        lift = lift_for(maximum(up, down))
        total = sum_over(work, row, segments, cells, 2)
        share = share_of_row(up, down, lift, total, inverse, high, low)
        g_at, dx_at = g + row * g_pitch + begin * itemsize, dx + row * dx_pitch + begin * itemsize
        # loaded only now, part by part: held through the sums the rows take up to 196 registers
        while thread < held * team:
            v, d = load_y(at, at, thread, team, inside), load_g(g_at, at, thread, team, inside)
            result = gradient(d, v, share, inverse, high, low)
            store(dx_at, at, thread, team, inside, True, result)
            thread += at_once * team

    return log_softmax_backward_segments, signature(
        address, whole, address, whole, size, size, kind, kind, kind, address, address, whole
    )


FORWARD = Forward(forward, forward_columns, resident, subtract, others=True, reduced=False)
BACKWARD = Backward(backward, backward_columns, backward_resident, backward_segments, product=False)
