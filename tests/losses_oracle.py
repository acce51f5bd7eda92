"""The exact cross-entropy of finite rows and its gradient, on the number systems of `oracle`.

The loss is a sum of terms that are not negative, so its unit is its own ULP, unless z_loss squares an lse
that is itself a difference. The unit of a gradient is that of the largest of its terms: Q p[j], q[j] and
2 z lse p[j]; and where one class holds most of a row's probability, there Q times the others' probability
in place of the first and q elsewhere in place of the second: nothing is lost next to p = 1.
"""

from typing import NamedTuple

import numpy as np
from oracle import DTYPES, FORMATS, SIXTEEN_BIT, Expected, exp, log1p, mapped, number, select, total


class Row(NamedTuple):
    shifted: object  # (x - m) / T
    terms: object  # exp of that
    others: object  # the sum of the terms but for one maximum
    s: object
    lse: object
    peak: object


def forward(x, temperature, wide):
    values = x.astype(np.float64)
    keep = np.isfinite(values)
    m = np.where(keep, values, -np.inf).max(1, keepdims=True)
    values = np.where(keep, values, m)
    t = number(float(temperature), wide)
    shifted = (number(values, wide) - number(m, wide)) / t
    terms = select(keep, exp(shifted))
    first = np.arange(x.shape[1]) == np.where(keep, values, -np.inf).argmax(1)[:, None]
    others = total(select(~first, terms))
    peak = number(m, wide) / t
    return Row(shifted, terms, others, number(1.0, wide) + others, peak + log1p(others), peak)


def weights_of(target, shape, smoothing, weight, wide):
    """q as numbers, from class indices or probabilities."""
    classes = shape[1]
    w = number(np.ones(classes) if weight is None else np.asarray(weight, np.float64), wide)
    eps, one = number(float(smoothing), wide), number(1.0, wide)
    spread = w * (eps / number(float(classes), wide))
    if np.ndim(target) == 2:
        return number(np.asarray(target), wide) * (w * (one - eps)) + spread
    here = np.arange(classes) == np.asarray(target)[:, None]
    everywhere = number(np.ones(shape), wide)
    return select(here, everywhere * (w * (one - eps))) + everywhere * spread


def expected(
    x, target, *, dtype=None, smoothing=0.0, weight=None, z_loss=0.0, temperature=1.0, factor=(1, 1)
):
    """Expected losses and gradients of all rows; gradients are times the fraction `factor`."""
    dtype = x.dtype if dtype is None else dtype
    wide = dtype == DTYPES["float64"]
    with np.errstate(all="ignore"):
        f = forward(x, temperature, wide)
        q = weights_of(target, x.shape, smoothing, weight, wide)
        mass = total(q)
        z, t = number(float(z_loss), wide), number(float(temperature), wide)
        g = number(float(factor[0]), wide) / number(float(factor[1]), wide) / t
        squared = z * f.lse * f.lse
        loss = mass * log1p(f.others) - total(q * f.shifted) + squared
        loss_scales = (z * f.peak * f.peak,) if z_loss else ()
        p = f.terms / f.s
        extra = number(2.0, wide) * z * f.lse * p
        value = (mass * p - q + extra) * g
        scales = [mass * p * g, q * g, extra * g]
        # where the others tell more: the class of an index target, or that of the largest probability
        at = target if np.ndim(target) == 1 else np.asarray(f.shifted.hi if wide else f.shifted).argmax(1)
        here = np.arange(x.shape[1]) == np.asarray(at)[:, None]
        others_p = total(select(~here, f.terms)) / f.s
        elsewhere = total(select(~here, q))
        precise = (elsewhere - mass * others_p + extra) * g
        is_most = here & (np.ndim(target) == 1 or is_above_half(p, wide))
        value = select(is_most, precise) + select(~is_most, value)
        fine = [mass * others_p * g, elsewhere * g, extra * g]
        scales = [
            select(is_most, a * number(np.ones(x.shape), wide)) + select(~is_most, b)
            for a, b in zip(fine, scales, strict=True)
        ]
    fmt = FORMATS[np.dtype(dtype)]
    none = np.zeros(x.shape), np.zeros(x.shape, bool)
    narrow = dtype in SIXTEEN_BIT
    flat = mapped(loss, lambda a: np.broadcast_to(a, (len(x), 1))[:, 0])
    loss_scales = tuple(mapped(s, lambda a: a[:, 0]) for s in loss_scales)
    return (
        Expected(flat, fmt, none[0][:, 0], none[1][:, 0], loss_scales),
        Expected(value, fmt, *none, scales, rounded_once=narrow),
    )


def is_above_half(p, wide):
    return np.ldexp(p.hi, np.clip(p.exp, -60, 2)) > 0.5 if wide else p > 0.5
