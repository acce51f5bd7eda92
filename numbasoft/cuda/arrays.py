"""Arrays on CUDA devices, of any library: what they are, and results like them.

A ``Device`` array is described by a shadow: a NumPy array of the same address, shape and
strides, which is never read or written. All that ``numbasoft.checks`` knows about shapes,
axes and overlaps holds for it.
"""

import contextlib
import ctypes
import sys
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from .. import checks
from .jit import SIMULATED, cuda

STORAGE = {"float16": "f2", "bfloat16": "b2", "float32": "f4", "float64": "f8"}
INTEGERS = {
    "bool": "b1", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "int64": "i8", "uint64": "u8",
}  # fmt: skip
NAME = {storage: name for name, storage in (STORAGE | INTEGERS).items()}
CUDA_DEVICES = 2, 13  # DLPack's names for device memory and for managed memory
DEFAULT_STREAMS = 0, 1  # CUDA's numbers for a device's own stream
BY_DLPACK = "by DLPack"  # in place of an array's stream, which its library makes others wait for


class Device:
    """An array on a device."""

    __slots__ = ("home", "name", "ordinal", "shadow", "storage", "stream", "value")

    def __init__(self, value, name, home, address, shape, strides, dtype, read_only, ordinal, stream):
        storage = STORAGE.get(dtype) or INTEGERS.get(dtype)
        if storage is None:
            raise TypeError(f"{name} has dtype {dtype}, but must have one of {checks.SUPPORTED}")
        plain = np.dtype(np.uint16 if storage == "b2" else dtype)
        steps = [s for s, n in zip(strides or (), shape, strict=False) if n > 1]
        if address % plain.itemsize or any(s % plain.itemsize for s in steps):
            raise ValueError(
                f"{name} is not aligned: its elements must lie at multiples of {plain.itemsize} bytes"
            )
        self.shadow = shadow(address, tuple(shape), strides, plain, read_only)
        self.name, self.storage, self.home, self.value = name, storage, home, value
        self.ordinal, self.stream = ordinal, stream

    @property
    def address(self):
        return self.shadow.ctypes.data

    @property
    def strides(self):
        return self.shadow.strides

    @property
    def result_storage(self):
        """The storage of results: floats keep theirs, integers become float64."""
        return self.storage if self.storage in STORAGE.values() else "f8"


def shadow(address, shape, strides, dtype, read_only=False):
    """A NumPy array that must not be touched, at an address of a device."""
    interface = {
        "version": 3, "shape": shape, "strides": strides, "typestr": dtype.str,
        "data": (address or 16, read_only),
    }  # fmt: skip
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def describe(value, name):
    """An argument as ``Device`` array."""
    home = home_of(value)
    if isinstance(home, Torch) and value.requires_grad:
        raise TypeError(f"{name} requires grad, which numbasoft does not record; pass {name}.detach()")
    return home.describe(value, name)


class Numba:
    """Device arrays of Numba, and of its simulator."""

    def describe(self, value, name):
        if SIMULATED:
            host = value._ary
            return Device(value, name, self, host.ctypes.data, host.shape, host.strides, host.dtype.name,
                          not host.flags.writeable, 0, None)  # fmt: skip
        return described_by_interface(value, name, self)

    def empty(self, shape, storage, like, stream):
        dtype = bfloat16() if storage == "b2" else np.dtype(NAME[storage])
        return cuda.device_array(shape, dtype)

    def current_stream(self, ordinal):
        return 0


class CuPy:
    def describe(self, value, name):
        return Device(value, name, self, value.data.ptr, value.shape, value.strides, value.dtype.name,
                      False, value.device.id, None)  # fmt: skip

    def empty(self, shape, storage, like, stream):
        import cupy

        dtype = bfloat16() if storage == "b2" else NAME[storage]
        if cupy.cuda.get_current_stream().ptr == stream and cupy.cuda.Device().id == like.ordinal:
            return cupy.empty(shape, dtype)
        with cupy.cuda.Device(like.ordinal), cupy.cuda.ExternalStream(stream):
            return cupy.empty(shape, dtype)

    def current_stream(self, ordinal):
        import cupy

        return cupy.cuda.get_current_stream(ordinal).ptr


