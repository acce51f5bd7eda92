"""The names of ``intrinsics`` for Numba's CUDA simulator: the same arithmetic in NumPy.

A vector is an array of float32 or float64, one lane for every element; memory is the
host's, read and written at its address. What only a GPU can show (speed, memory order
within a warp, the error of ex2.approx) this cannot.
"""

import ctypes
import threading

import ml_dtypes
import numpy as np
from numba.cuda import types
from numba.cuda.simulator import kernel

from .geometry import ITEMSIZE, STRIDED_LANES, VECTOR_BYTES

DTYPES = {
    "f2": np.float16, "b2": ml_dtypes.bfloat16, "f4": np.float32, "f8": np.float64, "b1": np.bool_,
    "i1": np.int8, "u1": np.uint8, "i2": np.int16, "u2": np.uint16, "i4": np.int32, "u4": np.uint32,
    "i8": np.int64, "u8": np.uint64,
}  # fmt: skip


def compute_dtype(compute):
    return np.float64 if compute == "f8" else np.float32


def common(*values):
    """Operands as arrays of the element type of the vectors among them."""
    dtype = next(v.dtype for v in values if isinstance(v, np.ndarray))
    return [np.asarray(v, dtype) for v in values]


def quiet(function):
    def silent(*args):
        with np.errstate(all="ignore"):
            return function(*args)

    return silent


@quiet
def fma(a, b, c):
    a, b, c = common(a, b, c)
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    p, e = exact_product(a, b)
    s = p + c
    z = s - p
    lost = (p - (s - z)) + (c - z)
    exact = s + (lost + e)
    return np.where(np.isfinite(exact), exact, s)


def exact_product(a, b):
    def split(v):
        t = v * 134217729.0
        high = t - (t - v)
        return high, v - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def plus(a, b):
    return a + b


def minus(a, b):
    return a - b


def maximum(a, b):
    return np.maximum(*common(a, b))


def absolute(a):
    return np.abs(a)


def select(mask, a, b):
    return np.where(mask, *common(a, b)) if has_vector(a, b) else np.where(mask, a, b)


def has_vector(*values):
    return any(isinstance(v, np.ndarray) for v in values)


def mask_of(condition):
    return np.array([condition])


def number(like, value):
    return np.array([value], like.dtype)


def first(vector):
    return vector[0]


def vector_of(value):
    return np.array([value])


def integers(v):
    return (np.int64, 52) if v.dtype == np.float64 else (np.int32, 23)


@quiet
def times_power(v, t):
    kind, place = integers(v)
    return v * (t.view(kind) << place).view(v.dtype)


def first_half_power(t):
    kind, place = integers(t)
    return (t.view(kind) >> 1 << place).view(t.dtype)


def second_half_power(t):
    kind, place = integers(t)
    n = t.view(kind)
    return (n - (n >> 1) << place).view(t.dtype)


def power_of_two_above(v):
    wide = v.dtype == np.float64
    v = np.fmin(
        np.fmax(v, v.dtype.type(2.0**-900 if wide else 2.0**-80)),
        v.dtype.type(2.0**1022 if wide else 2.0**126),
    )
    return np.ldexp(v.dtype.type(1), np.frexp(v)[1])


def exponent(v):
    return (np.frexp(v)[1] - 1).astype(v.dtype)


@quiet
def exp2_approximate(v):
    e = np.exp2(v)
    return np.where(np.abs(e) < np.finfo(np.float32).tiny, np.float32(0), e)


@quiet
def integer_sum(v):
    if v.dtype == np.float32:
        return np.rint(v).astype(np.int64).sum(), np.int64(0)
    high = np.rint(v)
    return high.astype(np.int64).sum(), np.rint((v - high) * 2.0**47).astype(np.int64).sum()


def integer_sum_of_rests(v):
    if v.dtype == np.float32:
        return np.rint(v).astype(np.int64).sum()
    return np.rint(v * 2.0**47).astype(np.int64).sum()


def integer_as(like, value):
    return np.array([value]).astype(like.dtype)


@quiet
def as_integer(v):
    return v.astype(np.int64)[0]


def high_product(a, b):
    return np.int64(np.uint64((int(a) % 2**64 * (int(b) % 2**64)) >> 64))


def leading_zeros(value):
    return np.int64(64 - (int(value) % 2**64).bit_length())


@quiet
def add_to_bins(bins, v, amounts, low, step, used):
    kind, _ = integers(v)
    places = (v.view(kind).astype(np.int64) - low) >> step
    for place, amount in zip(places, np.rint(amounts).astype(np.int64), strict=True):
        if 0 <= place < used:
            with exchange_lock:
                bins[place] += amount


def count(mask):
    return np.int64(np.count_nonzero(mask))


def largest_lane(v):
    return v.max(keepdims=True)


def bits_of(value):
    if not isinstance(value, np.ndarray):
        return value
    return value.view(np.int64 if value.dtype == np.float64 else np.int32)[0].astype(np.int64)


def from_bits(like, bits):
    if not isinstance(like, np.ndarray):
        return np.int64(bits)
    kind = np.int64 if like.dtype == np.float64 else np.int32
    return np.array([bits]).astype(kind).view(like.dtype)


