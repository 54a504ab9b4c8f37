"""The likelihoods from their definitions: 80-bit arithmetic, log-Gamma functions of SciPy (float64) or mpmath.

Each function gives, elementwise, the log-density with its gradients in x and the parameters, and the sum of the magnitudes
of the terms of each.
"""

import mpmath
import numpy as np
from scipy import special

from . import longdouble, sum_to


def bernoulli(x, l):
    tail = np.exp(-np.abs(l))
    linear, curved = x * l - np.maximum(l, 0), np.log1p(tail)
    error = np.where(l > 0, x - 1 + tail / (1 + tail), x - tail / (1 + tail))
    return (linear - curved, l, error), (np.abs(linear) + curved, np.abs(l), np.abs(error))


def gaussian(x, m, v):
    t, log_2pi = (x - m) * np.exp(-v / 2), np.log(2 * np.pi * np.ones((), np.longdouble))
    dm = t * np.exp(-v / 2)
    return ((-0.5 * (t * t + v + log_2pi), -dm, dm, 0.5 * (t * t - 1)),
            (0.5 * (t * t + np.abs(v) + log_2pi), np.abs(dm), np.abs(dm), 0.5 * (t * t + 1)))


def discretized_logistic(x, m, log_s):
    s = np.exp(log_s)
    upper, lower = (x - m + np.longdouble(1) / 255) / s, (x - m - np.longdouble(1) / 255) / s
    first, last = x < -1 + np.longdouble(1) / 255, x > 1 - np.longdouble(1) / 255
    softplus = lambda y: np.maximum(y, 0) + np.log1p(np.exp(-np.abs(y)))  # noqa: E731
    sigmoid = lambda y: np.exp(-softplus(-y))  # noqa: E731
    w = upper - lower
    terms = (np.where(last, 0, -softplus(-upper)), np.where(first, 0, -softplus(lower)),
             np.where(first | last, 0, np.log(-np.expm1(-w))))
    a, b = np.where(last, 0, sigmoid(-upper)), np.where(first, 0, sigmoid(lower))
    width = np.where(first | last, 0, w * np.exp(-w) / -np.expm1(-w))
    zero, rounding = np.zeros_like(a * m), np.abs(upper) * a + np.abs(lower) * b
    return ((sum(terms), zero, (b - a) / s, lower * b - upper * a - width),
            (sum(np.abs(t) for t in terms) + rounding, zero, (a + b) * (1 + np.abs(upper) + np.abs(lower)) / s,
             rounding * (1 + np.abs(upper) + np.abs(lower)) + width))


def negative_binomial(x, mean, log_r, exact=False):
    if exact:
        with mpmath.workdps(40):
            log_gamma, digamma = (np.vectorize(lambda y, f=f: np.longdouble(mpmath.nstr(f(mpmath.mpf(str(y))), 25)),
                                               otypes=[np.longdouble]) for f in (mpmath.loggamma, mpmath.digamma))
            gammas, digammas = _gammas(x, np.exp(log_r), log_gamma, digamma)
    else:
        gammas, digammas = _gammas(x.astype(float), np.exp(log_r).astype(float), special.gammaln, special.digamma)
    r = np.exp(log_r)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mean = np.where(x > 0, x * (np.log(mean) - np.log(mean + r)), 0)
        value = gammas - r * np.log1p(mean / r) + log_mean
        dmean = np.where(x > 0, r * (x - mean) / (mean * (mean + r)), -r / (mean + r))  # x / μ − (x + r) / (μ + r)
    dlog_r = r * (digammas - np.log1p(mean / r) - (x - mean) / (mean + r))
    size = np.abs(value) + np.abs(x - mean) + 1
    return ((value, np.zeros_like(value), dmean, dlog_r),
            (size, np.zeros_like(value), np.abs(dmean), np.abs(dlog_r) + np.abs(x - mean) * r / (mean + r) + x / (x + r)))


def _gammas(x, r, log_gamma, digamma):
    """log Γ(x + r) − log Γ(r) − log x! and ψ(x + r) − ψ(r); neither has rounding errors at x = 0."""
    x, r = np.broadcast_arrays(x, r)
    return (np.where(x > 0, log_gamma(x + r) - log_gamma(r) - log_gamma(x + 1), 0),
            np.where(x > 0, digamma(x + r) - digamma(r), 0))


LIKELIHOODS = (bernoulli, gaussian, discretized_logistic, negative_binomial)


def exact(kind, tensors, mask, grad, event_dims=1, **options):
    """Sum over features and the gradients of all `tensors` (x first) for the incoming gradient `grad`; and their scales."""
    arrays = np.broadcast_arrays(*(longdouble(t) for t in tensors))
    observed = np.broadcast_to(True if mask is None else mask.cpu().numpy(), arrays[0].shape)
    arrays = [np.where(observed, a, 1) for a in arrays]
    axes = tuple(range(-event_dims, 0))
    g = longdouble(grad)[(...,) + (None,) * event_dims]
    results = []
    for weight, (value, *gradients) in zip((g, np.abs(g)), LIKELIHOODS[kind](*arrays, **options), strict=True):
        results.append([np.where(observed, value, 0).sum(axes),
                        *(sum_to(np.where(observed, weight * d, 0), tuple(t.shape))
                          for d, t in zip(gradients, tensors, strict=True))])
    return results
