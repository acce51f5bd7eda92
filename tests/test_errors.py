"""Bad calls raise one sentence that names the argument, and change neither `out` nor any other array."""

import datetime
import decimal
import fractions
import re

import numpy as np
import pytest
from numpy.exceptions import AxisError
from samples import BACKWARD, FORWARD

import numbasoft

ml_dtypes = pytest.importorskip(
    "ml_dtypes", reason="ml_dtypes is not installed, whose dtypes are refused here"
)

ALLOWED = (ValueError, TypeError, IndexError)  # AxisError is both a ValueError and an IndexError
LIKE_INPUT = ("softmax", "log_softmax")
EVERY = FORWARD + BACKWARD

by_name = pytest.mark.parametrize("name", EVERY)
by_forward = pytest.mark.parametrize("name", FORWARD)
by_backward = pytest.mark.parametrize("name", BACKWARD)

SHAPE = (4, 6)


def arguments(name, dtype=np.float64, shape=SHAPE):
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, shape).astype(dtype)
    if name in FORWARD:
        return [x]
    if name == "logsumexp_backward":
        return [np.ones(shape[:-1], dtype), x, np.zeros(shape[:-1], dtype)]
    return [x, np.full(shape, 1 / shape[-1]).astype(dtype)]


def parameters(name):
    return {
        "softmax_backward": ("grad", "y"),
        "log_softmax_backward": ("grad", "log_y"),
        "logsumexp_backward": ("grad", "x", "lse"),
    }.get(name, ("x",))


def good_out(name, dtype=np.float64):
    return np.full(SHAPE[:-1] if name == "logsumexp" else SHAPE, 7, dtype)


def short(value):
    return repr(value).partition(" at 0x")[0][:40]  # an address would differ between processes


def refused(name, given, kinds, argument, *mentions, **options):
    """The call raises one of the kinds, with a fit message, and leaves everything as it was."""
    function = getattr(numbasoft, name)
    arrays = [a for a in (*given, *options.values()) if isinstance(a, np.ndarray) and a.dtype != object]
    before = [(a.tobytes(), a.shape, a.strides, a.flags.writeable) for a in arrays]
    with pytest.raises(ALLOWED) as caught:
        function(*given, **options)
    message = str(caught.value)
    assert isinstance(caught.value, kinds), f"{type(caught.value).__name__}: {message}"
    assert type(caught.value) in (ValueError, TypeError, IndexError, AxisError)
    assert re.search(rf"\b{argument}\b", message), f"{argument} is not named in {message!r}"
    for text in mentions:
        assert text in message, f"{text} is not named in {message!r}"
    assert "\n" not in message, message
    assert 15 < len(message) < 300, message
    assert [(a.tobytes(), a.shape, a.strides, a.flags.writeable) for a in arrays] == before, (
        "an argument was changed"
    )


# --- dtypes ------------------------------------------------------------------------------------------------

REFUSED_DTYPES = {
    "complex64": np.ones(SHAPE, np.complex64),
    "complex128": np.ones(SHAPE, np.complex128),
    "longdouble": np.ones(SHAPE, np.longdouble),
    "object": np.ones(SHAPE, object),
    "str": np.full(SHAPE, "1"),
    "bytes": np.full(SHAPE, b"1"),
    "datetime64": np.zeros(SHAPE, "datetime64[s]"),
    "timedelta64": np.zeros(SHAPE, "timedelta64[s]"),
    "record": np.zeros(SHAPE, [("a", float)]),
    "void": np.zeros(SHAPE, "V8"),
    "float8": np.ones(SHAPE, ml_dtypes.float8_e4m3fn),
    "clongdouble": np.ones(SHAPE, np.clongdouble),
}  # fmt: skip


@pytest.mark.parametrize("dtype", REFUSED_DTYPES)
@by_name
def test_dtypes_that_are_refused(name, dtype):
    bad = REFUSED_DTYPES[dtype]
    if bad.dtype == np.float64:
        pytest.skip("longdouble is float64 on this machine, which is accepted")
    for i, parameter in enumerate(parameters(name)):
        given = arguments(name)
        given[i] = bad if given[i].shape == SHAPE else bad[:, 0]
        refused(name, given, TypeError, parameter)
        with pytest.raises(TypeError) as caught:
            getattr(numbasoft, name)(*given)
        names = {str(bad.dtype), bad.dtype.name, bad.dtype.name.rstrip("0123456789"), repr(bad.dtype)}
        assert any(n in str(caught.value) for n in names), f"the dtype is not named in {caught.value}"


