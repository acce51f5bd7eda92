"""Cross-entropy on CUDA: loops 1 to 3 of the softmax, then a loss per row and, if wanted, its gradient.

What is said in cpu.py about the formulas holds here. The sum is parted at the maximum: the
others are summed relative to the largest of them (as in logsumexp), so that nothing of them
is lost beside a class that holds nearly all of the probability. A class's gradient is

    unit * (mass p[j] - share[j])        where mass = sum q + 2 z lse and share is q but for a target's own class

and at the class of a target, or of a single maximum, it is a number of the row.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import (
    absolute,
    as_integer,
    bits_of,
    class_loader,
    count,
    fma,
    from_bits,
    gather_within,
    gatherer,
    integer_as,
    largest_lane,
    loader,
    mask_of,
    maximum,
    number,
    read_cell,
    reader,
    scatterer,
    select,
    spanner,
    storer,
    vector_of,
    write_cell,
    writer,
)
from ...cuda.classes import IGNORED, NO_CLASS
from ...cuda.elementary import arithmetic_of, parts_of, two_sum
from ...cuda.geometry import ITEMSIZE, SEGMENT_VECTORS, SHARES, STRIDED_LANES, fills_block, segment_length
from ...cuda.logs import logarithms, results
from ...cuda.operations import (
    CLASS,
    NUMBERS,
    OF_CLASSES,
    PROBABILITIES,
    REGIONS,
    SMOOTHED,
    SPREAD,
    TALLY,
    WEIGHTED,
    ClassLoss,
)
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.split import (
    FIELDS,
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
    block_place,
    column_maximum,
    column_place,
    column_sum,
    row_place,
    team_maximum,
    team_sum,
)
from ...cuda.totals import PAIR_CELLS, THREADS, block_sum, plus, value_of

INFINITY, NAN = float("inf"), float("nan")
MORE_CELLS = 3 * CELLS


# Before the rows: what gradients are multiplied with.


@lru_cache
def scales(compute, storage):
    """What the gradient of every row is multiplied with, and z_loss, for a mean over rows."""
    read, write, write_divisor = reader(storage, "f8"), writer(compute), writer("f8")
    itemsize = ITEMSIZE[compute]

    def cross_entropy_scales(
        tallies,  # IN   0, or the address of TALLY cells for every block
        blocks,  # IN
        weighted,  # IN   whether rows count by the weights of their classes
        rows,  # IN   how many count where there are no tallies
        g,  # IN   the gradient with respect to the mean, unless an address is given
        g_at,  # IN   0, or its address
        numbers,  # OUT  address of g / divisor, and of the divisor for a row that counts
        divisor_at,  # OUT  address of the divisor
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        pairs = cuda.shared.array(PAIR_CELLS, types.int64)
        g = vector_of(g)
        zero = number(g, 0.0)
        pair = zero, zero
        counts = blocks - blocks
        i = cuda.threadIdx.x
        while tallies != 0 and i < blocks:
            at = tallies + i * (8 * TALLY)
            counts += read_cell(at)
            pair = plus(pair, (from_bits(zero, read_cell(at + 8)), from_bits(zero, read_cell(at + 16))))
            i += THREADS
        if tallies == 0:
            counts = rows if cuda.threadIdx.x == 0 else counts
        counts = integer_as(zero, team_sum(counts, THREADS, cells, 0))
        weight = value_of(block_sum(pair, pairs))
        if cuda.threadIdx.x == 0:
            if g_at != 0:
                g = read(g_at)
            divisor = select(mask_of(weighted != 0), weight, counts)
            write(numbers, select(divisor == 0.0, 0.0, g / divisor))
            share = select(counts == 0.0, 1.0, divisor / counts)
            write(numbers + itemsize, share)
            write_divisor(divisor_at, divisor)

    return cross_entropy_scales, signature(
        address, whole, whole, whole, types.float64, address, address, address
    )


@lru_cache
def class_weights(compute, storage):
    """Of every class, from its weight: what q has of it; NaN for what is no weight."""
    read, write, write_weight = reader(storage, "f8"), writer(compute), writer("f8")
    read_rounded = reader(compute, "f8")
    itemsize = ITEMSIZE[compute]

    def cross_entropy_weights(
        weight,  # IN   0, or the address of the first class's weight
        step,  # IN   bytes from one to the next
        classes,  # IN
        kept,  # IN   1 - label_smoothing
        shared,  # IN   label_smoothing / classes
        checked,  # OUT  address of the weights, NaN where they are negative or infinite
        own,  # OUT  address of the weights times ``kept``
        spread,  # OUT  address of the weights times ``shared``
        mass,  # OUT  address of the sum of these, in two parts
    ):
        pairs = cuda.shared.array(PAIR_CELLS, types.int64)
        kept, shared = vector_of(kept), vector_of(shared)
        zero = number(kept, 0.0)
        pair = zero, zero
        j = cuda.threadIdx.x
        while j < classes:
            w = number(kept, 1.0)
            if weight != 0:
                w = read(weight + j * step)
                w = select(w >= 0.0, select(w < INFINITY, w, NAN), NAN)
            write_weight(checked + j * 8, w)
            write(own + j * itemsize, w * kept)
            write(spread + j * itemsize, w * shared)
            # of what was rounded, so that nothing is left elsewhere where there is one class
            pair = plus(pair, (read_rounded(spread + j * itemsize), zero))
            j += THREADS
        pair = block_sum(pair, pairs)
        if cuda.threadIdx.x == 0:
            write(mass, value_of(pair))
            write(mass + itemsize, (pair[0] - read_rounded(mass)) + pair[1])

    return cross_entropy_weights, signature(
        address, whole, whole, types.float64, types.float64, address, address, address, address
    )


# Of a row.


@lru_cache
def classes_of(storage, target, gradient):
    """What a target puts on its own class."""
    compute = arithmetic_of(storage, gradient).compute
    read, read_class = reader(storage, compute), reader(compute, compute)
    itemsize = ITEMSIZE[compute]

    @jit.device
    def class_of(x, step, place, kept, weights, shared, spread, mass):
        """The row's class, its logit, what q has for it alone and besides, and q's sum over the others and over all."""
        k = read_cell(place)
        inside = max(k, 0)
        logit = read(x + inside * step)
        own = kept
        if weights != 0:
            own = read_class(weights + inside * itemsize)
        all_shares = number(kept, 0.0)
        here, elsewhere = all_shares, all_shares
        if target == SMOOTHED:
            all_shares, here = mass, shared
            elsewhere = mass - shared
        if target == SPREAD:
            all_shares, here = read_class(spread - 2 * itemsize), read_class(spread + inside * itemsize)
            elsewhere = (all_shares - here) + read_class(spread - itemsize)
        return k, logit, own, here, elsewhere, all_shares

    return class_of


@lru_cache
def losses_of(storage, target, gradient):
    """The loss of a row, and what it needs of the logits that q is spread over."""
    a = arithmetic_of(storage, gradient)
    pair_of, top_of, finer_sum_below = a.pair_of, a.top_of, a.finer_sum_below
    _, logarithm = logarithms(storage, gradient)
    is_shared = target != CLASS

    @jit.device
    def distance(v, share, m):
        """share * (m - v) / 4, and 0 where share is 0."""
        return share * select(share == 0.0, 0.0, fma(v, -0.25, m * 0.25))

    @jit.device
    def positive_sum_of(v, most, factor):
        """The sum of a thread's terms, none below 0 or above ``most``, as so many times as large integers."""
        return finer_sum_below(v, top_of(most, number(most, 1.0)), factor)

    @jit.device
    def positive_total(most, total):
        """The sum over a row from the largest term and the sum of integers."""
        high, low = pair_of(most, total)
        top = top_of(most, number(most, 1.0))
        return select(most < INFINITY, fma(high, top, low * top), most)

    @jit.device
    def loss_of(k, m, logit, own, shares, far, log, lse, z, inverse, inverse_rest):
        y = logarithm(logit, m, inverse, inverse_rest, log, False)
        value = fma(own, 0.0 - y, 0.0)
        # a weight below 1 may bring back what overflows without it
        apart = (own * fma(logit, -0.25, m * 0.25)) * inverse * 4.0
        value = select(y == -INFINITY, apart, value)
        value = select(own == 0.0, own * log[0], value)
        if is_shared:
            value = value + fma(shares, log[0], far * (inverse * 4.0))
        value = select(z == 0.0, value, fma(z * lse, lse, value))
        return select(mask_of(k == IGNORED), 0.0, select(mask_of(k == NO_CLASS), NAN, value))

    return distance, positive_sum_of, positive_total, loss_of


