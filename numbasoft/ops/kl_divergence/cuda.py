"""The Kullback-Leibler divergence of two softmaxes on CUDA, forward and backward: a row of each at a time.

As p and q both sum to 1, it is the sum of q - p - p log(q / p): no term is negative, and an error of
the rows' logarithms, the same for all terms, cancels to first order. The sum of p log(p / q) loses
nearly everything where p and q are near each other.
"""

import math
from functools import lru_cache
from types import SimpleNamespace

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import (
    absolute,
    bits_of,
    count,
    fma,
    from_bits,
    gatherer,
    integer_as,
    largest_lane,
    loader,
    maximum,
    number,
    read_cell,
    reader,
    scatterer,
    select,
    storer,
    vector_of,
    write_cell,
    writer,
)
from ...cuda.elementary import arithmetic_of, parts_of, polynomial_of, two_sum
from ...cuda.geometry import ITEMSIZE, PIECE_VECTORS, STRIDED_LANES, piece_length, segment_length
from ...cuda.operations import Divergence
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.split import (
    KEPT,
    MAXIMA,
    MAXIMUM,
    SECOND,
    count_over,
    field,
    finer,
    maximum_of,
    row_of,
    second_of,
    summed_over,
    write_sum,
)
from ...cuda.team import (
    CELLS,
    COLUMN_CELLS,
    column_maximum,
    column_place,
    column_sum,
    first_row,
    place,
    team_maximum,
    team_sum,
)

INFINITY, NAN = float("inf"), float("nan")
PAIR_CELLS = 2 * CELLS
# of the series of exp(z) - 1 - z for abs(z) < 2
TERMS = {"f4": 15, "f8": 24}
# besides the largest term and the sum of a segment, in fields that hold other numbers elsewhere: of the row
SUM, SUM_LOST, INVERSE = SECOND, KEPT, MAXIMA


