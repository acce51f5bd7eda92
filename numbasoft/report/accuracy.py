"""Is it right: the largest error in ULP, per function, dtype and kind of row, beside what is promised."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np

from . import oracle
from .workloads import BACKWARD, DTYPES, FORWARD, FUNCTIONS, dtype_of

VOCABULARY = 128_256
TEMPERATURES = (1.0, 0.7)
KINDS = {True: 7, False: 8}  # of rows, quick or not
# In quick runs only.
FEW_ROWS, FEW_COLUMNS = 4, 200


def bound(function: str, dtype: str) -> float:
    """The contract, in ULP."""
    if dtype in ("float16", "bfloat16"):
        return 0.51
    return 4.0 if function in BACKWARD else 2.0


def available() -> dict[str, str | None]:
    """Each dtype with None, or with the reason why it cannot be checked."""
    without = "ml_dtypes is not installed" if importlib.util.find_spec("ml_dtypes") is None else None
    return {dtype: without if dtype == "bfloat16" else None for dtype in DTYPES}


def families(dtype: np.dtype, *, quick: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Kinds of rows: a name and a 2-D array of logits each, seeded."""
    rng = np.random.default_rng(2024)
    # Decimal arithmetic takes 10 us an exponential.
    decimals = oracle.in_decimals(dtype)
    rows, columns = (FEW_ROWS, FEW_COLUMNS) if quick else (8, 500) if decimals else (64, 1000)
    largest = float(largest_finite(dtype))

    def normal(mean, spread, shape=(rows, columns)):
        return (mean + spread * rng.standard_normal(shape)).astype(dtype)

    yield "N(0, 3)", normal(0, 3)
    yield "N(0, 30)", normal(0, 30)
    yield "1e4 + N(0, 5)", normal(1e4, 5)
    confident = normal(0, 1)
    confident[np.arange(rows), rng.integers(0, columns, rows)] = np.linspace(10, 60, rows).astype(dtype)
    yield "confident", confident
    yield "tied", rng.integers(0, 3, (rows, columns)).astype(dtype)
    yield "rectified", np.maximum(normal(-1, 1), 0)
    yield "tiny", normal(0, 1e-6)
    yield "huge", normal(0, largest / 64)
    if not quick:
        yield f"{VOCABULARY} wide", normal(0, 2, (1 if decimals else 2, VOCABULARY))


def largest_finite(dtype: np.dtype) -> float:
    digits, lowest = oracle.format_of(dtype)
    return float(np.ldexp(2.0 - 2.0 ** (1 - digits), 1 - lowest))


Evaluate = Callable[[str, tuple[np.ndarray, ...], float], np.ndarray]


def measure(
    evaluate: Evaluate, dtype_name: str, functions: tuple[str, ...] = FUNCTIONS, *, quick: bool = False,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> Iterator[dict]:  # fmt: skip
    """One record per kind of row and function: the largest error over the rows and the temperatures.

    `evaluate(function, arrays, temperature)` gives the result to be judged, along the last axis. A backward
    pass gets what the forward pass gave, as it was stored, and is judged as a function of that.
    """
    dtype = dtype_of(dtype_name)
    for family, x in families(dtype, quick=quick):
        worst = dict.fromkeys(functions, 0.0)
        # One temperature for a vocabulary of Decimals, which takes seconds.
        once = oracle.in_decimals(dtype) and x.shape[1] == VOCABULARY
        for temperature in temperatures[: 1 if once else None]:
            exact = oracle.Forward(oracle.wide(x, dtype), temperature)
            grad = np.random.default_rng(7).standard_normal(x.shape).astype(dtype)
            stored: dict[str, np.ndarray] = {}
            for function in functions:
                # x/T - lse of huge logits is what the rounding of lse left: 0 or infinity, by chance.
                if function == "logsumexp_backward" and family == "huge" and temperature != 1:
                    continue
                if function in FORWARD:
                    got = stored[function] = evaluate(function, (x,), temperature)
                    truth, scale = getattr(exact, function)()
                else:
                    forward = stored[function.removesuffix("_backward")]
                    arrays = (grad[:, 0], x, forward) if function == "logsumexp_backward" else (grad, forward)
                    got = evaluate(function, arrays, temperature)
                    wide = [oracle.wide(a, dtype) for a in arrays]
                    truth, scale = getattr(oracle, function)(*wide, temperature)
                error = oracle.error_in_ulp(got, truth, scale, dtype)
                worst[function] = max(worst[function], error) if got.dtype == dtype else float("inf")
        for function, error in worst.items():
            limit = bound(function, dtype_name)
            yield {
                "function": function,
                "dtype": dtype_name,
                "rows": family,
                "elements": x.size,
                "max_ulp": error if np.isfinite(error) else None,
                "bound": limit,
                "ok": bool(error <= limit),
            }
