"""Losses over classes in Numba's CUDA simulator: tests/test_cuda.py runs this as it runs simulated.py."""

import numpy as np
import pytest
from losses_oracle import expected, plain_cross_entropy
from oracle import BFLOAT16, DTYPES, check
from samples import FAMILIES, sample
from simulated import clear, few_columns, forget, here, one_thread, there  # noqa: F401

import numbasoft
from numbasoft.cuda import calls, class_losses, classes, copies, geometry, operations, split, totals
from numbasoft.ops.cross_entropy import cuda as kernels

nan, inf = np.nan, np.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
IN_16_BITS = "float16", "bfloat16"
by_dtype = pytest.mark.parametrize("dtype", DTYPES)

VARIANTS = {
    "plain": {},
    "z_loss": {"z_loss": 1e-3},
    "temperature": {"temperature": 0.7},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-4},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two threads, and two columns side by side, in the blocks that have a fixed number of either."""
    few_columns(monkeypatch)
    monkeypatch.setattr(geometry, "TOTAL_THREADS", 2)
    for module in totals, classes, kernels:
        monkeypatch.setattr(module, "THREADS", 2)
    forget()
    yield
    forget()


@pytest.fixture
def few_threads(small_blocks, one_thread):  # noqa: F811
    """Whole rows for single threads besides."""


def in_segments(patch, threads):
    """Rows in segments of two vectors, done by so many threads; to be followed by ``renew``."""
    patch.setattr(geometry, "SEGMENT_THREADS", threads)
    patch.setattr(geometry, "rows_launch", lambda *a, **o: None)
    for module in geometry, split, kernels:
        patch.setattr(module, "segment_length", lambda storage: 2 * geometry.lanes(storage))
    renew()


def renew():
    clear(split, kernels)


def run(name, *arrays, **options):
    given = [there(a) if isinstance(a, np.ndarray) else a for a in arrays]
    options = {k: there(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    result = getattr(numbasoft, name)(*given, **options)
    return tuple(map(here, result)) if isinstance(result, tuple) else here(result)


def options_of(variant, classes, rng):
    chosen = dict(VARIANTS[variant])
    if "weight" in chosen:
        chosen["weight"] = rng.uniform(0, 2, classes)
    return chosen


def exact(x, target, **chosen):
    chosen["smoothing"] = chosen.pop("label_smoothing", 0.0)
    return expected(x, target, **chosen)


def classes_for(rng, x):
    """Classes for rows: drawn, and for every other row that of its largest logit."""
    target = rng.integers(x.shape[1], size=len(x))
    target[::2] = x[::2].astype("f8").argmax(1)
    return target


def distributions(rng, x):
    n = x.shape[1]
    q = rng.dirichlet(np.full(n, 0.3), len(x))
    q[::3] = np.eye(n)[rng.integers(n, size=len(q[::3]))]
    q[1::3] = np.eye(n)[x[1::3].astype("f8").argmax(1)]
    return q.astype(x.dtype)


# --- accuracy ----------------------------------------------------------------------------------------------


def compare(x, target, what, **chosen):
    loss, grad = run("cross_entropy_value_and_grad", x, target, reduction="none", **chosen)
    assert loss.dtype == grad.dtype == x.dtype
    losses, gradients = exact(x, target, **chosen)
    limit = 0.51 if x.itemsize == 2 else 4
    check(loss, losses, limit, f"loss, {what}")
    check(grad, gradients, 4, f"gradient, {what}")
    check(run("cross_entropy", x, target, reduction="none", **chosen), losses, limit, f"alone, {what}")


# Every option once; 16-bit types run the code of float32 but for how they load and store.
CASES = [
    ("float32", "plain"), ("float32", "temperature"), ("float32", "weighted and smoothed"), ("float64", "z_loss"),
    ("float64", "smoothed"), ("float64", "weighted"), ("float16", "plain"), ("bfloat16", "smoothed"),
]  # fmt: skip


def families_for(case, cases):
    """All families for the first case, every other one for the rest in turn."""
    i = cases.index(case)
    return list(FAMILIES)[i % 2 :: 2] if i else FAMILIES


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_class_indices_are_within_the_contract(case, rng, few_threads):
    dtype, variant = case
    for family in families_for(case, CASES):
        n = int(rng.choice([2, 33]))
        x = sample(family, rng, 2, n, dtype)
        compare(x, classes_for(rng, x), f"{family} {n}", **options_of(variant, n, rng))
    x = sample("random", rng, 2, 1, dtype)
    compare(x, np.zeros(2, int), "one class", **options_of(variant, 1, rng))


SOFT_CASES = [
    ("float32", "weighted and smoothed"), ("float64", "plain"), ("float32", "plain"), ("bfloat16", "plain"),
]  # fmt: skip


@pytest.mark.parametrize("case", SOFT_CASES, ids=", ".join)
def test_probabilities_are_within_the_contract(case, rng, few_threads):
    dtype, variant = case
    for family in families_for(case, SOFT_CASES):
        n = int(rng.choice([2, 33]))
        x = sample(family, rng, 3, n, dtype)
        compare(x, distributions(rng, x), f"{family} {n}", **options_of(variant, n, rng))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_target_of_little_weight_is_not_what_the_others_leave(dtype, rng, few_threads):
    x = sample("random", rng, 4, 5, dtype)
    target, weight = np.array([x[0].argmax(), 1, 2, 4]), 10.0 ** -np.arange(5)
    weight[3] = 0
    compare(x, target, "of little weight", weight=weight, label_smoothing=1.0)


def test_probabilities_of_a_sure_teacher(few_threads, monkeypatch):
    # the others' shares are no part of a sum with the largest one
    x, q = np.float32([[0, 90, -3]]), np.float32([[1e-10, 1, 3e-11]])
    compare(x, q, "rows")
    flipped = [np.ascontiguousarray(a.T) for a in (x, q)]
    grad = run("cross_entropy_value_and_grad", *flipped, axis=0)[1]
    np.testing.assert_allclose(grad[1], [1.3e-10], rtol=1e-6)
    in_segments(monkeypatch, 1)
    compare(x, q, "segments")


@pytest.mark.parametrize("g", [1e-42, 1e-30, 2.0**-16, 65536.0, 1e12, -3e30, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_any_size_are_passed_on(dtype, g, rng, few_threads):
    x = sample("underflow", rng, 3, 20, dtype)
    x[0, 3] = -inf
    target = np.array([5, x[1].argmax(), 19])
    for grad in (g, np.array(g, dtype)):
        got = run("cross_entropy_backward", grad, x, target, reduction="sum")
        _, gradients = exact(x, target, factor=(g, 1))
        check(got[:, 4:], gradients.map(lambda a: a[:, 4:]), 4)
        assert got[0, 3] == 0


def test_an_infinite_gradient_passes_no_class_that_is_ruled_out(few_threads):
    x = np.array([[0.0, -inf, 1.0]])
    got = run("cross_entropy_backward", np.array(inf), x, np.array([0]))
    np.testing.assert_array_equal(got, [[-inf, 0, inf]])


def test_a_confident_row_has_a_gradient(few_threads):
    x = np.array([[60.0, 0.0, 0.0]])
    for target in np.array([0]), np.array([[1.0, 0.0, 0.0]]):
        loss, grad = run("cross_entropy_value_and_grad", x, target, reduction="none")
        np.testing.assert_allclose(loss, 2 * np.exp(-60.0), rtol=1e-15)
        np.testing.assert_allclose(grad, [[-2 * np.exp(-60.0), np.exp(-60.0), np.exp(-60.0)]], rtol=1e-15)


def test_log_probabilities_of_tokens(rng, few_threads):
    for dtype in DTYPES:
        x = sample("random", rng, 3, 40, dtype)
        ids = np.array([x[0].astype("f8").argmax(), 7, 39], np.uint8)
        got = run("token_log_probs", x, ids)
        losses, _ = exact(x, ids.astype(int))
        assert got.dtype == x.dtype
        check(-got.astype("f8").astype(x.dtype), losses, 0.51 if dtype in IN_16_BITS else 4)
    assert not np.signbit(run("token_log_probs", np.zeros((1, 1)), np.array([0])))


def test_perplexity(rng, few_threads):
    for dtype, tolerance in ("float32", 1e-6), ("float64", 1e-15), ("float16", 1e-6):
        x, ids = rng.normal(0, 3, (4, 21)).astype(dtype), np.array([3, 20, -100, 7])
        got = run("perplexity", x, ids, temperature=0.7)
        assert got.dtype == np.float64 and got.shape == ()
        np.testing.assert_allclose(got, numbasoft.perplexity(x, ids, temperature=0.7), rtol=tolerance)
    assert run("perplexity", np.zeros((5, 32)), np.array([0, 1, 2, 3, -100])) == pytest.approx(32, rel=1e-15)
    assert run("perplexity", x, np.full(4, -100)) == run("perplexity", x[:0], ids[:0]) == 1
    x = np.array([[0, 705.0], [0, 711.0]])
    assert run("perplexity", x[:1].copy(), np.array([0])) == pytest.approx(float(np.exp(705)), rel=1e-12)
    assert run("perplexity", x[1:].copy(), np.array([0])) == inf
    assert np.isnan(run("perplexity", x, np.array([0, 2])))
    with pytest.raises(TypeError, match="target has dtype float64"):
        run("perplexity", x, x)


# --- the same bits however a row is shared out -------------------------------------------------------------


def all_ways(x, target, chosen, monkeypatch):
    """The results by threads of one warp, by blocks, in segments, as columns, and as columns that are copied first."""
    call = "cross_entropy_value_and_grad"
    yield "team", run(call, x, target, **chosen)
    if target.ndim == 1:
        with monkeypatch.context() as patch:
            most = geometry.VECTORS
            patch.setattr(geometry, "rows_launch", lambda n, s, *_: geometry.Rows(most[s][-1], 2, 2))
            renew()
            yield "blocks", run(call, x, target, **chosen)
        renew()
    with monkeypatch.context() as patch:
        in_segments(patch, 4)
        yield "segments", run(call, x, target, **chosen)
        yield "segments alone", (run("cross_entropy", x, target, **chosen), None)
    renew()
    flipped = np.ascontiguousarray(x.T)
    q = np.ascontiguousarray(target.T) if target.ndim == 2 else target
    loss, grad = run(call, flipped, q, axis=0, **chosen)
    yield "columns", (loss, grad.T)
    yield "alone", (run("cross_entropy", x, target, **chosen), None)
    if target.ndim == 2 or len(chosen) > 1:
        return  # how logits are loaded is the same for all targets
    with monkeypatch.context() as patch:
        patch.setattr(class_losses.layout, "LONGEST_COLUMN", 0)
        loss, grad = run(call, flipped, q, axis=0, **chosen)
        yield "copied", (loss, grad.T)
    memory = np.zeros(x.size + 1, x.dtype)
    memory[1:] = x.ravel()
    yield "unaligned", run(call, memory[1:].reshape(x.shape), target, **chosen)
    yield "a row", run(call, x[1:], target[1:], **chosen)


@pytest.mark.parametrize(
    ("dtype", "n", "variant", "soft"),
    [
        ("bfloat16", 17, "plain", False), ("float32", 11, "smoothed", False), ("float32", 11, "plain", True),
        ("float32", 11, "weighted and smoothed", True), ("float64", 5, "weighted and smoothed", False),
    ],
)  # fmt: skip
def test_the_bits_depend_on_the_row_alone(dtype, n, variant, soft, rng, monkeypatch):
    monkeypatch.setattr(
        geometry, "BLOCK", 8
    )  # two teams; a barrier costs the simulator a millisecond a thread
    monkeypatch.setattr(geometry, "column_threads", lambda n, *_: 2 * geometry.COLUMNS)
    monkeypatch.setattr(copies, "THREADS", 16)
    x = rng.normal(0, 3, (2, n)).astype(DTYPES[dtype])
    x[1, 3] = 30
    target = distributions(rng, x) if soft else np.array([n - 1, 3])
    chosen = dict(options_of(variant, n, rng), reduction="none")
    ways = dict(all_ways(x, target, chosen, monkeypatch))
    loss, grad = ways["team"]
    for way, (other, other_grad) in ways.items():
        one = slice(1 if way == "a row" else 0, None)
        if dtype != "bfloat16" or "alone" not in way:
            assert other.tobytes() == loss[one].tobytes(), way
        if other_grad is not None:
            assert np.ascontiguousarray(other_grad).tobytes() == grad[one].tobytes(), way
    del chosen["reduction"]
    losses, gradients = exact(x, target, **chosen)
    check(loss, losses, 0.51 if dtype == "bfloat16" else 4)
    check(grad, gradients, 4)


@pytest.mark.parametrize(
    ("n", "variant", "soft"),
    [(530, "weighted and smoothed", True), (3, "smoothed", False)],
)
def test_real_launches_of_every_kind(n, variant, soft, rng):
    # by part of a warp, and by several warps that meet in shared memory
    x = rng.normal(0, 3, (1, n)).astype(np.float32)
    target = distributions(rng, x) if soft else classes_for(rng, x)
    chosen = options_of(variant, n, rng)
    got = run("cross_entropy_value_and_grad", x, target, reduction="none", **chosen)
    for result, want in zip(got, exact(x, target, **chosen), strict=True):
        check(result, want, 4)


# --- what is not checked on the host, and what does not count ----------------------------------------------

REDUCTIONS = ["none", "mean", "sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_zero_whatever_they_hold(reduction, rng, few_threads):
    x = rng.normal(0, 3, (4, 9)).astype(np.float32)
    x[1], x[3] = nan, inf
    weight = rng.uniform(0.5, 2, 9)
    for ignored, chosen in ((2**40, {}), (4, dict(weight=weight, label_smoothing=0.1, z_loss=0.1))):
        target = np.array([3, ignored, 7, ignored])
        chosen = dict(chosen, ignore_index=ignored, reduction=reduction)
        loss, grad = run("cross_entropy_value_and_grad", x, target, **chosen)
        kept = run("cross_entropy_value_and_grad", x[::2].copy(), target[::2].copy(), **chosen)
        assert (grad[1::2] == 0).all() and (reduction != "none" or (loss[1::2] == 0).all())
        np.testing.assert_array_equal(grad[::2], kept[1])
        np.testing.assert_array_equal(loss[::2] if reduction == "none" else loss, kept[0])


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("variant", ["plain", "smoothed", "weighted and smoothed"])
def test_a_class_that_does_not_exist_is_never_an_index(variant, axis, rng, few_threads, monkeypatch):
    x = rng.normal(0, 3, (5, 9)).astype(np.float32)
    target = np.array([3, 9, -1, -(2**62), 2**62])
    chosen = dict(options_of(variant, 9, rng), reduction="none")
    given = np.ascontiguousarray(x.T) if axis == 0 else x
    for call in ("cross_entropy_value_and_grad", "segments") if axis else ("cross_entropy_value_and_grad",):
        if call == "segments":
            monkeypatch.setattr(geometry, "SEGMENT_THREADS", 1)
            monkeypatch.setattr(geometry, "rows_launch", lambda *a, **o: None)
            renew()
        loss, grad = run("cross_entropy_value_and_grad", given, target, axis=axis, **chosen)
        grad = grad.T if axis == 0 else grad
        assert np.isfinite(loss[0]) and np.isfinite(grad[0]).all()
        assert np.isnan(loss[1:]).all() and np.isnan(grad[1:]).all()
    if variant == "plain":
        got = run("cross_entropy", given, target, axis=axis)
        assert np.isnan(got)
        logs = run("token_log_probs", given, np.array([0, 9, 3, -100, 8]), axis=axis)
        np.testing.assert_array_equal(np.isnan(logs), [False, True, False, True, False])


def test_an_unsigned_index_is_no_negative_one(few_threads):
    x = np.zeros((2, 3))
    loss = run("cross_entropy", x, np.array([2**64 - 100, 1], np.uint64), reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [True, False])


def test_what_are_no_probabilities_gives_nan(rng, few_threads, monkeypatch):
    x = rng.normal(0, 3, (5, 3))
    q = np.array([[0.5, 0.25, 0.25], [0.5, 0.75, -0.25], [nan, 0.5, 0.5], [0.5, 0.4, 0.3], [inf, 0, 0]])
    for name in "rows", "segments":
        if name == "segments":
            monkeypatch.setattr(geometry, "SEGMENT_THREADS", 1)
            monkeypatch.setattr(geometry, "rows_launch", lambda *a, **o: None)
            renew()
        for chosen in {}, {"label_smoothing": 0.1}:
            loss, grad = run("cross_entropy_value_and_grad", x, q, reduction="none", **chosen)
            assert np.isfinite(loss[0]) and np.isfinite(grad[0]).all()
            assert np.isnan(loss[1:]).all() and np.isnan(grad[1:]).all()
    loss, grad = run("cross_entropy_value_and_grad", x.T.copy(), q.T.copy(), axis=0, reduction="none")
    assert np.isfinite(loss[0]) and np.isnan(loss[1:]).all() and np.isnan(grad[:, 1:]).all()


@pytest.mark.parametrize("bad", [-1.0, nan, inf])
def test_what_is_no_weight_gives_nan(bad, few_threads):
    x, weight = np.zeros((2, 3)), np.array([1.0, bad, 2.0])
    loss, grad = run("cross_entropy_value_and_grad", x, np.array([1, 2]), weight=weight, reduction="none")
    assert np.isnan(loss[0]) and np.isnan(grad[0]).all()
    np.testing.assert_allclose(loss[1], 2 * np.log(3))
    assert np.isfinite(grad[1]).all()


def test_a_mean_of_nothing_is_zero(few_threads):
    x, none = np.full((3, 4), nan), np.full(3, -100)
    assert run("cross_entropy", x, none) == 0
    assert run("cross_entropy", x[:0], np.zeros(0, int)) == 0
    assert run("cross_entropy", x[:0], np.zeros(0, int), reduction="none").shape == (0,)
    assert run("cross_entropy", x[:0], x[:0]) == 0
    for target in none, np.ones(3, int):
        loss, grad = run(
            "cross_entropy_value_and_grad", np.zeros((3, 4)), target, weight=np.array([1.0, 0, 1, 1])
        )
        assert loss == 0 and (grad == 0).all()
    loss, grad = run("cross_entropy_value_and_grad", x[:0], np.zeros(0, int))
    assert loss == 0 and grad.shape == (0, 4)


def test_special_values(few_threads):
    x = np.array([[0, -inf, 1], [0, inf, 1], [-inf] * 3, [0, nan, 1], [5, -inf, -inf]], np.float32)
    loss, grad = run("cross_entropy_value_and_grad", x, np.array([2, 1, 0, 0, 0]), reduction="none")
    np.testing.assert_allclose(loss, [0.31326169, nan, nan, nan, 0], rtol=1e-6)
    assert grad[0, 1] == 0 and np.isnan(grad[1:4]).all() and (grad[4] == 0).all()
    loss, grad = run("cross_entropy_value_and_grad", x[:1].copy(), np.array([1]), reduction="none")
    assert loss == inf
    np.testing.assert_allclose(grad, [[0.26894142, -1, 0.73105858]], rtol=1e-6)
    loss, grad = run("cross_entropy_value_and_grad", x[:1].copy(), np.float32([[0, 0, 1]]))
    np.testing.assert_allclose(loss, 0.31326169, rtol=1e-6)
    assert grad[0, 1] == 0
    assert run("cross_entropy", x[:1].copy(), np.array([2]), label_smoothing=0.1) == inf
    weight = np.array([1.0, 0, 1])
    assert run("cross_entropy", x[:1].copy(), np.array([2]), label_smoothing=0.1, weight=weight) < 1


# --- reductions, shapes, dtypes, layouts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reduction"),
    [((5,), "mean"), ((4, 5), "sum"), ((2, 5, 2), "mean"), ((2, 5, 2), "none")],
)
def test_reductions_and_axes(shape, reduction, rng, few_threads):
    axis = 0 if len(shape) == 1 else 1
    x = rng.normal(0, 3, shape)
    outer = shape[:axis] + shape[axis + 1 :]
    hard = rng.integers(5, size=outer)
    if len(shape) > 1:
        hard[0] = -100
    weight = rng.uniform(0.1, 2, 5).astype(np.float32)
    g = rng.normal(size=outer if reduction == "none" else ()).astype(np.float32)
    soft = np.ascontiguousarray(np.moveaxis(rng.dirichlet(np.ones(5), outer), -1, axis))
    for target in hard, soft:
        for chosen in {}, dict(weight=weight, label_smoothing=0.2, z_loss=0.01):
            chosen = dict(chosen, axis=axis, reduction=reduction)
            want, want_grad = plain_cross_entropy(x, target, **chosen)
            loss, grad = run("cross_entropy_value_and_grad", x, target, **chosen)
            assert loss.shape == want.shape and grad.shape == want_grad.shape
            np.testing.assert_allclose(loss, want, rtol=1e-14)
            np.testing.assert_allclose(grad, want_grad, rtol=1e-13, atol=1e-17)
            np.testing.assert_array_equal(run("cross_entropy", x, target, **chosen), loss)
            got = run("cross_entropy_backward", g, x, target, **chosen)
            _, want_grad = plain_cross_entropy(x, target, g, **chosen)
            np.testing.assert_allclose(got, want_grad, rtol=1e-13, atol=1e-17)


def test_a_sum_of_many_rows_has_one_order(rng, few_threads, monkeypatch):
    monkeypatch.setattr(geometry, "segments_launch", lambda n, s, a, *_: (geometry.Rows(5, 1, 1), 8))
    forget()
    x, target = rng.normal(0, 3, (20, 3)), rng.integers(3, size=20)
    loss = run("cross_entropy", x, target)
    np.testing.assert_allclose(loss, plain_cross_entropy(x, target)[0].astype(float), rtol=1e-15)
    # the losses of log-probabilities may have either sign, and be infinite
    x[:, 1] *= 1e30
    for replaced in None, inf, -inf:
        x[7, target[7]] = 1.5 if replaced is None else replaced
        want = numbasoft.nll_loss(x, target, reduction="sum")
        np.testing.assert_allclose(run("nll_loss", x, target, reduction="sum"), want, rtol=1e-15)
    x[8, target[8]] = inf
    assert np.isnan(run("nll_loss", x, target))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_every_kind_of_index(kind, rng, few_threads):
    x, target = rng.normal(0, 3, (3, 4)), np.array([3, 0, 100], kind)
    chosen = dict(ignore_index=100, reduction="none")
    np.testing.assert_allclose(
        run("cross_entropy", x, target, **chosen), plain_cross_entropy(x, target, **chosen)[0], rtol=1e-14
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layouts(axis, rng, few_threads):
    views = {
        "transposed": lambda a: a.transpose(2, 0, 1), "every other, reversed": lambda a: a[::2, ::-1, ::2],
        "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    }  # fmt: skip
    for name, view in views.items():
        x = view(rng.normal(0, 3, (3, 2, 4)))
        outer = x.shape[:axis] + x.shape[axis + 1 :]
        target = rng.integers(x.shape[axis], size=(*outer, 2))[..., 0]
        loss, grad = run("cross_entropy_value_and_grad", x, target, axis=axis)
        want = plain_cross_entropy(x, target, axis=axis)
        np.testing.assert_allclose(loss, want[0], rtol=1e-14, err_msg=name)
        np.testing.assert_allclose(grad, want[1], rtol=1e-13, atol=1e-17, err_msg=name)
        got = run("cross_entropy", x, target, axis=axis, reduction="none")
        want, _ = plain_cross_entropy(x, target, axis=axis, reduction="none")
        np.testing.assert_allclose(got, want, rtol=1e-14, err_msg=name)


def test_dtypes_that_differ(rng, few_threads):
    x = rng.normal(0, 3, (3, 6))
    q = distributions(rng, x)
    for a, b in (("float32", "float64"), ("float16", BFLOAT16), ("int16", "float32")):
        given = x.astype(a), q.astype(b)
        got = run("cross_entropy_value_and_grad", *given)
        want = plain_cross_entropy(*given)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == (np.float64 if a == "int16" else a)
            np.testing.assert_allclose(
                one.astype("f8"), other, rtol=2e-3 if a == "float16" else 1e-6, atol=1e-7
            )
    x = x.astype(np.float32)
    for t in (1e-35, 1e35):
        got = run("cross_entropy_value_and_grad", x, np.array([0, 1, 2]), temperature=t)
        want = plain_cross_entropy(x, np.array([0, 1, 2]), temperature=t)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_in_place(rng, few_threads):
    for axis, x in ((-1, rng.normal(0, 3, (3, 7))), (0, rng.normal(0, 3, (7, 3)))):
        target = np.array([0, -100, 5])
        _, want = plain_cross_entropy(x, target, 2.0, axis=axis)
        d = there(x.copy())
        _, got = numbasoft.cross_entropy_value_and_grad(d, there(target), axis=axis, out=d)
        assert got is d
        np.testing.assert_allclose(here(d), want / 2, rtol=1e-13)
        d = there(x.copy())
        assert numbasoft.cross_entropy_backward(2.0, d, there(target), axis=axis, out=d) is d
        np.testing.assert_allclose(here(d), want, rtol=1e-13)
        lse = there(np.log(np.exp(x).sum(axis)))
        got = numbasoft.cross_entropy_backward(2.0, there(x), there(target), lse=lse, axis=axis)
        np.testing.assert_allclose(here(got), want, rtol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_of_log_probabilities(reduction, rng, few_threads):
    weight = rng.uniform(0, 2, 5)
    weight[3] = 0
    for shape, axis, dtype in (((4, 5), -1, "float32"), ((5, 3), 0, "float64"), ((2, 5, 2), 1, "bfloat16")):
        log_p = rng.normal(-3, 1, shape).astype(DTYPES[dtype])
        outer = np.delete(shape, axis)
        target = rng.integers(5, size=outer)
        target.flat[1], target.flat[2] = 9, 3
        for chosen in {}, dict(weight=weight):
            chosen = dict(chosen, axis=axis, ignore_index=9, reduction=reduction)
            want = np.asarray(numbasoft.nll_loss(log_p, target, **chosen))
            got = run("nll_loss", log_p, target, **chosen)
            assert got.dtype == want.dtype and got.shape == want.shape
            tolerance = 2 * float(np.spacing(np.array(1, want.dtype)))
            np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=tolerance)
            for g in 0.5, rng.normal(size=want.shape):
                if np.shape(g) == want.shape:
                    want_grad = numbasoft.nll_loss_backward(g, log_p, target, **chosen).astype("f8")
                    got = run("nll_loss_backward", g, log_p, target, **chosen).astype("f8")
                    np.testing.assert_allclose(got, want_grad, rtol=tolerance)
    log_p, target = np.full((3, 5), -1.0), np.array([5, 0, -1])
    assert np.isnan(run("nll_loss", log_p, target, reduction="none")).tolist() == [True, False, True]
    grad = run("nll_loss_backward", 1.0, log_p, target, reduction="sum")
    assert np.isnan(grad[[0, 2]]).all() and grad[1].tolist() == [-1, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint64"])
def test_classes_with_gaps_along_too_many_axes_are_copied(dtype, rng, few_threads):
    # every axis of the target is apart from the others: (2, 2, 2, 1, 2, 2, 2) of (3, 3, 3, 1, 3, 3, 3)
    shape = 3, 3, 3, 1, 3, 3, 3
    target = rng.integers(4, size=shape).astype(dtype)
    target[0, 0, 0, 0, 0, 0, 0] = 100
    apart = target[:2, :2, :2, :, :2, :2, :2]
    log_p = rng.normal(-3, 1, (*shape, 5)).astype(np.float32)
    rows = log_p[:2, :2, :2, :, :2, :2, :2, :4]
    assert classes.five_axes(apart.shape, apart.strides) is None
    chosen = dict(ignore_index=100, reduction="none")
    want = run("nll_loss", np.ascontiguousarray(rows), np.ascontiguousarray(apart), **chosen)
    np.testing.assert_allclose(want, numbasoft.nll_loss(rows, apart, **chosen))
    np.testing.assert_array_equal(run("nll_loss", rows, apart, **chosen), want)
    got = run("cross_entropy", np.ascontiguousarray(rows), apart, **chosen)
    np.testing.assert_allclose(got, numbasoft.cross_entropy(rows, apart, **chosen), rtol=1e-5)
    if dtype == "int64":  # as it is, which no float holds
        apart[1, 1, 1, 0, 1, 1, 1], other = 2**53 + 1, dict(chosen, ignore_index=2**53)
        assert np.isnan(run("nll_loss", rows, apart, **other)[1, 1, 1, 0, 1, 1, 1])
    if dtype == "uint64":
        apart[1, 1, 1, 0, 1, 1, 1], other = 2**64 - 1, dict(chosen, ignore_index=-1)
        assert np.isnan(run("nll_loss", rows, apart, **other)[1, 1, 1, 0, 1, 1, 1])


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "chosen", "error", "sentence"),
    [
        (np.zeros(3, int), {}, ValueError, r"target has shape \(3,\), but must have shape \(2,\)"),
        (np.zeros(2), {}, TypeError, "target has dtype float64, but must hold integers"),
        (np.zeros(2, bool), {}, TypeError, "target has dtype bool, but must hold integers"),
        (np.zeros((2, 4)), {}, ValueError, "target has shape"),
        (np.zeros(2, int), {"axis": 2}, IndexError, "axis"),
        (np.zeros(2, int), {"weight": np.ones(4)}, ValueError, "weight has shape"),
        (np.zeros(2, int), {"label_smoothing": 2}, ValueError, "label_smoothing is 2"),
        (np.zeros(2, int), {"z_loss": -1}, ValueError, "z_loss is -1"),
        (np.zeros(2, int), {"reduction": "max"}, ValueError, "reduction is 'max'"),
        (np.zeros(2, int), {"temperature": 0}, ValueError, "temperature is 0"),
        (np.zeros(2, int), {"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
        (np.zeros(2, int), {"out": np.zeros((3, 3))}, ValueError, "out has shape"),
    ],
)
def test_errors_come_before_any_launch(target, chosen, error, sentence, monkeypatch):
    monkeypatch.setattr(calls, "run", None)
    with pytest.raises(error, match=sentence) as caught:
        run("cross_entropy_value_and_grad", np.ones((2, 3)), target, **chosen)
    assert "\n" not in str(caught.value)


def test_all_arrays_are_in_one_place():
    x, target = np.ones((2, 3)), np.zeros(2, int)
    for call in (
        lambda: numbasoft.cross_entropy(there(x), target),
        lambda: numbasoft.cross_entropy(x, there(target)),
        lambda: numbasoft.cross_entropy(there(x), there(target), weight=[1.0, 1.0, 1.0]),
        lambda: numbasoft.cross_entropy_value_and_grad(there(x), there(target), out=x),
        lambda: numbasoft.cross_entropy_backward(np.ones(()), there(x), there(target)),
        lambda: numbasoft.token_log_probs(there(x), [0, 1]),
    ):
        with pytest.raises(TypeError, match=r"is on a CUDA device and .* is not"):
            call()


def test_the_names_of_targets():
    assert set(operations.REGIONS) == {*operations.OF_CLASSES, operations.PROBABILITIES, operations.WEIGHTED}
