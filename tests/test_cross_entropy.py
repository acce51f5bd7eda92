"""Cross-entropy and its gradient: exact, as PyTorch and ONNX define them, and refusing what they cannot mean."""

import concurrent.futures
import itertools
import tracemalloc

import numba
import numpy as np
import onnx_nodes
import pytest
from losses_oracle import expected
from oracle import BFLOAT16, DTYPES, check
from samples import FAMILIES, sample

import numbasoft
from numbasoft import cross_entropy, cross_entropy_backward, cross_entropy_value_and_grad

VARIANTS = {
    "plain": {},
    "z_loss": {"z_loss": 1e-3},
    "temperature": {"temperature": 0.7},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-4},
}
# 16-bit types run the code of float32 but for how they load and store
OF_DTYPE = {
    "float32": list(VARIANTS),
    "float64": list(VARIANTS),
    "float16": ["plain"],
    "bfloat16": ["weighted and smoothed"],
}
CASES = [(d, v) for d, names in OF_DTYPE.items() for v in names]


def options(variant, classes, rng):
    chosen = dict(VARIANTS[variant])
    if "weight" in chosen:
        chosen["weight"] = rng.uniform(0, 2, classes)
    return chosen


def exact(x, target, **chosen):
    chosen["smoothing"] = chosen.pop("label_smoothing", 0.0)
    return expected(x, target, **chosen)


def classes_of(rng, x):
    """Classes for rows: drawn, and for every other row that of its largest logit."""
    target = rng.integers(x.shape[1], size=len(x))
    target[::2] = x[::2].astype("f8").argmax(1)
    return target


def distributions(rng, x):
    """Class probabilities: soft, all on one class, and all on the class of the largest logit."""
    n = x.shape[1]
    q = rng.dirichlet(np.full(n, 0.3), len(x))
    q[::3] = np.eye(n)[rng.integers(n, size=len(q[::3]))]
    q[1::3] = np.eye(n)[x[1::3].astype("f8").argmax(1)]
    return q.astype(x.dtype)


# --- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "variant"), CASES)
def test_class_indices_are_within_the_contract(dtype, variant, rng):
    for family, n in itertools.product(FAMILIES, (1, 2, 7, 130)):
        x = sample(family, rng, 24, n, dtype)
        target, chosen = classes_of(rng, x), options(variant, n, rng)
        loss, grad = cross_entropy_value_and_grad(x, target, reduction="none", **chosen)
        assert loss.dtype == grad.dtype == DTYPES[dtype]
        losses, gradients = exact(x, target, **chosen)
        limit = 0.51 if DTYPES[dtype].itemsize == 2 else 4
        check(loss, losses, limit, f"loss, {family} {n}")
        check(grad, gradients, 4, f"gradient, {family} {n}")
        if limit == 4:  # without the gradient 16 bits are only loaded in another way: see token_log_probs
            check(cross_entropy(x, target, reduction="none", **chosen), losses, limit, f"loss, {family} {n}")


