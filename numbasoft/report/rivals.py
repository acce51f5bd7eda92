"""The rivals: one table of libraries that every suite compares with.

A rival's `prepare` gets a workload's arrays and returns a call without arguments (the timed part) and
a function that turns what the call returned into a NumPy array. What a library needs to have ready
(tensors, sessions, compiled functions) is made in `prepare`, outside the clock. NotImplementedError
says that a library lacks the function or the dtype.

Like with like: `given` tells whether the rival writes into an output that was there before. A rival that
does is compared with numbasoft's `out=`, one that allocates with numbasoft's plain call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Callable

import numpy as np

from .workloads import BACKWARD, Workload

Call = Callable[[], object]
Read = Callable[[object], np.ndarray]


class Rival:
    """A library, in a process of its own, held to `threads` threads."""

    name: str
    packages: tuple[str, ...] = ()  # distributions that must be installed, the first named in the tables
    given = False

    def __init__(self, threads: int):
        self.threads = threads

    def prepare(self, work: Workload, arrays: tuple[np.ndarray, ...]) -> tuple[Call, Read]:
        raise NotImplementedError(f"{self.name} has nothing for {work.name}")

    @classmethod
    def missing(cls) -> str | None:
        """The first of the packages that is not installed."""
        return next((p for p in cls.packages if version(p) is None), None)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Numbasoft(Rival):
    name = "numbasoft"

    def prepare(self, work, arrays):
        import numbasoft

        function, axis = getattr(numbasoft, work.function), work.axis
        return lambda: function(*arrays, axis=axis), np.asarray


class NumbasoftGiven(Rival):
    name = "numbasoft out="
    given = True

    def prepare(self, work, arrays):
        import numbasoft

        function, axis = getattr(numbasoft, work.function), work.axis
        out = np.zeros(work.out_shape, arrays[0].dtype)
        return lambda: function(*arrays, axis=axis, out=out), np.asarray


class Copy(Rival):
    """The limit: a parallel copy that moves as many bytes as the workload does, half in and half out."""

    name = "parallel copy"
    given = True

    def prepare(self, work, arrays):
        parallel = parallel_copy(self.threads)
        source = np.resize(arrays[0].reshape(-1).view("u1"), work.bytes_moved // 2)
        target = np.zeros_like(source)
        # A thread costs microseconds to wake: one thread copies 256 KiB no later than two.
        if source.size < 1 << 18:
            return lambda: np.copyto(target, source), lambda _: target
        return lambda: parallel(source, target), lambda _: target


class NumPy(Rival):
    """The stable formula as one writes it in NumPy, with in-place steps. 16-bit dtypes go through float32."""

    name = "NumPy"
    packages = ("numpy",)

    def prepare(self, work, arrays):
        axis, dtype = work.axis, arrays[0].dtype

        def softmax(x):
            e = x - x.max(axis, keepdims=True)
            np.exp(e, out=e)
            e /= e.sum(axis, keepdims=True)
            return e

        def log_softmax(x):
            y = x - x.max(axis, keepdims=True)
            y -= np.log(np.exp(y).sum(axis, keepdims=True))
            return y

        def logsumexp(x):
            m = x.max(axis, keepdims=True)
            e = x - m
            np.exp(e, out=e)
            return (m + np.log(e.sum(axis, keepdims=True))).squeeze(axis)

        def softmax_backward(g, y):
            d = g * y
            np.subtract(g, d.sum(axis, keepdims=True), out=d)
            d *= y
            return d

        def log_softmax_backward(g, log_y):
            d = np.exp(log_y)
            d *= -g.sum(axis, keepdims=True)
            d += g
            return d

        def logsumexp_backward(g, x, lse):
            d = x - lse
            np.exp(d, out=d)
            d *= g
            return d

        return _widened(locals()[work.function], arrays, dtype), np.asarray


class SciPy(Rival):
    name = "SciPy"
    packages = ("scipy",)

    def prepare(self, work, arrays):
        import scipy.special

        if work.function in BACKWARD:
            raise NotImplementedError("scipy.special has no backward passes")
        function = getattr(scipy.special, work.function)
        return _widened(lambda x: function(x, axis=work.axis), arrays, arrays[0].dtype), np.asarray


class PyTorch(Rival):
    """Forward from the public functions; backward by the bare kernels that autograd calls, without autograd.

    logsumexp has no such kernel: its backward is the expression that autograd evaluates.
    """

    name = "PyTorch"
    packages = ("torch",)

    def prepare(self, work, arrays):
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        axis = work.axis

        def tensor(array):
            if array.dtype.name == "bfloat16":
                return torch.from_numpy(array.view("i2")).view(torch.bfloat16)
            return torch.from_numpy(array)

        def read(result):
            if result.dtype == torch.bfloat16:
                return result.view(torch.int16).numpy().view(arrays[0].dtype)
            return result.numpy()

        tensors = [tensor(a) for a in arrays]
        dtype = tensors[0].dtype
        call = {
            "softmax": lambda x: torch.softmax(x, axis),
            "log_softmax": lambda x: torch.log_softmax(x, axis),
            "logsumexp": lambda x: torch.logsumexp(x, axis),
            "softmax_backward": lambda g, y: torch._softmax_backward_data(g, y, axis, dtype),
            "log_softmax_backward": lambda g, y: torch._log_softmax_backward_data(g, y, axis, dtype),
            "logsumexp_backward": lambda g, x, lse: g * (x - lse).exp(),
        }[work.function]
        return lambda: call(*tensors), read


class OnnxRuntime(Rival):
    """One node, its input and output bound to buffers that were there before."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")
    given = True

    def prepare(self, work, arrays):
        import onnx
        import onnxruntime

        if work.function in BACKWARD:
            raise NotImplementedError("ONNX has no backward passes")
        (x,) = arrays
        node_type = {"softmax": "Softmax", "log_softmax": "LogSoftmax", "logsumexp": "ReduceLogSumExp"}[
            work.function
        ]
        options = (
            {"axes": [work.axis], "keepdims": 0} if node_type == "ReduceLogSumExp" else {"axis": work.axis}
        )
        element = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(node_type, ["x"], ["y"], **options)],
            work.function,
            [onnx.helper.make_tensor_value_info("x", element, x.shape)],
            [onnx.helper.make_tensor_value_info("y", element, work.out_shape)],
        )
        # Versions that every ONNX Runtime of the last years reads; ReduceLogSumExp still has `axes` as an attribute.
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.threads
        settings.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class
            if "NOT_IMPLEMENTED" in str(error) or "NotImplemented" in type(error).__name__:
                raise NotImplementedError(f"its CPU has no {node_type} of {work.dtype}") from None
            raise
        binding = session.io_binding()
        source = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        target = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(work.out_shape, x.dtype))
        binding.bind_ortvalue_input("x", source)
        binding.bind_ortvalue_output("y", target)
        return lambda: session.run_with_iobinding(binding), lambda _: target.numpy()


