"""Building blocks for kernels of your own: softmax by thread, by warp and by block.

What is called from a ``@cuda.jit`` kernel takes and gives *vectors*: the elements that one
thread holds, in registers, with the operators + - * / and comparisons. A vector of one lane
is a number. Functions are made for a dtype, "f4" (float32) or "f8" (float64), before the
kernel that calls them; rows in memory may also be "f2" (float16) and "b2" (bfloat16).

==========================================  ================================================
``loader``, ``storer``, ``placer``          rows of memory to vectors and back
``softmax(kind)``, ``log_softmax(kind)``    of a row whose elements a team of threads holds
``logsumexp(kind)``                         one number, in every thread of the team
``push(kind)``, ``merge(kind)``             the running (max, sum) of what is read in pieces
``exp_below(kind)``, ``log1p(kind)``        elementwise, errors below 1.2 and 0.6 ULP
``team_maximum``, ``team_sum``              over a team: the maximum, the sum of an int64
==========================================  ================================================

A team is 1, 2, 4, 8, 16 or 32 neighbouring threads of a warp, or a whole block of several
warps; ``first_row(team)`` and ``place(team)`` say which row a thread's team does and where
in the team it stands. ``cells = cuda.shared.array(CELLS, types.int64)`` is where the warps of
a block meet; between two uses of it by teams of more than a warp stands
``cuda.syncthreads()``. Every thread of a block must come to team functions together.

Example: attention weights in one kernel. ``scores`` is (heads * queries, keys) in float32,
contiguous, with at most 1024 keys; they are scaled, masked causally and softmaxed, a warp to
a row, which is read once and written once, 16 bytes at a time::

    import numpy as np
    from numba import cuda, types
    from numbasoft.cuda import device
    from numbasoft.cuda.device import CELLS

    load, store = device.loader("f4", vectors=9), device.storer("f4", vectors=9)
    places, softmax = device.placer("f4", vectors=9), device.softmax("f4")

    @cuda.jit
    def attention_weights(scores, scale, queries, weights):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread = device.first_row(32), device.place(32)
        on = row < scores.shape[0]
        row = min(row, scores.shape[0] - 1)
        keys, at = scores.shape[1], device.address_of_row(scores, row)
        v = load(at, at, thread, 32, keys) * scale
        allowed = places(at, thread, 32) <= row % queries
        y = softmax(device.select(allowed, v, -np.inf), 32, cells)
        store(device.address_of_row(weights, row), at, thread, 32, keys, on, y)

    attention_weights[-(-rows // 4), 128](scores, np.float32(d**-0.5), queries, weights)

The second argument of ``load`` and ``store`` is the anchor: the address of the row by which
elements are given to threads, the same for all rows of a kernel that belong together. Rows
that lie as their anchor does, behind a multiple of 16 bytes, are moved 16 bytes at a time. The contract is the library's: 2 ULP, and
bits that depend on the row alone.

Source of push and merge: M. Milakov, N. Gimelshein, "Online normalizer calculation for
softmax", 2018.
"""

from functools import lru_cache

from . import backend, jit
from .backend import address_of_row, count, first, fma, largest_lane, maximum, number, select, vector_of
from .elementary import arithmetic, parts_of, two_sum
from .geometry import ITEMSIZE
from .team import CELLS, first_row, place, team_maximum, team_sum

__all__ = [
    "CELLS",
    "address_of_row",
    "exp_below",
    "first",
    "first_row",
    "fma",
    "loader",
    "log1p",
    "log_softmax",
    "logsumexp",
    "maximum",
    "merge",
    "place",
    "placer",
    "push",
    "select",
    "softmax",
    "storer",
    "team_maximum",
    "team_sum",
    "vector_of",
]

INFINITY, NAN = float("inf"), float("nan")


def checked(kind, kinds=("f4", "f8")):
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(map(repr, kinds))}")
    return kind


def computing(storage):
    """The dtype that elements of a storage type are computed in."""
    return "f8" if checked(storage, tuple(ITEMSIZE)) == "f8" else "f4"


@lru_cache
def loader(storage, vectors, fill=-INFINITY):
    """Make ``load(address, anchor, thread, team, n)``: a thread's elements of a row of n, as one vector.

    Parameters
    ----------
    storage : {"f2", "b2", "f4", "f8"}
        What memory holds; 16-bit floats are widened to float32.
    vectors : int
        How many pieces of 16 bytes a thread has. A team holds any row of up to
        ``(team * vectors - 1) * 16`` bytes, however it is aligned.
    fill : {-inf, 0.0}
        What stands in lanes beyond the row.

    Returns
    -------
    function
        To be called from kernels. ``address`` is that of the row, see `address_of_row`.
    """
    checked(fill, (-INFINITY, 0.0))
    return backend.loader(storage, computing(storage), vectors, False, fill)


@lru_cache
def storer(storage, vectors):
    """Make ``store(address, anchor, thread, team, n, on, vector)``: what `loader`'s function loaded, back.

    Nothing is stored where ``on`` is false; 16-bit floats are rounded once, to nearest even.
    """
    return backend.storer(storage, computing(storage), vectors, False)


@lru_cache
def placer(storage, vectors):
    """Make ``places(anchor, thread, team)``: the index in the row of every element of a thread, as numbers."""
    return backend.placer(storage, computing(storage), vectors)