@pytest.mark.parametrize(("dtype", "variant"), [("float32", "plain"), ("float64", "weighted and smoothed")])
def test_probabilities_are_within_the_contract(dtype, variant, rng):
    for family, n in itertools.product(FAMILIES, (1, 2, 130)):
        x = sample(family, rng, 24, n, dtype)
        target, chosen = distributions(rng, x), options(variant, n, rng)
        loss, grad = cross_entropy_value_and_grad(x, target, reduction="none", **chosen)
        losses, gradients = exact(x, target, **chosen)
        limit = 0.51 if DTYPES[dtype].itemsize == 2 else 4
        check(loss, losses, limit, f"loss, {family} {n}")
        check(grad, gradients, 4, f"gradient, {family} {n}")
        if dtype == "float64":
            check(cross_entropy(x, target, reduction="none", **chosen), losses, limit, f"loss, {family} {n}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_target_of_little_weight_is_not_what_the_others_leave(dtype, rng):
    x = sample("random", rng, 24, 7, dtype)
    target, weight = classes_of(rng, x), 10.0 ** -np.arange(7)
    weight[3] = 0
    for smoothing in 0.1, 1.0:
        chosen = dict(weight=weight, label_smoothing=smoothing)
        _, gradients = exact(x, target, **chosen)
        got = cross_entropy_backward(np.ones(24), x, target, reduction="none", **chosen)
        check(got, gradients, 4)
        lse = numbasoft.logsumexp(x)
        from_lse = cross_entropy_backward(np.ones(24), x, target, lse=lse, reduction="none", **chosen)
        np.testing.assert_allclose(from_lse, got, rtol=1e-3 if dtype == "float32" else 1e-12)


def test_long_rows_lose_nothing(rng):
    dtype = "float32"
    x = sample("random", rng, 3, 300_001, dtype)
    x[1, 7] = 60  # confident
    target = np.array([5, 7, 300_000])
    loss, grad = cross_entropy_value_and_grad(x, target, reduction="none")
    losses, gradients = exact(x, target)
    check(loss, losses, 2)
    check(grad, gradients, 4)


@pytest.mark.parametrize("g", [1e-300, 1e-42, 1e-30, 2.0**-16, 65536.0, 1e12, -3e30, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_any_size_are_passed_on(dtype, g, rng):
    x = sample("underflow", rng, 6, 40, dtype)
    x[0, 3] = -np.inf
    target = classes_of(rng, x)
    got = cross_entropy_backward(g, x, target, reduction="sum")
    _, gradients = exact(x, target, factor=(g, 1))
    check(got[:, 4:], gradients.map(lambda a: a[:, 4:]), 4)
    assert got[0, 3] == 0 and target[0] != 3


def test_an_infinite_gradient_passes_no_class_that_is_ruled_out():
    x, target = np.array([[0.0, -np.inf, 1.0]]), [0]
    for lse in (None, numbasoft.logsumexp(x)):
        got = cross_entropy_backward(np.inf, x, target, lse=lse)
        np.testing.assert_array_equal(got, [[-np.inf, 0, np.inf]])


@pytest.mark.parametrize("target", [np.array([0]), np.float32([[1, 0]])], ids=["class", "probabilities"])
def test_what_is_ruled_out_is_nothing_in_any_gradient(target):
    x = np.array([[4.0, -np.inf]], np.float32)
    assert (cross_entropy_backward(1e20, x, target) == 0).all()


@pytest.mark.parametrize("target", [np.array([0]), np.eye(1, 40)], ids=["class", "probabilities"])
def test_what_is_ruled_out_is_not_among_the_others(target):
    x = np.full((1, 40), -np.inf, np.float32)
    x[0, :2] = 4, -116
    target, weight, p = target.astype(target.dtype.kind + "4"), np.full(40, 1e30), np.exp(-120.0)
    got = cross_entropy_backward(weight[:1], x, target, reduction="none")
    np.testing.assert_allclose(got[0, :2], weight[0] * np.array([-p, p]), rtol=1e-6)
    losses = [
        cross_entropy(x, target, weight=weight, reduction="none"),
        cross_entropy_value_and_grad(x, target, weight=weight, reduction="none")[0],
    ]
    np.testing.assert_allclose(losses, weight[0] * p, rtol=1e-6)


def test_a_small_weight_brings_back_what_overflows():
    x = np.array([[1e308, -1e308]])
    loss = cross_entropy(x, [1], weight=[1, 1e-20], temperature=1e-4, reduction="none")
    np.testing.assert_allclose(loss, [2e292], rtol=1e-15)


def test_a_confident_row_has_a_gradient():
    x = np.array([[60.0, 0.0, 0.0]])
    for target in (0, [1.0, 0.0, 0.0]):
        loss, grad = cross_entropy_value_and_grad(x, np.array([target]), reduction="none")
        np.testing.assert_allclose(loss, 2 * np.exp(-60.0), rtol=1e-15)
        np.testing.assert_allclose(grad, [[-2 * np.exp(-60.0), np.exp(-60.0), np.exp(-60.0)]], rtol=1e-15)


def test_the_worked_examples():
    z = np.array([55.8906, -114.5621, 6.3440, -30.2473, -44.1440], np.float32)
    assert cross_entropy(z, 2) == pytest.approx(49.5466, abs=1e-4)
    assert cross_entropy(z, 2, temperature=10) == pytest.approx(4.9619, abs=1e-4)
    x = np.log(np.full(1000, 0.01 / 999))
    x[3] = np.log(0.99)
    assert cross_entropy(x, 3) == pytest.approx(0.010, abs=1e-3)
    assert cross_entropy(x, 3, label_smoothing=0.1) == pytest.approx(1.159, abs=1e-3)


# --- reductions and shapes, against PyTorch ----------------------------------------------------------------

REDUCTIONS = ["none", "mean", "sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_pytorch(weighted, smoothing, reduction, rng):
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed, whose semantics are the oracle here"
    )
    for shape, soft in itertools.product([(5,), (6, 5), (6, 5, 3), (2, 5, 3, 4)], [False, True]):
        axis = 0 if len(shape) == 1 else 1
        x = rng.normal(0, 3, shape)
        outer = shape[:axis] + shape[axis + 1 :]
        weight = rng.uniform(0.1, 2, 5) if weighted else None
        if soft:
            target = numbasoft.softmax(rng.normal(0, 2, shape), axis=axis)
        else:
            target = rng.integers(5, size=outer)
            if len(shape) > 1:
                target[0] = -100
        tensor = torch.tensor(x, requires_grad=True)
        theirs = torch.nn.functional.cross_entropy(
            tensor, torch.tensor(target), None if weight is None else torch.tensor(weight),
            reduction=reduction, label_smoothing=smoothing,
        )  # fmt: skip
        g = rng.normal(size=theirs.shape)
        theirs.backward(torch.tensor(g))
        chosen = dict(axis=axis, weight=weight, label_smoothing=smoothing, reduction=reduction)
        loss, grad = cross_entropy_value_and_grad(x, target, **chosen)
        np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-13)
        np.testing.assert_allclose(
            cross_entropy_backward(g, x, target, **chosen), tensor.grad.numpy(), rtol=1e-11, atol=1e-15
        )
        ones = np.ones_like(g)
        np.testing.assert_array_equal(cross_entropy_backward(ones, x, target, **chosen), grad)


def test_the_onnx_node_tests():
    onnx = pytest.importorskip("onnx", reason="onnx is not installed, whose node tests are the oracle here")
    cases = onnx_nodes.cases("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
    assert len(cases) > 40
    for case in cases:
        (node,) = case.model.graph.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        chosen = {"reduction": attributes.get("reduction", b"mean").decode()}
        if "ignore_index" in attributes:
            chosen["ignore_index"] = attributes["ignore_index"]
        function = cross_entropy if node.op_type == "SoftmaxCrossEntropyLoss" else numbasoft.nll_loss
        for given, wanted in case.data_sets:
            loss = function(given[0], given[1], axis=1, weight=given[2] if len(given) > 2 else None, **chosen)
            np.testing.assert_allclose(loss, wanted[0], rtol=1e-3, atol=1e-7, err_msg=case.name)
            if len(wanted) > 1:
                log_p = numbasoft.log_softmax(given[0], axis=1)
                np.testing.assert_allclose(log_p, wanted[1], rtol=1e-3, atol=1e-7, err_msg=case.name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_loss_is_the_rest_of_cross_entropy(reduction, rng):
    x = rng.normal(0, 3, (6, 5, 3))
    target, weight = rng.integers(5, size=(6, 3)), rng.uniform(0, 2, 5)
    target[2] = 9
    chosen = dict(axis=1, weight=weight, ignore_index=9, reduction=reduction)
    log_p = numbasoft.log_softmax(x, axis=1)
    loss = numbasoft.nll_loss(log_p, target, **chosen)
    np.testing.assert_allclose(loss, cross_entropy(x, target, **chosen), rtol=1e-13)
    g = rng.normal(size=np.shape(loss))
    through = numbasoft.log_softmax_backward(
        numbasoft.nll_loss_backward(g, log_p, target, **chosen), log_p, axis=1
    )
    np.testing.assert_allclose(
        through, cross_entropy_backward(g, x, target, **chosen), rtol=1e-10, atol=1e-15
    )


def test_central_differences(rng):
    x, target = rng.normal(0, 1.5, (3, 4)), np.array([1, -100, 3])
    chosen = dict(label_smoothing=0.1, z_loss=0.01, temperature=0.8, weight=[1.0, 2.0, 0.5, 1.5])
    for t in (target, numbasoft.softmax(rng.normal(size=(3, 4)))):
        _, grad = cross_entropy_value_and_grad(x, t, **chosen)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-6
            slope = (cross_entropy(x + step, t, **chosen) - cross_entropy(x - step, t, **chosen)) / 2e-6
            assert grad[index] == pytest.approx(slope, abs=1e-8)


def test_the_mean_of_z_loss_is_over_rows(rng):
    x, weight = rng.normal(0, 3, (5, 4)), np.array([0.5, 2.0, 1.0, 0.1])
    target = np.array([0, 1, -100, 3, 2])
    plain = cross_entropy(x, target, weight=weight)
    square = np.square(numbasoft.logsumexp(x))[target >= 0].mean()
    np.testing.assert_allclose(
        cross_entropy(x, target, weight=weight, z_loss=0.1), plain + 0.1 * square, rtol=1e-14
    )


# --- what does not count -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ignored_rows_are_zero_whatever_they_hold(dtype, rng):
    x = rng.normal(0, 3, (4, 50)).astype(DTYPES[dtype])
    target = np.array([3, 2**40, 7, 2**40])
    x[1], x[3] = np.nan, np.inf
    for reduction in REDUCTIONS:
        chosen = dict(ignore_index=2**40, reduction=reduction)
        loss, grad = cross_entropy_value_and_grad(x, target, **chosen)
        kept, kept_grad = cross_entropy_value_and_grad(x[::2], target[::2], **chosen)
        assert not grad[1::2].any()
        np.testing.assert_array_equal(grad[::2], kept_grad)
        np.testing.assert_array_equal(np.asarray(loss)[::2] if reduction == "none" else loss, kept)
        from_lse = cross_entropy_backward(np.ones_like(loss), x, target, lse=numbasoft.logsumexp(x), **chosen)
        assert not from_lse[1::2].any()


@pytest.mark.parametrize("function", [cross_entropy, numbasoft.nll_loss])
def test_a_mean_of_nothing_is_zero(function):
    x = np.full((3, 4), np.nan)
    assert function(x, [-100] * 3) == 0
    assert function(x[:0], np.zeros(0, int)) == 0
    assert function(np.zeros((3, 4)), [1, 1, 1], weight=[1, 0, 1, 1]) == 0
    assert function(x[:0], np.zeros(0, int), reduction="none").shape == (0,)
    if function is cross_entropy:
        for target in ([-100] * 3, [1, 1, 1]):
            loss, grad = cross_entropy_value_and_grad(np.zeros((3, 4)), target, weight=[1, 0, 1, 1])
            assert loss == 0 and not grad.any()
        assert cross_entropy(np.zeros((0, 4)), np.zeros((0, 4))) == 0
    assert numbasoft.perplexity(x, [-100] * 3) == 1


def test_special_values():
    inf = np.inf
    x = np.array([[0, -inf, 1], [0, inf, 1], [-inf] * 3, [0, np.nan, 1], [5, -inf, -inf]], np.float32)
    loss, grad = cross_entropy_value_and_grad(x, [2, 1, 0, 0, 0], reduction="none")
    np.testing.assert_allclose(loss, [0.31326169, np.nan, np.nan, np.nan, 0], rtol=1e-6)
    assert grad[0, 1] == 0 and np.isnan(grad[1:4]).all() and not grad[4].any()
    loss, grad = cross_entropy_value_and_grad(x[:1], [1], reduction="none")
    assert loss == inf
    np.testing.assert_allclose(grad, [[0.26894142, -1, 0.73105858]], rtol=1e-6)
    # an infinite distance hides no NaN
    assert np.isnan(cross_entropy(x[1:2], [2]))
    far = np.array([[1e308, -1e308, np.nan]])
    assert np.isnan(cross_entropy(far, [1], temperature=1e-4))
    # a class that is out of reach and not wanted does not count
    loss, grad = cross_entropy_value_and_grad(x[:1], np.float32([[0, 0, 1]]))
    assert loss == np.float32(0.31326169) and grad[0, 1] == 0
    assert cross_entropy(x[:1], [2], label_smoothing=0.1) == inf
    assert cross_entropy(x[:1], [2], label_smoothing=0.1, weight=[1, 0, 1]) < 1


# --- the saved log-sum-exp ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_from_a_saved_lse(dtype, rng):
    x = sample("random", rng, 9, 300, dtype)
    x[1, 4] = 40  # confident
    target = rng.integers(300, size=9)
    target[1], target[5] = 4, -100
    for chosen in ({}, dict(label_smoothing=0.1, z_loss=1e-3, temperature=1.5))[
        : 1 if dtype == "float32" else 2
    ]:
        lse = numbasoft.logsumexp(x, temperature=chosen.get("temperature", 1.0))
        got = cross_entropy_backward(2.0, x, target, lse=lse, **chosen)
        wanted = cross_entropy_backward(2.0, x, target, **chosen)
        tolerance = 40 * np.finfo(dtype).eps  # half of lse in ULP
        np.testing.assert_allclose(got.astype("f8"), wanted.astype("f8"), rtol=tolerance, atol=1e-9)
        assert got[1, 4] < 0 or chosen
        np.testing.assert_array_equal(
            got, cross_entropy_backward(2.0, x, target, lse=lse[:, None], out=x.copy(), **chosen)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 16, 17, 31, 40, 75])
def test_the_gradient_from_a_saved_lse_whichever_class_is_the_target(dtype, n, rng):
    """At the target's class it is what the others hold, wherever in a vector that is and however little."""
    target = np.arange(n)
    for top in 0, 30:
        x = rng.normal(0, 2, (n, n)) + top * np.eye(n)
        x[1::3, 0] = -np.inf
        x = x.astype(DTYPES[dtype])
        x[target, target] = np.where(np.isinf(x[target, target].astype("f8")), 0, x[target, target])
        lse = numbasoft.logsumexp(x.astype("f8")).astype("f4" if dtype != "float64" else "f8")
        p = np.exp(x.astype("f8").astype(np.longdouble) - lse[:, None])
        others = np.where(np.eye(n, dtype=bool), 0, p).sum(axis=1)
        for g in 1.0, -3.0, 100.0 if dtype == "float16" else 1e12:
            got = cross_entropy_backward(np.full(n, g), x, target, lse=lse, reduction="none").astype("f8")
            wanted = p.copy()
            wanted[target, target] = -others if top else p[target, target] - 1
            wanted *= g
            eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[dtype]
            least = 2.0**-24 if dtype == "float16" else 1e-40  # beside p - 1, and the smallest float16
            np.testing.assert_allclose(
                got, wanted.astype("f8"), rtol=4 * eps, atol=least if top else 4 * eps * abs(g)
            )
            assert not got[np.isinf(x.astype("f8"))].any()


def test_a_saved_lse_of_one_class_alone_leaves_no_gradient():
    for dtype in "float32", "float64":
        x = np.full((20, 20), -np.inf, dtype)
        np.fill_diagonal(x, 3)
        got = cross_entropy_backward(1.0, x, np.arange(20), lse=np.full(20, 3.0), reduction="sum")
        assert not got.any() and not np.signbit(got[~np.eye(20, dtype=bool)]).any()


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [("float32", 1e-30), ("float32", 1e-28), ("float32", 1e-25), ("float64", 1e-29), ("float64", 1e-100)],
)
def test_far_classes_get_no_gradient_from_a_saved_lse_at_tiny_temperatures(dtype, temperature, rng):
    # the shift of such a row is rounded to whole powers of two: 0 times infinity must not come of it
    x = rng.normal(0, 5, (200, 20)).astype(dtype)
    x[:, 5] = -np.inf
    lse = numbasoft.logsumexp(x, temperature=temperature)
    grad = np.ones(200, dtype)
    dx = numbasoft.cross_entropy_backward(
        grad, x, x.argmax(axis=1), lse=lse, temperature=temperature, reduction="none"
    )
    assert not dx[x < x.max(axis=1, keepdims=True)].any()


def test_an_lse_of_something_else_gives_no_plausible_number():
    x = np.array([[0.0, 1.0, 2.0]])
    for lse in (-1e5, np.nan, np.inf, -np.inf):
        grad = cross_entropy_backward(1.0, x, [0], lse=[lse])
        assert not np.isfinite(grad).any(), (lse, grad)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_lse_too_small_for_huge_logits_gives_no_plausible_number(dtype, temperature):
    """By how many powers of two is exact, however far apart the numbers next to such a logit are."""
    for base in (1e5, 1e7, 1e8, 1e9, 3e9, 1e12, 1e15, 1e17, -1e9, -1e17):
        step = max(3.0, float(np.spacing(np.asarray(abs(base), dtype))))
        lse = np.array([base / temperature], dtype)
        for j in range(1, 40):
            x = np.array([[base + step * j, base, base]], dtype)
            if (float(x[0, 0]) - float(lse[0]) * temperature) / temperature > 45:
                grad = cross_entropy_backward(1.0, x, [1], lse=lse, temperature=temperature)
                assert not np.isfinite(grad[0, 0]), (base, j, grad)


# --- reproducibility and layouts ---------------------------------------------------------------------------


def layouts(x):
    """The same values elsewhere in memory."""
    yield "Fortran", np.asfortranarray(x)
    wide = np.zeros((x.shape[0], 2 * x.shape[1]), x.dtype)
    wide[:, ::2] = x
    yield "strided", wide[:, ::2]
    yield "reversed", x[::-1, ::-1].copy()[::-1, ::-1]
    yield "byte-swapped", x.astype(x.dtype.newbyteorder())
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    yield "unaligned", unaligned


def test_bits_depend_on_the_row_alone(rng):
    x = rng.normal(0, 3, (70, 1037)).astype("f4")
    target = classes_of(rng, x)
    chosen = dict(reduction="none")
    loss, grad = cross_entropy_value_and_grad(x, target, **chosen)
    for name, other in layouts(x):
        got = cross_entropy_value_and_grad(other, target, **chosen)
        assert got[0].tobytes() == loss.tobytes() and got[1].tobytes() == grad.tobytes(), name
    for i in (0, 13, 69):
        alone = cross_entropy_value_and_grad(x[i], target[i], **chosen)
        assert alone[0] == loss[i] and alone[1].tobytes() == grad[i].tobytes()
    columns = cross_entropy_value_and_grad(x.T.copy(), target, axis=0, **chosen)
    assert columns[0].tobytes() == loss.tobytes() and columns[1].T.tobytes() == grad.tobytes()
    before = numba.get_num_threads()
    try:
        for threads in (1, before):
            numba.set_num_threads(threads)
            got = cross_entropy_value_and_grad(x, target)
            assert got[0] == cross_entropy(x, target)
            if threads == 1:
                mean = got
            assert got[0] == mean[0] and got[1].tobytes() == mean[1].tobytes()
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_gradient_may_overwrite_the_logits(axis, rng):
    x = rng.normal(0, 3, (40, 40)).astype("f4")
    for target in (rng.integers(40, size=40), numbasoft.softmax(rng.normal(size=(40, 40)), axis=axis)):
        loss, grad = cross_entropy_value_and_grad(x, target, axis=axis)
        place = x.copy()
        again, result = cross_entropy_value_and_grad(place, target, axis=axis, out=place)
        assert result is place and again == loss
        assert place.tobytes() == grad.tobytes()


def test_the_gradient_may_overwrite_the_logits_on_many_threads(rng):
    x, target = rng.normal(0, 3, (41, 1001)).astype("f4"), rng.integers(1001, size=41)
    _, grad = cross_entropy_value_and_grad(x, target)
    cross_entropy_value_and_grad(x, target, out=x)
    assert x.tobytes() == grad.tobytes()


@pytest.mark.parametrize("kind", ["last axis", "first axis"])
def test_there_is_no_temporary_of_the_logits_size(kind, rng):
    axis = -1 if kind == "last axis" else 0
    x, target = rng.normal(0, 3, (2500, 2500)).astype("f4"), rng.integers(2500, size=2500)
    out = np.zeros_like(x)
    cross_entropy_value_and_grad(x, target, axis=axis, out=out)
    tracemalloc.start()
    cross_entropy_value_and_grad(x, target, axis=axis, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 5  # blocks of a fixed size


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u8"])
def test_classes_of_any_integer_type(dtype, rng):
    x = rng.normal(0, 3, (20, 100))
    target = rng.integers(100, size=20)
    assert cross_entropy(x, target.astype(dtype)) == cross_entropy(x, target)
    assert cross_entropy(x, np.repeat(target, 2).astype(dtype)[::2]) == cross_entropy(x, target)
    # the class of pixels that no class fits, in images of small integers
    target[::3] = 127
    wanted = cross_entropy(x[target != 127], target[target != 127])
    assert cross_entropy(x, target.astype(dtype), ignore_index=127) == wanted


def test_many_threads_of_python_at_once(rng):
    x, target = rng.normal(0, 3, (64, 1000)).astype("f4"), rng.integers(1000, size=64)
    wanted = cross_entropy_value_and_grad(x, target)

    def call(_):
        return cross_entropy_value_and_grad(x, target)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for loss, grad in pool.map(call, range(200)):
            assert loss == wanted[0] and grad.tobytes() == wanted[1].tobytes()


def test_probabilities_of_another_dtype_are_computed_in_the_wider(rng):
    x = rng.normal(0, 3, (20, 30)).astype("f4")
    q = numbasoft.softmax(rng.normal(0, 3, (20, 30)))
    loss, grad = cross_entropy_value_and_grad(x, q)
    wide, wide_grad = cross_entropy_value_and_grad(x.astype("f8"), q)
    assert loss.dtype == grad.dtype == np.float32
    assert loss == np.float32(wide)
    np.testing.assert_array_equal(grad, wide_grad.astype("f4"))
    half = cross_entropy(x.astype(BFLOAT16), q.astype("f2").astype("f4").astype("f2"))
    assert half.dtype == BFLOAT16 and abs(float(half) - float(loss)) < 0.02


# --- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_token_log_probs_are_log_softmax_at_the_tokens(dtype, rng):
    x = sample("random", rng, 12, 1000, dtype)
    ids = classes_of(rng, x)
    for temperature in (1.0, 0.6):
        got = numbasoft.token_log_probs(x.reshape(3, 4, 1000), ids.reshape(3, 4), temperature=temperature)
        assert got.shape == (3, 4) and got.dtype == x.dtype
        losses, _ = exact(x, ids, temperature=temperature)
        check(-got.ravel(), losses, 0.51 if dtype == "bfloat16" else 4)
    perplexity = np.exp(cross_entropy(x.astype("f8"), ids))
    assert numbasoft.perplexity(x, ids) == pytest.approx(float(perplexity), rel=1e-6)
    x, ids = x.reshape(3, 4, 1000), ids.reshape(3, 4)
    with pytest.raises(ValueError, match=r"^ids is -100 at \(0, 1\), but must be from 0 to 999$"):
        numbasoft.token_log_probs(x, np.where(np.arange(4) == 1, -100, ids))


# --- bad input ---------------------------------------------------------------------------------------------

X, T = np.zeros((3, 4)), np.array([0, 1, 2])
BAD = {
    "class too large": (([0, 4, 9],), {}, ValueError, "target is 4 at 1, but must be from 0 to 3, or ignore_index=-100"),
    "class negative": (([0, 1, -1],), {}, ValueError, "target is -1 at 2"),
    "class huge": ((np.array([2**63 + 5, 0, 0], np.uint64),), {}, ValueError, "target is 9223372036854775813 at 0"),
    "not the ignored class": (([0, -100, 2],), dict(ignore_index=3), ValueError, "target is -100 at 1"),
    "bool": (([True, False, True],), {}, TypeError, "target has dtype bool"),
    "float classes": (([0.0, 1.0, 2.0],), {}, TypeError, "target has dtype float64, but must hold integers"),
    "complex": ((np.zeros((3, 4), complex),), {}, TypeError, "target has dtype complex128"),
    "text": ((["a", "b", "c"],), {}, TypeError, "target has dtype"),
    "integers of the logits' shape": ((np.zeros((3, 4), int),), {}, ValueError, r"target has shape \(3, 4\), but must have shape \(3,\)"),
    "too few classes": (([0, 1],), {}, ValueError, r"target has shape \(2,\)"),
    "probabilities of another shape": ((np.full((3, 5), 0.2),), {}, ValueError, r"target has shape \(3, 5\)"),
    "negative probability": (([[0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [1, 0, 0, 0]],), {}, ValueError, "target holds -0.5 in row 1"),
    "no sum of 1": (([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.5, 0, 0, 0]],), {}, ValueError, "target sums to 0.5 in row 2"),
    "NaN probability": ((np.full((3, 4), np.nan),), {}, ValueError, "target sums to nan in row 0"),
    "weight of wrong length": ((T,), dict(weight=[1, 2, 3]), ValueError, r"weight has shape \(3,\), but must have shape \(4,\)"),
    "negative weight": ((T,), dict(weight=[1, 2, -3, 0]), ValueError, "weight is -3.0 at 2"),
    "NaN weight": ((T,), dict(weight=[1, np.nan, 3, 0]), ValueError, "weight is nan at 1"),
    "text weight": ((T,), dict(weight=list("abcd")), TypeError, "weight has dtype"),
    "smoothing above 1": ((T,), dict(label_smoothing=1.1), ValueError, "label_smoothing is 1.1, but must be a number from 0 to 1"),
    "smoothing below 0": ((T,), dict(label_smoothing=-0.1), ValueError, "label_smoothing is -0.1"),
    "smoothing NaN": ((T,), dict(label_smoothing=np.nan), ValueError, "label_smoothing is nan"),
    "smoothing text": ((T,), dict(label_smoothing="0.1"), TypeError, "label_smoothing is '0.1'"),
    "smoothing array": ((T,), dict(label_smoothing=np.zeros(2)), TypeError, "label_smoothing is an array"),
    "z_loss negative": ((T,), dict(z_loss=-1), ValueError, "z_loss is -1, but must be a finite number that is not negative"),
    "z_loss infinite": ((T,), dict(z_loss=10**400), ValueError, "z_loss is something long of type int"),
    "temperature 0": ((T,), dict(temperature=0), ValueError, "temperature is 0"),
    "reduction": ((T,), dict(reduction="avg"), ValueError, "reduction is 'avg', but must be 'none', 'mean' or 'sum'"),
    "reduction None": ((T,), dict(reduction=None), TypeError, "reduction is None"),
    "ignore_index": ((T,), dict(ignore_index=1.5), TypeError, "ignore_index is 1.5, but must be an int"),
    "ignore_index None": ((T,), dict(ignore_index=None), TypeError, "ignore_index is None"),
    "axis": ((T,), dict(axis=2), np.exceptions.AxisError, "axis 2 is out of bounds"),
    "axes": ((T,), dict(axis=(0, 1)), TypeError, "axis is .0, 1., but must be one int"),
    "axis None": ((T,), dict(axis=None), TypeError, "axis is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    (target,), chosen, kind, message = BAD[case]
    out = np.full(X.shape, 7.0)
    for function, more in (
        (cross_entropy, {}),
        (cross_entropy_value_and_grad, {"out": out}),
        (lambda x, t, **o: cross_entropy_backward(1.0, x, t, **o), {"out": out}),
    ):
        with pytest.raises(kind, match=message) as caught:
            function(X, target, **chosen, **more)
        assert "\n" not in str(caught.value)
    assert (out == 7).all()


def test_bad_logits():
    for x, kind, message in (
        (
            np.zeros((3, 0)),
            ValueError,
            r"logits has shape \(3, 0\), but must have at least one class along axis 1",
        ),
        (np.zeros((0, 0)), ValueError, "logits has shape"),
        (np.float64(1), ValueError, "logits is a single number"),
        (np.zeros((3, 4), complex), TypeError, "logits has dtype complex128"),
        (np.ma.masked_array(X), TypeError, "logits is a masked array"),
    ):
        with pytest.raises(kind, match=message):
            cross_entropy(x, T)


def test_bad_outputs_and_gradients():
    target, q = T.copy(), np.full((3, 4), 0.25)
    for out, t, kind, message in (
        (np.zeros((3, 5)), target, ValueError, "out has shape"),
        (np.zeros((3, 4), "f4"), target, TypeError, "out has dtype float32"),
        (np.broadcast_to(0.0, (3, 4)), target, ValueError, "out is read-only"),
        (q, q, ValueError, "out shares memory with target, but must not"),
        ([1.0], target, TypeError, "out is a list"),
    ):
        with pytest.raises(kind, match=message):
            cross_entropy_value_and_grad(X, t, out=out)
    both = np.zeros((4, 4))
    with pytest.raises(ValueError, match="out overlaps logits"):
        cross_entropy_value_and_grad(both[:3], target, out=both[1:])
    with pytest.raises(
        ValueError, match=r"grad has shape \(3,\), but must be one number for reduction 'mean'"
    ):
        cross_entropy_backward(np.ones(3), X, target)
    with pytest.raises(ValueError, match="grad has shape"):
        cross_entropy_backward(1.0, X, target, reduction="none")
    with pytest.raises(ValueError, match="lse has shape"):
        cross_entropy_backward(1.0, X, target, lse=np.ones(4))
    assert (q == 0.25).all()
