"""What a type checker must accept and refuse of the public functions; run by mypy, not by pytest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import numbasoft


def accepted(x: NDArray[np.float32], keep: NDArray[np.bool_]) -> list[NDArray[Any]]:
    y = numbasoft.softmax(x, axis=(0, 1), temperature=0.5, where=keep, out=x)
    log_y = numbasoft.log_softmax([1.0, 2.0], axis=None)
    lse = numbasoft.logsumexp(x, keepdims=True)
    return [
        y,
        log_y,
        lse,
        numbasoft.softmax_backward(x, y),
        numbasoft.log_softmax_backward(x, log_y),
        numbasoft.logsumexp_backward(1.0, x, lse),
    ]


def refused(x: NDArray[np.float32]) -> None:
    numbasoft.softmax(x, axis="last")  # type: ignore[arg-type]
    numbasoft.softmax(x, 0, 1.0)  # type: ignore[call-arg]
    numbasoft.softmax(x, temperature="hot")  # type: ignore[arg-type]
    numbasoft.logsumexp(x, out=[1.0])  # type: ignore[arg-type]
