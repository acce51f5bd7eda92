"""The literal loops: what they compute, that they are written as defined, and what they are read for."""

import ast
import contextlib
import inspect
import os
import pathlib
import subprocess
import sys
import textwrap

import numba
import numpy as np
import oracle
import pytest

import numbasoft
from numbasoft import literal
from numbasoft.ops.log_softmax.literal import log_softmax_loops
from numbasoft.ops.softmax.literal import softmax_loops

nan, inf = np.nan, np.inf

SOFTMAXES = (literal.softmax_naive, literal.softmax_stable, literal.softmax)
SHIFTED = (literal.softmax_stable, literal.softmax)
PUBLIC = (*SOFTMAXES, literal.log_softmax)

by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def by(functions):
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.__name__)


# --------------------------------------------------------------------------------------- worked examples


@by(SOFTMAXES)
def test_one_two_three(function):
    y = function([1.0, 2.0, 3.0])
    np.testing.assert_allclose(y, [0.09003057, 0.24472847, 0.66524096], atol=5e-9)
    np.testing.assert_allclose(y.sum(), 1.0, rtol=1e-15)


@pytest.mark.parametrize("row", [[1000.0] * 3, [-1000.0] * 3])
@by_dtype
def test_nan_appears_without_the_shift_and_goes_with_it(row, dtype):
    row = np.array(row, dtype)
    assert np.isnan(literal.softmax_naive(row)).all()
    for function in (*SHIFTED, numbasoft.softmax):
        np.testing.assert_array_equal(function(row), np.full(3, 1 / 3, dtype))


def test_the_logarithm_of_a_probability_that_underflows():
    row = [-1.0, 10.0, 5000.0]
    for function in SHIFTED:
        np.testing.assert_array_equal(function(row), [0, 0, 1])
        with np.errstate(divide="ignore"):
            np.testing.assert_array_equal(np.log(function(row)), [-inf, -inf, 0])
    log_y = literal.log_softmax(row)
    np.testing.assert_array_equal(log_y, [-5001, -4990, 0])
    np.testing.assert_array_equal(np.exp(log_y), [0, 0, 1])


def test_temperature_keeps_the_naive_loss_finite_and_log_softmax_needs_none():
    z = np.array([55.8906, -114.5621, 6.3440, -30.2473, -44.1440], np.float32)
    target = np.array([0, 0, 1, 0, 0], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(-np.sum(target * np.log(literal.softmax_naive(z))))
    softened = literal.softmax_naive(z / np.float32(10))
    assert -np.sum(target * np.log(softened)) == pytest.approx(4.9619, abs=5e-5)
    assert -literal.log_softmax(z)[2] == pytest.approx(49.5466, abs=5e-5)
    assert -literal.log_softmax(z / np.float32(10))[2] == pytest.approx(4.9619, abs=5e-5)


def test_the_sum_of_two_probabilities_is_the_probability_of_the_pair(rng):
    x = rng.normal(0, 3, 10)
    pair = np.append(x[2:], np.log(np.exp(x[0]) + np.exp(x[1])))
    for function in SOFTMAXES:
        np.testing.assert_allclose(function(x)[:2].sum(), function(pair)[-1], rtol=1e-14)


# -------------------------------------------------------------------------------------------- accuracy


def roundings(x, axis):
    """The bound of Blanchard, Higham and Higham for the shifted formulas in units of u, and 1 for exp."""
    n = x.shape[axis]
    return n + 3 + 2 * np.ptp(x.astype(np.float64), axis=axis, keepdims=True)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@by_dtype
def test_error_on_every_axis_is_within_the_bound_of_the_formulas(axis, dtype, rng):
    x = rng.normal(0, 3, (3, 21, 4, 17)).astype(dtype)
    limit = roundings(x, axis)
    for function in SHIFTED:
        y = function(x, axis)
        assert y.dtype == dtype
        assert (oracle.softmax(x, axis).errors(y) <= limit).all()
    log_y, exact = literal.log_softmax(x, axis), oracle.log_softmax(x, axis).floats()
    assert log_y.dtype == dtype
    # the error of log(s) is absolute; those of the two subtractions are relative to what they are given
    u = np.finfo(dtype).eps / 2
    assert (np.abs(log_y.astype(np.float64) - exact) <= u * (limit + 3 * np.abs(exact))).all()


@by_dtype
def test_error_on_offset_and_wide_rows(dtype, rng):
    for x in (1e4 + rng.normal(0, 5, (5, 500)), rng.normal(0, 30, (5, 1000))):
        x = x.astype(dtype)
        for function in SHIFTED:
            assert (oracle.softmax(x).errors(function(x)) <= roundings(x, -1)).all()


def test_the_ladder_from_naive_to_production(rng):
    x = (100 + rng.normal(0, 3, 300_000)).astype(np.float32)
    exact = oracle.softmax(x)
    errors = [exact.errors(f(x)).max() for f in (literal.softmax_naive, literal.softmax, numbasoft.softmax)]
    assert errors[0] == inf, "exp(100) has no float32"
    assert errors[1] > 10, "a float32 sum of 300,000 terms loses digits"
    assert errors[2] <= 2


# --------------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize(
    ("row", "y", "log_y"),
    [
        ([0.0, nan, 1.0], [nan] * 3, [nan] * 3),
        ([0.0, inf, 1.0], [nan] * 3, [nan] * 3),
        ([-inf, -inf, -inf], [nan] * 3, [nan] * 3),
        ([-inf, 0.0, 0.0], [0, 0.5, 0.5], [-inf, -np.log(2), -np.log(2)]),
        ([7.0], [1], [0]),
        ([], [], []),
    ],
    ids=str,
)
def test_special_values(row, y, log_y):
    for function in SHIFTED:
        np.testing.assert_array_equal(function(np.array([row, row])), np.array([y, y]))
    np.testing.assert_array_equal(literal.log_softmax(np.array([row, row])), np.array([log_y, log_y]))