@pytest.mark.parametrize(
    "x", [None, "logits", b"logits", {}, object(), {"a": 1}, {1, 2}, [None, 1.0], ["a"], 1j, len]
)
@by_forward
def test_objects_that_are_no_arrays(name, x):
    refused(name, [x], TypeError, "x")


@pytest.mark.parametrize("x", [[[1, 2], [3]], [[1.0], 2.0], [[[1]], [[1, 2]]]])
@by_forward
def test_ragged_lists(name, x):
    refused(name, [x], ALLOWED, "x")


@by_name
def test_masked_arrays_are_refused_or_their_mask_counts(name):
    # a mask that is silently ignored would be a wrong answer
    given = arguments(name)
    masked = np.ma.masked_array(given[0], np.zeros(given[0].shape, bool))
    masked[0] = np.ma.masked
    try:
        got = getattr(numbasoft, name)(masked, *given[1:])
    except TypeError as error:
        assert parameters(name)[0] in str(error)
    else:
        assert isinstance(got, np.ma.MaskedArray)


# --- axis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [2, -3, 100, -100, 2**31, -(2**31), 2**63, 2**64, (0, 2), (-3, 1), (5,)])
@by_name
def test_an_axis_out_of_range(name, axis):
    refused(name, arguments(name), AxisError, "axis", axis=axis)


@pytest.mark.parametrize("axis", [1, -2, (1,), 7])
@by_forward
def test_an_axis_of_a_zero_dimensional_array(name, axis):
    refused(name, [np.array(1.0)], AxisError, "axis", axis=axis)


@pytest.mark.parametrize("axis", [(0, 0), (0, -2), (1, -1), (1, 0, 1)])
@by_name
def test_a_repeated_axis(name, axis):
    refused(name, arguments(name), ValueError, "axis", axis=axis)


@pytest.mark.parametrize(
    "axis",
    [1.0, "0", "last", b"0", 0.5, 1j, [0], [0, 1], (0.0,), (None,), ("0",), ((0,),), {0}, np.array([0, 1]),
     np.nan, object(), True, False, (True,), np.True_],
    ids=short,
)  # fmt: skip
@by_name
def test_an_axis_that_is_no_integer(name, axis):
    refused(name, arguments(name), TypeError, "axis", axis=axis)


@pytest.mark.parametrize(
    "axis", [np.int64(1), np.int8(-1), np.uint8(0), np.array(1), (np.int32(0),)], ids=short
)
@by_forward
def test_an_axis_of_another_integer_type(name, axis):
    x = arguments(name)[0]
    plain = tuple(int(a) for a in axis) if isinstance(axis, tuple) else int(axis)
    np.testing.assert_array_equal(getattr(numbasoft, name)(x, axis), getattr(numbasoft, name)(x, plain))


# --- temperature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature",
    [0, 0.0, -0.0, -1, -1e-3, np.nan, np.inf, -np.inf, np.float32(0), np.float32("nan"), np.int64(-3), 1e-320,
     5e-324,     1e-291, 1e291, 10**400, -(10**400), fractions.Fraction(-1, 3), np.array(0.0), np.array(-1)],
    ids=short,
)  # fmt: skip
@by_name
def test_a_temperature_that_is_not_positive_and_finite(name, temperature):
    refused(name, arguments(name), ValueError, "temperature", temperature=temperature)


@pytest.mark.parametrize(
    "temperature",
    ["1", "hot", b"1", None, True, False, np.True_, 1j, 1 + 0j, np.complex64(1), [1.0, 2.0], (1.0, 2.0),
     np.array([1.0, 2.0]), np.ones((2, 2)), {}, object(), np.datetime64(1, "s"), np.array("1"), np.array(True), len],
    ids=short,
)  # fmt: skip
@by_name
def test_a_temperature_that_is_no_real_number(name, temperature):
    refused(name, arguments(name), TypeError, "temperature", temperature=temperature)


