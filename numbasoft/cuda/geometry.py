"""How rows are shared by threads: plain arithmetic on widths, without CUDA.

What is chosen here changes how fast a kernel is and not one bit of what it computes (see
``numbasoft.cuda.elementary``).
"""

from functools import lru_cache
from typing import NamedTuple

ITEMSIZE = {"f2": 2, "b2": 2, "f4": 4, "f8": 8}
VECTOR_BYTES = 16

# Vectors of 16 bytes that a thread holds of a row: one kernel for each, so that registers fit. Backward
# passes hold two rows, masked ones the mask besides; a loss with shares for all classes holds those, and its
# sums.
VECTORS = {"f2": (1, 2, 4), "b2": (1, 2, 4), "f4": (1, 4, 8), "f8": (1, 4, 8)}
PAIR_VECTORS = {"f2": (1, 2, 2), "b2": (1, 2, 2), "f4": (1, 4, 5), "f8": (1, 3, 3)}
SHARE_VECTORS = {"f2": (1, 2, 2), "b2": (1, 2, 2), "f4": (1, 4, 4), "f8": (1, 2, 2)}
SEGMENT_VECTORS = {"f2": 4, "b2": 4, "f4": 8, "f8": 4}
# Of these the last step of a long row, which needs them once, has so many in hand at a time.
LAST_VECTORS = {"f2": 2, "b2": 2, "f4": 4, "f8": 4}
SHARES = 2
HELD = VECTORS, PAIR_VECTORS, SHARE_VECTORS

# Two rows and what two exponentials of each need; long ones piece by piece of a segment.
HEAVY_VECTORS = {"f2": (1, 1, 2), "b2": (1, 1, 2), "f4": (1, 2, 4), "f8": (1, 2, 2)}
PIECE_VECTORS = {"f2": 1, "b2": 1, "f4": 3, "f8": 2}

WARP = 32
BLOCK = 128  # threads where several rows share a block
MIDDLE_BLOCK = 256  # up to so many threads a row gets with the middle number of vectors
MOST_THREADS = 512
SEGMENT_THREADS = 256
TOTAL_THREADS = 1024  # of the block that adds the sums of all segments: the order depends on it
COLUMNS, MOST_COLUMN_THREADS = 32, 512
LOSS_COLUMN_THREADS = 256  # told 512, ptxas would spill registers of a loss's kernels to keep to 64 of them
STRIDED_LANES = 4

# Of a row that stays in shared memory a thread has so many vectors in hand when it is read from memory: 48 to 64 KiB
# are on their way to two blocks of 512 threads, or to one of 1024; of two rows half as many each. With a mask, of
# which every element has a byte, and of what is in shared memory already, fewer. More, and registers spill.
RESIDENT_VECTORS = {"f2": 3, "b2": 3, "f4": 4, "f8": 4}
RESIDENT_MASKED_VECTORS = {"f2": 1, "b2": 1, "f4": 2, "f8": 4}
RESIDENT_PAIR_VECTORS = {"f2": 2, "b2": 2, "f4": 2, "f8": 2}
RESIDENT_LAST_VECTORS = {"f2": 1, "b2": 1, "f4": 2, "f8": 2}
RESIDENT_THREADS, LONE_THREADS = 512, 1024  # of each of two blocks of a multiprocessor, and of one alone
RESIDENT_CELL_BYTES = 2048  # of shared memory beside the row: team.CELLS

# Of a row from which a class is drawn a thread has so many vectors in hand at a time.
DRAW_VECTORS = {"f2": 1, "b2": 1, "f4": 2, "f8": 2}
DRAW_THREADS = {"f2": 768, "b2": 768, "f4": 768, "f8": 512}
RELAXED_THREADS = 512


