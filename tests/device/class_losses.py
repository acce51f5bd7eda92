"""Losses over classes in Numba's CUDA simulator: tests/test_cuda.py runs this as it runs simulated.py."""

import itertools

import numpy as np
import pytest
from losses_oracle import expected
from oracle import BFLOAT16, DTYPES, check
from samples import FAMILIES, sample
from simulated import forget, here, one_thread, there  # noqa: F401

import numbasoft
from numbasoft.cuda import calls, class_losses, geometry, operations, split, totals
from numbasoft.ops.cross_entropy import cuda as kernels

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
IN_16_BITS = "float16", "bfloat16"
by_dtype = pytest.mark.parametrize("dtype", DTYPES)

VARIANTS = {
    "plain": {},
    "z_loss": {"z_loss": 1e-3},
    "temperature": {"temperature": 0.7},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-4},
}


@pytest.fixture
def few_threads(monkeypatch, one_thread):  # noqa: F811
    """Whole rows for single threads, and the least blocks of what comes before and after them."""
    monkeypatch.setattr(totals, "THREADS", 32)
    monkeypatch.setattr(kernels, "THREADS", 32)
    renew()
    yield
    renew()


def renew():
    forget()
    class_losses.steps.cache_clear()
    calls.compiled.cache_clear()
    for module in split, kernels, totals:
        for factory in vars(module).values():
            getattr(factory, "cache_clear", lambda: None)()


def run(name, *arrays, **options):
    given = [there(a) if isinstance(a, np.ndarray) else a for a in arrays]
    options = {k: there(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    result = getattr(numbasoft, name)(*given, **options)
    return tuple(map(here, result)) if isinstance(result, tuple) else here(result)


def options_of(variant, classes, rng):
    chosen = dict(VARIANTS[variant])
    if "weight" in chosen:
        chosen["weight"] = rng.uniform(0, 2, classes)
    return chosen


def exact(x, target, **chosen):
    chosen["smoothing"] = chosen.pop("label_smoothing", 0.0)
    return expected(x, target, **chosen)


def classes_for(rng, x):
    """Classes for rows: drawn, and for every other row that of its largest logit."""
    target = rng.integers(x.shape[1], size=len(x))
    target[::2] = x[::2].astype("f8").argmax(1)
    return target


def distributions(rng, x):
    n = x.shape[1]
    q = rng.dirichlet(np.full(n, 0.3), len(x))
    q[::3] = np.eye(n)[rng.integers(n, size=len(q[::3]))]
    q[1::3] = np.eye(n)[x[1::3].astype("f8").argmax(1)]
    return q.astype(x.dtype)


# --- accuracy ----------------------------------------------------------------------------------------------


def compare(x, target, what, **chosen):
    loss, grad = run("cross_entropy_value_and_grad", x, target, reduction="none", **chosen)
    assert loss.dtype == grad.dtype == x.dtype
    losses, gradients = exact(x, target, **chosen)
    limit = 0.51 if x.itemsize == 2 else 4
    check(loss, losses, limit, f"loss, {what}")
    check(grad, gradients, 4, f"gradient, {what}")
    check(run("cross_entropy", x, target, reduction="none", **chosen), losses, limit, f"alone, {what}")


@pytest.mark.parametrize("variant", VARIANTS)
@by_dtype
def test_class_indices_are_within_the_contract(dtype, variant, rng, few_threads):
    for family, n in itertools.product(FAMILIES, (1, 2, 67)):
        x = sample(family, rng, 3, n, dtype)
        compare(x, classes_for(rng, x), f"{family} {n}", **options_of(variant, n, rng))
