"""The bits of a row's result depend on the row alone: its values, length, dtype, temperature and mask."""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from oracle import DTYPES
from samples import BACKWARD, FORWARD, sample

import numbasoft

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_name = pytest.mark.parametrize("name", FORWARD + BACKWARD)
# with and without a mask; the backward passes take none
by_variant = pytest.mark.parametrize(
    ("name", "masked"),
    [pytest.param(name, False, id=name) for name in FORWARD + BACKWARD]
    + [pytest.param(name, True, id=f"{name}-masked") for name in FORWARD],
)

# 300,000 is long enough to be split over threads; the others lie on both sides of vectors, tiles and caches.
WIDTHS = [1, 7, 33, 1000, 5003, 70_001, 300_000]


def rows_and_call(name, dtype, rng, rows, n, masked=False, temperature=1.0):
    """Arguments with `rows` rows of n, and a call that takes any selection of them."""
    x = sample("random", rng, rows, n, dtype)
    options = {"temperature": temperature}
    if name == "logsumexp_backward":
        lse = numbasoft.logsumexp(x, temperature=temperature)
        arguments = [rng.standard_normal(rows).astype(x.dtype), x, lse]
    elif name in BACKWARD:
        forward = numbasoft.log_softmax if name.startswith("log") else numbasoft.softmax
        arguments = [rng.standard_normal(x.shape).astype(x.dtype), forward(x, temperature=temperature)]
    else:
        arguments = [x]
    where = rng.random(x.shape) < 0.8 if masked else None

    def call(selection=slice(None), **extra):
        chosen = {} if where is None else {"where": where[selection]}
        return getattr(numbasoft, name)(*[a[selection] for a in arguments], **options, **chosen, **extra)

    call.arguments, call.where, call.options = arguments, where, options
    return call


def bits(a):
    return np.ascontiguousarray(a).tobytes()


def rows_for(n):
    return 9 if n <= 5003 else 3


@pytest.mark.parametrize("n", WIDTHS)
@by_dtype
@by_name
def test_a_row_alone_and_in_a_batch(name, dtype, n, rng):
    call = rows_and_call(name, dtype, rng, rows_for(n), n)
    batch = call()
    for i in range(len(batch)):
        assert bits(call(slice(i, i + 1))) == bits(batch[i : i + 1]), f"row {i} of {len(batch)}"


@pytest.mark.parametrize("n", [3, 64, 1000])
@by_dtype
@by_name
def test_a_row_in_batches_of_every_size(name, dtype, n, rng):
    # small enough for the serial kernel, large enough for the parallel one, and several rows at a time
    call = rows_and_call(name, dtype, rng, 3000 if n < 1000 else 100, n)
    batch = call()
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65):
        for start in (0, 1, len(batch) - size):
            part = slice(start, start + size)
            assert bits(call(part)) == bits(batch[part]), f"rows {start} to {start + size}"


@by_dtype
@by_name
def test_the_order_of_rows(name, dtype, rng):
    call = rows_and_call(name, dtype, rng, 37, 129)
    order = rng.permutation(37)
    assert bits(call(order)) == bits(call()[order])


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 129, 1000, 5003, 300_000])
@by_dtype
@by_variant
def test_the_axis_a_row_lies_along(name, dtype, n, masked, rng):
    rows = 6 if n <= 5003 else 2
    call = rows_and_call(name, dtype, rng, rows, n, masked)
    want = call()
    function = getattr(numbasoft, name)

    def moved(a, axis):
        """Rows of (rows, n), or one value a row, laid along another axis of (2, rows / 2, n)."""
        split = a.reshape(2, rows // 2, *a.shape[1:])
        return np.ascontiguousarray(np.moveaxis(split, -1, axis)) if a.ndim == 2 else split

    for axis in (0, 1):
        options = dict(call.options, axis=axis)
        if masked:
            options["where"] = moved(call.where, axis)
        got = np.asarray(function(*[moved(a, axis) for a in call.arguments], **options))
        back = np.moveaxis(got, axis, -1) if got.ndim == 3 else got
        assert bits(back) == bits(want), f"along axis {axis}"


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 100])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@by_name
def test_columns_beside_any_number_of_others(name, dtype, columns, rng):
    # kernels along axis 0 take several columns at a time; what they take must not show
    call = rows_and_call(name, dtype, rng, columns, 201)
    arguments = [np.ascontiguousarray(a.T) for a in call.arguments]
    got = getattr(numbasoft, name)(*arguments, 0)
    assert bits(np.asarray(got).T) == bits(call())


