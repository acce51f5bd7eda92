"""What a type checker must accept and refuse of the public functions; run by mypy, not by pytest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import numbasoft
from numbasoft.calibration import TemperatureScaler


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


def losses(x: NDArray[np.float32], target: NDArray[np.int64]) -> list[NDArray[Any]]:
    loss, grad = numbasoft.cross_entropy_value_and_grad(x, target, weight=[1.0, 2.0], out=x)
    number: float = numbasoft.perplexity(x, target, ignore_index=0)
    scaler = TemperatureScaler().fit(x, target)
    return [
        loss,
        grad,
        numbasoft.cross_entropy(x, [0, 1], reduction="none", label_smoothing=0.1, z_loss=number),
        numbasoft.cross_entropy_backward(1.0, x, target, lse=numbasoft.logsumexp(x)),
        numbasoft.token_log_probs(x, target),
        numbasoft.nll_loss(x, target),
        numbasoft.binary_cross_entropy(x, x, pos_weight=2.0),
        numbasoft.kl_divergence(x, x, temperature=2.0),
        numbasoft.sigmoid(x, out=x),
        numbasoft.sample(x, top_k=5, top_p=0.9, rng=np.random.default_rng(0)),
        numbasoft.gumbel_softmax(x, hard=True, rng=3),
        scaler.predict_proba(x),
    ]


def refused(x: NDArray[np.float32]) -> None:
    numbasoft.softmax(x, axis="last")  # type: ignore[arg-type]
    numbasoft.softmax(x, 0, 1.0)  # type: ignore[call-arg]
    numbasoft.softmax(x, temperature="hot")  # type: ignore[arg-type]
    numbasoft.logsumexp(x, out=[1.0])  # type: ignore[arg-type]
    numbasoft.cross_entropy(x, [0], -1)  # type: ignore[call-arg]
    numbasoft.cross_entropy(x, [0], label_smoothing="much")  # type: ignore[arg-type]
    numbasoft.sample(x, top_k="all")  # type: ignore[arg-type]
