"""numbasoft.scipy.special beside SciPy: its own tests, its results, and where the two differ on purpose.

SciPy's wheels bring its tests along. As a script, this file runs those of the three functions on numbasoft:

    python tests/test_scipy_special.py

Not run are the cases for other array libraries (PyTorch, CuPy, JAX, Dask), which SciPy's suite adds where
SCIPY_ARRAY_API is set: numbasoft.scipy.special takes NumPy arrays.
"""

import inspect
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter

import numpy as np
import pytest

import numbasoft
from numbasoft.scipy import special

pytest.importorskip("mpmath", reason="mpmath is not installed, which gives the exact answers here")
pytest.importorskip("scipy", reason="SciPy is not installed, whose functions and tests these are")
import mpmath
import scipy
import scipy.special

nan, inf = np.nan, np.inf

SCIPY = tuple(map(int, scipy.__version__.split(".")[:2]))
with_scipy_1_17 = pytest.mark.skipif(
    SCIPY < (1, 17), reason=f"the semantics are SciPy 1.17's; this is {scipy.__version__}, which had others"
)

NAMES = special.__all__
SUITE = "scipy.special.tests.test_logsumexp"
EXCLUDED = {
    "test_wrap_radians": "tests a private helper of SciPy's, which none of the three functions here has",
}

# --------------------------------------------------------------------------------------- SciPy's own tests


class OnNumbasoft:
    """A pytest plugin: SciPy's tests call numbasoft's functions, and how they went is kept."""

    def __init__(self):
        self.calls, self.outcomes, self.not_passed = Counter(), Counter(), {}

    def counted(self, name):
        def function(*args, **kwargs):
            self.calls[name] += 1
            return getattr(special, name)(*args, **kwargs)

        return function

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.originalname not in EXCLUDED]
        for module in {item.module for item in items}:
            for name in NAMES:
                assert getattr(module, name) is getattr(scipy.special, name)
                setattr(module, name, self.counted(name))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
            if report.outcome != "passed":
                self.not_passed[report.nodeid] = str(report.longrepr)


def run_suite():
    plugin = OnNumbasoft()
    with tempfile.TemporaryDirectory() as folder:
        settings = pathlib.Path(folder, "pytest.ini")  # not those of a project that this Python lives in
        settings.write_text("[pytest]\n")
        options = ["-q", "-c", str(settings), "-p", "no:cacheprovider"]
        pytest.main([*options, "--pyargs", SUITE], plugins=[plugin])
    print(json.dumps({"calls": plugin.calls, "outcomes": plugin.outcomes, "not passed": plugin.not_passed}))


@with_scipy_1_17
def test_scipys_own_tests_pass():
    package = str(pathlib.Path(numbasoft.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "SCIPY_ARRAY_API"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["not passed"] == {}
    assert found["outcomes"]["passed"] >= 400, "SciPy 1.17 has 406 of them"
    assert set(found["calls"]) == set(NAMES)


# ------------------------------------------------------------------------------------------- like SciPy


@with_scipy_1_17
@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (special, scipy.special))
    assert str(ours) == str(theirs)


def alike(got, want, rtol=None):
    """Same type, shape and dtype, and nearly the same values."""
    got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
    for g, w in zip(got, want, strict=True):
        assert type(g) is type(w)
        assert np.shape(g) == np.shape(w)
        assert g.dtype == w.dtype
        limit = 4 * np.finfo(w.dtype).eps if rtol is None else rtol
        np.testing.assert_allclose(g, w, rtol=limit, atol=limit)


DTYPES = {"float16": 3e-3, "float32": 1e-5, "float64": 1e-12, "int32": 1e-12, "int64": 1e-12, ">f4": 1e-5}
AXES = [None, 0, 1, -1, (0, 2), (1, -1), (0, 1, 2), ()]


WEIGHTS = {
    "none": lambda rng: None,
    "positive": lambda rng: rng.uniform(0.1, 5, (4, 5, 6)).astype(np.float32),
    "mixed": lambda rng: rng.normal(0, 3, (4, 5, 6)).astype(np.float32),
    "complex": lambda rng: rng.normal(0, 3, (4, 5, 6)) + 1j * rng.normal(0, 3, (4, 5, 6)),
    "a number": lambda rng: 2.5,
    "fewer": lambda rng: rng.uniform(0.1, 5, (5, 1)).astype(np.float32),
    "more": lambda rng: rng.uniform(0.1, 5, (2, 4, 5, 6)),
}


@with_scipy_1_17
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_like_scipys_softmaxes(name, dtype, rng):
    x = rng.normal(0, 3, (4, 5, 6)).astype(dtype)
    for axis in AXES:
        alike(getattr(special, name)(x, axis), getattr(scipy.special, name)(x, axis), DTYPES[dtype])


@with_scipy_1_17
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [*DTYPES, "complex64", "complex128"])
def test_like_scipys_logsumexp(dtype, weights, rng):
    a = rng.normal(0, 3, (4, 5, 6))
    if dtype.startswith("complex"):
        a = a + 1j * rng.normal(0, 3, a.shape)
    a, b = a.astype(dtype), WEIGHTS[weights](rng)
    for axis, keepdims, return_sign in itertools.product(AXES, (False, True), (False, True)):
        got, want = (m.logsumexp(a, axis, b, keepdims, return_sign) for m in (special, scipy.special))
        real = np.real(want[0] if return_sign else want)
        alike(got, want, {2: 1e-2, 4: 2e-4, 8: 1e-9}[real.itemsize])


