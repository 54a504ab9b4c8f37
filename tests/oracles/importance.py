"""Importance-weighted bounds in 80-bit arithmetic; Pareto k̂ of one set of weights at a time."""

import math

import numpy as np

from . import longdouble

NAMES = ("bound", "log_w", "z", "mu", "log_var", "log_px")


def exact(z, mu, log_var, log_px, log_pz=None, *, alpha=0.0, elbo_weight=0.0, groups=1, grad) -> tuple[list, list]:
    """Bound, log-weights and the gradients of z, mu, log_var and log_px for the incoming gradient `grad` of the bound.

    The second list holds the scale of each: the sum of the magnitudes of its terms, of which those with a weight carry the
    size of its logarithm, because an error of eps·size there is one of eps·size in the weight.
    """
    z, mu, log_var, log_px, g = (longdouble(t) for t in (z, mu, log_var, log_px, grad))
    delta, inverse = z - mu, np.exp(-log_var)
    log_2pi = np.log(2 * np.pi * np.ones((), np.longdouble))
    quadratic = delta**2 * inverse
    if log_pz is None:
        log_w = log_px + 0.5 * (quadratic - z**2 + log_var).sum(-1)
        size = abs(log_px) + 0.5 * (quadratic + z**2 + abs(log_var)).sum(-1)
    else:
        log_w = log_px + longdouble(log_pz) + 0.5 * (quadratic + log_var + log_2pi).sum(-1)
        size = abs(log_px) + abs(longdouble(log_pz)) + 0.5 * (quadratic + abs(log_var) + log_2pi).sum(-1)
    size = np.where(np.isinf(size), 0, size)  # of a weight of zero
    bound, weights = bound_and_weights(log_w, alpha, elbo_weight, groups)
    power = 1.0 if math.isinf(alpha) else abs(1 - alpha)
    wide = abs(weights) * (1 + power * (size + np.where(weights != 0, size, 0).max(0, initial=0)))

    def outputs(value, x, coef, d, point, sign):
        moved = d * inverse + sign * point if log_pz is None else d * inverse
        c = coef[..., None]
        return [value, x, c * moved, -sign * (c * d * inverse).sum(0), 0.5 * (c * (1 + sign * d**2 * inverse)).sum(0), coef]

    return (outputs(bound, log_w, g * weights, delta, z, -1),
            outputs((np.where(weights != 0, weights, 0) * size).sum(0), size, abs(g) * wide, abs(delta), abs(z), 1))


def bound_and_weights(log_w: np.ndarray, alpha: float, elbo_weight: float, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The bound over log w [S, N] and its gradient."""
    S, N = log_w.shape
    values, weights = zip(*(_renyi(part, alpha) for part in log_w.reshape(groups, S // groups, N)), strict=True)
    renyi, weights = sum(values) / groups, np.concatenate(weights) / groups
    if elbo_weight == 0:
        return renyi, weights
    return elbo_weight * log_w.mean(0) + (1 - elbo_weight) * renyi, elbo_weight / S + (1 - elbo_weight) * weights


def _renyi(x: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    if alpha == 1:
        return x.mean(0), np.full_like(x, 1 / np.longdouble(len(x)))
    if math.isinf(alpha):
        best = x.max(0) if alpha < 0 else x.min(0)
        return best, (x == best) / (x == best).sum(0).astype(x.dtype)
    power = 1 - np.longdouble(alpha)
    y = power * x
    top = y.max(0)
    e = np.exp(y - np.where(top == -np.inf, 0, top))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean, bound = x.mean(0), (top + np.log(e.mean(0))) / power
        # the logarithm loses eps / power, which matters where all weights are nearly one
        close = np.where(top - y.mean(0) < 1, np.log1p(np.expm1(power * (x - mean)).mean(0)) / power + mean, bound)
        return close, e / np.where(top == -np.inf, 1, e.sum(0))


def pareto_k(log_w: np.ndarray) -> float:
    """k̂ of one set of log-weights, step by step after Vehtari et al. (2024) with the fit of Zhang & Stephens (2009)."""
    S = len(log_w)
    x = np.sort(np.asarray(log_w, float))
    x -= x[-1]
    size = math.ceil(min(0.2 * S, 3 * math.sqrt(S)))
    if size < 5:
        return math.inf
    threshold = max(x[S - size - 1], math.log(np.finfo(float).tiny))
    excess = [math.exp(v) - math.exp(threshold) for v in x if v > threshold]
    n = len(excess)
    if n < 5:
        return math.inf
    quartile = excess[int(n / 4 + 0.5) - 1]
    candidates, profile = [], []
    for j in range(1, 31 + int(math.sqrt(n))):
        b = (1 - math.sqrt((30 + int(math.sqrt(n))) / (j - 0.5))) / (3 * quartile) + 1 / excess[-1]
        k = sum(math.log1p(-b * e) for e in excess) / n
        candidates.append(b)
        profile.append(n * (math.log(-b / k) - k - 1))
    weights = [1 / sum(math.exp(other - own) for other in profile) if max(profile) - own < 700 else 0.0 for own in profile]
    kept = [(w, b) for w, b in zip(weights, candidates, strict=True) if w >= 10 * np.finfo(float).eps]
    b = sum(w * b for w, b in kept) / sum(w for w, _ in kept)
    k = sum(math.log1p(-b * e) for e in excess) / n
    return (n * k + 5) / (n + 10)
