"""Calls up to the driver: tests/test_cuda.py runs this with a driver that only counts (benchmarks/driver.c).

All of numba-cuda is what runs on a GPU: its arrays, its compiler, its streams and contexts. What
kernels compute is tested in simulated.py and, on a GPU, in test_cuda_gpu.py. Once more with two devices.
"""

import math
import struct
import sys
import threading
import warnings
from types import SimpleNamespace

import compiled
import every_kernel
import numpy as np
import pytest
from numba import cuda

import numbasoft
from benchmarks.gpu_host import StandIn, calls
from numbasoft import elementary
from numbasoft.cuda import arrays, class_losses, divergence, elementwise, fits, geometry, literal, sampling
from numbasoft.cuda import calls as device_calls
from numbasoft.ops.fit_temperature.cuda import MOMENTS

LAST = arrays.device_count() - 1
driver = StandIn()


@pytest.fixture(autouse=True, scope="module")
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no nvjitlink: the driver links
        yield


@pytest.fixture(autouse=True)
def on_the_last_device():
    with cuda.gpus[LAST]:
        yield


def there(shape, dtype="f4"):
    return cuda.to_device(np.zeros(shape, dtype))


def address(array):
    return array.device_ctypes_pointer.value


def launches(call):
    before = driver.launches
    call()
    return driver.launches - before


def test_a_kernel_gets_what_its_signature_says():
    x, y = there((8, 1000)), there((8, 1000))
    driver.keep(12)
    for _ in range(3):  # the first call, and repeated ones
        assert launches(lambda: numbasoft.softmax(x, temperature=2.0, out=y)) == 1
        given = driver.parameters
        assert [given[i] for i in (0, 1, 5, 10, 11)] == [address(x), 4000, 8, address(y), 4000]
        n, team = (given[i] & 0xFFFFFFFF for i in (6, 7))
        how = geometry.rows_launch(1000, "f4", True)
        assert (n, team) == (1000, how.team)
        high, low = (struct.unpack("f", struct.pack("I", given[i] & 0xFFFFFFFF))[0] for i in (8, 9))
        assert high + low == pytest.approx(np.log2(np.e) / 2, rel=1e-12)
        assert (driver.grid, driver.block, driver.device) == (how.blocks(8), how.threads, LAST)
    driver.keep(0)


def test_rows_that_stay_in_shared_memory():
    room, before = device_calls.room_of(LAST), driver.allowances
    assert room == geometry.Room(132, 227 << 10, 113 << 10)
    driver.keep(11)
    for n in 20_000, 20_000, 24_000, 50_000:  # two blocks on a multiprocessor, or one
        x, y = there((140, n)), there((140, n))
        assert launches(lambda x=x, y=y: numbasoft.softmax(x, out=y)) == 1
        how = geometry.resident_launch(n, "f4", True, room)
        given = driver.parameters
        assert [given[i] for i in (0, 1, 9, 10)] == [address(x), 4 * n, address(y), 4 * n]
        assert [given[i] & 0xFFFFFFFF for i in (5, 6)] == [n, how.slots]
        assert (driver.grid, driver.block, driver.shared) == (140, how.threads, how.shared)
        assert how.threads == (512 if n < 50_000 else 1024) and how.shared == 4 * n
    driver.keep(0)
    # the kernel has 32 bytes of its own, says the driver; it is asked once
    assert (driver.allowances - before, driver.allowed) == (1, (227 << 10) - 32)
    numbasoft.softmax_backward(y, y, out=x)  # twice 200,000 bytes
    small = there((140, 24_064), "f2")  # 47 KiB, which with the kernel's own are more than 48
    numbasoft.softmax(small, out=small)
    assert (driver.allowances - before, driver.shared) == (2, 48_128)
    few, many = there((131, 20_000)), there((132, 20_000))
    assert launches(lambda: numbasoft.softmax(few, out=few)) == 3
    assert launches(lambda: numbasoft.softmax(many, out=many)) == 1
    assert launches(lambda: numbasoft.softmax_backward(many, many, out=many)) == 1
    assert launches(lambda: numbasoft.softmax_backward(y, y, out=x)) == 3
    assert driver.allowances - before == 3


