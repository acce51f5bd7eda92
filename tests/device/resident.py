"""Rows that stay in shared memory, in Numba's CUDA simulator: tests/test_cuda.py runs this as it runs simulated.py.

Their bits are those of rows in registers and of rows in segments. What only a GPU can show: that a thread finds
in its slots what it has put there without a barrier, and how fast that is.
"""

import numpy as np
import oracle
import pytest
from oracle import DTYPES, check, limit
from samples import BACKWARD, FORWARD, sample, some
from simulated import (
    arguments,
    check_terms_below_the_unit,
    clear,
    here,
    one_thread,  # noqa: F401
    there,
)

import numbasoft
from numbasoft.cuda import calls, geometry, split, team
from numbasoft.cuda import resident as kernels
from numbasoft.ops.log_softmax import cuda as log_softmax
from numbasoft.ops.logsumexp import cuda as logsumexp
from numbasoft.ops.softmax import cuda as softmax

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROOMS = split, kernels, softmax, log_softmax, logsumexp
STORAGE = dict(zip(DTYPES, ("f2", "b2", "f4", "f8"), strict=True))
TWO_ROWS = BACKWARD[:2]

LARGE = geometry.Room(multiprocessors=1, most=1 << 40, together=1 << 40)


def in_shared_memory(patch, room=LARGE, threads=2):
    """All rows in shared memory, by so few threads; to be followed by ``clear(*ROOMS)``."""
    patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
    patch.setattr(calls, "room_of", lambda ordinal: room)
    patch.setattr(geometry, "RESIDENT_THREADS", threads)
    patch.setattr(geometry, "SEGMENT_THREADS", 1)
    patch.setattr(geometry, "LONE_THREADS", 2 * threads)
    geometry.resident_launch.cache_clear()
    clear(*ROOMS)


def in_segments(patch):
    """All rows in segments of two vectors."""
    patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
    patch.setattr(geometry, "SEGMENT_THREADS", 1)
    for module in geometry, split, softmax, log_softmax:
        patch.setattr(module, "segment_length", lambda storage: 2 * geometry.lanes(storage))
    clear(*ROOMS)


@pytest.fixture
def ways(monkeypatch, one_thread):  # noqa: F811
    """``ways(call)``: what a call gives where rows are in registers, in segments, and in shared memory."""

    def results(call, room=LARGE, threads=2):
        found = {"registers": call()}
        for way, change in ("segments", in_segments), ("shared", in_shared_memory):
            with monkeypatch.context() as patch:
                change(*(patch, room, threads) if way == "shared" else (patch,))
                kinds = launched(patch)
                found[way] = call()
                assert all(("resident" in kind) == (way == "shared") for kind in kinds), kinds
        geometry.resident_launch.cache_clear()
        clear(*ROOMS)
        return found

    return results


def launched(patch):
    """The names of the kernels for rows that are launched from now on."""
    names, compiled = [], calls.compiled

    def seen(factory, *rest):
        if factory.__module__ in (m.__name__ for m in ROOMS):
            names.append(factory.__name__)
        return compiled(factory, *rest)

    seen.cache_clear = compiled.cache_clear
    patch.setattr(calls, "compiled", seen)
    return names


def moved(array, offset):
    """The same rows, so many elements behind a multiple of 16 bytes."""
    memory = np.zeros(array.size + 64, array.dtype)
    begin = -memory.ctypes.data % 16 // array.itemsize + offset
    view = memory[begin : begin + array.size].reshape(array.shape)
    view[...] = array
    return view


def bits(array):
    """Bytes, with one NaN for all."""
    array = np.array(array)
    array[np.isnan(array.astype(float))] = nan
    return array.tobytes()


def call(name, given, offsets=(0,), where=None):
    given = [moved(a, offsets[i % len(offsets)]) for i, a in enumerate(given)]
    shape = given[0].shape[:1] if name == "logsumexp" else given[0].shape
    out = moved(np.zeros(shape, given[0].dtype), offsets[-1])
    options = {} if where is None else {"where": there(where)}
    return here(getattr(numbasoft, name)(*map(there, given), out=there(out), **options))


