"""logsumexp on CUDA, forward and backward: the first four loops of log_softmax, one result per row."""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import (
    count,
    gatherer,
    largest_lane,
    loader,
    maximum,
    number,
    reader,
    scatterer,
    select,
    storer,
    vector_of,
    writer,
)
from ...cuda.elementary import arithmetic_of, parts_of
from ...cuda.geometry import ITEMSIZE, STRIDED_LANES
from ...cuda.logs import results
from ...cuda.masked import masked_gatherer, masked_loader
from ...cuda.operations import Forward
from ...cuda.resident import first_loops
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.split import MAXIMA, MAXIMUM, count_over, maximum_of, row_of, second_of, summed_over
from ...cuda.team import (
    CELLS,
    COLUMN_CELLS,
    column_maximum,
    column_of,
    column_sum,
    first_row,
    place,
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
    result_of = results(storage)
    load = masked_loader(storage, vectors, aligned, masked)
    write = writer(storage)
    kind = number_type(a.compute)

    def logsumexp_forward(
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
        lse,  # OUT  address of the first result
        lse_pitch,  # IN   bytes from result to result
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = row_place(rows, team)
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)
        v, _ = load(at, mask + row * mask_pitch, mask_step, thread, team, n)

        # loop 1: the maximum of the row, and the largest of the others
        m = team_maximum(largest_lane(v), team, cells, 0)
        maxima = team_sum(count(v == m), team, cells, 1)
        others = select(v < m, v, -INFINITY)
        second = team_maximum(largest_lane(others), team, cells, 2)

        # loops 2 and 3: the sum of exp of every other element after the shift
        e = exponential(others, shift_of(select(second > -INFINITY, second, m), high, low), high, low)
        total, rest = sum_of(e)
        total, rest = team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4)

        # loop 4: the log of the sum
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        result = result_of(m, second, maxima, parts_of(total, rest), high, low, inverse, inverse_rest)
        if on and thread == 0:
            write(lse + row * lse_pitch, result)

    return logsumexp_forward, signature(
        address, whole, address, whole, whole, whole, size, size, kind, kind, kind, kind, address, whole
    )


@lru_cache
def forward_columns(storage, masked):
    """Rows that lie along another axis: 32 of them side by side, read three times."""
    a = arithmetic_of(storage)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    result_of = results(storage)
    gather = masked_gatherer(storage, masked)
    write = writer(storage)
    kind = number_type(a.compute)

    def logsumexp_columns(
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
        lse,  # OUT  address of the first result
        lse_outer,  # IN   bytes from one to the next: of outer and of inner
        lse_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, k, start, share, on = column_of(inner)
        at, mask_at = x + i * x_outer + k * x_inner, mask + i * mask_outer + k * mask_inner
        high, low = vector_of(high), vector_of(low)

        # loop 1: the maximum of the column, and the largest of the others
        m = number(high, -INFINITY)
        j = start
        while j < n:
            v, _ = gather(at, x_step, mask_at, mask_step, j, share, n)
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
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        result = result_of(m, second, maxima, parts_of(total, rest), high, low, inverse, inverse_rest)
        if on and start == 0:
            write(lse + i * lse_outer + k * lse_inner, result)

    return logsumexp_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind, kind, kind, kind,
        address, whole, whole,
    )  # fmt: skip


