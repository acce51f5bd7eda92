"""softmax on CUDA, forward and backward: the four loops over a row that a team of threads holds."""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import (
    fma,
    gatherer,
    largest_lane,
    loader,
    maximum,
    number,
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
    fills_block,
    segment_length,
)
from ...cuda.masked import masked_gatherer, masked_loader
from ...cuda.operations import Backward, Forward
from ...cuda.quotients import quotients
from ...cuda.resident import first_loops, first_terms
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.split import KEPT, MAXIMUM, SECOND, count_over, maximum_of, segment_place, summed_over
from ...cuda.team import (
    CELLS,
    COLUMN_CELLS,
    block_place,
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
    shift_of, exponential_and_rest, exact_sum_of = a.shift_of, a.exponential_and_rest, a.exact_sum_of
    factor, quotient = quotients(storage)
    load = masked_loader(storage, vectors, aligned, masked)
    store = storer(storage, a.compute, vectors, aligned)
    kind = number_type(a.compute)
    place_of = block_place if fills_block(vectors, storage, masked) else row_place

    def softmax_forward(
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
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = place_of(rows, team)
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)
        v, kept = load(at, mask + row * mask_pitch, mask_step, thread, team, n)
        is_empty = False
        if masked:
            is_empty = team_sum(kept, team, cells, 3) == 0

        # loop 1: the maximum of the row
        m = team_maximum(largest_lane(v), team, cells, 0)

        # loop 2: exp of every element after the shift
        e, lost = exponential_and_rest(v, shift_of(m, high, low), high, low)

        # loop 3: the sum over the row
        total, rest = exact_sum_of(e, lost)
        total, rest = team_sum(total, team, cells, 1), team_sum(rest, team, cells, 2)

        # loop 4: every element divided by the sum
        result = quotient(e, factor(m, parts_of(total, rest)), is_empty)
        store(y + row * y_pitch, at, thread, team, n, on, result)

    return softmax_forward, signature(
        address, whole, address, whole, whole, whole, size, size, kind, kind, address, whole
    )


@lru_cache
def forward_columns(storage, masked):
    """Rows that lie along another axis: 32 of them side by side, read three times."""
    a = arithmetic_of(storage)
    shift_of, exponential_and_rest, exact_sum_of = a.shift_of, a.exponential_and_rest, a.exact_sum_of
    factor, quotient = quotients(storage)
    gather, scatter = masked_gatherer(storage, masked), scatterer(storage)
    kind = number_type(a.compute)

    def softmax_columns(
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

        # loop 1: the maximum of the column
        m = number(high, -INFINITY)
        kept = i - i
        j = start
        while j < n:
            v, keeps = gather(at, x_step, mask_at, mask_step, j, share, n)
            kept += keeps
            m = maximum(m, largest_lane(v))
            j += share * STRIDED_LANES
        m = column_maximum(m, cells)
        is_empty = False
        if masked:
            is_empty = column_sum(kept, cells) == 0

        # loops 2 and 3: the sum of exp of every element after the shift
        shift = shift_of(m, high, low)
        total, rest = i - i, i - i
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
            e, lost = exponential_and_rest(v, shift, high, low)
            part = exact_sum_of(e, lost)
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES
        r = factor(m, parts_of(column_sum(total, cells), column_sum(rest, cells)))

        # loops 2 and 4: exp of every element divided by the sum
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
            e, _ = exponential_and_rest(v, shift, high, low)
            scatter(y_at, y_step, j, share, n, on, quotient(e, r, is_empty))
            j += share * STRIDED_LANES

    return softmax_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind, kind,
        address, whole, whole, whole,
    )  # fmt: skip


@lru_cache
def resident(storage, aligned, masked):
    """Rows that fit into the shared memory of a block (see numbasoft.cuda.resident)."""
    a = arithmetic_of(storage)
    shift_of, exponential_and_rest = a.shift_of, a.exponential_and_rest
    factor, quotient = quotients(storage)
    in_hand = RESIDENT_LAST_VECTORS[storage]
    first_three, recall = first_loops(storage, aligned, masked, False)
    store = storer(storage, a.compute, in_hand, aligned)
    kind = number_type(a.compute)

    def softmax_resident(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        slots,  # IN   vectors for which there is room
        high,  # IN   log2(e) / T in two parts
        low,
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, team = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)

        # loops 1 to 3: the maximum, and the sum of exp of every element after the shift
        mask_at = mask + row * mask_pitch
        m, _, _, total, kept = first_three(at, mask_at, mask_step, n, slots, high, low, cells)
        is_empty = False
        if masked:
            is_empty = kept == 0
        r, shift = factor(m, total), shift_of(m, high, low)

        # loops 2 and 4: exp of every element divided by the sum
        memory, y_at = room(), y + row * y_pitch
        while thread < slots:
            e, _ = exponential_and_rest(recall(memory, 0, thread, team, slots), shift, high, low)
            store(y_at, at, thread, team, n, True, quotient(e, r, is_empty))
            thread += in_hand * team

    return softmax_resident, signature(
        address, whole, address, whole, whole, size, size, kind, kind, address, whole
    )


@lru_cache
def divide(storage, masked):
    """Loops 2 and 4 for a segment of a long row (see numbasoft.cuda.split)."""
    a = arithmetic_of(storage)
    shift_of, exponential_and_rest, sum_over = a.shift_of, a.exponential_and_rest, summed_over(a.compute)
    factor, quotient = quotients(storage)
    held, at_once = SEGMENT_VECTORS[storage], LAST_VECTORS[storage]
    load = masked_loader(storage, at_once, False, masked)
    store = storer(storage, a.compute, at_once, False)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    def softmax_divide(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        mask,  # IN   address of the first row's mask
        mask_pitch,  # IN   bytes from row to row, and from element to element
        mask_step,
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        work,  # IN   what the segments' maxima and sums are
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = x + row * x_pitch + begin * itemsize
        high, low = vector_of(high), vector_of(low)
        is_empty = False
        if masked:
            is_empty = count_over(work, row, segments, KEPT, cells, 1) == 0
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        r = factor(m, sum_over(work, row, segments, cells, 2))
        shift = shift_of(m, high, low)
        # the row is loaded only now, part by part: held through the sums its registers spill
        mask_at, y_at = mask + row * mask_pitch + begin * mask_step, y + row * y_pitch + begin * itemsize
        while thread < held * team:
            v, _ = load(at, mask_at, mask_step, thread, team, inside)
            e, _ = exponential_and_rest(v, shift, high, low)
            store(y_at, at, thread, team, inside, True, quotient(e, r, is_empty))
            thread += at_once * team

    return softmax_divide, signature(
        address, whole, address, whole, whole, size, size, kind, kind, address, address, whole
    )


@lru_cache
def gradients(storage):
    """y * (g - sum g y) / T for a thread's elements, and what it needs once for every row."""
    a = arithmetic_of(storage, gradient=True)
    pair_of, top_of = a.pair_of, a.top_of
    smallest, raise_, lower = a.smallest, 1.0 / a.epsilon, a.epsilon
    may_be_subnormal = storage != "f2"  # float16's smallest is a normal float32

    @jit.device
    def mean(up, down, lift, total):
        """sum g y times ``lift`` in two parts, from the largest terms and the sum of all."""
        high, low = pair_of(up, total)
        top = top_of(maximum(up, down), lift) / lift
        # where a term is infinite or NaN, up - down is what any sum of the terms is
        is_finite = maximum(up, down) < INFINITY
        return select(is_finite, high * top, up - down), select(is_finite, low * top, 0.0)

    @jit.device
    def gradient(g, y, mean, lift, inverse):
        """y * (g - mean) / T; 0 where y is exactly 0."""
        d = fma(g, lift, 0.0 - mean[0]) - mean[1]
        # 1 / T is for y if it enlarges, else for d: no product may round to a subnormal what another enlarges
        is_large, v, unlift = inverse >= 1.0, y, 1.0 / lift
        if may_be_subnormal:
            v = select(y < smallest, y * raise_, y)
            unlift = select(y < smallest, unlift * lower, unlift)
        dx = (v * select(is_large, inverse, 1.0)) * (d * select(is_large, 1.0, inverse)) * unlift
        return select(y == 0.0, 0.0, dx)

    return mean, gradient


@lru_cache
def backward(storage, vectors, aligned):
    """Gradients of rows that fit into the registers of a team."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, signed_sum_of = a.lift_for, a.top_of, a.signed_sum_of
    mean, gradient = gradients(storage)
    load = loader(storage, a.compute, vectors, aligned, 0.0)
    store = storer(storage, a.compute, vectors, aligned)
    kind = number_type(a.compute)

    def softmax_backward(
        g,  # IN   address of the first row of the gradient with respect to y
        g_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of what forward gave
        y_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first row: y * (g - sum g y) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = row_place(rows, team)
        at = y + row * y_pitch
        # in this order float16 takes 64 registers on sm_80, in the other 70
        d = load(g + row * g_pitch, at, thread, team, n)
        v = load(at, at, thread, team, n)
        d = select(v == 0.0, 0.0, d)

        # the largest terms, for the scale of the sum
        p = d * v
        up = team_maximum(largest_lane(p), team, cells, 0)
        down = team_maximum(largest_lane(0.0 - p), team, cells, 1)
        largest = maximum(up, down)
        lift = lift_for(largest)

        # the sum of g y over the row
        lifted, other = d * lift, v * lift
        p = lifted * other
        total, rest = signed_sum_of(p, fma(lifted, other, 0.0 - p), top_of(largest, lift))
        total, rest = team_sum(total, team, cells, 2), team_sum(rest, team, cells, 3)

        # every g less that, times y
        of_row = mean(up, down, lift, parts_of(total, rest))
        dx_at = dx + row * dx_pitch
        store(dx_at, at, thread, team, n, on, gradient(d, v, of_row, lift, vector_of(inverse)))

    return softmax_backward, signature(
        address, whole, address, whole, whole, size, size, kind, address, whole
    )


@lru_cache
def backward_columns(storage):
    """Gradients of rows that lie along another axis: 32 of them side by side, read three times."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, top_of, signed_sum_of = a.lift_for, a.top_of, a.signed_sum_of
    mean, gradient = gradients(storage)
    gather, scatter = gatherer(storage, a.compute, 0.0), scatterer(storage)
    kind = number_type(a.compute)

    def softmax_backward_columns(
        g,  # IN   address of the first element of the gradient with respect to y
        g_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        g_step,
        g_inner,
        y,  # IN   address of the first element of what forward gave
        y_outer,  # IN   as of g
        y_step,
        y_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first element: y * (g - sum g y) / T
        dx_outer,  # IN   as of g
        dx_step,
        dx_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, k, start, share, on = column_of(inner)
        g_at, y_at = g + i * g_outer + k * g_inner, y + i * y_outer + k * y_inner
        dx_at = dx + i * dx_outer + k * dx_inner
        inverse = vector_of(inverse)

        # the largest terms, for the scale of the sum
        up = number(inverse, -INFINITY)
        down = up
        j = start
        while j < n:
            v = gather(y_at, y_step, j, share, n)
            p = select(v == 0.0, 0.0, gather(g_at, g_step, j, share, n)) * v
            up, down = maximum(up, largest_lane(p)), maximum(down, largest_lane(0.0 - p))
            j += share * STRIDED_LANES
        up, down = column_maximum(up, cells), column_maximum(down, cells)
        largest = maximum(up, down)
        lift = lift_for(largest)
        top = top_of(largest, lift)

        # the sum of g y over the column
        total, rest = i - i, i - i
        j = start
        while j < n:
            v = gather(y_at, y_step, j, share, n)
            d = select(v == 0.0, 0.0, gather(g_at, g_step, j, share, n)) * lift
            v = v * lift
            p = d * v
            part = signed_sum_of(p, fma(d, v, 0.0 - p), top)
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES
        total, rest = column_sum(total, cells), column_sum(rest, cells)
        of_column = mean(up, down, lift, parts_of(total, rest))

        # every g less that, times y
        j = start
        while j < n:
            v, d = gather(y_at, y_step, j, share, n), gather(g_at, g_step, j, share, n)
            scatter(dx_at, dx_step, j, share, n, on, gradient(d, v, of_column, lift, inverse))
            j += share * STRIDED_LANES

    return softmax_backward_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind,
        address, whole, whole, whole,
    )  # fmt: skip


@lru_cache
def backward_resident(storage, aligned):
    """Gradients of rows that fit into the shared memory of a block (see numbasoft.cuda.resident)."""
    compute = arithmetic_of(storage, gradient=True).compute
    mean, gradient = gradients(storage)
    in_hand = RESIDENT_LAST_VECTORS[storage]
    terms, recall, recall_g = first_terms(storage, True, aligned)
    store = storer(storage, compute, in_hand, aligned)
    kind = number_type(compute)

    def softmax_backward_resident(
        g,  # IN   address of the first row of the gradient with respect to y
        g_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of what forward gave
        y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        slots,  # IN   vectors of each row for which there is room
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first row: y * (g - sum g y) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, team = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        at = y + row * y_pitch
        inverse = vector_of(inverse)

        # the largest terms, and the sum of g y over the row
        up, down, lift, total = terms(g + row * g_pitch, at, n, slots, inverse, cells)
        of_row = mean(up, down, lift, total)

        # every g less that, times y
        memory, dx_at = room(), dx + row * dx_pitch
        while thread < slots:
            v, d = recall(memory, 0, thread, team, slots), recall_g(memory, slots, thread, team, slots)
            store(dx_at, at, thread, team, n, True, gradient(d, v, of_row, lift, inverse))
            thread += in_hand * team

    return softmax_backward_resident, signature(
        address, whole, address, whole, size, size, kind, address, whole
    )


@lru_cache
def backward_segments(storage):
    """Gradients of a segment of a long row (see numbasoft.cuda.split)."""
    a = arithmetic_of(storage, gradient=True)
    lift_for, sum_over = a.lift_for, summed_over(a.compute)
    mean, gradient = gradients(storage)
    held, at_once = SEGMENT_VECTORS[storage], LAST_VECTORS[storage]
    load = loader(storage, a.compute, at_once, False, 0.0)
    store = storer(storage, a.compute, at_once, False)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    def softmax_backward_segments(
        g,  # IN   address of the first row of the gradient with respect to y
        g_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of what forward gave
        y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        segments,  # IN   of a row
        inverse,  # IN   1 / T
        work,  # IN   what the segments' largest terms and sums are
        dx,  # OUT  address of the first row: y * (g - sum g y) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, begin, inside = segment_place(segments, length, n)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        at = y + row * y_pitch + begin * itemsize
        inverse = vector_of(inverse)
        up = maximum_of(inverse, work, row, segments, MAXIMUM, cells, 0)
        down = maximum_of(inverse, work, row, segments, SECOND, cells, 1)
        lift = lift_for(maximum(up, down))
        of_row = mean(up, down, lift, sum_over(work, row, segments, cells, 2))
        g_at, dx_at = g + row * g_pitch + begin * itemsize, dx + row * dx_pitch + begin * itemsize
        # loaded only now, part by part: held through the sums their registers spill
        while thread < held * team:
            v, d = load(at, at, thread, team, inside), load(g_at, at, thread, team, inside)
            store(dx_at, at, thread, team, inside, True, gradient(d, v, of_row, lift, inverse))
            thread += at_once * team

    return softmax_backward_segments, signature(
        address, whole, address, whole, size, size, kind, address, address, whole
    )


FORWARD = Forward(forward, forward_columns, resident, divide, others=False, reduced=False)
BACKWARD = Backward(backward, backward_columns, backward_resident, backward_segments, product=True)
