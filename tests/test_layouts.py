"""Every layout gives the bits of the C-contiguous copy, and `out` is written where it lies, nowhere else."""

import numpy as np
import oracle
import pytest
from oracle import DTYPES, check, limit
from samples import BACKWARD, FORWARD, sample

import numbasoft
from numbasoft import arrays as module

pytestmark = pytest.mark.usefixtures("little")

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_forward = pytest.mark.parametrize("name", FORWARD)
by_backward = pytest.mark.parametrize("name", BACKWARD)

SHAPE = (6, 5, 35)
AXES = [-1, 0, 1, -3, (0, 1), (1, 2), (2, 0), (0, 1, 2), None]


def unaligned(a):
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    moved = buffer[1:].view(a.dtype).reshape(a.shape)
    moved[...] = a
    return moved


def spaced(a):
    """Every second element, every third row, of a larger array."""
    grown = np.zeros(tuple((3 if i == 0 else 2) * n for i, n in enumerate(a.shape)), a.dtype)
    view = grown[tuple(slice(None, None, 3 if i == 0 else 2) for i in range(a.ndim))]
    view[...] = a
    return view


def reversed_axes(a):
    every = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[every])[every]


def last_axis_reversed(a):
    return np.ascontiguousarray(a[..., ::-1])[..., ::-1]


def middle_axis_last(a):
    return np.ascontiguousarray(np.swapaxes(a, 0, 1)).swapaxes(0, 1) if a.ndim > 1 else a.copy()


def padded_rows(a):
    """Contiguous rows with a gap after each, as in a slice of columns."""
    grown = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    grown[..., 1:-2] = a
    return grown[..., 1:-2]


def field_of_records(a):
    """Strides that are no multiple of the element."""
    records = np.zeros(a.shape, np.dtype([("pad", "u1"), ("value", a.dtype)]))
    records["value"] = a
    return records["value"]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def byte_swapped(a):
    return a.astype(a.dtype.newbyteorder())


def fortran(a):
    return np.asfortranarray(a)


LAYOUTS = {
    f.__name__: f
    for f in (
        fortran, spaced, reversed_axes, last_axis_reversed, middle_axis_last, padded_rows, field_of_records,
        unaligned, read_only, byte_swapped,
    )
}  # fmt: skip
WRITEABLE = [name for name in LAYOUTS if name not in ("read_only", "byte_swapped")]


def arrays(name, dtype, rng, shape=SHAPE, axis=-1):
    """Arguments of a function, C-contiguous."""
    x = sample("random", rng, int(np.prod(shape[:-1])), shape[-1], dtype).reshape(shape)
    if name in FORWARD:
        return (x,)
    if name == "logsumexp_backward":
        lse = numbasoft.logsumexp(x, axis, keepdims=True)
        return rng.standard_normal(lse.shape).astype(x.dtype), x, lse
    y = (numbasoft.log_softmax if name.startswith("log") else numbasoft.softmax)(x, axis)
    return rng.standard_normal(shape).astype(x.dtype), y


def same_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_every_axis_against_the_oracle(name, dtype, axis, rng):
    arguments = arrays(name, dtype, rng, axis=axis)
    got = getattr(numbasoft, name)(*arguments, axis)
    check(got, getattr(oracle, name)(*arguments, axis), limit(name, DTYPES[dtype]))


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_every_layout_gives_the_same_bits(name, dtype, layout, axis, rng):
    if layout == "byte_swapped" and dtype == "bfloat16":
        return  # ml_dtypes has no byte-swapped bfloat16, so there is nothing to pass
    plain = arrays(name, dtype, rng, axis=axis)
    want = getattr(numbasoft, name)(*plain, axis)
    for i in range(len(plain)):
        mixed = [LAYOUTS[layout](a) if i == j else a for j, a in enumerate(plain)]
        before = [a.tobytes() for a in mixed]
        same_bits(getattr(numbasoft, name)(*mixed, axis), want)
        assert [a.tobytes() for a in mixed] == before, "an argument was changed"
    everything = [LAYOUTS[layout](a) for a in plain]
    same_bits(getattr(numbasoft, name)(*everything, axis), want)


@pytest.mark.parametrize("layout", [*LAYOUTS, "broadcast"])
@by_forward
def test_every_layout_of_a_mask(name, layout, rng):
    x = rng.normal(0, 3, SHAPE).astype(np.float32)
    where = rng.random(SHAPE) < 0.8
    if layout == "broadcast":
        where = np.broadcast_to(where[:1, :1], SHAPE)
    given = where if layout in ("broadcast", "byte_swapped") else LAYOUTS[layout](where)
    for axis in (-1, 0, (0, 2)):
        same_bits(
            getattr(numbasoft, name)(x, axis, where=given),
            getattr(numbasoft, name)(x, axis, where=where.copy()),
        )