@lru_cache
def gradients(storage, target):
    """A thread's gradients, and the numbers of a row that they are made of."""
    a = arithmetic_of(storage, gradient=True)
    shift_of, exponential, pair_of, reciprocal = a.shift_of, a.exponential, a.pair_of, a.reciprocal
    largest, is_shared, has_class = a.largest, target != CLASS, target in OF_CLASSES

    @jit.device
    def exponentials(v, m, base, high, low):
        """exp relative to ``base``, the largest of the others, exactly 0 where it counts as 0; -1 at the maximum."""
        shift = shift_of(base, high, low)
        e = exponential(select(v < m, v, -INFINITY), shift, high, low)
        return select(v == m, -1.0, select(v - shift[0] < shift[3], 0.0, e))

    @jit.device
    def factors_of(unit):
        """Two factors, unit / largest**2 together: neither rounds what the other enlarges."""
        is_small = absolute(unit) < 1.0
        square = number(unit, 1.0 / (largest * largest))
        return select(is_small, square, unit * square), select(is_small, unit, 1.0)

    @jit.device
    def numbers_of(
        k, m, second, maxima, total, logit, own, here, elsewhere, shares, lse, z, unit,
        inverse, inverse_rest, high, low,
    ):  # fmt: skip
        # the others' sum relative to the maximum, by ``largest``, and 1 / (maxima + others)
        shift = shift_of(m, high, low)
        e = select(second - shift[0] < shift[3], 0.0, exponential(second, shift, high, low))
        s, lost = pair_of(m, total)
        others = e * s
        others_lost = fma(e, lost, fma(e, s, 0.0 - others))
        s, lost = two_sum(integer_as(m, maxima), others * (1.0 / largest))
        r, r_rest = reciprocal(s, lost + others_lost * (1.0 / largest))
        r, r_rest = r * largest, r_rest * largest

        # g / T times what all classes have of q, and of z_loss
        u = unit * inverse
        u_rest = fma(unit, inverse_rest, fma(unit, inverse, 0.0 - u))
        extra = select(z == 0.0, 0.0, fma(z, 2.0, 0.0) * lse)
        mass = own + shares
        both, both_rest = two_sum(mass, extra)
        of_all = u * both
        rest = fma(u, both, 0.0 - of_all) + fma(u_rest, both, u * both_rest)
        part = rest / of_all
        part = select(absolute(part) < 0.001, part, 0.0)

        factor = e * r
        factor_rest = fma(e, r, 0.0 - factor) + fma(e, r_rest, factor * part)
        peak = ((r + fma(r, part, r_rest)) * largest) * largest
        u1, u2 = factors_of(of_all)

        # where one class holds more than half, 1 - p is the part of the others
        is_top = s < 2.0
        alone = fma(extra, r, elsewhere)
        w1, w2 = factors_of(u * mass)
        of_others = fma(others, r, fma(others, r_rest, others_lost * r)) * largest
        top_gradient = fma(0.0 - of_others * w1, w2, select(alone == 0.0, 0.0, alone * u))
        if has_class:
            is_top = is_top & (logit == m)
            e = exponentials(logit, m, select(second > -INFINITY, second, m), high, low)
            p = select(e < 0.0, r, ((e * factor) * (1.0 / largest)) * (1.0 / largest))
            below = fma(both, p, 0.0 - own) - here
            top_gradient = select(is_top, top_gradient, u * below)

        # what of a row has no answer, and what is ignored
        zero = select(absolute(m) < INFINITY, number(m, 0.0), NAN)
        zero = select(mask_of(k == NO_CLASS), NAN, zero)
        is_ignored = mask_of(k == IGNORED)
        return (
            select(is_ignored, 0.0, factor + zero), select(is_ignored, 0.0, factor_rest + zero),
            select(is_ignored, 0.0, peak + zero), select(is_ignored, 0.0, u1 + zero),
            select(is_ignored, 0.0, u2 + zero), select(is_ignored, 0.0, u + zero),
            select(is_ignored, 0.0, zero), select(is_ignored, 0.0, top_gradient + zero),
            select(is_top, number(m, -0.5), -2.0),
        )  # fmt: skip

    @jit.device
    def gradient_of(e, share, is_own, numbers):
        factor, factor_rest, peak, u1, u2, unit, zero, own_gradient, top = numbers
        p = select(e < 0.0, peak, fma(e, factor, e * factor_rest))
        dx = select(e == 0.0, zero, (p * u1) * u2)
        if is_shared:
            dx = dx - select(share == 0.0, zero, unit * share)
        if has_class:
            return select(is_own, own_gradient, dx)
        return select(e < top, own_gradient, dx)

    return exponentials, numbers_of, gradient_of