class Torch:
    def describe(self, value, name):
        if value.is_conj() or value.is_neg():
            raise TypeError(f"{name} is a lazily negated or conjugated view; pass {name}.resolve_neg()")
        itemsize = value.element_size()
        return Device(value, name, self, value.data_ptr(), tuple(value.shape),
                      tuple(s * itemsize for s in value.stride()), str(value.dtype).removeprefix("torch."),
                      False, value.device.index, None)  # fmt: skip

    def empty(self, shape, storage, like, stream):
        import torch

        device, dtype = torch.device("cuda", like.ordinal), getattr(torch, NAME[storage])
        if torch.cuda.current_stream(device).cuda_stream == stream:
            return torch.empty(shape, dtype=dtype, device=device)
        # an ExternalStream of 0 is a stream of PyTorch's pool, and memory is kept by streams
        is_default = stream in DEFAULT_STREAMS
        other = torch.cuda.default_stream(device) if is_default else torch.cuda.ExternalStream(stream, device)
        with torch.cuda.stream(other):
            return torch.empty(shape, dtype=dtype, device=device)

    def current_stream(self, ordinal):
        import torch

        return torch.cuda.current_stream(ordinal).cuda_stream


class Other:
    """Arrays of other libraries, which are read and written but not made."""

    def describe(self, value, name):
        if hasattr(value, "__cuda_array_interface__"):
            return described_by_interface(value, name, self)
        return described_by_dlpack(value, name, self)

    def empty(self, shape, storage, like, stream):
        kind = type(like.value)
        raise TypeError(
            f"{like.name} is a {kind.__module__}.{kind.__qualname__}, of which no result can be made: "
            "pass CuPy's, PyTorch's or Numba's arrays, or out= where it takes all of the result"
        )

    def current_stream(self, ordinal):
        return 0


NUMBA, CUPY, TORCH, OTHER = Numba(), CuPy(), Torch(), Other()


def home_of(value):
    if getattr(value, "__cuda_ndarray__", False):
        return NUMBA
    top = type(value).__module__.partition(".")[0]
    if top == "torch" and isinstance(value, sys.modules["torch"].Tensor):
        return TORCH
    if top == "cupy":
        return CUPY
    for name, kind, home in (
        ("torch", "Tensor", TORCH),
        ("cupy", "ndarray", CUPY),
    ):  # classes derived from theirs
        library = sys.modules.get(name)
        if isinstance(value, getattr(library, kind, ())):
            return home
    return OTHER


def quick_look(value):
    """An array's address, and its home, device and all else that a launch depends on.

    None where a closer look is needed.
    """
    home = home_of(value)
    if home is TORCH:
        if value.requires_grad or value.is_conj() or value.is_neg():
            return None
        return value.data_ptr(), (TORCH, value.device.index, value.dtype, value.shape, value.stride())
    if home is CUPY:
        return value.data.ptr, (CUPY, value.device.id, value.dtype, value.shape, value.strides)
    if home is NUMBA and SIMULATED:
        host = value._ary
        return host.ctypes.data, (NUMBA, 0, host.dtype, host.shape, host.strides, host.flags.writeable)
    if home is NUMBA and not value.stream:
        address = value.device_ctypes_pointer.value or 0
        return address, (NUMBA, ordinal_of(address), value.dtype, value.shape, value.strides)
    return None


def described_by_interface(value, name, home):
    given = value.__cuda_array_interface__
    dtype = getattr(value, "dtype", None)
    dtype = dtype if isinstance(dtype, np.dtype) else np.dtype(given["typestr"])
    if not dtype.isnative:
        raise TypeError(f"{name} has dtype {dtype}, but must have the byte order of this machine")
    if given.get("mask") is not None:
        raise TypeError(
            f"{name} is a masked array, but must be a plain one: what its filled() gives, or its data, with where=~mask where a function takes that"
        )
    address, read_only = given["data"]
    return Device(value, name, home, address, given["shape"], given.get("strides"), dtype.name,
                  read_only, ordinal_of(address), given.get("stream"))  # fmt: skip


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


