"""Variational bounds of models with a diagonal Gaussian encoder q(z | x) = N(μ, σ²): their parts, as functions of tensors.

    ELBO = E_q[log p(x | z)] − KL(q(z | x) ‖ p(z))                                     (Kingma & Welling 2014, Eq. 3)
    KL to N(0, I) = ½ Σ_d (μ² + σ² − 1 − log σ²)                                       (the same, appendix B)
    KL to any p(z) ≈ −H(q) − mean over samples of log p(z), H(q) = ½ Σ_d (log σ² + 1 + log 2π)

Bounds of several samples are `latent_engine.kernels.importance_objective`. What takes the place of the KL in a loss:

    free bits, batch        max(mean_n Σ_d KL_nd, λ)          as the code of Ma et al. 2019 (MAE): no gradient below λ
    free bits, dimension    Σ_d max(mean_n KL_nd, λ)          (Kingma et al. 2016, Eq. 15, a group a dimension)
    target KL               |mean_n Σ_d KL_nd − C|            (Burgess et al. 2018, Eq. 8)

and of log p(x | z), against outliers among the rows (β-divergence: Futami et al. 2018; Akrami et al. 2022):

    (1 + β)/β · (p(x | z)^β − 1) − ∫ p(x' | z)^(1 + β) dx'    →  log p(x | z) − 1 for β → 0

whose gradient weighs a row by p(x | z)^β.

All in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from . import kernels


class Posterior(NamedTuple):
    """q(z | x) of N rows, a diagonal Gaussian: `mean` and `log_var`, the logarithm of the variance, `[N, D]`."""

    mean: Tensor
    log_var: Tensor


def reparametrize(posterior: Posterior, samples: int, generator: Generator | None = None) -> Tensor:
    """z = μ + σ ε `[S, N, D]`, ε ~ N(0, I), differentiable in the posterior."""
    return reparametrize_with_kl(posterior, samples, generator)[0]


def reparametrize_with_kl(posterior: Posterior, samples: int | None = None,
                          generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """z `[S, N, D]`, or one sample `[N, D]` without `samples`, and `kl_to_normal(posterior)`, in one pass."""
    mean, log_var = posterior
    if samples is None and generator is None:
        return kernels.reparametrize(mean, log_var)
    if mean.device.type == "cpu":
        return kernels.reparametrize(mean, log_var, kernels.noise_keys(samples, generator))
    shape = mean.shape if samples is None else (samples, *mean.shape)
    noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return kernels.reparametrize(mean, log_var, noise)


def kl_to_normal(posterior: Posterior) -> Tensor:
    """KL(q(z | x) ‖ N(0, I)) of each row and dimension, in nats, `[N, D]`."""
    mean, log_var = posterior
    return 0.5 * (mean.square() + log_var.expm1() - log_var)


def kl_between(posterior: Posterior, prior: Posterior) -> Tensor:
    """KL(q ‖ p) of diagonal Gaussians, each dimension by itself, in nats, `[..., D]`."""
    log_ratio = posterior.log_var - prior.log_var
    return 0.5 * ((posterior.mean - prior.mean).square() * (-prior.log_var).exp() + log_ratio.expm1() - log_ratio)


def entropy(posterior: Posterior) -> Tensor:
    """Entropy of q(z | x) of each row, in nats, `[N]`."""
    return 0.5 * (posterior.log_var + (1 + math.log(2 * math.pi))).sum(-1)


def mean_over_samples(values: Tensor) -> Tensor:
    """`[S, N]`, or `[N]` of one sample -> `[N]`."""
    return values.mean(0) if values.dim() > 1 else values


def mean_log_px_z(log_px_z: Tensor) -> Tensor:
    """Mean over rows and samples: `[N]` or `[S, N]` -> a scalar."""
    return log_px_z.sum() / log_px_z.numel()  # as `mean_kl`: between networks a `mean` beside its `sum` costs 18 µs more


def mean_kl(kl: Tensor) -> Tensor:
    """Mean over rows: `[N]` or `[N, D]`, summed over dimensions -> a scalar."""
    return kl.sum() / kl.size(0)


def free_bits(kl: Tensor, nats: float) -> Tensor:
    """max(mean over rows of the KL, λ): `[N]` or `[N, D]`, summed over dimensions -> a scalar."""
    return mean_kl(kl).clamp(min=nats)


def free_bits_per_dimension(kl: Tensor, nats: float) -> Tensor:
    """Σ over dimensions of max(mean over rows of the KL, λ): `[N, D]` -> a scalar."""
    return kl.mean(0).clamp(min=nats).sum()


def distance_to_target(kl: Tensor, nats: Tensor | float) -> Tensor:
    """|mean over rows of the KL − C|: `[N]` or `[N, D]`, summed over dimensions -> a scalar."""
    return (mean_kl(kl) - nats).abs()


def beta_divergence_score(log_px_z: Tensor, log_power_integral: Tensor, beta: float) -> Tensor:
    """Robust counterpart of log p(x | z), to be maximised; one of all features together, so that β is small for many.

    `log_power_integral` is log ∫ p(x' | z)^(1 + β) dx', of a shape that broadcasts against `log_px_z`.
    """
    return (1 + beta) / beta * (beta * log_px_z).expm1() - log_power_integral.exp()


def linear_warmup(step: Tensor, steps: int) -> Tensor:
    """0 before the first step, 1 from step number `steps` on, linear between (Bowman et al. 2016; Sønderby et al. 2016)."""
    return (step / steps).clamp(max=1)


def cyclical_warmup(step: Tensor, steps: int, rise: float = 0.5) -> Tensor:
    """A linear rise from 0 to 1 over the first `rise` of each cycle of `steps` steps, then 1 (Fu et al. 2019, Eq. 7)."""
    return (step % steps / (rise * steps)).clamp(max=1)
