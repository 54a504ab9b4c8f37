"""A VAE of two stochastic layers whose inference runs downwards, as its generation does (Tomczak & Welling 2018, §4).

    generation    z₂ ~ p(z₂),         z₁ ~ p(z₁ | z₂),       x ~ p(x | z₁, z₂)
    inference     z₂ ~ q(z₂ | x),     z₁ ~ q(z₁ | x, z₂)

All but p(z₂) and p(x | z₁, z₂) are diagonal Gaussians. Minimised is, as in `vae` and with its options,

    −E log p(x | z₁, z₂) + β [E KL(q(z₁ | x, z₂) ‖ p(z₁ | z₂)) + KL(q(z₂ | x) ‖ p(z₂))]

with the first KL divergence in closed form given z₂. The prior of z₂ is any of `vae`, in the paper a VampPrior, under which
the upper layer is not left unused, as it easily is under N(0, I). z₂ is the representation of a row, of `latent_dim`
dimensions, and what diagnostics of posteriors are of; log p(x) and reconstructions are of both layers.

Traps. The authors' code takes both KL divergences from samples, and its layers are gated, of 300 units; log-variances are
clamped to [−6, 2]. Here layers are those of `hidden`; the lower ones, and in p(z₁ | z₂), whatever `network` is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from .. import bounds, networks
from ..bounds import Posterior
from ..kernels import gaussian_log_prob, importance_log_weights
from ..system import Batch, OptimizerConfig, check_sizes
from .architectures import make_decoder
from .vae import VAE, VAEConfig, VAEOptim


def _adam() -> OptimizerConfig:
    return OptimizerConfig("adam", lr=1e-3)


@dataclass(frozen=True)
class HVAEOptim(VAEOptim):
    """Optimizer of each child."""

    lower_encoder: OptimizerConfig = field(default_factory=_adam)
    lower_prior: OptimizerConfig = field(default_factory=_adam)


@dataclass(frozen=True)
class HVAEConfig(VAEConfig):
    """Defaults: 40 dimensions a layer and networks of 300 units, as in the code of Tomczak & Welling."""

    latent_dim: int = 40  # of z₂
    lower_dim: int = 40  # of z₁
    hidden: tuple[int, ...] = (300, 300)
    posterior_flow: Literal["none"] = "none"
    free_bits_per: Literal["batch"] = "batch"
    optim: HVAEOptim = field(default_factory=HVAEOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(lower_dim=self.lower_dim)
        if not self.hidden:
            raise ValueError("hidden needs a layer, in which x and z₂ meet; given ().")


class LowerEncoder(nn.Module):
    """q(z₁ | x, z₂): layers of `hidden` units, the first one linear in x and z₂, so that x is read once for all z₂ of it."""

    def __init__(self, shape: Sequence[int], dim: int, lower_dim: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.of_x = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), hidden[0]))
        self.of_z = nn.Linear(dim, hidden[0], bias=False)
        self.joint = nn.Sequential(networks.ACTIVATIONS[activation](), *networks.mlp([*hidden, 2 * lower_dim], activation))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean and log-variance side by side, `[..., N, 2 lower_dim]`, of `x` `[N, C, H, W]` and `z` `[..., N, dim]`."""
        return self.joint(self.of_x(x) + self.of_z(z))


class HVAE(VAE):
    """A two-level VAE of observations of `shape` (C, H, W).

    `encoder` is as in `VAE`, for z₂; `decoder` maps z₂ and z₁ side by side, `[N, latent_dim + lower_dim]`.
    Children: those of `VAE`; `lower_encoder`, q(z₁ | x, z₂); `lower_prior`, p(z₁ | z₂).
    """

    name = "hvae"
    config_type = HVAEConfig
    config: HVAEConfig

    def __init__(self, config: HVAEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        dim, lower_dim, hidden = config.latent_dim, config.lower_dim, config.hidden
        decoder = decoder or make_decoder(replace(config, latent_dim=dim + lower_dim), tuple(shape))
        super().__init__(config, shape, encoder, decoder)
        self.lower_encoder = LowerEncoder(shape, dim, lower_dim, hidden, config.activation)
        self.lower_prior = networks.mlp([dim, *hidden, 2 * lower_dim], config.activation)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sums over pixels and latents of both layers, mean over the batch, in nats; "kl_lower" is of z₁, "kl" of both."""
        posterior = self.encode(batch.x)
        upper, kl_to_normal = bounds.reparametrize_with_kl(posterior, self.config.samples)
        given_x, given_upper = self._lower(batch.x, upper)
        output = self._decoder_output(torch.cat([upper, bounds.reparametrize(given_x, 1)[0]], -1))
        log_px_z, kl_lower = self.likelihood.log_prob(output, batch.x), bounds.kl_between(given_x, given_upper).sum(2).mean(0)
        kl_upper = self._divergence(posterior, kl_to_normal, upper, None)
        kl = kl_lower + (kl_upper.sum(1) if kl_upper.dim() > 1 else kl_upper)
        mean_log_px_z, mean_kl = bounds.mean_log_px_z(log_px_z), bounds.mean_kl(kl)
        total = self._kl_loss(kl, mean_kl) - self._fit(log_px_z, mean_log_px_z, output)
        return self._regularized({"total": total, "log_px_z": mean_log_px_z, "kl": mean_kl, "kl_lower": kl_lower.mean()},
                                 posterior)

    def log_weights(self, posterior: Posterior, x: Tensor, samples: int, generator: Generator | None = None) -> Tensor:
        """log p(x, z₁, z₂) − log q(z₁, z₂ | x) `[S, N]` for `samples` draws, in nats (see `VAE.log_weights`)."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1, given {samples}.")
        upper = bounds.reparametrize(posterior, samples, generator)
        given_x, given_upper = self._lower(x, upper)
        lower = bounds.reparametrize(given_x, 1, generator)[0]
        log_px = self.likelihood.log_prob(self._decoder_output(torch.cat([upper, lower], -1)), x)
        log_px = log_px + gaussian_log_prob(lower, *given_upper) - gaussian_log_prob(lower, *given_x)
        return importance_log_weights(upper, *posterior, log_px, self._log_pz(upper, None, generator))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z₁, z₂] `[..., C, H, W]` of z₂ `[..., latent_dim]`, at the mean of p(z₁ | z₂)."""
        return super().decode(torch.cat([z, self._given_upper(z).mean], -1))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z₁, z₂] at the means of q(z₂ | x) and, given that one, of q(z₁ | x, z₂)."""
        upper = self.represent(x)
        return super().decode(torch.cat([upper, self._lower(x, upper)[0].mean], -1))

    def _lower(self, x: Tensor, upper: Tensor) -> tuple[Posterior, Posterior]:
        """q(z₁ | x, z₂) and p(z₁ | z₂) of z₂ `[..., N, latent_dim]`."""
        return Posterior(*self.lower_encoder(x, upper).chunk(2, -1)), self._given_upper(upper)

    def _given_upper(self, upper: Tensor) -> Posterior:
        return Posterior(*self.lower_prior(upper).chunk(2, -1))

    def _sample_latent(self, n: int, generator: Generator | None, prior: nn.Module | None = None) -> Tensor:
        upper = super()._sample_latent(n, generator, prior)
        return torch.cat([upper, bounds.reparametrize(self._given_upper(upper), 1, generator)[0]], -1)