class Jax(Rival):
    name = "JAX"
    packages = ("jax", "jaxlib")

    def __init__(self, threads):
        super().__init__(threads)
        if hasattr(os, "sched_setaffinity"):  # it has as many threads as it finds cores, and no other setting
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    def prepare(self, work, arrays):
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        axis = work.axis
        function = jax.jit(
            {
                "softmax": lambda x: jax.nn.softmax(x, axis),
                "log_softmax": lambda x: jax.nn.log_softmax(x, axis),
                "logsumexp": lambda x: jax.nn.logsumexp(x, axis),
                "softmax_backward": lambda g, y: y * (g - (g * y).sum(axis, keepdims=True)),
                "log_softmax_backward": lambda g, y: g - jnp.exp(y) * g.sum(axis, keepdims=True),
                "logsumexp_backward": lambda g, x, lse: g * jnp.exp(x - lse),
            }[work.function]
        )
        on_device = [jnp.asarray(a) for a in arrays]
        return lambda: function(*on_device).block_until_ready(), np.asarray


def _widened(function, arrays, dtype):
    """The call as a NumPy user writes it for 16 bits: widen, compute, round. NumPy's own sums would be wrong."""
    if dtype.itemsize > 2:
        return lambda: function(*arrays)
    return lambda: function(*(a.astype("f4") for a in arrays)).astype(dtype)


@functools.cache
def parallel_copy(threads):
    """A kernel that copies bytes, a part on each thread, as fast as the C library can."""
    import numba

    from .. import jit

    memmove = ctypes.memmove
    jit.launch()

    @jit.parallel_kernel
    def copy(source, target):
        for part in numba.prange(threads):
            start, stop = source.size * part // threads, source.size * (part + 1) // threads
            memmove(target.ctypes.data + start, source.ctypes.data + start, stop - start)

    return copy


OURS = (Numbasoft, NumbasoftGiven)
RIVALS = (NumPy, SciPy, PyTorch, OnnxRuntime, Jax)
EVERYONE = {rival.name: rival for rival in (*OURS, Copy, *RIVALS)}
