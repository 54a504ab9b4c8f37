"""Log-weights of importance samples and the variational bounds over them, in plain PyTorch; notation and formulas are in
kernels/importance.py."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
NARROW = 2.0**-10  # |1 − α| · (max − mean) of log-weights below which their mean is closer to the bound than a rough value


def log_weights(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor, log_pz: Tensor | None = None) -> Tensor:
    """z[S,N,D] mu[N,D] log_var[N,D] log_px[S,N] log_pz[S,N] -> log w [S,N]; without log_pz the prior is N(0, I)."""
    log_q = -0.5 * ((z - mu).square() * torch.exp(-log_var) + log_var + LOG_2PI).sum(-1)
    if log_pz is None:
        log_pz = -0.5 * (z.square() + LOG_2PI).sum(-1)
    return log_px + log_pz - log_q


def bound(log_w: Tensor, alpha: float = 0.0, elbo_weight: float = 0.0, groups: int = 1) -> Tensor:
    """log w [S,N] -> elbo_weight · ELBO + (1 − elbo_weight) · mean over groups of the Rényi bound, [N]."""
    if elbo_weight == 1:
        return log_w.mean(0)
    renyi = _renyi(log_w.unflatten(0, (groups, -1)), alpha).mean(0)
    return renyi if elbo_weight == 0 else elbo_weight * log_w.mean(0) + (1 - elbo_weight) * renyi


def _renyi(log_w: Tensor, alpha: float) -> Tensor:
    """log w [G,K,N] -> 1/(1 − alpha) · log mean over K of w^(1 − alpha), [G,N], and its limits at ±∞."""
    if math.isinf(alpha):
        return log_w.amax(1) if alpha < 0 else log_w.amin(1)
    scaled = (1 - alpha) * log_w
    # A column without any weight has bound −inf; 0/0 must not reach its gradient.
    dead = (scaled == -torch.inf).all(1)
    log_sum = scaled.masked_fill(dead[:, None], 0.0).logsumexp(1).masked_fill(dead, -torch.inf)
    value = (log_sum - math.log(log_w.shape[1])) / (1 - alpha)
    return value if abs(1 - alpha) >= 1 else _refined(log_w, value, alpha)


def _refined(log_w: Tensor, value: Tensor, alpha: float) -> Tensor:
    """The bound [G,N] from a rough one; the logarithm of a mean next to 1 has lost what the division by 1 − alpha shows."""
    mean, power = log_w.detach().mean(1), 1 - alpha
    top = log_w.detach().amax(1) if alpha < 1 else log_w.detach().amin(1)
    centre = torch.where(power * (top - mean) < NARROW, mean, value.detach())
    finite = centre.isfinite()
    deviation = log_w.masked_fill(~finite[:, None], 0.0) - centre.masked_fill(~finite, 0.0)[:, None]
    return torch.where(finite, centre + torch.log1p(torch.expm1(power * deviation).mean(1)) / power, value)


def normalised_weights(log_w: Tensor, alpha: float = 0.0, elbo_weight: float = 0.0, groups: int = 1) -> Tensor:
    """∂bound / ∂log w, [S,N]."""
    if elbo_weight == 1:
        return torch.full_like(log_w, 1 / log_w.shape[0])
    grouped = log_w.unflatten(0, (groups, -1))
    if math.isinf(alpha):
        best = (grouped == (grouped.amax(1, keepdim=True) if alpha < 0 else grouped.amin(1, keepdim=True))).to(log_w)
        weights = best / best.sum(1, keepdim=True)
    else:
        scaled = (1 - alpha) * grouped
        dead = (scaled == -torch.inf).all(1, keepdim=True)
        weights = scaled.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
    return elbo_weight / log_w.shape[0] + (1 - elbo_weight) / groups * weights.flatten(0, 1)


def dreg_factor(weights: Tensor, alpha: float, elbo_weight: float, groups: int) -> Tensor:
    """By what DReG multiplies the gradient that reaches z, given ∂bound / ∂log w [S,N]: 1 − (1 − α)(1 − w̃) for plain bounds."""
    renyi = weights - elbo_weight / weights.shape[0]
    within = renyi * (groups / (1 - elbo_weight))
    return torch.where(weights > 0, 1 - (1 - alpha) * (1 - within) * (renyi / weights), 0.0)


def piwae_factor(decoder: Tensor, encoder: Tensor) -> Tensor:
    """By what PIWAE multiplies the gradient that reaches z; 0 where the decoder's weight is not a normal number."""
    return torch.where(decoder < torch.finfo(decoder.dtype).tiny, 0.0, encoder / decoder)
