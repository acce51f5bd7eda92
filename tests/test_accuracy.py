"""Every line of the accuracy contract, against the oracle, in ULP of the exact result."""

import numba
import numpy as np
import oracle
import pytest
from oracle import DTYPES, check, limit
from samples import (
    BACKWARD,
    FAMILIES,
    FORWARD,
    depth,
    ends_of_log_softmax_backward,
    ends_of_logsumexp_backward,
    huge_logits,
    overflowing_gradients,
    sample,
)

import numbasoft
from numbasoft.launch import split_rows

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_forward = pytest.mark.parametrize("name", FORWARD)
by_family = pytest.mark.parametrize("family", FAMILIES)
by_backward = pytest.mark.parametrize("name", BACKWARD)

# Around the widths of vectors and of unrolled loops, where remainders begin and end.
LENGTHS = (
    *range(1, 36),
    47,
    48,
    49,
    63,
    64,
    65,
    79,
    95,
    96,
    97,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    513,
    1023,
    1025,
)


def compare(name, x, dtype, axis=-1, **options):
    got = getattr(numbasoft, name)(x, axis, **options)
    assert got.dtype == DTYPES[dtype]
    check(got, getattr(oracle, name)(x, axis, **options), limit(name, DTYPES[dtype]), f"{name} {options}")


@by_family
@by_dtype
@by_forward
def test_forward_along_the_last_axis(name, dtype, family, rng):
    compare(name, sample(family, rng, 12, 1000, dtype), dtype)


@by_family
@by_dtype
@by_forward
def test_forward_along_the_first_axis(name, dtype, family, rng):
    compare(name, np.ascontiguousarray(sample(family, rng, 21, 300, dtype).T), dtype, axis=0)


@pytest.mark.parametrize("family", ["random", "underflow", "confident"])
@by_dtype
@by_forward
def test_forward_at_every_remainder_of_a_vector(name, dtype, family, rng):
    for n in LENGTHS:
        compare(name, sample(family, rng, 3, n, dtype), dtype)


