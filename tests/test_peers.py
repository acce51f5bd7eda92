"""Agreement with the libraries that users come from, within those libraries' own errors."""

import numpy as np
import onnx_nodes
import pytest
from oracle import DTYPES
from samples import BACKWARD, FORWARD

import numbasoft

AXES = [-1, 0, 1, (1, 2), None]
by_axis = pytest.mark.parametrize("axis", AXES, ids=str)

# What the peers themselves are off by, tens of ULP; numbasoft's own bounds are in test_accuracy.py.
TOLERANCE = {
    "float16": {"rtol": 4e-3, "atol": 1e-4},
    "bfloat16": {"rtol": 3e-2, "atol": 1e-2},
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    "float64": {"rtol": 1e-13, "atol": 1e-14},
}


@by_axis
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORWARD)
def test_scipy(name, dtype, axis, rng):
    special = pytest.importorskip("scipy.special", reason="SciPy is not installed")
    x = rng.normal(0, 3, (4, 5, 60)).astype(dtype)
    want = getattr(special, name)(x, axis=axis)
    np.testing.assert_allclose(getattr(numbasoft, name)(x, axis), want, **TOLERANCE[dtype])


def test_scipy_on_special_rows():
    special = pytest.importorskip("scipy.special", reason="SciPy is not installed")
    rows = np.array(
        [[1.0, -np.inf, 2.0], [-np.inf] * 3, [np.nan, 1, 2], [np.inf, 1, 2], [700, 710, 1e4], [-1e4, -1e4, 0]]
    )
    with np.errstate(all="ignore"):
        for name in FORWARD:
            # beside +inf SciPy's log_softmax gives NaN and -inf, here the whole row is NaN
            x = np.delete(rows, 3, 0) if name == "log_softmax" else rows
            np.testing.assert_allclose(
                getattr(numbasoft, name)(x), getattr(special, name)(x, axis=-1), rtol=1e-14
            )


@by_axis
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORWARD)
def test_torch(name, dtype, axis, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if name != "logsumexp" and not isinstance(axis, int):
        axis = {None: 0, (1, 2): -2}[axis]  # torch.softmax takes one dimension
    x = rng.normal(0, 3, (4, 5, 60)).astype(DTYPES[dtype])
    tensor = torch.tensor(x.astype(np.float32 if dtype == "bfloat16" else dtype)).to(getattr(torch, dtype))
    want = getattr(torch, name)(tensor, tuple(range(3)) if axis is None else axis)
    got = getattr(numbasoft, name)(x, axis)
    np.testing.assert_allclose(got.astype(np.float64), want.double().numpy(), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BACKWARD)
def test_torch_backward(name, dtype, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = rng.normal(0, 3, (7, 60)).astype(dtype)
    tensor = torch.tensor(x, requires_grad=True)
    output = getattr(torch, name.removesuffix("_backward"))(tensor, -1)
    grad = rng.standard_normal(tuple(output.shape)).astype(dtype)
    output.backward(torch.tensor(grad))
    result = getattr(numbasoft, name.removesuffix("_backward"))(x)
    given = (grad, x, result) if name == "logsumexp_backward" else (grad, result)
    np.testing.assert_allclose(getattr(numbasoft, name)(*given), tensor.grad.numpy(), **TOLERANCE[dtype])


def test_onnx_nodes():
    pytest.importorskip("onnx", reason="onnx is not installed, whose node tests are the data")
    cases = onnx_nodes.cases("Softmax", "LogSoftmax")
    for kind in "test_softmax", "test_logsoftmax":
        assert sum(case.name.startswith(kind) for case in cases) >= 7
    for case in cases:
        (node,) = case.model.graph.node
        function = {"Softmax": numbasoft.softmax, "LogSoftmax": numbasoft.log_softmax}[node.op_type]
        axis = {a.name: a.i for a in node.attribute}.get("axis", -1)
        assert case.data_sets
        for (x,), (want,) in case.data_sets:
            np.testing.assert_allclose(function(x, axis), want, rtol=1e-6, atol=1e-7, err_msg=case.name)
