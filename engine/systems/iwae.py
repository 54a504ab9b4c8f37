"""Importance-weighted autoencoders (Burda et al. 2016) and their kin, over one or two stochastic layers.

For S samples z_s ~ q(z | x) with the weights w_s = p(x, z_s) / q(z_s | x), the mean over the rows of a batch of a bound on
log p(x) is maximised. `kernels.importance` has the bounds and the estimators of their gradients:

    IWAE         log 1/S Σ w_s                               samples
    MIWAE        mean of M such bounds of S/M samples        groups = M             (Rainforth et al. 2018)
    CIWAE        β ELBO + (1 − β) IWAE                       elbo_weight = β        (the same)
    PIWAE        decoder: IWAE of S, encoder: MIWAE          estimator = "piwae"    (the same)
    VR-α         1/(1 − α) log 1/S Σ w_s^(1 − α)             alpha in [−∞, 1]       (Li & Turner 2016)
    VR-max       max_s log w_s                               alpha = −∞             (the same)
    STL, DReG    IWAE with less noise in the encoder's gradient    estimator        (Roeder et al. 2017; Tucker et al. 2019)

α = 1, or one sample, is the VAE with a Monte-Carlo KL. VR-max sends the best sample alone through the decoder a second
time, and only that one backwards.

Two layers, x ← z ← u, are `prior="hierarchical"`: one u ~ q(u | z) for each z, and p(u) p(z | u) / q(u | z) where a
prior has p(z) gives the weights of the pair (`priors.HierarchicalPrior`).

Traps. The bound is not its gradient: that is Σ w̃_s ∂log w_s, with normalised weights. Burda et al. train for 3,280
passes in eight stages of falling learning rate, with batches of 20, and draw the binary pixels anew in each pass.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import bounds
from ..bounds import Posterior
from ..kernels import importance_log_weights, importance_objective
from ..system import Batch
from .ae import AE
from .vae import VAE, EncoderConfig


@dataclass(frozen=True)
class IWAEConfig(EncoderConfig):
    """Defaults: Burda et al. 2016 (§5) with one stochastic layer."""

    samples: int = 50  # of z for a row
    estimator: Literal["iwae", "stl", "dreg", "piwae"] = "iwae"  # of the gradient
    alpha: float = 0.0  # order of the Rényi bound, at most 1; −inf is VR-max
    groups: int = 1  # of the samples; the mean of their bounds, or of the encoder's with piwae
    elbo_weight: float = 0.0  # in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha <= 1:
            raise ValueError(f"alpha must be at most 1, the order of the ELBO, given {self.alpha}.")
        if self.groups < 1 or self.samples % self.groups:
            raise ValueError(f"groups must divide the {self.samples} samples, given {self.groups}.")
        if not 0 <= self.elbo_weight <= 1:
            raise ValueError(f"elbo_weight must lie in [0, 1], given {self.elbo_weight}.")
        if self.alpha == -math.inf and (self.estimator in ("dreg", "piwae") or self.groups > 1 or self.elbo_weight):
            raise ValueError("VR-max (alpha=-inf) goes by one sample: it needs estimator 'iwae' or 'stl', groups=1 and "
                             "elbo_weight=0.")
        if self.prior == "hierarchical" and self.estimator != "iwae":
            raise ValueError(f"estimator={self.estimator!r} is that of one stochastic layer; with prior='hierarchical' "
                             "use 'iwae'.")
        if self.posterior_flow != "none" and self.estimator != "iwae":
            raise ValueError(f"estimator={self.estimator!r} is that of a Gaussian posterior; with "
                             f"posterior_flow={self.posterior_flow!r} use 'iwae'.")
        if self.likelihood == "gaussian" and self.gamma == "optimal":
            raise ValueError("gamma='optimal' is the best variance for an ELBO, not for a bound of weighted samples; "
                             "use 'learned'.")


class IWAE(VAE):
    """An IWAE of observations of `shape` (C, H, W); networks, children and methods are those of `VAE`."""

    name = "iwae"
    config_type = IWAEConfig
    config: IWAEConfig

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sums over pixels and latents, mean over the batch, in nats; "total" is the negative bound, with MAE's regularisers.

        "log_px_z" is a mean over the samples, for VR-max of one layer that of the best one.
        """
        config, posterior, alpha = self.config, self.encode(batch.x), self.config.alpha
        base, kl_to_normal = bounds.reparametrize_with_kl(posterior, config.samples)
        if alpha == -math.inf and config.prior != "hierarchical":
            base, alpha = self._best(base, posterior, batch.x), 0.0
        z, log_det = self._transform(base, posterior)
        log_px_z, log_pz = self.likelihood.log_prob(self._decoder_output(z, batch.x), batch.x), self._log_pz(z, log_det)
        bound = importance_objective(base, *posterior, log_px_z, log_pz, estimator=config.estimator, alpha=alpha,
                                     groups=config.groups, elbo_weight=config.elbo_weight)
        with torch.no_grad():
            log_px_z, kl = bounds.mean_log_px_z(log_px_z), bounds.mean_kl(self._kl(posterior, kl_to_normal, log_pz))
        return self._regularized({"total": -bound.mean(), "log_px_z": log_px_z, "kl": kl}, posterior)

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """As of `AE`: what is maximised is not the ELBO."""
        return AE.summarize(self, means, phase)

    def _best(self, base: Tensor, posterior: Posterior, x: Tensor) -> Tensor:
        """The sample of largest weight of each row, `[S, N, D]` -> `[1, N, D]`."""
        with torch.no_grad():
            z, log_det = self._transform(base, posterior)
            log_px_z = self.likelihood.log_prob(self._decoder_output(z, x), x)
            best = importance_log_weights(base, *posterior, log_px_z, self._log_pz(z, log_det)).argmax(0)
        return base[best, torch.arange(len(x), device=x.device)][None]
