"""Results larger than the last cache, which are written past it: the bits of a new array, and nothing beside it."""

import importlib
import platform
import re
import sys

import numba
import numpy as np
import pytest
from samples import assert_same_bits
from test_fast_paths import run_fresh

import numbasoft
from numbasoft import launch
from numbasoft.ops.cross_entropy import api as cross_entropy_api
from numbasoft.ops.log_softmax import api as log_softmax_api
from numbasoft.ops.softmax import api as softmax_api

LENGTHS = (16, 17, 31, 127, 128, 129, 255, 256, 257, 300, 500, 511, 1000, 1024, 1027, 2049, 4100)
SEGMENTS = (16384, 16389, 32767, 32771, 32800)  # of which the last may hold less than a vector
KERNELS = {
    name: importlib.import_module(f"numbasoft.ops.{name}.cpu")
    for name in ("softmax", "log_softmax", "cross_entropy")
}


def past(name):
    return KERNELS[name].past_caches, KERNELS[name].past_caches_parallel


@pytest.fixture
def no_caches(monkeypatch):
    """Every result given by the caller is too large for the caches."""
    monkeypatch.setattr(launch, "LEAST_PAST_CACHES", 0)
    monkeypatch.setattr(launch, "LEAST_ROW", {4: 16, 8: 8})
    monkeypatch.setattr(launch, "FEWEST_OF_THREAD", 0)
    monkeypatch.setattr(launch, "last_caches", lambda threads: 0)
    for api in softmax_api, log_softmax_api:
        monkeypatch.setattr(api, "SMALLEST", 0)
        monkeypatch.setattr(api, "PARALLEL", 0)
    monkeypatch.setattr(cross_entropy_api, "PARALLEL", 0)


