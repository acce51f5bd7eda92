"""Properties over dtypes x layouts x axes x masks x special values, with examples drawn by hypothesis."""

import itertools

import numpy as np
import oracle
import pytest
from oracle import DTYPES, SIXTEEN_BIT, check, limit, rows_of
from samples import FORWARD

import numbasoft

pytest.importorskip("hypothesis", reason="hypothesis is not installed, which draws the examples")
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytestmark = pytest.mark.usefixtures("little")

EXAMPLES = settings(max_examples=120)

dtypes = st.sampled_from([*DTYPES.values()])
temperatures = st.sampled_from([1.0, 1.0, 0.1, 1 / 3, 2.0, 30.0])
SPECIAL = [np.nan, np.inf, -np.inf, -np.inf, 0.0, -0.0, 1e-45, 5e-324, 65504.0, -65504.0]


def elements(special):
    plain = st.floats(-200, 200, allow_nan=False) | st.floats(-1, 1) | st.integers(-5, 5).map(float)
    return plain | st.sampled_from(SPECIAL) if special else plain


@st.composite
def logits(draw, special=True, min_side=0):
    """An array of any dtype, shape and layout."""
    dtype = draw(dtypes)
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=min_side, max_side=6))
    if draw(st.booleans()):
        shape = (*shape[:2], draw(st.integers(min_side, 70)))  # rows longer than a vector
    x = draw(hnp.arrays(np.float64, shape, elements=elements(special)))
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    return laid_out(draw, x)


def laid_out(draw, x):
    """The same values with other strides, other alignment or read-only."""
    order = draw(st.permutations(range(x.ndim)))
    x = x.transpose(order).copy().transpose(np.argsort(order))
    step = draw(st.sampled_from([1, 1, 2, -1]))
    if step != 1:
        x = x[..., ::-1].copy()[..., ::-1] if step == -1 else np.repeat(x, 2, -1)[..., ::2]
    if draw(st.booleans()) and x.size:
        buffer = np.zeros(x.nbytes + 1, np.uint8)
        moved = buffer[1:].view(x.dtype).reshape(x.shape)
        moved[...] = x
        x = moved
    if draw(st.booleans()):
        x = x.view()
        x.flags.writeable = False
    return x


@st.composite
def axes(draw, x):
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return None
    if kind == 1:
        return tuple(draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, max_size=x.ndim, unique=True)))
    return draw(st.integers(-x.ndim, x.ndim - 1))


@st.composite
def masks(draw, x):
    if draw(st.booleans()):
        return None
    shape = tuple(draw(st.sampled_from([n, 1])) for n in x.shape)[draw(st.integers(0, x.ndim)) :]
    return draw(hnp.arrays(bool, shape))


@pytest.mark.parametrize("name", FORWARD)
@EXAMPLES
@given(data=st.data())
def test_forward_is_what_the_oracle_says(name, data):
    x = data.draw(logits(), label="x")
    axis = data.draw(axes(x), label="axis")
    where = data.draw(masks(x), label="where")
    temperature = data.draw(temperatures, label="temperature")
    before = x.tobytes()
    got = getattr(numbasoft, name)(x, axis, temperature=temperature, where=where)
    expected = getattr(oracle, name)(x, axis, temperature=temperature, where=where)
    assert got.dtype == x.dtype
    check(got, expected, limit(name, x.dtype))
    assert x.tobytes() == before


@pytest.mark.parametrize("name", FORWARD)
@EXAMPLES
@given(data=st.data())
def test_out_and_in_place_have_the_bits_of_a_plain_call(name, data):
    x = data.draw(logits(), label="x")
    axis = data.draw(axes(x), label="axis")
    where = data.draw(masks(x), label="where")
    function = getattr(numbasoft, name)
    want = np.asarray(function(x, axis, where=where))
    out = laid_out_writeable(data.draw, np.zeros_like(want, order="C"))
    assert function(x, axis, where=where, out=out) is out
    assert out.tobytes() == want.tobytes()
    if name != "logsumexp" and x.flags.writeable:
        assert function(x, axis, where=where, out=x) is x
        assert x.tobytes() == want.tobytes()


def laid_out_writeable(draw, x):
    out = laid_out(draw, x) if x.ndim else x
    return out if out.flags.writeable else np.array(out)


@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward", "logsumexp_backward"])
@EXAMPLES
@given(data=st.data())
def test_backward_is_what_the_oracle_says(name, data):
    x = data.draw(logits(special=False, min_side=1), label="x")
    axis = data.draw(axes(x), label="axis")
    temperature = data.draw(temperatures, label="temperature")
    holes = data.draw(hnp.arrays(bool, x.shape), label="holes")
    x = np.where(holes, np.array(-np.inf).astype(x.dtype), x)
    forward = getattr(oracle, name.removesuffix("_backward"))
    with np.errstate(all="ignore"):
        result = forward(x, axis, temperature=temperature).floats().astype(x.dtype)
    assume(not np.isposinf(result.astype(float)).any())
    grad = data.draw(hnp.arrays(np.float64, result.shape, elements=st.floats(-100, 100)), label="grad")
    if name == "logsumexp_backward":
        given_arrays = grad.astype(x.dtype), x, result
    else:
        result = np.where(np.isnan(result.astype(float)), np.array(0.5).astype(x.dtype), result)
        hidden = result == (0 if name == "softmax_backward" else -np.inf)
        given_arrays = np.where(hidden, np.nan, grad).astype(x.dtype), laid_out(data.draw, result)
    got = getattr(numbasoft, name)(*given_arrays, axis, temperature=temperature)
    check(got, getattr(oracle, name)(*given_arrays, axis, temperature=temperature), limit(name, x.dtype))


