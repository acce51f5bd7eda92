"""The machine code is the vector code it is meant to be: scalar code is right as well, but 10 times slower."""

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from samples import assert_same_bits

import numbasoft
from numbasoft import arrays, caches, jit, launch
from numbasoft.launch import PARALLEL

FEATURES = llvm.get_host_cpu_features()

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not FEATURES.get("fma"),
    reason="the instructions looked for are those of x86 with FMA",
)

# Numba can show the assembly of what it has just compiled only, so this is a process with an empty cache.
ASSEMBLY = """
import json, sys
import numpy as np
import numbasoft
from numba.core.dispatcher import Dispatcher
from numbasoft.ops.softmax import cpu

found = {}
for dtype in ("float32", "float64", "float16"):
    seen = {(n, s) for n, d in vars(cpu).items() if isinstance(d, Dispatcher) for s in d.signatures}
    numbasoft.softmax(np.zeros((3, 100), dtype))
    for name, dispatcher in vars(cpu).items():
        if isinstance(dispatcher, Dispatcher):
            for signature in dispatcher.signatures:
                if (name, signature) not in seen:
                    found.setdefault(dtype, []).append(dispatcher.inspect_asm(signature))

from numbasoft.ops.sigmoid import cpu

numbasoft.logit(np.zeros(3, np.float32))
found["logit"] = list(cpu.logit.inspect_asm().values())
print(json.dumps(found))
"""

LIBRARY = re.compile(
    r"(?:\$|call\w*\s+)(_*(?:exp|exp2|expm1|ldexp|pow|log|log2|log1p|rint|round|nearbyint|floor|ceil|trunc|fma|fmax)f?"
    r"|__gnu_\w+|__extend\w+|__trunc\w+|__svml\w+)(?:@PLT)?\b"
)


def run_fresh(program, cache):
    """The last line of a program's output, as JSON, from a process with an empty cache of kernels."""
    package = str(Path(numbasoft.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "2", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    return run_fresh(ASSEMBLY, tmp_path_factory.mktemp("assembly"))


@pytest.mark.parametrize(("dtype", "suffix"), [("float32", "ps"), ("float64", "pd"), ("float16", "ps")])
def test_the_exponential_is_vector_code(assembly, dtype, suffix):
    (text,) = assembly[dtype]
    fused = re.findall(rf"\bvfn?m(?:add|sub)\d+{suffix}\s.*%[yz]mm", text)
    assert len(fused) >= 10, f"{len(fused)} fused operations on whole vectors"
    called = LIBRARY.findall(text)
    assert not called, f"the kernel calls {called}"


@pytest.mark.parametrize(("dtype", "suffix"), [("float32", "ps"), ("float64", "pd"), ("float16", "ps")])
def test_the_maximum_is_vector_code(assembly, dtype, suffix):
    # Python's max stays scalar whatever the flags
    (text,) = assembly[dtype]
    assert re.search(rf"\bvmax{suffix}\s.*%[yz]mm", text)


def test_the_logarithm_of_logit_is_vector_code(assembly):
    (text,) = assembly["logit"]
    assert len(re.findall(r"\bvfn?m(?:add|sub)\d+pd\s.*%[yz]mm", text)) >= 7
    assert not LIBRARY.findall(text)


@pytest.mark.skipif(
    not FEATURES.get("avx2") or FEATURES.get("avx512f", False),
    reason="a one that LLVM does not know is for AVX2, where constants are kept in memory",
)
def test_powers_are_added_by_fma(assembly):
    # LLVM makes an addition of it where it sees the one; nothing else in this kernel is a float64 fma
    (text,) = assembly["float32"]
    assert len(re.findall(r"\bvfmadd\d+pd\s.*%ymm", text)) >= 8


@pytest.mark.skipif(not FEATURES.get("avx2"), reason="the loop is told from others by AVX2's permutation")
def test_loop_1_of_the_next_tile_is_in_loop_4(assembly):
    (text,) = assembly["float32"]
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?\s+j\w+\s+\1\n)", text, flags=re.M)
    assert any(
        all(re.search(rf"\s{name}\s", body) for name in (r"vmaxps", r"vmulps", r"vfmadd\d+ps", r"vmovups"))
        and not re.search(r"\svperm", body)
        for _, body in loops
    )


def test_exponentials_of_float64_are_made_in_two_loops(assembly):
    # the first ends with the bits of 2**n shifted into place, the second has all but four of the operations
    (text,) = assembly["float64"]
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?\s+j\w+\s+\1\n)", text, flags=re.M)
    fused = [(len(re.findall(r"\bvfn?m(?:add|sub)\d+pd\s", body)), body) for _, body in loops]
    shifting = [n for n, body in fused if re.search(r"\svpsllq\s", body)]
    assert shifting and max(shifting) <= 6  # three for a register or two
    assert max(n for n, _ in fused) >= 13