class Rows(NamedTuple):
    """A launch of a kernel for whole rows."""

    vectors: int  # of 16 bytes in a thread
    team: int  # threads that share a row
    threads: int  # of a block

    def blocks(self, rows):
        per_block = self.threads // self.team
        return -(-rows // per_block)


def lanes(storage):
    """Elements in 16 bytes."""
    return VECTOR_BYTES // ITEMSIZE[storage]


def vectors_spanned(n, storage, aligned):
    """At most so many vectors at multiples of 16 bytes have an element of a row of n."""
    per_vector = lanes(storage)
    return n // per_vector if aligned else (n + 2 * per_vector - 2) // per_vector


class Room(NamedTuple):
    """What a device has for rows that stay in shared memory."""

    multiprocessors: int
    most: int  # bytes of shared memory of a block; 0 where no row is to stay there
    together: int  # bytes of each of two blocks of a multiprocessor


class Resident(NamedTuple):
    """A launch of a kernel that keeps rows in shared memory, each in that of a block."""

    slots: int  # vectors of 16 bytes for which there is room in each row
    threads: int
    shared: int  # bytes


@lru_cache(maxsize=1024)
def resident_launch(n, storage, aligned, room, in_pairs=False):
    """How to do rows of n elements in shared memory, or None where they do not fit there.

    With room for two blocks on a multiprocessor one reads while the other adds or writes.
    """
    slots = vectors_spanned(n, storage, aligned)
    shared = VECTOR_BYTES * slots * (1 + in_pairs)
    for most, threads in (room.together, RESIDENT_THREADS), (room.most, LONE_THREADS):
        if shared + RESIDENT_CELL_BYTES <= most:
            return Resident(slots, threads, shared)
    return None


@lru_cache(maxsize=1024)
def rows_launch(n, storage, aligned, in_pairs=False, heavy=False):
    """How to do rows of n elements, or None where a row does not fit into the registers of a block.

    ``in_pairs`` is true where a thread holds two rows, and SHARES where it holds a loss's shares; ``heavy``
    where it holds two rows and what two exponentials of each need.
    """
    spanned = vectors_spanned(n, storage, aligned)
    few, middle, many = (HEAVY_VECTORS if heavy else HELD[in_pairs])[storage]
    if spanned <= WARP * middle:
        vectors = few if spanned <= WARP else middle
        team = power_of_two(-(-spanned // vectors))
        return Rows(vectors, team, BLOCK)
    for vectors, most in (middle, MIDDLE_BLOCK), (many, MOST_THREADS):
        team = WARP * -(-spanned // (vectors * WARP))
        if team <= most:
            return Rows(vectors, team, team)
    return None


def most_threads(vectors, storage, in_pairs=False):
    """The threads for which a kernel is compiled whose threads hold so many vectors of a row.

    A launch has no more. With the middle number it has at most 256, and told 512 ptxas would spill
    registers to keep to 64 of them; with one vector, 128, it had better be told 512.
    """
    _, middle, many = (PAIR_VECTORS if in_pairs else VECTORS)[storage]
    return MIDDLE_BLOCK if vectors == middle and middle != many else MOST_THREADS


def fills_block(vectors, storage, in_pairs=False):
    """Whether in all launches of a kernel whose threads hold so many vectors of a row its team is the block."""
    _, middle, many = HELD[in_pairs][storage]
    return vectors == many != middle


# What ptxas is told of a launch: the most threads of a block, or those and how many blocks of them a
# multiprocessor has to hold at least. Told the threads alone it aims at more blocks, and here spills for them.


def row_bounds(vectors, storage, masked):
    """Of a kernel for rows."""
    threads = most_threads(vectors, storage, masked)
    return (threads, 2) if masked and vectors == 1 and storage != "f8" else threads


# Of a kernel that keeps rows in shared memory: told the threads alone ptxas aims at two blocks of 1024 and keeps to 32
# registers, in which a thread's loads wait for each other.
RESIDENT_BOUNDS = LONE_THREADS, 1


def column_bounds(storage, heavy, masked=False):
    """Of a kernel that reads columns again and again; ``heavy`` are gradients and divergences."""
    if storage == "f8":
        return MOST_COLUMN_THREADS, 1
    return (MOST_COLUMN_THREADS, 2) if heavy or (masked and storage == "f4") else MOST_COLUMN_THREADS


def loss_row_bounds(vectors, storage, in_pairs, gradient):
    """Of a cross-entropy's kernel for rows; ``in_pairs`` is SHARES where it holds those."""
    if in_pairs != SHARES:
        threads = most_threads(vectors, storage)
        return (threads, 2) if gradient and threads == MIDDLE_BLOCK else threads
    if vectors == SHARE_VECTORS[storage][0]:
        return (BLOCK, 6) if ITEMSIZE[storage] == 2 else MOST_THREADS
    return (MOST_THREADS, 1) if storage == "f8" else MOST_THREADS


def loss_column_bounds(storage):
    """Of a cross-entropy's kernel for columns."""
    # told the threads alone ptxas keeps to 64 registers in float32, to 48 in 16 bits, and spills 16 bytes on sm_120
    return LOSS_COLUMN_THREADS, 2 if storage == "f8" else 3


def loss_share_bounds(storage):
    """Of a cross-entropy's kernel for what segments hold of the target."""
    return (SEGMENT_THREADS, 2) if storage == "f8" else SEGMENT_THREADS


def loss_combine_bounds(storage):
    """Of a cross-entropy's kernel that combines the segments of long rows."""
    # float32: told the threads alone ptxas keeps to 40 or 48 registers and spills 16 bytes on sm_100 and sm_120
    return (SEGMENT_THREADS, 3 if storage != "f8" else 2)


def term_bounds(storage):
    """Of the kernel for the terms of a divergence of long rows, with at most 128 registers: ptxas would take 250."""
    return (SEGMENT_THREADS, 2) if ITEMSIZE[storage] == 2 else MOST_THREADS


def sum_bounds(storage, masked, others):
    """Of ``split.sums``."""
    return (SEGMENT_THREADS, 3) if others and not masked and ITEMSIZE[storage] == 2 else SEGMENT_THREADS


def power_of_two(n):
    """The smallest power of two not below n."""
    return 1 << max(0, n - 1).bit_length()


def segments_launch(n, storage, aligned, few=False):
    """How to do rows of n in which no element needs another: a launch, and a segment's length.

    ``few``: one vector a thread, for kernels that need many registers for every element.
    """
    vectors = VECTORS[storage][0 if few else 1]
    length = (SEGMENT_THREADS * vectors - 1) * lanes(storage)
    if n <= length:
        spanned = vectors_spanned(n, storage, aligned)
        vectors = vectors if spanned > WARP else VECTORS[storage][0]
        team = -(-spanned // vectors)
        team = power_of_two(team) if team <= WARP else WARP * -(-team // WARP)
        return Rows(vectors, team, BLOCK if team <= WARP else team), n
    return Rows(vectors, SEGMENT_THREADS, SEGMENT_THREADS), length


def segment_length(storage):
    """Elements of a segment of a long row: a multiple of 16 bytes that fits whatever its alignment."""
    return (SEGMENT_THREADS * SEGMENT_VECTORS[storage] - 1) * lanes(storage)


def draw_launch(n, storage):
    """How to draw from a row of n: the threads of its block, and of a group that sums a share of it.

    A single group takes a vector a thread at most, however the row is aligned.
    """
    vectors = -(-n // lanes(storage)) + 1
    if vectors <= WARP:
        return WARP, WARP
    return min(DRAW_THREADS[storage], WARP * max(2, -(-vectors // (2 * WARP)))), WARP


def draw_bounds(storage):
    """Of a kernel that draws."""
    return (DRAW_THREADS[storage], 1)


def moment_launch(n):
    """How many threads share a row of n whose moments are summed, and how many a block has.

    Such sums have an order, which depends on the first and so on n alone.
    """
    team = min(MOST_THREADS, power_of_two(-(-n // 4)))
    return team, team if team > WARP else BLOCK


def moment_bounds():
    return (MOST_THREADS, 1)


def relaxed_threads(n):
    """Threads of a block that does a row of n with noise, two elements a thread."""
    return min(RELAXED_THREADS, WARP * -(-n // (2 * WARP)))


def piece_length(storage):
    """Elements of a piece of a segment."""
    return (SEGMENT_THREADS * PIECE_VECTORS[storage] - 1) * lanes(storage)


def segments_of(n, storage):
    """How many segments a row of n has."""
    return -(-n // segment_length(storage))


def column_threads(n, most=MOST_COLUMN_THREADS):
    """Threads of a block that does 32 columns of n: a power of two of them share a column."""
    share = power_of_two(-(-n // (2 * STRIDED_LANES)))
    return COLUMNS * min(share, most // COLUMNS)


def column_blocks(outer, inner):
    return outer * -(-inner // COLUMNS)
