"""asv on a GPU: the twins of speed.py and costs.py. Without a CUDA device each is skipped, with the reason.

Times are of single calls between two events, and inputs that fit stay in the second cache: good for comparing
commits. ``python -m benchmarks.gpu`` empties it, for comparing with other libraries.
"""

import statistics
import tempfile

import numpy as np

import numbasoft
from numbasoft.report import accuracy, worker, workloads

from .costs import PRINT, REPEATS, seconds

CALLS = 20
LAST_AXIS = ((256, 1000), (32768, 1000), (65536, 64), (8, 262144))
TRACKED = {
    work.name: work
    for work in (
        *(workloads.Workload(f, (4096, 1000), d) for f in workloads.FUNCTIONS for d in workloads.DTYPES),
        *(workloads.Workload("softmax", shape) for shape in LAST_AXIS),
        workloads.Workload("softmax", (1000, 4096), axis=0),
        workloads.Workload("softmax_backward", (1000, 4096), axis=0),
        workloads.Workload("log_softmax", (4, 1000, 64, 64), axis=1),
        *workloads.LOSS,
    )
}
CALL = (
    "import numpy as np, numbasoft, time; from numba import cuda; x = cuda.to_device(np.ones((2, 9), 'f4')); "
    "t = time.perf_counter(); numbasoft.softmax(x); cuda.synchronize(); "
)


def cuda_module():
    """numba.cuda, where there is a device to run on; else NotImplementedError, by which asv leaves a benchmark out."""
    try:
        from numbasoft import cuda
    except ImportError:
        raise NotImplementedError("this commit has no CUDA kernels") from None
    missing = cuda.reason()
    if missing:
        raise NotImplementedError(missing[1])
    from numba import cuda

    return cuda


def prepared(work):
    """A call of one workload on device arrays, into a given output where the function takes one."""
    cuda = cuda_module()
    if not hasattr(numbasoft, work.function):
        raise NotImplementedError(f"this commit has no {work.function}")
    arrays = [cuda.to_device(a) for a in work.inputs()]
    function, options = getattr(numbasoft, work.function), {"axis": work.axis}
    result = function(*arrays, **options)
    if work.takes_out:
        options["out"] = (
            result[1] if isinstance(result, tuple) else result
        )  # of a loss and its gradient the latter
    return lambda: function(*arrays, **options)


def event_seconds(call):
    """The median time on the device of one call."""
    cuda = cuda_module()
    times = []
    for _ in range(CALLS):
        start, end = cuda.event(), cuda.event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cuda.event_elapsed_time(start, end) / 1e3)
    return statistics.median(times)


class GpuSpeed:
    """Every function, dtype, axis and layout class, into a given output where the function takes one."""

    params = tuple(TRACKED)
    param_names = ("workload",)
    unit = "seconds"

    def setup(self, name):
        self.call = prepared(TRACKED[name])

    def track_call(self, name):
        return event_seconds(self.call)


OTHERS = {
    "sample": lambda x, target: numbasoft.sample(x, rng=1),
    "sample, filtered": lambda x, target: numbasoft.sample(x, rng=1, top_k=50, top_p=0.9),
    "perplexity": lambda x, target: numbasoft.perplexity(x, target),
    "fit_temperature": lambda x, target: numbasoft.fit_temperature(x, target),
}


class GpuOthers:
    """What speed.py has no twin of; of a fit also what the host does while the device waits for it."""

    params = (list(OTHERS), ["float32", "bfloat16"], ["4096x1000", "64x128256"])
    param_names = ("call", "dtype", "shape")
    unit = "seconds"

    def setup(self, name, dtype, shape):
        cuda, function = cuda_module(), name.partition(",")[0]
        if not hasattr(numbasoft, function):
            raise NotImplementedError(f"this commit has no {function}")
        work = workloads.Workload("softmax", tuple(map(int, shape.split("x"))), dtype)
        (host,) = work.inputs()
        target = numbasoft.sample(host, temperature=2.0, rng=1)  # so that there is a temperature to find
        x, classes = cuda.to_device(host), cuda.to_device(target)
        self.call = lambda: OTHERS[name](x, classes)
        try:
            self.call()
        except TypeError as error:  # a commit in which it takes no device arrays
            raise NotImplementedError(str(error)) from None

    def track_call(self, name, dtype, shape):
        return event_seconds(self.call)


