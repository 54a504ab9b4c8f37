"""Autoencoders: AE, VAE and β-VAE (Kingma & Welling 2014; Higgins et al. 2017), with Gaussian or Bernoulli decoders.

An encoder gives q(z | x) = N(μ(x), diag σ²(x)), a decoder p(x | z). A VAE minimises, as a mean over the rows of a batch,

    −E_q[log p(x | z)] + β KL(q(z | x) ‖ p(z))                              β = 1: the negative ELBO

with sums over pixels and latents, the expectation taken over `samples` reparametrised draws (one, in the paper). The KL
is in closed form for p(z) = N(0, I), else the entropy of q less the mean of log p(z) over the draws. `bounds` has its
schedules and what may take its place: free bits, a target. With `divergence_beta` log p(x | z) gives way to its robust
counterpart, which an outlier moves less: p(x | z)^β is of all pixels together, so a β of 0.01 is much for 784 binary
ones, and for densities it grows without bound with γ → 0. An AE has no posterior: −log p(x | f(x)) alone.

Priors: N(0, I); a Gaussian mixture, fitted by maximum likelihood together with the rest, without the priors on its
parameters that a DGD has; `HierarchicalPrior`, which makes z the lower of two stochastic layers.

Deep decoders may leave all of z unused, a local minimum from which `affine_skip`, a decoder f(z) + W z + b, and more
dimensions than the data have lead out; with a learned variance the superfluous ones turn to noise ("On the
Regularization Balance in Autoencoder-Based Generative Models", §4–6). `network="residual"` is its MNIST model, a decoder
of 3 residual blocks of 2 layers, whose widths it does not give; its encoder has 6 layers, 5 of them `hidden`.

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

from .. import bounds, networks
from ..balance import balance
from ..bounds import Posterior
from ..data import Data
from ..kernels import importance_log_weights
from ..likelihoods import (
    Bernoulli,
    DecodedGaussian,
    Gaussian,
    LearnedGaussian,
    OptimalGaussian,
    check_unit_interval,
)
from ..priors import GaussianMixturePrior, HierarchicalPrior, StandardNormal
from ..system import Batch, OptimizerConfig, System, check_choices, check_sizes


def _adam() -> OptimizerConfig:
    return OptimizerConfig("adam", lr=1e-3)


@dataclass(frozen=True)
class AEOptim:
    """Optimizer of each child."""

    encoder: OptimizerConfig = field(default_factory=_adam)
    decoder: OptimizerConfig = field(default_factory=_adam)
    likelihood: OptimizerConfig = field(default_factory=_adam)


@dataclass(frozen=True)
class VAEOptim(AEOptim):
    """Optimizer of each child."""

    prior: OptimizerConfig = field(default_factory=_adam)


@dataclass(frozen=True)
class AEConfig:
    """Defaults: the networks of Burda et al. 2016 (§5)."""

    latent_dim: int = 50
    network: Literal["mlp", "residual", "conv", "dgd", "dgd-shallow", "dgd-linear"] = "mlp"  # dgd: its A.3, for 32×32
    affine_skip: bool = False  # adds W z + b to the outputs of the decoder
    hidden: tuple[int, ...] = (200, 200)  # layers of mlp, the decoder's in reverse; of residual: the encoder's
    activation: Literal["tanh", "relu", "softplus"] = "tanh"  # of these layers
    capacity: int = 32  # channels that those of the other networks are multiples of
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # of a pixel
    mean_activation: Literal["identity", "sigmoid"] = "identity"  # of the Gaussian's mean
    # Variance of the Gaussian: learned, through its logarithm or that of its root, or the decoder's for each pixel.
    gamma: Literal["learned", "learned_std", "optimal", "fixed", "decoded"] = "learned"
    variance: float = 1.0  # its value if fixed, else where it starts
    optim: AEOptim = field(default_factory=AEOptim)

    def __post_init__(self) -> None:
        check_choices(self)
        check_sizes(latent_dim=self.latent_dim, hidden=self.hidden, capacity=self.capacity)
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be positive and finite, given {self.variance}.")


@dataclass(frozen=True)
class EncoderConfig(AEConfig):
    """What models with a Gaussian encoder share."""

    prior: Literal["normal", "mixture", "hierarchical"] = "normal"
    components: int = 10  # of the mixture
    top_dim: int = 50  # of the upper layer of the hierarchical prior; latent_dim is that of the lower one
    top_hidden: tuple[int, ...] = (100, 100)  # layers between the two
    heads: Literal["linear", "relu_sigmoid"] = "linear"  # relu_sigmoid: means ≥ 0, deviations < 1 (DGD paper's baseline)
    samples: int = 1  # of z for a row
    optim: VAEOptim = field(default_factory=VAEOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(components=self.components, top_dim=self.top_dim, top_hidden=self.top_hidden, samples=self.samples)


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
        for name in ("beta", "free_bits", "target_kl", "warmup_steps", "divergence_beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, given {getattr(self, name)}.")
        if (self.warmup != "none") != (self.warmup_steps > 0):
            raise ValueError(f"warmup={self.warmup!r} and warmup_steps={self.warmup_steps} contradict each other: "
                             "a warm-up takes at least one step, and none takes 0.")
        if self.divergence_beta and self.likelihood == "gaussian" and self.gamma == "optimal":
            raise ValueError("gamma='optimal' is the best variance for an ELBO, not under divergence_beta; use 'learned'.")
        if self.free_bits and self.target_kl:
            raise ValueError("free_bits and target_kl both take the place of the KL divergence: set one of them to 0.")
        if self.free_bits and self.free_bits_per == "dimension" and self.prior != "normal":
            raise ValueError(f"The KL divergence to a {self.prior} prior has no part for each dimension: "
                             "free_bits_per='dimension' needs prior='normal'.")


class AE(System):
    """An autoencoder of observations of `shape` (C, H, W).

    `encoder` maps `[N, C, H, W]` to `[N, latent_dim]`, `decoder` maps `[N, latent_dim]` to logits or means
    `[N, C, H, W]`, with gamma="decoded" to `[N, 2C, H, W]`; left out, they are those of `config.network`.
    Children: `encoder`, `decoder`, `likelihood` where its variance is not fixed.
    """

    name = "ae"
    config_type = AEConfig
    config: AEConfig
    outputs = 1  # of the encoder, for each latent dimension

    def __init__(self, config: AEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.shape = config, tuple(shape)
        self.encoder = encoder or _encoder(config, self.shape, self.outputs)
        self.decoder = decoder or _decoder(config, self.shape)
        self.likelihood = _likelihood(config)

    @classmethod
    def for_data(cls, config: AEConfig, data: Data) -> "AE":
        """A new system for images like `data`, whose mean its decoder starts from."""
        system = cls(config, data.x.shape[1:])
        system.check(data)
        mean = data.x.mean(0)
        if config.likelihood == "bernoulli" or config.mean_activation == "sigmoid":
            mean = mean.clamp(1e-3, 1 - 1e-3).logit()
        if _is_decoded(config):
            mean = torch.cat([mean, torch.full_like(mean, math.log(config.variance))])
        networks.set_output_bias(system.decoder, mean)
        return system

    def arguments(self) -> dict[str, Any]:
        return {"config": self.config, "shape": self.shape}

    def check(self, data: Data) -> None:
        self.check_rows(data.x)
        if self.config.likelihood == "bernoulli":
            check_unit_interval(data.x)
        elif not bool(data.x.isfinite().all()):
            raise ValueError("The data have values that are not finite; leave those rows out.")

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sum over pixels, mean over the batch, in nats."""
        log_px_z = self.likelihood.log_prob(self.decoder(self.encoder(batch.x)), batch.x).mean()
        return {"total": -log_px_z, "log_px_z": log_px_z, **self._gamma()}

    @torch.no_grad()
    def represent(self, x: Tensor) -> Tensor:
        """Representations `[N, D]` of `x` `[N, C, H, W]`."""
        self.check_rows(x)
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] `[..., C, H, W]` of `z` `[..., D]`."""
        return self.likelihood.mean(self._decoder_output(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z] at the representation of each row of `x`."""
        return self.decode(self.represent(x))

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None, *, noise: bool = False,
               prior: nn.Module | None = None) -> Tensor:
        """E[x | z] `[n, C, H, W]`, or with `noise` draws from p(x | z), for z from the prior.

        `prior` takes its place, e.g. a mixture fitted to the representations (`mixtures`). An AE has no prior of its own, and
        what it decodes z ~ N(0, I) to is not like the data unless by chance.
        """
        z = self._sample_latent(n, generator) if prior is None else prior.sample(n, generator)
        output = self._decoder_output(z)
        return self.likelihood.sample(output, generator) if noise else self.likelihood.mean(output)

    def _sample_latent(self, n: int, generator: Generator | None) -> Tensor:
        like = next(self.parameters())
        return torch.randn(n, self.config.latent_dim, generator=generator, dtype=like.dtype, device=like.device)

    def _decoder_output(self, z: Tensor) -> Tensor:
        """What the likelihood takes: `[..., D]` -> `[..., C, H, W]`."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def _gamma(self) -> dict[str, Tensor]:
        """The variance of a Gaussian decoder, for the log."""
        adapts = isinstance(self.likelihood, nn.Module)
        return {"gamma": self.likelihood.variance.detach()} if adapts else {}


class VAE(AE):
    """A VAE of observations of `shape` (C, H, W).

    `encoder` maps `[N, C, H, W]` to `[N, 2 latent_dim]`, the mean of q(z | x) and its log-variance side by side;
    `decoder` is as in `AE`.
    Children: `encoder`, `decoder`, `prior`, `likelihood` where its variance is not fixed.
    The buffer `step`, from which `warmup` is derived, counts the steps of the trainer.
    """

    name = "vae"
    config_type = VAEConfig
    config: VAEConfig
    outputs = 2

    def __init__(self, config: VAEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(config, shape, encoder, decoder)
        self.prior = _prior(config)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sums over pixels and latents, mean over the batch, in nats."""
        posterior = self.encode(batch.x)
        z = bounds.reparametrize(posterior, self.config.samples)
        output = self._decoder_output(z)
        log_px_z, kl = self.likelihood.log_prob(output, batch.x), self._divergence(posterior, z)
        mean_log_px_z, mean_kl = log_px_z.mean(), bounds.mean_kl(kl)
        total = self._kl_loss(kl, mean_kl) - self._fit(log_px_z, mean_log_px_z, output)
        return {"total": total, "log_px_z": mean_log_px_z, "kl": mean_kl,
                "elbo": mean_log_px_z.detach() - mean_kl.detach(), **self._gamma()}

    def after_step(self, step: int) -> None:
        self.step.fill_(step)

    def monitor(self, x: Tensor, prior: nn.Module | None = None) -> dict[str, Any]:
        """The balance of regularisation and reconstruction (`balance.balance`)."""
        return {f"balance/{name}": value for name, value in balance(self, x, prior=prior).items()} if len(x) > 1 else {}

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) of each row of `x` `[N, C, H, W]`."""
        mean, second = self.encoder(x).chunk(2, 1)
        if self.config.heads == "relu_sigmoid":
            return Posterior(mean.relu(), 2 * F.logsigmoid(second))
        return Posterior(mean, second)

    @torch.no_grad()
    def represent(self, x: Tensor) -> Tensor:
        """Posterior means `[N, D]` of `x` `[N, C, H, W]`."""
        self.check_rows(x)
        return self.encode(x).mean

    def log_weights(self, posterior: Posterior, x: Tensor, samples: int, generator: Generator | None = None) -> Tensor:
        """log p(x, z_s) − log q(z_s | x) `[S, N]` for `samples` draws z_s ~ q(z | x), in nats.

        The log of the mean of their exponentials is a lower bound of log p(x), in expectation, that grows with S. Under a
        hierarchical prior the upper layer is drawn too.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, given {samples}.")
        z = bounds.reparametrize(posterior, samples, generator)
        log_px_z = self.likelihood.log_prob(self._decoder_output(z), x)
        return importance_log_weights(z, *posterior, log_px_z, self._log_pz(z, generator))

    def _sample_latent(self, n: int, generator: Generator | None) -> Tensor:
        return self.prior.sample(n, generator)

    def _log_pz(self, z: Tensor, generator: Generator | None = None) -> Tensor | None:
        """log p(z) `[S, N]`; None for N(0, I), which the kernels know."""
        if self.config.prior == "normal":
            return None
        return self.prior(z, generator=generator) if self.config.prior == "hierarchical" else self.prior(z)

    def _divergence(self, posterior: Posterior, z: Tensor) -> Tensor:
        """The KL divergence of the loss, `[N, D]` or `[N]`."""
        return self._kl(posterior, self._log_pz(z))

    def _kl(self, posterior: Posterior, log_pz: Tensor | None) -> Tensor:
        """KL(q(z | x) ‖ p(z)), `[N, D]` where it has a closed form, else an estimate from log p(z) of samples, `[N]`."""
        return bounds.kl_to_normal(posterior) if log_pz is None else -bounds.entropy(posterior) - log_pz.mean(0)

    def _fit(self, log_px_z: Tensor, mean_log_px_z: Tensor, output: Tensor) -> Tensor:
        """What stands for the mean of log p(x | z) in the loss, a scalar."""
        beta = self.config.divergence_beta
        if not beta:
            return mean_log_px_z
        integral = self.likelihood.log_power_integral(output, 1 + beta, len(self.shape))
        return bounds.beta_divergence_score(log_px_z, integral, beta).mean()

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