@lru_cache
def ratios(storage):
    """What is done to a thread's elements, and once for every row."""
    a = arithmetic_of(storage, gradient=True)
    exponential, shift_of, log_of_sum, pair_of = a.exponential, a.shift_of, a.log_of_sum, a.pair_of
    reciprocal, lift_for, unlift_for, top_of = a.reciprocal, a.lift_for, a.unlift_for, a.top_of
    largest, finer_sum_below = a.largest, a.finer_sum_below
    series = polynomial_of(tuple(1.0 / math.factorial(k + 2) for k in range(TERMS[a.compute])))

    @jit.device
    def row_sum(m, second, maxima, total, high, low):
        """sum exp((x - m) / T) in two parts, from a sum relative to the second; NaN where m is infinite."""
        e = exponential(second, shift_of(m, high, low), high, low)
        s, lost = pair_of(m, total)
        q = e * s
        q_lost = fma(e, lost, fma(e, s, 0.0 - q))
        s, lost = two_sum(integer_as(m, maxima), q * (1.0 / largest))
        return select(absolute(m) < INFINITY, s, NAN), lost + q_lost * (1.0 / largest)

    @jit.device
    def row_log(m, second, maxima, total, high, low):
        """The logarithm of that, in two parts."""
        e = exponential(second, shift_of(m, high, low), high, low)
        return log_of_sum(m, maxima - 1, total, e)

    @jit.device
    def difference(a, b):
        """a - b in two parts."""
        return two_sum(a, 0.0 - b)

    @jit.device
    def term_of(v, u, of_x, of_y, part, between, scale):
        """q - p - p log(q / p), times the sum of x's exponentials; not negative, and 0 where p and q are."""
        high, low, inverse, inverse_rest = scale
        m, shift = of_x
        top, other_shift = of_y
        p = exponential(v, shift, high, low) * (1.0 / largest)
        p = select(v == -INFINITY, 0.0, p)
        q = exponential(u, other_shift, high, low)
        q = select(u == -INFINITY, 0.0, fma(q, part[0], q * part[1]))
        # log(q / p) = ((y - top) - (x - m)) / T - (log_y - log_x)
        a, a_lost = difference(u, top)
        b, b_lost = difference(v, m)
        d, d_lost = difference(a, b)
        d_lost = d_lost + (a_lost - b_lost)
        h = d * inverse
        h_lost = fma(d, inverse, 0.0 - h) + fma(d, inverse_rest, d_lost * inverse)
        z, lost = difference(h, between[0])
        lost = lost + (h_lost - between[1])
        z = select(lost == lost, z + lost, z)
        # exp(z) - 1 - z where q and p are too near each other for a difference
        near = p * (series(z) * (z * z))
        term = select(absolute(z) < 2.0, near, fma(0.0 - p, z, q - p))
        return select(p == 0.0, q, term)

    @jit.device
    def parts_between(log_x, log_y, s_x, s_y):
        """log_y - log_x, and the sum of x's exponentials by that of y's over ``largest``, all in two parts."""
        d, lost = difference(log_y[0], log_x[0])
        r = 1.0 / s_y[0]
        part = s_x[0] * r
        rest = (fma(0.0 - part, s_y[0], s_x[0]) + fma(0.0 - part, s_y[1], s_x[1])) * r
        return (d, lost + (log_y[1] - log_x[1])), (part * (1.0 / largest), rest * (1.0 / largest))

    @jit.device
    def sum_of_terms(t, most, factor):
        """The sum of a thread's terms, of which this is the largest of the row's, as so many times as large integers."""
        lift = lift_for(most)
        return finer_sum_below((t * lift) * lift, top_of(most, lift), factor)

    @jit.device
    def result_of(most, total, s, r):
        """The sum of the terms by that of the exponentials, whose inverse is r; or an infinite term, or NaN."""
        back = unlift_for(most)
        high, low = pair_of(most, total)
        q = high * r
        rest = fma(0.0 - q, s[0], high) + fma(0.0 - q, s[1], low)
        value = fma(rest, r, q) * top_of(most, lift_for(most)) * back * back
        return select(most < INFINITY, value, most)

    @jit.device
    def share_of(m, total, g):
        """g over the sum of a row's exponentials, in two parts; NaN where the row has no finite answer."""
        s, lost = pair_of(m, total)
        r, r_rest = reciprocal(s, lost)
        first = r * g
        rest = fma(r_rest, g, fma(r, g, 0.0 - first))
        return select(absolute(m) < INFINITY, first, NAN), rest

    @jit.device
    def split_gradient(g, factor, factor_rest):
        """g times a factor, as what exponentials and what their difference is multiplied by; neither may lose."""
        g = fma(g, factor, g * factor_rest)
        is_large = absolute(g) >= 1.0
        return select(is_large, g, 1.0), select(is_large, 1.0, g)

    @jit.device
    def gradient(e, f, of_p, of_q, outside):
        p, q = fma(e, of_p[0], e * of_p[1]), fma(f, of_q[0], f * of_q[1])
        return (q - p) * outside

    return SimpleNamespace(
        compute=a.compute, shift_of=shift_of, exponential=exponential, sum_of=a.sum_of, row_sum=row_sum, row_log=row_log,
        term_of=term_of, parts_between=parts_between, sum_of_terms=sum_of_terms, result_of=result_of,
        share_of=share_of, split_gradient=split_gradient, gradient=gradient,
    )  # fmt: skip


