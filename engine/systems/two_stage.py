"""Two-stage VAEs: a VAE, then a VAE of its representations (Dai & Wipf 2019), and VAE+, which begins with an autoencoder.

A VAE whose decoder has a learned variance may reconstruct well and yet have an aggregate posterior q(z) far from N(0, I),
so that what z ~ N(0, I) decodes to is unlike the data. Where it uses no more dimensions than the data have, q(z) has a
density, and a second VAE, with κ-dimensional z for data and u ~ N(0, I) as its representation, can learn to sample from it:

    first      min over q(z | x), p(x | z)     −E log p(x | z) + KL(q(z | x) ‖ N(0, I))                as in `vae`
    second     min over q(u | z), p(z | u)     −E log p(z | u) + KL(q(u | z) ‖ N(0, I))     z ~ q(z | x), drawn anew each time
    sample     u ~ N(0, I),  z = f(u) + √γ_z ε,  x = E[x | z]

The stages are trained in turn, as phases of one run. Together they are one model, with p(z) = ∫ p(z | u) N(u; 0, I) du as
its prior: `log_weights` and `sample` are of both, and `loss` outside of the phases is its negative ELBO.

VAE+ ("On the Regularization Balance in Autoencoder-Based Generative Models", §4 and §6) first trains an autoencoder, to few
dimensions and without regularisation. The VAE has its codes x̃ for inputs and outputs, and the fixed decoder f̃ after its own:
the reconstruction that it is trained by is that of pixels, E ‖x − f̃(f(z))‖² / 2γ.

Traps. γ_x and γ_z are variances in the papers; the code of Dai & Wipf learns the logarithm of a standard deviation of that
name, "learned_std" of `gamma` and `top_gamma`. The heads of their second stage see its input beside the last hidden layer,
which is an affine bridge. They store the posteriors of the first stage and draw z from them anew each epoch; here the
encoder, which no longer learns, gives them again at each step. They halve the learning rates every 150 epochs of the first
stage and every 300 of the second, and decode a sample of z where they reconstruct. The widths of VAE+ are not in its paper:
they are our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from .. import bounds, networks
from ..bounds import Posterior
from ..data import Data
from ..diagnostics import evaluating
from ..priors import StandardNormal
from ..system import Batch, OptimizerConfig, Phase, check_sizes
from .ae import AE, AEConfig
from .vae import VAE, VAEConfig, VAEOptim


def _adam() -> OptimizerConfig:
    return OptimizerConfig("adam", lr=1e-4)


@dataclass(frozen=True)
class TwoStageOptim(VAEOptim):
    """Optimizer of each child; `prior` is the second stage."""

    encoder: OptimizerConfig = field(default_factory=_adam)
    decoder: OptimizerConfig = field(default_factory=_adam)
    likelihood: OptimizerConfig = field(default_factory=_adam)
    prior: OptimizerConfig = field(default_factory=_adam)


@dataclass(frozen=True)
class TwoStageConfig(VAEConfig):
    """Defaults: those of the code of Dai & Wipf 2019, but for the networks of the first stage."""

    latent_dim: int = 64
    likelihood: Literal["bernoulli", "gaussian"] = "gaussian"
    mean_activation: Literal["identity", "sigmoid"] = "sigmoid"
    prior: Literal["normal"] = "normal"  # while the first stage is trained
    posterior_flow: Literal["none"] = "none"  # for the second stage takes Gaussian posteriors
    top_dim: int = 64  # of u
    top_hidden: tuple[int, ...] = (1024, 1024, 1024)  # ReLU layers of the second stage, its decoder's in reverse
    top_gamma: Literal["learned", "learned_std"] = "learned"  # of p(z | u): variance, or by log of its root
    first_epochs: int = 400  # of the first stage; those that follow are of the second
    optim: TwoStageOptim = field(default_factory=TwoStageOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(first_epochs=self.first_epochs)


@dataclass(frozen=True)
class VAEPlusOptim(TwoStageOptim):
    """Optimizer of each child."""

    autoencoder: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-3))


@dataclass(frozen=True)
class VAEPlusConfig(TwoStageConfig):
    """Defaults: 64 dimensions each, as in the paper; the rest is as in `TwoStageConfig`, or our choice."""

    gamma: Literal["learned", "learned_std", "optimal", "fixed"] = "learned"  # as in `VAEConfig`
    code_dim: int = 64  # of the autoencoder's codes; network, hidden, activation and capacity are its own
    code_hidden: tuple[int, ...] = (256,) * 5  # ReLU layers of the VAE's encoder; its decoder is residual, as wide as the last
    affine_skip: bool = True  # of the VAE
    warmup: Literal["none"] = "none"  # for steps are counted from the start of the autoencoder
    autoencoder_epochs: int = 400  # before those of the first stage
    optim: VAEPlusOptim = field(default_factory=VAEPlusOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(code_dim=self.code_dim, code_hidden=self.code_hidden, autoencoder_epochs=self.autoencoder_epochs)
        if not self.code_hidden:
            raise ValueError("code_hidden needs a layer, whose width the residual decoder has; given ().")


class SecondStage(VAE):
    """A VAE of representations z `[N, D]`, which serves as their prior.

    Its encoder and decoder are ReLU layers with an affine bridge, its likelihood a Gaussian of learned variance γ_z.
    """

    def __init__(self, config: TwoStageConfig) -> None:
        dim, top_dim, hidden = config.latent_dim, config.top_dim, config.top_hidden
        own = VAEConfig(latent_dim=top_dim, likelihood="gaussian", gamma=config.top_gamma)
        super().__init__(own, (dim,), networks.AffineBridge(networks.mlp([dim, *hidden, 2 * top_dim]), dim, 2 * top_dim),
                         networks.AffineBridge(networks.mlp([top_dim, *hidden[::-1], dim]), top_dim, dim))

    def forward(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        """log p(u) + log p(z | u) − log q(u | z) of `z` `[..., D]` at one u ~ q(u | z) for each, in nats, `[...]`.

        Its exponential is an unbiased estimate of p(z).
        """
        rows = z.reshape(-1, z.shape[-1])
        return self.log_weights(self.encode(rows), rows, 1, generator).reshape(z.shape[:-1])

    def sample(self, n: int, generator: Generator | None = None, *, noise: bool = True,
               prior: nn.Module | None = None) -> Tensor:
        """`n` points f(u) + √γ_z ε `[n, D]`; without `noise` f(u)."""
        return super().sample(n, generator, noise=noise, prior=prior)


class TwoStageVAE(VAE):
    """A two-stage VAE of observations of `shape` (C, H, W); `encoder` and `decoder`, of the first stage, are as in `VAE`.

    Children: `encoder`, `decoder`, `likelihood` where its variance is not fixed; `prior`, the second stage.
    """

    name = "two-stage"
    config_type = TwoStageConfig
    config: TwoStageConfig

    def __init__(self, config: TwoStageConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(config, shape, encoder, decoder)
        self.prior = SecondStage(config)

    def phases(self) -> tuple[Phase, ...]:
        """The first stage for `first_epochs` epochs, then the second."""
        first = tuple(child for child in super().phases()[0].updates if child in ("encoder", "decoder", "likelihood"))
        last = self.config.first_epochs
        return Phase("first", first, last_epoch=last), Phase("second", ("prior",), first_epoch=last + 1)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """As in `VAE`: of x in the phase "first", of z in "second"; else the negative ELBO of both stages together."""
        if phase == "first":
            return super().loss(batch)
        if phase == "second":
            return self.prior.loss(Batch(self._draw(batch.x), batch.index))
        elbo = self.log_weights(self.encode(batch.x), batch.x, self.config.samples).mean()
        return {"total": -elbo, "elbo": elbo}

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """As of `VAE`; in the phase "second" of the second stage."""
        return self.prior.summarize(means) if phase == "second" else super().summarize(means, phase)

    def monitor(self, x: Tensor, prior: nn.Module | None = None) -> dict[str, Any]:
        """As in `VAE`, by default of the first stage, whose prior is N(0, I)."""
        return super().monitor(x, prior or StandardNormal(self.config.latent_dim))

    def validation_loss(self, batch: Batch) -> dict[str, Tensor]:
        """The negative ELBO of both stages together, which epochs of different stages can be compared by."""
        return self.loss(batch)

    @torch.no_grad()
    def _draw(self, x: Tensor) -> Tensor:
        """z ~ q(z | x) `[N, D]` of an encoder that no longer learns."""
        with evaluating(self.encoder):
            return bounds.reparametrize(self.encode(x), 1)[0]

    def _log_pz(self, z: Tensor, log_det: None = None, generator: Generator | None = None) -> Tensor:
        return self.prior(z, generator=generator)

    def _divergence(self, posterior: Posterior, kl_to_normal: Tensor, z: Tensor, log_det: None) -> Tensor:
        return kl_to_normal


class VAEPlus(TwoStageVAE):
    """VAE+ of observations of `shape` (C, H, W).

    `encoder` maps codes `[N, code_dim]` to `[N, 2 latent_dim]`, `decoder` maps `[N, latent_dim]` to codes.
    Children: those of `TwoStageVAE`, and `autoencoder`.
    """

    name = "vae-plus"
    config_type = VAEPlusConfig
    config: VAEPlusConfig

    def __init__(self, config: VAEPlusConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(config, shape, encoder or _code_encoder(config), decoder or _code_decoder(config))
        self.autoencoder = AE(_autoencoder_config(config), shape)

    @classmethod
    def for_data(cls, config: VAEPlusConfig, data: Data) -> "VAEPlus":
        """A new system for images like `data`, whose mean its autoencoder starts from."""
        system = cls(config, data.x.shape[1:])
        system.autoencoder = AE.for_data(system.autoencoder.config, data)
        return system

    def phases(self) -> tuple[Phase, ...]:
        """The autoencoder for `autoencoder_epochs` epochs, then those of `TwoStageVAE`."""
        start = self.config.autoencoder_epochs
        first, second = super().phases()
        return (Phase("autoencoder", ("autoencoder",), last_epoch=start),
                replace(first, first_epoch=start + 1, last_epoch=start + first.last_epoch),
                replace(second, first_epoch=start + second.first_epoch))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """As in `TwoStageVAE`; in the phase "autoencoder" −log p(x | f̃(x̃)), for Gaussian pixels of variance ½."""
        return self.autoencoder.loss(batch) if phase == "autoencoder" else super().loss(batch, phase)

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """As of `TwoStageVAE`; in the phase "autoencoder" of the autoencoder."""
        return self.autoencoder.summarize(means) if phase == "autoencoder" else super().summarize(means, phase)

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) of each row of `x` `[N, C, H, W]`."""
        with evaluating(self.autoencoder):
            codes = self.autoencoder.represent(x)
        return super().encode(codes)

    def _decoder_output(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        codes = super()._decoder_output(z)
        with evaluating(self.autoencoder):
            return self.autoencoder._decoder_output(codes)


def _autoencoder_config(config: VAEPlusConfig) -> AEConfig:
    """With the variance of a summed squared error."""
    return AEConfig(latent_dim=config.code_dim, network=config.network, hidden=config.hidden, activation=config.activation,
                    capacity=config.capacity, likelihood=config.likelihood, mean_activation=config.mean_activation,
                    gamma="fixed", variance=0.5)


def _code_encoder(config: VAEPlusConfig) -> nn.Module:
    return networks.mlp_encoder((config.code_dim,), 2 * config.latent_dim, config.code_hidden, "relu")


def _code_decoder(config: VAEPlusConfig) -> nn.Module:
    decoder = networks.residual_decoder(config.latent_dim, (config.code_dim,), config.code_hidden[-1])
    return networks.AffineBridge(decoder, config.latent_dim, config.code_dim) if config.affine_skip else decoder
