"""Small calls, of which Python takes much of the time: their short ways give what the long ones do."""

import functools
import importlib
import math

import numpy as np
import pytest
from samples import assert_same_bits

import numbasoft
from numbasoft import arrays, launch, totals, transpose

ml_dtypes = pytest.importorskip("ml_dtypes")
API = {
    name: importlib.import_module(f"numbasoft.ops.{name}.api")
    for name in ("softmax", "log_softmax", "logsumexp", "cross_entropy", "sigmoid")
}
SHAPES = [
    ((10,), -1), ((10,), 0), ((10,), None), ((1, 10), -1), ((3, 20), 1), ((3, 20), None), ((9, 3), -1),
    ((40, 3), -1), ((200, 3), -1), ((2, 3, 5), -1), ((2, 3, 5), 2), ((2, 1, 300), -1), ((7, 1000), -1), ((40, 1000), -1),
    ((2, 20000), -1), ((4, 5, 2000), -1), ((1,), -1), ((1, 1), -1), ((300, 1), -1),
    ((70, 1000), -1), ((7, 16384), 1), ((7, 16385), -1), ((4, 1100, 17), -1), ((70, 1000), None), ((4200, 16), -1),
]  # fmt: skip
by_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=lambda v: str(v).replace(" ", ""))
by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
by_temperature = pytest.mark.parametrize("t", [1.0, 0.7, 1e-20])


@pytest.fixture
def only_short(monkeypatch):
    """The general path fails."""

    def general(*arguments):
        raise AssertionError("the general path")

    for name, api in API.items():
        for function in f"any_{name}", f"any_{name}_backward":
            if hasattr(api, function):
                monkeypatch.setattr(api, function, general)


def general(name, *given):
    return getattr(API[name.removesuffix("_backward")], f"any_{name}")(*given)


@by_temperature
@by_dtype
@by_shape
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_one_behind_the_other(name, shape, axis, dtype, t, rng, only_short, request):
    x = rng.normal(0, 3, shape).astype(dtype)
    function = getattr(numbasoft, name)
    got = function(x, axis, temperature=t)
    given = np.full_like(x, 7)
    assert function(x, axis, temperature=t, out=given) is given
    in_place = x.copy()
    assert function(in_place, axis, temperature=t, out=in_place) is in_place
    request.getfixturevalue("monkeypatch").undo()
    want = general(name, x, axis, t, None, None, None)
    for result in got, given, in_place:
        assert_same_bits(result, want)


@by_temperature
@by_dtype
@by_shape
def test_logsumexp_of_rows_one_behind_the_other(shape, axis, dtype, t, rng, only_short, request):
    x = rng.normal(0, 3, shape).astype(dtype)
    got = numbasoft.logsumexp(x, axis, temperature=t)
    kept = numbasoft.logsumexp(x, axis, temperature=t, keepdims=True)
    request.getfixturevalue("monkeypatch").undo()
    want = general("logsumexp", x, axis, t, None, False, None, None)
    assert isinstance(got, np.ndarray)
    assert_same_bits(got, want)
    assert_same_bits(kept, general("logsumexp", x, axis, t, None, True, None, None))


