"""asv: how long a call takes, and how far it is from a copy of the same bytes."""

import functools
import statistics
import time

import numba
import numpy as np

import numbasoft
from numbasoft import jit, literal
from numbasoft.report import rivals, worker, workloads

THREADS = {"one": 1, "all": jit.processors()}
# (1, 10) has a benchmark of its own; of the rest asv takes what the report takes, and every dtype and layout class.
TRACKED = {
    work.name: work
    for work in (
        *workloads.REPORT[1:],
        *(workloads.Workload(f, (256, 1000), d) for f in workloads.FUNCTIONS for d in workloads.DTYPES),
        workloads.Workload("softmax", (1_000_000, 10), "float64"),
        workloads.Workload("softmax", (8, 16, 1024, 1024)),
        workloads.Workload("softmax", (256, 1000), spread=30),  # with subnormal probabilities
        workloads.Workload("log_softmax", (1000, 4096), axis=0),
        workloads.Workload("softmax_backward", (1000, 4096), axis=0),
        *(work for work in workloads.LOSS if work.bytes_moved < 1 << 27),
    )
}


def prepared(work, threads, library=None):
    """A call of one workload that is compiled and has its memory.

    NotImplementedError in a setup is how asv is told that a benchmark is not for a commit: older ones lack functions.
    """
    if not hasattr(numbasoft, work.function):
        raise NotImplementedError(f"this commit has no {work.function}")
    numba.set_num_threads(threads)
    library = rivals.ours(work) if library is None else library
    call, _ = library(threads).prepare(work, work.inputs())
    call()
    return call


class Speed:
    """Every function, dtype, axis and layout class, into a given output where the function takes one."""

    params = (list(TRACKED), list(THREADS))
    param_names = ("workload", "threads")
    warmup_time = 0.1

    def setup(self, name, threads):
        self.call = prepared(TRACKED[name], THREADS[threads])

    def time_call(self, name, threads):
        self.call()


class Masked:
    """Attention weights with a causal mask: one for all heads, or of all elements."""

    params = (["of all heads", "of all elements"], list(THREADS))
    param_names = ("mask", "threads")
    warmup_time = 0.1

    def setup(self, mask, threads):
        numba.set_num_threads(THREADS[threads])
        (x,) = workloads.Workload("softmax", (8, 1024, 1024)).inputs()
        where = np.tri(1024, dtype=bool)
        where = where if mask == "of all heads" else np.tile(where, (8, 1, 1))
        self.call = functools.partial(
            numbasoft.softmax, x, temperature=8.0, where=where, out=np.empty_like(x)
        )
        self.call()

    def time_call(self, mask, threads):
        self.call()


class Copy:
    """The time of a call over that of a parallel copy of the same bytes, measured in turns: 1 is the limit."""

    params = ("softmax float32 4096x1000", "softmax float32 32768x1000", "softmax float32 256x128256")
    param_names = ("workload",)
    unit = "times the copy"

    def setup(self, name):
        work, threads = TRACKED[name], THREADS["all"]
        self.calls = [prepared(work, threads, library) for library in (rivals.NumbasoftGiven, rivals.Copy)]

    def track_ratio_to_copy(self, name):
        turns = [[worker.time_call(call, 0.1)["best"] for call in self.calls] for _ in range(7)]
        return statistics.median(ours / copy for ours, copy in turns)


class Latency:
    """A call of so little work that what it costs is Python. asv would time single calls, which the clock cannot."""

    params = (["softmax", "log_softmax", "logsumexp", "softmax_backward"], ["float32", "float64"])
    param_names = ("function", "dtype")
    unit = "seconds"

    def setup(self, function, dtype):
        self.call = prepared(workloads.Workload(function, (1, 10), dtype), 1, rivals.Numbasoft)

    def track_one_row_of_ten(self, function, dtype):
        return worker.time_call(self.call, 0.5)["best"]


FEW_NUMBERS = {
    "one axis": (np.arange(10.0),),
    "list of ints": (list(range(10)),),
    "float16": (np.arange(10.0).astype(np.float16),),
    "10x4 axis 0": (np.arange(40.0).reshape(10, 4), 0),
}


class LatencyOfOthers:
    """As ``Latency``, for what is no matrix of floats along its last axis."""

    params = (["softmax", "log_softmax", "logsumexp"], list(FEW_NUMBERS))
    param_names = ("function", "input")
    unit = "seconds"

    def setup(self, function, given):
        numba.set_num_threads(1)
        self.call = functools.partial(getattr(numbasoft, function), *FEW_NUMBERS[given])
        self.call()

    def track_few_numbers(self, function, given):
        return worker.time_call(self.call, 0.5)["best"]