@by(PUBLIC)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_shapes_without_elements_and_without_axes(function, shape):
    y = function(np.zeros(shape))
    assert np.shape(y) == shape
    np.testing.assert_array_equal(y, np.full(shape, 0.0 if function is literal.log_softmax else 1.0))


@by(PUBLIC)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "uint64", "float16", "bfloat16", ">f8"])
def test_other_real_dtypes_become_float64(function, dtype):
    x = np.array([[0, 1, 1], [1, 0, 0]]).astype(oracle.DTYPES.get(dtype, dtype))
    y = function(x)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, function(x.astype(np.float64)))


@by(PUBLIC)
@pytest.mark.parametrize("dtype", ["complex64", "longdouble", "object", "U3", "M8[s]"])
def test_other_dtypes_are_named_in_a_type_error(function, dtype):
    with pytest.raises(TypeError, match=str(np.dtype(dtype)).replace("[", ".").replace("]", ".")):
        function(np.zeros(3, dtype))


@by(PUBLIC)
@pytest.mark.parametrize("axis", [1, -2, 10**9])
def test_axis_out_of_range(function, axis):
    with pytest.raises(IndexError, match="axis"):
        function(np.zeros(3), axis)


@by(PUBLIC)
@pytest.mark.parametrize("axis", [0.0, "0", (0, 1), None])
def test_axis_that_is_no_integer(function, axis):
    with pytest.raises(TypeError, match="axis"):
        function(np.zeros((3, 3)), axis)


@by(PUBLIC)
@by_dtype
def test_layouts_and_a_result_of_its_own(function, dtype, rng):
    x = rng.normal(0, 3, (6, 8, 9)).astype(dtype)
    read_only = x.copy()
    read_only.flags.writeable = False
    swapped = x.astype(x.dtype.newbyteorder())
    views = np.asfortranarray(x), x[::2, ::-1, 1:8], x.T, np.broadcast_to(x[:1], x.shape), read_only, swapped
    for view in views:
        before = view.tobytes()
        for axis in range(3):
            y = function(view, axis)
            assert y.dtype == dtype
            np.testing.assert_array_equal(y, function(np.array(view, dtype, order="C"), axis))
            assert not np.shares_memory(y, view)
        assert view.tobytes() == before


