"""How kernels are compiled, kept on disk and spread over threads.

The only file that names Numba's compiler options and touches its internals.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import os
import pickle
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
import types as python_types
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core import config, serialize
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler import CompilerBase, CompileResult, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.dispatcher import Dispatcher
from numba.core.typed_passes import IRLegalization
from numba.extending import register_jitable
from numba.misc.appdirs import AppDirs
from numba.np.ufunc import parallel as pool
from numba.parfors import parfor_lowering

# Compiler options

# No fastmath: reassociation breaks the compensated sums, and nnan turns isnan into False.
# Kernels allocate nothing, and without reference counts a call costs 0.05 us less. What is left out here a kernel
# would inherit from a caller that is being compiled, and hand on to all others.
KERNEL = {
    "fastmath": False,
    "forceinline": False,
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}


class Inlined(JITCodeLibrary):
    """The code of a helper, optimised and made machine code only as part of the kernels it goes into."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name):
        # Python never calls a helper; Numba wants to know where it could
        return ctypes.cast(ctypes.pythonapi.PyErr_BadInternalCall, ctypes.c_void_p).value

    @property
    def codegen(self):
        return self

    def set_env(self, name, env):
        """What raises exceptions needs an environment; helpers raise none."""


@register_pass(mutates_CFG=False, analysis_only=False)
class LowerInlined(LoweringPass):
    _name = "lower_inlined"

    def __init__(self):
        super().__init__()

    def run_pass(self, state):
        state.library = Inlined(state.targetctx.codegen(), state.func_id.func_qualname)
        return True


