"""What the threads that share a row do together.

A team is 1, 2, 4, 8, 16 or 32 neighbouring threads of a warp, or a whole block of several
warps. Maxima and sums of integers have no order, so a team's size changes no bit.

``cells`` is an array of CELLS int64 in shared memory; each ``slot`` of it serves once.
"""

from numba import cuda

from . import jit
from .backend import bits_of, from_bits, from_lane, maximum
from .geometry import COLUMNS, MOST_COLUMN_THREADS

SLOTS = 8
CELLS = 32 * SLOTS


@jit.device
def first_row(team):
    """The row that this thread's team does."""
    return cuda.blockIdx.x * (cuda.blockDim.x // team) + cuda.threadIdx.x // team


@jit.device
def place(team):
    """This thread's place in its team."""
    return cuda.threadIdx.x % team


@jit.device
def row_place(rows, team):
    """The row that this thread's team does, this thread's place in it, and whether there is such a row.

    Teams beyond the last row do that one with the others, since all threads meet at barriers.
    """
    row, thread = first_row(team), place(team)
    on = row < rows
    return min(row, rows - 1), thread, on


@jit.device
def block_place(rows, team):
    """As ``row_place``, where the team is the whole block: without a division, and the same for all threads."""
    return rows - rows + cuda.blockIdx.x, cuda.threadIdx.x, True


@jit.device
def segment_of(team, rows, n, segments, length):
    """Of this thread's team: its row, whether there is one, its segment's first element and how many it has."""
    unit = first_row(team)
    row, begin = unit // segments, unit % segments * length
    return min(row, rows - 1), row < rows, begin, min(length, n - begin)


@jit.device
def warp_maximum(value, lanes):
    """The maximum over 1, 2, 4, 8, 16 or 32 neighbouring threads of a warp, in each of them."""
    step = 1
    while step < lanes:
        value = maximum(value, from_lane(value, step))
        step *= 2
    return value


@jit.device
def warp_sum(value, lanes):
    """The sum over 1, 2, 4, 8, 16 or 32 neighbouring threads of a warp, in each of them."""
    step = 1
    while step < lanes:
        value = value + from_lane(value, step)
        step *= 2
    return value


@jit.device
def warp_least(value, lanes):
    """The least int64 of 1, 2, 4, 8, 16 or 32 neighbouring threads of a warp, in each of them."""
    step = 1
    while step < lanes:
        value = min(value, from_lane(value, step))
        step *= 2
    return value


@jit.device
def exchanged(value, missing, team, cells, slot):
    """One value of every warp, one in each lane; lanes beyond the last warp get ``missing``."""
    lane = cuda.threadIdx.x % 32
    if lane == 0:
        cells[slot * 32 + cuda.threadIdx.x // 32] = bits_of(value)
    cuda.syncthreads()
    if lane < team // 32:
        missing = from_bits(value, cells[slot * 32 + lane])
    return missing


@jit.device
def team_maximum(value, team, cells, slot):
    """The maximum over a team."""
    value = warp_maximum(value, min(team, 32))
    if team > 32:
        value = warp_maximum(exchanged(value, value, team, cells, slot), 32)
    return value


@jit.device
def team_least(value, team, cells, slot):
    """The least int64 of a team."""
    value = warp_least(value, min(team, 32))
    if team > 32:
        value = warp_least(exchanged(value, value, team, cells, slot), 32)
    return value


@jit.device
def team_sum(value, team, cells, slot):
    """The sum of an int64 over a team."""
    value = warp_sum(value, min(team, 32))
    if team > 32:
        value = warp_sum(exchanged(value, value - value, team, cells, slot), 32)
    return value


# Columns: a block of 32 columns side by side, each shared by a power of two of threads.

COLUMN_CELLS = MOST_COLUMN_THREADS


@jit.device
def added(a, b):
    return a + b


def over_columns(combine):
    @jit.device
    def reduced(value, cells):
        at = cuda.threadIdx.x
        cells[at] = bits_of(value)
        cuda.syncthreads()
        half = cuda.blockDim.x // 2
        while half >= COLUMNS:
            if at < half:
                value = combine(value, from_bits(value, cells[at + half]))
                cells[at] = bits_of(value)
            cuda.syncthreads()
            half //= 2
        result = from_bits(value, cells[at % COLUMNS])
        cuda.syncthreads()
        return result

    return reduced


# The maximum, and the sum of an int64, over the threads of a column; cells has one for each thread.
column_maximum = over_columns(maximum)
column_sum = over_columns(added)


@jit.device
def column_place(inner):
    """Of this thread: the column's place in outer and inner, the first element to do, the column's threads."""
    tiles = (inner + COLUMNS - 1) // COLUMNS
    k = cuda.blockIdx.x % tiles * COLUMNS + cuda.threadIdx.x % COLUMNS
    return cuda.blockIdx.x // tiles, k, cuda.threadIdx.x // COLUMNS, cuda.blockDim.x // COLUMNS


@jit.device
def column_of(inner):
    """As ``column_place``, with whether there is such a column; those beyond the last do that one."""
    i, k, start, share = column_place(inner)
    on = k < inner
    return i, min(k, inner - 1), start, share, on
