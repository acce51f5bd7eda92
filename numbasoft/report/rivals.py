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
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from .workloads import FORWARD, LOSSES, Workload

Call = Callable[[], object]
Read = Callable[[object], np.ndarray]


class Rival(ABC):
    """A library, in a process of its own, held to `threads` threads."""

    name: str
    packages: tuple[str, ...] = ()  # distributions that must be installed, the first named in the tables
    given = False

    def __init__(self, threads: int):
        self.threads = threads

    @abstractmethod
    def prepare(self, work: Workload, arrays: tuple[np.ndarray, ...]) -> tuple[Call, Read]:
        """The timed call, and what turns its result into a NumPy array."""

    @classmethod
    def missing(cls) -> str | None:
        """What it needs and is not here: the first of the packages that is not installed."""
        return next((p for p in cls.packages if version(p) is None), None)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Numbasoft(Rival):
    name = "numbasoft"

    def prepare(self, work, arrays):
        return called(work, arrays), gradient_of if _is_fused(work) else np.asarray


class NumbasoftGiven(Rival):
    name = "numbasoft out="
    given = True

    def prepare(self, work, arrays):
        if not work.takes_out:
            raise NotImplementedError(f"{work.function} has a result too small for out=")
        out = np.zeros(work.out_shape, arrays[0].dtype)
        return called(work, arrays, out=out), lambda _: out


def called(work: Workload, arrays: tuple[np.ndarray, ...], **more: np.ndarray) -> Call:
    """numbasoft's function as one calls it; nobody writes the default axis."""
    import numbasoft

    axis = {} if work.axis == -1 else {"axis": work.axis}
    return functools.partial(getattr(numbasoft, work.function), *arrays, **axis, **more)


def ours(work: Workload) -> type[Rival]:
    """numbasoft as it is tracked: into a given output where the function takes one."""
    return NumbasoftGiven if work.takes_out else Numbasoft


def gradient_of(both) -> np.ndarray:
    """Of a loss and its gradient what can be compared element by element."""
    return np.asarray(both[1])


def _is_fused(work):
    return work.function == "cross_entropy_value_and_grad"


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

        def token_log_probs(x, classes):
            own = np.take_along_axis(x, np.expand_dims(classes, axis), axis).squeeze(axis)
            return own - logsumexp(x)

        def cross_entropy(x, classes):
            return -token_log_probs(x, classes).mean()

        def cross_entropy_value_and_grad(x, classes):
            places = np.expand_dims(classes, axis)
            p = softmax(x)
            own = np.take_along_axis(p, places, axis)
            np.put_along_axis(p, places, own - 1, axis)
            p /= classes.size
            return -np.log(own).mean(), p

        call = _widened(locals()[work.function], arrays, dtype)
        return call, gradient_of if _is_fused(work) else np.asarray


class SciPy(Rival):
    name = "SciPy"
    packages = ("scipy",)

    def prepare(self, work, arrays):
        import scipy.special

        if work.function not in FORWARD:
            raise NotImplementedError(f"scipy.special has no {work.function}")
        function = getattr(scipy.special, work.function)
        return _widened(lambda x: function(x, axis=work.axis), arrays, arrays[0].dtype), np.asarray