# --------------------------------------------------------------------------------------- the loop nests

STEPS = {
    softmax_loops: [
        "loop 1: the maximum over the softmax axis",
        "loop 2: exp of every element after the shift",
        "loop 3: the sum over the softmax axis",
        "loop 4: every element divided by its sum",
    ],
    log_softmax_loops: [
        "loop 1: the maximum over the softmax axis",
        "loop 2: exp of every element after the shift",
        "loop 3: the sum over the softmax axis",
        "loop 4: the log of every sum",
        "loop 5: every element less its maximum and its log",
    ],
}
WRITTEN = {softmax_loops: ["m", "e", "s", "y"], log_softmax_loops: ["m", "e", "s", "log_s", "y"]}

by_loops = pytest.mark.parametrize("loops", STEPS, ids=lambda f: f.__name__)


def loop_nests(loops):
    lines = textwrap.dedent(inspect.getsource(loops.py_func)).splitlines()
    body = ast.parse("\n".join(lines)).body[0].body
    return lines, body


@by_loops
def test_one_loop_nest_per_step_and_nothing_else(loops):
    lines, body = loop_nests(loops)
    shape, *nests = body
    assert ast.unparse(shape) in ("outer, n, inner = x.shape", "(outer, n, inner) = x.shape")
    assert all(isinstance(nest, ast.For) for nest in nests)
    assert [lines[nest.lineno - 2].strip().removeprefix("# ") for nest in nests] == STEPS[loops]


@by_loops
def test_every_nest_runs_over_the_whole_array_and_writes_one_array(loops):
    _, (_, *nests) = loop_nests(loops)
    for nest, name in zip(nests, WRITTEN[loops], strict=True):
        assert ast.unparse(nest.iter) == "prange(outer)"
        inside = [node for node in ast.walk(nest) if node is not nest and isinstance(node, ast.For)]
        ranges = {"range(inner)"} if name == "log_s" else {"range(n)", "range(inner)"}
        assert {ast.unparse(loop.iter) for loop in inside} == ranges
        targets = [node for node in ast.walk(nest) if isinstance(node, ast.Subscript)]
        stored = {ast.unparse(node.value) for node in targets if isinstance(node.ctx, ast.Store)}
        assert stored == {name}


@by_loops
def test_no_nest_is_fused_by_the_compiler(loops):
    x = np.zeros((2, 3, 4))
    per_row = [np.zeros((2, 4)) for _ in range(3)]
    arrays = {
        softmax_loops: (x, per_row[0], x.copy(), per_row[1], x.copy()),
        log_softmax_loops: (x, per_row[0], x.copy(), *per_row[1:], x.copy()),
    }[loops]
    again = numba.njit(parallel=True)(loops.py_func)
    with numbasoft.jit.parallel_region():
        again.compile(tuple(numba.typeof(a) for a in arrays))
    (code,) = again.overloads.values()
    report = code.metadata["parfor_diagnostics"]
    assert len(report.initial_parfors) == len(STEPS[loops])
    assert report.fusion_info == {}


# --------------------------------------------------------------------------------------------- threads


def test_one_thread_gives_the_same_bits(monkeypatch, rng):
    x = rng.normal(0, 3, (7, 30, 5)).astype(np.float32)
    expected = literal.softmax(x, 1), literal.log_softmax(x, 1)
    monkeypatch.setattr(literal, "parallel_region", lambda: contextlib.nullcontext(False))
    np.testing.assert_array_equal(literal.softmax(x, 1), expected[0])
    np.testing.assert_array_equal(literal.log_softmax(x, 1), expected[1])


def test_many_python_threads_under_workqueue():
    code = """
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np
        from numbasoft import literal
        x = np.random.default_rng(0).normal(0, 3, (200, 1000)).astype(np.float32)
        y = literal.softmax(x)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: literal.softmax(x), range(64)))
        assert all(np.array_equal(r, y) for r in results)
        from numbasoft import jit
        print(jit.threading_layer())
    """
    package = str(pathlib.Path(numbasoft.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "NUMBA_THREADING_LAYER": "workqueue"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "workqueue\n"), done.stderr