def described_by_dlpack(value, name, home):
    capsule = value.__dlpack__(stream=-1)  # no stream waits until it is known which: see wait_for
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = DLTensor.from_address(pointer(capsule, b"dltensor"))
    kind = DLPACK_KINDS.get(tensor.code, f"DLPack type {tensor.code} of ")
    dtype = kind if kind == "bool" else f"{kind}{tensor.bits * tensor.lanes}"
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[i] * tensor.bits // 8 for i in range(tensor.ndim))
    address = (tensor.data or 0) + tensor.byte_offset
    return Device(value, name, home, address, shape, strides, dtype, False, tensor.device_id, BY_DLPACK)


def bfloat16():
    """NumPy's name for bfloat16, which ml_dtypes has."""
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise TypeError("a bfloat16 array of this kind needs ml_dtypes: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


@lru_cache(maxsize=1)
def device_count():
    return len(cuda.gpus)


def ordinal_of(address):
    """The device that an address belongs to."""
    if SIMULATED or device_count() == 1 or not address:
        return 0 if SIMULATED or device_count() == 1 else cuda.get_current_device().id
    from cuda.bindings import driver

    what = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, ordinal = driver.cuPointerGetAttribute(what, address)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"an array's address is no memory of a CUDA device ({error.name})")
    return int(ordinal)


# Streams.


def handle_of(stream):
    """The number of a stream of any library; an int is one already."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        if not 0 <= stream < 2**64:
            raise ValueError(f"stream is {stream}, which is the number of no CUDA stream")
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, attribute):
            handle = getattr(stream, attribute)
            return int(getattr(handle, "value", handle) or 0)
    raise TypeError(f"stream is {stream!r}, but must be a CUDA stream or the number of one")


@lru_cache(maxsize=256)
def numba_stream(handle, ordinal):
    """What Numba launches into: the stream of this number, which must be one of this device."""
    if SIMULATED or handle == 0:
        return 0
    stream = cuda.external_stream(handle)
    if handle > 2 and device_count() > 1:  # 1 and 2 are the default streams of whichever device
        from numba.cuda.cudadrv.driver import _to_core_stream

        if _to_core_stream(stream).device.device_id != ordinal:
            raise ValueError(f"stream belongs to another device than x, which is on device {ordinal}")
    return stream


def wait_for(array, handle, ordinal):
    """Make a stream wait for what an array's library has been given so far.

    What is done before a graph is launched is not the graph's to wait for, unless it is captured too.
    """
    other = array.stream
    if SIMULATED or other in (None, 0, handle) or (other == 1 and handle == 0):
        return
    if is_capturing(handle) and (other == BY_DLPACK or not is_capturing(other)):
        return
    if other == BY_DLPACK:
        array.value.__dlpack__(stream=handle or 1)
        return
    event = cuda.event(timing=False)
    event.record(numba_stream(int(other), ordinal))
    event.wait(numba_stream(handle, ordinal))


def is_capturing(handle):
    """Whether what a stream is given now becomes part of a graph."""
    if SIMULATED or handle in DEFAULT_STREAMS:
        return False
    from cuda.bindings import driver

    _, status = driver.cuStreamIsCapturing(handle)
    return status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE


def fetched(address, count, dtype, handle):
    """So many elements of a device's memory, when a stream has done what it was given."""
    host = np.empty(count, dtype)
    if SIMULATED:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)
        return host
    from cuda.bindings import driver

    for error in (
        *driver.cuMemcpyDtoHAsync(host.ctypes.data, address, host.nbytes, handle),
        *driver.cuStreamSynchronize(handle),
    ):
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"numbers of a CUDA device could not be read ({error.name})")
    return host


@contextlib.contextmanager
def allocation_while_capturing():
    """Within, this thread may allocate memory, which a capture otherwise forbids: it is no part of the graph."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