@pytest.mark.parametrize("n", [33, 1000, 70_001])
@by_dtype
@by_name
def test_several_axes_are_one_row(name, dtype, n, rng):
    call = rows_and_call(name, dtype, rng, 4, 3 * n)
    folded = [a.reshape(4, 3, n) if a.ndim == 2 else a for a in call.arguments]
    got = getattr(numbasoft, name)(*folded, axis=(1, 2))
    assert bits(got) == bits(call())
    first = [np.moveaxis(a, 0, 1).copy() if a.ndim == 3 else a for a in folded]  # (3, 4, n), axes 0 and 2
    got = getattr(numbasoft, name)(*first, axis=(0, 2))
    assert bits(np.moveaxis(got, 1, 0) if got.ndim == 3 else got) == bits(call())


@pytest.mark.parametrize("n", [33, 1000, 300_000])
@by_dtype
@by_name
def test_strides_and_alignment(name, dtype, n, rng):
    call = rows_and_call(name, dtype, rng, 3, n)
    want = call()
    for layout in (spread, flipped, shifted):
        arguments = [layout(a) for a in call.arguments]
        assert bits(getattr(numbasoft, name)(*arguments)) == bits(want), layout.__name__


def spread(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]


def flipped(a):
    return a[..., ::-1].copy()[..., ::-1]


