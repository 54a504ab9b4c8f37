"""Observation models p(x | decoder output), summed over the features of a row.

    Bernoulli   log p = Σ_p x_p l_p − softplus(l_p)               l: logits
    Gaussian    log p = −½ Σ_p (x_p − m_p)²/σ² + log(2π σ²)       m: means, σ: fixed standard deviation

Both are affine in statistics of x: every row against every candidate is one matrix product (`pairwise_log_prob`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from . import kernels


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Σ over features of log Bernoulli(x; sigmoid(logits)): `[N, ...]`, x in [0, 1] of that shape -> `[N]`, in nats."""
    return kernels.bernoulli_log_prob(x, logits, event_dims=x.dim() - 1)


def gaussian_log_prob(mean: Tensor, x: Tensor, std: float) -> Tensor:
    """Σ over features of log N(x; mean, std²): `[N, ...]`, x of that shape -> `[N]`, in nats."""
    log_var = torch.full((), 2 * math.log(std), dtype=x.dtype, device=x.device)
    return kernels.gaussian_log_prob(x, mean, log_var, event_dims=x.dim() - 1)


@dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli features; the decoder gives logits. For x in (0, 1) this is the usual cross entropy."""

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` against `[N, ...]` -> `[N]`."""
        return bernoulli_log_prob(logits, x)

    def pairwise_log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """Each of N rows of `x` against each of K decoded candidates -> `[N, K]`."""
        logits = logits.flatten(1)
        return torch.addmm(-F.softplus(logits).sum(1), x.flatten(1), logits.T)

    def mean(self, logits: Tensor) -> Tensor:
        """E[x], of the shape of `logits`."""
        return logits.sigmoid()

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        """x of zeros and ones, of the shape of `logits`."""
        return torch.bernoulli(logits.sigmoid(), generator=generator)


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian features of one fixed standard deviation `std`; the decoder gives means."""

    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"The standard deviation of a Gaussian likelihood must be positive, given {self.std}.")

    def log_prob(self, mean: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` against `[N, ...]` -> `[N]`."""
        return gaussian_log_prob(mean, x, self.std)

    def pairwise_log_prob(self, mean: Tensor, x: Tensor) -> Tensor:
        """Each of N rows of `x` against each of K decoded candidates -> `[N, K]`."""
        mean, x = mean.flatten(1), x.flatten(1)
        squared = torch.cdist(x, mean, compute_mode="use_mm_for_euclid_dist").square()
        return -0.5 * squared / self.std**2 - x.shape[1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

    def mean(self, mean: Tensor) -> Tensor:
        """E[x] is the decoder's output."""
        return mean

    def sample(self, mean: Tensor, generator: Generator | None = None) -> Tensor:
        """x of the shape of `mean`."""
        return mean + self.std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