@lru_cache
def shares_of(storage, target, gradient, vectors):
    """What q puts on a thread's elements besides the target's own class: 0 outside the row."""
    compute = arithmetic_of(storage, gradient).compute
    within = spanner(storage, vectors)
    load_class = class_loader(storage, compute, vectors)
    itemsize = ITEMSIZE[compute]

    @jit.device
    def share_of(at, given, thread, team, n, first, shared, weights, spread):
        """``given`` are probabilities; ``first`` is the class that the row, or its segment, begins with."""
        if target == SMOOTHED:
            return select(within(at, thread, team, 0, n), shared, 0.0)
        if target == SPREAD:
            return load_class(spread + first * itemsize, at, thread, team, n)
        if target == WEIGHTED:
            w = load_class(weights + first * itemsize, at, thread, team, n)
            return fma(given, w, load_class(spread + first * itemsize, at, thread, team, n))
        return given

    return share_of


# Kernels. With probabilities ``places`` is 0; what a target does not need is 0 as well.


@lru_cache
def rows(storage, target, gradient, loss_storage, vectors, aligned):
    """Rows that fit into the registers of a team: losses, and gradients."""
    a = arithmetic_of(storage, gradient)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    log_of_row, _ = logarithms(storage, gradient)
    result_of = results(storage, gradient)
    distance, positive_sum_of, positive_total, loss_of = losses_of(storage, target, gradient)
    exponentials, numbers_of, gradient_of = gradients(storage, target)
    class_of, share_of = classes_of(storage, target, gradient), shares_of(storage, target, gradient, vectors)
    has_class, is_shared = target in OF_CLASSES, target != CLASS
    load = loader(storage, a.compute, vectors, aligned, -INFINITY)
    load_q = loader(storage, a.compute, vectors, False, 0.0)
    store = storer(storage, a.compute, vectors, aligned)
    within = spanner(storage, vectors)
    read, write = reader(a.compute, a.compute), writer(loss_storage)
    itemsize, loss_size = ITEMSIZE[storage], ITEMSIZE[loss_storage]
    kind = number_type(a.compute)
    room = CELLS if target == CLASS else MORE_CELLS
    place_of = block_place if fills_block(vectors, storage, SHARES if is_shared else 0) else row_place

    def cross_entropy_rows(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        q,  # IN   address of the first row of probabilities
        q_pitch,  # IN   bytes from row to row
        tolerance,  # IN   how far their sums may be from 1
        places,  # IN   address of every row's class
        weights,  # IN   address of what every class is weighted with
        spread,  # IN   address of what every row's q holds of every class besides, behind the sum in two parts
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        kept,  # IN   what q holds for the class of a row, where no class is weighted
        shared,  # IN   what it holds besides of every class, and of all
        mass,
        z,  # IN   the factor of lse**2
        z_at,  # IN   0, or the address of another such factor
        unit,  # IN   what gradients are multiplied with, unless an address is given
        units,  # IN   0, or the address of it, and bytes from row to row
        units_pitch,
        loss,  # OUT  address of the first loss
        dx,  # OUT  address of the first row
        dx_pitch,  # IN   bytes from row to row
    ):
        cells = cuda.shared.array(room, types.int64)
        row, thread, on = place_of(rows, team)
        at, q_at = x + row * x_pitch, q + row * q_pitch
        high, low = vector_of(high), vector_of(low)
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        own, shared, shares, z = vector_of(kept), vector_of(shared), vector_of(mass), vector_of(z)
        k, elsewhere, far = row - row, number(high, 0.0), number(high, 0.0)
        logit, here = far, far
        if has_class:
            k, logit, own, here, elsewhere, shares = class_of(
                at, itemsize, places + row * 8, own, weights, shared, spread, shares
            )
        # a row that is ignored is not read
        v = load(at, at, thread, team, n if k != IGNORED else n - n)
        given = shared
        if not has_class:
            given = load_q(q_at, at, thread, team, n)

        # loop 1: the maximum of the row, and the largest of the others
        m = team_maximum(largest_lane(v), team, cells, 0)
        maxima = team_sum(count(v == m), team, cells, 1)
        others = select(v < m, v, -INFINITY)
        second = team_maximum(largest_lane(others), team, cells, 2)

        # what q holds, and how far below the maximum; the sum of what was given first, which is then not held
        if not has_class:
            least = team_maximum(largest_lane(0.0 - given), team, cells, 8)
        if target == WEIGHTED:
            most = team_maximum(largest_lane(given), team, cells, 9)
            total, rest = positive_sum_of(given, most, 1.0)
            total, rest = team_sum(total, team, cells, 10), team_sum(rest, team, cells, 11)
            given_sum = positive_total(most, parts_of(total, rest))
        share = share_of(at, given, thread, team, n, 0, shared, weights, spread)
        if is_shared:
            terms = distance(v, share, m)
            most = team_maximum(largest_lane(terms), team, cells, 5)
            total, rest = positive_sum_of(terms, most, 1.0)
            total, rest = team_sum(total, team, cells, 6), team_sum(rest, team, cells, 7)
            far = positive_total(most, parts_of(total, rest))
        if not has_class:
            part = select(v < m, share, 0.0)
            most = team_maximum(largest_lane(part), team, cells, 12)
            total, rest = positive_sum_of(part, most, 1.0)
            total, rest = team_sum(total, team, cells, 13), team_sum(rest, team, cells, 14)
            elsewhere = positive_total(most, parts_of(total, rest))
            part = select(v < m, 0.0, share)
            most = team_maximum(largest_lane(part), team, cells, 15)
            total, rest = positive_sum_of(part, most, 1.0)
            total, rest = team_sum(total, team, cells, 16), team_sum(rest, team, cells, 17)
            shares = elsewhere + positive_total(most, parts_of(total, rest))
            if target != WEIGHTED:
                given_sum = shares
            k = validity(given_sum, least, vector_of(tolerance), k)
            logit, own = m, number(m, 0.0)

        # loops 2 and 3: the sum of exp of every other element after the shift
        base = select(second > -INFINITY, second, m)
        if gradient:
            e = exponentials(v, m, base, high, low)
            total, rest = sum_of(select(e < 0.0, 0.0, e))
        else:
            total, rest = sum_of(exponential(others, shift_of(base, high, low), high, low))
        total, rest = team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4)
        total = parts_of(total, rest)

        # loop 4: the log of the sum, and the loss
        log = log_of_row(m, second, maxima, total, high, low)
        lse = result_of(m, second, maxima, total, high, low, inverse, inverse_rest)
        if z_at != 0:
            z = z * read(z_at)
        value = loss_of(k, m, logit, own, shares, far, log, lse, z, inverse, inverse_rest)
        if on and thread == 0:
            write(loss + row * loss_size, value)

        # every exponential divided by the sum, less its share
        if gradient:
            unit = vector_of(unit)
            if units != 0:
                unit = read(units + row * units_pitch)
            numbers = numbers_of(
                k, m, second, maxima, total, logit, own, here, elsewhere, shares, lse, z, unit,
                inverse, inverse_rest, high, low,
            )  # fmt: skip
            is_own = within(at, thread, team, k, k + 1)
            result = gradient_of(e, share, is_own, numbers)
            store(dx + row * dx_pitch, at, thread, team, n, on, result)

    return cross_entropy_rows, signature(
        address, whole, address, whole, kind, address, address, address, whole, size, size,
        kind, kind, kind, kind, kind, kind, kind, kind, address, kind, address, whole, address, address, whole,
    )  # fmt: skip