FEW_ROWS = np.arange(40, dtype=np.float32).reshape(4, 10) % 7
CALLS_OF_FEW = {
    "softmax with a mask": ("softmax", {"x": FEW_ROWS, "where": FEW_ROWS < 5}),
    "sigmoid": ("sigmoid", {"x": FEW_ROWS}),
    "cross_entropy": ("cross_entropy", {"logits": FEW_ROWS, "target": np.arange(4)}),
    "cross_entropy_value_and_grad": (
        "cross_entropy_value_and_grad",
        {"logits": FEW_ROWS, "target": np.arange(4)},
    ),
    "cross_entropy with weights": (
        "cross_entropy",
        {"logits": FEW_ROWS, "target": np.arange(4), "weight": np.ones(10)},
    ),
    "nll_loss": ("nll_loss", {"log_probs": -FEW_ROWS, "target": np.arange(4)}),
}


class LatencyOfFewRows:
    """As ``Latency``, of four rows of ten."""

    params = tuple(CALLS_OF_FEW)
    param_names = ("call",)
    unit = "seconds"

    def setup(self, call):
        numba.set_num_threads(1)
        name, given = CALLS_OF_FEW[call]
        self.call = functools.partial(getattr(numbasoft, name), **given)
        self.call()

    def track_four_rows(self, call):
        return worker.time_call(self.call, 0.5)["best"]


class AfterAPause:
    """A call some milliseconds after the one before, when threads sleep: their waking counts, as in most programs."""

    params = (["softmax", "cross_entropy_value_and_grad"], ["32x1000", "64x1000", "256x1000"])
    param_names = ("function", "shape")
    unit = "seconds"
    PAUSE, CALLS = 2e-3, 200

    def setup(self, function, shape):
        rows, n = map(int, shape.split("x"))
        self.call = prepared(workloads.Workload(function, (rows, n)), THREADS["all"], rivals.Numbasoft)

    def track_one_call(self, function, shape):
        taken = []
        for _ in range(self.CALLS):
            time.sleep(self.PAUSE)
            start = time.perf_counter()
            self.call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)


class Picked:
    """The negative log-likelihood of the pixels of eight images, whose 21 classes lie along axis 1."""

    params = tuple(THREADS)
    param_names = ("threads",)
    warmup_time = 0.1

    def setup(self, threads):
        numba.set_num_threads(THREADS[threads])
        (log_p,) = workloads.Workload("softmax", (8, 21, 256, 256)).inputs()
        target = np.arange(8 * 256 * 256).reshape(8, 256, 256) % 21
        self.call = functools.partial(numbasoft.nll_loss, log_p, target, axis=1)
        self.call()

    def time_call(self, threads):
        self.call()


class LatencyInside:
    """As ``Latency``, in a caller's own compiled function."""

    params = ("softmax", "log_softmax")
    param_names = ("function",)
    unit = "seconds"
    TIMES = 1000

    def setup(self, function):
        if not hasattr(numbasoft, "overloads"):
            raise NotImplementedError("this commit has no functions for compiled code")  # as in ``prepared``
        called = getattr(numbasoft, function)

        @numba.njit
        def many(x, times):
            total = 0.0
            for _ in range(times):
                total += called(x)[0]
            return total

        self.call = functools.partial(many, np.arange(10.0), self.TIMES)
        self.call()

    def track_ten_numbers(self, function):
        return worker.time_call(self.call, 0.5)["best"] / self.TIMES


def literal_call(function, work):
    (x,) = work.inputs()
    function(x)
    return lambda: function(x)


STEPS = {
    "NumPy, stable": lambda work: prepared(work, 1, rivals.NumPy),
    "literal, naive": lambda work: literal_call(literal.softmax_naive, work),
    "literal, stable": lambda work: literal_call(literal.softmax_stable, work),
    "literal, four loop nests": lambda work: literal_call(literal.softmax, work),
    "production": lambda work: prepared(work, 1, rivals.Numbasoft),
}


class Ladder:
    """From the naive formula to the production kernel, on the same array and one thread."""

    params = tuple(STEPS)
    param_names = ("step",)
    warmup_time = 0.1

    def setup(self, step):
        numba.set_num_threads(1)
        self.call = STEPS[step](workloads.Workload("softmax", (4096, 1000)))

    def time_softmax(self, step):
        self.call()