@pytest.mark.parametrize("axis", [-1, 0, (0, 1)], ids=str)
@by_dtype
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_broadcast_arrays(name, dtype, axis, rng):
    # a stride of zero: along the reduced axis, along the others, and along all of them
    kept = np.zeros((7, 9)).sum(axis, keepdims=True).shape
    for shape in ((1, 9), (7, 1), (1, 1)):
        small = arrays(name, dtype, rng, shape, axis)
        shapes = (kept, (7, 9), kept) if name == "logsumexp_backward" else ((7, 9),) * len(small)
        views = [np.broadcast_to(a, s) for a, s in zip(small, shapes, strict=True)]
        want = getattr(numbasoft, name)(*[v.copy() for v in views], axis)
        same_bits(getattr(numbasoft, name)(*views, axis), want)


# --- shapes ------------------------------------------------------------------------------------------------


@by_dtype
def test_zero_dimensional_arrays(dtype):
    x = np.array(2.5).astype(DTYPES[dtype])
    for axis in (-1, 0, None):
        assert float(numbasoft.softmax(x, axis)) == 1
        assert float(numbasoft.log_softmax(x, axis)) == 0
        assert float(numbasoft.logsumexp(x, axis)) == 2.5
        for result in (
            numbasoft.softmax(x, axis),
            numbasoft.log_softmax(x, axis),
            numbasoft.logsumexp(x, axis),
        ):
            assert np.shape(result) == ()
            assert result.dtype == x.dtype
    out = np.array(7).astype(x.dtype)
    assert numbasoft.softmax(x, out=out) is out
    assert out == 1


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "bool", "int8", "uint8", "int64", "uint64"])
@by_forward
def test_zero_dimensional_arrays_that_are_converted_first(name, dtype):
    # NumPy's conversions of 0-d arrays return scalars easily
    got = getattr(numbasoft, name)(np.array(1).astype(dtype))
    assert got.dtype == oracle.result_dtype(dtype)
    assert float(got) == {"softmax": 1, "log_softmax": 0, "logsumexp": 1}[name]


@pytest.mark.parametrize("value", [2.5, np.float32(2.5), np.float64(2.5)])
def test_scalars(value):
    assert float(numbasoft.softmax(value)) == 1
    assert float(numbasoft.logsumexp(value)) == 2.5


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0), (3, 0, 2), (0, 3, 2), (3, 2, 0)])
@by_dtype
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_empty_arrays(name, dtype, shape):
    dtype = DTYPES[dtype]
    x = np.empty(shape, dtype)
    for axis in (*range(len(shape)), None):
        axes = range(len(shape)) if axis is None else (axis,)
        reduced = tuple(n for i, n in enumerate(shape) if i not in axes)
        if name == "logsumexp":
            got = numbasoft.logsumexp(x, axis)
            assert got.shape == reduced
            assert (np.asarray(got).astype(float) == -np.inf).all()
        elif name == "logsumexp_backward":
            assert (
                numbasoft.logsumexp_backward(np.ones(reduced, dtype), x, np.ones(reduced, dtype), axis).shape
                == shape
            )
        else:
            got = getattr(numbasoft, name)(*[x] * (1 if name in FORWARD else 2), axis)
            assert got.shape == shape
            assert got.dtype == dtype


@pytest.mark.parametrize(
    "shape", [(1,), (1, 1), (1, 40), (40, 1), (1, 1, 1), (2, 1, 3), (1, 2, 1, 3, 1), (3, 2, 2, 5)]
)
@by_forward
def test_axes_of_length_one_and_many_axes(name, shape, rng):
    x = rng.normal(0, 3, shape).astype(np.float32)
    for axis in (*range(-len(shape), len(shape)), tuple(range(len(shape))), None, (0,), (len(shape) - 1,)):
        got = getattr(numbasoft, name)(x, axis)
        check(got, getattr(oracle, name)(x, axis), 2)


def test_lists_tuples_and_nested_lists():
    assert numbasoft.softmax([0.0, 0.0]).tolist() == [0.5, 0.5]
    assert numbasoft.softmax(((0, 0), (1, 1))).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert numbasoft.logsumexp([[3.0], [4.0]]).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None], ids=str)
def test_keepdims(axis, rng):
    x = rng.normal(0, 3, (4, 5, 6))
    kept, plain = numbasoft.logsumexp(x, axis, keepdims=True), numbasoft.logsumexp(x, axis)
    assert kept.shape == np.sum(x, axis, keepdims=True).shape
    assert plain.shape == np.sum(x, axis).shape
    same_bits(kept.reshape(plain.shape), np.asarray(plain))


