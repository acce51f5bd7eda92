"""Binary cross-entropy on CUDA, forward and backward: no element needs another but for the sum of all."""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import fma, loader, maximum, plus, reader, select, storer, vector_of
from ...cuda.geometry import ITEMSIZE
from ...cuda.logistic import logistic_of
from ...cuda.operations import NUMBER, Elementwise
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.team import CELLS, first_row, place, segment_of
from ...cuda.totals import partial_sums

NAN = float("nan")


@jit.device
def times(a, b):
    """a * b, 0 where a is: also beside infinity."""
    return select(a == 0.0, 0.0, a * b)


@lru_cache
def losses(storage):
    """The loss of a thread's elements; NaN for a target that is no probability."""
    f = logistic_of(storage)
    small_exponential, log_of_one_and = f.small_exponential, f.log_of_one_and

    @jit.device
    def loss_of(x, t, weight, high, low):
        is_number, is_probability = x == x, (t >= 0.0) & (t <= 1.0)  # asked for last it took more registers
        log = log_of_one_and(small_exponential(x, high, low))
        # log(1 + exp(x)) and log(1 + exp(-x)), without the difference of nearly equal numbers
        above, below = plus(log, maximum(x, 0.0)), plus(log, maximum(0.0 - x, 0.0))
        y = times(1.0 - t, above) + times(t * weight, below)
        y = select(is_number, y, x)
        return select(is_probability, y, NAN)

    return loss_of


@lru_cache
def forward(storage, vectors, aligned, reduced):
    """Losses of rows, each in one segment or more; or where ``reduced`` the sums of a single row's segments."""
    f = logistic_of(storage)
    loss_of, write_sum = losses(storage), partial_sums(f.compute)
    load_x = loader(storage, f.compute, vectors, aligned, -float("inf"))
    load_t = loader(storage, f.compute, vectors, aligned, 0.0)
    store = storer(storage, f.compute, vectors, aligned)
    itemsize = ITEMSIZE[storage]
    kind = number_type(f.compute)

    def bce_forward(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        t,  # IN   address of the first row of the probabilities of the positive class
        t_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        weight,  # IN   of the positive class
        high,  # IN   log2(e) in two parts
        low,
        loss,  # OUT  address of the first row; or FIELDS int64 for every segment
        loss_pitch,  # IN   bytes from row to row
    ):
        row, on, begin, inside = segment_of(team, rows, n, segments, length)
        thread = place(team)
        at = x + row * x_pitch + begin * itemsize
        q = load_t(t + row * t_pitch + begin * itemsize, at, thread, team, inside)
        v = load_x(at, at, thread, team, inside)
        y = loss_of(v, q, vector_of(weight), vector_of(high), vector_of(low))
        if reduced:
            cells = cuda.shared.array(CELLS, types.int64)
            write_sum(y, team, cells, on, loss, first_row(team))
        else:
            store(loss + row * loss_pitch + begin * itemsize, at, thread, team, inside, on, y)

    return bce_forward, signature(
        address, whole, address, whole, whole, whole, size, size, size, kind, kind, kind, address, whole
    )


@lru_cache
def backward(storage, vectors, aligned, of_grad):
    """Gradients of rows, each in one segment or more.

    ``of_grad`` is the storage of a g for all, NUMBER where ``factor`` has all of it, or None for one per element.
    """
    f = logistic_of(storage, gradient=True)
    small_exponential, sides_of = f.small_exponential, f.sides_of
    load = loader(storage, f.compute, vectors, aligned, 0.0)
    store = storer(storage, f.compute, vectors, aligned)
    in_array = of_grad not in (None, NUMBER)
    read = reader(of_grad if in_array else storage, f.compute)
    itemsize = ITEMSIZE[storage]
    kind = number_type(f.compute)

    def bce_backward(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        t,  # IN   address of the first row of the probabilities of the positive class
        t_pitch,  # IN   bytes from row to row
        g,  # IN   address of the gradient with respect to the first row's losses, or to all losses
        g_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        weight,  # IN   of the positive class
        high,  # IN   log2(e) in two parts
        low,
        factor,  # IN   of a g for all, in two parts
        factor_rest,
        dx,  # OUT  address of the first row: g * ((1 - t) * p - weight * t * (1 - p))
        dx_pitch,  # IN   bytes from row to row
    ):
        row, on, begin, inside = segment_of(team, rows, n, segments, length)
        thread = place(team)
        at = x + row * x_pitch + begin * itemsize
        v = load(at, at, thread, team, inside)
        q = load(t + row * t_pitch + begin * itemsize, at, thread, team, inside)
        p, rest = sides_of(v, small_exponential(v, vector_of(high), vector_of(low)))
        d = fma(1.0 - q, p, 0.0 - (q * vector_of(weight)) * rest)
        d = select((q >= 0.0) & (q <= 1.0), d, NAN)
        if of_grad is None:
            of_row = load(g + row * g_pitch + begin * itemsize, at, thread, team, inside)
        else:
            of_row = vector_of(factor)
            if in_array:
                one = read(g)
                of_row = fma(one, of_row, one * vector_of(factor_rest))
        store(dx + row * dx_pitch + begin * itemsize, at, thread, team, inside, on, d * of_row)

    return bce_backward, signature(
        address, whole, address, whole, address, whole, whole, whole, size, size, size,
        kind, kind, kind, kind, kind, address, whole,
    )  # fmt: skip


FORWARD, BACKWARD = Elementwise(forward, few=False), Elementwise(backward, few=True)
