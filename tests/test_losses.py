"""Binary cross-entropy, sigmoid, logit and the divergence: against mpmath, PyTorch and SciPy, and bad input."""

import numpy as np
import pytest
from oracle import DTYPES

import numbasoft

pytest.importorskip("mpmath", reason="mpmath is not installed, which gives the exact answers here")
import elements_oracle
import losses_oracle
import mpmath

X = np.array(
    [0.0, -0.0, 1e-30, -1e-8, 0.3, -2.5, 17.0, -40.0, 88.0, -95.0, 103.0, 700.0, -710.0, 745.0, -745.0]
)


def ulps(got, exact):
    """The largest error of float32 or float64 numbers, in their ULP; NaN where there is one."""
    got = np.asarray(got).ravel()
    units = [float(np.spacing(np.abs(got.dtype.type(e)))) for e in exact]
    pairs = zip(got, exact, units, strict=True)
    return np.max([float(abs(mpmath.mpf(float(g)) - e) / u) for g, e, u in pairs])


@pytest.fixture(autouse=True)
def precision():
    with mpmath.workdps(60):
        yield


def values(dtype, rng):
    limit = 120 if dtype == "float32" else 800
    return np.concatenate([X[abs(X) < limit], rng.normal(0, 3, 500), rng.normal(0, 30, 500)]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_and_logit_against_mpmath(dtype, rng):
    x = values(dtype, rng)
    assert ulps(numbasoft.sigmoid(x), [1 / (1 + mpmath.exp(-mpmath.mpf(float(v)))) for v in x]) < 2.5
    p = [rng.random(500), [0.5 + 1e-7, 0.5 - 1e-7, 0.25, 0.75, 1e-30, 1e-40, 1e-45, 1e-5]]
    p += [
        0.5 + rng.normal(0, 1e-5, 100),
        2.0 ** -rng.uniform(0, 24, 100),
        1 - 2.0 ** -rng.uniform(1, 23, 100),
    ]
    p = np.concatenate(p).astype(dtype)
    exact = [mpmath.log(mpmath.mpf(float(v)) / (1 - mpmath.mpf(float(v)))) for v in p]
    assert ulps(numbasoft.logit(p), exact) < {"float32": 0.51, "float64": 2.5}[dtype]
    for n in range(1, 40):
        np.testing.assert_array_equal(numbasoft.logit(p[:n]), numbasoft.logit(p)[:n])
    np.testing.assert_array_equal(
        numbasoft.logit(np.array([0, 1, 0.5, -1, np.nan], dtype)), [-np.inf, np.inf, 0, np.nan, np.nan]
    )
    np.testing.assert_array_equal(
        numbasoft.sigmoid(np.array([-np.inf, np.inf, np.nan], dtype)), [0, 1, np.nan]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_cross_entropy_against_mpmath(dtype, rng):
    x = values(dtype, rng)
    t = rng.random(x.size).astype(dtype)
    t[::3], t[1::3] = 0, 1
    loss = numbasoft.binary_cross_entropy(x, t, pos_weight=2, reduction="none")
    grad = numbasoft.binary_cross_entropy_backward(1.0, x, t, pos_weight=2, reduction="sum")
    exact, slopes = [], []
    for v, q in zip(x, t, strict=True):
        v, q = mpmath.mpf(float(v)), mpmath.mpf(float(q))
        exact.append(2 * q * mpmath.log1p(mpmath.exp(-v)) + (1 - q) * mpmath.log1p(mpmath.exp(v)))
        slopes.append(((1 - q) / (1 + mpmath.exp(-v)), 2 * q / (1 + mpmath.exp(v))))
    assert ulps(loss, exact) < 4
    scale = [float(np.spacing(np.dtype(dtype).type(max(pair)))) for pair in slopes]
    worst = max(abs(float(g) - float(a - b)) / s for g, (a, b), s in zip(grad, slopes, scale, strict=True))
    assert worst < 4
    total = numbasoft.binary_cross_entropy(x, t, pos_weight=2, reduction="sum")
    assert ulps(total, [mpmath.fsum(exact)]) < 4
    assert numbasoft.binary_cross_entropy(x, t, pos_weight=2) == pytest.approx(
        float(total) / x.size, rel=1e-6
    )


def test_sixteen_bits_are_rounded_once(rng):
    for name in ("float16", "bfloat16"):
        x = rng.normal(0, 3, (7, 90)).astype(DTYPES[name])
        wide = x.astype("f4")
        t = rng.random((7, 90)).astype(DTYPES[name])
        pairs = [(numbasoft.sigmoid(x), numbasoft.sigmoid(wide))]
        if name == "float16":
            loss = numbasoft.binary_cross_entropy(wide, t.astype("f4"), reduction="none")
            pairs.append((numbasoft.binary_cross_entropy(x, t, reduction="none"), loss))
            pairs.append((numbasoft.logit(t), numbasoft.logit(t.astype("f4"))))
        for got, wanted in pairs:
            assert got.dtype == x.dtype
            np.testing.assert_array_equal(got, wanted.astype(x.dtype))


def test_gradients_and_weights_that_the_logits_dtype_does_not_hold():
    x, t = np.array([-7.0, 2.0, 0.0]), np.array([0.0, 1.0, 0.0])
    g = np.float32([65536, 1e5, 1])
    want = numbasoft.binary_cross_entropy_backward(g, x, t, reduction="none")
    for name in "float16", "bfloat16":
        got = numbasoft.binary_cross_entropy_backward(
            g, x.astype(DTYPES[name]), t.astype(DTYPES[name]), reduction="none"
        )
        np.testing.assert_array_equal(got, want.astype(DTYPES[name]))
    narrow = x.astype("f4"), t.astype("f4")
    for weight in 1e39, 1e-40:
        chosen = dict(pos_weight=weight, reduction="none")
        got = numbasoft.binary_cross_entropy(*narrow, **chosen)
        np.testing.assert_array_equal(got, numbasoft.binary_cross_entropy(x, t, **chosen).astype("f4"))
    got = numbasoft.binary_cross_entropy_backward(1e39, np.float32([-60]), np.float32([0]))
    np.testing.assert_allclose(got, [1e39 * np.exp(-60)], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_against_pytorch(reduction, rng):
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed, whose semantics are the oracle here"
    )
    for shape in ((), (9000,), (3, 50), (2, 3, 4)):
        x, t = rng.normal(0, 3, shape), rng.random(shape)
        tensor = torch.tensor(x, requires_grad=True)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(
            tensor, torch.tensor(t), pos_weight=torch.tensor(1.5), reduction=reduction
        )
        g = rng.normal(size=theirs.shape)
        theirs.backward(torch.tensor(g))
        chosen = dict(pos_weight=1.5, reduction=reduction)
        np.testing.assert_allclose(
            numbasoft.binary_cross_entropy(x, t, **chosen), theirs.detach().numpy(), rtol=1e-11
        )
        got = numbasoft.binary_cross_entropy_backward(g, x, t, **chosen)
        np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)
    for axis, temperature in ((-1, 1.0), (0, 2.5)):
        x, y = rng.normal(0, 3, (2, 6, 5))
        p, q = torch.tensor(x), torch.tensor(y, requires_grad=True)
        theirs = torch.nn.functional.kl_div(
            torch.log_softmax(q / temperature, axis), torch.log_softmax(p / temperature, axis),
            log_target=True, reduction="none",
        ).sum(axis)  # fmt: skip
        theirs = theirs.mean() if reduction == "mean" else theirs.sum() if reduction == "sum" else theirs
        g = rng.normal(size=theirs.shape)
        theirs.backward(torch.tensor(g))
        chosen = dict(axis=axis, temperature=temperature, reduction=reduction)
        np.testing.assert_allclose(
            numbasoft.kl_divergence(x, y, **chosen), theirs.detach().numpy(), rtol=1e-12
        )
        got = numbasoft.kl_divergence_backward(g, x, y, **chosen)
        np.testing.assert_allclose(got, q.grad.numpy(), rtol=1e-11, atol=1e-15)


def test_sigmoid_backward_is_the_slope(rng):
    x, g = rng.normal(0, 2, 50), rng.normal(size=50)
    slope = (numbasoft.sigmoid(x + 1e-6) - numbasoft.sigmoid(x - 1e-6)) / 2e-6
    np.testing.assert_allclose(
        numbasoft.sigmoid_backward(g, numbasoft.sigmoid(x)), g * slope, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(
        numbasoft.sigmoid(x), numbasoft.softmax(np.stack([x, 0 * x]), axis=0)[0], rtol=1e-14
    )
    two = numbasoft.cross_entropy(np.stack([x, 0 * x]), (g > 0).astype(int), axis=0, reduction="none")
    np.testing.assert_allclose(numbasoft.binary_cross_entropy(x, g <= 0, reduction="none"), two, rtol=1e-14)


def test_the_divergence_of_special_rows(rng):
    inf = np.inf
    x = np.array([[0.0, -inf, 1.0], [0.0, 1.0, 2.0], [0.0, np.nan, 1.0], [1.0, 2.0, 3.0], [60.0, 0.0, 1.0]])
    y = np.array([[0.0, -inf, 1.0], [0.0, -inf, 2.0], [0.0, 1.0, 1.0], [1.0, 2.0, 3.0], [60.0, 1.0, 1.0]])
    got = numbasoft.kl_divergence(x, y, reduction="none")
    np.testing.assert_array_equal(got[:4], [0, inf, np.nan, 0])
    with mpmath.workdps(80):
        p, q = ([mpmath.exp(v) for v in row] for row in (x[4], y[4]))
        p, q = ([v / mpmath.fsum(row) for v in row] for row in (p, q))
        exact = mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))
        largest = max(abs(a * mpmath.log(a / b)) for a, b in zip(p, q, strict=True))
    assert abs(got[4] - float(exact)) < 8 * np.spacing(float(largest))
    x, y = rng.normal(0, 3, (2, 40, 300)).astype("f4")
    single = numbasoft.kl_divergence(x, y, reduction="none")
    double = numbasoft.kl_divergence(x.astype("f8"), y.astype("f8"), reduction="none")
    np.testing.assert_allclose(single, double, rtol=1e-6, equal_nan=False)
    place = y.copy()
    assert numbasoft.kl_divergence_backward(1.0, x, place, out=place) is place
    np.testing.assert_array_equal(place, numbasoft.kl_divergence_backward(1.0, x, y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_divergence_of_ordinary_rows_of_every_length(dtype, rng):
    # what fills up the last vector of a row is no part of it
    for n in (*range(1, 41), 100, 255, 256, 257, 300, 1000, 3001):
        x, y = rng.normal(0, 3, (2, 3, n)).astype(DTYPES[dtype])
        loss, grad = losses_oracle.plain_divergence(x, y, np.ones(3), reduction="none")
        bound = {"float32": 2e-6, "float64": 4e-15}.get(dtype, 1e-2)
        got = numbasoft.kl_divergence(x, y, reduction="none")
        assert np.all(np.abs(got - loss.astype("f8")) <= bound * np.maximum(1, loss).astype("f8")), n
        got = numbasoft.kl_divergence_backward(np.ones(3, dtype), x, y, reduction="none")
        assert np.all(np.abs(got.astype("f8") - grad.astype("f8")) <= bound), n


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("apart", [30.0, 1.0, 1e-3, 1e-7, 1e-11])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_divergence_of_rows_near_and_far_apart(dtype, apart, temperature, rng):
    # in ULP of the result itself: its terms of both signs all but cancel where the rows are near
    for spread, offset in ((0.1, 0.0), (3.0, 0.0), (30.0, 1e4)):
        x = (offset + rng.normal(0, spread, (4, 50))).astype(dtype)
        y = (x + rng.normal(0, apart, x.shape)).astype(dtype)
        got = numbasoft.kl_divergence(x, y, temperature=temperature, reduction="none")
        exact = [(v, v) for v, _ in elements_oracle.kl_divergence(x, y, temperature)]
        assert elements_oracle.ulps(got, exact) < 4


@pytest.mark.parametrize("temperature", [1e-290, 1e-30, 1e-10])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_class_of_no_probability_counts_nothing_however_far_it_is(dtype, temperature):
    far = 0.9 * np.finfo(dtype).max
    for x, y, want in (
        ([far, 0], [0, 0], np.log(2)),
        ([far, 0, -far], [1, -far, 1], np.log(2)),
        ([far, 0], [far, -far], 0),
    ):
        got = numbasoft.kl_divergence(np.array(x, dtype), np.array(y, dtype), temperature=temperature)
        np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float32" else 1e-14)


def test_layouts_and_reproducibility(rng):
    x, t = rng.normal(0, 3, (60, 700)), rng.random((60, 700))
    for f in (numbasoft.sigmoid, lambda v: numbasoft.binary_cross_entropy(v, t, reduction="none")):
        wanted = f(x)
        for other in (np.asfortranarray(x), x.astype(">f8"), np.repeat(x, 2, 1)[:, ::2]):
            assert f(other).tobytes() == wanted.tobytes()
    assert numbasoft.binary_cross_entropy(x, t) == numbasoft.binary_cross_entropy(x.ravel(), t.ravel())
    place = x.copy()
    assert numbasoft.sigmoid(place, out=place) is place
    np.testing.assert_array_equal(place, numbasoft.sigmoid(x))
    columns = np.zeros((700, 60)).T
    np.testing.assert_array_equal(numbasoft.sigmoid(x, out=columns), place)
    assert numbasoft.binary_cross_entropy(x[:0], t[:0]) == 0
    assert numbasoft.sigmoid(3) == numbasoft.sigmoid(3.0)


BAD = {
    "target above 1": (("binary_cross_entropy", [0.0, 1.0], [0, 1.5]), {}, ValueError, "target is 1.5 at 1, but must be from 0 to 1"),
    "target NaN": (("binary_cross_entropy", [[0.0, 1.0]], [[np.nan, 1]]), {}, ValueError, r"target is nan at \(0, 0\)"),
    "target's shape": (("binary_cross_entropy", [0.0, 1.0], [0]), {}, ValueError, "target has shape"),
    "pos_weight": (("binary_cross_entropy", [0.0], [0]), dict(pos_weight=-1), ValueError, "pos_weight is -1"),
    "reduction": (("binary_cross_entropy", [0.0], [0]), dict(reduction="batchmean"), ValueError, "reduction is 'batchmean'"),
    "grad": (("binary_cross_entropy_backward", [1.0], [0.0], [0]), {}, ValueError, "grad has shape"),
    "complex": (("sigmoid", [1j]), {}, TypeError, "x has dtype complex128"),
    "out": (("sigmoid", [1.0]), dict(out=np.zeros(2)), ValueError, "out has shape"),
    "logit's out": (("logit", [1.0]), dict(out=np.zeros(1, "f4")), TypeError, "out has dtype"),
    "sigmoid's grad": (("sigmoid_backward", [1.0, 2.0], [1.0]), {}, ValueError, "grad has shape"),
    "q's shape": (("kl_divergence", [1.0], [1.0, 2.0]), {}, ValueError, "q_logits has shape"),
    "q's dtype": (("kl_divergence", np.zeros(2), np.zeros(2, "f4")), {}, TypeError, "q_logits has dtype"),
    "no classes": (("kl_divergence", np.zeros((2, 0)), np.zeros((2, 0))), {}, ValueError, "at least one class"),
    "temperature": (("kl_divergence", [0.0], [0.0]), dict(temperature=0), ValueError, "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    (name, *given), chosen, kind, message = BAD[case]
    with pytest.raises(kind, match=message) as caught:
        getattr(numbasoft, name)(*given, **chosen)
    assert "\n" not in str(caught.value)