class HelperCompiler(CompilerBase):
    def define_pipelines(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(LowerInlined, IRLegalization)
        passes.finalize()
        return [passes]


# Without machine code and a wrapper for Python of every helper a kernel compiles in a third of the time.
HELPER = {**KERNEL, "forceinline": True, "no_cpython_wrapper": True, "pipeline_class": HelperCompiler}
INLINE: dict[str, Any] = {"jit_options": HELPER}


def inline(func):
    """Compile a helper into every kernel that calls it; from Python it is plain Python."""
    return register_jitable(**HELPER)(func)


# What surrounds kernels in a caller's own compiled function: it allocates.
SURROUNDING = {
    "fastmath": False,
    "forceinline": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def surrounding(func):
    """Compile a helper of numbasoft.overloads into the caller's function."""
    return register_jitable(**SURROUNDING)(func)


def kernel(func):
    """Compile a kernel that runs in the calling thread."""
    return cached(numba.njit(**KERNEL)(func))


def parallel_kernel(func):
    """Compile a kernel whose ``prange`` loops run on Numba's threads.

    Their index is unsigned: what is called with it takes np.int64 of it, or is compiled twice.
    """
    return cached(numba.njit(parallel=True, **KERNEL)(func))


@functools.cache
def compiled(dispatcher, *argument_types):
    """The machine code for exactly these argument types, compiled or loaded if need be.

    It is called as the dispatcher would be, but it believes what it is given: the caller
    answers for the dtype and the number of dimensions. That way an array of any layout runs
    the code declared for layout 'A', and a call costs a third (0.07 us, not 0.21).
    """
    if config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, but numbasoft's kernels run only when compiled")
    with parallel_loops_as_we_need():
        dispatcher.compile(argument_types)
    return dispatcher.get_overload(argument_types)


@contextlib.contextmanager
def parallel_loops_as_we_need():
    """Two of Numba's ways with a ``prange`` loop are changed while a kernel is compiled.

    It promises LLVM that no arrays of a loop overlap; in place they do, and without this
    tests/test_reproducibility.py has wrong last elements. And it optimises the loop's body four
    times, as a function, in two wrappers and in the kernel, of which the last is run.
    """
    with global_compiler_lock:
        create_library = JITCPUCodegen.create_library
        create_gufunc = parfor_lowering._create_gufunc_for_parfor_body
        parameters = inspect.signature(create_gufunc)

        def create_inlined(codegen, name, **kwargs):
            if "gufunc" in name.lower():
                return Inlined(codegen, name, **kwargs)
            return create_library(codegen, name, **kwargs)

        def create_with_aliases(*args, **kwargs):
            given = parameters.bind(*args, **kwargs)
            given.arguments["has_aliases"] = True
            return create_gufunc(*given.args, **given.kwargs)

        try:
            JITCPUCodegen.create_library = create_inlined
            parfor_lowering._create_gufunc_for_parfor_body = create_with_aliases
            yield
        finally:
            JITCPUCodegen.create_library = create_library
            parfor_lowering._create_gufunc_for_parfor_body = create_gufunc


# Disk cache
#
# Numba's own looks at the kernel's file alone, and so runs old code after a helper in another
# file has changed. Here one hash of all sources of the package stamps every file.
#
#     DIRECTORY/STAMP/kernel-KEY.nbc      32 bytes of digest, then the pickled code

PACKAGE = os.path.dirname(os.path.abspath(__file__))
IMPORTED = time.time_ns()
CLOCK_STEP = 20_000_000  # file times lag behind the clock by up to a tick of the system's timer
STAMPS_KEPT = 4
KEY_LENGTH = 32
ABANDONED = 3600  # seconds after which an unfinished file has no writer any more
DIGEST = hashlib.sha256
# What in Numba's configuration changes machine code and is not in the target's description.
CODE_OPTIONS = (
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "ENABLE_AVX",
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "EXTEND_VARIABLE_LIFETIMES",
    "LLVM_REFPRUNE_PASS",
    "LLVM_REFPRUNE_FLAGS",
    "NRT_STATS",
)


class NotCachable(Exception):
    """Raised where disk and memory may differ, or a kernel holds what has no stable name."""


def sources(folder=PACKAGE):
    """All Python files of the package, in a fixed order."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.endswith(".py"):
                yield entry
            elif entry.is_dir() and entry.name != "__pycache__":
                yield from sources(entry.path)


def check_sources_are_those_imported():
    """A file written after the import need not be what this process runs."""
    for entry in sources():
        status = entry.stat()
        if max(status.st_ctime_ns, status.st_mtime_ns) > IMPORTED - CLOCK_STEP:
            raise NotCachable(f"{entry.path} is newer than the import")


@functools.cache
def stamp():
    """A hash of the package's sources and of the compilers they go through."""
    h = DIGEST()
    for entry in sources():
        with open(entry.path, "rb") as file:
            text = file.read()
        h.update(f"{os.path.relpath(entry.path, PACKAGE)} {len(text)}\n".encode())
        h.update(text)
    versions = numba.__version__, llvmlite.__version__, np.__version__, sys.version
    options = [(name, repr(getattr(config, name, None))) for name in CODE_OPTIONS]
    h.update(repr((versions, options)).encode())
    return h.hexdigest()[:32]


def described(value):
    """A text that is the same in every process for what a kernel's closure holds."""
    if isinstance(value, Dispatcher):
        return f"{described(value.py_func)}{sorted(value.targetoptions.items())}"
    if isinstance(value, python_types.FunctionType):
        cells = [described(cell.cell_contents) for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{cells}"
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic, np.dtype)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, numba.types.Type):
        return f"type {value}"
    raise NotCachable(f"no stable name for {value!r}")


def directories():
    """Where machine code may be kept, best first: beside the .pyc files, the user's cache, a temporary place.

    Beside the .pyc files it goes when the environment goes, and environments do not disturb each other.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    if config.CACHE_DIR:
        yield os.path.join(os.path.abspath(config.CACHE_DIR), f"numbasoft-{user}")
    else:
        bytecode_file = importlib.util.cache_from_source(os.path.join(PACKAGE, "__init__.py"))
        yield os.path.join(os.path.dirname(bytecode_file), "kernels")
        of_user = AppDirs("numbasoft", appauthor=False).user_cache_dir
        if os.path.isabs(of_user):  # it begins with ~ where there is no home
            yield of_user
    with contextlib.suppress(OSError):
        yield os.path.join(tempfile.gettempdir(), f"numbasoft-{user}")


def is_private(directory):
    """Nobody else could have put a file here: cached code is pickled, so loading it is running it."""
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class PackageCache:
    """The machine code of one kernel on disk, as dispatchers call it. What goes wrong is a miss."""

    def __init__(self, dispatcher):
        self.py_func = dispatcher.py_func
        self.options = dispatcher.targetoptions

    @property
    def cache_path(self):
        return next(directories())

    def load_overload(self, sig, target_context):
        if self.options.get("parallel"):
            launch()
        key = self.key(sig, target_context.codegen())
        for directory in directories() if key else ():
            with contextlib.suppress(Exception):
                symbols, code = pickle.loads(read(directory, self.filename(key)))
                if defined(symbols, target_context):
                    return CompileResult._rebuild(target_context, *code)
        self.ids_before = number_functions_by(key or secrets.token_hex())
        return None

    def save_overload(self, sig, data):
        FunctionIdentity._unique_ids = self.ids_before
        key = self.key(sig, data.codegen)
        content = None
        with contextlib.suppress(Exception):
            if key and is_cachable(data, key):
                content = serialize.dumps((undefined_symbols(data.library), data._reduce()))
        for directory in directories() if content else ():
            with contextlib.suppress(OSError):
                write(directory, self.filename(key), content)
                return

    def key(self, sig, codegen):
        """What decides the machine code, or None where that is not known."""
        with contextlib.suppress(NotCachable, OSError):
            if self.py_func.__module__.partition(".")[0] != __package__:
                raise NotCachable("a kernel from outside the package")
            check_sources_are_those_imported()
            parts = stamp(), described(self.py_func), sorted(self.options.items()), str(sig)
            return DIGEST(repr((parts, codegen.magic_tuple())).encode()).hexdigest()[:KEY_LENGTH]

    def filename(self, key):
        return f"{self.py_func.__name__}-{key}.nbc"

    def flush(self):
        """Called by ``Dispatcher.recompile``. The key already tells old code from new."""


def first_id(key):
    return int(key[:12], 16) * 1_000_000


def number_functions_by(key):
    """Make the symbols of the kernel compiled next unlike those of any other kernel.

    Numba names them by a counter and by addresses, which two processes may share. Of two
    parallel kernels loaded with one such name, the second runs the loops of the first.
    """
    before = getattr(FunctionIdentity, "_unique_ids", None)
    FunctionIdentity._unique_ids = itertools.count(first_id(key))
    return before


def is_cachable(data, key):
    if data.lifted or data.library.has_dynamic_globals:
        return False
    loops = [f.name for f in data.library._final_module.functions if "__gufunc__" in f.name]
    number = str(first_id(key))[:-6]
    return all(f"v{number}" in name for name in loops)


def undefined_symbols(library):
    module = library._final_module
    named = itertools.chain(module.functions, module.global_variables)
    return [v.name for v in named if v.is_declaration and not v.name.startswith("llvm.")]


def defined(symbols, target_context):
    """Whether LLVM finds all that the code refers to; without one of them it would abort.

    Numba would import all it can compile first, which takes 0.3 s. Our kernels need none of it.
    """
    if all(map(llvm.address_of_symbol, symbols)):
        return True
    target_context.refresh()
    return all(map(llvm.address_of_symbol, symbols))


def cached(dispatcher):
    if isinstance(dispatcher, Dispatcher):
        dispatcher._cache = PackageCache(dispatcher)
    return dispatcher


def read(directory, name):
    if not is_private(directory):
        raise NotCachable(directory)
    with open(os.path.join(directory, stamp(), name), "rb") as file:
        content = file.read()
    size = DIGEST().digest_size
    if DIGEST(content[size:]).digest() != content[:size]:
        raise NotCachable("damaged")
    return content[size:]


def write(directory, name, content):
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if not is_private(directory):
        raise PermissionError(directory)
    folder = os.path.join(directory, stamp())
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # A reader sees the old file or the whole new one, however many processes write it.
    handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(DIGEST(content).digest() + content)
        os.replace(unfinished, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    clean(directory)


@functools.cache
def clean(directory):
    """Once per process, drop the code of all but the latest versions and unfinished files."""
    with contextlib.suppress(OSError):
        stamped = [e for e in os.scandir(directory) if len(e.name) == len(stamp()) and e.is_dir()]
        stamped.sort(key=lambda e: e.stat().st_mtime, reverse=True)
        for entry in stamped[STAMPS_KEPT:]:
            shutil.rmtree(entry.path, ignore_errors=True)
        for entry in os.scandir(os.path.join(directory, stamp())):
            if entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > ABANDONED:
                os.unlink(entry.path)


# Threads
#
# A thread may be started and a process forked at any time. Under workqueue, which aborts when it
# is entered twice, our own calls are kept apart; a caller's own parallel functions cannot be.

POOL_MODULE = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
TBB_LIBRARY = {"linux": "libtbb.so.12", "darwin": "libtbb.12.dylib", "win32": "tbb12.dll"}


class State:
    """What a forked child does not take over from its parent."""

    def __init__(self, serial=False):
        self.serial = serial
        self.launcher = threading.main_thread().ident
        self.shared = False  # whether other threads than the launcher have entered parallel kernels
        self.workqueue = threading.Lock()


state = State()


def preload_tbb():
    """Load the pip wheel's TBB, which lies where Numba does not look.

    Numba finds a library that is loaded. It takes 3 ms and starts no threads; any later is too
    late where the program calls ``numba.set_num_threads`` first, which settles the layer.
    """
    name = TBB_LIBRARY.get(sys.platform)
    if not name or str(config.THREADING_LAYER).lower() in ("omp", "workqueue"):
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return
    with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
        for path in importlib.metadata.files("tbb") or ():
            if path.name == name:
                ctypes.CDLL(os.path.realpath(path.locate()))
                return


preload_tbb()


def launch():
    """Start Numba's threads."""
    if pool._threading_layer is None:
        with global_compiler_lock:
            if pool._threading_layer is None:
                state.launcher = threading.get_ident()
                pool._launch_threads()


def threading_layer():
    """The name of Numba's threading layer, or None while no parallel kernel has been made."""
    return pool._threading_layer


@functools.cache
def mask_functions(layer):
    """How to get and to set the calling thread's number of threads, without releasing the GIL."""
    library = importlib.import_module(f"numba.np.ufunc.{POOL_MODULE[layer]}")
    get = ctypes.PYFUNCTYPE(ctypes.c_int)(library.get_num_threads)
    set_ = ctypes.PYFUNCTYPE(None, ctypes.c_int)(library.set_num_threads)
    return get, set_


@functools.cache
def processors():
    """The processors that this process may keep busy: its affinity and its container's quota."""
    if hasattr(os, "process_cpu_count"):
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return max(1, min(count or 1, cgroup_quota()))


def cgroup_quota(root="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """The processors that cgroup v2 grants, rounded up; the tightest of the group and its parents."""
    quota = math.inf
    with contextlib.suppress(OSError, ValueError):
        with open(membership) as file:
            own = next((line[3:].strip() for line in file if line.startswith("0::")), "/")
        parts = [part for part in own.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            with contextlib.suppress(OSError, ValueError):
                with open(os.path.join(root, *parts[:depth], "cpu.max")) as file:
                    granted, period = file.read().split()
                quota = min(quota, math.ceil(int(granted) / int(period)))
    return quota


def threads():
    """The number of threads that a parallel kernel may use now, called from this thread."""
    if state.serial:
        return 1
    layer = pool._threading_layer
    mask = config.NUMBA_NUM_THREADS if layer is None else mask_functions(layer)[0]()
    return min(mask, processors())


def threads_at_once():
    """The number of threads of a parallel kernel that is entered without ``parallel_region``; 0 where it takes one."""
    layer = pool._threading_layer
    if state.serial or layer is None or layer == "workqueue":
        return 0
    if threading.get_ident() != state.launcher:
        state.shared = True
    mask = mask_functions(layer)[0]()
    return mask if mask <= processors() else 0


class parallel_region:
    """``with parallel_region() as allowed:`` tells whether a parallel kernel may be entered now."""

    __slots__ = ("lock", "mask")

    def __enter__(self):
        self.lock = self.mask = None
        if state.serial:
            return False
        launch()
        layer = pool._threading_layer
        if layer == "workqueue":
            # Nor may it be entered from its own workers, threads that Python has not started.
            if isinstance(threading.current_thread(), threading._DummyThread):
                return False
            if not state.workqueue.acquire(blocking=False):
                return False
            self.lock = state.workqueue
        if threading.get_ident() != state.launcher:
            state.shared = True
        get, set_ = mask_functions(layer)
        mask = get()
        if mask > processors():
            set_(processors())
            self.mask = mask
        return True

    def __exit__(self, *exc):
        if self.mask is not None:
            mask_functions(pool._threading_layer)[1](self.mask)
        if self.lock is not None:
            self.lock.release()


def after_fork_in_child():
    """A child has none of its parent's threads; not every layer notices.

    GNU OpenMP ends or hangs the child. TBB stops its threads before a fork and starts them anew,
    but only in the thread that launched it and while no other has used it; else the child may hang.
    """
    global state
    layer = threading_layer()
    is_launcher = threading.get_ident() == state.launcher
    stranded = layer == "omp" or (layer == "tbb" and (state.shared or not is_launcher))
    state = State(serial=state.serial or stranded)
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A compilation in another thread would never end in the child, nor release Numba's lock.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=after_fork_in_child,
    )