@pytest.mark.parametrize(
    "temperature",
    [
        2,
        2.0,
        np.float64(2),
        np.float32(2),
        np.float16(2),
        np.int64(2),
        np.uint8(2),
        fractions.Fraction(2),
        np.array(2.0),
    ],
    ids=short,
)
@by_name
def test_a_temperature_of_any_real_type(name, temperature):
    given = arguments(name)
    function = getattr(numbasoft, name)
    assert function(*given, temperature=temperature).tobytes() == function(*given, temperature=2.0).tobytes()


@by_name
def test_a_decimal_temperature_is_accepted_or_refused(name):
    # Decimal is no numbers.Real; either answer is right, a third is not
    given = arguments(name)
    try:
        got = getattr(numbasoft, name)(*given, temperature=decimal.Decimal(2))
    except TypeError as error:
        assert "temperature" in str(error)
    else:
        assert got.tobytes() == getattr(numbasoft, name)(*given, temperature=2.0).tobytes()


# --- where and keepdims ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 6), (4, 5), (1, 4, 6), (3, 4, 6), (6, 4), (0,), (4, 0), (2,)])
@by_forward
def test_a_mask_that_does_not_broadcast(name, shape):
    refused(name, arguments(name), ValueError, "where", str(shape), where=np.ones(shape, bool))


@by_forward
def test_a_mask_larger_than_the_input(name):
    # it would broadcast the other way round
    refused(name, [np.ones(6)], ValueError, "where", where=np.ones((4, 6), bool))
    refused(name, [np.ones((4, 1))], ValueError, "where", where=np.ones((4, 6), bool))
    refused(name, [np.array(1.0)], ValueError, "where", where=np.ones(3, bool))


@pytest.mark.parametrize(
    "dtype", [np.int64, np.uint8, np.float64, np.float32, complex, object, "U1", "datetime64[s]"]
)
@by_forward
def test_a_mask_of_another_dtype(name, dtype):
    # 0 and 1 as integers are easily an index or a weight: neither is meant here
    refused(name, arguments(name), TypeError, "where", where=np.ones(SHAPE, bool).astype(dtype))


@pytest.mark.parametrize("where", ["yes", 1, 0, 1.0, {}, object(), [1, 0, 1, 0, 1, 0], [None] * 6], ids=short)
@by_forward
def test_a_mask_that_is_no_mask(name, where):
    refused(name, arguments(name), TypeError, "where", where=where)


@pytest.mark.parametrize("keepdims", [None, "yes", 2, 0.5, [True], np.array([True, False]), {}], ids=short)
def test_keepdims_that_is_no_bool(keepdims):
    refused("logsumexp", arguments("logsumexp"), TypeError, "keepdims", keepdims=keepdims)


# --- out ---------------------------------------------------------------------------------------------------


@by_name
def test_out_of_another_shape(name):
    want = good_out(name).shape
    for shape in ((3, 6), (4, 7), (6, 4), (24,), (1, 4, 6), (4, 6, 1), (), (0,), (4, 0), (6,), (4, 1), (1,)):
        if shape != want:
            refused(name, arguments(name), ValueError, "out", str(shape), str(want), out=np.full(shape, 7.0))


def test_out_of_logsumexp_follows_keepdims():
    x = arguments("logsumexp")
    refused("logsumexp", x, ValueError, "out", out=np.zeros((4, 1)))
    refused("logsumexp", x, ValueError, "out", out=np.zeros(4), keepdims=True)
    out = np.zeros((4, 1))
    assert numbasoft.logsumexp(*x, keepdims=True, out=out) is out


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float16, np.int64, bool, complex, object, np.longdouble, "U8", ml_dtypes.bfloat16],
)
@by_name
def test_out_of_another_dtype(name, dtype):
    if np.dtype(dtype) == np.float64:
        pytest.skip("longdouble is float64 on this machine")
    refused(name, arguments(name), (TypeError, ValueError), "out", out=good_out(name).astype(dtype))


@by_name
def test_out_for_promoted_integers_is_float64(name):
    if name not in FORWARD:
        refused(name, arguments(name, np.float32), (TypeError, ValueError), "out", out=good_out(name))
        return
    x = np.arange(24).reshape(SHAPE)
    refused(name, [x], (TypeError, ValueError), "out", out=good_out(name, np.int64))
    assert getattr(numbasoft, name)(x, out=(out := good_out(name))) is out


@by_name
def test_out_that_is_read_only(name):
    out = good_out(name)
    out.flags.writeable = False
    refused(name, arguments(name), ValueError, "out", out=out)