@lru_cache
def forward(storage, vectors, aligned, of_result):
    """Rows that fit into the registers of a team, two at a time."""
    f = ratios(storage)
    shift_of, exponential, sum_of, row_log = f.shift_of, f.exponential, f.sum_of, f.row_log
    row_sum = f.row_sum
    term_of, parts_between, sum_of_terms, result_of = f.term_of, f.parts_between, f.sum_of_terms, f.result_of
    load = loader(storage, f.compute, vectors, aligned, -INFINITY)
    write = writer(of_result)
    kind = number_type(f.compute)

    @jit.device
    def sums_of(v, team, cells, slot, high, low):
        """Of a row: the maximum, the logarithm of its sum and the sum; takes five slots."""
        m = team_maximum(largest_lane(v), team, cells, slot)
        maxima = team_sum(count(v == m), team, cells, slot + 1)
        others = select(v < m, v, -INFINITY)
        second = team_maximum(largest_lane(others), team, cells, slot + 2)
        e = exponential(others, shift_of(select(second > -INFINITY, second, m), high, low), high, low)
        total, rest = sum_of(e)
        total, rest = team_sum(total, team, cells, slot + 3), team_sum(rest, team, cells, slot + 4)
        parts = parts_of(total, rest)
        log = row_log(m, second, maxima, parts, high, low)
        return m, log, row_sum(m, second, maxima, parts, high, low)

    def kl_forward(
        x,  # IN   address of the first row of p's logits
        x_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of q's logits
        y_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        divergence,  # OUT  address of the first result: sum p (log p - log q)
        pitch,  # IN   bytes from result to result
    ):
        cells = cuda.shared.array(PAIR_CELLS, types.int64)
        row, thread = first_row(team), place(team)
        on = row < rows
        row = min(row, rows - 1)
        at = x + row * x_pitch
        high, low = vector_of(high), vector_of(low)
        v, u = load(at, at, thread, team, n), load(y + row * y_pitch, at, thread, team, n)

        # the sums of both rows and their logarithms
        m, log_x, s_x = sums_of(v, team, cells, 0, high, low)
        top, log_y, s_y = sums_of(u, team, cells, 5, high, low)

        # every term: the largest, for the scale of their sum
        between, part = parts_between(log_x, log_y, s_x, s_y)
        of_x, of_y = (m, shift_of(m, high, low)), (top, shift_of(top, high, low))
        scale = high, low, vector_of(inverse), vector_of(inverse_rest)
        t = term_of(v, u, of_x, of_y, part, between, scale)
        most = team_maximum(largest_lane(t), team, cells, 10)

        # the sum
        total, rest = sum_of_terms(t, most, 1.0)
        total, rest = team_sum(total, team, cells, 11), team_sum(rest, team, cells, 12)
        if on and thread == 0:
            write(divergence + row * pitch, result_of(most, parts_of(total, rest), s_x, 1.0 / s_x[0]))

    return kl_forward, signature(
        address, whole, address, whole, whole, size, size, kind, kind, kind, kind, address, whole
    )


