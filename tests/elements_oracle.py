"""The exact answers where every element stands alone, and divergences of rows, in mpmath; and errors in ULP.

Every function gives pairs for the elements: the exact result, and the largest of its terms.
"""

import mpmath
import numpy as np
from oracle import FORMATS


def exact(a):
    return [mpmath.mpf(float(v)) for v in np.asarray(a).ravel()]


def alone(values):
    return [(v, v) for v in values]


def sigmoid(x):
    return alone(1 / (1 + mpmath.exp(-v)) for v in exact(x))


def sigmoid_backward(g, y):
    return alone(a * v * (1 - v) for a, v in zip(exact(g), exact(y), strict=True))


def logit(p):
    return alone(mpmath.log(v / (1 - v)) for v in exact(p))


def binary_cross_entropy(x, t, pos_weight=1.0):
    w = mpmath.mpf(pos_weight)
    return alone(
        w * q * mpmath.log1p(mpmath.exp(-v)) + (1 - q) * mpmath.log1p(mpmath.exp(v))
        for v, q in zip(exact(x), exact(t), strict=True)
    )


def binary_cross_entropy_backward(g, x, t, pos_weight=1.0):
    result = []
    for a, v, q in zip(exact(g), exact(x), exact(t), strict=True):
        up, down = a * (1 - q) / (1 + mpmath.exp(-v)), a * mpmath.mpf(pos_weight) * q / (1 + mpmath.exp(v))
        result.append((up - down, max(abs(up), abs(down))))
    return result


def logarithms(row, temperature):
    """log softmax of a row."""
    x = [mpmath.mpf(v) / mpmath.mpf(float(temperature)) for v in exact(row)]
    top = max(x)
    lse = top + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in x))
    return [v - lse for v in x]


def kl_divergence(x, y, temperature=1.0):
    result = []
    for p, q in zip(x, y, strict=True):
        p, q = logarithms(p, temperature), logarithms(q, temperature)
        terms = [mpmath.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if mpmath.isfinite(a)]
        result.append((mpmath.fsum(terms), max(map(abs, terms))))
    return result


def kl_divergence_backward(g, x, y, temperature=1.0):
    result = []
    for a, p, q in zip(exact(g), x, y, strict=True):
        a = a / mpmath.mpf(float(temperature))
        for b, c in zip(logarithms(p, temperature), logarithms(q, temperature), strict=True):
            b, c = a * mpmath.exp(b), a * mpmath.exp(c)
            result.append((c - b, max(abs(b), abs(c))))
    return result


def ulps(got, pairs):
    """The largest error in ULP of the largest term, of the dtype of the result; NaN where there is one."""
    got = np.asarray(got)
    fmt = FORMATS[got.dtype]
    errors = [0.0]
    for g, (value, scale) in zip(got.ravel(), pairs, strict=True):
        largest = max(abs(value), abs(scale))
        power = mpmath.frexp(largest)[1] if largest else fmt.emin
        unit = mpmath.ldexp(1, max(int(power), fmt.emin + 1) - fmt.bits)
        errors.append(float(abs(mpmath.mpf(float(g)) - value) / unit))
    return float(np.max(errors))  # Python's max passes over NaN
