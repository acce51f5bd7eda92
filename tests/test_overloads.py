"""The functions called from a caller's own ``@njit`` code: the bits of calls from Python, and errors in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.errors import TypingError
from numba.core.runtime import _nrt_python, rtsys
from numba.experimental import jitclass
from samples import assert_same_bits
from test_fast_paths import run_fresh

import numbasoft
from numbasoft import elementary, overloads


@numba.njit
def softmax(x, axis, temperature):
    return numbasoft.softmax(x, axis, temperature=temperature)


@numba.njit
def log_softmax(x, axis, temperature):
    return numbasoft.log_softmax(x, axis, temperature=temperature)


@numba.njit
def logsumexp(x, axis, temperature):
    return numbasoft.logsumexp(x, axis, temperature=temperature)


@numba.njit
def masked(x, axis, where, out):
    return (
        numbasoft.softmax(x, axis, where=where, out=out),
        numbasoft.log_softmax(x, axis, where=where),
        numbasoft.logsumexp(x, axis, where=where),
    )


@numba.njit
def into(x, axis, out):
    return numbasoft.softmax(x, axis, out=out)


@numba.njit
def gradients(g, y, log_y, axis, temperature):
    first = numbasoft.softmax_backward(g, y, axis, temperature=temperature)
    return first, numbasoft.log_softmax_backward(g, log_y, axis, temperature=temperature)


@numba.njit
def lse_gradient(g, x, lse, axis, temperature):
    return numbasoft.logsumexp_backward(g, x, lse, axis, temperature=temperature)


FORWARD = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def logits(rng, shape, dtype):
    return rng.normal(0, 10, shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((7,), [0, -1]), ((1000,), [0]), ((5, 33), [0, 1]), ((40, 10), [0, -1]), ((3, 20, 7), [0, 1, 2, -2])],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3, 1e-3])
@pytest.mark.parametrize("name", FORWARD)
@by_dtype
def test_the_bits_are_those_of_a_call_from_python(dtype, name, temperature, shape, axes, rng):
    x = logits(rng, shape, dtype)
    for axis in axes:
        expected = getattr(numbasoft, name)(x, axis, temperature=temperature)
        # one number comes from Numba as a Python float, whatever it was
        assert_same_bits(np.asarray(FORWARD[name](x, axis, temperature)).astype(dtype), expected)


@pytest.mark.parametrize("name", FORWARD)
@by_dtype
def test_rows_of_all_kinds(dtype, name, rng):
    x = rng.normal(0, 50, (12, 300)).astype(dtype)
    x[1, 4], x[2, 5], x[3], x[4, 7], x[5], x[6, 1:] = np.nan, np.inf, -np.inf, -np.inf, 2, -1e30
    x[7:9] *= 1e4
    assert_same_bits(FORWARD[name](x, 1, 1.0), getattr(numbasoft, name)(x))


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: x[::-1, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[0], x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORWARD)
def test_layouts(name, layout, rng):
    x = LAYOUTS[layout](logits(rng, (9, 50), "f4"))
    for axis in 0, 1:
        assert_same_bits(FORWARD[name](x, axis, 1.0), getattr(numbasoft, name)(x, axis))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("name", FORWARD)
def test_integers_are_computed_in_float64(name, dtype, rng):
    x = rng.integers(0, 2, (4, 30)).astype(dtype)
    assert_same_bits(FORWARD[name](x, 1, 1.0), getattr(numbasoft, name)(x))


@pytest.mark.parametrize("name", FORWARD)
def test_all_axes_and_nothing(name, rng):
    function = getattr(numbasoft, name)

    @numba.njit
    def over_all(x):
        return function(x, None)

    x = logits(rng, (6, 40), "f8")
    assert_same_bits(np.asarray(over_all(x)), function(x, None))
    for shape in (0, 3), (3, 0), (0,):
        empty = np.empty(shape, "f4")
        expected = function(empty, -1)
        assert_same_bits(np.asarray(FORWARD[name](empty, -1, 1.0), "f4"), expected)


@by_dtype
def test_masks_and_outputs(dtype, rng):
    x = logits(rng, (8, 60), dtype)
    for where in rng.random(x.shape) < 0.7, rng.random((1, 60)) < 0.5, np.zeros(x.shape, bool):
        for axis in 0, 1:
            out = np.empty_like(x)
            y, log_y, lse = masked(x, axis, where, out)
            assert_same_bits(out, numbasoft.softmax(x, axis, where=where))
            assert_same_bits(y, out)
            assert_same_bits(log_y, numbasoft.log_softmax(x, axis, where=where))
            assert_same_bits(lse, numbasoft.logsumexp(x, axis, where=where))


def test_outputs_of_any_layout_and_in_place(rng):
    x = logits(rng, (8, 60), "f4")
    for axis in 0, 1:
        expected = numbasoft.softmax(x, axis)
        for out in np.empty_like(x), np.empty_like(x, order="F"), np.empty((8, 120), "f4")[:, ::2], x.copy():
            assert into(x, axis, out).ctypes.data == out.ctypes.data
            assert_same_bits(np.ascontiguousarray(out), expected)
        y = x.copy()
        into(y, axis, y)
        assert_same_bits(y, expected)
        both = np.empty((16, 60), "f4")  # a result that overlaps what it is made of, of which there is a copy
        both[::2] = x
        into(both[::2], axis, both[:8])
        assert_same_bits(both[:8], expected)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@by_dtype
def test_gradients(dtype, temperature, rng):
    x, g = logits(rng, (5, 6, 40), dtype), rng.normal(size=(5, 6, 40)).astype(dtype)
    for axis in 0, 1, 2:
        options = {"axis": axis, "temperature": temperature}
        y, log_y = numbasoft.softmax(x, **options), numbasoft.log_softmax(x, **options)
        dx, dx_of_log = gradients(g, y, log_y, axis, temperature)
        assert_same_bits(dx, numbasoft.softmax_backward(g, y, **options))
        assert_same_bits(dx_of_log, numbasoft.log_softmax_backward(g, log_y, **options))
        lse = numbasoft.logsumexp(x, **options)
        expected = numbasoft.logsumexp_backward(lse, x, lse, **options)
        assert_same_bits(lse_gradient(lse, x, lse, axis, temperature), expected)
    row = x[0, 0]
    number = logsumexp(row, 0, temperature)
    expected = numbasoft.logsumexp_backward(2.0, row, number, temperature=temperature)
    assert_same_bits(lse_gradient(2.0, row, number, 0, temperature), expected)


def test_factors_are_those_of_calls_from_python(rng):
    @numba.njit
    def factors(t, like):
        return overloads.scale(t, like) + overloads.inverse(t, like) + overloads.quotient(1.0, 0.0, 0.0, t)

    temperatures = [
        *(2.0 ** rng.uniform(-90, 90, 20_000)),
        *rng.integers(1, 1000, 500),
        1.0,
        0.1,
        1e-30,
        1e30,
    ]
    wide = [*temperatures, *(10.0 ** rng.uniform(-290, 280, 20_000))]
    for like, some in (np.empty(1, "f4"), temperatures), (np.empty(1), wide):
        is_wide = like.dtype == np.float64
        for t in map(float, some):
            expected = elementary.scale_and_inverse(t, is_wide) + elementary.inverse(t, True)
            assert factors(t, like) == expected, t


@numba.njit
def gradients_into(g, y, log_y, x, lse, axis, out):
    numbasoft.softmax_backward(g, y, axis, out=out[0])
    numbasoft.log_softmax_backward(g, log_y, axis, out=out[1])
    numbasoft.logsumexp_backward(lse, x, lse, axis, out=out[2])


def test_gradients_into_outputs(rng):
    x, g = logits(rng, (6, 40), "f4"), rng.normal(size=(6, 40)).astype("f4")
    for axis in 0, 1:
        y, log_y, lse = (getattr(numbasoft, name)(x, axis) for name in FORWARD)
        expected = (
            numbasoft.softmax_backward(g, y, axis),
            numbasoft.log_softmax_backward(g, log_y, axis),
            numbasoft.logsumexp_backward(lse, x, lse, axis),
        )
        for order in "C", "F":
            out = tuple(np.empty_like(x, order=order) for _ in range(3))
            gradients_into(g, y, log_y, x, lse, axis, out)
            for got, want in zip(out, expected, strict=True):
                assert_same_bits(np.ascontiguousarray(got), want)
        one = g.copy(), log_y.copy(), x.copy()  # in place: over the gradient, the logarithms, the logits
        gradients_into(one[0], y, log_y, x, lse, axis, (one[0], np.empty_like(x), np.empty_like(x)))
        gradients_into(g, y, one[1], one[2], lse, axis, (np.empty_like(x), one[1], one[2]))
        for got, want in zip(one, expected, strict=True):
            assert_same_bits(got, want)


# Arrays of which Numba does not know, but which are, one behind the other: no copy is made of them.


@numba.njit
def softmax_between(both, start, stop, out_start):
    size = stop - start
    return numbasoft.softmax(both[start:stop:1], out=both[out_start : out_start + size])


@numba.njit
def gradient_between(y, both, start):
    return numbasoft.softmax_backward(both[: y.size : 1], y, out=both[start : start + y.size])


@numba.njit
def masked_between(x, where, out):
    return numbasoft.softmax(x, where=where, out=out)


def test_outputs_that_overlap_inputs(rng):
    both = logits(rng, 5000, "f4")
    before, y = both.copy(), numbasoft.softmax(logits(rng, 300, "f4"))
    for start in 1, 16, 299:
        with pytest.raises(ValueError, match="overlaps"):
            softmax_between(both, 0, 300, start)
        with pytest.raises(ValueError, match="overlaps"):
            softmax_between(both, start, start + 300, 0)
        with pytest.raises(ValueError, match="overlaps"):
            gradient_between(y, both, start)
    where = both.view(np.bool_)[:4000]
    with pytest.raises(ValueError, match="overlaps"):
        masked_between(logits(rng, 4000, "f4"), where, both[:4000])
    with pytest.raises(ValueError, match="overlaps"):
        masked_between(logits(rng, 4000, "f4"), where, both[900:4900])
    assert_same_bits(both, before)
    assert_same_bits(softmax_between(both, 0, 300, 300), numbasoft.softmax(before[:300]))
    both[:] = before
    assert_same_bits(softmax_between(both, 0, 300, 0), numbasoft.softmax(before[:300]))
    both[:] = before
    assert_same_bits(gradient_between(y, both, 0), numbasoft.softmax_backward(before[:300], y))


def live_allocations():
    stats = rtsys.get_allocation_stats()
    return stats.alloc - stats.free


@numba.njit
def refusing(x):
    if x.size:
        raise ValueError("x")
    return x


@numba.njit
def refused(x):
    return refusing(x)


@pytest.fixture
def counted():
    """Numba counts allocations."""
    _nrt_python.memsys_enable_stats()
    yield
    _nrt_python.memsys_disable_stats()


@pytest.mark.usefixtures("counted")
def test_memory_is_given_back(rng):
    x = logits(rng, (8, 60), "f4")
    where, g = np.ones(60, bool), np.ones_like(x)
    lse = numbasoft.logsumexp(x)

    def call():
        masked(x, 0, where, np.empty_like(x))
        softmax(x.T, 0, 0.5)
        gradients(g, x, x, 0, 1.0)
        lse_gradient(lse, x, lse, 1, 1.0)

    call()
    before = live_allocations()
    for _ in range(50):
        call()
    assert live_allocations() == before

    def leaked(call, *given):
        before = live_allocations()
        for _ in range(20):
            with pytest.raises((ValueError, np.exceptions.AxisError)):
                call(*given)
        return live_allocations() - before

    least = leaked(refused, x)  # Numba frees nothing of a call that raises: every array that it has got stays
    assert leaked(softmax, x, 1, 0.0) <= least
    assert leaked(softmax, x, 5, 1.0) <= least
    assert leaked(logsumexp, x, 1, 0.0) <= least
    assert leaked(masked, x, 1, np.ones(61, bool), np.empty_like(x)) <= 3 * least
    assert leaked(into, x, 1, np.empty((60, 8), "f4")) <= 2 * least
    assert leaked(gradients, g, x, x, 1, 0.0) <= 3 * least


def test_callers_of_other_kinds(rng):
    x = logits(rng, (5, 3, 2, 40), "f4")
    expected = numbasoft.softmax(x)

    @numba.guvectorize(["(f4[:], f4[:])"], "(n)->(n)", nopython=True)
    def rows(row, out):
        numbasoft.softmax(row, out=out)

    @numba.vectorize(["f4(f4, f4)"])
    def two(a, b):
        return numbasoft.logsumexp(np.array([a, b]))

    @jitclass([("x", numba.float32[:, :])])
    class Logits:
        def __init__(self, x):
            self.x = x

        def probabilities(self):
            return numbasoft.softmax(self.x)

    @numba.njit
    def of_records(records):
        return numbasoft.softmax(records.x)

    with np.errstate(all="ignore"):  # NumPy asks the CPU, which has divided by what is in no row
        assert_same_bits(rows(x), expected)
        pairs = two(x[..., 0], x[..., 1])
    assert_same_bits(pairs, numbasoft.logsumexp(np.ascontiguousarray(x[..., :2])))
    assert_same_bits(Logits(x[0, 0]).probabilities(), expected[0, 0])
    for axis in range(4):
        assert_same_bits(softmax(x, axis, 1.0), numbasoft.softmax(x, axis))
    aligned = np.zeros(40, np.dtype([("a", "u1"), ("x", "f4")], align=True))
    aligned["x"] = x[0, 0, 0]
    assert_same_bits(of_records(aligned.view(np.recarray)), expected[0, 0, 0])
    with pytest.raises(TypingError, match="field of packed records"):
        of_records(np.zeros(40, [("a", "u1"), ("x", "f4")]).view(np.recarray))


def test_errors():
    x = np.ones((4, 5), "f4")
    with pytest.raises(np.exceptions.AxisError, match="axis is out of range"):
        softmax(x, 2, 1.0)
    for t in 0.0, -1.0, np.nan, np.inf, 1e-31:
        with pytest.raises(ValueError, match="temperature must be"):
            softmax(x, 1, t)
        with pytest.raises(ValueError, match="temperature must be"):
            gradients(x, x, x, 1, t)
    with pytest.raises(ValueError, match="another shape"):
        into(x, 1, np.empty((5, 4), "f4"))
    both = np.ones((5, 5), "f4")
    with pytest.raises(ValueError, match="overlaps"):
        into(both[:4], 1, both[1:])
    assert (both == 1).all()
    for where in np.ones(4, bool), np.ones((5, 5), bool), np.ones((0, 5), bool):
        with pytest.raises(ValueError, match="does not broadcast"):
            masked(x, 1, where, np.empty_like(x))
    with pytest.raises(ValueError, match="does not broadcast"):
        masked(np.empty((0, 9)), 1, np.ones((3, 4), bool), np.empty((0, 9)))
    with pytest.raises(ValueError, match="another shape"):
        gradients(x, np.ones((5, 4), "f4"), x, 1, 1.0)
    with pytest.raises(ValueError, match="shape of x without the axis"):
        lse_gradient(np.ones(5, "f4"), x, np.ones(4, "f4"), 1, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax(1.0, 0, 1.0), "x is float64"),
        (lambda: softmax(np.array(1.0), 0, 1.0), "at least one axis"),
        (lambda: softmax(np.ones(3, complex), 0, 1.0), "dtype complex128"),
        (lambda: softmax(np.ones((3, 3)), (0, 1), 1.0), "axis is UniTuple"),
        (lambda: softmax(np.ones(3), 0, "warm"), "temperature is unicode_type"),
        (lambda: into(np.ones(3), 0, np.ones(3, "f4")), "dtype float64"),
        (lambda: into(np.ones(3), 0, np.ones((3, 3))), "1 axes"),
        (lambda: into(np.ones(3), 0, np.broadcast_to(1.0, 3)), "read-only"),
        (lambda: masked(np.ones(3), 0, np.ones(3), np.ones(3)), "an array of bool"),
        (lambda: masked(np.ones(3), 0, np.ones((1, 3), bool), np.ones(3)), "at most 1 axes"),
        (lambda: gradients(np.ones(3), np.ones(3, "f4"), np.ones(3), 0, 1.0), "grad is array"),
        (lambda: lse_gradient(np.ones(3), np.ones(3), 1.0, 0, 1.0), "grad is array"),
    ],
)
def test_errors_while_the_caller_is_compiled(call, message):
    with pytest.raises(TypingError, match=message):
        call()


def test_arguments_by_position_in_a_try_block(rng):
    @numba.njit
    def tried(x, temperature):
        try:
            return numbasoft.softmax(x, -1, temperature)
        except Exception:
            return x

    x = logits(rng, (4, 30), "f4")
    assert_same_bits(tried(x, 2), numbasoft.softmax(x, temperature=2))
    assert_same_bits(tried(x, -1), x)


def test_threads_are_the_callers(rng):
    @numba.njit(parallel=True)
    def rows(x, y):
        for i in numba.prange(x.shape[0]):
            y[i] = numbasoft.softmax(x[i])

    x = logits(rng, (500, 77), "f4")
    y = np.empty_like(x)
    rows(x, y)
    assert_same_bits(y, numbasoft.softmax(x))


# The caller is compiled first, and would like additions in any order; and so would whoever calls the kernel after it.
FAST = """
import json
import numba
import numpy as np
import numbasoft