@with_scipy_1_17
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.softmax(1000),
        lambda m: m.softmax(np.float32(2)),
        lambda m: m.log_softmax(1.0),
        lambda m: m.log_softmax([[1, 2], [3, 5]], axis=0),
        lambda m: m.log_softmax([inf, 0.0, -inf]),
        lambda m: m.log_softmax(np.float32([[inf, 0], [2, 3], [nan, inf], [inf, inf]]), axis=1),
        lambda m: m.logsumexp(3),
        lambda m: m.logsumexp(3.0, keepdims=True),
        lambda m: m.logsumexp(np.float32(3), b=2.0),
        lambda m: m.logsumexp(3.0, b=[1, 2, 3]),
        lambda m: m.logsumexp([True, False]),
        lambda m: m.logsumexp(np.zeros(2, np.int8), b=np.ones(2, np.float32)),
        lambda m: m.logsumexp(np.zeros((2, 0)), axis=1),
        lambda m: m.logsumexp(np.zeros((0, 2)), axis=1, keepdims=True),
        lambda m: m.logsumexp([-inf, -inf], return_sign=True),
        lambda m: m.logsumexp([inf, 1.0], return_sign=True),
        lambda m: m.logsumexp([nan, 1.0], return_sign=True),
        lambda m: m.logsumexp([nan, 1.0], b=[0, 1], return_sign=True),
        lambda m: m.logsumexp([inf, inf], b=[1, -1], return_sign=True),
        lambda m: m.logsumexp([inf, 1.0], b=[-1, 1], return_sign=True),
        lambda m: m.logsumexp([inf, 1.0], b=[-1, 1]),
        lambda m: m.logsumexp([1.0, 2.0], b=[inf, 1], return_sign=True),
        lambda m: m.logsumexp([-inf, 2.0], b=[inf, 1], return_sign=True),
        lambda m: m.logsumexp([1.0, 2.0], b=[nan, 1], return_sign=True),
        lambda m: m.logsumexp([1, 1, 1], b=[2, -1, -1], return_sign=True),
        lambda m: m.logsumexp([0.0, -40.0], b=[1, 2]),
        lambda m: m.logsumexp([0.0, np.pi * 1j], b=[1, 3]),
    ],
    ids=lambda call: inspect.getsource(call).strip().rstrip(",").removeprefix("lambda m: m."),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_like_scipy_in_special_cases(call):
    alike(call(special), call(scipy.special))


# --------------------------------------------------------------------------------------- unlike SciPy


def test_small_integers_and_bool_are_float64():
    x = np.array([0, 1, 255], np.uint8)
    np.testing.assert_allclose(special.softmax(x), [0, 0, 1], atol=1e-100)
    assert special.softmax(x).dtype == special.log_softmax(x > 0).dtype == np.float64


def test_empty_arrays():
    assert special.softmax([]).shape == special.log_softmax([]).shape == (0,)
    assert special.logsumexp(np.zeros((2, 0))) == -inf
    assert special.logsumexp([], return_sign=True) == (-inf, 0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([inf, -inf], [0, 1], (-inf, 0)),
        ([nan, inf], [0, 1], (inf, 1)),
        ([1000.0, 0.0], [0, 0], (-inf, 0)),
        ([1000.0, 1000.0], [1, -1], (-inf, 0)),
        ([-1000.0, -1000.0], [1, -1], (-inf, 0)),
    ],
)
def test_weights_of_zero_and_terms_that_cancel(a, b, expected):
    assert special.logsumexp(a, b=b, return_sign=True) == expected