@EXAMPLES
@given(data=st.data())
def test_probabilities_sum_to_one_and_lie_between(data):
    x = data.draw(logits(special=False, min_side=1), label="x")
    axis = data.draw(axes(x), label="axis")
    y = numbasoft.softmax(x, axis).astype(np.float64)
    assert ((y >= 0) & (y <= 1)).all()
    rows = rows_of(y, axis)[0]
    unit = 2.0 ** (1 - oracle.FORMATS[x.dtype].bits)
    # each element is off by its limit in ULP, and an ULP is at most `unit` times the element
    tolerance = (0.51 if x.dtype in SIXTEEN_BIT else 2.0) * unit
    subnormal = 2.0 ** (oracle.FORMATS[x.dtype].emin - oracle.FORMATS[x.dtype].bits + 1)
    assert (abs(rows.sum(1) - 1) <= tolerance * 1.001 + rows.shape[1] * subnormal).all()


@EXAMPLES
@given(data=st.data())
def test_a_shift_that_is_exact_changes_no_result(data):
    # x and x + c have the same differences; both are integers over 8 that the dtype holds
    dtype = data.draw(dtypes, label="dtype")
    span = 100 if dtype in SIXTEEN_BIT else 100_000
    shape = data.draw(hnp.array_shapes(max_dims=2, max_side=20))
    x = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(-span, span)), label="x")
    c = data.draw(st.integers(-span, span), label="c")
    a, b = (v.astype(np.float64).astype(dtype) / np.array(8).astype(dtype) for v in (x, x + c))
    for name in ("softmax", "log_softmax"):
        check(getattr(numbasoft, name)(b), getattr(oracle, name)(a), limit(name, dtype))


@EXAMPLES
@given(data=st.data())
def test_the_largest_logit_has_the_largest_probability(data):
    # and equal logits have equal probabilities, to the bit
    x = data.draw(logits(special=False, min_side=1), label="x")
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    for name, tolerance in (("softmax", 4), ("log_softmax", 4)):
        got = getattr(numbasoft, name)(x).reshape(rows.shape).astype(np.float64)
        order = np.argsort(rows, axis=1, kind="stable")
        sorted_in, sorted_out = (np.take_along_axis(a, order, 1) for a in (rows, got))
        equal = sorted_in[:, 1:] == sorted_in[:, :-1]
        assert (sorted_out[:, 1:] == sorted_out[:, :-1])[equal].all()
        # order is kept, but for neighbours that round to within the allowed error of each other
        slack = tolerance * 2.0 ** (1 - oracle.FORMATS[x.dtype].bits) * abs(sorted_out[:, :-1])
        slack = slack + 4 * 2.0 ** (oracle.FORMATS[x.dtype].emin - oracle.FORMATS[x.dtype].bits + 1)
        assert (sorted_out[:, 1:] >= sorted_out[:, :-1] - slack).all()


@EXAMPLES
@given(data=st.data())
def test_the_three_functions_agree(data):
    # log_softmax = x / T - logsumexp, and softmax = exp of it, within the errors that the contract allows
    x = data.draw(logits(special=False, min_side=1), label="x").astype(np.float64)
    axis = data.draw(axes(x), label="axis")
    temperature = data.draw(temperatures, label="temperature")
    logs = numbasoft.log_softmax(x, axis, temperature=temperature)
    lse = numbasoft.logsumexp(x, axis, temperature=temperature, keepdims=True)
    scale = 1 + abs(x).max() / temperature
    np.testing.assert_allclose(logs, x / temperature - lse, rtol=0, atol=1e-15 * scale)
    soft = numbasoft.softmax(x, axis, temperature=temperature)
    np.testing.assert_allclose(soft, np.exp(logs), rtol=1e-15 * (2 + abs(logs).max()), atol=1e-320)


def test_every_pair_of_special_values():
    # all rows of three over the values that break comparisons, with every mask, against the oracle
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1e4]
    x = np.array([*itertools.product(values, repeat=3)])
    for dtype, mask in itertools.product(DTYPES.values(), itertools.product([True, False], repeat=3)):
        rows = x.astype(dtype)
        for name in FORWARD:
            for axis, a, w in ((-1, rows, np.array(mask)), (0, rows.T, np.array(mask)[:, None])):
                got = getattr(numbasoft, name)(a, axis, where=w)
                check(got, getattr(oracle, name)(a, axis, where=w), limit(name, dtype))