@pytest.mark.parametrize(
    "out", [[1.0], (), "out", 1, 1.0, True, False, {}, object(), np.float64(1)], ids=short
)
@by_name
def test_out_that_is_no_array(name, out):
    refused(name, arguments(name), TypeError, "out", out=out)


@by_name
def test_out_in_a_tuple_is_refused(name):
    # NumPy's ufuncs take out=(array,); here it is an error, not a silent copy
    refused(name, arguments(name), TypeError, "out", out=(good_out(name),))


@by_name
def test_out_whose_elements_share_memory(name):
    # a stride of zero: threads would race for one place
    shape = good_out(name).shape
    if name != "logsumexp":
        refused(name, arguments(name), ValueError, "out", out=writeable_view(np.zeros(6), shape, (0, 8)))
        refused(name, arguments(name), ValueError, "out", out=writeable_view(np.zeros(4), shape, (8, 0)))
        refused(name, arguments(name), ValueError, "out", out=writeable_view(np.zeros(12), shape, (8, 8)))
    refused(
        name, arguments(name), ValueError, "out", out=writeable_view(np.zeros(1), shape, (0,) * len(shape))
    )


def writeable_view(buffer, shape, strides):
    return np.lib.stride_tricks.as_strided(buffer, shape, strides)


def views(buffer, shape, first, second):
    """Two contiguous views of one buffer that start at the given elements."""
    size = np.prod(shape)
    return buffer[first : first + size].reshape(shape), buffer[second : second + size].reshape(shape)


def square_corners(a):
    square = np.zeros((6, 6), a.dtype)
    return square[:4, :], square[:, :4].T


