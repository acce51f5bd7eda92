"""How device code is compiled: the only file that names options of Numba's CUDA compiler."""

import contextlib
import ctypes

import numpy as np
from numba import cuda
from numba.core import config

from . import MISSING, is_installed, too_old

if not is_installed():
    raise ImportError(f"numbasoft.cuda needs {MISSING}")

SIMULATED = bool(config.ENABLE_CUDASIM)


def device(function):
    """A function called from kernels, part of the code that calls it."""
    if SIMULATED:
        return cuda.jit(device=True)(function)
    return cuda.jit(device=True, forceinline=True)(function)


def kernel(function, signature, threads, options=None):
    """A kernel of declared types, launched with at most so many threads a block.

    It is compiled at once, for the current device. With ``options``, what its factory was
    given, it is kept on disk, or loaded from there.
    """
    return (Simulated if SIMULATED else Compiled)(function, signature, threads, options)


MOST = 2**31 - 1

# As cuda.core takes a kernel's arguments: an int has 64 bits.
ARGUMENT = {"int64": int, "int32": ctypes.c_int32, "float32": ctypes.c_float, "float64": ctypes.c_double}


def loaded(found):
    """A module and its kernel, from name and machine code; None twice if the driver does not take them."""
    from cuda.core import ObjectCode

    with contextlib.suppress(Exception):
        name, code = found
        module = ObjectCode.from_cubin(code)
        return module, module.get_kernel(name)
    return None, None


def check_sizes(kinds, arguments):
    """Refuse what a 32-bit parameter would be given in part."""
    for kind, a in zip(kinds, arguments, strict=True):
        if kind is ctypes.c_int32 and a > MOST:
            raise ValueError(f"x has {a} elements in a row, or rows side by side; kernels count to {MOST}")


class Compiled:
    """A kernel for the current device, launched as Numba launches it in the end.

    What Numba works out at every launch is worked out once for a configuration, which
    saves nine tenths of its host time (benchmarks/NOTES.md).
    """

    def __init__(self, function, signature, threads, options):
        from . import disk

        self.kinds, self.has_room = [ARGUMENT[str(kind)] for kind in signature.args], False
        sentence = too_old(*cuda.current_context().device.compute_capability)
        if sentence:  # beside a newer one
            raise RuntimeError(sentence)
        path = None if options is None else disk.path_of(function, signature, threads, options)
        self.module, self.kernel = loaded(disk.load(path))
        if self.kernel is None:
            dispatcher = cuda.jit(signature, launch_bounds=threads, lto=False)(function)
            (compiled,) = dispatcher.overloads.values()
            self.kernel = compiled.library.get_cufunc().kernel
            disk.save(path, compiled.entry_name, bytes(compiled.library.get_cubin().code))

    def __getitem__(self, configuration):
        from cuda.core import LaunchConfig, launch
        from numba.cuda.cudadrv.driver import _to_core_stream

        blocks, threads, stream, shared = configuration
        if shared and not self.has_room:
            self.make_room()
        launch_config = LaunchConfig(grid=blocks, block=threads, shmem_size=shared)
        fixed = _to_core_stream(stream), launch_config, self.kernel

        def launch_again(*arguments):
            try:
                launch(*fixed, *arguments)
            except Exception:  # in a thread that no context is current in yet; else it is raised again
                cuda.current_context()
                launch(*fixed, *arguments)

        return launch_again

    def make_room(self):
        """Allow launches all the shared memory that a block may have, once for a kernel, which is one device's.

        Else a block has 48 KiB together with what the kernel has of its own.
        """
        from cuda.bindings.driver import CUfunction_attribute
        from numba.cuda.cudadrv.driver import driver

        device, names = cuda.current_context().device, CUfunction_attribute
        kernel = getattr(self.kernel, "handle", None) or self.kernel._handle  # cuda.core up to 0.6
        own = driver.cuKernelGetAttribute(names.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel, device.id)
        for which, value in (
            (
                names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                device.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN - own,
            ),
            (names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            driver.cuKernelSetAttribute(which, value, kernel, device.id)
        self.has_room = True

    def typed(self, arguments):
        """Arguments in the types declared, once for many launches."""
        check_sizes(self.kinds, arguments)
        return tuple(kind(a) for kind, a in zip(self.kinds, arguments, strict=True))


class Simulated:
    """A kernel in the simulator, which would not give its arguments the declared types."""

    def __init__(self, function, signature, threads, options):
        self.kernel, self.kinds = cuda.jit(function), [getattr(np, str(kind)) for kind in signature.args]

    def __getitem__(self, configuration):
        # the simulator keeps a configuration in the kernel itself
        return lambda *arguments: self.kernel[configuration](*self.typed(arguments))

    def typed(self, arguments):
        return tuple(kind(a) for kind, a in zip(self.kinds, arguments, strict=True))