@by_temperature
@by_dtype
@by_shape
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_gradients_of_rows_one_behind_the_other(name, shape, axis, dtype, t, rng, only_short, request):
    x, g = rng.normal(0, 3, (2, *shape)).astype(dtype)
    y = getattr(numbasoft, name.removesuffix("_backward"))(x, axis, temperature=t)
    function = getattr(numbasoft, name)
    got = function(g, y, axis, temperature=t)
    given, for_g, for_y = np.full_like(y, 7), g.copy(), y.copy()
    assert function(g, y, axis, temperature=t, out=given) is given
    function(for_g, y, axis, temperature=t, out=for_g)
    function(g, for_y, axis, temperature=t, out=for_y)
    request.getfixturevalue("monkeypatch").undo()
    want = general(name, g, y, axis, t, None, None)
    for result in got, given, for_g, for_y:
        assert_same_bits(result, want)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_what_is_not_plain_goes_the_general_way(name, rng, monkeypatch):
    function = getattr(numbasoft, name)
    taken = []
    over_rows = arrays.over_rows
    monkeypatch.setattr(arrays, "over_rows", lambda *given: (taken.append(1), over_rows(*given)))
    x = rng.normal(size=(3, 20)).astype(np.float32)
    want = function(x)
    frozen = x.copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for other in (
        frozen, unaligned, x.astype(">f4"), np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2], x[::-1].copy()[::-1],
        np.repeat(x, 2, 0)[::2], x.view(np.matrix), np.broadcast_to(x, (3, 20)),
    ):  # fmt: skip
        taken.clear()
        assert_same_bits(function(other), want)
        assert taken
    taken.clear()
    for axis in -1, 1, np.int64(1), np.int64(-1), (1,):
        assert_same_bits(function(x, axis), want)
    for t in 1, np.float64(1), np.float32(1), np.array(1.0):
        assert_same_bits(function(x, temperature=t), want)
    cold = function(x, temperature=1e-35)  # in float64, where 1 / T is in range
    assert cold.dtype == x.dtype and not np.isnan(cold).any()
    for axis, error in ((True, TypeError), (2, IndexError), (-3, IndexError), (1.0, TypeError)):
        with pytest.raises(error, match="axis"):
            function(x, axis)
    for t in 0.0, -1.0, np.nan, np.inf, 1e-300, 5e-324, -0.0:
        with pytest.raises(ValueError, match="temperature"):
            function(x, temperature=t)
        with pytest.raises(ValueError, match="temperature"):
            function(x.astype(float), temperature=t)
    for t in True, "1", None, [1.0], 1j:
        with pytest.raises(TypeError, match="temperature"):
            function(x, temperature=t)
    with pytest.raises(TypeError, match="masked array"):
        function(np.ma.masked_array(x))
    for shape in (0,), (3, 0), (0, 0), (2, 0, 3), (2, 3, 0):
        empty = function(np.empty(shape, np.float32))
        assert empty.shape == (shape[:-1] if name == "logsumexp" else shape)
        if name == "logsumexp":
            assert (empty == -np.inf).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_what_is_made_an_array_of_floats_first(name, monkeypatch):
    function = getattr(numbasoft, name)
    numbers = [[1, 2, 3, -4], [0, 7, 7, 1]]
    want = function(np.array(numbers, float))
    hot = function(np.array(numbers, float), temperature=2.0)

    def general(*arguments, **named):
        raise AssertionError("the general path")

    monkeypatch.setattr(arrays, "on_device", general)
    given = [numbers, tuple(numbers), np.array(numbers, float).tolist()]
    given += [np.array(numbers, kind) for kind in ("i1", "i2", "i4", "i8", ">i4")]
    given += [np.array(numbers, "i8").T.copy().T[:, :]]
    for x in given[:-1]:
        assert_same_bits(function(x), want)
        for t in 2, np.float64(2), np.float32(2), np.int8(2), np.array(2):
            assert_same_bits(function(x, temperature=t), hot)
    assert_same_bits(function([True, False]), function([1, 0]))
    monkeypatch.undo()
    assert_same_bits(function(given[-1]), want)
    for scalar in 5, 5.0, True:
        assert_same_bits(
            np.asarray(function(scalar)), np.asarray(function(np.array(5.0 if scalar is not True else 1.0)))
        )
    with pytest.raises(TypeError, match="x has dtype"):
        function(["a", "b"])
    with pytest.raises(ValueError, match="x cannot be made an array"):
        function([[1, 2], [3]])
    if name != "logsumexp":
        memory = np.arange(10)
        with pytest.raises(ValueError, match="out overlaps x"):
            function(memory, out=memory.view(float))