@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("keep_lse", [False, True])
def test_logsumexp_backward_takes_both_reduced_shapes(keep_grad, keep_lse, rng):
    x = rng.normal(0, 3, (4, 5, 6))
    for axis in (-1, 0, (0, 2), None):
        lse = numbasoft.logsumexp(x, axis, keepdims=True)
        grad = rng.standard_normal(lse.shape)
        flat = np.sum(x, axis).shape
        got = numbasoft.logsumexp_backward(
            grad if keep_grad else grad.reshape(flat), x, lse if keep_lse else lse.reshape(flat), axis
        )
        same_bits(got, numbasoft.logsumexp_backward(grad, x, lse, axis))


# --- out ---------------------------------------------------------------------------------------------------


def out_like(want, layout, fill=7):
    """An array for the result in the layout, filled, and the buffer that it lies in."""
    out = (
        LAYOUTS[layout](np.full(want.shape, fill).astype(want.dtype)) if layout else np.full_like(want, fill)
    )
    buffer = out
    while isinstance(buffer.base, np.ndarray):
        buffer = buffer.base
    return out, buffer


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None], ids=str)
@pytest.mark.parametrize("layout", [None, *WRITEABLE])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_out_in_every_layout(name, dtype, layout, axis, rng):
    arguments = arrays(name, dtype, rng, axis=axis)
    want = np.asarray(getattr(numbasoft, name)(*arguments, axis))
    if want.ndim == 0 and layout not in ("unaligned", "field_of_records"):
        layout = None  # one number has no other layout
    out, buffer = out_like(want, layout)
    untouched = buffer.copy()
    assert getattr(numbasoft, name)(*arguments, axis, out=out) is out
    same_bits(out, want)
    # the bytes between the elements of `out` are not its own
    out[...] = 7
    assert buffer.tobytes() == untouched.tobytes()


@by_dtype
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_out_with_mask_temperature_and_bfloat16(name, dtype, rng):
    arguments = arrays(name, dtype, rng)
    options = {"temperature": 3.0}
    if name in FORWARD:
        options["where"] = rng.random(SHAPE) < 0.8
    want = getattr(numbasoft, name)(*arguments, **options)
    out = np.zeros_like(want)
    assert getattr(numbasoft, name)(*arguments, **options, out=out) is out
    same_bits(out, want)


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", *WRITEABLE])
@by_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax", *BACKWARD])
def test_exact_in_place(name, dtype, layout, axis, rng):
    # every argument of the result's shape may be the memory of the result
    plain = arrays(name, dtype, rng, axis=axis)
    want = getattr(numbasoft, name)(*plain, axis)
    for i, a in enumerate(plain):
        if a.shape != want.shape:
            continue
        target = a.copy() if layout == "contiguous" else LAYOUTS[layout](a)
        arguments = [target if i == j else b for j, b in enumerate(plain)]
        others = [b.tobytes() for j, b in enumerate(plain) if i != j]
        assert getattr(numbasoft, name)(*arguments, axis, out=target) is target
        same_bits(target, want)
        assert [b.tobytes() for j, b in enumerate(plain) if i != j] == others


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_exact_in_place_through_a_second_view(name, rng):
    # the same memory and layout, though not the same Python object
    x = rng.normal(0, 3, (4, 100)).astype(np.float32)
    want = getattr(numbasoft, name)(x)
    view = x[:]
    assert getattr(numbasoft, name)(x, out=view) is view
    same_bits(x, want)


@pytest.mark.parametrize("n", [300_000, 1_000_003])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", *BACKWARD])
def test_exact_in_place_on_rows_long_enough_to_be_split(name, n, rng):
    plain = arrays(name, "float32", rng, (1, n))
    want = getattr(numbasoft, name)(*plain)
    target = plain[1 if name == "logsumexp_backward" else 0]
    getattr(numbasoft, name)(*plain, out=target)
    same_bits(target, want)


def test_both_gradient_and_output_in_place(rng):
    # grad, y and out all one array: y (y - sum y^2)
    y = numbasoft.softmax(rng.normal(0, 3, (5, 40)))
    want = numbasoft.softmax_backward(y.copy(), y.copy())
    numbasoft.softmax_backward(y, y, out=y)
    same_bits(y, want)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_out_of_empty_arrays(shape):
    out = np.empty(shape)
    assert numbasoft.softmax(np.empty(shape), out=out) is out
    sums = np.zeros(shape[:-1])
    numbasoft.logsumexp(np.empty(shape), out=sums)
    assert (sums == (-np.inf if shape[-1] == 0 else sums)).all()