def _encoder(config: AEConfig, shape: tuple[int, ...], outputs: int) -> nn.Module:
    if config.network in ("mlp", "residual"):
        return networks.mlp_encoder(shape, outputs * config.latent_dim, config.hidden, config.activation)
    if config.network == "conv":
        return networks.conv_encoder(shape, outputs * config.latent_dim, config.capacity)
    parts = [networks.dgd_cifar_encoder(config.latent_dim, shape, config.capacity, _depth(config)) for _ in range(outputs)]
    return parts[0] if outputs == 1 else networks.SideBySide(*parts)


def _decoder(config: AEConfig, shape: tuple[int, ...]) -> nn.Module:
    if _is_decoded(config):
        shape = (2 * shape[0], *shape[1:])
    if config.network == "mlp":
        decoder = networks.mlp_decoder(config.latent_dim, shape, config.hidden[::-1], config.activation)
    elif config.network == "residual":
        if not config.hidden:
            raise ValueError("network='residual' takes the width of its decoder from the last of hidden, given ().")
        decoder = networks.residual_decoder(config.latent_dim, shape, config.hidden[-1])
    elif config.network == "conv":
        decoder = networks.conv_decoder(config.latent_dim, shape, config.capacity)
    else:
        decoder = networks.dgd_cifar_decoder(config.latent_dim, shape, config.capacity, _depth(config))
    if config.affine_skip:
        decoder = networks.AffineBridge(decoder, config.latent_dim, math.prod(shape))
    squash = config.likelihood == "gaussian" and config.mean_activation == "sigmoid" and not _is_decoded(config)
    return nn.Sequential(decoder, nn.Sigmoid()) if squash else decoder