@jit.device
def validity(total, least, tolerance, k):
    """``k``, or NO_CLASS where a row holds no probabilities."""
    is_valid = (absolute(total - 1.0) <= tolerance) & (least <= 0.0)
    return k + as_integer(select(is_valid, 0.0, number(total, NO_CLASS)))


@lru_cache
def columns(storage, target, gradient, loss_storage):
    """Rows that lie along another axis: 32 of them side by side, read three to five times."""
    a = arithmetic_of(storage, gradient)
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    log_of_row, _ = logarithms(storage, gradient)
    result_of = results(storage, gradient)
    distance, positive_sum_of, positive_total, loss_of = losses_of(storage, target, gradient)
    exponentials, numbers_of, gradient_of = gradients(storage, target)
    class_of = classes_of(storage, target, gradient)
    has_class, is_shared = target in OF_CLASSES, target != CLASS
    gather, scatter = gatherer(storage, a.compute, -INFINITY), scatterer(storage)
    gather_q, gather_class = gatherer(storage, a.compute, 0.0), gatherer(a.compute, a.compute, 0.0)
    read, write = reader(a.compute, a.compute), writer(loss_storage)
    itemsize, loss_size = ITEMSIZE[a.compute], ITEMSIZE[loss_storage]
    kind = number_type(a.compute)

    @jit.device
    def share_of(q, q_step, j, distance, n, shared, weights, spread):
        if target == CLASS:
            return shared
        if target == SMOOTHED:
            return select(gather_within(j, distance, 0, n), shared, 0.0)
        if target == SPREAD:
            return gather_class(spread, itemsize, j, distance, n)
        share = gather_q(q, q_step, j, distance, n)
        if target == WEIGHTED:
            w = gather_class(weights, itemsize, j, distance, n)
            share = fma(share, w, gather_class(spread, itemsize, j, distance, n))
        return share

    def cross_entropy_columns(
        x,  # IN   address of the first element
        x_outer,  # IN   bytes from one to the next: of outer, of n and of inner
        x_step,
        x_inner,
        q,  # IN   address of the first probability
        q_outer,  # IN   as of x
        q_step,
        q_inner,
        tolerance,  # IN   how far their sums may be from 1
        places,  # IN   address of every row's class
        weights,  # IN   address of what every class is weighted with
        spread,  # IN   address of what every row's q holds of every class besides, behind the sum in two parts
        row_outer,  # IN   rows from one to the next: of outer and of inner
        row_inner,
        n,  # IN   elements of a column
        inner,  # IN   columns side by side
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        kept,  # IN   what q holds for the class of a row, where no class is weighted
        shared,  # IN   what it holds besides of every class, and of all
        mass,
        z,  # IN   the factor of lse**2
        z_at,  # IN   0, or the address of another such factor
        unit,  # IN   what gradients are multiplied with, unless an address is given
        units,  # IN   0, or the address of it, and bytes from row to row
        units_pitch,
        loss,  # OUT  address of the first row's loss
        dx,  # OUT  address of the first element
        dx_outer,  # IN   as of x
        dx_step,
        dx_inner,
    ):
        cells = cuda.shared.array(COLUMN_CELLS, types.int64)
        i, c, start, share_count = column_place(inner)
        on = c < inner
        c = min(c, inner - 1)
        at, q_at = x + i * x_outer + c * x_inner, q + i * q_outer + c * q_inner
        high, low = vector_of(high), vector_of(low)
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        own, shared, shares, z = vector_of(kept), vector_of(shared), vector_of(mass), vector_of(z)
        k, elsewhere, far = i - i, number(high, 0.0), number(high, 0.0)
        logit, here = far, far
        # first of all whether the column holds probabilities: what else is summed needs the registers
        if target == WEIGHTED:
            most_given, least = number(high, -INFINITY), number(high, -INFINITY)
            j = start
            while j < n:
                given = gather_q(q_at, q_step, j, share_count, n)
                most_given = maximum(most_given, largest_lane(given))
                least = maximum(least, largest_lane(0.0 - given))
                j += share_count * STRIDED_LANES
            most_given, least = column_maximum(most_given, cells), column_maximum(least, cells)
            given_total, given_rest = i - i, i - i
            j = start
            while j < n:
                part = positive_sum_of(gather_q(q_at, q_step, j, share_count, n), most_given, 1.0)
                given_total += part[0]
                given_rest += part[1]
                j += share_count * STRIDED_LANES
            of_all = parts_of(column_sum(given_total, cells), column_sum(given_rest, cells))
            k = validity(positive_total(most_given, of_all), least, vector_of(tolerance), k)

        # loop 1: the maximum of the column, and the largest of the others
        m = number(high, -INFINITY)
        j = start
        while j < n:
            m = maximum(m, largest_lane(gather(at, x_step, j, share_count, n)))
            j += share_count * STRIDED_LANES
        m = column_maximum(m, cells)
        second = number(high, -INFINITY)
        most, least, most_others, most_top = second, second, second, second
        maxima = i - i
        j = start
        while j < n:
            v = gather(at, x_step, j, share_count, n)
            second = maximum(second, largest_lane(select(v < m, v, -INFINITY)))
            maxima += count(v == m)
            if is_shared:
                share = share_of(q_at, q_step, j, share_count, n, shared, weights, spread)
                most = maximum(most, largest_lane(distance(v, share, m)))
            if not has_class:
                most_others = maximum(most_others, largest_lane(select(v < m, share, 0.0)))
                most_top = maximum(most_top, largest_lane(select(v < m, 0.0, share)))
            if target == PROBABILITIES:
                least = maximum(least, largest_lane(0.0 - share))
            j += share_count * STRIDED_LANES
        second, maxima = column_maximum(second, cells), column_sum(maxima, cells)
        if is_shared:
            most = column_maximum(most, cells)
        if not has_class:
            most_others, most_top = column_maximum(most_others, cells), column_maximum(most_top, cells)
        if target == PROBABILITIES:
            least = column_maximum(least, cells)

        # loops 2 and 3: the sum of exp of every other element after the shift, and of what q holds
        base = select(second > -INFINITY, second, m)
        shift = shift_of(base, high, low)
        total, rest = i - i, i - i
        far_total, far_rest = total, total
        j = start
        while j < n:
            v = gather(at, x_step, j, share_count, n)
            part = sum_of(exponential(select(v < m, v, -INFINITY), shift, high, low))
            total += part[0]
            rest += part[1]
            if is_shared:
                share = share_of(q_at, q_step, j, share_count, n, shared, weights, spread)
                part = positive_sum_of(distance(v, share, m), most, 1.0)
                far_total += part[0]
                far_rest += part[1]
            j += share_count * STRIDED_LANES
        # held through the loops it took registers that were spilled; gradients overwrite it after a barrier
        row = i * row_outer + c * row_inner
        if has_class:
            k, logit, own, here, elsewhere, shares = class_of(
                at, x_step, places + row * 8, own, weights, shared, spread, shares
            )
        total = parts_of(column_sum(total, cells), column_sum(rest, cells))
        if is_shared:
            far = positive_total(most, parts_of(column_sum(far_total, cells), column_sum(far_rest, cells)))
        if not has_class:  # in a loop of its own: with the other's sums it took registers that were spilled
            others_total, others_rest = i - i, i - i
            top_total, top_rest = others_total, others_total
            j = start
            while j < n:
                v = gather(at, x_step, j, share_count, n)
                share = share_of(q_at, q_step, j, share_count, n, shared, weights, spread)
                part = positive_sum_of(select(v < m, share, 0.0), most_others, 1.0)
                others_total += part[0]
                others_rest += part[1]
                part = positive_sum_of(select(v < m, 0.0, share), most_top, 1.0)
                top_total += part[0]
                top_rest += part[1]
                j += share_count * STRIDED_LANES
            of_others = parts_of(column_sum(others_total, cells), column_sum(others_rest, cells))
            of_top = parts_of(column_sum(top_total, cells), column_sum(top_rest, cells))
            elsewhere = positive_total(most_others, of_others)
            shares = elsewhere + positive_total(most_top, of_top)
            if target == PROBABILITIES:
                k = validity(shares, least, vector_of(tolerance), k)
            logit, own = m, number(m, 0.0)

        # loop 4: the log of the sum, and the loss
        log = log_of_row(m, second, maxima, total, high, low)
        lse = result_of(m, second, maxima, total, high, low, inverse, inverse_rest)
        if z_at != 0:
            z = z * read(z_at)
        value = loss_of(k, m, logit, own, shares, far, log, lse, z, inverse, inverse_rest)
        if on and start == 0:
            write(loss + row * loss_size, value)

        # every exponential divided by the sum, less its share
        if gradient:
            unit = vector_of(unit)
            if units != 0:
                unit = read(units + row * units_pitch)
            numbers = numbers_of(
                k, m, second, maxima, total, logit, own, here, elsewhere, shares, lse, z, unit,
                inverse, inverse_rest, high, low,
            )  # fmt: skip
            dx_at = dx + i * dx_outer + c * dx_inner
            j = start
            while j < n:
                e = exponentials(gather(at, x_step, j, share_count, n), m, base, high, low)
                share = share_of(q_at, q_step, j, share_count, n, shared, weights, spread)
                is_own = gather_within(j, share_count, k, k + 1)
                scatter(dx_at, dx_step, j, share_count, n, on, gradient_of(e, share, is_own, numbers))
                j += share_count * STRIDED_LANES

    return cross_entropy_columns, signature(
        address, whole, whole, whole, address, whole, whole, whole, kind, address, address, address,
        whole, whole, size, size, kind, kind, kind, kind, kind, kind, kind, kind, address, kind,
        address, whole, address, address, whole, whole, whole,
    )  # fmt: skip