@numba.njit(fastmath=True, error_model="python", boundscheck=True)
def careless(x):
    return numbasoft.softmax(x)

x = np.random.default_rng(0).normal(0, 3, (8, 1000)).astype("f4")
print(json.dumps([careless(x).tobytes().hex(), numbasoft.softmax(x).tobytes().hex()]))
"""


def test_a_callers_compiler_options_are_its_own(tmp_path):
    x = np.random.default_rng(0).normal(0, 3, (8, 1000)).astype("f4")
    assert run_fresh(FAST, tmp_path) == [numbasoft.softmax(x).tobytes().hex()] * 2


PROGRAM = """
import json
import numba
import numpy as np
import numbasoft

@numba.njit(cache=True)
def kept(x, axis):
    return numbasoft.softmax(x, axis, temperature=0.5), numbasoft.logsumexp(x)

y, lse = kept(np.arange(60.0).reshape(6, 10), 0)
print(json.dumps([sum(kept.stats.cache_hits.values()), y.tobytes().hex(), lse.tobytes().hex()]))
"""


def test_a_caller_may_be_kept_on_disk(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    x = np.arange(60.0).reshape(6, 10)
    expected = numbasoft.softmax(x, 0, temperature=0.5), numbasoft.logsumexp(x)
    package = str(Path(numbasoft.__file__).parents[1])
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    for hits in 0, 1:
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=300,
        )
        assert json.loads(done.stdout) == [hits, *(e.tobytes().hex() for e in expected)]