def shifted(a):
    """One element past the alignment that NumPy gives to arrays, then one byte more."""
    offset = a.itemsize + 1
    buffer = np.zeros(a.nbytes + offset, np.uint8)
    view = buffer[offset:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


@pytest.mark.parametrize("n", WIDTHS)
@by_dtype
@by_name
def test_with_and_without_out(name, dtype, n, rng):
    call = rows_and_call(name, dtype, rng, 2, n)
    want = call()
    assert bits(call(out=np.empty_like(want))) == bits(want)
    if want.shape == call.arguments[-1].shape:
        assert bits(call(out=call.arguments[-1])) == bits(want), "in place"


def test_outputs_past_the_cache_have_the_bits_of_small_ones(rng):
    # what a kernel does may depend on the size of the output, the result may not
    x = rng.normal(0, 3, (6000, 2003)).astype(np.float32)
    for function in (numbasoft.softmax, numbasoft.log_softmax):
        large = function(x)
        assert bits(large[::500]) == bits(function(x[::500].copy()))
        assert bits(function(x, out=np.empty_like(x))) == bits(large)


@pytest.mark.parametrize("n", [1000, 300_000])
@by_dtype
@by_variant
def test_the_run(name, dtype, n, masked, rng):
    call = rows_and_call(name, dtype, rng, 40 if n == 1000 else 2, n, masked)
    want = bits(call())
    for _ in range(10):
        assert bits(call()) == want


@pytest.mark.parametrize("n", [37, 3000, 300_000])
@by_dtype
@pytest.mark.parametrize("name", FORWARD)
def test_a_mask_has_the_bits_of_minus_infinity(name, dtype, n, rng):
    call = rows_and_call(name, dtype, rng, 3, n, masked=True)
    x = np.where(call.where, call.arguments[0], np.array(-np.inf).astype(DTYPES[dtype]))
    assert bits(call()) == bits(getattr(numbasoft, name)(x))
    everything = np.ones(x.shape, bool)
    assert bits(getattr(numbasoft, name)(x, where=everything)) == bits(getattr(numbasoft, name)(x))


# --- threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def restored_threads():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize(("rows", "n"), [(400, 300), (7, 20_011), (1, 300_000), (3, 300_000), (1, 2_000_003)])
@by_variant
def test_the_thread_mask(name, rows, n, masked, rng, restored_threads):
    for dtype in ("float32", "bfloat16") if n > 20_011 else DTYPES:
        call = rows_and_call(name, dtype, rng, rows, n, masked)
        results = set()
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            results.add(bits(call()))
        assert len(results) == 1, f"{dtype}: {len(results)} results over thread counts"


DIGESTS = """
import json, sys
from numbasoft import jit
if int(sys.argv[2]):  # more threads than cores
    jit.processors = lambda: int(sys.argv[2])
sys.path.insert(0, sys.argv[1])
from test_reproducibility import digests
print(json.dumps(digests(*eval(sys.argv[3]))))
"""


def assert_same_bits_in_a_process(environment, threads=0, which=()):
    """That a process with these variables gives the bits of this one."""
    package = str(Path(numbasoft.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, str(Path(__file__).parent), str(threads), repr(which)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), digests(*which)
    assert theirs.keys() == ours.keys()
    different = [key for key in ours if ours[key] != theirs[key]]
    assert not different, f"{environment} gives other bits in {different}"


@functools.cache
def digests(dtypes=("float32", "float64", "bfloat16"), shapes=((300, 300), (5, 20_011), (1, 300_000))):
    """A hash of every function's results on rows short, long and split."""
    found = {}
    for name in FORWARD + BACKWARD:
        for dtype in dtypes:
            for rows, n in shapes:
                for masked in (False, True) if name in FORWARD and len(shapes) > 1 else (False,):
                    call = rows_and_call(
                        name, dtype, np.random.default_rng(5), rows, n, masked, temperature=0.9
                    )
                    key = f"{name} {dtype} {rows} x {n}" + masked * " masked"
                    found[key] = hashlib.sha256(bits(call())).hexdigest()
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_processes_with_other_numbers_of_threads(threads):
    # more threads than cores too: a split by their number would show here on every machine, and threads
    # that share a row wait for each other where they take turns on a core
    assert_same_bits_in_a_process({"NUMBA_NUM_THREADS": str(threads)}, threads)


BASE = "sse,sse2,sse3,ssse3,sse4.1,sse4.2,popcnt,avx,fma,f16c"


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="these instruction sets are those of x86"
)
@pytest.mark.parametrize(
    ("more", "needed"),
    [(",avx2,bmi,bmi2,lzcnt,movbe", "avx512f"), ("", "avx2")],
    ids=["AVX2 and AVX-512", "AVX and wider"],
)
def test_the_instruction_set(more, needed):
    # vectors have as many lanes on every machine: only fma, which all of these have, decides what is rounded
    if not llvm.get_host_cpu_features().get(needed, False):
        pytest.skip(f"without {needed} this machine's own code is the code to compare with")
    features = ",".join("+" + name for name in (BASE + more).split(","))
    names = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    assert_same_bits_in_a_process(names, which=(("float32", "float64"), ((300, 300),)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_that_cancel_alone_and_in_a_batch(dtype, rng):
    # few long rows are done in segments, many are not; where g - p * sum g cancels the last bit of the sum shows
    log_y = np.full((64, 1 << 15), -60, dtype)
    log_y[:, 3] = 0
    for _ in range(5):
        g = np.zeros_like(log_y)
        g[:, 3], g[:, 5] = rng.normal(size=64), 1e-7 * rng.normal(size=64)
        together = numbasoft.log_softmax_backward(g, log_y)
        for r in range(0, 63, 3):
            alone = numbasoft.log_softmax_backward(g[r : r + 3], log_y[r : r + 3])
            np.testing.assert_array_equal(bits(alone), bits(together[r : r + 3]))
