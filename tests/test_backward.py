"""The gradients are those of the forward passes: by autograd, by differences and by algebra."""

import numpy as np
import pytest
from oracle import DTYPES, rows_of
from samples import BACKWARD

import numbasoft

AXES = [-1, 0, 1, (0, 2), None]
TEMPERATURES = [1.0, 0.3, 7.0]
FORWARD_OF = {
    "softmax_backward": numbasoft.softmax,
    "log_softmax_backward": numbasoft.log_softmax,
    "logsumexp_backward": numbasoft.logsumexp,
}

by_name = pytest.mark.parametrize("name", BACKWARD)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_axis = pytest.mark.parametrize("axis", AXES, ids=str)
by_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def gradient(name, x, grad, axis, temperature=1.0):
    """d sum(grad * f(x)) / dx by the forward and the backward pass."""
    result = FORWARD_OF[name](x, axis, temperature=temperature)
    given = (grad, x, result) if name == "logsumexp_backward" else (grad, result)
    return getattr(numbasoft, name)(*given, axis, temperature=temperature)


@by_temperature
@by_axis
@by_name
def test_against_automatic_differentiation(name, axis, temperature, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed, whose autograd is the oracle here")
    x = rng.normal(0, 3, (4, 5, 6))
    result = FORWARD_OF[name](x, axis)
    grad = rng.standard_normal(np.shape(result))
    t = torch.tensor(x, requires_grad=True)
    axes = tuple(range(3)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    sums = torch.logsumexp(t / temperature, axes, keepdim=True)
    if name == "logsumexp_backward":
        output = sums.reshape(grad.shape)
    else:
        output = t / temperature - sums
        output = output.exp() if name == "softmax_backward" else output
    output.backward(torch.tensor(grad))
    np.testing.assert_allclose(
        gradient(name, x, grad, axis, temperature), t.grad.numpy(), rtol=1e-11, atol=1e-14
    )


@by_temperature
@by_axis
@by_name
def test_against_central_differences(name, axis, temperature, rng):
    # the tolerances of torch.autograd.gradcheck, tightened: the differences are good to about 1e-9
    x = rng.normal(0, 1.5, (2, 3, 4))
    forward = FORWARD_OF[name]
    grad = rng.standard_normal(np.shape(forward(x, axis)))
    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        up, down = (forward(x + s, axis, temperature=temperature) for s in (step, -step))
        numeric[index] = (grad * (up - down)).sum() / 2e-6
    got = gradient(name, x, grad, axis, temperature)
    np.testing.assert_allclose(got, numeric, rtol=1e-6, atol=1e-8)
    assert got.tobytes() == gradient(name, x, grad, axis, temperature).tobytes()


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_gradients_along_a_row_sum_to_zero(name, axis, rng):
    # both functions ignore a constant added to the row
    x = rng.normal(0, 3, (4, 5, 6))
    got = gradient(name, x, rng.standard_normal(x.shape), axis)
    assert abs(rows_of(got, axis)[0].sum(1)).max() < 1e-14


def test_the_gradient_of_logsumexp_is_softmax(rng):
    x = rng.normal(0, 3, (7, 50))
    got = numbasoft.logsumexp_backward(np.ones(7), x, numbasoft.logsumexp(x))
    np.testing.assert_allclose(got, numbasoft.softmax(x), rtol=1e-14)


def test_the_two_ways_through_the_logarithm_agree(rng):
    # d log(softmax) by the chain rule is d log_softmax
    x, grad = rng.normal(0, 3, (7, 50)), rng.standard_normal((7, 50))
    y = numbasoft.softmax(x)
    direct = numbasoft.log_softmax_backward(grad, numbasoft.log_softmax(x))
    np.testing.assert_allclose(direct, numbasoft.softmax_backward(grad / y, y), rtol=1e-9, atol=1e-12)


@by_name
def test_backward_is_linear_in_the_gradient(name, rng):
    x = rng.normal(0, 3, (5, 40))
    shape = np.shape(FORWARD_OF[name](x))
    a, b = rng.standard_normal(shape), rng.standard_normal(shape)
    both = gradient(name, x, 2 * a + b, -1)
    np.testing.assert_allclose(both, 2 * gradient(name, x, a, -1) + gradient(name, x, b, -1), atol=1e-14)
    # a power of two scales every step exactly
    assert gradient(name, x, 4 * a, -1).tobytes() == (4 * gradient(name, x, a, -1)).tobytes()
    assert not gradient(name, x, 0 * a, -1).any()


@pytest.mark.parametrize("masked", [0.3, 0.9])
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_forward_gives_a_masked_gradient(name, dtype, masked, rng):
    # and the others have the gradient of the shorter row, whatever stands in the gradient behind the mask
    x = rng.normal(0, 2, 30).astype(DTYPES[dtype])
    keep = rng.random(30) > masked
    keep[:2] = True
    grad = np.where(keep, rng.standard_normal(30), np.nan).astype(x.dtype)
    backward = getattr(numbasoft, name)
    result = FORWARD_OF[name](x, where=keep)
    got = backward(grad, result)
    assert (got[~keep] == 0).all()
    short = backward(grad[keep], FORWARD_OF[name](x[keep]))
    tolerance = 2.0 ** {"float64": -50, "float32": -21, "float16": -9, "bfloat16": -6}[dtype]
    np.testing.assert_allclose(got[keep].astype(float), short.astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_keeps_nothing_has_no_gradient(name, dtype):
    x = np.zeros((2, 5), DTYPES[dtype])
    where = np.array([[False], [True]])
    result = FORWARD_OF[name](x, where=where)
    got = getattr(numbasoft, name)(np.full(x.shape, [[np.nan], [1.0]]).astype(x.dtype), result)
    assert (got[0] == 0).all()
    assert abs(got[1].astype(float)).max() < 1e-2


def test_a_confident_prediction_still_learns():
    # d CE / dz at the target is -(sum of the others) / s: p - 1 would be 0 in float64 already at a gap of 40
    z = np.array([40.0, 0.0, -1.0])
    log_y = numbasoft.log_softmax(z)
    got = numbasoft.log_softmax_backward(np.array([-1.0, 0.0, 0.0]), log_y)
    others = np.exp(-40.0) + np.exp(-41.0)
    assert got[1:].sum() == pytest.approx(others, rel=1e-13)
    # the terms of the target's own sum are of size 1, so the contract allows 4 ULP of 1
    assert abs(got[0] + others) <= 4 * 2.0**-52


def test_plain_gradient_descent_on_soft_targets_reaches_them(rng):
    # forward and backward together, as a user has them: the loss falls to the entropy of the targets
    targets = rng.dirichlet(np.ones(6), 20)
    z = np.zeros((20, 6))
    for _ in range(600):
        z -= 2.0 * numbasoft.log_softmax_backward(-targets, numbasoft.log_softmax(z))
    np.testing.assert_allclose(numbasoft.softmax(z), targets, atol=2e-3)


# --- where one factor overflows, underflows or is NaN though the gradient is a number ------------------------

LARGEST = {"float32": 3e38, "float64": 1.7e308}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", LARGEST)
def test_softmax_backward_of_gradients_whose_difference_overflows(dtype, temperature):
    g = np.array([-LARGEST[dtype], LARGEST[dtype]], dtype)
    none = numbasoft.softmax_backward(g, np.array([1, 0], dtype), temperature=temperature)
    assert (none == 0).all()
    dx = numbasoft.softmax_backward(g, np.array([0.75, 0.25], dtype), temperature=temperature)
    expected = LARGEST[dtype] * 0.375 / temperature
    np.testing.assert_allclose(dx, [-expected, expected], rtol=1e-6)


def test_softmax_backward_of_subnormal_gradients_at_a_small_temperature():
    g, y = np.array([1e-45, 3e-45], np.float32), np.array([0.75, 0.25], np.float32)
    expected = y * (g.astype(float) - (g.astype(float) * y).sum()) / 1e-3
    np.testing.assert_allclose(numbasoft.softmax_backward(g, y, temperature=1e-3), expected, rtol=1e-2)


@by_dtype
@pytest.mark.parametrize("grad", [1.0, 2.0**40])
def test_logsumexp_backward_with_nan(dtype, grad):
    x = np.array([1, 2, np.nan], DTYPES[dtype])
    assert np.isnan(numbasoft.logsumexp_backward(grad, x, np.nan).astype(float)).all()
    payload = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]  # rounded as a number it would be -0
    x = np.array([1, 2, 3], DTYPES[dtype])
    for arguments in (payload, x, np.float32(3)), (np.float32(1), x, payload):
        assert np.isnan(numbasoft.logsumexp_backward(*arguments).astype(float)).all()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("grad", [1e-3, 1.0, 2.0**31, -1.0])
def test_logsumexp_backward_of_an_lse_that_is_too_small(dtype, grad):
    x = np.array([60, -np.inf, 39], dtype)
    dx = numbasoft.logsumexp_backward(grad, x, 0.0)
    assert dx[0] == np.copysign(np.inf, grad) and dx[1] == 0
    np.testing.assert_allclose(dx[2], grad * np.exp(39.0), rtol=1e-6)
    assert (numbasoft.logsumexp_backward(0.0, x, 0.0) == 0).all()


def test_logsumexp_backward_of_a_gradient_that_float32_cannot_hold():
    dx = numbasoft.logsumexp_backward(1e40, np.array([0, -90], np.float32), np.float32(0))
    np.testing.assert_allclose(dx, [np.inf, 1e40 * np.exp(-90.0)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, bool])
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_backward_of_small_integers(name, dtype):
    g, y = np.array([[1, 2]], dtype), np.array([[0, 1]], dtype)
    expected = getattr(numbasoft, name)(g.astype(float), y.astype(float))
    np.testing.assert_array_equal(getattr(numbasoft, name)(g, y), expected)
