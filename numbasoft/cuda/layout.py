"""How arrays of any strides are seen by kernels: plain arithmetic on shapes, without CUDA."""

from typing import NamedTuple

from .geometry import VECTOR_BYTES

# A column's sum is kept in one 64-bit integer, which holds so many terms of 2**44 (float64: 2**46).
LONGEST_COLUMN = 1 << 16

# Rows of so few elements are read where they are, whatever lies between them; longer ones are copied.
SHORT = 32

MOST_AXES = 5


class Rows(NamedTuple):
    """Rows whose elements lie side by side."""

    rows: int
    n: int
    pitches: tuple[int, ...]  # bytes from row to row, for every array
    steps: tuple[int, ...]  # bytes from element to element


class Columns(NamedTuple):
    """(outer, n, inner), in any strides."""

    outer: int
    n: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]  # bytes along the three, for every array


def merged(axes):
    """Axes, each a length and the strides of every array, as few as can be: neighbours become one."""
    result = []
    for length, strides in axes:
        if length == 1:
            continue
        if result and all(a == length * b for a, b in zip(result[-1][1], strides, strict=True)):
            result[-1] = (result[-1][0] * length, strides)
        else:
            result.append((length, strides))
    return result


def split_axes(shape, axes, strides):
    """The axes that are not reduced and those that are, merged; ``strides`` has a tuple for every array."""
    every = [(n, tuple(s[i] for s in strides)) for i, n in enumerate(shape)]
    kept = [a for i, a in enumerate(every) if i not in axes]
    return merged(kept), merged([every[i] for i in axes])


def plan(shape, axes, strides, itemsizes):
    """``Rows`` or ``Columns`` for arrays without empty axes, or None where they must be copied first.

    ``itemsizes`` has a 0 for a mask, whose elements may lie apart, and for what has one element a row.
    """
    kept, reduced = split_axes(shape, axes, strides)
    none = (0,) * len(strides)
    if len(reduced) > 1 or len(kept) > 2:
        return None
    n, steps = reduced[0] if reduced else (1, tuple(itemsizes))
    side_by_side = all(s == size or size == 0 for s, size in zip(steps, itemsizes, strict=True))
    if side_by_side and len(kept) <= 1:
        rows, pitches = kept[0] if kept else (1, none)
        return Rows(rows, n, pitches, steps)
    kept = [(1, none)] * (2 - len(kept)) + kept
    i = next(i for i, size in enumerate(itemsizes) if size)  # the first array that is no mask
    if kept[0][0] > 1 and abs(kept[0][1][i]) < abs(kept[1][1][i]):
        kept.reverse()
    (outer, far), (inner, near) = kept
    if n > LONGEST_COLUMN or (abs(near[i]) != itemsizes[i] and n > SHORT):
        return None
    return Columns(outer, n, inner, tuple(zip(far, steps, near, strict=True)))


def of_elements(shape, strides, itemsizes):
    """``Rows`` of arrays in which no element needs another, or None where they must be copied first.

    Axes are taken in the order of the last array's memory. ``itemsizes`` has a 0 for what is one number.
    """
    every = [(n, tuple(s[i] for s in strides)) for i, n in enumerate(shape)]
    axes = merged(sorted(every, key=lambda axis: -axis[1][-1])) or [(1, tuple(itemsizes))]
    n, steps = axes[-1]
    side_by_side = all(s == size or size == 0 for s, size in zip(steps, itemsizes, strict=True))
    if len(axes) > 2 or not side_by_side:
        return None
    rows, pitches = axes[0] if len(axes) == 2 else (1, (0,) * len(strides))
    return Rows(rows, n, pitches, steps)


def contiguous(shape, itemsize):
    """The strides of an array without gaps, the last axis fastest."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def are_aligned(addresses, pitches, n, itemsize):
    """Whether every row of every array begins and ends at a multiple of 16 bytes."""
    return not any(v % VECTOR_BYTES for v in (*addresses, *pitches, n * itemsize))


def five(axes, count):
    """The lengths and strides of at most five axes, filled up in front; ``count`` arrays."""
    axes = [(1, (0,) * count)] * (MOST_AXES - len(axes)) + list(axes)
    return [length for length, _ in axes], [[s[i] for _, s in axes] for i in range(count)]