@lru_cache
def resident(storage, aligned, masked):
    """Rows that fit into the shared memory of a block (see numbasoft.cuda.resident)."""
    result_of = results(storage)
    first_three, _ = first_loops(storage, aligned, masked, True)
    write = writer(storage)
    kind = number_type(arithmetic_of(storage).compute)

    def logsumexp_resident(
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
        lse,  # OUT  address of the first result
        lse_pitch,  # IN   bytes from result to result
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row = cuda.blockIdx.x
        high, low = vector_of(high), vector_of(low)

        # loops 1 to 3: the maximum, and the sum of exp of every other element after the shift
        at, mask_at = x + row * x_pitch, mask + row * mask_pitch
        m, second, maxima, total, _ = first_three(at, mask_at, mask_step, n, slots, high, low, cells)

        # loop 4: the log of the sum
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        result = result_of(m, second, maxima, total, high, low, inverse, inverse_rest)
        if cuda.threadIdx.x == 0:
            write(lse + row * lse_pitch, result)

    return logsumexp_resident, signature(
        address, whole, address, whole, whole, size, size, kind, kind, kind, kind, address, whole
    )


@lru_cache
def combine(storage):
    """Loop 4 for long rows, a block for each, from the sums of their segments (see numbasoft.cuda.split)."""
    result_of = results(storage)
    write = writer(storage)
    compute = arithmetic_of(storage).compute
    sum_over, kind = summed_over(compute), number_type(compute)

    def logsumexp_combine(
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        work,  # IN   what the segments' maxima and sums are
        lse,  # OUT  address of the first result
        lse_pitch,  # IN   bytes from result to result
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, _ = row_of(1)
        high, low = vector_of(high), vector_of(low)
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        second = second_of(m, work, row, segments, cells, 1)
        maxima = count_over(work, row, segments, MAXIMA, cells, 2)
        total = sum_over(work, row, segments, cells, 3)
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        result = result_of(m, second, maxima, total, high, low, inverse, inverse_rest)
        if cuda.threadIdx.x == 0:
            write(lse + row * lse_pitch, result)

    return logsumexp_combine, signature(size, kind, kind, kind, kind, address, address, whole)


@lru_cache
def gradients(storage):
    """g * exp(x / T - lse) / T for a thread's elements, and what it needs once for every row."""
    a = arithmetic_of(storage, gradient=True)
    shift_of_lse, factor_and_power = a.shift_of_lse, a.factor_and_power
    wide_shift, wide_exponential = a.wide_shift, a.wide_exponential

    @jit.device
    def factor_and_shift(g, lse, temperature, inverse, high):
        """g / T as a factor and, in the shift, a power of two: the exponential may need it to be a number."""
        factor, power = factor_and_power(g)
        return factor * inverse, wide_shift(shift_of_lse(lse, temperature, inverse, high), power, high)

    @jit.device
    def gradient(v, factor, shift, high, low):
        e, power = wide_exponential(v, shift, high, low)
        return select(v == -INFINITY, 0.0, (e * factor) * power)

    return factor_and_shift, gradient


@lru_cache
def backward(storage, vectors, aligned, reduced):
    """Gradients of rows, each in one segment or more: no element needs another."""
    a = arithmetic_of(storage, gradient=True)
    factor_and_shift, gradient = gradients(storage)
    load = loader(storage, a.compute, vectors, aligned, -INFINITY)
    store = storer(storage, a.compute, vectors, aligned)
    read = reader(reduced, a.compute)  # g and lse may be wider than x
    itemsize = ITEMSIZE[storage]
    kind = number_type(a.compute)

    def logsumexp_backward(
        g,  # IN   address of the gradient with respect to the first row's lse
        g_pitch,  # IN   bytes from row to row
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        lse,  # IN   address of what forward gave for the first row
        lse_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        high,  # IN   log2(e) / T in two parts
        low,
        temperature,  # IN   T in three parts
        temperature_rest,
        temperature_last,
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first row: g * exp(x / T - lse) / T
        dx_pitch,  # IN   bytes from row to row
    ):
        unit, thread = first_row(team), place(team)
        row, begin = unit // segments, unit % segments * length
        on = row < rows
        row = min(row, rows - 1)
        inside = min(length, n - begin)
        at = x + row * x_pitch + begin * itemsize
        v = load(at, at, thread, team, inside)
        high, low = vector_of(high), vector_of(low)
        inverse = vector_of(inverse)
        temperature = vector_of(temperature), vector_of(temperature_rest), vector_of(temperature_last)
        of_g, of_lse = read(g + row * g_pitch), read(lse + row * lse_pitch)
        factor, shift = factor_and_shift(of_g, of_lse, temperature, inverse, high)
        result = gradient(v, factor, shift, high, low)
        store(dx + row * dx_pitch + begin * itemsize, at, thread, team, inside, on, result)

    return logsumexp_backward, signature(
        address, whole, address, whole, address, whole, whole, size, size, size, size,
        kind, kind, kind, kind, kind, kind, address, whole,
    )  # fmt: skip


@lru_cache
def backward_columns(storage, reduced):
    """Gradients of rows that lie along another axis: 32 of them side by side."""
    a = arithmetic_of(storage, gradient=True)
    factor_and_shift, gradient = gradients(storage)
    gather, scatter = gatherer(storage, a.compute, -INFINITY), scatterer(storage)
    read = reader(reduced, a.compute)
    kind = number_type(a.compute)

    def logsumexp_backward_columns(
        g,  # IN   address of the gradient with respect to the first column's lse
        g_outer,  # IN   bytes from one to the next: of outer and of inner
        g_inner,
        x,  # IN   address of the first element
        x_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        x_step,
        x_inner,
        lse,  # IN   address of what forward gave for the first column
        lse_outer,  # IN   as of g
        lse_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) / T in two parts
        low,
        temperature,  # IN   T in three parts
        temperature_rest,
        temperature_last,
        inverse,  # IN   1 / T
        dx,  # OUT  address of the first element: g * exp(x / T - lse) / T
        dx_outer,  # IN   as of x
        dx_step,
        dx_inner,
    ):
        i, k, start, share, on = column_of(inner)
        high, low = vector_of(high), vector_of(low)
        inverse = vector_of(inverse)
        temperature = vector_of(temperature), vector_of(temperature_rest), vector_of(temperature_last)
        of_g = read(g + i * g_outer + k * g_inner)
        of_lse = read(lse + i * lse_outer + k * lse_inner)
        factor, shift = factor_and_shift(of_g, of_lse, temperature, inverse, high)
        at, dx_at = x + i * x_outer + k * x_inner, dx + i * dx_outer + k * dx_inner
        j = start
        while j < n:
            v = gather(at, x_step, j, share, n)
            scatter(dx_at, dx_step, j, share, n, on, gradient(v, factor, shift, high, low))
            j += share * STRIDED_LANES

    return logsumexp_backward_columns, signature(
        address, whole, whole, address, whole, whole, whole, address, whole, whole, size, size,
        kind, kind, kind, kind, kind, kind, address, whole, whole, whole,
    )  # fmt: skip


FORWARD = Forward(forward, forward_columns, resident, combine, others=True, reduced=True)
BACKWARD = backward, backward_columns
