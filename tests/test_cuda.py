"""CUDA without a GPU: how rows are shared out, what errors say, and the tests that need a process of their own.

The simulator has to be chosen before numba is imported, and compiling for a GPU that is not
here needs a stand-in for its driver: tests/device/simulated.py and compiled.py are run by
pytest in processes of their own. What remains for a GPU is in test_cuda_gpu.py.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from samples import around_limits

import numbasoft
from numbasoft import cuda
from numbasoft.cuda import geometry, layout

STORAGES = ("f2", "b2", "f4", "f8")
HERE = Path(__file__).parent
ROOT = HERE.resolve().parent

# --- how a row is shared out -------------------------------------------------------------------------------


def elements(vectors, team, lanes, offset):
    """The elements of a row that begins ``offset`` elements behind a multiple of 16 bytes, in any order."""
    thread, k, lane = np.ix_(range(team), range(vectors), range(lanes))
    return ((thread + k * team) * lanes + lane - offset).ravel()


@pytest.mark.parametrize("in_pairs", [False, True, geometry.SHARES], ids=["forward", "backward", "shares"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_element_of_a_row_is_done_once(storage, in_pairs):
    # by every thread's vectors, wherever the row begins, at every width that fits into registers
    lanes = geometry.lanes(storage)
    longest = max(n for n in range(0, 40_000, 8) if geometry.rows_launch(n, storage, False, in_pairs))
    seen = set()
    for n in range(1, longest + 1):
        for aligned in (False, True) if n % lanes == 0 else (False,):
            how = geometry.rows_launch(n, storage, aligned, in_pairs)
            if how is None:
                assert not aligned and n > longest - 2 * lanes
                continue
            assert how.threads % how.team == 0 and how.threads <= geometry.MOST_THREADS
            if in_pairs != geometry.SHARES:
                assert how.threads <= geometry.most_threads(how.vectors, storage, in_pairs)
            assert how.team & (how.team - 1) == 0 if how.team <= 32 else how.team % 32 == 0
            assert how.team <= 32 or how.threads == how.team
            assert how.threads == how.team or not geometry.fills_block(how.vectors, storage, in_pairs)
            for gradient in (False, True) if in_pairs is not True else ():  # cross-entropy's
                bounds = geometry.loss_row_bounds(how.vectors, storage, in_pairs, gradient)
                assert how.threads <= (bounds if isinstance(bounds, int) else bounds[0])
            # no element is left out: the last one has a vector, wherever the row begins
            most = 0 if aligned else lanes - 1
            assert how.team * how.vectors * lanes - most >= n
            if (how, n % lanes) not in seen:  # and none is done twice: every launch, every remainder
                seen.add((how, n % lanes))
                for offset in range(most + 1):
                    j = elements(how.vectors, how.team, lanes, offset)
                    j = j[(j >= 0) & (j < n)]
                    assert j.size == n and np.unique(j).size == n
    assert len({how for how, _ in seen}) >= 10


ROOMS = {
    "sm_80": geometry.Room(108, 163 << 10, 81 << 10),
    "sm_90": geometry.Room(132, 227 << 10, 113 << 10),
    "sm_120": geometry.Room(170, 99 << 10, 49 << 10),
}


@pytest.mark.parametrize("in_pairs", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("room", ROOMS)
def test_every_element_in_shared_memory_has_a_slot(room, storage, in_pairs):
    room, lanes, itemsize = ROOMS[room], geometry.lanes(storage), geometry.ITEMSIZE[storage]
    limits = around_limits(storage, room, in_pairs)
    near = {n + i for n in limits for i in range(-2 * lanes - 1, 2 * lanes + 2)}
    ways = set()
    for n in sorted(near | {50_257, 128_256}):
        for aligned in (False, True) if n % lanes == 0 else (False,):
            how = geometry.resident_launch(n, storage, aligned, room, in_pairs)
            if how is None:
                assert n * itemsize * (1 + in_pairs) > room.most - geometry.RESIDENT_CELL_BYTES - 2 * 32
                continue
            ways.add(how.threads)
            two = how.threads == geometry.RESIDENT_THREADS
            assert how.shared + geometry.RESIDENT_CELL_BYTES <= (room.together if two else room.most)
            assert how.shared == geometry.VECTOR_BYTES * how.slots * (1 + in_pairs)
            # the slots are the row, wherever it begins: vectors from the multiple of 16 bytes before it on
            most = 0 if aligned else lanes - 1
            assert how.slots * lanes - most >= n
            assert (how.slots - 1) * lanes < n + most
            # and every slot has a thread, once
            for vectors in geometry.RESIDENT_VECTORS, geometry.RESIDENT_LAST_VECTORS:
                held = vectors[storage]
                thread, k, turn = np.ix_(
                    range(how.threads), range(held), range(-(-how.slots // (held * how.threads)))
                )
                slot = (thread + (turn * held + k) * how.threads).ravel()
                slot = slot[slot < how.slots]
                assert slot.size == how.slots and np.unique(slot).size == how.slots
    assert geometry.LONE_THREADS in ways
    for aligned in False, True:  # of every limit both sides are among the widths that a GPU tests
        launch = geometry.resident_launch
        held = [n for n in limits if launch(n, storage, aligned and n % lanes == 0, room, in_pairs)]
        assert held and any(n > max(held) for n in limits)


@pytest.mark.parametrize("storage", STORAGES)
def test_segments_make_up_a_row(storage):
    length, lanes = geometry.segment_length(storage), geometry.lanes(storage)
    assert length * geometry.ITEMSIZE[storage] % geometry.VECTOR_BYTES == 0
    held = geometry.SEGMENT_THREADS * geometry.SEGMENT_VECTORS[storage] * lanes
    assert held - (lanes - 1) >= length, "a segment fits wherever it begins"
    parts = range(0, geometry.SEGMENT_VECTORS[storage], geometry.LAST_VECTORS[storage])
    assert parts[-1] + geometry.LAST_VECTORS[storage] == geometry.SEGMENT_VECTORS[storage]
    widths = [*range(1, 3 * length), 50_257, 128_256, 262_144, 1_000_003, 10_000_000]
    for n in widths:
        count = geometry.segments_of(n, storage)
        assert (count - 1) * length < n <= count * length


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_without_sums_are_done_once(storage):
    lanes = geometry.lanes(storage)
    for n in [*range(1, 20_000), 50_257, 1_000_003]:
        how, length = geometry.segments_launch(n, storage, False)
        assert length == n or length * geometry.ITEMSIZE[storage] % geometry.VECTOR_BYTES == 0
        assert how.team * how.vectors * lanes - (lanes - 1) >= length
        assert how.team & (how.team - 1) == 0 if how.team <= 32 else how.team % 32 == 0
        assert how.threads % how.team == 0 and how.threads <= geometry.MOST_THREADS
        assert how.threads <= geometry.most_threads(how.vectors, storage)


def test_every_element_of_a_column_is_done_once():
    for n in [*range(1, 700), 1000, 4096, 65_536]:
        threads = geometry.column_threads(n)
        share = threads // geometry.COLUMNS
        assert share & (share - 1) == 0 and threads <= geometry.MOST_COLUMN_THREADS
        start, round_, lane = np.ix_(
            range(share), range(-(-n // (share * geometry.STRIDED_LANES))), range(geometry.STRIDED_LANES)
        )
        j = (start + (round_ * geometry.STRIDED_LANES + lane) * share).ravel()
        j = j[j < n]
        assert j.size == n and np.unique(j).size == n
    for outer, inner in itertools.product((1, 3), range(1, 100)):
        blocks = geometry.column_blocks(outer, inner)
        assert blocks * geometry.COLUMNS >= outer * inner and blocks % outer == 0


@pytest.mark.parametrize("storage", STORAGES)
def test_every_class_of_a_draw_has_a_share(storage):
    lanes = geometry.lanes(storage)
    for n in [*range(1, 9000), 50_257, 128_256, 1_000_003, 10_000_000]:
        threads, group = geometry.draw_launch(n, storage)
        assert group == 32 and threads % group == 0 and threads <= geometry.DRAW_THREADS[storage]
        groups, steps = threads // group, 0
        while n > (group - 1) * lanes:  # as first_beyond does, in the longest share
            length = -(-n // (groups * lanes)) * lanes
            assert groups > 1 and groups * length >= n and length < n
            n, steps = length, steps + 1
        assert steps <= 5
        threads = geometry.relaxed_threads(n)
        assert threads % 32 == 0 and threads <= geometry.RELAXED_THREADS


def test_every_row_of_moments_has_a_team():
    for n in [*range(1, 5000), 50_257, 10_000_000]:
        team, threads = geometry.moment_launch(n)
        assert team & (team - 1) == 0 and threads % team == 0 and (team <= 32 or threads == team)
        assert threads <= geometry.moment_bounds()[0]


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 33, 1000, 2**31, 2**33 + 1])
def test_every_row_has_a_team(rows):
    for n in (1, 10, 100, 1000, 5000):
        how = geometry.rows_launch(n, "f4", False)
        teams = how.blocks(rows) * (how.threads // how.team)
        assert rows <= teams < rows + how.threads // how.team


# --- layouts -----------------------------------------------------------------------------------------------


def addresses(plan, i, axis_order):
    """The addresses, relative to the first, of all elements of array i of a plan, by row."""
    if isinstance(plan, layout.Rows):
        row, j = np.ix_(range(plan.rows), range(plan.n))
        return (row * plan.pitches[i] + j * plan.steps[i]).reshape(plan.rows, plan.n)
    outer, step, inner = plan.strides[i]
    a, k, j = np.ix_(range(plan.outer), range(plan.inner), range(plan.n))
    return (a * outer + k * inner + j * step).reshape(-1, plan.n)


VIEWS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "every other row": lambda a: a[::2],
    "every other element": lambda a: a[..., ::2],
    "reversed": lambda a: a[:, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "middle": lambda a: a[:, 1:3],
    "swapped": lambda a: a.swapaxes(0, 1),
}


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_a_plan_names_every_element_once(view, axes):
    x = VIEWS[view](np.zeros((4, 6, 10), np.float32))
    y = np.zeros(x.shape, np.float32)
    plan = layout.plan(x.shape, axes, [x.strides, y.strides], [4, 4])
    if plan is None:
        return
    order = [i for i in range(3) if i not in axes] + list(axes)
    for i, array in enumerate((x, y)):
        got = addresses(plan, i, order)
        want = sum(
            s * np.arange(n).reshape([-1 if i == k else 1 for k in range(3)])
            for i, (n, s) in enumerate(zip(array.shape, array.strides, strict=True))
        )
        want = want.transpose(order).reshape(got.shape)
        if i == 0:
            rows = sorted(map(tuple, got.tolist()))
            assert rows == sorted(map(tuple, want.tolist()))
    assert isinstance(plan, (layout.Rows, layout.Columns))


def test_the_common_layouts_need_no_copy():
    f4 = np.float32
    for shape, axes, kind in (
        ((8, 1000), (1,), layout.Rows), ((4, 8, 1000), (2,), layout.Rows), ((5, 6, 7), (1, 2), layout.Rows),
        ((1000, 4096), (0,), layout.Columns), ((4, 1000, 64, 64), (1,), layout.Columns),
        ((5, 6, 7), (0, 1), layout.Columns), ((5,), (0,), layout.Rows), ((), (), layout.Rows),
    ):  # fmt: skip
        x = np.zeros(shape, f4)
        assert isinstance(layout.plan(shape, axes, [x.strides] * 2, [4, 4]), kind), shape


def test_alignment():
    assert layout.are_aligned([256, 512], [64, 64], 16, 4)
    assert not layout.are_aligned([256, 516], [64, 64], 16, 4)
    assert not layout.are_aligned([256], [68], 16, 4)
    assert not layout.are_aligned([256], [], 50_257, 4)


# --- errors ------------------------------------------------------------------------------------------------


class Elsewhere:
    """Looks like an array on a device, by one protocol or the other."""

    def __init__(self, array, protocol="interface"):
        self.shape, self.dtype = array.shape, array.dtype
        if protocol == "interface":
            self.__cuda_array_interface__ = {
                "shape": array.shape, "typestr": array.dtype.str, "data": (512, False), "version": 3,
            }  # fmt: skip
        else:
            self.__dlpack_device__ = lambda: (2, 0)


CALLS = {
    "softmax": lambda a, **o: numbasoft.softmax(a, **o),
    "log_softmax": lambda a, **o: numbasoft.log_softmax(a, **o),
    "logsumexp": lambda a, **o: numbasoft.logsumexp(a, **o),
    "softmax_backward": lambda a, **o: numbasoft.softmax_backward(a, a, **o),
    "log_softmax_backward": lambda a, **o: numbasoft.log_softmax_backward(a, a, **o),
    "logsumexp_backward": lambda a, **o: numbasoft.logsumexp_backward(a, a, a, **o),
    "cross_entropy": lambda a, **o: numbasoft.cross_entropy(a, a, **o),
    "cross_entropy_value_and_grad": lambda a, **o: numbasoft.cross_entropy_value_and_grad(a, a, **o),
    "cross_entropy_backward": lambda a, **o: numbasoft.cross_entropy_backward(1.0, a, a, **o),
    "token_log_probs": lambda a, **o: numbasoft.token_log_probs(a, a, **o),
    "perplexity": lambda a, **o: numbasoft.perplexity(a, a, **o),
    "fit_temperature": lambda a, **o: numbasoft.fit_temperature(a, a, **o),
    "sample": lambda a, **o: numbasoft.sample(a, **o),
    "gumbel_softmax": lambda a, **o: numbasoft.gumbel_softmax(a, **o),
    "nll_loss": lambda a, **o: numbasoft.nll_loss(a, a, **o),
    "nll_loss_backward": lambda a, **o: numbasoft.nll_loss_backward(1.0, a, a, **o),
    "sigmoid": lambda a, **o: numbasoft.sigmoid(a, **o),
    "sigmoid_backward": lambda a, **o: numbasoft.sigmoid_backward(a, a, **o),
    "logit": lambda a, **o: numbasoft.logit(a, **o),
    "binary_cross_entropy": lambda a, **o: numbasoft.binary_cross_entropy(a, a, **o),
    "binary_cross_entropy_backward": lambda a, **o: numbasoft.binary_cross_entropy_backward(a, a, a, **o),
    "kl_divergence": lambda a, **o: numbasoft.kl_divergence(a, a, **o),
    "kl_divergence_backward": lambda a, **o: numbasoft.kl_divergence_backward(a, a, a, **o),
}


@pytest.fixture
def without(monkeypatch):
    """``without(name)``: as if a package were not installed."""

    def pretend(name):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else found(n, *a))
        cuda.reason.cache_clear()

    yield pretend
    monkeypatch.undo()
    cuda.reason.cache_clear()


@pytest.mark.parametrize("protocol", ["interface", "dlpack"])
@pytest.mark.parametrize("name", CALLS)
def test_without_numba_cuda_a_call_says_what_to_install(name, protocol, without):
    # core Numba's own deprecated target is there, and is not used
    without("numba_cuda")
    with pytest.raises(ImportError, match=r"need numba-cuda.*'numba-cuda\[cu13\].* 'numpy<2.5'"):
        CALLS[name](Elsewhere(np.zeros((2, 3), np.float32), protocol))


@pytest.mark.parametrize("simulated", "01")
def test_without_numba_cuda_the_device_functions_say_what_to_install(simulated):
    code = (
        "import importlib, importlib.util as util\n"
        "find_spec = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'numba_cuda' else find_spec(name, *rest)\n"
        "try: importlib.import_module('numbasoft.cuda.device')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": simulated},
    )  # fmt: skip
    assert done.stdout.startswith("numbasoft.cuda needs numba-cuda, which is not installed")


def test_numba_cuda_beside_a_numpy_that_it_is_not_for(monkeypatch):
    def imported(name):
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    monkeypatch.setattr(importlib, "import_module", imported)
    kind, sentence = cuda.of_another_numpy()
    assert kind is ImportError and "row_stack" in sentence and "pip install 'numpy<2.5'" in sentence


@pytest.mark.parametrize("name", CALLS)
def test_without_a_device_a_call_says_what_is_missing(name):
    if cuda.reason() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises((ImportError, RuntimeError), match="numba-cuda") as caught:
        CALLS[name](Elsewhere(np.zeros((2, 3), np.float32)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["interface", "dlpack"])
def test_mixed_homes(protocol):
    here = np.zeros((2, 3), np.float32)
    there = Elsewhere(here, protocol)
    for call in (
        lambda: numbasoft.softmax(here, out=there),
        lambda: numbasoft.softmax(there, out=here),
        lambda: numbasoft.softmax(here, where=there),
        lambda: numbasoft.log_softmax(there, where=here > 0),
        lambda: numbasoft.logsumexp(there, out=np.zeros(2, np.float32)),
        lambda: numbasoft.softmax_backward(here, there),
        lambda: numbasoft.log_softmax_backward(there, here),
        lambda: numbasoft.logsumexp_backward(1.0, there, there),
        lambda: numbasoft.sigmoid(there, out=here),
        lambda: numbasoft.gumbel_softmax(here, out=there),
        lambda: numbasoft.sigmoid_backward(here, there),
        lambda: numbasoft.logit(here, out=there),
        lambda: numbasoft.binary_cross_entropy(there, here),
        lambda: numbasoft.binary_cross_entropy_backward(here, there, there),
        lambda: numbasoft.kl_divergence(there, here),
        lambda: numbasoft.fit_temperature(there, here),
        lambda: numbasoft.kl_divergence_backward(here, there, there),
    ):
        with pytest.raises(TypeError, match=r"is on a CUDA device and .* is not"):
            call()


def test_a_stream_for_arrays_on_the_cpu():
    for call in CALLS.values():
        with pytest.raises(TypeError, match="stream is 7"):
            call(np.zeros((2, 3), np.float32), stream=7)


ABSENT = "jax", "matplotlib", "ml_dtypes", "mpmath", "onnx", "scipy", "sklearn", "torch"


def test_the_tests_for_a_gpu_are_found_where_no_test_extra_is_installed():
    code = (
        f"import sys, pytest; sys.modules.update(dict.fromkeys({ABSENT})); "
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(numbasoft.__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "test_every_width" in done.stdout, done.stdout[-4000:]


# --- processes of their own --------------------------------------------------------------------------------

needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None,
    reason="numba-cuda is not installed: pip install '.[cuda-test]'",
)
SIMULATED = {"NUMBA_ENABLE_CUDASIM": "1"}
PARTS = {
    "simulated": SIMULATED,
    "resident": SIMULATED,
    "compiled": {},
    "class_losses": SIMULATED,
    "fitting": SIMULATED,
    "sampling": SIMULATED,
}


def run_part(part, environment):
    package = Path(numbasoft.__file__).parents[1]
    path = os.pathsep.join([str(package), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not big"]
    done = subprocess.run(
        [*command, str(HERE / "device" / f"{part}.py")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment, "PYTHONPATH": path}, cwd=package, timeout=900, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@needs_numba_cuda
@pytest.mark.minutes
@pytest.mark.parametrize("part", PARTS)
def test_in_a_process_of_its_own(part):
    run_part(part, PARTS[part])


@needs_numba_cuda
@pytest.mark.minutes
@pytest.mark.parametrize(("part", "devices"), [("launched", 1), ("launched", 2), ("stored", 1)])
def test_calls_up_to_the_driver(part, devices, tmp_path):
    run_part(part, stand_in(tmp_path, devices))


@needs_numba_cuda
@pytest.mark.parametrize("devices", [1, 2])
def test_a_device_that_is_too_old(devices, tmp_path):
    code = (
        "import numpy, numbasoft\n"
        "from numba import cuda\n"
        "for device in cuda.gpus:\n"
        "    with device:\n"
        "        x = cuda.to_device(numpy.zeros((2, 3), 'f4'))\n"
        "        for _ in range(2):\n"
        "            try: print(numbasoft.softmax(x).shape)\n"
        "            except RuntimeError as error: print(error)\n"
        "try: print(numbasoft.cuda.require())\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, **stand_in(tmp_path, devices), "STAND_IN_MAJOR": "7"},
        cwd=Path(numbasoft.__file__).parents[1],
    )  # fmt: skip
    sentence = "kernels need a CUDA device of compute capability 8.0 or newer, but this one has 7.0"
    of_newer = ["(2, 3)", "(2, 3)", "None"] if devices == 2 else [sentence]
    assert done.stdout.splitlines() == [sentence] * 2 + of_newer, done.stderr[-4000:]


def stand_in(folder, devices):
    """The environment of a process with the stand-in for a driver."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import gpu_host
    finally:
        sys.path.remove(str(ROOT))
    if not sys.platform.startswith("linux") or gpu_host.compiler() is None:
        pytest.skip("no C compiler on Linux to build the stand-in for the driver with")
    return {**gpu_host.build(folder), "STAND_IN_DEVICES": str(devices)}