def special_rows(rng, n, dtype):
    """Random rows, ties, and all that is not a number, where a width has room for it."""
    x = rng.normal(0, 3, (9, n))
    x[1, n // 2], x[2, n - 1], x[3, 0], x[4] = nan, inf, -inf, -inf
    x[5, n // 3 :], x[6, :: max(1, n // 3)], x[7] = -inf, 9, 2.5
    x[8] = np.where(rng.random(n) < 0.5, -1e4, -60) + rng.random(n)
    return x.astype(DTYPES[dtype])


def widths(dtype):
    """Below a vector, and some more than two threads take at once."""
    lanes = geometry.lanes(STORAGE[dtype])
    return 1, lanes - 1, 2 * lanes, 17 * lanes + 1


@some(2, {"name": FORWARD + TWO_ROWS, "dtype": DTYPES})
def test_the_bits_are_those_of_other_regimes(name, dtype, rng, ways):
    for i, n in enumerate(widths(dtype)):
        x = special_rows(rng, n, dtype)
        given = [x] if name in FORWARD else [rng.normal(0, 1, x.shape).astype(x.dtype), x]
        if name == "softmax_backward":  # what is no probability, and what is 0
            given[1] = np.where(x < 0, np.array(0).astype(x.dtype), x)
        offsets = ((1, 0), (1, 0, 1), (1,), (0,))[i]
        found = ways(lambda given=given, offsets=offsets: call(name, given, offsets))
        assert {bits(v) for v in found.values()} == {bits(found["registers"])}, (n, offsets)


@some(1, {"name": FORWARD + TWO_ROWS, "dtype": DTYPES})
def test_the_bits_of_sums_in_finer_units(name, dtype, rng, ways, monkeypatch):
    # as of rows above 65,536, which are in segments or in shared memory, as a device has room and there are rows
    monkeypatch.setattr(split, "LONGEST_COLUMN", 0)
    for n in widths(dtype)[2:]:
        x = special_rows(rng, n, dtype)
        given = [x] if name in FORWARD else [rng.normal(0, 1, x.shape).astype(x.dtype), x]
        if name == "softmax_backward":
            given[1] = np.where(x < 0, np.array(0).astype(x.dtype), x)
        found = ways(lambda given=given: call(name, given, (1, 0)))
        assert bits(found["segments"]) == bits(found["shared"]), n


@some(1, {"name": FORWARD, "dtype": DTYPES})
def test_masked_rows(name, dtype, rng, ways):
    for i, n in enumerate(widths(dtype)[1:]):
        x = special_rows(rng, n, dtype)
        where = rng.random((9, 2 * n)) < 0.7
        where[1, :n], where[2], where[7] = np.isfinite(x[1].astype(float)), False, False
        mask = where[:, ::2] if i == 1 else where[:, :n]
        hidden = np.where(mask, x, np.array((nan, inf)[i % 2]).astype(x.dtype))
        found = ways(lambda hidden=hidden, mask=mask, i=i: call(name, [hidden], (i % 2,), mask))
        assert {bits(v) for v in found.values()} == {bits(found["registers"])}, n
        empty = found["shared"][7].astype(float)
        assert (empty == (0 if name == "softmax" else -inf)).all()
        some = [0, 6, 8]
        check(found["shared"][some], getattr(oracle, name)(x[some], where=mask[some]), limit(name, x.dtype))


@pytest.mark.parametrize("name", FORWARD + TWO_ROWS)
def test_several_warps_in_place(name, rng, monkeypatch):
    x = sample("confident", rng, 2, 1031, "float32")
    given = arguments(name, x, rng)
    want = getattr(oracle, name)(*given)
    with monkeypatch.context() as patch:
        in_shared_memory(patch, threads=64)
        out = there(given[0].copy())
        if name == "logsumexp":
            got = here(numbasoft.logsumexp(out))
        else:
            inputs = out, *map(there, given[1:])
            got = here(getattr(numbasoft, name)(*inputs, out=out))
    geometry.resident_launch.cache_clear()
    clear(*ROOMS)
    check(got, want, limit(name, x.dtype))


def test_very_long_rows_of_terms_below_the_unit(monkeypatch):
    for held in "RESIDENT_VECTORS", "RESIDENT_PAIR_VECTORS", "RESIDENT_LAST_VECTORS":
        monkeypatch.setitem(getattr(geometry, held), "f4", 1 << 18)
    with monkeypatch.context() as patch:
        in_shared_memory(patch, threads=1)
        names = launched(patch)
        check_terms_below_the_unit()
        assert names == ["resident", "resident", "backward_resident", "backward_resident"]
    monkeypatch.undo()
    geometry.resident_launch.cache_clear()
    clear(*ROOMS)


@pytest.mark.parametrize("most", [0, 1])
def test_a_sum_in_finer_units_does_not_depend_on_where_it_is_cut(most, rng):
    compute = ("f8", "f4")[most]
    settle, bits_ = split.settled(compute).fn, split.FINER[compute]
    terms = rng.integers(-(2**40), 2**49, 1000)
    want = None
    for cuts in [], [500], list(range(1, 1000)), sorted(rng.integers(0, 1000, 30)):
        pairs = [split.in_units.fn(part.sum(), 0, bits_) for part in np.split(terms, cuts)]
        parts = [split.parts_of.fn(*pair) for pair in pairs]
        got = tuple(map(int, settle(*np.sum(parts, axis=0))))
        want = want or got
        assert got == want
    assert want[0] * 2**24 + want[1] == (int(terms.sum()) + (1 << bits_ >> 1)) >> bits_


def test_what_a_block_has_beside_the_row():
    assert geometry.RESIDENT_CELL_BYTES == 8 * team.CELLS


def test_few_rows_are_left_to_many_blocks(rng, monkeypatch):
    x = rng.normal(0, 3, (3, 50)).astype("f4")
    for multiprocessors, resident in (3, True), (4, False):
        with monkeypatch.context() as patch:
            in_shared_memory(patch, LARGE._replace(multiprocessors=multiprocessors))
            names = launched(patch)
            call("softmax", [x])
        assert (names == ["resident"]) == resident, names
        geometry.resident_launch.cache_clear()
        clear(*ROOMS)
