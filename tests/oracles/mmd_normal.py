"""The squared MMD to a normal prior in 80-bit arithmetic: by integration of its own, and the sum of Gaussian kernels that the
package makes of it, with gradients written out."""

import numpy as np
import torch

from . import longdouble

WAE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def dense_nodes(C: float, panels: int = 60, degree: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Rates and weights of C / (C + r²) = ∫ C exp(−(C + r²) τ) dτ: composite Gauss-Legendre over log τ in [−45, 6] − log C."""
    x, w = np.polynomial.legendre.leggauss(degree)
    edges = np.linspace(-45.0, 6.0, panels + 1) - np.log(C)
    half = 0.5 * np.diff(edges)[:, None]
    logs = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * x).ravel()
    rates = np.exp(logs.astype(np.longdouble))
    return rates, (half * w).ravel() * rates * C * np.exp(-C * rates)


def smoothed(squares, variances, C, kernel, chunk=100):
    """E k(|u|²) of one scale over u ~ N(δ, diag variances), from δ²[..., D] and variances[..., D]."""
    if kernel == "imq" and not np.any(variances):
        return C / (C + squares.sum(-1))
    rates, weights = dense_nodes(float(C)) if kernel == "imq" else (np.array([1 / C]), np.ones(1))
    total = np.zeros(squares.shape[:-1], np.longdouble)
    for i in range(0, rates.size, chunk):
        a = rates[i:i + chunk]
        t = 1 + 2 * variances[..., None] * a
        total += (weights[i:i + chunk] * np.exp(-((a * squares[..., None] / t) + 0.5 * np.log(t)).sum(-2))).sum(-1)
    return total


def integral(x, log_var=None, kernel="imq", scales=WAE, estimator="unbiased", prior_std=1.0) -> tuple[float, float]:
    """The value, and the sum of the magnitudes of its three terms."""
    x = longdouble(x)
    v = np.zeros_like(x) if log_var is None else np.exp(longdouble(log_var))
    (N, D), p = x.shape, np.longdouble(prior_std) ** 2
    value = size = np.longdouble(0)
    for scale in scales:
        C = 2 * D * p * np.longdouble(scale)
        pairs = smoothed((x[:, None] - x) ** 2, v[:, None] + v, C, kernel)
        if estimator == "unbiased":
            np.fill_diagonal(pairs, 0)
        terms = (pairs.sum() / (N * N if estimator == "biased" else N * (N - 1)),
                 2 * smoothed(x**2, v + p, C, kernel).mean(),
                 smoothed(0 * x[0], 0 * x[0] + 2 * p, C, kernel))
        value, size = value + terms[0] - terms[1] + terms[2], size + sum(terms)
    return float(value), float(size)


def _terms(delta, variances, rates, weights, info):
    """Of Σ_q w_q E exp(−a_q |u|²): the value [...], ∂/∂δ and ∂/∂variances [..., D], and the magnitudes of their terms, with
    the size of the exponent, because an error of eps·size there is one of eps·size in the term."""
    shape = delta.shape
    value, slope = np.zeros(shape[:-1], np.longdouble), np.zeros(shape, np.longdouble)
    spread, value_size, slope_size, spread_size = slope.copy(), value.copy(), slope.copy(), slope.copy()
    for a, w in zip(rates, weights, strict=True):
        t = variances + 1 / (2 * np.longdouble(a))
        ratio = delta / t
        exponent = 0.5 * ((ratio * delta).sum(-1) + np.log((2 * a * t).prod(-1)))
        e = np.exp(-exponent)
        lost = np.minimum(e, info.tiny) / (4 * info.eps)  # exp is 0 below the smallest normal number; the budget is 4 eps
        e, wide = w * e, w * (e * (1 + exponent) + lost)
        value += e
        value_size += wide
        e, wide = e[..., None], wide[..., None]
        slope -= e * ratio
        spread += 0.5 * e * (ratio**2 - 1 / t)
        slope_size += wide * np.abs(ratio)
        spread_size += 0.5 * wide * (ratio**2 + 1 / t)
    return value, slope, spread, value_size, slope_size, spread_size


def exact(x, log_var, rates, weights, widths, estimator="unbiased") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Value and gradients of the sum of Gaussian kernels, or of the inverse multiquadrics `widths` between points; σ = 1.

    The second list holds the scales: the sums of the magnitudes of the terms.
    """
    info = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
    x = longdouble(x)
    N, D = x.shape
    v = np.zeros_like(x) if log_var is None else np.exp(longdouble(log_var))
    delta, a = x[:, None] - x, np.array(rates, np.longdouble) / D
    if widths:
        squares = (delta**2).sum(-1)
        C = np.array(widths, np.longdouble)[:, None, None] * D
        kernel = (C / (C + squares)).sum(0)
        slope = -2 * (C / (C + squares) ** 2).sum(0)[..., None] * delta
        spread = np.zeros_like(delta)
        sizes = kernel, np.abs(slope), spread
    else:
        kernel, slope, spread, *sizes = _terms(delta, v[:, None] + v, a, weights, info)
    keep = np.ones((N, N)) if estimator == "biased" else 1 - np.eye(N)
    norm = keep.sum()
    kernel, kernel_size = kernel * keep, sizes[0] * keep
    slope, spread, slope_size, spread_size = (t * keep[..., None] for t in (slope, spread, *sizes[1:]))
    cross = _terms(x, v + 1, a, weights, info)
    prior = _terms(0 * x[0], 0 * x[0] + 2, a, weights, info)[0]
    mean, twice = cross[0].mean(), 2 / np.longdouble(N)
    outputs = [kernel.sum() / norm - 2 * mean + prior, 2 * slope.sum(1) / norm - twice * cross[1],
               v * (2 * spread.sum(1) / norm - twice * cross[2])]
    scales = [kernel_size.sum() / norm + 2 * cross[3].mean() + prior, 2 * slope_size.sum(1) / norm + twice * cross[4],
              v * (2 * spread_size.sum(1) / norm + twice * cross[5])]
    count = 2 if log_var is None else 3
    return [np.asarray(o) for o in outputs[:count]], [np.asarray(s) for s in scales[:count]]