def test_neighbours_in_one_buffer_are_not_an_overlap(rng):
    # the memory ranges of the two cross, their elements do not
    buffer = rng.normal(0, 3, (6, 40)).astype(np.float32)
    for x, out in (
        (buffer[:, :20], buffer[:, 20:]),
        (buffer[:, ::2], buffer[:, 1::2]),
        (buffer[::2], buffer[1::2]),
    ):
        want = numbasoft.softmax(x.copy())
        numbasoft.softmax(x, out=out)
        same_bits(out, want)


# --- size --------------------------------------------------------------------------------------------------

BEYOND = 2**31 + 11


@pytest.mark.big
def test_a_row_above_two_to_the_thirty_first():
    x = np.zeros(BEYOND, np.float32)
    x[-1] = 20
    numbasoft.softmax(x, out=x)
    total = np.exp(20.0) + BEYOND - 1
    two_ulp = 2 * np.spacing(np.float32(1 / total)).astype(np.float64)
    assert x[0] == x[2**31] == pytest.approx(1 / total, rel=0, abs=two_ulp)
    assert x[-1] == pytest.approx(np.exp(20.0) / total, rel=2**-23)
    assert (x[:-1] == x[0]).all()


@pytest.mark.big
def test_more_than_two_to_the_thirty_first_elements_in_many_rows():
    rows = 2**31 // 1024 + 5
    x = np.zeros((rows, 1024), np.float16)
    x[-1, -1] = np.float16(np.inf)
    x[-2, -1] = 3
    numbasoft.softmax(x, out=x)
    assert np.isnan(x[-1]).all()
    assert x[-2, -1] == np.float16(np.exp(3.0) / (np.exp(3.0) + 1023))
    assert (x[:-2] == np.float16(1 / 1024)).all()


@pytest.mark.big
def test_columns_above_two_to_the_thirty_first():
    x = np.zeros((3, 2**31 // 3 + 9), np.float16)
    x[2, -1] = 1
    numbasoft.softmax(x, 0, out=x)
    check(x[:, -1], oracle.softmax(np.array([0, 0, 1], np.float16)), 0.51)
    assert (x[:, :-1] == np.float16(1 / 3)).all()


MASKS = [(33, 70), (3, 1, 1, 70), (3, 1, 33, 70), (1, 4, 1, 70), (70,), (33, 1), (3, 4, 33, 70)]


@pytest.mark.parametrize("axis", [-1, 1, (0, 2)], ids=str)
@pytest.mark.parametrize("shape", MASKS, ids=str)
@by_dtype
def test_masks_that_are_broadcast_are_copied_alone(dtype, shape, axis, monkeypatch, rng):
    x = sample("random", rng, 3 * 4 * 33, 70, dtype).reshape(3, 4, 33, 70)
    where = rng.random(shape) < 0.7
    want = numbasoft.softmax(x, axis, where=np.ascontiguousarray(np.broadcast_to(where, x.shape)))
    monkeypatch.setattr(module, "BLOCK", 5000)  # many blocks
    kinds, buffer = [], module.buffer

    def spied(rows, n, kind):
        kinds.append(kind)
        return buffer(rows, n, kind)

    monkeypatch.setattr(module, "buffer", spied)
    same_bits(numbasoft.softmax(x, axis, where=where), want)
    if axis == -1:
        assert all(kind == np.uint8 for kind in kinds) and len(kinds) <= 1
    for layout in WRITEABLE:
        out = LAYOUTS[layout](np.zeros_like(x))
        numbasoft.softmax(x, axis, where=where, out=out)
        same_bits(out, want)
        out = LAYOUTS[layout](x)
        numbasoft.softmax(out, axis, where=where, out=out)
        same_bits(out, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_arrays_of_which_some_are_copied(layout, monkeypatch, rng):
    monkeypatch.setattr(module, "BLOCK", 5000)
    x = rng.standard_normal((60, 110)).astype("f4")
    y, g = numbasoft.softmax(x), rng.standard_normal(x.shape).astype("f4")
    want = numbasoft.softmax_backward(g, y)
    for first, second in (LAYOUTS[layout], np.copy), (np.copy, LAYOUTS[layout]):
        same_bits(numbasoft.softmax_backward(first(g), second(y)), want)
        if layout in WRITEABLE:
            for place in range(3):
                arguments = first(g), second(y)
                out = (*arguments, LAYOUTS[layout](np.zeros_like(x)))[place]
                numbasoft.softmax_backward(*arguments, out=out)
                same_bits(out, want)