def test_bfloat16_is_a_float_among_others():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from ml_dtypes")
    x = np.array([1, 2, 3], ml_dtypes.bfloat16)
    exact = np.array(scipy.special.logsumexp([1, 2, 3], b=[1, 2, 3]), ml_dtypes.bfloat16)
    for got in (special.softmax(x), special.log_softmax(x), special.logsumexp(x), special.logsumexp(x, b=2)):
        assert got.dtype == ml_dtypes.bfloat16
    assert special.logsumexp(x, b=x) == exact


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: special.softmax(np.zeros(2, complex)), TypeError, "complex128"),
        (lambda: special.log_softmax(np.zeros(2, complex)), TypeError, "complex128"),
        (lambda: special.logsumexp(np.zeros(2, np.longdouble)), TypeError, str(np.dtype(np.longdouble))),
        (lambda: special.logsumexp(["1"]), TypeError, "a has dtype"),
        (lambda: special.logsumexp(np.ma.array([1.0, 2.0], mask=[0, 1])), TypeError, "a is a masked array"),
        (lambda: special.logsumexp([1.0], b=[None]), TypeError, "b has dtype object"),
        (lambda: special.logsumexp([1.0, 2.0], b=[1, 2, 3]), ValueError, r"b has shape \(3,\).*\(2,\) of a"),
        (lambda: special.logsumexp([1.0], axis=1), IndexError, "axis"),
        (lambda: special.logsumexp([1.0], axis=1, b=[1.0]), IndexError, "axis"),
        (lambda: special.logsumexp([[1.0]], axis=(0, 0)), ValueError, "axis"),
        (lambda: special.logsumexp([[1.0]], axis=(0, -2), b=1j), ValueError, "axis"),
        (lambda: special.logsumexp([1.0], axis="0", b=[1.0]), TypeError, "axis is '0'"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


# -------------------------------------------------------------------------------- accuracy of weighted sums


def exact_logsumexp(a, b):
    """log sum b exp(a) of one row, and by how much the sum magnifies errors of its terms."""
    with mpmath.workprec(2000):
        terms = [
            mpmath.mpf(w) * mpmath.exp(mpmath.mpf(v)) for v, w in zip(a.tolist(), b.tolist(), strict=True)
        ]
        total = mpmath.fsum(terms)
        return mpmath.log(abs(total)), mpmath.sign(total), float(mpmath.fsum(map(abs, terms)) / abs(total))


def weighted_rows(rng):
    for n in (1, 2, 3, 10, 1000):
        a = rng.normal(0, 5, n)
        yield a, rng.uniform(0.1, 10, n)
        yield a, rng.normal(0, 1, n)
        yield a, np.where(rng.random(n) < 0.5, -1.0, 1.0)
        yield a + 1000, rng.normal(0, 1, n)
        yield a - 1000, rng.integers(1, 9, n).astype(float)
        yield 100 * a, rng.normal(0, 1, n)
        yield -40 - np.arange(n)[::-1] * 0.01, np.r_[np.full(n - 1, 3.0), -2.0]
        yield np.r_[0.0, -30 - rng.random(n)], np.r_[1.0, rng.normal(0, 5, n)]
        yield rng.uniform(-700, 700, n), rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-300, 300, n)
        yield rng.uniform(-5, 5, n), 10.0 ** rng.uniform(-320, -290, n)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weighted_sums_are_as_exact_as_their_cancellation_allows(dtype, rng):
    u = np.finfo(dtype).eps / 2
    for a, b in weighted_rows(rng):
        with np.errstate(over="ignore", under="ignore"):
            a, b = a.astype(dtype), b.astype(dtype)
        kept = np.isfinite(b) & (b != 0)
        if not kept.any():
            continue
        log_size, sign, condition = exact_logsumexp(a[kept], b[kept])
        res, sgn = special.logsumexp(a[kept], b=b[kept], return_sign=True)
        assert (res.dtype, sgn) == (dtype, sign)
        # float32 is computed in float64 and rounded once
        factor = 3 if dtype == "float64" else 1.001 + 1e-7 * condition
        error = float(abs(log_size - mpmath.mpf(float(res))))
        assert error <= factor * u * (abs(float(log_size)) + (condition if dtype == "float64" else 0))


def test_near_zero_nothing_is_lost():
    """The logarithm of 1 and a little more is that little; weights of the little count."""
    for b, expected in (([1, 1], np.exp(-40)), ([1, 3], 3 * np.exp(-40)), ([1, -2], -2 * np.exp(-40))):
        np.testing.assert_allclose(special.logsumexp([0.0, -40.0], b=b), expected, rtol=1e-15)
    turned = special.logsumexp([0.0, -40.0 + 0.5j])
    np.testing.assert_allclose(turned, np.exp(-40 + 0.5j), rtol=1e-15)


def test_weights_too_large_and_too_small_for_exp():
    """exp(-800) is 0 in float64, and 1e300 times the real exp(-800) is not."""
    a, b = np.array([0.0, -800.0]), np.array([1e-300, 1e300])
    np.testing.assert_allclose(special.logsumexp(a, b=b), float(exact_logsumexp(a, b)[0]), rtol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_the_docstrings(name):
    import doctest

    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for example in finder.find(getattr(special, name), globs={}):
        assert runner.run(example).failed == 0


if __name__ == "__main__":
    run_suite()