@pytest.mark.skipif(not FEATURES.get("f16c"), reason="without F16C float16 is converted by bit arithmetic")
def test_float16_is_converted_by_the_processor(assembly):
    # AVX512-FP16 has forms of its own, which end in x
    (text,) = assembly["float16"]
    assert re.search(r"\bvcvtph2psx?\s.*%[xyz]mm", text)
    assert re.search(r"\bvcvtps2phx?\s.*%[xyz]mm", text)


# The code for another CPU can be compiled and read here, if not run.
OTHER_CPU = """
import sys
from numba import types
from numbasoft.ops.softmax import cpu

array = [types.Array(types.float32, 2, "A", readonly=readonly) for readonly in (True, False)]
cpu.forward.compile((array[0], types.none, types.none, types.float64, types.float64, array[1]))
print(cpu.forward.inspect_asm(cpu.forward.signatures[0]))
"""
AVX512 = (
    "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c,+avx512f,+avx512vl,+avx512bw,+avx512dq"
)


@pytest.mark.parametrize(
    ("name", "features", "instruction"),
    [
        ("skylake-avx512", AVX512, r"vfmadd\w+ps\s[^\n]*%zmm"),
        ("x86-64", "+sse,+sse2", r"\tmulps\s[^\n]*%xmm"),
    ],
)
def test_other_machines_get_vector_code(name, features, instruction, tmp_path):
    places = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    places["PYTHONPATH"] = str(Path(numbasoft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", OTHER_CPU], env=os.environ | places, capture_output=True, text=True, check=True
    )
    assert len(re.findall(instruction, done.stdout)) > 20
    assert not LIBRARY.findall(done.stdout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 10), (300, 400)])
def test_plain_calls_skip_the_general_path(dtype, shape, monkeypatch, rng):
    x, g = rng.standard_normal((2, *shape)).astype(dtype)
    p, log_p = numbasoft.softmax(x), numbasoft.log_softmax(x)
    expected = numbasoft.softmax_backward(g, p), numbasoft.log_softmax_backward(g, log_p)

    def taken(*_):
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(arrays, "over_rows", taken)
    np.testing.assert_array_equal(numbasoft.softmax(x, out=np.empty_like(x)), p)
    np.testing.assert_array_equal(numbasoft.log_softmax(x, -1, temperature=1.0), log_p)
    np.testing.assert_array_equal(numbasoft.softmax_backward(g, p), expected[0])
    np.testing.assert_array_equal(numbasoft.log_softmax_backward(g, log_p), expected[1])
    for other in lambda: numbasoft.softmax(x[:, ::2]), lambda: numbasoft.softmax(x, where=(x < 0)[:, :1]):
        with pytest.raises(AssertionError, match="general path"):
            other()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_few_long_rows_are_shared_by_threads(name, monkeypatch, rng):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two threads")
    api = importlib.import_module(f"numbasoft.ops.{name}.api")
    shared = []
    split_forward = api.split_forward

    def seen(x, *rest):
        shared.append(x.shape)
        split_forward(x, *rest)

    monkeypatch.setattr(api, "split_forward", seen)
    before = numba.get_num_threads()
    numba.set_num_threads(2)
    try:
        for shape in (1, 50_000), (1, 200_000), (2, 200_000), (3, 100_000), (4, 100_000), (300, 1000):
            getattr(numbasoft, name)(rng.standard_normal(shape, dtype=np.float32))
    finally:
        numba.set_num_threads(before)
    assert shared == [(1, 200_000), (3, 100_000)]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 16), ("float16", 16), ("float64", 8)])
