"""The slope and curvature of the cross-entropy in 1 / T on CUDA: loops 1 to 3 of the softmax with moments.

A team of threads goes over its row twice, in float64 whatever the row is stored as. The order in which the
moments are added depends on the row's length alone.
"""

from functools import lru_cache

from numba import cuda
from numba.cuda import types

from ...cuda import jit
from ...cuda.backend import fma, mask_of, maximum, number, read_cell, reader, select, vector_of, writer
from ...cuda.classes import IGNORED, NO_CLASS
from ...cuda.elementary import arithmetic, two_sum
from ...cuda.geometry import ITEMSIZE
from ...cuda.operations import Moments
from ...cuda.signatures import address, signature, size, whole
from ...cuda.team import CELLS, row_place, team_maximum
from ...cuda.totals import team_pairs, value_of

INFINITY, NAN = float("inf"), float("nan")


@jit.device
def added(pair, v, lost):
    """A sum in two parts and one more term, v + lost."""
    s, rest = two_sum(pair[0], v)
    return s, pair[1] + (rest + lost)


@lru_cache
def moments(storage):
    """The slope and curvature of every row."""
    a = arithmetic("f8")
    shift_of, exponential, scale = a.shift_of, a.exponential, 1.0 / a.largest
    read, write = reader(storage, "f8"), writer("f8")
    itemsize = ITEMSIZE[storage]

    def temperature_moments(
        x,  # IN   address of the first row
        x_pitch,  # IN   bytes from row to row
        rows,  # IN
        n,  # IN   elements of a row
        team,  # IN   threads that share a row
        places,  # IN   address of every row's class
        unit,  # IN   what x is multiplied with in both results: a power of two
        high,  # IN   log2(e) / T in two parts
        low,
        slope,  # OUT  address of a float64 for every row: the mean of x under the softmax of x / T, less x at the target
        curvature,  # OUT  address of the variance of x under it
    ):
        cells = cuda.shared.array(CELLS, types.int64)
        row, thread, on = row_place(rows, team)
        at = x + row * x_pitch
        k = read_cell(places + row * 8)
        inside = n if k >= 0 else n - n
        unit, high, low = vector_of(unit), vector_of(high), vector_of(low)

        m = number(high, -INFINITY)
        j = row - row + thread
        while j < inside:
            m = maximum(m, read(at + j * itemsize))
            j += team
        m = team_maximum(m, team, cells, 0)
        shift = shift_of(m, high, low)

        # moments of x - m, to which the maximum adds nothing: a confident row loses nothing
        zero = number(high, 0.0)
        total, first, second = (zero, zero), (zero, zero), (zero, zero)
        j = row - row + thread
        while j < inside:
            v = read(at + j * itemsize)
            e = exponential(v, shift, high, low) * scale
            e = select((v == -INFINITY) | (v - shift[0] < shift[3]), 0.0, e)
            d = select(e == 0.0, 0.0, (v - m) * unit)
            p = e * d
            q = p * d
            total = added(total, e, zero)
            first = added(first, p, fma(e, d, 0.0 - p))
            second = added(second, q, fma(p, d, 0.0 - q))
            j += team
        s = value_of(team_pairs(total, team, cells, 1))
        one = value_of(team_pairs(first, team, cells, 3))
        two = value_of(team_pairs(second, team, cells, 5))
        if on and thread == 0:
            mean = one / s
            own = read(at + max(k, 0) * itemsize)
            result = fma(m - own, unit, mean)
            result = select(mask_of(k == NO_CLASS), NAN, select(mask_of(k == IGNORED), 0.0, result))
            write(slope + row * 8, result)
            variance = maximum(fma(0.0 - mean, mean, two / s), zero)
            write(curvature + row * 8, select(mask_of(k == IGNORED), 0.0, variance))

    return temperature_moments, signature(
        address, whole, whole, whole, size, address, types.float64, types.float64, types.float64, address, address
    )  # fmt: skip


MOMENTS = Moments(moments)