@by_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_outputs_of_small_calls(name, dtype, rng):
    function = getattr(numbasoft, name)
    whole = rng.normal(size=(7, 20)).astype(dtype)
    x = whole[1:4]
    parts = [whole[k : k + 3] for k in (0, 2, 3)] + [whole.reshape(-1)[21:81].reshape(3, 20)]
    for out in parts:
        before = whole.copy()
        with pytest.raises(ValueError, match="out overlaps x"):
            function(x, out=out)
        np.testing.assert_array_equal(whole, before)
    for shape in (3, 19), (2, 20), (20, 3), (4, 20), (60,), (1, 3, 20):
        with pytest.raises(ValueError, match="out has shape"):
            function(x, out=np.empty(shape, dtype))
    with pytest.raises(ValueError, match="out has shape"):
        function(x.reshape(-1).copy(), out=np.empty((1, 60), dtype))
    other = "float64" if dtype == "float32" else "float32"
    with pytest.raises(TypeError, match="out has dtype"):
        function(x, out=np.empty((3, 20), other))
    with pytest.raises(ValueError, match="read-only"):
        frozen = np.empty((3, 20), dtype)
        frozen.flags.writeable = False
        function(x, out=frozen)
    expected = function(x.copy())
    spread, turned = np.zeros((3, 40), dtype), np.zeros((20, 3), dtype)
    for out in spread[:, ::2], turned.T, whole[4:7]:
        assert function(x, out=out) is out
        np.testing.assert_array_equal(out, expected)
    assert not spread[:, 1::2].any()


def test_gradients_of_two_kinds_are_refused(rng):
    g = rng.normal(size=(3, 5))
    y = numbasoft.softmax(g)
    for function in numbasoft.softmax_backward, numbasoft.log_softmax_backward:
        with pytest.raises(TypeError, match="grad has dtype"):
            function(g.astype(np.float32), y)
        for shape in (3, 4), (5, 3), (15,), (1, 3, 5):
            with pytest.raises(ValueError, match="grad has shape"):
                function(np.zeros(shape), y)
        for t in 0.0, np.nan:
            with pytest.raises(ValueError, match="temperature"):
                function(g, y, temperature=t)
        want = function(g, y)
        assert_same_bits(function(np.asfortranarray(g), y), want)
        assert_same_bits(function(g, np.asfortranarray(y)), want)
        both = np.zeros((2, 4, 5))
        both[0, :3] = y
        for out in both[0, 1:], both[0, :3][::-1]:
            before = both.copy()
            with pytest.raises(ValueError, match="out overlaps grad"):
                function(both[0, :3], y, out=out)
            with pytest.raises(ValueError, match=r"out overlaps (y|log_y)"):
                function(g, both[0, :3], out=out)
            np.testing.assert_array_equal(both, before)


LAYOUTS = [
    ((10, 4), 0),
    ((4, 64), 0),
    ((3, 5, 7), 1),
    ((3, 5, 7), (0, 2)),
    ((2, 3, 4, 5), (1, 3)),
    ((600, 2), 0),
]


