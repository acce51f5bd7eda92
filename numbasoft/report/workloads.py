"""The workloads: one table of functions, shapes, dtypes and axes that every suite measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

FORWARD = ("softmax", "log_softmax", "logsumexp")
BACKWARD = ("softmax_backward", "log_softmax_backward", "logsumexp_backward")
FUNCTIONS = FORWARD + BACKWARD
LOSSES = ("cross_entropy_value_and_grad", "cross_entropy", "token_log_probs")
DTYPES = ("float16", "bfloat16", "float32", "float64")

POOL = 1_048_583  # a prime: repeated to fill an array, it leaves no two rows equal
SAMPLE = 1 << 19  # elements of a workload whose values are compared before it is timed
# How far two right answers may lie apart: PyTorch's float32 softmax is up to 220 ULP (1.3e-5) off.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of that name; ImportError where bfloat16 has no ml_dtypes to come from."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True)
class Workload:
    """One function on one shape; `inputs` gives the same arrays in every process."""

    function: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1
    spread: int = 3

    @cached_property
    def name(self) -> str:
        axis = "" if self.axis == -1 else f" axis {self.axis}"
        spread = "" if self.spread == 3 else f" N(0, {self.spread})"
        return f"{self.function} {self.dtype} {'x'.join(map(str, self.shape))}{axis}{spread}"

    @cached_property
    def reduced_shape(self) -> tuple[int, ...]:
        """The shape of a sum over the axis, which keeps its place with length 1."""
        shape = list(self.shape)
        shape[self.axis] = 1
        return tuple(shape)

    @cached_property
    def across(self) -> int:
        """The longest axis that is not reduced: arrays are cut along it and rows stay whole."""
        others = [a for a in range(len(self.shape)) if a != self.axis % len(self.shape)]
        return max(others, key=lambda a: self.shape[a])

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        if self.function == "cross_entropy":
            return ()
        if self.function not in ("logsumexp", "token_log_probs"):
            return self.shape
        return tuple(n for a, n in enumerate(self.shape) if a != self.axis % len(self.shape))

    @property
    def takes_out(self) -> bool:
        return self.function not in ("cross_entropy", "token_log_probs")

    @property
    def bytes_moved(self) -> int:
        """The byte model: every input read once, every output written once."""
        return self.elements_moved * dtype_of(self.dtype).itemsize

    @cached_property
    def elements_moved(self) -> int:
        """The same in elements."""
        full, reduced = math.prod(self.shape), math.prod(self.reduced_shape)
        return {
            "softmax": 2 * full,
            "log_softmax": 2 * full,
            "logsumexp": full + reduced,
            "softmax_backward": 3 * full,
            "log_softmax_backward": 3 * full,
            "logsumexp_backward": 2 * full + 2 * reduced,
            "cross_entropy_value_and_grad": 2 * full,  # and the classes of the rows, which are few bytes
            "cross_entropy": full,
            "token_log_probs": full,
        }[self.function]

    def inputs(self) -> tuple[np.ndarray, ...]:
        """Logits N(0, ``spread``), gradients N(0, 1) and any classes, seeded; what the forward pass gave comes from NumPy."""
        x = _random(self.shape, self.dtype, seed=1, spread=self.spread)
        if self.function in FORWARD:
            return (x,)
        if self.function in LOSSES:
            rows = math.prod(self.reduced_shape)
            classes = np.random.default_rng(3).integers(self.shape[self.axis], size=rows)
            return x, classes.reshape(
                [n for a, n in enumerate(self.shape) if a != self.axis % len(self.shape)]
            )
        if self.function == "logsumexp_backward":
            return _random(self.reduced_shape, self.dtype, seed=2), x, self._in_slabs(_logsumexp, x)
        forward = _softmax if self.function == "softmax_backward" else _log_softmax
        return _random(self.shape, self.dtype, seed=2), self._in_slabs(forward, x)

    def _in_slabs(self, function, x):
        """Evaluate in float64 a slab at a time, so that a large input needs no float64 copy of itself."""
        pieces = np.array_split(x, -(-x.size // SAMPLE), axis=self.across)
        results = [function(p.astype("f8"), self.axis).astype(x.dtype) for p in pieces]
        return np.concatenate(results, axis=self.across)

    def sample(self, array: np.ndarray) -> np.ndarray:
        """The part of an input or output in which values are compared, in float64; rows stay whole."""
        if array.ndim == 0:
            return array.astype("f8")
        if array.ndim < len(self.shape):
            array = np.expand_dims(array, self.axis)
        index = [slice(None)] * array.ndim
        index[self.across] = slice(max(1, SAMPLE * self.shape[self.across] // math.prod(self.shape)))
        return array[tuple(index)].astype("f8")

    def expected(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """What the sample of the output must be, from NumPy in float64."""
        if self.function == "cross_entropy":  # the mean over all rows
            x, classes = inputs
            own = np.take_along_axis(x, np.expand_dims(classes, self.axis), self.axis)
            return (self._in_slabs(_logsumexp, x).astype("f8") - own).mean()
        arrays = [self.sample(a) for a in inputs]
        functions: dict[str, Callable] = {
            "softmax": _softmax,
            "log_softmax": _log_softmax,
            "logsumexp": _logsumexp,
            "softmax_backward": lambda g, y, axis: y * (g - (g * y).sum(axis, keepdims=True)),
            "log_softmax_backward": lambda g, y, axis: g - np.exp(y) * g.sum(axis, keepdims=True),
            "logsumexp_backward": lambda g, x, lse, axis: g * np.exp(x - lse),
            "cross_entropy_value_and_grad": lambda x, k, axis: (
                _less_one(_softmax(x, axis), k, axis) / inputs[1].size
            ),
            "token_log_probs": lambda x, k, axis: np.take_along_axis(
                _log_softmax(x, axis), k.astype(int), axis
            ),
        }
        return functions[self.function](*arrays, axis=self.axis)

    def difference(self, result: np.ndarray, expected: np.ndarray) -> float:
        """The largest difference in the sample, as a part of what `TOLERANCE` allows: 1 is the limit."""
        allowed = TOLERANCE[self.dtype] * np.maximum(np.abs(expected), np.abs(expected).max(initial=1e-30))
        return float(np.max(np.abs(self.sample(result) - expected) / allowed, initial=0))


def _random(shape, dtype, *, seed, spread=1):
    return np.resize(_pool(seed, spread).astype(dtype_of(dtype)), shape)


@cache
def _pool(seed, spread):
    return np.random.default_rng(seed).standard_normal(POOL, dtype="f4") * np.float32(spread)


def _softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _logsumexp(x, axis):
    m = x.max(axis, keepdims=True)
    return m + np.log(np.exp(x - m).sum(axis, keepdims=True))


def _log_softmax(x, axis):
    return x - _logsumexp(x, axis)


def _less_one(p, classes, axis):
    np.put_along_axis(p, classes.astype(int), np.take_along_axis(p, classes.astype(int), axis) - 1, axis)
    return p


LAST_AXIS = (
    # ImageNet-like
    (1, 10), (8, 1000), (256, 1000), (4096, 1000), (32768, 1000),
    # vocabularies
    (1, 32000), (1, 128256), (64, 32000), (256, 128256), (16, 262144),
    # short rows, a square, attention
    (65536, 64), (4096, 4096), (8, 16, 1024, 1024),
)  # fmt: skip
MIXTURES = ((1_000_000, 10), (100_000, 100))  # EM and HMM code, in float64
OTHER_AXES = (
    ((1000, 4096), 0),
    ((1000, 4096), 1),
    ((32, 1000, 64, 64), 1),
    ((8, 21, 512, 512), 1),
)  # columns, segmentation

WORKLOADS = (
    *(Workload(f, shape, dtype) for f in FUNCTIONS for dtype in DTYPES for shape in LAST_AXIS),
    *(Workload(f, shape, "float64") for f in FUNCTIONS for shape in MIXTURES),
    *(Workload(f, shape, dtype, axis) for f in FUNCTIONS for dtype in DTYPES for shape, axis in OTHER_AXES),
)

LOSS = tuple(
    Workload(f, shape) for f in LOSSES for shape in ((4096, 1000), (32, 32000), (256, 128256), (65536, 64))
)

# What the report has time for. Its segmentation batch is 4 images: 32 take SciPy seconds a call.
REPORT = (
    *(
        Workload("softmax", shape)
        for shape in (
            (1, 10), (8, 1000), (256, 1000), (4096, 1000), (32768, 1000), (1, 128256), (256, 128256), (65536, 64),
            (100_000, 10),
        )
    ),
    Workload("log_softmax", (4096, 1000)),
    Workload("logsumexp", (4096, 1000)),
    Workload("softmax", (256, 1000), "float64"),
    Workload("softmax", (100_000, 100), "float64"),
    Workload("softmax", (4096, 1000), "float16"),
    Workload("softmax", (4096, 1000), "bfloat16"),
    Workload("softmax", (1000, 4096), axis=0),
    Workload("softmax", (4, 1000, 64, 64), axis=1),
    Workload("softmax", (2, 21, 512, 512), axis=1),
    *(Workload(f, (4096, 1000)) for f in BACKWARD),
    LOSS[0],
)  # fmt: skip
QUICK = (
    Workload("softmax", (1, 10)),
    Workload("softmax", (256, 1000)),
    Workload("log_softmax", (256, 1000)),
    Workload("softmax", (256, 1000), "float64"),
    Workload("softmax", (1000, 256), axis=0),
    Workload("softmax_backward", (256, 1000)),
)
LISTS = {"quick": QUICK, "report": REPORT, "losses": LOSS}