def test_many_short_rows_are_done_a_lane_each(name, dtype, most, monkeypatch, rng):
    api = importlib.import_module(f"numbasoft.ops.{name}.api")
    taken = []
    launch = api.launch

    def seen(kernel, *rest):
        taken.append(kernel.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(api, "launch", seen)
    for shape, is_narrow in (
        ((3000, 1), True), ((300, most), True), ((1500, 2), True), ((200, most + 1), False), ((7, most), False),
        ((3000, most + 1), False), ((8000, most + 1), False),
    ):  # fmt: skip
        taken.clear()
        x = rng.standard_normal(shape).astype(dtype)
        y = getattr(numbasoft, name)(x)
        assert ("narrow" in taken) == is_narrow, shape
        if name != "logsumexp":
            taken.clear()
            getattr(numbasoft, f"{name}_backward")(x, y)
            is_plain = dtype != "float16" and (x.size < 128 or shape[1] > 16)  # without launch
            assert taken == (["narrow_backward"] if is_narrow else [] if is_plain else ["backward"]), shape
        taken.clear()
        getattr(numbasoft, name)(x, where=np.ones(shape, bool))
        is_plain = (x.size < PARALLEL or shape[1] > 16) and name != "logsumexp"
        assert taken == ([] if is_plain else ["forward"]), shape


@pytest.mark.skipif(jit.processors() < 2, reason="needs two processors, for a parallel kernel")
def test_many_plain_rows_enter_threads_without_launch(monkeypatch, rng):
    x = rng.standard_normal((70, 1000), np.float32)
    half, mask, target = x.astype(np.float16), x < 1, rng.integers(0, 1000, 70)
    log_y = numbasoft.log_softmax(x)
    calls = [
        lambda: numbasoft.softmax(x),
        lambda: numbasoft.softmax(half),
        lambda: numbasoft.softmax(x, where=mask),
        lambda: numbasoft.log_softmax(x, temperature=0.7),
        lambda: numbasoft.log_softmax(half, where=mask),
        lambda: numbasoft.logsumexp(x),
        lambda: numbasoft.softmax_backward(x, x),
        lambda: numbasoft.log_softmax_backward(x, log_y),
        lambda: numbasoft.cross_entropy(x, target),
        lambda: numbasoft.cross_entropy_value_and_grad(x, target)[1],
        lambda: numbasoft.token_log_probs(
            x[:, :10].repeat(100, 0), target.repeat(100) % 10
        ),  # a lane for a row
    ]
    before, taken = numba.get_num_threads(), []
    launched = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *given: (taken.append(1), launched(*given))[1])
    try:
        for call in calls:
            numba.set_num_threads(1)
            want = call()
            numba.set_num_threads(2)
            call()  # compiles if need be
            taken.clear()
            assert_same_bits(call(), want)
            assert not taken
            numba.set_num_threads(1)
            taken.clear()
            call()
            assert taken
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 16), ("float16", 16), ("float64", 8)])
def test_cross_entropy_of_many_short_rows_is_done_a_lane_each(dtype, most, monkeypatch, rng):
    api = importlib.import_module("numbasoft.ops.cross_entropy.api")
    taken = []
    launch = api.launch

    def seen(kernel, *rest):
        taken.append(kernel.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(api, "launch", seen)
    for shape, kernel in (
        ((40000, 1), "narrow"), ((5000, most), "narrow"), ((5000, most + 1), "forward"), ((7, 5000), "forward"),
    ):  # fmt: skip
        x, target = rng.standard_normal(shape).astype(dtype), rng.integers(0, shape[1], shape[0], np.int32)
        taken.clear()  # int64 would take no general path
        numbasoft.cross_entropy(x, target, weight=np.ones(shape[1]), z_loss=0.1, temperature=2.0)
        numbasoft.cross_entropy_value_and_grad(x, target)
        numbasoft.cross_entropy_backward(1.0, x, target)
        numbasoft.token_log_probs(x, target)
        assert taken == [kernel] * 4, shape
        taken.clear()
        numbasoft.cross_entropy_value_and_grad(x, target, label_smoothing=0.1)
        numbasoft.cross_entropy(x, numbasoft.softmax(x))
        assert taken == ["forward", "check", "forward"], shape


# The short loop is replaced by one that writes a 7, to be seen where it runs.
MARKED = """
import json
import numpy as np
from numbasoft.jit import inline
from numbasoft.ops.log_softmax import cpu
from numbasoft.vector import filled, store_part

@inline
def marked(g, g_at, log_y, at, n, total, shift, high, low, g_ahead, ahead, dx, dx_at):
    store_part(dx, dx_at, 1, filled(g, 7.0))

cpu.plain_gradients = marked
import numbasoft
log_y = numbasoft.log_softmax(np.random.default_rng(0).normal(size=(5, 100)).astype("f4"))
g = np.ones_like(log_y)
log_y[1, 5], log_y[2, 5] = -np.inf, -200
g[3] = 0
log_y[4, 5] = 50
dx = numbasoft.log_softmax_backward(g, log_y)
hot = numbasoft.log_softmax_backward(g, log_y, temperature=2.0)
print(json.dumps([(dx[:, 0] == 7).tolist(), (hot[:, 0] == 7).tolist()]))
"""


def test_gradients_of_ordinary_rows_take_the_short_loop(tmp_path):
    plain, hot = run_fresh(MARKED, tmp_path)
    assert plain == [True, False, False, False, False]
    assert hot == [False] * 5


# What rows without far elements need in place of their shift is spoilt, to be seen where it is used.
SPOILT = """
import json
import numpy as np
from numbasoft import passes
from numbasoft.jit import inline

@inline
def spoilt(shift):
    return np.float32(0.0), shift[1], np.float32(np.nan), None, shift[4]

passes.plain = spoilt
import numbasoft

x = np.random.default_rng(0).normal(0, 3, (6, 100)).astype("f4")
x[1, 5], x[2, 99], x[4, 50] = -np.inf, -200, -80
x[3] += 1e5
mask = np.arange(100) < np.array([100, 100, 100, 100, 100, 99])[:, None]
kinds = numbasoft.softmax(x, where=mask), numbasoft.log_softmax(x), numbasoft.cross_entropy_value_and_grad(x, [1] * 6)[1]
print(json.dumps([np.isnan(y).any(axis=1).tolist() for y in kinds]))
"""


def test_rows_without_far_elements_take_the_shorter_loop(tmp_path):
    masked, *others = run_fresh(SPOILT, tmp_path)
    assert masked == [True, False, False, False, True, False]
    assert others == [[True, False, False, False, True, True]] * 2


# Where the second vector begins is replaced by the end of the row: nothing between the first and the last is done.
ALIGNED = """
import json
import numpy as np
from numbasoft import passes
from numbasoft.jit import inline, kernel
from numbasoft.ops.cross_entropy import cpu

found = []

@kernel
def begin(x, at, n, j):
    j[0] = passes.second_vector(x, at, n)

for dtype, w in (np.float32, 16), (np.float64, 8):
    x, j = np.zeros(100, dtype), np.zeros(1, np.int64)
    for at in range(20):
        begin(x, at, 16 * w, j)
        place = x.ctypes.data + (at + int(j[0])) * x.itemsize
        begin(x, at, 16 * w - 1, j)
        found.append((place % 64, int(j[0]) - w))

@inline
def nothing(array, at, n):
    return n

passes.second_vector = cpu.second_vector = nothing
import numbasoft

x = np.random.default_rng(0).normal(size=(3, 1000)).astype("f4")
y = np.full_like(x, 7)
kept = numbasoft.softmax(x, out=y)[0, 100:900].min() > 1
y[:] = 7
numbasoft.log_softmax(x, out=y)
kept_logarithms = (y[0, 100:900] == 7).all()
kept_gradients = numbasoft.cross_entropy_value_and_grad(x, [1, 1, 1])[1][0, 100:900].min() > 1
print(json.dumps((found, [bool(kept), bool(kept_logarithms), bool(kept_gradients)])))
"""


def test_vectors_fill_whole_lines_where_their_order_does_not_matter(tmp_path):
    found, seen = run_fresh(ALIGNED, tmp_path)
    assert len(found) == 40 and all(place == 0 and short == 0 for place, short in found)
    assert seen == [True] * 3


ASKING = """
import json
import numpy as np
import numbasoft
from numbasoft.ops.log_softmax import cpu

x = np.zeros((3, 100), np.float32)
numbasoft.log_softmax_backward(x, numbasoft.log_softmax(x))
print(json.dumps([cpu.backward.inspect_asm(s) for s in cpu.backward.signatures]))
"""


def test_gradients_of_log_softmax_ask_for_the_next_row_of_both_inputs(tmp_path):
    (text,) = run_fresh(ASKING, tmp_path)
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?\s+j\w+\s+\1\n)", text, flags=re.M)
    asking = [body for _, body in loops if len(re.findall(r"\sprefetcht0\s", body)) == 2]
    assert any(re.search(r"\svfn?m(?:add|sub)\d+ps\s", body) for body in asking)