@lru_cache
def forward_columns(storage, of_result):
    """Rows that lie along another axis: 32 of them side by side, read five times."""
    f = ratios(storage)
    shift_of, exponential, sum_of, row_log = f.shift_of, f.exponential, f.sum_of, f.row_log
    row_sum = f.row_sum
    term_of, parts_between, sum_of_terms, result_of = f.term_of, f.parts_between, f.sum_of_terms, f.result_of
    gather = gatherer(storage, f.compute, -INFINITY)
    write = writer(of_result)
    kind = number_type(f.compute)

    @jit.device
    def sums_of(at, step, start, share, n, cells, high, low, zero):
        """Of a column: the maximum, the logarithm of its sum and the sum."""
        m = number(high, -INFINITY)
        j = start
        while j < n:
            m = maximum(m, largest_lane(gather(at, step, j, share, n)))
            j += share * STRIDED_LANES
        m = column_maximum(m, cells)
        second, maxima = number(high, -INFINITY), zero
        j = start
        while j < n:
            v = gather(at, step, j, share, n)
            second = maximum(second, largest_lane(select(v < m, v, -INFINITY)))
            maxima += count(v == m)
            j += share * STRIDED_LANES
        second, maxima = column_maximum(second, cells), column_sum(maxima, cells)
        shift = shift_of(select(second > -INFINITY, second, m), high, low)
        total, rest = zero, zero
        j = start
        while j < n:
            v = gather(at, step, j, share, n)
            part = sum_of(exponential(select(v < m, v, -INFINITY), shift, high, low))
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES
        total, rest = column_sum(total, cells), column_sum(rest, cells)
        parts = parts_of(total, rest)
        log = row_log(m, second, maxima, parts, high, low)
        return m, log, row_sum(m, second, maxima, parts, high, low)

    def kl_columns(
        x,  # IN   address of the first of p's logits
        x_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        x_step,
        x_inner,
        y,  # IN   address of the first of q's logits
        y_outer,  # IN   as of x
        y_step,
        y_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        divergence,  # OUT  address of the first result: sum p (log p - log q)
        outer_pitch,  # IN   bytes from one to the next: of outer and of inner
        inner_pitch,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        held = cuda.shared.array((2, COLUMN_CELLS), types.int64)
        i, k, start, share = column_place(inner)
        on = k < inner
        k = min(k, inner - 1)
        at, y_at = x + i * x_outer + k * x_inner, y + i * y_outer + k * y_inner
        high, low = vector_of(high), vector_of(low)

        # the sums of both columns and their logarithms
        m, log_x, s_x = sums_of(at, x_step, start, share, n, cells, high, low, i - i)
        top, log_y, s_y = sums_of(y_at, y_step, start, share, n, cells, high, low, i - i)

        # every term: the largest, for the scale of their sum
        between, part = parts_between(log_x, log_y, s_x, s_y)
        # every thread its own, where it takes no registers: these were spilled
        held[0, cuda.threadIdx.x], held[1, cuda.threadIdx.x] = bits_of(s_x[0]), bits_of(s_x[1])
        of_x, of_y = (m, shift_of(m, high, low)), (top, shift_of(top, high, low))
        scale = high, low, vector_of(inverse), vector_of(inverse_rest)
        most = number(high, 0.0)
        j = start
        while j < n:
            v, u = gather(at, x_step, j, share, n), gather(y_at, y_step, j, share, n)
            most = maximum(most, largest_lane(term_of(v, u, of_x, of_y, part, between, scale)))
            j += share * STRIDED_LANES
        most = column_maximum(most, cells)

        # the sum
        total, rest = i - i, i - i
        j = start
        while j < n:
            v, u = gather(at, x_step, j, share, n), gather(y_at, y_step, j, share, n)
            more = sum_of_terms(term_of(v, u, of_x, of_y, part, between, scale), most, 1.0)
            total += more[0]
            rest += more[1]
            j += share * STRIDED_LANES
        total, rest = column_sum(total, cells), column_sum(rest, cells)
        if on and start == 0:
            s = from_bits(most, held[0, cuda.threadIdx.x])
            lost = from_bits(most, held[1, cuda.threadIdx.x])
            result = result_of(most, parts_of(total, rest), (s, lost), 1.0 / s)
            write(divergence + i * outer_pitch + k * inner_pitch, result)

    return kl_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, size, size, kind, kind, kind, kind,
        address, whole, whole,
    )  # fmt: skip


@lru_cache
def row_sums(storage):
    """What is known of a long row when the sums of its segments are (see numbasoft.cuda.split)."""
    f = ratios(storage)
    row_sum, row_log, sum_over = f.row_sum, f.row_log, summed_over(f.compute)

    @jit.device
    def sums_of(work, row, segments, cells, slot, high, low):
        """The maximum, the logarithm of the sum, and the sum; takes seven slots."""
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, slot)
        second = second_of(m, work, row, segments, cells, slot + 1)
        maxima = count_over(work, row, segments, MAXIMA, cells, slot + 2)
        total = sum_over(work, row, segments, cells, slot + 3)
        log = row_log(m, second, maxima, total, high, low)
        return m, log, row_sum(m, second, maxima, total, high, low)

    return sums_of


