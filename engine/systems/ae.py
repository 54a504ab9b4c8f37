"""Autoencoders: −log p(x | f(x)), a sum over pixels and a mean over the rows of a batch, without a posterior.

What all models with an encoder share is here: networks, likelihood, reconstructions and samples.

`network="residual"` is the MNIST model of "On the Regularization Balance in Autoencoder-Based Generative Models", a decoder
of 3 residual blocks of 2 layers, whose widths it does not give; its encoder has 6 layers, 5 of them `hidden`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from .. import networks
from ..data import Data
from ..likelihoods import check_unit_interval, likelihood_for
from ..system import Batch, OptimizerConfig, System, check_choices, check_sizes
from ..weight_norm import start_from
from .architectures import is_decoded, make_decoder, make_encoder


def adam() -> OptimizerConfig:
    """Of every child, if not said otherwise."""
    return OptimizerConfig("adam", lr=1e-3)


@dataclass(frozen=True)
class AEOptim:
    """Optimizer of each child."""

    encoder: OptimizerConfig = field(default_factory=adam)
    decoder: OptimizerConfig = field(default_factory=adam)
    likelihood: OptimizerConfig = field(default_factory=adam)


@dataclass(frozen=True)
class AEConfig:
    """Defaults: the networks of Burda et al. 2016 (§5)."""

    latent_dim: int = 50
    # dgd: those of A.3, for 32×32
    network: Literal["mlp", "residual", "conv", "resnet", "dgd", "dgd-shallow", "dgd-encoder-linear", "dgd-linear"] = "mlp"
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
    autoregressive = False  # whether the decoder sees x

    def __init__(self, config: AEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.shape = config, tuple(shape)
        self.encoder = encoder or make_encoder(config, self.shape, self.outputs)
        self.decoder = decoder or make_decoder(config, self.shape)
        self.likelihood = likelihood_for(config, self.shape)

    @classmethod
    def for_data(cls, config: AEConfig, data: Data) -> "AE":
        """A new system for images like `data`, whose mean its decoder starts from."""
        system = cls(config, data.x.shape[1:])
        system.check(data)
        start_from(system, data)
        system._start_output(data.x.mean(0))
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
        return {"total": -log_px_z, "log_px_z": log_px_z}

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """Beside log p(x | z) "gamma", the variance of a Gaussian that adapts, as it is now, at the end of the epoch.

        Of an `OptimalGaussian` that is the running mean, which evaluation uses.
        """
        if "log_px_z" not in means or not isinstance(self.likelihood, nn.Module):
            return means
        return {**means, "gamma": self.likelihood.variance.mean().item()}

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
        output = self._decoder_output(self._sample_latent(n, generator, prior))
        return self.likelihood.sample(output, generator) if noise else self.likelihood.mean(output)

    def _sample_latent(self, n: int, generator: Generator | None, prior: nn.Module | None = None) -> Tensor:
        if prior is not None:
            return prior.sample(n, generator)
        like = next(self.parameters())
        return torch.randn(n, self.config.latent_dim, generator=generator, dtype=like.dtype, device=like.device)

    def _decoder_output(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """What the likelihood of `x` `[N, C, H, W]` takes, if only from z: `[..., D]` -> `[..., C, H, W]`."""
        return self.decoder(z) if z.dim() == 2 else self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def _start_output(self, mean: Tensor) -> None:
        """Makes `mean` `[C, H, W]` what the last layer of the decoder starts from."""
        if self.config.likelihood == "bernoulli" or self.config.mean_activation == "sigmoid":
            mean = mean.clamp(1e-3, 1 - 1e-3).logit()
        if is_decoded(self.config):
            mean = torch.cat([mean, torch.full_like(mean, math.log(self.config.variance))])
        networks.set_output_bias(self.decoder, mean)