COMPILED = """
import json
import numpy as np
import numbasoft
from numbasoft import jit

optimised = []
finalize = jit.JITCodeLibrary._finalize_final_module

def finalize_and_note(library):
    optimised.append(library.name)
    return finalize(library)

jit.JITCodeLibrary._finalize_final_module = finalize_and_note
numbasoft.softmax(np.ones((256, 1000), "f4"))
print(json.dumps(optimised))
"""


def test_helpers_and_parallel_loops_are_made_machine_code_in_kernels_only(tmp_path):
    if jit.processors() < 2:
        pytest.skip("needs two processors, for a parallel kernel")
    names = run_fresh(COMPILED, tmp_path)
    assert sum("forward_parallel" in name for name in names) == 1
    assert not [name for name in names if "gufunc" in name.lower() or "row_" in name or "exponential" in name]


WAITING = """
import json
import numpy as np
import numbasoft
from numbasoft.ops.cross_entropy import cpu

numbasoft.cross_entropy_value_and_grad(np.zeros((3, 100), np.float32), [1, 2, 3])
print(json.dumps([cpu.forward.inspect_asm(s) for s in cpu.forward.signatures]))
"""


def test_float32_exponentials_wait_for_their_sum_on_the_stack(tmp_path):
    # read back by halves from the gradient, rows of 64 took a sixth longer
    (text,) = run_fresh(WAITING, tmp_path)
    assert len(re.findall(r"\svcvtps2pd\s+-?\d*\(%r[sb]p\b", text)) >= 4