@pytest.fixture(params=["one thread", "threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(launch, "PARALLEL", 1 if request.param == "threads" else 1 << 62)
    monkeypatch.setattr(launch, "split_rows", lambda rows, n: False)
    return request.param


def placed(shape, dtype, offset):
    """An array ``offset`` elements behind a line of the cache, and all bytes around it."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 512, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64 + 128 + offset * dtype.itemsize
    return memory[start : start + size].view(dtype).reshape(shape), memory, start


def assert_written_past(call, expected, name, offset):
    """``call(out)`` gives what is expected, by the kernel past the caches, and writes nothing else."""
    out, memory, start = placed(expected.shape, expected.dtype, offset)
    calls = []
    run = launch.launch

    def spied(serial, parallel, *arguments):
        calls.append((serial, parallel))
        return run(serial, parallel, *arguments)

    module = importlib.import_module(f"numbasoft.ops.{name}.api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", spied)
        call(out)
    assert calls == [past(name)]
    assert_same_bits(out, expected)
    assert (memory[:start] == 0xA5).all() and (memory[start + out.nbytes :] == 0xA5).all()


def special(x, rng):
    """Rows of all kinds."""
    kinds = rng.permutation(len(x))
    for k, row in zip(kinds, x, strict=True):
        if k == 1:
            row[rng.random(row.size) < 0.3] = -np.inf
        elif k == 2:
            row[rng.integers(row.size)] = rng.choice([np.nan, np.inf])
        elif k == 3:
            row *= 40
        elif k == 4:
            row[rng.integers(row.size)] += 50
        elif k == 5:
            row += 1e4
    return x


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", LENGTHS + SEGMENTS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_bits_of_a_new_array(name, n, dtype, no_caches, threads, rng):
    function = getattr(numbasoft, name)
    for rows in (1, 2, 9) if n in SEGMENTS else (1, 2, 3, 8, 37, 70):
        offset = int(rng.integers(64 // np.dtype(dtype).itemsize))
        x = special(rng.normal(0, 3, (rows, n)), rng).astype(dtype)
        if min(rows, n) >= 8 and launch.are_narrow(x):
            continue
        assert_written_past(lambda out, x=x: function(x, out=out), function(x), name, offset)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", range(16))
def test_every_offset_from_a_line(offset, dtype, no_caches, threads, rng):
    x, target = rng.normal(0, 3, (5, 333)).astype(dtype), rng.integers(0, 333, 5)
    for function in numbasoft.softmax, numbasoft.log_softmax:
        assert_written_past(lambda out, f=function: f(x, out=out), function(x), function.__name__, offset)
    expected = numbasoft.cross_entropy_value_and_grad(x, target)[1]
    assert_written_past(
        lambda out: numbasoft.cross_entropy_value_and_grad(x, target, out=out),
        expected,
        "cross_entropy",
        offset,
    )


def test_logits_of_other_layouts_and_temperatures(no_caches, threads, rng):
    whole = rng.normal(0, 3, (40, 700)).astype(np.float32)
    parts = whole[::2, 7:640], whole[::-1, :633], np.broadcast_to(whole[3, :500], (9, 500))
    for x in parts:
        for t in 1.0, 0.7:
            expected = numbasoft.softmax(x, temperature=t)
            assert_written_past(
                lambda out, x=x, t=t: numbasoft.softmax(x, temperature=t, out=out), expected, "softmax", 5
            )
        expected = numbasoft.log_softmax(x)
        assert_written_past(lambda out, x=x: numbasoft.log_softmax(x, out=out), expected, "log_softmax", 5)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.2},
    {"z_loss": 0.01},
    {"temperature": 0.1},
    {"temperature": 1e-20},
    {"reduction": "sum"},
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [17, 128, 300, 1000, 2049, 16389, 32771])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_cross_entropy(n, options, dtype, no_caches, threads, rng):
    options = dict(options)
    if "weight" in options:
        options["weight"] = rng.random(n).astype(dtype)
    for rows in (2, 9) if n > 10000 else (1, 3, 8, 37, 70):
        x, target = special(rng.normal(0, 3, (rows, n)), rng).astype(dtype), rng.integers(0, n, rows)
        is_ignored = rng.random(rows) < 0.3
        target[is_ignored] = -100
        x[is_ignored] = rng.choice([np.nan, np.inf, 1.0])
        loss, expected = numbasoft.cross_entropy_value_and_grad(x, target, **options)
        losses = []
        assert_written_past(
            lambda out, x=x, target=target, losses=losses: losses.append(
                numbasoft.cross_entropy_value_and_grad(x, target, **options, out=out)[0]
            ),
            expected, "cross_entropy", int(rng.integers(8)),
        )  # fmt: skip
        assert_same_bits(np.asarray(losses[0]), np.asarray(loss))
        for g in 1.0, 1e35:  # a factor for which the plain product does not do
            expected = numbasoft.cross_entropy_backward(g, x, target, **options)
            assert_written_past(
                lambda out, x=x, target=target, g=g: numbasoft.cross_entropy_backward(
                    g, x, target, **options, out=out
                ),
                expected, "cross_entropy", 3,
            )  # fmt: skip


def test_which_results_are_written_past_the_caches(monkeypatch, rng):
    monkeypatch.setattr(launch, "last_caches", lambda threads: 5 << 20)
    x = np.zeros((1400, 1024), np.float32)
    y = np.empty_like(x)
    assert launch.is_past_caches(x, y)
    assert launch.is_past_caches(x.astype(float)[:200, :1].repeat(3600, 1), np.empty((200, 3600)))
    assert not launch.is_past_caches(x, x)
    assert not launch.is_past_caches(x[:1200], y[:1200]), "5 MiB less 100 KiB"
    assert not launch.is_past_caches(x, np.empty((1024, 1400), np.float32).T)
    assert not launch.is_past_caches(x, np.empty((1400, 1100), np.float32)[:, :1024])
    for rows, n in (4000, 500), (4, 300000):
        assert not launch.is_past_caches(np.empty((rows, n), np.float32), np.empty((rows, n), np.float32))
    assert not launch.is_past_caches(np.empty((4000, 1000)), np.empty((4000, 1000)))
    memory = np.zeros(y.nbytes + 1, np.uint8)
    assert not launch.is_past_caches(x, memory[1:].view(np.float32).reshape(x.shape)), "not on whole elements"
    with monkeypatch.context() as patch:
        patch.setattr(launch.jit, "threads", lambda: 351)
        assert not launch.is_past_caches(x, y), "a row for each of 351 threads is a quarter of 1400"
    assert not launch.is_past_caches(np.empty((1400, 2048), np.int16), np.empty((1400, 2048), np.int16))
    monkeypatch.setattr(launch, "last_caches", lambda threads: 0)
    assert not launch.is_past_caches(x[:900], y[:900]), "less than 4 MiB, whatever the caches"


def test_new_arrays_masks_and_16_bits_are_not(no_caches, monkeypatch, rng):
    x = rng.normal(0, 3, (30, 400)).astype(np.float32)
    target, mask = rng.integers(0, 400, 30), rng.random((30, 400)) < 0.5
    for name in KERNELS:
        for kernel in past(name):
            monkeypatch.setattr(KERNELS[name], kernel.py_func.__name__, None)  # to run it fails
    for function in numbasoft.softmax, numbasoft.log_softmax:
        for array in x, x.astype(np.float16):
            expected = function(array)
            assert_same_bits(function(array.copy()), expected)
            in_place = array.copy()
            assert_same_bits(function(in_place, out=in_place), expected)
            out = np.empty_like(array)
            function(array, where=mask, out=out)
            assert_same_bits(out, function(array, where=mask))
    out = np.empty_like(x)
    numbasoft.log_softmax(x, temperature=0.7, out=out)
    assert_same_bits(out, numbasoft.log_softmax(x, temperature=0.7))
    shares = numbasoft.softmax(rng.normal(size=x.shape).astype(np.float32))
    numbasoft.cross_entropy_value_and_grad(x, shares, out=out)
    assert_same_bits(out, numbasoft.cross_entropy_value_and_grad(x, shares)[1])
    in_place = x.copy()
    assert_same_bits(
        numbasoft.cross_entropy_value_and_grad(in_place, target, out=in_place)[1],
        numbasoft.cross_entropy_value_and_grad(x, target)[1],
    )


STORES = """
import json
import numba
import numpy as np
import numbasoft
from numbasoft import launch
from numbasoft.ops.softmax import api as softmax_api
from numbasoft.ops.cross_entropy import cpu as losses
from numbasoft.ops.log_softmax import cpu as logs
from numbasoft.ops.softmax import cpu

launch.LEAST_PAST_CACHES, launch.last_caches = 0, lambda threads: 0
numba.set_num_threads(1)
x = np.zeros((120, 600), np.float32)
numbasoft.softmax(x, out=np.empty_like(x))
numbasoft.log_softmax(x, out=np.empty_like(x))
numbasoft.cross_entropy_value_and_grad(x, [1] * 120, out=np.empty_like(x))
print(json.dumps(["".join(module.past_caches.inspect_asm().values()) for module in (cpu, logs, losses)]))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 names its stores so")
def test_lines_are_stored_without_being_read(tmp_path):
    for text in run_fresh(STORES, tmp_path):
        # what most elements go through: a row is written, of another the maximum is found and more is asked for
        assert any(
            all(re.search(rf"\s{name}\s", body) for name in ("v?movntps", "v?maxps", "prefetcht0"))
            for body in loops(text)
        )
        assert re.search(r"\s(mfence|lock)\b", text), "other threads need not see these stores"


def loops(text):
    """The innermost loops of a program in assembly, of up to 60 lines."""
    lines, labels = text.splitlines(), {}
    for k, line in enumerate(lines):
        if found := re.match(r"(\.LBB\w+):", line):
            labels[found[1]] = k
        elif (found := re.match(r"\s+j\w+\s+(\.LBB\w+)", line)) and k - labels.get(found[1], -100) < 60:
            yield "\n".join(lines[labels[found[1]] : k + 1])


@pytest.mark.minutes
def test_a_result_larger_than_the_caches(rng):
    size = launch.last_caches(numba.get_num_threads())
    if size > 1 << 28:
        pytest.skip("the caches hold more than 256 MiB")
    x = rng.standard_normal((size // 4096 + 3, 1024), np.float32)
    target = rng.integers(0, 1024, len(x))
    for function in numbasoft.softmax, numbasoft.log_softmax:
        assert_written_past(lambda out, f=function: f(x, out=out), function(x), function.__name__, 4)
    expected = numbasoft.cross_entropy_value_and_grad(x, target)[1]
    assert_written_past(
        lambda out: numbasoft.cross_entropy_value_and_grad(x, target, out=out), expected, "cross_entropy", 4
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_ignored_rows_are_zero_whatever_the_weights(no_caches, threads, rng):
    # smoothing spreads weights over all classes, and this one is infinite in float32
    weight = np.ones(300)
    weight[5] = 1e45
    x, target = rng.normal(0, 3, (9, 300)).astype(np.float32), rng.integers(0, 300, 9)
    target[::2] = -100
    options = {"weight": weight, "label_smoothing": 0.1}
    expected = numbasoft.cross_entropy_value_and_grad(x, target, **options)[1]
    assert not expected[::2].any()
    assert_written_past(
        lambda out: numbasoft.cross_entropy_value_and_grad(x, target, **options, out=out),
        expected, "cross_entropy", 3,
    )  # fmt: skip


GUARDED = """
import ctypes, json, mmap
import numpy as np
import numbasoft
from numbasoft import launch

launch.LEAST_PAST_CACHES, launch.last_caches, launch.FEWEST_OF_THREAD = 0, lambda threads: 0, 0
PAGE, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
kept = []


def guarded(shape, dtype, at_end):
    # begins behind a page that may not be touched, or ends before one
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    array = np.frombuffer(memory, np.uint8)
    for page in 0, pages + 1:
        address = ctypes.c_void_p(array.ctypes.data + page * PAGE)
        assert libc.mprotect(address, ctypes.c_size_t(PAGE), 0) == 0
    start = (pages + 1) * PAGE - size if at_end else PAGE
    return array[start : start + size].view(dtype).reshape(shape)


rng, calls = np.random.default_rng(0), 0
for dtype in "float32", "float64":
    launch.LEAST_ROW = {4: 16, 8: 8}
    for n in 520, 601, 1000, 4099, 16385:
        for rows in 2, 9, 130:
            for at_end in False, True:
                x, y = guarded((rows, n), dtype, at_end), guarded((rows, n), dtype, at_end)
                x[...] = rng.normal(size=x.shape)
                target = rng.integers(0, n, rows)
                numbasoft.softmax(x, out=y)
                numbasoft.log_softmax(x, out=y)
                numbasoft.cross_entropy_value_and_grad(x, target, out=y)
                calls += 3
print(json.dumps(calls))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's C library")
def test_nothing_is_touched_beside_logits_and_results(tmp_path):
    assert run_fresh(GUARDED, tmp_path) == 2 * 5 * 3 * 2 * 3