@lru_cache
def sums(kind):
    """What the functions of a row begin with."""
    a = arithmetic(checked(kind))
    shift_of, exponential, sum_of = a.shift_of, a.exponential, a.sum_of
    log2_e, log2_e_rest = a.log2_e

    @jit.device
    def units(like):
        """log2(e) in two parts."""
        return number(like, log2_e), number(like, log2_e_rest)

    @jit.device
    def others(v, team, cells):
        """The maximum of a row, the largest of the others, and the log of the sum relative to the maximum."""
        high, low = units(v)
        m = team_maximum(largest_lane(v), team, cells, 0)
        maxima = team_sum(count(v == m), team, cells, 1)
        v = select(v < m, v, -INFINITY)
        second = team_maximum(largest_lane(v), team, cells, 2)
        total, rest = sum_of(
            exponential(v, shift_of(select(second > -INFINITY, second, m), high, low), high, low)
        )
        total = parts_of(team_sum(total, team, cells, 3), team_sum(rest, team, cells, 4))
        e = exponential(second, shift_of(m, high, low), high, low)
        return m, maxima - 1, total, e

    return units, others


@lru_cache
def softmax(kind):
    """Make ``softmax(v, team, cells)``: the softmax of a row whose elements a team's threads hold.

    As `numbasoft.softmax`: a row with NaN or +inf, or with nothing but -inf, is NaN.
    """
    a = arithmetic(checked(kind))
    shift_of, exponential_and_rest, exact_sum_of, pair_of, reciprocal = (
        a.shift_of, a.exponential_and_rest, a.exact_sum_of, a.pair_of, a.reciprocal
    )  # fmt: skip
    units, _ = sums(kind)

    @jit.device
    def softmax_of_row(v, team, cells):
        high, low = units(v)
        m = team_maximum(largest_lane(v), team, cells, 0)
        e, lost = exponential_and_rest(v, shift_of(m, high, low), high, low)
        total, rest = exact_sum_of(e, lost)
        total = parts_of(team_sum(total, team, cells, 1), team_sum(rest, team, cells, 2))
        s, lost = pair_of(m, total)
        r, r_rest = reciprocal(s, lost)
        return fma(e, select(m < INFINITY, r, NAN), e * r_rest)

    return softmax_of_row


@lru_cache
def log_softmax(kind):
    """Make ``log_softmax(v, team, cells)``: as `softmax`, the logarithm."""
    log_of_sum = arithmetic(checked(kind)).log_of_sum
    _, others = sums(kind)

    @jit.device
    def log_softmax_of_row(v, team, cells):
        m, extra, total, e = others(v, team, cells)
        log, lost = log_of_sum(m, extra, total, e)
        log = select(m < INFINITY, log, NAN)
        # halves: the difference of two elements may overflow
        d, d_lost = two_sum(v * 0.5, m * -0.5)
        y = fma(d, 2.0, 0.0 - log)
        return select(y == -INFINITY, y, y + fma(d_lost, 2.0, 0.0 - lost))

    return log_softmax_of_row


@lru_cache
def logsumexp(kind):
    """Make ``logsumexp(v, team, cells)``: log sum exp of a row, a vector of one lane in every thread."""
    a = arithmetic(checked(kind))
    log_of_sum = a.log_of_sum
    _, others = sums(kind)

    @jit.device
    def logsumexp_of_row(v, team, cells):
        m, extra, total, e = others(v, team, cells)
        log, lost = log_of_sum(m, extra, total, e)
        s, rest = two_sum(m, log)
        rest = rest + lost
        s = select(rest == rest, s + rest, s)
        return select(m == INFINITY, m, select(m == -INFINITY, m, s))

    return logsumexp_of_row


@lru_cache
def exp_below(kind):
    """Make ``exp_below(x, m)``: exp(x - m) for x <= m, without the rounding of x - m.

    Error at most 1.2 ULP; NaN where x or m is, 0 where x is -inf and m is not.
    """
    a = arithmetic(checked(kind))
    shift_of, exponential, largest = a.shift_of, a.exponential, a.largest
    units, _ = sums(kind)

    @jit.device
    def exp_of_difference(x, m):
        high, low = units(m)
        return exponential(x, shift_of(m, high, low), high, low) * (1.0 / largest)

    return exp_of_difference


@lru_cache
def log1p(kind):
    """Make ``log1p(v)``: log(1 + v) for finite v >= 0. Error at most 0.6 ULP."""
    log1p_of = arithmetic(checked(kind)).log1p_of

    @jit.device
    def log_of_one_and(v):
        high, lost = log1p_of(number(v, 0.0), v, number(v, 0.0))
        return high + lost

    return log_of_one_and


@lru_cache
def push(kind):
    """Make ``push(m, s, lost, v)``: the running maximum and sum of exponentials with a thread's vector added.

    The sum is s + lost, of exp(x - m). Start with m = -inf, s = lost = 0, each a vector of
    one lane. All vectors pushed must have an element above -inf, or come after one that has.
    """
    a = arithmetic(checked(kind))
    sum_of, pair_of, shift_of, exponential = a.sum_of, a.pair_of, a.shift_of, a.exponential
    units, _ = sums(kind)
    join = merge(kind)

    @jit.device
    def pushed(m, s, lost, v):
        high, low = units(m)
        of_v = largest_lane(v)
        total, rest = sum_of(exponential(v, shift_of(of_v, high, low), high, low))
        one, one_lost = pair_of(m, parts_of(total, rest))
        return join(m, s, lost, of_v, one, one_lost)

    return pushed


@lru_cache
def merge(kind):
    """Make ``merge(m, s, lost, m2, s2, lost2)``: two running sums as one."""
    exp = exp_below(checked(kind))

    @jit.device
    def merged(m, s, lost, m2, s2, lost2):
        both = maximum(m, m2)
        a = select(m == both, 1.0, exp(m, both))
        b = select(m2 == both, 1.0, exp(m2, both))
        high, rest = two_sum(s * a, s2 * b)
        rest = rest + (fma(s, a, 0.0 - s * a) + fma(s2, b, 0.0 - s2 * b))
        return both, high, rest + fma(lost, a, lost2 * b)

    return merged
