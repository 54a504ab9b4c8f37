"""Reference of `mmd2_to_normal`: the formula, with the N×N×D differences in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


def smoothed(squares: Tensor, variances: Tensor, rates: Sequence[float], weights: Sequence[float]) -> Tensor:
    """Σ_q w_q E exp(−a_q |u|²) over u ~ N(δ, diag variances), from δ² [..., D] and the variances, broadcast to it."""
    return sum(w * torch.exp(-(a * squares / (1 + 2 * a * variances) + 0.5 * torch.log1p(2 * a * variances)).sum(-1))
               for a, w in zip(rates, weights, strict=True))


def mmd2_to_normal(x: Tensor, log_var: Tensor | None, rates: Sequence[float], weights: Sequence[float],
                   widths: Sequence[float], prior_std: float, biased: bool) -> Tensor:
    """x[N,D], log_var[N,D] or None -> MMD² []; rates and widths are in units of D σ²."""
    N, D = x.shape
    z = x / (prior_std * D**0.5)
    squares, one = (z[:, None] - z).square(), torch.ones_like(z[0])
    if log_var is None:
        variances, distances = torch.zeros_like(z), squares.sum(-1)
        pairs = sum(C / (C + distances) for C in widths) if len(widths) else smoothed(squares, 0 * one, rates, weights)
    else:
        variances = log_var.exp() / (prior_std**2 * D)
        pairs = smoothed(squares, variances[:, None] + variances, rates, weights)
    if not biased:
        pairs = pairs.masked_fill(torch.eye(N, dtype=torch.bool, device=x.device), 0.0)
    cross = smoothed(z.square(), variances + 1 / D, rates, weights)
    prior = smoothed(0 * one, 2 * one / D, rates, weights)
    return pairs.sum() / (N * N if biased else N * (N - 1)) - 2 * cross.mean() + prior
