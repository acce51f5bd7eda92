"""softmax, log_softmax, logsumexp, the losses, draws and fits on CUDA devices.

The functions of ``numbasoft`` take device arrays: Numba's, CuPy's, PyTorch's, and where all
that they give goes into ``out=`` any that speak DLPack or ``__cuda_array_interface__``. Here stand

- ``numbasoft.cuda.literal``: the loop nests as kernels, one launch for every step;
- ``numbasoft.cuda.device``: functions to call from kernels of your own.

``import numbasoft`` imports none of this.
"""

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType

MISSING = (
    "numba-cuda, which is not installed (the CUDA target inside Numba is deprecated and not used): "
    "pip install 'numba-cuda[cu13]>=0.30.4,<0.31' 'numpy<2.5'"
)

# The compute capability that kernels need.
OLDEST = 8, 0

__all__ = ["device", "literal", "require"]


def require() -> None:
    """Raise an error of one sentence where no kernel can run on a CUDA device.

    Raises
    ------
    ImportError
        numba-cuda is not installed, or not for this NumPy. The CUDA target inside Numba itself is
        deprecated and not used.
    RuntimeError
        There is no CUDA driver, no device, or none of compute capability 8.0 or newer.
    """
    missing = reason()
    if missing:
        kind, sentence = missing
        raise kind(sentence)


@lru_cache(maxsize=1)
def reason() -> tuple[type[Exception], str] | None:
    """Why no kernel can run on a CUDA device: an exception's type and its text, or None where one can."""
    if not is_installed():
        return ImportError, f"arrays on a CUDA device need {MISSING}"
    try:
        from numba import cuda
        from numba.core import config

        if cuda.is_available():
            if config.ENABLE_CUDASIM:
                return None
            sentence = too_old(*max(d.compute_capability for d in cuda.gpus))
            return (RuntimeError, sentence) if sentence else of_another_numpy()
        first = str(cuda.cuda_error() or "").strip() or "there is no driver, or no device"
    except Exception as error:  # a driver that is missing or too old: each has a class of its own
        first = str(error).strip() or type(error).__name__
    return RuntimeError, f"numba-cuda finds no CUDA device to run on ({first.splitlines()[0]})"


def too_old(major: int, minor: int) -> str | None:
    """What to say of a device of this compute capability if its kernels cannot be compiled."""
    if (major, minor) >= OLDEST:
        return None
    return f"kernels need a CUDA device of compute capability 8.0 or newer, but this one has {major}.{minor}"


def of_another_numpy() -> tuple[type[Exception], str] | None:
    """As ``reason``: whether numba-cuda cannot be imported beside this NumPy."""
    try:
        importlib.import_module("numba.cuda.cudaimpl")
    except AttributeError as error:  # NumPy 2.5 has no row_stack
        return (
            ImportError,
            f"numba-cuda cannot be imported beside this NumPy ({error}): pip install 'numpy<2.5'",
        )
    return None


def is_installed() -> bool:
    """Whether there is numba-cuda: the simulator inside Numba itself lacks what kernels use, too."""
    return importlib.util.find_spec("numba_cuda") is not None


def __getattr__(name: str) -> ModuleType:
    if name in ("device", "literal"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