def one_byte_on(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    return raw[:-1].view(a.dtype).reshape(a.shape), raw[1:].view(a.dtype).reshape(a.shape)


# The memory of an input and of `out`: neither apart nor the same.
OVERLAPS = {
    "one row on": lambda a: views(np.zeros(72, a.dtype), SHAPE, 24, 30),
    "one row back": lambda a: views(np.zeros(72, a.dtype), SHAPE, 24, 18),
    "one element on": lambda a: views(np.zeros(72, a.dtype), SHAPE, 24, 25),
    "one element back": lambda a: views(np.zeros(72, a.dtype), SHAPE, 24, 23),
    "only the last element": lambda a: views(np.zeros(72, a.dtype), SHAPE, 24, 47),
    "rows reversed": lambda a: ((b := np.zeros_like(a)), b[::-1]),
    "columns reversed": lambda a: ((b := np.zeros_like(a)), b[:, ::-1]),
    "both reversed": lambda a: ((b := np.zeros_like(a)), b[::-1, ::-1]),
    "other strides": square_corners,
    "one byte on": one_byte_on,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", OVERLAPS)
@pytest.mark.parametrize("name", [*LIKE_INPUT, *BACKWARD])
def test_out_that_overlaps_an_input_in_part(name, kind, dtype):
    for i, (parameter, a) in enumerate(zip(parameters(name), arguments(name, dtype), strict=True)):
        if a.shape == SHAPE:
            given = arguments(name, dtype)
            given[i], out = OVERLAPS[kind](a)
            given[i][...] = a
            refused(name, given, ValueError, "out", parameter, out=out)


def test_out_of_logsumexp_inside_its_input():
    x = arguments("logsumexp")[0]
    for out in (x[:, 0], x[:, -1], x.ravel()[:4], x.ravel()[20:]):
        refused("logsumexp", [x], ValueError, "out", out=out)


@pytest.mark.parametrize("parameter", ["grad", "lse"])
def test_out_of_logsumexp_backward_over_a_reduced_argument(parameter):
    given = arguments("logsumexp_backward")
    out = good_out("logsumexp_backward")
    i = ("grad", "x", "lse").index(parameter)
    for view in (out[:, 0], out[:, 3], out.ravel()[5:9]):
        given[i] = view
        refused("logsumexp_backward", given, ValueError, "out", out=out)


@by_forward
def test_out_over_the_mask_is_refused_or_right(name):
    out = good_out(name)
    where = out.view(bool).reshape(*out.shape, 8)[..., -1]
    where = where if where.shape == SHAPE else np.broadcast_to(where[:, None], SHAPE)
    out.view(np.uint8)[...] = 1
    x, want = arguments(name)[0], getattr(numbasoft, name)(*arguments(name), where=where.copy())
    try:
        got = getattr(numbasoft, name)(x, where=where, out=out)
    except ValueError as error:
        assert "out" in str(error)
        assert "where" in str(error)
        assert (out.view(np.uint8) == 1).all()
    else:
        assert got.tobytes() == want.tobytes()


@by_name
def test_out_keeps_its_contents_whatever_is_wrong(name):
    # also where the bad argument is looked at last
    out = good_out(name)
    refused(name, arguments(name), ALLOWED, "axis", axis=9, out=out)
    refused(name, arguments(name), ALLOWED, "temperature", temperature=-1, out=out)
    if name in FORWARD:
        refused(name, arguments(name), ALLOWED, "where", where=np.ones(5, bool), out=out)
        refused(name, [np.ones(SHAPE, complex)], ALLOWED, "x", out=out)
    else:
        given = arguments(name)
        given[0] = given[0][:-1]
        refused(name, given, ALLOWED, "grad", out=out)
    assert (out == 7).all()


# --- backward arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(4, 5), (3, 6), (6, 4), (24,), (4,), (6,), (1, 6), (4, 1), (), (1, 4, 6), (0, 6)], ids=str
)
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_backward_arguments_of_different_shapes(name, shape):
    grad, y = arguments(name)
    refused(name, [np.ones(shape), y], ValueError, "grad", str(shape), str(y.shape))
    refused(name, [grad, np.full(shape, 0.5)], ValueError, parameters(name)[1], str(shape), str(grad.shape))


@pytest.mark.parametrize(
    "shape", [(4, 6), (6,), (5,), (3,), (1, 4), (1, 6), (), (4, 1, 1), (1,), (0,)], ids=str
)
def test_logsumexp_backward_of_unreduced_shapes(shape):
    grad, x, lse = arguments("logsumexp_backward")
    refused("logsumexp_backward", [np.ones(shape), x, lse], ValueError, "grad", str(shape))
    refused("logsumexp_backward", [grad, x, np.ones(shape)], ValueError, "lse", str(shape))


@by_backward
def test_backward_arguments_of_different_dtypes_are_refused_or_right(name):
    exact = arguments(name, np.float64)
    for i in range(len(exact)):
        mixed = [a.astype(np.float32) if i == j else a for j, a in enumerate(exact)]
        try:
            got = getattr(numbasoft, name)(*mixed)
        except TypeError as error:
            assert any(p in str(error) for p in parameters(name))
            assert "float32" in str(error)
        else:
            want = getattr(numbasoft, name)(*[a.astype(np.float64) for a in mixed])
            np.testing.assert_allclose(got.astype(float), want, rtol=1e-6, atol=1e-7)


# --- signatures --------------------------------------------------------------------------------------------


@by_name
def test_options_are_keywords_and_no_others_are_taken(name):
    given = arguments(name)
    function = getattr(numbasoft, name)
    with pytest.raises(TypeError):
        function(*given, -1, 2.0)
    with pytest.raises(TypeError):
        function(*given, dim=-1)
    with pytest.raises(TypeError):
        function()
    if name in BACKWARD:
        with pytest.raises(TypeError):
            function(*given, where=np.ones(SHAPE, bool))


@pytest.mark.parametrize(
    "value", [datetime.datetime(2024, 1, 1), datetime.timedelta(1)], ids=["datetime", "timedelta"]
)
def test_python_dates_are_refused(value):
    refused("softmax", [[value, value]], TypeError, "x")


@by_name
def test_successful_calls_change_no_argument(name):
    given = arguments(name)
    options = {"where": np.random.default_rng(1).random(SHAPE) < 0.5} if name in FORWARD else {}
    before = [a.tobytes() for a in (*given, *options.values())]
    getattr(numbasoft, name)(*given, temperature=3, **options)
    assert [a.tobytes() for a in (*given, *options.values())] == before


@by_name
def test_no_result_shares_memory_with_an_argument(name):
    for dtype in (np.float32, np.float64):
        given = arguments(name, dtype)
        got = getattr(numbasoft, name)(*given)
        assert not any(np.shares_memory(got, a) for a in given)


def test_bfloat16_as_numpy_loads_it():
    with pytest.raises(TypeError, match=r"x has dtype \|V2, .*needs \.view\(ml_dtypes\.bfloat16\)"):
        numbasoft.softmax(np.zeros((2, 3), "V2"))