# Long rows, in segments. Behind the maxima and sums of numbasoft.cuda.split the work array has as many fields
# for each thing that is summed besides, with its largest term as MAXIMUM: what q holds times how far it is
# below the maximum; and of probabilities the others' shares, the maxima's, and what was given, with the
# smallest of these, negated, as SECOND. Then come the numbers of every row.
FAR, OTHERS, TOP, GIVEN = 1, 2, 3, 4


@jit.device
def region(work, units, which):
    """The fields of all segments for one thing that is summed."""
    return work + which * (units * FIELDS * 8)


def parts_of_segment(storage, target):
    """In how many parts a thread does its vectors of a segment, so that registers hold them, and vectors of a part."""
    vectors = SEGMENT_VECTORS[storage]
    return (1, vectors) if target == CLASS else (2, vectors // 2)


@lru_cache
def segment_shares(storage, target, gradient, last):
    """What a segment holds of q: first the largest terms; with ``last`` the sums."""
    a = arithmetic_of(storage, gradient)
    distance, positive_sum_of, _, _ = losses_of(storage, target, gradient)
    finer_of = finer(a.compute)
    parts, vectors = parts_of_segment(storage, target)
    share_of = shares_of(storage, target, gradient, vectors)
    has_class = target in OF_CLASSES
    load = loader(storage, a.compute, vectors, False, -INFINITY)
    load_q = loader(storage, a.compute, vectors, False, 0.0)
    length, itemsize = segment_length(storage), ITEMSIZE[storage]
    kind = number_type(a.compute)

    @jit.device
    def leave_largest(most, fields, unit, which, cells, slot):
        most = team_maximum(most, cuda.blockDim.x, cells, slot)
        if cuda.threadIdx.x == 0:
            write_cell(field(fields, unit, which), bits_of(most))

    @jit.device
    def leave_sum(total, bits, fields, unit, cells, slot):
        first = team_sum(total[0], cuda.blockDim.x, cells, slot)
        rest = team_sum(total[1], cuda.blockDim.x, cells, slot + 1)
        if cuda.threadIdx.x == 0:
            write_sum(fields, unit, first, rest, bits)

    @jit.device
    def plus_sum(total, v, most, factor):
        part = positive_sum_of(v, most, factor)
        return total[0] + part[0], total[1] + part[1]

    def cross_entropy_segment_shares(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        q,  # IN   address of the first row of probabilities
        q_pitch,  # IN   bytes from row to row
        weights,  # IN   address of what every class is weighted with
        spread,  # IN   address of what every row's q holds of every class besides
        n,  # IN   elements of a row
        segments,  # IN   of a row
        units,  # IN   segments of all rows
        shared,  # IN   what q holds besides of every class
        work,  # OUT  FIELDS int64 for every segment and thing that is summed
    ):
        cells = cuda.shared.array(MORE_CELLS, types.int64)
        row, segment = row_of(segments)
        begin = segment * length
        inside = min(length, n - begin)
        team = cuda.blockDim.x
        at, q_at = x + row * x_pitch + begin * itemsize, q + row * q_pitch + begin * itemsize
        shared = vector_of(shared)
        unit = row * segments + segment
        far, given = region(work, units, FAR), region(work, units, GIVEN)
        others, top = region(work, units, OTHERS), region(work, units, TOP)
        factor, bits = finer_of(n)
        m = maximum_of(shared, work, row, segments, MAXIMUM, cells, 0)
        most = number(m, -INFINITY)
        most_given, least, most_others, most_top = most, most, most, most
        far_sum = row - row, row - row
        given_sum, others_sum, top_sum = far_sum, far_sum, far_sum
        if last:
            most = maximum_of(m, far, row, segments, MAXIMUM, cells, 1)
            if not has_class:
                most_others = maximum_of(m, others, row, segments, MAXIMUM, cells, 3)
                most_top = maximum_of(m, top, row, segments, MAXIMUM, cells, 12)
            if target == WEIGHTED:
                most_given = maximum_of(m, given, row, segments, MAXIMUM, cells, 2)
        part = 0
        while part < parts:
            thread = cuda.threadIdx.x + part * vectors * team
            v = load(at, at, thread, team, inside)
            q_row = shared
            if not has_class:
                q_row = load_q(q_at, at, thread, team, inside)
            share = share_of(at, q_row, thread, team, inside, begin, shared, weights, spread)
            terms = distance(v, share, m)
            if last:
                far_sum = plus_sum(far_sum, terms, most, factor)
                if not has_class:
                    others_sum = plus_sum(others_sum, select(v < m, share, 0.0), most_others, factor)
                    top_sum = plus_sum(top_sum, select(v < m, 0.0, share), most_top, factor)
                if target == WEIGHTED:
                    given_sum = plus_sum(given_sum, q_row, most_given, factor)
            else:
                most = maximum(most, largest_lane(terms))
                if not has_class:
                    most_given = maximum(most_given, largest_lane(q_row))
                    least = maximum(least, largest_lane(0.0 - q_row))
                    most_others = maximum(most_others, largest_lane(select(v < m, share, 0.0)))
                    most_top = maximum(most_top, largest_lane(select(v < m, 0.0, share)))
            part += 1
        if last:
            leave_sum(far_sum, bits, far, unit, cells, 4)
            if not has_class:
                leave_sum(others_sum, bits, others, unit, cells, 8)
                leave_sum(top_sum, bits, top, unit, cells, 10)
            if target == WEIGHTED:
                leave_sum(given_sum, bits, given, unit, cells, 6)
        else:
            leave_largest(most, far, unit, MAXIMUM, cells, 4)
            if not has_class:
                leave_largest(most_given, given, unit, MAXIMUM, cells, 5)
                leave_largest(least, given, unit, SECOND, cells, 6)
                leave_largest(most_others, others, unit, MAXIMUM, cells, 7)
                leave_largest(most_top, top, unit, MAXIMUM, cells, 8)

    return cross_entropy_segment_shares, signature(
        address, whole, address, whole, address, address, size, size, whole, kind, address
    )


@lru_cache
def combine(storage, target, gradient, loss_storage):
    """Loop 4 for long rows, a block for each: losses, and the numbers that gradients are made of."""
    a = arithmetic_of(storage, gradient)
    log_of_row, _ = logarithms(storage, gradient)
    result_of = results(storage, gradient)
    _, _, positive_total, loss_of = losses_of(storage, target, gradient)
    _, numbers_of, _ = gradients(storage, target)
    class_of, sum_over = classes_of(storage, target, gradient), summed_over(a.compute)
    has_class, is_shared = target in OF_CLASSES, target != CLASS
    read, write = reader(a.compute, a.compute), writer(loss_storage)
    itemsize, loss_size, regions = ITEMSIZE[storage], ITEMSIZE[loss_storage], REGIONS[target]
    kind = number_type(a.compute)

    def cross_entropy_combine(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        tolerance,  # IN   how far the sums of probabilities may be from 1
        places,  # IN   address of every row's class
        weights,  # IN   address of what every class is weighted with
        spread,  # IN   address of what every row's q holds of every class besides, behind the sum in two parts
        segments,  # IN   of a row
        units,  # IN   segments of all rows
        high,  # IN   log2(e) / T in two parts
        low,
        inverse,  # IN   1 / T in two parts
        inverse_rest,
        kept,  # IN   what q holds for the class of a row, where no class is weighted
        shared,  # IN   what it holds besides of every class, and of all
        mass,
        z,  # IN   the factor of lse**2
        z_at,  # IN   0, or the address of another such factor
        unit,  # IN   what gradients are multiplied with, unless an address is given
        factors,  # IN   0, or the address of it, and bytes from row to row
        factors_pitch,
        work,  # IN   what the segments' maxima and sums are; OUT the rows' numbers behind
        loss,  # OUT  address of the first loss
    ):
        cells = cuda.shared.array(MORE_CELLS, types.int64)
        row, _ = row_of(1)
        high, low = vector_of(high), vector_of(low)
        inverse, inverse_rest = vector_of(inverse), vector_of(inverse_rest)
        own, shared, shares, z = vector_of(kept), vector_of(shared), vector_of(mass), vector_of(z)
        k, elsewhere, far = row - row, number(high, 0.0), number(high, 0.0)
        logit, here = far, far
        m = maximum_of(high, work, row, segments, MAXIMUM, cells, 0)
        second = second_of(m, work, row, segments, cells, 1)
        maxima = count_over(work, row, segments, MAXIMA, cells, 2)
        total = sum_over(work, row, segments, cells, 3)
        if is_shared:
            fields = region(work, units, FAR)
            most = maximum_of(m, fields, row, segments, MAXIMUM, cells, 7)
            far = positive_total(most, sum_over(fields, row, segments, cells, 8))
        if not has_class:
            cuda.syncthreads()
            fields = region(work, units, OTHERS)
            most = maximum_of(m, fields, row, segments, MAXIMUM, cells, 6)
            elsewhere = positive_total(most, sum_over(fields, row, segments, cells, 12))
            cuda.syncthreads()
            fields = region(work, units, TOP)
            most = maximum_of(m, fields, row, segments, MAXIMUM, cells, 6)
            shares = elsewhere + positive_total(most, sum_over(fields, row, segments, cells, 0))
            fields = region(work, units, GIVEN)
            least = maximum_of(m, fields, row, segments, SECOND, cells, 7)
            given_sum = shares
            if target == WEIGHTED:
                most = maximum_of(m, fields, row, segments, MAXIMUM, cells, 8)
                given_sum = positive_total(most, sum_over(fields, row, segments, cells, 9))
            k = validity(given_sum, least, vector_of(tolerance), k)
            logit, own = m, number(m, 0.0)
        if has_class:  # before the sums it took registers that were spilled
            k, logit, own, here, elsewhere, shares = class_of(
                x + row * x_pitch, itemsize, places + row * 8, own, weights, shared, spread, shares
            )
        log = log_of_row(m, second, maxima, total, high, low)
        lse = result_of(m, second, maxima, total, high, low, inverse, inverse_rest)
        if z_at != 0:
            z = z * read(z_at)
        value = loss_of(k, m, logit, own, shares, far, log, lse, z, inverse, inverse_rest)
        if cuda.threadIdx.x == 0:
            write(loss + row * loss_size, value)
        if gradient:
            unit = vector_of(unit)
            if factors != 0:
                unit = read(factors + row * factors_pitch)
            numbers = numbers_of(
                k, m, second, maxima, total, logit, own, here, elsewhere, shares, lse, z, unit,
                inverse, inverse_rest, high, low,
            )  # fmt: skip
            if cuda.threadIdx.x == 0:
                at = region(work, units, regions) + row * (NUMBERS * 8)
                write_cell(at, bits_of(m))
                write_cell(at + 8, bits_of(select(second > -INFINITY, second, m)))
                write_cell(at + 16, bits_of(numbers[0]))
                write_cell(at + 24, bits_of(numbers[1]))
                write_cell(at + 32, bits_of(numbers[2]))
                write_cell(at + 40, bits_of(numbers[3]))
                write_cell(at + 48, bits_of(numbers[4]))
                write_cell(at + 56, bits_of(numbers[5]))
                write_cell(at + 64, bits_of(numbers[6]))
                write_cell(at + 72, bits_of(numbers[7]))
                write_cell(at + 80, bits_of(numbers[8]))

    return cross_entropy_combine, signature(
        address, whole, kind, address, address, address, size, whole, kind, kind, kind, kind,
        kind, kind, kind, kind, address, kind, address, whole, address, address,
    )  # fmt: skip


@lru_cache
def segments(storage, target):
    """Gradients of a segment of a long row, from the row's numbers."""
    a = arithmetic_of(storage, gradient=True)
    exponentials, _, gradient_of = gradients(storage, target)
    parts, vectors = parts_of_segment(storage, target)
    share_of = shares_of(storage, target, True, vectors)
    load = loader(storage, a.compute, vectors, False, -INFINITY)
    load_q = loader(storage, a.compute, vectors, False, 0.0)
    store = storer(storage, a.compute, vectors, False)
    within = spanner(storage, vectors)
    length, itemsize, regions = segment_length(storage), ITEMSIZE[storage], REGIONS[target]
    has_class = target in OF_CLASSES
    kind = number_type(a.compute)

    def cross_entropy_segments(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        q,  # IN   address of the first row of probabilities
        q_pitch,  # IN   bytes from row to row
        places,  # IN   address of every row's class
        weights,  # IN   address of what every class is weighted with
        spread,  # IN   address of what every row's q holds of every class besides
        n,  # IN   elements of a row
        segments,  # IN   of a row
        units,  # IN   segments of all rows
        high,  # IN   log2(e) / T in two parts
        low,
        shared,  # IN   what q holds besides of every class
        work,  # IN   the rows' numbers, behind what they were made of
        dx,  # OUT  address of the first row
        dx_pitch,  # IN   bytes from row to row
    ):
        row, segment = row_of(segments)
        begin = segment * length
        inside = min(length, n - begin)
        team = cuda.blockDim.x
        at, q_at = x + row * x_pitch + begin * itemsize, q + row * q_pitch + begin * itemsize
        high, low, shared = vector_of(high), vector_of(low), vector_of(shared)
        of_row = region(work, units, regions) + row * (NUMBERS * 8)
        m, base = from_bits(high, read_cell(of_row)), from_bits(high, read_cell(of_row + 8))
        numbers = (
            from_bits(high, read_cell(of_row + 16)),
            from_bits(high, read_cell(of_row + 24)),
            from_bits(high, read_cell(of_row + 32)),
            from_bits(high, read_cell(of_row + 40)),
            from_bits(high, read_cell(of_row + 48)),
            from_bits(high, read_cell(of_row + 56)),
            from_bits(high, read_cell(of_row + 64)),
            from_bits(high, read_cell(of_row + 72)),
            from_bits(high, read_cell(of_row + 80)),
        )
        k = row - row
        if has_class:
            k = read_cell(places + row * 8) - begin
        part = 0
        while part < parts:
            thread = cuda.threadIdx.x + part * vectors * team
            e = exponentials(load(at, at, thread, team, inside), m, base, high, low)
            given = shared
            if not has_class:
                given = load_q(q_at, at, thread, team, inside)
            share = share_of(at, given, thread, team, inside, begin, shared, weights, spread)
            result = gradient_of(e, share, within(at, thread, team, k, k + 1), numbers)
            store(dx + row * dx_pitch + begin * itemsize, at, thread, team, inside, True, result)
            part += 1

    return cross_entropy_segments, signature(
        address, whole, address, whole, address, address, address, size, size, whole, kind, kind, kind,
        address, address, whole,
    )  # fmt: skip


# Of log-probabilities, which need no sum.


@lru_cache
def picked(storage, loss_storage):
    """The negative log-likelihood of every row's class."""
    compute = arithmetic_of(storage).compute
    read, read_class, write = reader(storage, compute), reader(compute, compute), writer(loss_storage)
    itemsize, loss_size = ITEMSIZE[compute], ITEMSIZE[loss_storage]

    def nll_picked(
        x,  # IN   address of the first row's first log-probability
        x0,  # IN   bytes from row to row along five axes, and from class to class
        x1,
        x2,
        x3,
        x4,
        x_step,
        n1,  # IN   lengths of all axes but the first
        n2,
        n3,
        n4,
        rows,  # IN
        places,  # IN   address of every row's class
        weights,  # IN   0, or the address of what every class is weighted with
        one,  # IN   1
        loss,  # OUT  address of the first loss
    ):
        row = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if row < rows:
            i4, i = row % n4, row // n4
            i3, i = i % n3, i // n3
            i2, i = i % n2, i // n2
            i1, i = i % n1, i // n1
            k = read_cell(places + row * 8)
            inside = max(k, 0)
            own = vector_of(one)
            if weights != 0:
                own = read_class(weights + inside * itemsize)
            v = read(x + i * x0 + i1 * x1 + i2 * x2 + i3 * x3 + i4 * x4 + inside * x_step)
            value = select(own == 0.0, 0.0, own * (0.0 - v))
            value = select(mask_of(k == IGNORED), 0.0, select(mask_of(k == NO_CLASS), NAN, value))
            write(loss + row * loss_size, value)

    return nll_picked, signature(
        address, *[whole] * 6, *[whole] * 4, whole, address, address, number_type(compute), address
    )  # fmt: skip


@lru_cache
def placed(storage):
    """Its gradient: 0 but at each row's class; rows that have none are NaN."""
    compute = arithmetic_of(storage).compute
    read, write = reader(compute, compute), writer(storage)
    itemsize, size_ = ITEMSIZE[compute], ITEMSIZE[storage]

    def nll_placed(
        n,  # IN   classes
        inner,  # IN   rows that lie side by side
        total,  # IN   elements
        places,  # IN   address of every row's class
        weights,  # IN   0, or the address of what every class is weighted with
        unit,  # IN   what gradients are multiplied with, unless an address is given
        units,  # IN   0, or the address of it, and bytes from row to row
        units_pitch,
        dx,  # OUT  address of the first element, (outer, n, inner) without gaps
    ):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < total:
            row = i // (n * inner) * inner + i % inner
            k = read_cell(places + row * 8)
            unit = vector_of(unit)
            value = number(unit, 0.0)
            if k == i // inner % n:
                if units != 0:
                    unit = read(units + row * units_pitch)
                own = number(unit, 1.0)
                if weights != 0:
                    own = read(weights + k * itemsize)
                value = select(own == 0.0, 0.0, 0.0 - own * unit)
            write(dx + i * size_, select(mask_of(k == NO_CLASS), NAN, value))

    return nll_placed, signature(
        whole, whole, whole, address, address, number_type(compute), address, whole, address
    )  # fmt: skip


LOSS = ClassLoss(scales, class_weights, rows, columns, segment_shares, combine, segments, picked, placed)