def test_a_draw_gets_its_key():
    x = there((8, 1000))
    numbasoft.sample(x, rng=0)
    driver.keep(13)
    for seed in range(6):  # keys of either sign
        assert launches(lambda seed=seed: numbasoft.sample(x, top_k=5, rng=seed)) == 1
        key = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        assert (driver.parameters[4], driver.parameters[5]) == (key, 5)
        assert (driver.grid, driver.block) == (8, geometry.draw_launch(1000, "f4")[0])
    driver.keep(0)


def test_a_fit_launches_five_kernels_a_step_with_numbers_of_its_own(monkeypatch):
    x, target, stream = there((8, 1000)), there(8, "i8"), cuda.stream()
    seen = []

    def minimum(at, rows):
        first = device_calls.run

        def one_by_one(prepared, addresses, work):
            moments, *sums = prepared.steps
            driver.keep(9)
            first(prepared._replace(steps=(moments,)), addresses, work)
            driver.keep(0)
            seen.append(driver.parameters)
            first(prepared._replace(steps=tuple(sums)), addresses, work)

        monkeypatch.setattr(device_calls, "run", one_by_one)
        for b, unit in (math.inf, 1.0), (0.0, 2.0), (0.3, 0.25):
            before = driver.launches
            assert at(b, unit) == (0, 0)
            assert driver.launches == before + 5 and driver.stream == int(stream.handle)
            numbers = [struct.unpack("d", struct.pack("Q", v))[0] for v in seen[-1][6:9]]
            assert numbers == [unit, *elementary.power_scale(b)]
        return rows

    with pytest.raises(ValueError, match="logits are equal"):  # nothing runs: all sums are 0
        numbasoft.fit_temperature(x, target)
    assert fits.fit(MOMENTS, minimum, x, target, -1, -100, stream) == 8
    assert [v[0] for v in seen] == [address(x)] * 3 and seen[0][1:4] == [4000, 8, 1000]


@pytest.mark.parametrize("name", calls())
def test_repeated_calls_only_launch(name):
    call = calls()[name]
    count = launches(call)
    assert count == (3 if "three" in name else 1)
    entered = []

    def seen(frame, event, _):
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(seen)
    try:
        again = launches(call)
    finally:
        sys.setprofile(None)
    assert again == count
    assert "describe" not in entered and "_prepare_args" not in entered
    # host time in a number that is the same on every machine: Python functions entered
    assert len(entered) <= 40 + 45 * LAST, entered


def test_other_arrays_of_the_same_kind_get_a_launch_of_their_own():
    first, second, y = there((4, 300)), there((4, 300)), there((4, 300))
    numbasoft.softmax(first, out=y)
    driver.keep(1)
    numbasoft.softmax(second, out=y)
    assert driver.parameters[0] == address(second)
    driver.keep(0)


def test_another_thread_has_no_context_at_first():
    x, y = there((4, 300)), there((4, 300))
    numbasoft.softmax(x, out=y)
    errors = []

    def work():
        try:
            for _ in range(3):
                numbasoft.softmax(x, out=y)
        except BaseException as error:
            errors.append(error)

    before = driver.launches
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and driver.launches == before + 3 and driver.device == LAST


def test_streams():
    x, y = there((4, 300)), there((4, 300))
    stream, other = cuda.stream(), cuda.stream()
    for _ in range(2):
        for given in stream, other, int(other.handle):
            numbasoft.softmax(x, out=y, stream=given)
            assert driver.stream == int(getattr(given, "handle", given))
        numbasoft.softmax(x, out=y)
        assert not driver.stream


def test_arrays_of_derived_classes_are_of_the_library(monkeypatch):
    class Theirs:
        pass

    class Derived(Theirs):
        pass

    for name, kind, home in ("torch", "Tensor", arrays.TORCH), ("cupy", "ndarray", arrays.CUPY):
        assert arrays.home_of(Derived()) is arrays.OTHER
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            patch.setitem(sys.modules, name, SimpleNamespace(**{kind: Theirs}))
            assert arrays.home_of(Derived()) is home


