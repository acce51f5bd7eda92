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
        # where the others tell more: the class of an index target, or that of the largest probability, above 1/2
        at = target if np.ndim(target) == 1 else np.asarray(f.shifted.hi if wide else f.shifted).argmax(1)
        here = np.arange(x.shape[1]) == np.asarray(at)[:, None]
        others_p = total(select(~here, f.terms)) / f.s
        elsewhere = total(select(~here, q))
        precise = (elsewhere - mass * others_p + extra) * g
        is_most = here & is_above_half(p, wide)
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


def plain_cross_entropy(
    x, target, g=1.0, *, axis=-1, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    temperature=1.0, reduction="mean",
):  # fmt: skip
    """Loss and gradient of finite arrays of any shape, by the formula in extended precision."""
    shape, x = x.shape, np.moveaxis(x.astype(np.longdouble), axis, -1) / np.longdouble(temperature)
    n = x.shape[-1]
    w = np.ones(n) if weight is None else weight.astype(np.longdouble)
    if target.shape == shape:
        counts, share = np.ones(x.shape[:-1], bool), np.moveaxis(target, axis, -1)
        divisor = counts.size
    else:
        counts = target != ignore_index
        share = np.eye(n)[np.where(counts, target, 0)]
        divisor = (share @ w)[counts].sum()
    q = w * ((1 - np.longdouble(label_smoothing)) * share + np.longdouble(label_smoothing) / n)
    z = np.longdouble(z_loss) * (divisor / counts.sum() if reduction == "mean" else 1)
    m = x.max(-1, keepdims=True)
    lse = m + np.log(np.exp(x - m).sum(-1, keepdims=True))
    loss = np.where(counts, (q * (lse - x)).sum(-1) + z * lse[..., 0] ** 2, 0)
    grad = ((q.sum(-1, keepdims=True) + 2 * z * lse) * np.exp(x - lse) - q) / np.longdouble(temperature)
    grad = np.moveaxis(grad * counts[..., None] * np.expand_dims(g, -1), -1, axis)
    if reduction == "none":
        return loss, grad
    return (loss.sum() / divisor, grad / divisor) if reduction == "mean" else (loss.sum(), grad)


def plain_divergence(x, y, g=1.0, *, axis=-1, temperature=1.0, reduction="mean"):
    """As ``plain_cross_entropy``, for ``kl_divergence``."""
    logs = []
    for a in x, y:
        a = np.moveaxis(a.astype(np.longdouble), axis, -1) / np.longdouble(temperature)
        a = a - a.max(-1, keepdims=True)
        logs.append(a - np.log(np.exp(a).sum(-1, keepdims=True)))
    p, q = map(np.exp, logs)
    loss = (p * (logs[0] - logs[1])).sum(-1)
    grad = np.moveaxis((q - p) / np.longdouble(temperature) * np.expand_dims(g, -1), -1, axis)
    if reduction == "none":
        return loss, grad
    return (loss.mean(), grad / loss.size) if reduction == "mean" else (loss.sum(), grad)


def is_above_half(p, wide):
    return np.ldexp(p.hi, np.clip(p.exp, -60, 2)) > 0.5 if wide else p > 0.5