def _is_decoded(config: AEConfig) -> bool:
    """Whether the decoder gives variances too."""
    return config.likelihood == "gaussian" and config.gamma == "decoded"


def _depth(config: AEConfig) -> str:
    return config.network.partition("-")[2] or "standard"


def _likelihood(config: AEConfig) -> Bernoulli | Gaussian | DecodedGaussian | LearnedGaussian | OptimalGaussian:
    if config.likelihood == "bernoulli":
        return Bernoulli()
    if config.gamma == "fixed":
        return Gaussian(math.sqrt(config.variance))
    if config.gamma == "decoded":
        return DecodedGaussian(sigmoid=config.mean_activation == "sigmoid")
    if config.gamma == "optimal":
        return OptimalGaussian(config.variance)
    return LearnedGaussian(config.variance, parameter="log_std" if config.gamma == "learned_std" else "log_var")


def _prior(config: EncoderConfig) -> nn.Module:
    if config.prior == "normal":
        return StandardNormal(config.latent_dim)
    if config.prior == "hierarchical":
        return HierarchicalPrior(config.latent_dim, config.top_dim, config.top_hidden)
    # As wide as N(0, I) at the start: means within its radius, variances of one.
    return GaussianMixturePrior(config.components, config.latent_dim, radius=config.latent_dim**0.5, log_precision_mean=0)