class ByDLPack:
    """An array of a library that speaks nothing else, on the first device, and the streams that were to wait for it."""

    def __init__(self, shape):
        self.array, self.streams = np.zeros(shape, "f4"), []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


def test_streams_wait_for_arrays_that_speak_dlpack():
    with cuda.gpus[0]:
        stream = cuda.stream()
    handle = int(stream.handle)
    x, y = ByDLPack((4, 300)), ByDLPack((4, 300))
    for given, waiting in (None, 1), (stream, handle), (2, 2):
        assert launches(lambda given=given: numbasoft.softmax(x, out=y, stream=given)) == 1
        assert x.streams == y.streams == [-1, waiting]
        x.streams.clear(), y.streams.clear()
    driver.capture(handle)
    try:  # a graph begins when that is done
        numbasoft.softmax(x, out=y, stream=stream)
    finally:
        driver.capture(None)
    assert x.streams == y.streams == [-1]


def test_streams_wait_for_the_stream_of_an_interface(monkeypatch):
    x, y, of_x, stream = there((4, 300)), there((4, 300)), cuda.stream(), cuda.stream()
    x = SimpleNamespace(__cuda_array_interface__=x.__cuda_array_interface__ | {"stream": int(of_x.handle)})
    seen, event = [], cuda.event

    def recorded(timing):
        seen.append(timing)
        return event(timing)

    monkeypatch.setattr(cuda, "event", recorded)
    for given, captured, waits in (of_x, None, 0), (stream, None, 1), (None, None, 1), (stream, stream, 0):
        seen.clear()
        driver.capture(captured and int(captured.handle))
        try:
            numbasoft.softmax(x, out=y, stream=given)
        finally:
            driver.capture(None)
        assert len(seen) == waits


def test_overlap_is_found_in_repeated_calls_too():
    memory, out = there((5, 300)), there((4, 300))
    x = memory[:4]
    for _ in range(2):
        numbasoft.softmax(x, out=out)
        with pytest.raises(ValueError, match="out overlaps x"):
            numbasoft.softmax(x, out=memory[1:])
        assert launches(lambda: numbasoft.softmax(x, out=x)) == 1
    x, out = there((5, 1)), there((5, 1))
    for _ in range(2):
        numbasoft.logsumexp(x, keepdims=True, out=out)
        with pytest.raises(ValueError, match="out shares memory"):
            numbasoft.logsumexp(x, keepdims=True, out=x)


def test_what_is_refused_stays_refused():
    x, y = there((2, 3, 300)), there((2, 3, 300))
    numbasoft.softmax(x, 1, out=y)
    for axis in True, 1.0:
        with pytest.raises(TypeError, match="axis is"):
            numbasoft.softmax(x, axis, out=y)
    numbasoft.softmax(x, (1, 2), out=y)
    with pytest.raises(TypeError, match="axis is"):
        numbasoft.softmax(x, (True, 2), out=y)
    with pytest.raises(TypeError, match="stream is 'main'"):
        numbasoft.softmax(x, 1, out=y, stream="main")


@pytest.mark.parametrize(("shape", "axis"), [((2**31,), 0), ((2, 2**31), 0), ((2**31 - 1,), 0)], ids=str)
def test_rows_that_kernels_cannot_count(shape, axis):
    at = address(there(1))

    class Huge:
        def __init__(self, offset):
            self.__cuda_array_interface__ = {
                "shape": shape, "typestr": "<f2", "data": (at + offset, False), "version": 3,
            }  # fmt: skip

    x, out = Huge(0), Huge(2**34)
    if max(shape) == 2**31:
        with pytest.raises(ValueError, match="x has 2147483648 elements in a row, or rows side by side"):
            numbasoft.softmax(x, axis, out=out)
    else:
        assert launches(lambda: numbasoft.softmax(x, axis, out=out)) == 3
    if shape[axis] > 2**30:
        for draw in numbasoft.sample, numbasoft.gumbel_softmax:
            with pytest.raises(ValueError, match=f"logits has {shape[axis]} elements in a row"):
                draw(x, axis=axis)