def from_lane(value, distance):
    """By way of the block's memory and two barriers: all threads of a block must come here together."""
    thread = threading.current_thread()
    with exchange_lock:
        values = thread._manager.__dict__.setdefault("exchanged", {})
    values[thread.thread_id] = value
    thread.syncthreads()
    value = values[thread.thread_id ^ distance]
    thread.syncthreads()
    return value


exchange_lock = threading.Lock()


def memory(address, dtype, count=1):
    """An array over ``count`` elements of memory."""
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def pieces(address, thread, team, n, storage, vectors, aligned):
    """For every lane the element of the row it stands for, and whether the row has it."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]
    offset = 0 if aligned else int(address) % VECTOR_BYTES // ITEMSIZE[storage]
    index = thread + team * np.arange(vectors)
    j = (index[:, None] * lanes + np.arange(lanes)).ravel() - offset
    return j, (j >= 0) & (j < n)


def loader(storage, compute, vectors, aligned, fill, early=False):
    def load(address, anchor, thread, team, n):
        j, inside = pieces(anchor, thread, team, n, storage, vectors, aligned)
        result = np.full(j.size, fill, compute_dtype(compute))
        row = memory(address, DTYPES[storage], n)
        result[inside] = row[j[inside]].astype(result.dtype)
        return result

    return load


def storer(storage, compute, vectors, aligned):
    def store(address, anchor, thread, team, n, on, value):
        j, inside = pieces(anchor, thread, team, n, storage, vectors, aligned)
        if on:
            write_rounded(memory(address, DTYPES[storage], n), j[inside], value[inside])

    return store


@quiet
def write_rounded(row, index, value):
    row[index] = value.astype(row.dtype)


def room():
    """Of the memory that a launch gives, the block's: the simulator runs one block after the other."""
    return kernel._get_kernel_context().shared.array(0, types.uint8)


def slots_of(room, first, thread, team, slots, vectors, storage):
    """Which of a thread's vectors there is room for, all that is in the room, and their places there."""
    index = thread + team * np.arange(vectors)
    is_there = index < slots
    kept = room.view(DTYPES[storage]).reshape(-1, VECTOR_BYTES // ITEMSIZE[storage])
    return is_there, kept, first + index[is_there]


def holder(storage, vectors):
    def hold(room, first, thread, team, slots, value):
        is_there, kept, places = slots_of(room, first, thread, team, slots, vectors, storage)
        kept[places] = value.reshape(vectors, -1)[is_there]

    return hold


def recaller(storage, compute, vectors, fill):
    def recall(room, first, thread, team, slots):
        is_there, kept, places = slots_of(room, first, thread, team, slots, vectors, storage)
        result = np.full((vectors, kept.shape[1]), fill, compute_dtype(compute))
        result[is_there] = kept[places]
        return result.ravel()

    return recall


def bytes_at(address, step, places):
    return np.array([inside and memory(address + j * step, np.uint8)[0] != 0 for j, inside in places])


def keeper(storage, vectors):
    def kept(address, mask, step, thread, team, n):
        places = pieces(address, thread, team, n, storage, vectors, False)
        return bytes_at(mask, step, zip(*places, strict=True))

    return kept


def strided_places(first, distance, n):
    return [(j, j < n) for j in range(first, first + distance * STRIDED_LANES, distance)]


def gatherer(storage, compute, fill):
    def gather(address, step, first, distance, n):
        dtype = compute_dtype(compute)
        return np.array(
            [
                memory(address + j * step, DTYPES[storage])[0] if inside else fill
                for j, inside in strided_places(first, distance, n)
            ]
        ).astype(dtype)

    return gather


def scatterer(storage):
    def scatter(address, step, first, distance, n, on, value):
        for v, (j, inside) in zip(value, strided_places(first, distance, n), strict=True):
            if on and inside:
                write_rounded(memory(address + j * step, DTYPES[storage]), slice(1), v)

    return scatter


def gather_kept(address, step, first, distance, n):
    return bytes_at(address, step, strided_places(first, distance, n))


def reader(storage, compute):
    return lambda address: memory(address, DTYPES[storage]).astype(compute_dtype(compute))


def writer(storage):
    return lambda address, value: write_rounded(memory(address, DTYPES[storage]), slice(1), value)


def address_of_row(array, row):
    return array.ctypes.data + row * array.strides[0]


def placer(storage, compute, vectors):
    def places(address, thread, team):
        j, _ = pieces(address, thread, team, 2**31 - 1, storage, vectors, False)
        return j.astype(compute_dtype(compute))

    return places


def read_cell(address):
    return memory(address, np.int64)[0]


def write_cell(address, value):
    memory(address, np.int64)[0] = value


def integer_reader(storage):
    return lambda address: memory(address, DTYPES[storage]).astype(np.int64)[0]


def spanner(storage, vectors):
    def within(address, thread, team, low, high):
        j, _ = pieces(address, thread, team, 2**31 - 1, storage, vectors, False)
        return (j >= low) & (j < high)

    return within


def gather_within(first, distance, low, high):
    return np.array([low <= j < high for j, _ in strided_places(first, distance, 0)])


def class_loader(storage, compute, vectors):
    def load(address, anchor, thread, team, n):
        j, inside = pieces(anchor, thread, team, n, storage, vectors, False)
        result = np.zeros(j.size, compute_dtype(compute))
        result[inside] = memory(address, DTYPES[compute], n)[j[inside]]
        return result

    return load
