"""The softmax family for arrays: accurate, fast and reproducible Numba kernels.

- ``softmax``, ``log_softmax``, ``logsumexp`` and, ending in ``_backward``, their gradients
- ``cross_entropy``, ``cross_entropy_value_and_grad``, ``cross_entropy_backward``, ``nll_loss``, ``perplexity``,
  ``token_log_probs``, ``kl_divergence``
- ``binary_cross_entropy``, ``sigmoid``, ``logit``: two classes from one logit
- ``sample``, ``gumbel_softmax``: draws from logits
- ``fit_temperature`` and ``numbasoft.calibration``: probabilities that mean something
- ``numbasoft.literal``: the loop nests of the literature, to read
- ``numbasoft.scipy.special``: SciPy's signatures on these kernels
- ``numbasoft.cuda``: the same on CUDA arrays, and functions to call from kernels of your own

The functions of the first line can be called in ``@njit`` functions, too (see ``numbasoft.overloads``).

Each has a docstring with formula, shapes, errors and an example.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from . import overloads as overloads
from .ops.binary_cross_entropy.api import binary_cross_entropy, binary_cross_entropy_backward
from .ops.cross_entropy.api import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_value_and_grad,
    nll_loss,
    nll_loss_backward,
    perplexity,
    token_log_probs,
)
from .ops.fit_temperature.api import fit_temperature
from .ops.kl_divergence.api import kl_divergence, kl_divergence_backward
from .ops.log_softmax.api import log_softmax, log_softmax_backward
from .ops.logsumexp.api import logsumexp, logsumexp_backward
from .ops.sample.api import gumbel_softmax, sample
from .ops.sigmoid.api import logit, sigmoid, sigmoid_backward
from .ops.softmax.api import softmax, softmax_backward

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_backward",
    "calibration",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_value_and_grad",
    "fit_temperature",
    "gumbel_softmax",
    "kl_divergence",
    "kl_divergence_backward",
    "literal",
    "log_softmax",
    "log_softmax_backward",
    "logit",
    "logsumexp",
    "logsumexp_backward",
    "nll_loss",
    "nll_loss_backward",
    "perplexity",
    "sample",
    "sigmoid",
    "sigmoid_backward",
    "softmax",
    "softmax_backward",
    "token_log_probs",
]


def __dir__() -> list[str]:
    return [*__all__, "cuda", "scipy"]


def __getattr__(name: str) -> _ModuleType:
    """``numbasoft.calibration``, ``cuda``, ``literal`` and ``scipy``, imported when first asked for."""
    if name in ("calibration", "cuda", "literal", "scipy"):
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
