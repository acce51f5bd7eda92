"""Properties of the cross-entropy, with examples drawn by hypothesis."""

import numpy as np
import pytest

import numbasoft
from numbasoft import cross_entropy, cross_entropy_value_and_grad

pytest.importorskip("hypothesis", reason="hypothesis is not installed, which draws the examples")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@settings(max_examples=100)
@given(st.data())
def test_cross_entropy(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=6))
    x = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(-700, 700)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    outer = tuple(np.delete(shape, axis).tolist())
    target = data.draw(hnp.arrays(np.int64, outer, elements=st.integers(-1, shape[axis] - 1)))
    smoothing = data.draw(st.sampled_from([0.0, 0.3]))
    chosen = dict(axis=axis, ignore_index=-1, label_smoothing=smoothing)
    loss, grad = cross_entropy_value_and_grad(x, target, reduction="none", **chosen)
    assert (loss >= 0).all() and np.isfinite(grad).all()
    assert not loss[target == -1].any()
    assert abs(grad.sum(axis)).max(initial=0) < 1e-14, "a constant added to a row changes nothing"
    log_p = numbasoft.log_softmax(x, axis=axis)
    own = np.take_along_axis(log_p, np.expand_dims(np.maximum(target, 0), axis), axis).squeeze(axis)
    wanted = np.where(target == -1, 0, -(1 - smoothing) * own - smoothing * log_p.mean(axis))
    np.testing.assert_allclose(loss, wanted, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(cross_entropy(x, target, reduction="sum", **chosen), loss.sum(), rtol=1e-13)
    kept = max(1, int((target != -1).sum()))
    np.testing.assert_allclose(cross_entropy(x, target, **chosen), loss.sum() / kept, rtol=1e-13)


ANY_FLOAT32 = st.one_of(st.floats(-30, 30, width=32), st.floats(width=32, allow_subnormal=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@settings(max_examples=100)
@given(st.data())
def test_short_rows_together_and_alone(data):
    n = data.draw(st.integers(1, 5))
    x = data.draw(hnp.arrays(np.float32, (9, n), elements=ANY_FLOAT32))
    target = data.draw(hnp.arrays(np.int64, 9, elements=st.integers(-1, n - 1)))
    grad = data.draw(hnp.arrays(np.float64, 9, elements=st.floats(allow_subnormal=True)))
    weight = data.draw(st.none() | hnp.arrays(np.float64, n, elements=st.floats(0, 1e30)))
    chosen = dict(
        weight=weight, ignore_index=-1, reduction="none", z_loss=data.draw(st.sampled_from([0.0, 0.5])),
        temperature=data.draw(st.sampled_from([1.0, 0.3, 1e-25, 1e28])),
    )  # fmt: skip
    together = (
        cross_entropy(x, target, **chosen), numbasoft.cross_entropy_backward(grad, x, target, **chosen)
    )  # fmt: skip
    for i in range(9):
        row, k, g = x[i : i + 1], target[i : i + 1], grad[i : i + 1]
        np.testing.assert_array_equal(together[0][i : i + 1], cross_entropy(row, k, **chosen))
        alone = numbasoft.cross_entropy_backward(g, row, k, **chosen)
        np.testing.assert_array_equal(together[1][i : i + 1], alone)
        signs = [np.signbit(dx) & ~np.isnan(dx) for dx in (together[1][i], alone[0])]
        np.testing.assert_array_equal(*signs)
