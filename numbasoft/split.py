"""One row shared by threads, segment by segment, for few long rows.

Segments are fixed by the row's length alone and their sums are combined in order, as in a
row done by one thread: the bits are the same. The segments of all rows are numbered row by
row. Every thread goes through the steps of the softmax: it takes segments until none are
left, then waits until the last is done. Only a thread that has taken a segment is waited
for, so one thread alone, wherever the others are, comes through.
"""

import numpy as np

from .elementary import bounded, shift_of
from .jit import inline
from .passes import (
    is_plain,
    nothing_kept,
    plain,
    row_range,
    segment_exponentials,
    segment_length,
    segment_others,
)
from .summation import sum_joined
from .tiles import ROWS, first_lanes, log_of_others, logarithms_of_sums
from .vector import add_atomically, filled, load_atomically, row_at, spin, stack_array

STEPS = 4
APART = 16  # int64 between two counters, which else were in one line of the caches


@inline
def segment_count(n):
    """How many segments a row of n elements has."""
    return (n + segment_length(n) - 1) // segment_length(n)


@inline
def place(unit, n):
    """The row that a segment belongs to, its first element there and its length."""
    segments = segment_count(n)
    first = unit % segments * segment_length(n)
    return unit // segments, first, min(segment_length(n), n - first)


@inline
def counter(step, k, blocks):
    """Where the turns of a step are counted: k is a share of the segments, or ``blocks`` for those done."""
    return (step * (blocks + 1) + k) * APART


@inline
def blocks_of(turns, blocks):
    """As many as are asked for, and have counters."""
    return min(blocks, turns.size // (STEPS * APART) - 1)


@inline
def next_unit(
    turns,  # IN OUT  (STEPS * (blocks + 1) * APART,) counters that start at 0
    step,
    block,  # who asks
    blocks,
    units,
):
    """A segment that nobody has taken, or ``units``.

    First of this block's own share, which is the same in every step: it is in the cache of its core.
    """
    for k in range(block, block + blocks):
        share = k % blocks
        unit = share * units // blocks + add_atomically(turns, counter(step, share, blocks), 1)
        if unit < (share + 1) * units // blocks:
            return unit
    return units


@inline
def wait(turns, step, blocks, done, units):
    """Until all segments of a step are done, of which ``done`` are this thread's."""
    add_atomically(turns, counter(step, blocks, blocks), done)
    while load_atomically(turns, counter(step, blocks, blocks)) < units:
        spin()


@inline
def row_shift(x, m, high, low, bottom=-np.inf):
    """The shift of a row whose maximum is m, and whose least element if that is known."""
    shift = bounded(shift_of(filled(x, m), high, low), filled(x, bottom))
    return first_lanes(shift, stack_array(x, 80))


@inline
def row_total(x, sums, first, n):
    """The sums of a row's segments combined in order, as ``passes.row_exponentials`` does."""
    total = 0.0
    lost = 0.0
    for unit in range(first, first + segment_count(n)):
        total, lost = sum_joined(x, total, lost, (sums[unit, 0], sums[unit, 1]))
    return total, lost


@inline
def maximum_of_row(maxima, i, n):
    """The maximum of row i from those of its segments."""
    m = -np.inf
    for unit in range(i * segment_count(n), (i + 1) * segment_count(n)):
        if maxima[unit] > m:
            m = maxima[unit]
    return m


@inline
def keeps_nothing(maxima, i, n):
    """Whether a mask keeps nothing of row i."""
    for unit in range(i * segment_count(n), (i + 1) * segment_count(n)):
        if maxima[unit] == maxima[unit]:
            return False
    return True


@inline
def shared_maxima(x, mask, maxima, sums, turns, block, blocks):
    """Loop 1: the maximum of every segment, NaN for one of which a mask keeps nothing, and its least element.

    That is kept where the sum of its exponentials will be.
    """
    done = 0
    unit = next_unit(turns, 0, block, blocks, maxima.size)
    while unit < maxima.size:
        i, first, count = place(unit, x.shape[1])
        m, sums[unit, 0] = row_range(x, row_at(x, i) + first, mask, row_at(mask, i) + first, count)
        is_empty = m == -np.inf and nothing_kept(x, mask, row_at(mask, i) + first, count)
        maxima[unit] = np.nan if is_empty else m
        done += 1
        unit = next_unit(turns, 0, block, blocks, maxima.size)
    wait(turns, 0, blocks, done, maxima.size)


@inline
def shared_exponentials(x, mask, maxima, high, low, exact, e, sums, turns, block, blocks):
    """Loops 2 and 3: exp of every element, kept in e (or None), and the sums of the segments."""
    done = 0
    unit = next_unit(turns, 1, block, blocks, maxima.size)
    while unit < maxima.size:
        i, first, count = place(unit, x.shape[1])
        at, mask_at, e_at = row_at(x, i) + first, row_at(mask, i) + first, row_at(e, i) + first
        shift = row_shift(x, maximum_of_row(maxima, i, x.shape[1]), high, low, sums[unit, 0])
        if is_plain(shift):
            near = plain(shift)
            s = segment_exponentials(x, at, mask, mask_at, count, e, e_at, near, high, low, 1024, exact)
        else:
            s = segment_exponentials(x, at, mask, mask_at, count, e, e_at, shift, high, low, 1024, exact)
        sums[unit, 0] = s[0]
        sums[unit, 1] = s[1]
        done += 1
        unit = next_unit(turns, 1, block, blocks, maxima.size)
    wait(turns, 1, blocks, done, maxima.size)


@inline
def log_of_sum(x, sums, i, m):
    """Loop 4 of log_softmax: the logarithm of row i's sum, or -1 if that takes ``shared_others``."""
    total, lost = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    maximum, log = stack_array(np.float64, ROWS), stack_array(np.float64, ROWS)
    total[0], lost[0] = row_total(x, sums, i * segment_count(x.shape[1]), x.shape[1])
    maximum[0] = m
    logarithms_of_sums(total, lost, maximum, 1, x, log)
    return log[0]


@inline
def shared_others(x, mask, maxima, high, low, sums, others, turns, block, blocks):
    """Loops 2 and 3 again without the maxima, for the rows whose logarithm is -1."""
    n = x.shape[1]
    is_needed = False
    for i in range(x.shape[0]):
        is_needed |= log_of_sum(x, sums, i, maximum_of_row(maxima, i, n)) < 0.0
    if not is_needed:
        return
    done = 0
    unit = next_unit(turns, 2, block, blocks, maxima.size)
    while unit < maxima.size:
        i, first, count = place(unit, n)
        m = maximum_of_row(maxima, i, n)
        if log_of_sum(x, sums, i, m) < 0.0:
            shift = row_shift(x, m, high, low)
            at, mask_at = row_at(x, i) + first, row_at(mask, i) + first
            s = segment_others(x, at, mask, mask_at, count, m, shift, high, low)
            others[unit, 0], others[unit, 1] = s[0], s[1]
        done += 1
        unit = next_unit(turns, 2, block, blocks, maxima.size)
    wait(turns, 2, blocks, done, maxima.size)


@inline
def logarithm_of_row(x, maxima, sums, others, i):
    """The maximum of row i and the logarithm of its sum, once all that it takes is there."""
    n = x.shape[1]
    m = maximum_of_row(maxima, i, n)
    log = log_of_sum(x, sums, i, m)
    if log < 0.0:
        total, lost = row_total(x, others, i * segment_count(n), n)
        log = log_of_others(total, lost, x)
    return m, log
