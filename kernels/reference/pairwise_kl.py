"""Reference of `pairwise_kl` and `pairwise_kl_diversity`: the formulas, with the N×N×D divergences in memory."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def pair_divergences(mu: Tensor, log_var: Tensor) -> Tensor:
    """mu[N,D] log_var[N,D] -> KL_d(i‖j) for the ordered pairs i ≠ j, [N(N−1), D]."""
    delta = mu[:, None] - mu[None]
    ratio = (log_var.exp()[:, None] + delta.square()) * torch.exp(-log_var)[None]
    kl = 0.5 * (log_var[None] - log_var[:, None] + ratio - 1)
    N, D = mu.shape
    # Rows of N + 1 that start after the first element end on the diagonal.
    return kl.reshape(N * N, D)[1:].reshape(N - 1, N + 1, D)[:, :-1].reshape(N * (N - 1), D)


def pairwise_kl(mu: Tensor, log_var: Tensor, std: bool = True) -> tuple[Tensor, Tensor | None]:
    """mu[N,D] log_var[N,D] -> mean of KL_d [D], standard deviation of Σ_d KL_d [] over ordered pairs."""
    kl = pair_divergences(mu, log_var)
    return kl.mean(0), kl.sum(1).std() if std else None


def pairwise_kl_diversity(mu: Tensor, log_var: Tensor) -> Tensor:
    """mu[N,D] log_var[N,D] -> Σ_d mean over ordered pairs of softplus(−KL_d), []."""
    return softplus(-pair_divergences(mu, log_var)).mean(0).sum()
