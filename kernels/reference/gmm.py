"""References of `gmm_log_prob` and `gmm_moments`: the formulas, with the N×K×D differences in memory."""

import math

import torch
from torch import Tensor


def allowed_mask(labels: Tensor | None, allowed: Tensor | None, components: int) -> Tensor | None:
    """The boolean mask [N, K] that `labels` and `allowed` stand for, or None if every component is allowed."""
    if labels is None:
        return allowed
    if allowed is None:
        allowed = torch.eye(components, dtype=torch.bool, device=labels.device)
    return allowed[labels.clamp(min=0)] | (labels < 0)[:, None]


def gmm_log_prob(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, labels: Tensor | None = None,
                 allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z[N,D] means[K,D] log_vars[K,D] log_weights[K] -> log-density [N], responsibilities [N,K]."""
    squared = (z[:, None, :] - means).square() * torch.exp(-log_vars)
    logits = log_weights - 0.5 * (squared + log_vars + math.log(2 * math.pi)).sum(-1)
    mask = allowed_mask(labels, allowed, means.shape[0])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return normalise(logits)


def normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N,K] -> their log-sum-exp [N], and each one's share of it [N,K]."""
    # A row whose every term is zero has log-density −inf; 0/0 must reach neither its responsibilities nor its gradients.
    dead = (logits == -torch.inf).all(1)
    log_sum = logits.masked_fill(dead[:, None], 0.0).logsumexp(1)
    return log_sum.masked_fill(dead, -torch.inf), (logits - log_sum.masked_fill(dead, 0.0)[:, None]).exp()


def gmm_moments(weights: Tensor, z: Tensor, means: Tensor, log_vars: Tensor,
                log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weights[N] z[N,D] and a mixture -> log-density [N], Σ w r [K], Σ w r (z − means) and Σ w r (z − means)² [K,D]."""
    log_prob, r = gmm_log_prob(z, means, log_vars, log_weights)
    a, delta = weights[:, None] * r, z[:, None, :] - means
    return log_prob, a.sum(0), (a[..., None] * delta).sum(0), (a[..., None] * delta.square()).sum(0)
