"""sigmoid and logit on CUDA: no element needs another."""

import math
from functools import lru_cache

from ...cuda import jit
from ...cuda.backend import exponent, loader, power_of_two_above, select, storer, vector_of
from ...cuda.elementary import arithmetic_of, two_sum
from ...cuda.geometry import ITEMSIZE
from ...cuda.logistic import logistic_of
from ...cuda.operations import Elementwise
from ...cuda.signatures import address, number_type, signature, size, whole
from ...cuda.team import place, segment_of

INFINITY, NAN = float("inf"), float("nan")


@lru_cache
def forward(storage, vectors, aligned):
    """1 / (1 + exp(-x)) of rows, each in one segment or more."""
    f = logistic_of(storage)
    logistic = f.logistic
    load = loader(storage, f.compute, vectors, aligned, 0.0)
    store = storer(storage, f.compute, vectors, aligned)
    itemsize = ITEMSIZE[storage]
    kind = number_type(f.compute)

    def sigmoid_forward(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        high,  # IN   log2(e) in two parts
        low,
        y,  # OUT  address of the first row
        y_pitch,  # IN   bytes from row to row
    ):
        row, on, begin, inside = segment_of(team, rows, n, segments, length)
        thread = place(team)
        at = x + row * x_pitch + begin * itemsize
        v = load(at, at, thread, team, inside)
        result = logistic(v, vector_of(high), vector_of(low))
        store(y + row * y_pitch + begin * itemsize, at, thread, team, inside, on, result)

    return sigmoid_forward, signature(
        address, whole, whole, whole, size, size, size, kind, kind, address, whole
    )


@lru_cache
def backward(storage, vectors, aligned):
    """Gradients of rows, each in one segment or more."""
    compute = arithmetic_of(storage, gradient=True).compute
    load = loader(storage, compute, vectors, aligned, 0.0)
    store = storer(storage, compute, vectors, aligned)
    itemsize = ITEMSIZE[storage]

    def sigmoid_backward(
        g,  # IN   address of the first row of the gradient with respect to y
        g_pitch,  # IN   bytes from row to row
        y,  # IN   address of the first row of what forward gave
        y_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        dx,  # OUT  address of the first row: g * y * (1 - y)
        dx_pitch,  # IN   bytes from row to row
    ):
        row, on, begin, inside = segment_of(team, rows, n, segments, length)
        thread = place(team)
        at = y + row * y_pitch + begin * itemsize
        v = load(at, at, thread, team, inside)
        a = load(g + row * g_pitch + begin * itemsize, at, thread, team, inside)
        result = a * (v * (1.0 - v))
        store(dx + row * dx_pitch + begin * itemsize, at, thread, team, inside, on, result)

    return sigmoid_backward, signature(
        address, whole, address, whole, whole, whole, size, size, size, address, whole
    )


@lru_cache
def odds(storage):
    """log(p / (1 - p)) for a thread's elements."""
    a = arithmetic_of(storage)
    tiny, lift, log_of_quotient = a.tiny, a.lift * a.lift, a.log_of_quotient
    lift_steps = math.log2(lift)

    @jit.device
    def log_odds(p):
        # a quotient below 1, of the smaller probability by the larger one, which has two parts
        rest = 1.0 - p
        lost = (1.0 - rest) - p
        is_high = p > 0.5
        small, large = select(is_high, rest, p), select(is_high, p, rest)
        lost = select(is_high, 0.0, lost)
        is_tiny = small < tiny
        small = select(is_tiny, small * lift, small)
        # by a power of two it comes to between 2/3 and 3/2: small - large is then exact
        power = power_of_two_above(small * (2.0 / 3.0))
        power = select(small > large * power * (4.0 / 3.0), power + power, power)
        large, lost = large * power, lost * power
        f, f_lost = two_sum(small - large, 0.0 - lost)
        d, d_lost = two_sum(small, large)
        steps = exponent(power) - select(is_tiny, lift_steps, 0.0 * power)
        x, x_lost = log_of_quotient(f, f_lost, d, d_lost + lost, steps)
        x = x + x_lost
        x = select(is_high, 0.0 - x, x)
        x = select(p == 0.0, -INFINITY, select(p == 1.0, INFINITY, x))
        return select((p >= 0.0) & (p <= 1.0), x, NAN)

    return log_odds


@lru_cache
def logit(storage, vectors, aligned):
    """log(p / (1 - p)) of rows, each in one segment or more."""
    compute = arithmetic_of(storage).compute
    log_odds = odds(storage)
    load = loader(storage, compute, vectors, aligned, 0.0)
    store = storer(storage, compute, vectors, aligned)
    itemsize = ITEMSIZE[storage]

    def sigmoid_logit(
        p,  # IN   address of the first row
        p_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a segment
        segments,  # IN   of a row
        length,  # IN   elements of a segment
        x,  # OUT  address of the first row
        x_pitch,  # IN   bytes from row to row
    ):
        row, on, begin, inside = segment_of(team, rows, n, segments, length)
        thread = place(team)
        at = p + row * p_pitch + begin * itemsize
        result = log_odds(load(at, at, thread, team, inside))
        store(x + row * x_pitch + begin * itemsize, at, thread, team, inside, on, result)

    return sigmoid_logit, signature(address, whole, whole, whole, size, size, size, address, whole)


FORWARD, BACKWARD = Elementwise(forward, few=False), Elementwise(backward, few=False)
LOGIT = Elementwise(logit, few=True)