class GpuCopy:
    """The time of a call over that of a copy of the same bytes on the device: 1 is the limit."""

    params = ("softmax float32 32768x1000", "softmax float32 65536x64", "softmax float32 8x262144")
    param_names = ("workload",)
    unit = "times the copy"

    def setup(self, name):
        cuda, work = cuda_module(), TRACKED[name]
        source = cuda.to_device(np.resize(np.arange(251, dtype=np.uint8), work.bytes_moved // 2))
        target = cuda.device_array_like(source)
        self.calls = prepared(work), lambda: target.copy_to_device(source)

    def track_ratio_to_copy(self, name):
        ours, copy = (event_seconds(call) for call in self.calls)
        return ours / copy


class GpuLatency:
    """Host time of a call on 8 rows of 1000, the launch included."""

    params = (["softmax", "log_softmax", "logsumexp", "softmax_backward"], ["float32", "float64"])
    param_names = ("function", "dtype")
    unit = "seconds"

    def setup(self, function, dtype):
        self.call = prepared(workloads.Workload(function, (8, 1000), dtype))

    def track_host_time(self, function, dtype):
        return worker.time_call(self.call, 0.2)["best"]


class GpuLadder:
    """The literal kernels beside the production kernel, on the same array."""

    params = ("literal, four kernels", "production")
    param_names = ("step",)
    unit = "seconds"

    def setup(self, step):
        cuda, work = cuda_module(), workloads.Workload("softmax", (4096, 1000))
        if step == "production":
            self.call = prepared(work)
            return
        from numbasoft.cuda import literal

        x = cuda.to_device(*work.inputs())
        self.call = lambda: literal.softmax(x)

    def track_softmax(self, step):
        self.call()
        return event_seconds(self.call)


class GpuAccuracy:
    """The largest error in ULP over the kinds of rows of numbasoft.report.accuracy."""

    params = (list(workloads.FUNCTIONS), list(workloads.DTYPES))
    param_names = ("function", "dtype")
    unit = "ULP"

    def setup(self, function, dtype):
        self.cuda = cuda_module()

    def track_largest_error(self, function, dtype):
        def evaluate(name, arrays, temperature):
            given = [self.cuda.to_device(np.ascontiguousarray(a)) for a in arrays]
            return getattr(numbasoft, name)(*given, temperature=temperature).copy_to_host()

        needed = tuple(dict.fromkeys((function.removesuffix("_backward"), function)))
        records = accuracy.measure(evaluate, dtype, needed, quick=True)
        return max(
            np.inf if r["max_ulp"] is None else r["max_ulp"] for r in records if r["function"] == function
        )


class GpuMemory:
    """What calls into a given output keep on the device, over the bytes of the input."""

    params = ("softmax float32 32768x1000", "softmax float32 8x262144")
    param_names = ("workload",)
    unit = "bytes per byte of input"

    def setup(self, name):
        self.cuda = cuda_module()
        self.call, self.size = prepared(TRACKED[name]), TRACKED[name].bytes_moved / 2

    def track_kept(self, name):
        context = self.cuda.current_context()
        before = context.get_memory_info().free
        for _ in range(CALLS):
            self.call()
        self.cuda.synchronize()
        return (before - context.get_memory_info().free) / self.size


class GpuStart:
    """Seconds until the first result of a process, compiled anew and from the disk cache if there is one."""

    unit = "seconds"

    def setup(self):
        cuda_module()

    def track_first_call_cold(self):
        with tempfile.TemporaryDirectory() as empty:
            return seconds(CALL + PRINT, NUMBA_CACHE_DIR=empty)

    def track_first_call_again(self):
        return min(seconds(CALL + PRINT) for _ in range(REPEATS))