@pytest.mark.parametrize("spread", [1, 3, 30])
@pytest.mark.parametrize("n", [16, 24, 64])
def test_float32_softmax_of_very_many_short_rows(n, spread, rng):
    # a single rounding of the sum takes one row in some thousands past 2 ULP
    x = rng.normal(0, spread, (100_000, n)).astype(np.float32)
    exact = np.exp(x.astype(np.longdouble) - x.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    one_ulp = np.spacing(exact.astype(np.float32))
    assert (abs(numbasoft.softmax(x) - exact) / one_ulp).max() <= 2


@by_dtype
@by_forward
def test_forward_on_vocabulary_sized_rows(name, dtype, rng):
    compare(name, (2 * rng.standard_normal((2, 128_256))).astype(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("temperature", [0.1, 1 / 3, 0.7, 3.0, 10, 1e3])
@pytest.mark.parametrize(
    "family", ["random", "offset", "confident", "underflow", "ramp", "huge", "magnitudes"]
)
@by_dtype
@by_forward
def test_temperature_is_applied_without_rounding_first(name, dtype, family, temperature, rng):
    # 1e4 / 3 rounded to float32 alone is worth thousands of ULP in a probability
    compare(name, sample(family, rng, 6, 201, dtype), dtype, temperature=temperature)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@by_forward
def test_temperature_on_every_axis(name, dtype, axis, rng):
    x = (1e4 + rng.normal(0, 5, (5, 70, 9))).astype(dtype)
    compare(name, x, dtype, axis=axis, temperature=3.0)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [("float64", 1e-290), ("float64", 1e290), ("float64", 1e-100), ("float32", 1e-30), ("float32", 1e30)],
)
@by_forward
def test_extreme_temperatures(name, dtype, temperature, rng):
    x = sample("magnitudes", rng, 5, 33, dtype)
    x[0, 3:6] = x[0].max()
    compare(name, x, dtype, temperature=temperature)
    compare(name, (x.astype(np.float64) * temperature).astype(dtype), dtype, temperature=temperature)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@by_forward
def test_ten_million_elements_in_one_row(name, dtype, rng):
    # 100,000 distinct values, so that the oracle is a weighted sum and every element is still looked at
    values = rng.normal(0, 3, 100_000).astype(dtype)
    index = rng.integers(values.size, size=10_000_000)
    compare_repeated(name, values, index, dtype)


@pytest.mark.parametrize("share", [0.35, 0.53, 0.7, 0.83])
@pytest.mark.parametrize(
    ("dtype", "n"),
    [*((dtype, 1_000_000) for dtype in DTYPES), ("float32", 10_000_000), ("float64", 10_000_000)],
)
@by_forward
def test_a_sum_of_many_small_terms(name, dtype, n, share):
    # [0, -16 x 1e6] is 12,500 ULP off in PyTorch's float32, and a float16 sum of 65,536 ones overflows;
    # equal terms are rounded all to the same side as a sum in the same type grows
    low = -share * oracle.FORMATS[DTYPES[dtype]].bits
    compare_repeated(name, np.array([0, low]).astype(DTYPES[dtype]), (np.arange(n) > 0).astype(int), dtype)


@by_dtype
@by_forward
def test_a_million_equal_elements(name, dtype):
    compare_repeated(name, np.array([1.5]).astype(DTYPES[dtype]), np.zeros(1_000_000, int), dtype)


def compare_repeated(name, values, index, dtype):
    counts = np.bincount(index, minlength=values.size)
    expected = getattr(oracle, name)(values, counts=counts)
    got = getattr(numbasoft, name)(values[index]).astype(np.float64)
    if name == "logsumexp":
        return check(got, expected, limit(name, DTYPES[dtype]))
    for ufunc, start in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        extreme = np.full(values.size, start)
        ufunc.at(extreme, index, got)
        check(
            extreme, expected, limit(name, DTYPES[dtype]), f"{name}, the {ufunc.__name__} of equal elements,"
        )
    return None


@by_dtype
def test_gradual_underflow_is_honoured(dtype):
    # a probability in the subnormal range is that number, not 0
    fmt = oracle.FORMATS[DTYPES[dtype]]
    low = np.float64(fmt.emin - fmt.bits // 2) * np.log(2)
    y = numbasoft.softmax(np.array([0, low, 0.5 * low]).astype(DTYPES[dtype])).astype(np.float64)
    assert 0 < y[1] < 2.0**fmt.emin
    compare("softmax", np.array([0, low, 0.5 * low]).astype(DTYPES[dtype]), dtype)


@by_dtype
def test_log_softmax_near_zero(dtype):
    # PyTorch and JAX return exactly 0 for [0, -40]
    for low in np.linspace(-0.2, -0.99 * depth(DTYPES[dtype]), 60):
        for row in ([0, low], [low, 0, low, low], [3, 3 + low, -np.inf], [low / 2, -low / 2]):
            compare("log_softmax", np.array(row).astype(DTYPES[dtype]), dtype)
    got = numbasoft.log_softmax(np.array([0, -8.0]).astype(DTYPES[dtype]))
    assert got[0] < 0


def test_log_softmax_of_a_confident_row_is_not_zero():
    got = numbasoft.log_softmax(np.array([0.0, -40.0]))
    assert got[0] == pytest.approx(-4.248354255291589e-18, rel=4e-16)


@by_dtype
def test_logsumexp_near_zero(dtype):
    # one term dominates and its logit is 0 or near it: the answer is the sum of the others
    tiny = 2.0 ** (oracle.FORMATS[DTYPES[dtype]].emin // 2)
    for low in np.linspace(-0.2, -0.99 * depth(DTYPES[dtype]), 60):
        for row in ([0, low], [low, low, 0], [tiny, low], [-tiny, low, low], [-np.log(2), -np.log(2), low]):
            compare("logsumexp", np.array(row).astype(DTYPES[dtype]), dtype)


def test_logsumexp_of_a_confident_row_is_the_sum_of_the_others():
    assert numbasoft.logsumexp(np.array([0.0, -40.0])) == pytest.approx(4.248354255291589e-18, rel=4e-16)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
@by_forward
def test_integers_are_promoted_before_anything_else(name, dtype, rng):
    # SciPy's softmax wraps around in uint8: x - max(x)
    kind = np.dtype(dtype)
    high = 2 if kind.kind == "b" else min(200, np.iinfo(kind).max)
    low = 0 if kind.kind in "bu" else -100
    x = rng.integers(low, high, (7, 33)).astype(kind)
    compare(name, x, "float64")


# --- backward passes ---------------------------------------------------------------------------------------


def gradients(kind, rng, shape, dtype):
    g = rng.standard_normal(shape)
    if kind == "constant":  # the result is what is left when everything cancels
        g = np.broadcast_to(g[..., :1], shape)
    elif kind == "one_hot":
        g = np.zeros(shape)
        g[..., rng.integers(shape[-1])] = -1
    elif kind == "magnitudes":
        g = g * 2.0 ** rng.uniform(-12, 12, shape)
    elif kind == "large":  # as large as may be if no plain sum of them is to overflow
        g = g * 2.0 ** (oracle.FORMATS[dtype].emax - 13)
    elif kind == "small":  # normal numbers, which any scaling down on the way would make subnormal
        g = g * 2.0 ** (oracle.FORMATS[dtype].emin + oracle.FORMATS[dtype].bits)
    return g.astype(dtype)


def backward_arguments(name, x, kind, rng, axis=-1, temperature=1.0):
    """The gradient and the outputs of a forward pass, rounded from the exact ones."""
    dtype = x.dtype
    if name == "softmax_backward":
        y = oracle.softmax(x, axis, temperature=temperature).floats().astype(dtype)
    elif name == "log_softmax_backward":
        y = oracle.log_softmax(x, axis, temperature=temperature).floats().astype(dtype)
    else:
        lse = oracle.logsumexp(x, axis, temperature=temperature).floats().astype(dtype)
        return gradients(kind, rng, lse.shape, dtype), x, lse
    return gradients(kind, rng, y.shape, dtype), y


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64 here")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_terms_that_are_rounded_alike(dtype):
    """Where most terms are equal a sum misses what the exponential's rounding lost: up to 2.4 ULP in softmax."""
    rng = np.random.default_rng(5)
    for i in range(16):
        x = sample("repeated", rng, 256, 4096, dtype)
        if i % 4 == 3:  # what a rectifier makes
            x = np.maximum(0, rng.normal(-1, 1, x.shape)).astype(dtype)
        wide = x.astype(np.longdouble)
        wide -= wide.max(axis=1, keepdims=True)
        e = np.exp(wide)
        s = e.sum(axis=1, keepdims=True)
        others = e.sum(axis=1, keepdims=True, where=wide != 0)
        logs = wide - np.log1p(others + (np.count_nonzero(wide == 0, axis=1, keepdims=True) - 1))
        for function, expected in ((numbasoft.softmax, e / s), (numbasoft.log_softmax, logs)):
            unit = np.spacing(abs(expected.astype(dtype))).astype(np.longdouble)
            assert (abs(function(x) - expected) / unit).max() <= 2


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64 here")
@pytest.mark.parametrize(
    ("n", "most", "top", "one", "temperature"),
    [
        (863, -1.1591711044311523, 0.0433, -7.5778632164001465, 1.0),
        (54775, -1.1591711044311523, 0.0433, -7.5778632164001465, 1.0),
        (27514, -3.491225004196167, 0.1299, -12.338324546813965, 3.0),
        (24546, -5.2822065353393555, -0.0433, -9.031256675720215, 1.0),
    ],
)
def test_an_error_of_the_sum_against_that_of_an_element(n, most, top, one, temperature):
    """Found by search: n equal elements whose sum is as wrong as can be, and one that is so the other way.

    Up to 2.24 ULP while the maximum's own fraction was left out where elements are rounded to a power of two.
    """
    x = np.full(n + 2, most, np.float32)
    x[n // 2], x[n // 3] = top, one
    wide = (x.astype(np.longdouble) - x.max()) / np.longdouble(temperature)
    expected = np.exp(wide) / np.exp(wide).sum()
    unit = np.spacing(expected.astype(np.float32)).astype(np.longdouble)
    assert (abs(numbasoft.softmax(x, temperature=temperature) - expected) / unit).max() <= 2


@pytest.mark.parametrize("others", [(-3.164534447843296, -2.3607639608703774), (-2.7262096461781713,) * 2])
def test_log_softmax_of_a_maximum_near_zero(others):
    """Neither m - (m + l) nor l is exact there: rounded one after the other they were 2.4 ULP off."""
    for rows in 1, 8:
        x = np.tile([others[0], 0.0433, others[1]], (rows, 1))
        check(numbasoft.log_softmax(x), oracle.log_softmax(x), 2, "log_softmax")


def compare_backward(name, arguments, axis=-1, temperature=1.0):
    with np.errstate(over="ignore"):
        got = getattr(numbasoft, name)(*arguments, axis, temperature=temperature)
    expected = getattr(oracle, name)(*arguments, axis, temperature=temperature)
    assert got.dtype == arguments[1].dtype
    check(got, expected, limit(name, got.dtype), f"{name}, temperature {temperature},")


@pytest.mark.parametrize("kind", ["random", "constant", "one_hot", "magnitudes", "large", "small"])
@pytest.mark.parametrize("family", ["random", "wide", "offset", "confident", "tied", "underflow", "ramp"])
@by_dtype
@by_backward
def test_backward_along_the_last_axis(name, dtype, family, kind, rng):
    x = sample(family, rng, 6, 300, dtype)
    compare_backward(name, backward_arguments(name, x, kind, rng))


@pytest.mark.parametrize("family", ["random", "confident", "underflow"])
@by_dtype
@by_backward
def test_backward_along_the_first_axis(name, dtype, family, rng):
    x = np.ascontiguousarray(sample(family, rng, 21, 150, dtype).T)
    compare_backward(name, backward_arguments(name, x, "random", rng, axis=0), axis=0)


@pytest.mark.parametrize("temperature", [0.1, 1 / 3, 3.0, 1e3])
@pytest.mark.parametrize("family", ["random", "offset", "underflow"])
@by_dtype
@by_backward
def test_backward_with_temperature(name, dtype, family, temperature, rng):
    x = sample(family, rng, 6, 100, dtype)
    if dtype == "float16":
        x = x / np.float16(16)  # 1e4 / 0.1 is past its largest number
    arguments = backward_arguments(name, x, "random", rng, temperature=temperature)
    compare_backward(name, arguments, temperature=temperature)


@by_dtype
@by_backward
def test_backward_at_every_remainder_of_a_vector(name, dtype, rng):
    for n in LENGTHS:
        compare_backward(name, backward_arguments(name, sample("random", rng, 3, n, dtype), "random", rng))


@by_dtype
@by_backward
def test_backward_on_vocabulary_sized_rows(name, dtype, rng):
    x = (2 * rng.standard_normal((2, 128_256))).astype(DTYPES[dtype])
    for kind in ("random", "constant"):
        compare_backward(name, backward_arguments(name, x, kind, rng))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_large_gradient_of_an_underflowing_term(dtype):
    # exp(x - lse) alone is subnormal or 0; times the gradient it is an ordinary number
    dtype = DTYPES[dtype]
    deep = depth(dtype)
    x = np.array([0, -0.97 * deep, -0.9 * deep, -1.05 * deep], dtype)
    big = np.array(2.0 ** (oracle.FORMATS[dtype].emax - 2), dtype)
    zero = np.array(0, dtype)
    compare_backward("logsumexp_backward", (big, x, zero))
    grad = np.array([big, 0, 0, 0], dtype)
    compare_backward("log_softmax_backward", (grad, x))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0, 1e-5, 1e20])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_softmax_backward_at_the_ends_of_the_range(dtype, temperature, rng):
    for g, log_y in ends_of_log_softmax_backward(rng, DTYPES[dtype]):
        compare_backward("log_softmax_backward", (g, log_y), temperature=temperature)


@pytest.mark.parametrize("n", [5, 300, 100_003])
def test_a_sum_of_gradients_that_overflows(n, rng):
    if n > 100_000 and numba.config.NUMBA_NUM_THREADS > 1:
        assert split_rows(1, n), "a row shared by threads"
    g, log_y = overflowing_gradients(n, DTYPES["float64"])
    compare_backward("log_softmax_backward", (g, log_y))
    compare_backward("log_softmax_backward", (g, log_y), temperature=4.0)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.5, 1e28, 1e30])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e10])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_backward_at_the_ends_of_the_range(dtype, size, temperature, rng):
    for arguments in ends_of_logsumexp_backward(DTYPES[dtype], size, temperature):
        compare_backward("logsumexp_backward", arguments, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.7, 3.0, 10.0, 1e5, 1e-5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_backward_of_huge_logits(dtype, temperature, rng):
    arguments = huge_logits(rng, DTYPES[dtype], temperature)
    assert len(arguments[0]) >= 50
    compare_backward("logsumexp_backward", arguments, temperature=temperature)


# --- the oracle itself -------------------------------------------------------------------------------------


def test_the_oracle_agrees_with_mpmath(rng):
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed, which checks the oracle")
    x = rng.normal(0, 60, (6, 20))
    x[0] = -740 - rng.random(20)
    x[0, 0] = 0
    x[1, :5] = 7.0
    temperature, grad = 0.7, rng.standard_normal((6, 20))
    soft, logs = (f(x, temperature=temperature) for f in (oracle.softmax, oracle.log_softmax))
    sums = oracle.logsumexp(x, temperature=temperature)
    y = soft.floats()
    back = oracle.softmax_backward(grad, y, temperature=temperature)
    log_back = oracle.log_softmax_backward(grad, logs.floats(), temperature=temperature)
    sum_back = oracle.logsumexp_backward(grad[:, 0], x, sums.floats(), temperature=temperature)

    def off(expected, index, exact):
        v = expected.value
        value = (mpmath.mpf(float(v.hi[index])) + mpmath.mpf(float(v.lo[index]))) * mpmath.mpf(2) ** int(
            v.exp[index]
        )
        return float(abs(value - exact) / mpmath.mpf(2) ** int(expected.unit[index]))

    with mpmath.workdps(700):
        mpf, t = mpmath.mpf, mpmath.mpf(temperature)
        worst = 0.0
        for i in range(6):
            z = [mpf(v) / t for v in x[i].tolist()]
            total = mpmath.fsum(map(mpmath.exp, z))
            lse = mpmath.log(total)
            worst = max(worst, off(sums, (i,), lse))
            p, g, lp = ([mpf(v) for v in a[i].tolist()] for a in (y, grad, logs.floats()))
            dot, plain = mpmath.fsum(a * b for a, b in zip(g, p, strict=True)), mpmath.fsum(g)
            for j in range(20):
                worst = max(
                    worst,
                    off(soft, (i, j), mpmath.exp(z[j]) / total),
                    off(logs, (i, j), z[j] - lse),
                    off(back, (i, j), p[j] * (g[j] - dot) / t) if y[i, j] else 0.0,
                    off(log_back, (i, j), (g[j] - mpmath.exp(lp[j]) * plain) / t),
                    off(sum_back, (i, j), g[0] * mpmath.exp(z[j] - mpf(float(sums.floats()[i]))) / t),
                )
    assert worst < 1e-9


@pytest.mark.parametrize(
    ("dtype", "row", "got", "error"),
    [
        ("float32", [0, 0], [0.5, np.nextafter(np.float32(0.5), 1)], [0, 1]),
        (
            "float32",
            [0, 0],
            [0.5, np.nextafter(np.float32(0.5), 0)],
            [0, 0.5],
        ),  # half the unit below a power of 2
        ("float32", [0, -200], [1, 1.4e-45], [0, 1]),  # the subnormal spacing
        ("float64", [0, -1000], [1, 5e-324], [0, 1]),
        ("float64", [0, 0], [0.5, 0.5 + 2**-50], [0, 8]),
        ("float16", [0, 0], [0.5, 0.5 + 2**-10], [0, 2]),
        ("bfloat16", [0, 0], [0.5, 0.5 + 2**-7], [0, 2]),
    ],
)
def test_the_measure_of_an_ulp(dtype, row, got, error):
    dtype = DTYPES[dtype]
    expected = oracle.softmax(np.array(row).astype(dtype))
    assert expected.errors(np.array(got).astype(dtype)) == pytest.approx(error, abs=1e-12)


def test_an_ulp_at_a_power_of_two_is_that_of_the_rounded_result():
    # 1 - 3e-9 rounds to 1 in float32, so the unit is the spacing at 1, 2^-23
    expected = oracle.softmax(np.array([0, -19.6], np.float32))
    assert expected.unit[0] == -23
    assert oracle.logsumexp(np.array([-100.0, 0.0])).unit == -197  # exp(-100) = 1.66 * 2^-145, 53 bits


@pytest.mark.parametrize(
    ("dtype", "exact", "got", "error"),
    [
        ("float16", 65519.999, np.inf, 0.5),  # rounded by way of float32 this is a tie, which goes up
        ("float16", 65600.0, np.inf, 0),
        ("float16", 1000.0, np.inf, (65536 - 1000) / 0.5),
        ("float16", 65504.0, 65504.0, 0),
        ("float64", 1.7976931348623157e308, np.inf, 1),
        ("float64", 1.0, np.nan, np.inf),
        ("float32", 1.0, -np.inf, np.inf),
    ],
)
def test_the_measure_of_an_ulp_at_overflow(dtype, exact, got, error):
    # the logsumexp of one element is that element over T
    expected = oracle.logsumexp(
        np.array([exact if dtype == "float64" else 1.0], dtype), temperature=1 / exact
    )
    if dtype == "float64":
        expected = oracle.logsumexp(np.array([exact]))
    measured = float(expected.errors(np.array(got, dtype)))
    assert measured > 1e30 if error == np.inf else measured == pytest.approx(error, abs=1e-4)