@lru_cache
def terms(storage, last):
    """The terms of a segment of two long rows: first the largest, with ``last`` their sum."""
    f = ratios(storage)
    shift_of, term_of, parts_between, sum_of_terms = f.shift_of, f.term_of, f.parts_between, f.sum_of_terms
    sums_of, finer_of = row_sums(storage), finer(f.compute)
    load = loader(storage, f.compute, PIECE_VECTORS[storage], False, -INFINITY)
    length, piece, itemsize = segment_length(storage), piece_length(storage), ITEMSIZE[storage]
    kind = number_type(f.compute)

    def kl_terms(
        x,  # IN   address of the first row of p's logits
        x_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of q's logits
        y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        of_x,  # IN   what the segments' maxima and sums are
        of_y,
        work,  # OUT  FIELDS int64 for every segment
    ):
        cells = cuda.shared.array(PAIR_CELLS, types.int64)
        row, segment = row_of(segments)
        begin = segment * length
        inside = min(length, n - begin)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        high, low = vector_of(high), vector_of(low)
        m, log_x, s_x = sums_of(of_x, row, segments, cells, 0, high, low)
        top, log_y, s_y = sums_of(of_y, row, segments, cells, 7, high, low)
        between, part = parts_between(log_x, log_y, s_x, s_y)
        of_m, of_top = (m, shift_of(m, high, low)), (top, shift_of(top, high, low))
        scale = high, low, vector_of(inverse), vector_of(inverse_rest)
        at, y_at = x + row * x_pitch + begin * itemsize, y + row * y_pitch + begin * itemsize
        unit = row * segments + segment
        cuda.syncthreads()
        most = number(high, 0.0)
        if last:
            most = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        factor, bits = finer_of(n)
        total, rest = row - row, row - row
        j = row - row
        while j < inside:  # piece by piece: so many registers less
            here, n_here = at + j * itemsize, min(piece, inside - j)
            v, u = (
                load(here, here, thread, team, n_here),
                load(y_at + j * itemsize, here, thread, team, n_here),
            )
            t = term_of(v, u, of_m, of_top, part, between, scale)
            if last:
                more = sum_of_terms(t, most, factor)
                total += more[0]
                rest += more[1]
            else:
                most = maximum(most, largest_lane(t))
            j += piece
        if last:
            total, rest = team_sum(total, team, cells, 1), team_sum(rest, team, cells, 2)
            if thread == 0:
                write_sum(work, unit, total, rest, bits)
                write_cell(field(work, unit, SUM), bits_of(s_x[0]))
                write_cell(field(work, unit, SUM_LOST), bits_of(s_x[1]))
                write_cell(field(work, unit, INVERSE), bits_of(1.0 / s_x[0]))
        else:
            most = team_maximum(most, team, cells, 0)
            if thread == 0:
                write_cell(field(work, unit, MAXIMUM), bits_of(most))

    return kl_terms, signature(
        address, whole, address, whole, size, size, kind, kind, kind, kind, address, address, address
    )