def test_working_memory_is_kept_and_belongs_to_the_stream():
    x, y, stream = there((2, 300_000)), there((2, 300_000)), cuda.stream()
    driver.keep(8)
    work = {}
    for given in (None, stream) * 2:
        numbasoft.log_softmax(x, out=y, stream=given)
        numbasoft.logsumexp(x, out=there(2), stream=given)
        work.setdefault(given, set()).add(driver.parameters[5])
    driver.keep(0)
    assert all(len(places) == 1 for places in work.values())
    assert work[None] != work[stream]


def test_memory_of_graphs_is_their_own(monkeypatch):
    # a graph is launched again: its memory must not be another's by then, nor that of calls on its stream
    x, lse, stream = there((2, 300_000)), there(2), cuda.stream()
    apart, out = there((200, 3, 2)), there((200, 3, 2))
    numbasoft.logsumexp(x, out=lse, stream=stream)
    numbasoft.softmax(apart, (0, 2), out=out, stream=stream)
    handle, work = int(stream.handle), []
    monkeypatch.setattr(device_calls, "of_graphs", [])
    driver.keep(8)
    try:
        for captured in handle, handle, None:
            driver.capture(captured)
            numbasoft.logsumexp(x, out=lse, stream=stream)
            work.append(driver.parameters[5])
        driver.capture(handle)
        numbasoft.softmax(apart, (0, 2), out=out, stream=stream)
        monkeypatch.setattr(arrays.CuPy, "empty", arrays.Numba.empty)
        like, keep = SimpleNamespace(home=arrays.CUPY, ordinal=LAST), []
        device_calls.fresh((100,), "i8", like, handle, keep)  # else CuPy's pool would give it away again
    finally:
        driver.capture(None)
        driver.keep(0)
    assert len(set(work)) == 3
    assert len(device_calls.of_graphs) == 5 and not keep


def test_small_launches_warn_of_nothing():
    # Numba warns of every grid below 128 blocks
    x, y = there((2, 77)), there((2, 77))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", RuntimeWarning)
        numbasoft.softmax(x, out=y)
        numbasoft.softmax(x, 0, out=y)


def test_arrays_of_the_other_device():
    if LAST == 0:
        return  # another run of this file has two devices
    x, y = there((4, 300)), there((4, 300))
    with cuda.gpus[0]:
        other = there((4, 300))
        for _ in range(2):
            for given, device in ((x, 1), (other, 0)):
                out = y if device else cuda.device_array_like(other)
                numbasoft.softmax(given, out=out)
                assert driver.device == device
        with pytest.raises(ValueError, match="out is on device 1 and x on device 0"):
            numbasoft.softmax(other, out=y)
        stream = cuda.stream()
        with pytest.raises(ValueError, match="stream belongs to another device than x"):
            numbasoft.softmax(x, stream=stream)
        assert cuda.get_current_device().id == 0
        for name in "softmax", "log_softmax":
            for given, device in ((x, 1), (other, 0)):
                y = getattr(literal, name)(given)
                assert (driver.device, arrays.ordinal_of(address(y))) == (device, device)
        assert literal.softmax(x[:0]).shape == (0, 300)
        assert cuda.get_current_device().id == 0


@pytest.mark.parametrize("storage", ["f2", "b2", "f4", "f8"])
def test_the_sanitizers_see_every_kernel(storage, monkeypatch):
    # kernels are made, but not compiled
    made = set()

    class Kernel:
        def __getitem__(self, configuration):
            return lambda *arguments: None

        def typed(self, arguments):
            return arguments

    def compiled_(factory, options, threads, ordinal):
        made.add((factory, options, threads))
        return Kernel()

    monkeypatch.setattr(device_calls, "compiled", compiled_)
    for module in device_calls, elementwise, divergence, class_losses, sampling, fits:
        for name, steps in list(vars(module).items()):
            if name.endswith("steps") and hasattr(steps, "__wrapped__"):
                monkeypatch.setattr(module, name, steps.__wrapped__)
    every_kernel.call_every_kernel(storage)
    all_kernels = *compiled.kernels(storage), *compiled.losses(storage)
    wanted = {(k.factory, k.options, k.threads) for k in all_kernels}
    assert not wanted - made