class PyTorch(Rival):
    """Forward from the public functions; backward by the bare kernels that autograd calls, without autograd.

    logsumexp has no such kernel: its backward is the expression that autograd evaluates. A loss and its
    gradient are what a training loop calls: the loss with autograd, and its backward.
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
        if work.function in LOSSES:
            tensors[0] = tensors[0].movedim(axis, 1)  # where PyTorch has the classes

        def value_and_grad(x, classes):
            x.grad = None
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(x.requires_grad_(True), classes)
            loss.backward()
            return x.grad.movedim(1, axis)

        call = {
            "softmax": lambda x: torch.softmax(x, axis),
            "log_softmax": lambda x: torch.log_softmax(x, axis),
            "logsumexp": lambda x: torch.logsumexp(x, axis),
            "softmax_backward": lambda g, y: torch._softmax_backward_data(g, y, axis, dtype),
            "log_softmax_backward": lambda g, y: torch._log_softmax_backward_data(g, y, axis, dtype),
            "logsumexp_backward": lambda g, x, lse: g * (x - lse).exp(),
            "cross_entropy_value_and_grad": value_and_grad,
            "cross_entropy": torch.nn.functional.cross_entropy,
            "token_log_probs": lambda x, k: torch.log_softmax(x, 1).gather(1, k.unsqueeze(1)).squeeze(1),
        }[work.function]
        return functools.partial(call, *tensors), read


class OnnxRuntime(Rival):
    """One node, its input and output bound to buffers that were there before."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")
    given = True

    def prepare(self, work, arrays):
        import onnx
        import onnxruntime

        if work.function not in FORWARD:
            raise NotImplementedError(f"no ONNX node is set up for {work.function}")
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

        def token_log_probs(x, k):
            own = jnp.take_along_axis(x, jnp.expand_dims(k, axis), axis).squeeze(axis)
            return own - jax.nn.logsumexp(x, axis)

        def cross_entropy(x, k):
            return -token_log_probs(x, k).mean()

        function = jax.jit(
            {
                "softmax": lambda x: jax.nn.softmax(x, axis),
                "log_softmax": lambda x: jax.nn.log_softmax(x, axis),
                "logsumexp": lambda x: jax.nn.logsumexp(x, axis),
                "softmax_backward": lambda g, y: y * (g - (g * y).sum(axis, keepdims=True)),
                "log_softmax_backward": lambda g, y: g - jnp.exp(y) * g.sum(axis, keepdims=True),
                "logsumexp_backward": lambda g, x, lse: g * jnp.exp(x - lse),
                "cross_entropy_value_and_grad": jax.value_and_grad(cross_entropy),
                "cross_entropy": cross_entropy,
                "token_log_probs": token_log_probs,
            }[work.function]
        )
        on_device = [jnp.asarray(a) for a in arrays]
        read = gradient_of if _is_fused(work) else np.asarray
        return lambda: jax.block_until_ready(function(*on_device)), read


class CuPy(Rival):
    """On a GPU, from arrays that are there; a call ends when the GPU is done."""

    name = "CuPy"

    @classmethod
    def missing(cls):
        if importlib.util.find_spec("cupy") is None:
            return "cupy"
        import cupy

        try:
            return None if cupy.cuda.runtime.getDeviceCount() else "a CUDA device"
        except cupy.cuda.runtime.CUDARuntimeError:
            return "a CUDA device"

    def prepare(self, work, arrays):
        import cupy

        if work.dtype == "bfloat16":
            raise NotImplementedError("CuPy has no bfloat16")
        function, axis = self.function(work), work.axis
        there, stream = [cupy.asarray(a) for a in arrays], cupy.cuda.get_current_stream()

        def call():
            result = function(*there, axis=axis)
            stream.synchronize()
            return result

        return call, lambda result: cupy.asnumpy(result[1] if _is_fused(work) else result)

    def function(self, work):
        from cupyx.scipy import special

        if work.function not in FORWARD:
            raise NotImplementedError(f"cupyx.scipy.special has no {work.function}")
        return getattr(special, work.function)


class NumbasoftCuda(CuPy):
    """numbasoft on CuPy's arrays."""

    name = "numbasoft CUDA"

    def function(self, work):
        import numbasoft

        return getattr(numbasoft, work.function)


def _widened(function, arrays, dtype):
    """The call as a NumPy user writes it for 16 bits: widen, compute, round. NumPy's own sums would be wrong."""
    if dtype.itemsize > 2:
        return functools.partial(function, *arrays)
    return lambda: function(*(a.astype("f4") if a.dtype == dtype else a for a in arrays)).astype(dtype)


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
ON_GPU = (NumbasoftCuda, CuPy)
EVERYONE = {rival.name: rival for rival in (*OURS, Copy, *RIVALS, *ON_GPU)}
