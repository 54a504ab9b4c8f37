"""VAE and β-VAE (Kingma & Welling 2014; Higgins et al. 2017), with Gaussian or Bernoulli decoders.

An encoder gives q(z | x) = N(μ(x), diag σ²(x)), a decoder p(x | z). A VAE minimises, as a mean over the rows of a batch,

    −E_q[log p(x | z)] + β KL(q(z | x) ‖ p(z))                              β = 1: the negative ELBO

with sums over pixels and latents, the expectation taken over `samples` reparametrised draws (one, in the paper). The KL
is in closed form for p(z) = N(0, I), else the entropy of q less the mean of log p(z) over the draws. `bounds` has its
schedules and what may take its place: free bits, a target. With `divergence_beta` log p(x | z) gives way to its robust
counterpart, which an outlier moves less: p(x | z)^β is of all pixels together, so a β of 0.01 is much for 784 binary
ones, and for densities it grows without bound with γ → 0.

Priors: N(0, I); a Gaussian mixture, fitted by maximum likelihood together with the rest, without the priors on its
parameters that a DGD has; `HierarchicalPrior`, which makes z the lower of two stochastic layers; `VampPrior`, the mixture
of the posteriors of learned pseudo-inputs; normalizing flows (`FlowPrior`).

`posterior_flow` puts a flow after the Gaussian (IAF: Kingma et al. 2016), z = f(z₀; h), with log q(z | x) = log q(z₀ | x) −
log |det ∂z/∂z₀|. Their context h is a further output of the encoder; ours is the mean and log-variance of z₀.

In training `diversity` and `smoothness` add MAE's regularisers, of the divergences between the posteriors of a batch
(`divergences`), to the loss of every model with posteriors. In evaluation mode they are left out, for what they are depends on
the batch: epochs are compared by the ELBO, as MAE's authors do.

Deep decoders may leave all of z unused, a local minimum from which `affine_skip`, a decoder f(z) + W z + b, and more
dimensions than the data have lead out; with a learned variance the superfluous ones turn to noise ("On the
Regularization Balance in Autoencoder-Based Generative Models", §4–6).

Traps. The loss is a sum over pixels; one that averages over them has β at 1/P of the value here. Schuster & Krogh
(A.2) multiply their β by latent_dim / P, which `normalize_beta` does, and do not say whether their squared error is a
mean; a summed squared error is a Gaussian of the fixed variance ½. Their VAE has a ReLU on the means and a sigmoid on
the deviations, which keeps posteriors in the positive orthant of N(0, I) and narrower than it: `heads`.
γ is treated in `likelihoods`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .. import bounds
from ..balance import balance
from ..bounds import Posterior
from ..data import Data
from ..divergences import data_parallel, mutual_divergence
from ..kernels import importance_log_weights
from ..priors import flow_for, prior_for
from ..system import Batch, OptimizerConfig, check_sizes, check_weights
from .ae import AE, AEConfig, AEOptim, adam


@dataclass(frozen=True)
class VAEOptim(AEOptim):
    """Optimizer of each child."""

    prior: OptimizerConfig = field(default_factory=adam)
    flow: OptimizerConfig = field(default_factory=adam)  # of the posterior


@dataclass(frozen=True)
class EncoderConfig(AEConfig):
    """What models with a Gaussian encoder share."""

    prior: Literal["normal", "mixture", "hierarchical", "vamp", "maf", "iaf", "realnvp"] = "normal"
    components: int = 10  # of the mixture; pseudo-inputs of the VampPrior
    pseudo_inputs: Literal["random", "data"] = "random"  # that it starts from: noise, or training rows
    top_dim: int = 50  # of the upper layer of the hierarchical prior; latent_dim is that of the lower one
    top_hidden: tuple[int, ...] = (100, 100)  # layers between the two
    posterior_flow: Literal["none", "iaf", "realnvp"] = "none"  # after the Gaussian
    flow_blocks: int = 8  # of a flow, prior or posterior
    flow_hidden: tuple[int, ...] = (320,)  # layers of each block
    heads: Literal["linear", "relu_sigmoid"] = "linear"  # relu_sigmoid: means ≥ 0, deviations < 1 (DGD paper's baseline)
    samples: int = 1  # of z for a row
    diversity: float = 0.0  # η of MAE, weight of L_diverse
    diversity_form: Literal["paper", "code"] = "paper"  # MAE's Eq. 8, or what its authors' code has
    smoothness: float = 0.0  # γ of MAE, weight of L_smooth
    optim: VAEOptim = field(default_factory=VAEOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(components=self.components, top_dim=self.top_dim, top_hidden=self.top_hidden, samples=self.samples,
                    flow_blocks=self.flow_blocks, flow_hidden=self.flow_hidden)
        check_weights(diversity=self.diversity, smoothness=self.smoothness)
        if self.posterior_flow != "none" and (self.diversity or self.smoothness):
            raise ValueError("diversity and smoothness are those of Gaussian posteriors; set them to 0 with "
                             f"posterior_flow={self.posterior_flow!r}.")
        if self.prior == "vamp" and self.posterior_flow != "none":
            raise ValueError(f"prior='vamp' is a mixture of Gaussian posteriors; with posterior_flow={self.posterior_flow!r} "
                             "use another prior.")


@dataclass(frozen=True)
class VAEConfig(EncoderConfig):
    """Defaults: the VAE of Burda et al. 2016 (§5) with one stochastic layer."""

    beta: float = 1.0  # weight of the KL divergence
    normalize_beta: bool = False  # times latent_dim / dimensions of x
    warmup: Literal["none", "linear", "cyclical"] = "none"  # of beta, or of target_kl where there is one
    warmup_steps: int = 0  # of the rise; of a cycle, of which it takes the first half
    free_bits: float = 0.0  # nats of KL without gradient
    free_bits_per: Literal["batch", "dimension"] = "batch"  # for the mean KL of a batch, or in each dimension
    target_kl: float = 0.0  # > 0: beta |KL − target_kl|, in nats
    divergence_beta: float = 0.0  # > 0: robust reconstruction by the β-divergence of this β

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(beta=self.beta, free_bits=self.free_bits, target_kl=self.target_kl, warmup_steps=self.warmup_steps,
                      divergence_beta=self.divergence_beta)
        if (self.warmup != "none") != (self.warmup_steps > 0):
            raise ValueError(f"warmup={self.warmup!r} and warmup_steps={self.warmup_steps} contradict each other: "
                             "a warm-up takes at least one step, and none takes 0.")
        if self.divergence_beta and self.likelihood == "gaussian" and self.gamma == "optimal":
            raise ValueError("gamma='optimal' is the best variance for an ELBO, not under divergence_beta; use 'learned'.")
        if self.free_bits and self.target_kl:
            raise ValueError("free_bits and target_kl both take the place of the KL divergence: set one of them to 0.")
        if self.free_bits and self.free_bits_per == "dimension" and (self.prior, self.posterior_flow) != ("normal", "none"):
            of = "of a posterior with a flow" if self.prior == "normal" else f"to a {self.prior} prior"
            raise ValueError(f"The KL divergence {of} has no part for each dimension: free_bits_per='dimension' needs "
                             "prior='normal' and posterior_flow='none'.")


class VAE(AE):
    """A VAE of observations of `shape` (C, H, W).

    `encoder` maps `[N, C, H, W]` to `[N, 2 latent_dim]`, the mean of q(z | x) and its log-variance side by side;
    `decoder` is as in `AE`.
    Children: `encoder`, `decoder`, `prior`, `likelihood` where its variance is not fixed, `flow` of a posterior that has one.
    The buffer `step`, from which `warmup` is derived, counts the steps of the trainer.
    """

    name = "vae"
    config_type = VAEConfig
    config: VAEConfig
    outputs = 2

    def __init__(self, config: VAEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(config, shape, encoder, decoder)
        self.prior = prior_for(config, self.encode, self.shape)
        self.flow = flow_for(config)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def for_data(cls, config: VAEConfig, data: Data) -> "VAE":
        """As of `AE`; with pseudo_inputs="data" the VampPrior starts from rows of `data` too."""
        system = super().for_data(config, data)
        if config.prior == "vamp" and config.pseudo_inputs == "data":
            system.prior.start_from(data.x)
        return system

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sums over pixels and latents, mean over the batch, in nats."""
        posterior, samples = self.encode(batch.x), self.config.samples
        base, kl_to_normal = bounds.reparametrize_with_kl(posterior, None if samples == 1 else samples)
        z, log_det = self._transform(base, posterior)
        output = self._decoder_output(z, batch.x)
        log_px_z, kl = self.likelihood.log_prob(output, batch.x), self._divergence(posterior, kl_to_normal, z, log_det)
        mean_log_px_z, mean_kl = bounds.mean_log_px_z(log_px_z), bounds.mean_kl(kl)
        total = self._kl_loss(kl, mean_kl) - self._fit(log_px_z, mean_log_px_z, output)
        return self._regularized({"total": total, "log_px_z": mean_log_px_z, "kl": mean_kl}, posterior)

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """As of `AE`; where its two parts are among the means, "elbo", in nats, too."""
        if {"log_px_z", "kl"} <= means.keys():
            means = {**means, "elbo": means["log_px_z"] - means["kl"]}
        return super().summarize(means, phase)

    @property
    def smallest_batch(self) -> int:
        """Two rows are the first pair to compare."""
        return 2 if self.config.diversity or self.config.smoothness else 1

    def after_step(self, step: int) -> None:
        self.step.fill_(step)

    def monitor(self, x: Tensor, prior: nn.Module | None = None) -> dict[str, Any]:
        """The balance of regularisation and reconstruction (`balance.balance`), of a Gaussian posterior."""
        if len(x) < 2 or self.flow is not None:
            return {}
        return {f"balance/{name}": value for name, value in balance(self, x, prior=prior).items()}

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) of each row of `x` `[N, C, H, W]`; with a `posterior_flow` the Gaussian q(z₀ | x) before it."""
        mean, second = self.encoder(x).chunk(2, 1)
        if self.config.heads == "relu_sigmoid":
            return Posterior(mean.relu(), 2 * F.logsigmoid(second))
        return Posterior(mean, second)

    @torch.no_grad()
    def represent(self, x: Tensor) -> Tensor:
        """Posterior means `[N, D]` of `x` `[N, C, H, W]`; with a `posterior_flow` what it maps that of z₀ to."""
        self.check_rows(x)
        posterior = self.encode(x)
        return self._transform(posterior.mean, posterior)[0]

    def log_weights(self, posterior: Posterior, x: Tensor, samples: int, generator: Generator | None = None) -> Tensor:
        """log p(x, z_s) − log q(z_s | x) `[S, N]` for `samples` draws z_s ~ q(z | x), in nats.

        The log of the mean of their exponentials is a lower bound of log p(x), in expectation, that grows with S. Under a
        hierarchical prior the upper layer is drawn too.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, given {samples}.")
        base = bounds.reparametrize(posterior, samples, generator)
        z, log_det = self._transform(base, posterior)
        log_px_z = self.likelihood.log_prob(self._decoder_output(z, x), x)
        return importance_log_weights(base, *posterior, log_px_z, self._log_pz(z, log_det, generator))

    def _sample_latent(self, n: int, generator: Generator | None, prior: nn.Module | None = None) -> Tensor:
        return (prior or self.prior).sample(n, generator)

    def _transform(self, base: Tensor, posterior: Posterior) -> tuple[Tensor, Tensor | None]:
        """z `[..., N, D]` of z₀, and log |det ∂z/∂z₀| `[..., N]`; without a flow they are the same, and it is None."""
        return (base, None) if self.flow is None else self.flow(base, torch.cat(posterior, 1))

    def _log_pz(self, z: Tensor, log_det: Tensor | None = None, generator: Generator | None = None) -> Tensor | None:
        """Log-density of the prior in z₀, log p(z) + log |det ∂z/∂z₀| `[S, N]`; None for N(0, I), which the kernels know."""
        if self.config.prior == "normal" and log_det is None:
            return None
        log_pz = self.prior(z, generator=generator) if self.config.prior == "hierarchical" else self.prior(z)
        return log_pz if log_det is None else log_pz + log_det

    def _divergence(self, posterior: Posterior, kl_to_normal: Tensor, z: Tensor, log_det: Tensor | None) -> Tensor:
        """The KL divergence of the loss, `[N, D]` or `[N]`."""
        return self._kl(posterior, kl_to_normal, self._log_pz(z, log_det))

    def _kl(self, posterior: Posterior, kl_to_normal: Tensor, log_pz: Tensor | None) -> Tensor:
        """KL(q(z | x) ‖ p(z)), `[N, D]` where it has a closed form, else an estimate from log p(z) of samples, `[N]`."""
        return kl_to_normal if log_pz is None else -bounds.entropy(posterior) - bounds.mean_over_samples(log_pz)

    def _fit(self, log_px_z: Tensor, mean_log_px_z: Tensor, output: Tensor) -> Tensor:
        """What stands for the mean of log p(x | z) in the loss, a scalar."""
        beta = self.config.divergence_beta
        if not beta:
            return mean_log_px_z
        integral = self.likelihood.log_power_integral(output, 1 + beta, len(self.shape))
        return bounds.beta_divergence_score(log_px_z, integral, beta).mean()

    def _regularized(self, terms: dict[str, Tensor], posterior: Posterior) -> dict[str, Tensor]:
        """The terms of a loss, in training with MAE's regularisers in the total and beside it, where they have a weight."""
        config = self.config
        if not (self.training and (config.diversity or config.smoothness)):
            return terms
        penalty, parts = mutual_divergence(posterior, config.diversity, config.smoothness, form=config.diversity_form,
                                           group=data_parallel())
        return {**terms, "total": terms["total"] + penalty, **parts}

    def _kl_loss(self, kl: Tensor, mean_kl: Tensor) -> Tensor:
        """What stands for the mean KL in the loss, a scalar."""
        config, ramp = self.config, self._ramp()
        weight = config.beta * (config.latent_dim / math.prod(self.shape) if config.normalize_beta else 1)
        if config.target_kl:
            return weight * bounds.distance_to_target(kl, ramp * config.target_kl)
        if config.free_bits:
            free = bounds.free_bits if config.free_bits_per == "batch" else bounds.free_bits_per_dimension
            mean_kl = free(kl, config.free_bits)
        weight = weight * ramp
        return mean_kl if not isinstance(weight, Tensor) and weight == 1 else weight * mean_kl

    def _ramp(self) -> Tensor | float:
        """From 0 to 1, by `warmup`; in evaluation mode at its end, so that losses of different epochs compare."""
        config = self.config
        if config.warmup == "none" or not self.training:
            return 1.0
        schedule = bounds.linear_warmup if config.warmup == "linear" else bounds.cyclical_warmup
        return schedule(self.step, config.warmup_steps)