TILED = """
import hashlib, json
import numpy as np
from numbasoft import tiles
from numbasoft.jit import kernel

tiles.first_cache = lambda: {size}
import numbasoft

@kernel
def tile_of(x, size):
    size[0] = tiles.larger_tile(x)

sizes, digest = [], hashlib.sha256()
for dtype in "float32", "float64", "float16":
    rng, size = np.random.default_rng(0), np.zeros(1, np.int64)
    for shape in (300, 300), (31, 1000), (9, 3000):
        digest.update(numbasoft.softmax(rng.normal(0, 3, shape).astype(dtype)).tobytes())
    tile_of(np.zeros(1, np.int16 if dtype == "float16" else dtype), size)
    sizes.append(int(size[0]))
print(json.dumps((sizes, digest.hexdigest())))
"""


def test_tiles_fill_the_first_cache_and_change_no_bit(tmp_path):
    small, large = (run_fresh(TILED.replace("{size}", str(k << 10)), tmp_path / str(k)) for k in (32, 48))
    assert small[0] == [2048, 2048, 2048] and large[0] == [4096, 2048, 4096]
    assert small[1] == large[1]


INSTRUCTIONS = ("1", "Instruction", "64K", "0")


@pytest.mark.parametrize(
    ("described", "first", "last"),
    [
        ([("1", "Data", "48K", "0"), INSTRUCTIONS, ("3", "Unified", "32768K", "0-7")], 48 << 10, 32 << 20),
        ([INSTRUCTIONS, ("1", "Data", "128K"), ("3", "Unified", "8192K", "0,8")], 128 << 10, 32 << 20),
        ([("3", "Unified", "16384K", "0-1,4-5"), ("2", "Unified", "1024K", "0")], 32 << 10, 32 << 20),
        ([("3", "Unified", "16384K"), ("1", "Data", "48K", "?")], 48 << 10, 16 << 20),
        ([("3", "Unified", "16384K", "1-0"), ("1", "Data", "-5K", "0")], 32 << 10, 16 << 20),
        ([("2", "Unified", "1024K", "0"), ("3", "Unified", "0K", "0")], 32 << 10, 32 << 20),
        ([("1", "Data", "unknown", "0"), ("3", "Unified", "64M", "none")], 32 << 10, 32 << 20),
        ([], 32 << 10, 32 << 20),
    ],
)
def test_the_sizes_of_caches(described, first, last, tmp_path):
    # the last ones of eight threads, of whose CPUs some share one
    for k, values in enumerate(described):
        folder = tmp_path / f"index{k}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=False):
            (folder / name).write_text(value + "\n")
    assert caches.first_cache(tmp_path) == first
    assert caches.last_caches(8, tmp_path) == last


def test_caches_that_may_not_be_asked_about(monkeypatch):
    def refused(*arguments):
        raise PermissionError

    monkeypatch.setattr(caches.Path, "glob", refused)
    assert caches.first_cache() == 32 << 10
    assert caches.last_caches(3, "/nowhere") == 32 << 20


def test_an_output_with_memory_of_another_owner_is_not_compared(monkeypatch):
    def compared(*arrays):
        raise AssertionError("may_share_memory")

    whole = np.zeros((4, 3), np.float32)
    x = whole[:2]
    monkeypatch.setattr(arrays.np, "may_share_memory", compared)
    for given in x, x.copy():
        for out in (
            np.empty_like(x),
            np.empty((3, 3), np.float32)[:2],
            np.empty(9, np.float32)[3:].reshape(2, 3),
        ):
            assert arrays.takes_result(out, given)
    foreign = np.frombuffer(bytearray(24), np.float32).reshape(2, 3)
    for out in whole[1:3], whole[2:], whole[2:].reshape(-1)[:6].reshape(2, 3), foreign, x[:]:
        with pytest.raises(AssertionError, match="may_share_memory"):
            arrays.takes_result(out, x)
