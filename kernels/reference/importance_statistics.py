"""Moments of importance weights and the shape of their tail, in plain PyTorch; notation and formulas are in
kernels/importance_statistics.py."""

import torch
from torch import Tensor


def moments(log_w: Tensor) -> Tensor:
    """log w [S,N] -> float64 [4,N]: m = max log w, Σ exp(log w − m), Σ exp(2 (log w − m)), Σ log w."""
    x = log_w.double()
    top = x.amax(0) if len(x) else x.new_full(x.shape[1:], -torch.inf)
    shifted = (x - top.masked_fill(top.isinf(), 0.0)).exp()
    return torch.stack((top, shifted.sum(0), shifted.square().sum(0), x.sum(0)))


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """The moments [4,N] of two sets of samples taken together."""
    top = torch.maximum(a[0], b[0])
    shift = top.masked_fill(top.isinf(), 0.0)
    first, second = ((m[0] - shift).exp() for m in (a, b))
    return torch.stack((top, a[1] * first + b[1] * second, a[2] * first.square() + b[2] * second.square(), a[3] + b[3]))


def generalised_pareto_shape(x: Tensor) -> Tensor:
    """Shape k of a generalised Pareto distribution fitted to x[n,N] > 0, ascending along n; [N].

    The empirical-Bayes estimate of Zhang & Stephens (2009), shrunk towards 0.5 by ten observations as Vehtari et al. (2024)
    do.
    """
    n = len(x)
    grid = 30 + int(n**0.5)
    steps = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device)[:, None]
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile)
    k = torch.stack([torch.log1p(-row * x).mean(0) for row in b])
    log_likelihood = n * ((-b / k).log() - k - 1)
    weights = log_likelihood.softmax(0)
    weights = torch.where(weights >= 10 * torch.finfo(x.dtype).eps, weights, 0.0)
    b_mean = (b * weights).sum(0) / weights.sum(0)
    shape = torch.log1p(-b_mean * x).mean(0)
    return (n * shape + 5) / (n + 10)