@lru_cache
def combine(storage, of_result):
    """The divergence of long rows, a block for each, from the sums of their segments."""
    f = ratios(storage)
    result_of, sum_over = f.result_of, summed_over(f.compute)
    write = writer(of_result)
    kind = number_type(f.compute)

    def kl_combine(
        segments,  # IN   of a row
        zero,  # IN   0, of the computing type
        work,  # IN   what the segments' terms are, and the sum of the row's exponentials
        divergence,  # OUT  address of the first result
        pitch,  # IN   bytes from result to result
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, _ = row_of(1)
        zero = vector_of(zero)
        most = maximum_of(zero, work, row, segments, MAXIMUM, cells, 0)
        total = sum_over(work, row, segments, cells, 1)
        unit = row * segments
        s = from_bits(zero, read_cell(field(work, unit, SUM)))
        lost = from_bits(zero, read_cell(field(work, unit, SUM_LOST)))
        r = from_bits(zero, read_cell(field(work, unit, INVERSE)))
        if cuda.threadIdx.x == 0:
            write(divergence + row * pitch, result_of(most, total, (s, lost), r))

    return kl_combine, signature(size, kind, address, address, whole)


@lru_cache
def backward(storage, vectors, aligned, of_grad):
    """Gradients of rows that fit into the registers of a team, two at a time."""
    f = ratios(storage)
    shift_of, exponential, sum_of = f.shift_of, f.exponential, f.sum_of
    share_of, split_gradient, gradient = f.share_of, f.split_gradient, f.gradient
    load = loader(storage, f.compute, vectors, aligned, -INFINITY)
    store = storer(storage, f.compute, vectors, aligned)
    read = reader(of_grad, f.compute)
    kind = number_type(f.compute)

    def kl_backward(
        g,  # IN   0, or the address of the gradient with respect to the first divergence
        g_pitch,  # IN   bytes from row to row
        x,  # IN   address of the first row of p's logits
        x_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of q's logits
        y_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        high,  # IN   log2(e) / T in two parts
        low,
        factor,  # IN   what every g is multiplied by, in two parts
        factor_rest,
        dy,  # OUT  address of the first row: g * factor * (q - p)
        dy_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread = first_row(team), place(team)
        on = row < rows
        row = min(row, rows - 1)
        at = y + row * y_pitch
        high, low = vector_of(high), vector_of(low)
        u, v = load(at, at, thread, team, n), load(x + row * x_pitch, at, thread, team, n)

        # the exponentials of both rows and their sums
        m = team_maximum(largest_lane(v), team, cells, 0)
        e = exponential(v, shift_of(m, high, low), high, low)
        total, rest = sum_of(e)
        total, rest = team_sum(total, team, cells, 1), team_sum(rest, team, cells, 2)
        top = team_maximum(largest_lane(u), team, cells, 3)
        o = exponential(u, shift_of(top, high, low), high, low)
        other, other_rest = sum_of(o)
        other, other_rest = team_sum(other, team, cells, 4), team_sum(other_rest, team, cells, 5)

        # every q - p
        one = number(high, 1.0)
        if g != 0:
            one = read(g + row * g_pitch)
        inside, outside = split_gradient(one, vector_of(factor), vector_of(factor_rest))
        of_p = share_of(m, parts_of(total, rest), inside)
        of_q = share_of(top, parts_of(other, other_rest), inside)
        store(dy + row * dy_pitch, at, thread, team, n, on, gradient(e, o, of_p, of_q, outside))

    return kl_backward, signature(
        address, whole, address, whole, address, whole, whole, size, size, kind, kind, kind, kind,
        address, whole,
    )  # fmt: skip


@lru_cache
def backward_columns(storage, of_grad):
    """Gradients of rows that lie along another axis: 32 of them side by side, read three times."""
    f = ratios(storage)
    shift_of, exponential, sum_of = f.shift_of, f.exponential, f.sum_of
    share_of, split_gradient, gradient = f.share_of, f.split_gradient, f.gradient
    gather, scatter = gatherer(storage, f.compute, -INFINITY), scatterer(storage)
    read = reader(of_grad, f.compute)
    kind = number_type(f.compute)

    @jit.device
    def sums_of(at, step, start, share, n, cells, high, low, zero):
        """Of a column: the maximum and the sum."""
        m = number(high, -INFINITY)
        j = start
        while j < n:
            m = maximum(m, largest_lane(gather(at, step, j, share, n)))
            j += share * STRIDED_LANES
        m = column_maximum(m, cells)
        shift = shift_of(m, high, low)
        total, rest = zero, zero
        j = start
        while j < n:
            part = sum_of(exponential(gather(at, step, j, share, n), shift, high, low))
            total += part[0]
            rest += part[1]
            j += share * STRIDED_LANES
        return m, parts_of(column_sum(total, cells), column_sum(rest, cells))

    def kl_backward_columns(
        g,  # IN   0, or the address of the gradient with respect to the first divergence
        g_outer,  # IN   bytes from one to the next: of outer and of inner
        g_inner,
        x,  # IN   address of the first of p's logits
        x_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        x_step,
        x_inner,
        y,  # IN   address of the first of q's logits
        y_outer,  # IN   as of x
        y_step,
        y_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) / T in two parts
        low,
        factor,  # IN   what every g is multiplied by, in two parts
        factor_rest,
        dy,  # OUT  address of the first element: g * factor * (q - p)
        dy_outer,  # IN   as of x
        dy_step,
        dy_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, k, start, share = column_place(inner)
        on = k < inner
        k = min(k, inner - 1)
        at, y_at = x + i * x_outer + k * x_inner, y + i * y_outer + k * y_inner
        dy_at = dy + i * dy_outer + k * dy_inner
        high, low = vector_of(high), vector_of(low)
        m, total = sums_of(at, x_step, start, share, n, cells, high, low, i - i)
        top, other = sums_of(y_at, y_step, start, share, n, cells, high, low, i - i)

        # every q - p
        one = number(high, 1.0)
        if g != 0:
            one = read(g + i * g_outer + k * g_inner)
        inside, outside = split_gradient(one, vector_of(factor), vector_of(factor_rest))
        of_p, of_q = share_of(m, total, inside), share_of(top, other, inside)
        shift, other_shift = shift_of(m, high, low), shift_of(top, high, low)
        j = start
        while j < n:
            e = exponential(gather(at, x_step, j, share, n), shift, high, low)
            o = exponential(gather(y_at, y_step, j, share, n), other_shift, high, low)
            scatter(dy_at, dy_step, j, share, n, on, gradient(e, o, of_p, of_q, outside))
            j += share * STRIDED_LANES

    return kl_backward_columns, signature(
        address, whole, whole, address, whole, whole, whole, address, whole, whole, whole, size, size,
        kind, kind, kind, kind, address, whole, whole, whole,
    )  # fmt: skip


@lru_cache
def backward_segments(storage, of_grad):
    """Gradients of a segment of two long rows (see numbasoft.cuda.split)."""
    f = ratios(storage)
    shift_of, exponential, sum_over = f.shift_of, f.exponential, summed_over(f.compute)
    share_of, split_gradient, gradient = f.share_of, f.split_gradient, f.gradient
    load = loader(storage, f.compute, PIECE_VECTORS[storage], False, -INFINITY)
    store = storer(storage, f.compute, PIECE_VECTORS[storage], False)
    read = reader(of_grad, f.compute)
    length, piece, itemsize = segment_length(storage), piece_length(storage), ITEMSIZE[storage]
    kind = number_type(f.compute)

    def kl_backward_segments(
        g,  # IN   0, or the address of the gradient with respect to the first divergence
        g_pitch,  # IN   bytes from row to row
        x,  # IN   address of the first row of p's logits
        x_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of q's logits
        y_pitch,  # IN   bytes from row to row
        n,  # IN   elements of a row
        segments,  # IN   of a row
        high,  # IN   log2(e) / T in two parts
        low,
        factor,  # IN   what every g is multiplied by, in two parts
        factor_rest,
        of_x,  # IN   what the segments' maxima and sums are
        of_y,
        dy,  # OUT  address of the first row: g * factor * (q - p)
        dy_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(PAIR_CELLS, types.int64)
        row, segment = row_of(segments)
        begin = segment * length
        in_segment = min(length, n - begin)
        thread, team = cuda.threadIdx.x, cuda.blockDim.x
        high, low = vector_of(high), vector_of(low)
        m = maximum_of(high, of_x, row, segments, MAXIMUM, cells, 0)
        top = maximum_of(high, of_y, row, segments, MAXIMUM, cells, 1)
        one = number(high, 1.0)
        if g != 0:
            one = read(g + row * g_pitch)
        inside, outside = split_gradient(one, vector_of(factor), vector_of(factor_rest))
        of_p = share_of(m, sum_over(of_x, row, segments, cells, 2), inside)
        of_q = share_of(top, sum_over(of_y, row, segments, cells, 6), inside)
        shift, other_shift = shift_of(m, high, low), shift_of(top, high, low)
        at, x_at = y + row * y_pitch + begin * itemsize, x + row * x_pitch + begin * itemsize
        dy_at = dy + row * dy_pitch + begin * itemsize
        j = row - row
        while j < in_segment:  # piece by piece: so many registers less
            here, n_here = at + j * itemsize, min(piece, in_segment - j)
            e = exponential(load(x_at + j * itemsize, here, thread, team, n_here), shift, high, low)
            o = exponential(load(here, here, thread, team, n_here), other_shift, high, low)
            result = gradient(e, o, of_p, of_q, outside)
            store(dy_at + j * itemsize, here, thread, team, n_here, True, result)
            j += piece

    return kl_backward_segments, signature(
        address, whole, address, whole, address, whole, size, size, kind, kind, kind, kind,
        address, address, address, whole,
    )  # fmt: skip


FORWARD = Divergence(forward, forward_columns, (terms, combine))
BACKWARD = Divergence(backward, backward_columns, backward_segments)