@pytest.mark.parametrize("way", ["new", "in place", "other byte order", "transposed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", ">f4", "int32", "bool"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=lambda v: str(v).replace(" ", ""))
def test_little_is_copied_at_once(shape, axis, dtype, way, rng, monkeypatch):
    x = rng.normal(0, 3, shape).astype(getattr(ml_dtypes, dtype, dtype))
    where = rng.random(shape) < 0.8
    is_kept = x.dtype.newbyteorder("=") == x.dtype and x.dtype.kind not in "ib"

    def results():
        found = []
        for mask in None, where:
            for t in 1.0, 0.3, 1e-35:
                for name in "softmax", "log_softmax":
                    kind = getattr(numbasoft, name)(x, axis).dtype
                    given = x.copy() if way == "in place" and is_kept else x
                    out = {
                        "new": None,
                        "in place": given if is_kept else None,
                        "other byte order": None,
                        "transposed": np.zeros(shape[::-1], kind).T,
                    }[way]
                    source = given.astype(given.dtype.newbyteorder()) if way == "other byte order" else given
                    y = getattr(numbasoft, name)(source, axis, temperature=t, where=mask, out=out)
                    found.append(y.copy())
                found.append(numbasoft.logsumexp(x, axis, temperature=t, where=mask))
        return found

    monkeypatch.setattr(arrays, "LITTLE", 0)
    want = results()
    monkeypatch.undo()

    def in_blocks(*arguments):
        raise AssertionError("block by block")

    monkeypatch.setattr(arrays, "stage", in_blocks)
    monkeypatch.setattr(arrays, "over_columns", in_blocks)
    for a, b in zip(results(), want, strict=True):
        assert_same_bits(a, b)


def test_more_than_little_is_not_copied_at_once(monkeypatch):
    def at_once(*arguments):
        raise AssertionError("at once")

    monkeypatch.setattr(arrays, "at_once", at_once)
    for shape in (arrays.LITTLE // 2 + 1, 2), (20, arrays.LITTLE // 20 + 1):
        numbasoft.softmax(np.zeros(shape, np.float32), 0)
    with pytest.raises(AssertionError, match="at once"):
        numbasoft.softmax(np.zeros((arrays.LITTLE // 2, 2), np.float32), 0)


def test_copies_by_numpy_round_where_dtypes_differ():
    to = np.zeros(3, np.float16)
    with np.errstate(all="raise"):
        transpose.assign(to, np.array([1e10, 1.5, 1e-10]))
    assert to.tolist() == [np.inf, 1.5, 0.0]


@pytest.mark.parametrize(
    "loss", [2.0**-25, 2.0**-15, 2.0**-14, 1.5, 2.0**15, 65519.0, 65520.0, 1e6, 1e39, np.inf]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_losses_of_any_size_are_rounded_silently(dtype, loss):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rows = importlib.import_module("numbasoft.ops.cross_entropy.api").checked(
        np.zeros((1, 2), kind), [0], -1, None, -100, 0.0, 0.0, 1.0, "sum"
    )
    with np.errstate(all="ignore"):
        want = np.asarray(loss).astype(kind)
    with np.errstate(all="raise"):
        got = rows.reduced(np.array([loss]))
    assert got.dtype == kind and got.shape == () and got.tobytes() == want.tobytes()


def test_zeros_of_either_sign_are_told_apart():
    x = np.array([[1.0, 2.0, 3.0]])
    for _ in range(2):
        for sign in 1.0, -1.0:
            grad = numbasoft.cross_entropy_backward(sign * 0.0, x, [0])
            assert np.signbit(grad).tolist() == [[sign > 0, sign < 0, sign < 0]]


def test_temperatures_share_machine_code(monkeypatch):
    x = np.zeros((3, 5))
    calls = [
        lambda t: numbasoft.softmax(x, temperature=t),
        lambda t: numbasoft.log_softmax(x, temperature=t),
        lambda t: numbasoft.logsumexp(x, temperature=t),
        lambda t: numbasoft.softmax_backward(x, x, temperature=t),
        lambda t: numbasoft.log_softmax_backward(x, x, temperature=t),
    ]
    for call in calls:
        call(1.0)

    def compiled(*arguments):
        raise AssertionError("looked up anew")

    monkeypatch.setattr(launch, "compiled", compiled)
    for call in calls:
        call(1.0123456789)


@pytest.mark.parametrize("shape", [(3, 5), (70, 80), (3, 5000)])
def test_a_matrix_as_output(shape, rng):
    x = rng.random(shape)
    for call in (
        lambda **more: numbasoft.softmax(x, **more),
        lambda **more: numbasoft.log_softmax(x, 0, **more),
        lambda **more: numbasoft.sigmoid(x, **more),
        lambda **more: numbasoft.logit(x, **more),
    ):
        out = np.zeros(shape).view(np.matrix)
        assert call(out=out) is out
        assert_same_bits(np.asarray(out), call())


@pytest.fixture
def over_rows_taken(monkeypatch):
    """A list with an item for every call that arrays take to kernels by the general path."""
    taken = []
    over_rows = arrays.over_rows
    monkeypatch.setattr(arrays, "over_rows", lambda *given: (taken.append(1), over_rows(*given)))
    return taken


FEW_SHAPES = [
    ((10,), -1),
    ((3, 20), 1),
    ((9, 3), -1),
    ((2, 3, 5), 2),
    ((5, 6), None),
    ((7, 1000), -1),
    ((70, 1000), -1),
]


@by_temperature
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), FEW_SHAPES, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_sixteen_bits_and_masks(name, shape, axis, dtype, has_mask, t, rng, over_rows_taken):
    x = rng.normal(0, 3, shape).astype(dtype)
    where = rng.random(shape) < 0.6 if has_mask else None
    if has_mask and x.ndim > 1:
        where[0] = False  # a row of which nothing is kept
    function = getattr(numbasoft, name)
    got, given, in_place = function(x, axis, temperature=t, where=where), np.full_like(x, 7), x.copy()
    assert function(x, axis, temperature=t, where=where, out=given) is given
    assert function(in_place, axis, temperature=t, where=where, out=in_place) is in_place
    assert not over_rows_taken
    want = general(name, x, axis, t, where, None, None)
    assert over_rows_taken
    for result in got, given, in_place:
        assert result.dtype == dtype
        assert_same_bits(result, want)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_masks_that_are_not_plain(name, rng, over_rows_taken):
    x = rng.normal(size=(4, 20)).astype(np.float32)
    where = rng.random(x.shape) < 0.6
    function = getattr(numbasoft, name)
    want = function(x, where=where)
    frozen = where.copy()
    frozen.flags.writeable = False
    assert_same_bits(function(x, where=frozen), want)
    assert not over_rows_taken
    for other in (
        np.asfortranarray(where),
        np.repeat(where, 2, 1)[:, ::2],
        where.tolist(),
        where.view(np.matrix),
    ):
        over_rows_taken.clear()
        assert_same_bits(function(x, where=other), want)
        assert over_rows_taken
    assert_same_bits(function(x, where=where[:1]), function(x, where=np.broadcast_to(where[:1], x.shape)))
    for wrong, error in (
        (where.astype(np.uint8), TypeError),
        (where[:3], ValueError),
        (where[:, :3], ValueError),
    ):
        with pytest.raises(error, match="where"):
            function(x, where=wrong)
    y = np.empty(x.shape, np.float32)
    overlapping = y.view(np.uint8).reshape(-1)[: x.size].view(bool).reshape(x.shape)
    overlapping[...] = where
    with pytest.raises(ValueError, match="out overlaps where"):
        function(x, where=overlapping, out=y)


LOSS = API["cross_entropy"]


@pytest.fixture
def only_plain(monkeypatch):
    """The general path of losses fails."""

    def general(*arguments):
        raise AssertionError("the general path")

    monkeypatch.setattr(LOSS, "checked", general)


LOSS_SHAPES = [(10,), (1, 10), (8, 16), (33, 3), (2, 3, 5), (7, 1000), (5, 1), (70, 1000), (30_000, 3)]


def of_losses(x, target, options, ignored):
    """What all functions that have a way for few rows give; nothing where one does not take the options."""
    more = options | {"ignore_index": ignored}
    value, grad = numbasoft.cross_entropy_value_and_grad(x, target, **more)
    in_place, given = x.copy(), np.full_like(x, 7)
    results = {
        "cross_entropy": numbasoft.cross_entropy(x, target, **more),
        "value": value,
        "grad": grad,
        "in place": numbasoft.cross_entropy_value_and_grad(in_place, target, out=in_place, **more)[1],
        "given": numbasoft.cross_entropy_value_and_grad(x, target, out=given, **more)[1],
    }
    if options["reduction"] != "none":
        for g in 0.3, -0.0, 1e300, np.inf, np.nan:
            in_place = x.copy()
            call = numbasoft.cross_entropy_backward
            results["backward", g] = call(float(g), x, target, **more)
            results["backward in place", g] = call(float(g), in_place, target, out=in_place, **more)
    if not options["z_loss"]:
        if options["reduction"] == "mean":
            results["perplexity"] = numbasoft.perplexity(
                x, target, temperature=options["temperature"], ignore_index=ignored
            )
        if options["temperature"] == 1.0:
            results["nll_loss"] = numbasoft.nll_loss(
                x, target, reduction=options["reduction"], ignore_index=ignored
            )
        if options["reduction"] == "none":
            valid = np.asarray(np.clip(target, 0, x.shape[-1] - 1))
            results["token_log_probs"] = numbasoft.token_log_probs(
                x, valid, temperature=options["temperature"]
            )
    return results


@pytest.mark.parametrize("ignored", [-100, 0, "last"])
@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize("t", [1.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@by_dtype
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=lambda v: str(v).replace(" ", ""))
def test_plain_losses(shape, dtype, reduction, t, z, ignored, rng, only_plain, monkeypatch):
    ignored = shape[-1] - 1 if ignored == "last" else ignored
    x = rng.normal(0, 30, shape).astype(dtype)
    target = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    for i in (0, 15, 16, 32) if target.ndim else ():  # in groups of 16 and 8 rows, first and last
        if i < target.size:
            target.flat[i] = ignored
            x[np.unravel_index(i, target.shape)] = np.nan  # whatever it holds
    options = {"reduction": reduction, "temperature": t, "z_loss": z}
    with np.errstate(all="ignore"):
        got = of_losses(x, target, options, ignored)
        monkeypatch.undo()
        want = of_losses(x, target.astype(np.int32), options, ignored)  # which takes the general path
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert type(got[key]) is type(value), key
        assert_same_bits(np.asarray(got[key]), np.asarray(value))
    if reduction == "none":
        is_ignored = target == ignored
        assert not got["cross_entropy"][is_ignored].any() and not got["grad"][is_ignored].any()
        assert (got["cross_entropy"][~is_ignored] >= 0).all()


def test_plain_losses_of_short_rows_are_done_a_lane_each(rng, monkeypatch):
    taken = []
    monkeypatch.setattr(
        LOSS, "plain_kernel", lambda *given, code=LOSS.plain_kernel: (taken.append(given[2]), code(*given))[1]
    )
    for shape, is_narrow in (
        ((8, 16), True), ((200, 3), True), ((7, 16), False), ((8, 17), False), ((30_000, 3), True), ((8000, 17), False),
    ):  # fmt: skip
        taken.clear()
        numbasoft.cross_entropy_value_and_grad(
            rng.normal(size=shape).astype(np.float32), rng.integers(0, 3, shape[0])
        )
        assert taken == [is_narrow]


def test_what_plain_losses_leave_to_the_general_path(rng, monkeypatch):
    x = rng.normal(size=(6, 9)).astype(np.float32)
    target = rng.integers(0, 9, 6)
    want = numbasoft.cross_entropy(x, target)
    taken, checked = [], LOSS.checked
    monkeypatch.setattr(
        LOSS, "checked", lambda *given, **named: (taken.append(1), checked(*given, **named))[1]
    )
    assert_same_bits(numbasoft.cross_entropy(x, target), want)
    assert not taken
    frozen = target.copy()
    frozen.flags.writeable = False
    for arguments, options in (
        ((x, target.tolist()), {}), ((x, target.astype(np.uint8)), {}), ((x, frozen), {}), ((x, target[::-1].copy()[::-1]), {}),
        ((np.asfortranarray(x), target), {}), ((x.T.copy(), target), {"axis": 0}),
        ((x, target), {"weight": np.ones(9)}), ((x, target), {"temperature": 1}), ((x, target), {"ignore_index": np.int64(-100)}),
        ((x, target), {"z_loss": 0}), ((x, target), {"label_smoothing": 0}), ((x, target), {"ignore_index": 1 << 70}),
    ):  # fmt: skip
        taken.clear()
        result = numbasoft.cross_entropy(*arguments, **options)
        assert_same_bits(result, want)
        assert taken, (arguments, options)
    assert np.isnan(numbasoft.cross_entropy(x * np.nan, target))


@pytest.mark.parametrize("shape", [(6, 9), (8000, 9), (4000, 17)], ids=str)
@pytest.mark.parametrize("bad", [17, -1, -101, 1 << 40, -(1 << 63)])
def test_plain_losses_refuse_classes_before_they_write(bad, shape, rng):
    x = rng.normal(size=shape).astype(np.float32)
    target = rng.integers(0, 9, len(x))
    target[4] = bad
    out, logits = np.full_like(x, 7), x.copy()
    for call in (
        lambda: numbasoft.cross_entropy(x, target),
        lambda: numbasoft.cross_entropy_value_and_grad(x, target, out=out),
        lambda: numbasoft.cross_entropy_value_and_grad(logits, target, out=logits),
        lambda: numbasoft.cross_entropy_backward(1.0, x, target, out=out),
        lambda: numbasoft.perplexity(x, target),
        lambda: numbasoft.nll_loss(x, target),
    ):
        with pytest.raises(ValueError, match=f"target is {bad} at 4"):
            call()
    with pytest.raises(ValueError, match=f"ids is {bad} at 4"):
        numbasoft.token_log_probs(x, target)
    assert (out == 7).all()
    assert_same_bits(logits, x)
    assert numbasoft.cross_entropy(x, target, ignore_index=bad) >= 0


def test_plain_losses_refuse_what_the_general_path_refuses(rng):
    x, target = rng.normal(size=(6, 9)).astype(np.float32), rng.integers(0, 9, 6)
    for options, error, match in (
        ({"reduction": "median"}, ValueError, "reduction"), ({"reduction": 1}, TypeError, "reduction"), ({"reduction": None}, TypeError, "reduction"), ({"reduction": np.array(["mean", "sum"])}, TypeError, "reduction"),
        ({"z_loss": -1.0}, ValueError, "z_loss"), ({"z_loss": float("nan")}, ValueError, "z_loss"), ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"temperature": 0.0}, ValueError, "temperature"), ({"ignore_index": 1.5}, TypeError, "ignore_index"), ({"axis": 5}, IndexError, "axis"),
        ({"axis": None}, TypeError, "axis"), ({"axis": True}, TypeError, "axis"),
    ):  # fmt: skip
        for call in (
            numbasoft.cross_entropy, numbasoft.cross_entropy_value_and_grad, functools.partial(numbasoft.cross_entropy_backward, 1.0),
        ):  # fmt: skip
            with pytest.raises(error, match=match):
                call(x, target, **options)
    for wrong in target[:5], target[:, None], np.int64(3):
        with pytest.raises(ValueError, match="target has shape"):
            numbasoft.cross_entropy(x, wrong)
    out = np.empty((6, 9), np.float32)
    shared = out.reshape(-1).view(np.int64)[:6]
    shared[...] = target
    with pytest.raises(ValueError, match="out shares memory with target"):
        numbasoft.cross_entropy_value_and_grad(x, shared, out=out)
    wide = np.empty((6, 18), np.float32)
    for wrong, error in (
        (wide[:, ::2].astype(float), TypeError),
        (wide, ValueError),
        (out.tolist(), TypeError),
    ):
        with pytest.raises(error, match="out"):
            numbasoft.cross_entropy_value_and_grad(x, target, out=wrong)


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_plain_losses_where_no_row_counts(rows):
    x, target = np.ones((rows, 5), np.float32), np.full(rows, -100)
    for reduction in "mean", "sum":
        loss, grad = numbasoft.cross_entropy_value_and_grad(x, target, reduction=reduction)
        assert loss == 0 and not grad.any() and grad.shape == x.shape
        assert numbasoft.nll_loss(x, target, reduction=reduction) == 0
        assert not numbasoft.cross_entropy_backward(2.0, x, target, reduction=reduction).any()
    assert numbasoft.perplexity(x, target) == 1


def test_rounded_losses_of_few_rows_warn_of_nothing():
    huge = np.array([[3e38, -3e38], [0.0, 1.0], [0.0, 200.0]], np.float32)
    with np.errstate(all="raise"):
        loss = numbasoft.cross_entropy(huge, np.array([1, 1, 1]), reduction="none")
        log_p = numbasoft.token_log_probs(huge, np.array([1, 0, 1]))
    assert np.isinf(loss[0]) and np.isinf(log_p[0])
    assert loss[2] == 0 and log_p[2] == 0  # 1e-87
    assert_same_bits(loss, numbasoft.cross_entropy(huge, np.array([1, 1, 1], np.int16), reduction="none"))


def nll_by_numpy(log_p, target, axis, weight):
    index = np.maximum(target, 0)
    chosen = np.take_along_axis(log_p, np.expand_dims(index, axis), axis).squeeze(axis).astype(np.float64)
    counts = target != -100
    w = counts * (np.ones(target.shape) if weight is None else weight[index])
    return np.where(w != 0, w * (0.0 - np.where(w != 0, chosen, 0.0)), 0.0), w


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", ">f4", "int32"])
@pytest.mark.parametrize(
    "layout", ["plain", "transposed", "reversed", "every other", "unaligned", "broadcast"]
)
@pytest.mark.parametrize(
    ("shape", "axis"), [((9,), 0), ((40, 9), 1), ((9, 40), 0), ((3, 9, 4, 5), 1), ((2, 9, 20000), 1), ((40000, 3), 1)], ids=str
)  # fmt: skip
def test_log_probabilities_at_classes(shape, axis, layout, dtype, has_weight, rng):
    n = shape[axis]
    x = (rng.normal(0, 3, shape) - 5).astype(dtype)
    if layout == "transposed":
        x = x.T.copy().T
    elif layout == "reversed":
        x = x[..., ::-1]
    elif layout == "every other":
        x = np.repeat(x, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    elif layout == "unaligned":
        x = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(shape)
    elif layout == "broadcast" and axis:
        x = np.broadcast_to(x[:1], shape)
    outer = shape[:axis] + shape[axis + 1 :]
    target = np.asarray(rng.integers(0, n, outer))
    target[rng.random(outer) < 0.1] = -100
    weight = None
    if has_weight:
        weight = rng.random(n)
        weight[0] = 0.0
    want, w = nll_by_numpy(x.astype(np.float64), target, axis, weight)
    got = numbasoft.nll_loss(x, target, axis=axis, weight=weight, reduction="none")
    of_x = np.dtype(np.float64) if x.dtype.kind in "iu" else x.dtype.newbyteorder("=")
    assert got.dtype == of_x
    assert_same_bits(got, want.astype(of_x))
    total = numbasoft.nll_loss(x, target, axis=axis, weight=weight)
    mean = want.sum() / w.sum() if w.sum() else 0.0
    np.testing.assert_allclose(np.float64(total), mean, rtol=2.0 * float(np.spacing(np.ones((), of_x))))
    grad = numbasoft.nll_loss_backward(2.0, x, target, axis=axis, weight=weight, reduction="sum")
    placed = np.zeros(shape, of_x)
    index = np.expand_dims(np.maximum(target, 0), axis)
    np.put_along_axis(placed, index, np.expand_dims(np.where(w != 0, -2.0 * w, 0.0).astype(of_x), axis), axis)
    assert_same_bits(grad, placed)


@by_dtype
@pytest.mark.parametrize("shape", [(10,), (), (3, 5), (40, 700), (300, 300)], ids=str)
def test_few_elements(shape, dtype, rng, monkeypatch):
    p = np.asarray(rng.random(shape)).astype(dtype)
    x, g = (
        np.asarray(rng.normal(0, 20, shape)).astype(dtype),
        np.asarray(rng.normal(size=shape)).astype(dtype),
    )
    api, taken = API["sigmoid"], []
    monkeypatch.setattr(
        api, "over_elements", lambda *given, run=api.over_elements: (taken.append(1), run(*given))
    )
    for name, inputs in (("sigmoid", (x,)), ("logit", (p,)), ("sigmoid_backward", (g, p))):
        function = getattr(numbasoft, name)
        taken.clear()
        got, given, in_place = function(*inputs), np.full_like(x, 7), inputs[-1].copy()
        assert function(*inputs, out=given) is given
        assert function(*inputs[:-1], in_place, out=in_place) is in_place
        assert bool(taken) == (x.size >= launch.PARALLEL)
        taken.clear()
        strided = [
            np.repeat(a, 2, -1)[..., ::2] if shape else a.byteswap().view(a.dtype.newbyteorder())
            for a in inputs
        ]
        want = function(*strided)
        assert taken
        for result in got, given, in_place:
            assert isinstance(result, np.ndarray)
            assert_same_bits(result, want)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16, 17, 100])
def test_totals_are_rounded_once(n, rng):
    values = rng.normal(size=n) * 10.0 ** rng.integers(-20, 20, n)
    assert totals.total(values) == math.fsum(values)


def test_totals_that_are_not_finite():
    total, inf, nan = totals.total, np.inf, np.nan
    big = 1e308
    with np.errstate(all="raise"):
        assert total(np.array([1.0, inf] + [2.0] * 9)) == inf
        assert total(np.array([1.0, -inf] + [2.0] * 9)) == -inf
        assert np.isnan(total(np.array([inf] + [2.0] * 9 + [-inf])))
        assert np.isnan(total(np.array([1.0] * 9 + [nan])))
        assert total(np.full(20, big)) == inf
        assert total(np.array([-big, big] * 10)) == 0  # whichever way it goes


def test_log_probabilities_of_few_rows_take_no_general_path(rng, only_plain):
    for dtype in np.float32, np.float64:
        x = rng.normal(size=(launch.PARALLEL - 1, 2)).astype(dtype)
        assert np.isfinite(numbasoft.nll_loss(x, rng.integers(0, 2, len(x))))
    with pytest.raises(AssertionError, match="general path"):
        numbasoft.nll_loss(np.zeros((launch.PARALLEL, 2)), np.zeros(launch.PARALLEL, int))
