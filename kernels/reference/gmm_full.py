"""Reference of `gmm_full_log_prob` and `gmm_full_moments`: the formulas, with N×K×D values in memory."""

import math

import torch
from torch import Tensor

from .gmm import normalise


def gmm_full_log_prob(z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """z[N,D] means[K,D] precision_cholesky[K,D,D] log_weights[K] -> log-density [N], responsibilities [N,K]."""
    chol = precision_cholesky.triu()
    white = torch.einsum("nki,kij->nkj", z[:, None, :] - means, chol)
    log_det = chol.diagonal(dim1=1, dim2=2).log().sum(1)
    logits = log_weights + log_det - 0.5 * (white.square() + math.log(2 * math.pi)).sum(-1)
    return normalise(logits)


def gmm_full_moments(z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor,
                     weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-density [N], and with a = weights·r: Σ a [K], Σ a δ [K,D] and Σ a δ δᵀ [K,D,D] over rows, δ = z − means."""
    log_prob, coef = gmm_full_log_prob(z, means, precision_cholesky, log_weights)
    if weights is not None:
        coef = coef * weights[:, None]
    delta = z[:, None, :] - means
    return (log_prob, coef.sum(0), torch.einsum("nk,nki->ki", coef, delta),
            torch.einsum("nk,nki,nkj->kij", coef, delta, delta))
