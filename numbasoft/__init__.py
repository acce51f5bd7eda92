"""The softmax family for arrays: accurate, fast and reproducible Numba kernels."""

from .ops.log_softmax.api import log_softmax, log_softmax_backward
from .ops.logsumexp.api import logsumexp, logsumexp_backward
from .ops.softmax.api import softmax, softmax_backward

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "logsumexp_backward",
    "softmax",
    "softmax_backward",
]
