"""Variational lossy autoencoders (Chen et al. 2017): VAEs whose decoder is autoregressive.

p(x | z) = Π_i p(x_i | x_<i, z) is a `PixelCNN`, which sees the pixels before each pixel; everything else is as in `vae`. Such a
decoder models local detail by itself, and z is left with what its windows do not reach; at the optimum z may be left with
nothing. Against that there are free bits, and a decoder with narrow windows.

Defaults: the model of "MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders" (§4.1, B.1.1): a ResNet
encoder with weight normalisation, 32 dimensions, windows of two 7×7, two 5×5 and two 3×3 convolutions. Its ResNet VAE, with the
same encoder and a factorised decoder, is a `VAE` with network="resnet". For natural images (B.2) z is 16 maps of 8×8, from a
DenseNet, with a flow of masked convolutions as prior, and the decoder a `PixelCNNPlusPlus`: network="densenet", prior="conv",
likelihood="logistic_mixture", whose −log p(x) is one of levels, reported in bits/dim.

Traps. E[x | z] has no closed form: where other models show it, this one draws an image and shows the probability of each of
its pixels given those before. "0.01 nats/data-dim free bits" are 7.84 nats for 28×28 pixels in the authors' code, for the mean
over the batch, with no gradient below; §4.1 of the paper says that VLAE has them and MAE has not, B.1.1 that all have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from ..conv_flow import latent_maps
from ..data import Data
from ..densenet import densenet_encoder
from ..diagnostics import on_grid
from ..likelihoods import LogisticMixture
from ..pixelcnn import PixelCNN
from ..pixelcnn_pp import PixelCNNPlusPlus
from ..system import check_sizes
from .vae import VAE, VAEConfig

_ROWS = 128  # of one call of the decoder: its activations are a hundred times as many as the pixels


@dataclass(frozen=True)
class VLAEConfig(VAEConfig):
    """Defaults: the paper's networks; `network`, `capacity` and `hidden` are those of the encoder."""

    latent_dim: int = 32
    network: Literal["mlp", "conv", "resnet", "densenet"] = "resnet"
    likelihood: Literal["bernoulli", "logistic_mixture"] = "bernoulli"  # of binary pixels, decoded by a PixelCNN; of 256 levels
    prior: Literal["normal", "mixture", "hierarchical", "vamp", "maf", "iaf", "realnvp", "conv"] = "maf"  # conv: of latent maps
    width: int = 64  # channels of the decoder's layers
    kernels: tuple[int, ...] = (7, 7, 5, 5, 3, 3)  # of the PixelCNN's convolutions; the authors' code has a third 7
    features: int = 4  # maps that z becomes in the PixelCNN
    blocks: int = 6  # in each of the stacks of the PixelCNN++
    mixtures: int = 10  # logistics of a pixel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(width=self.width, features=self.features, blocks=self.blocks, mixtures=self.mixtures)
        for name in ("affine_skip", "divergence_beta"):
            if getattr(self, name):
                raise ValueError(f"{name} is for decoders whose pixels are independent given z; leave it out for a VLAE.")


class VLAE(VAE):
    """A VLAE of images of `shape` (C, H, W); `encoder` is as in `VAE`.

    `decoder` maps z `[N, latent_dim]` and x `[N, C, H, W]` to what the likelihood takes, of each pixel from those before it.
    It has methods `noise` and `draw` as `PixelCNN` has.
    """

    name = "vlae"
    config_type = VLAEConfig
    config: VLAEConfig
    autoregressive = True

    def __init__(self, config: VLAEConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        if config.network == "densenet":
            encoder = encoder or densenet_encoder(shape, 2 * config.latent_dim, config.capacity)
        super().__init__(config, shape, encoder, decoder or _decoder(config, shape))

    def check(self, data: Data) -> None:
        super().check(data)
        if self.config.likelihood == "logistic_mixture":
            if not on_grid(data.x):
                raise ValueError("likelihood='logistic_mixture' is that of 256 levels, 0, 1/255, ..., 1, and the pixels have "
                                 "others; give images of bytes, through Data.pixels(\"none\"), --binarize none.")
        elif data.binarized != "dynamic" and not bool(((data.x == 0) | (data.x == 1)).all()):
            raise ValueError("A VLAE draws pixels of zeros and ones, each from those before it, and so it is trained on such; "
                             "binarise the images: Data.pixels(\"dynamic\"), --binarize dynamic.")

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """As of `VAE`; of pixels of 256 levels also the ELBO in bits/dim."""
        means = super().summarize(means, phase)
        if not isinstance(self.likelihood, LogisticMixture):
            return means
        return {**means, "bits_per_dim": -means["elbo"] / (math.prod(self.shape) * math.log(2))}

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """E[x_i | x_<i, z] `[..., C, H, W]` along an image x drawn from p(x | z), for z `[..., D]`; without gradient.

        The noise is the same for every z and every call.
        """
        rows = z.flatten(0, -2)
        noise = self.decoder.noise(1, Generator(z.device).manual_seed(0))
        drawn = self.decoder.draw(rows, noise.expand(len(rows), *noise.shape[1:]))
        return self.likelihood.mean(drawn.output).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None, *, noise: bool = False,
               prior: nn.Module | None = None) -> Tensor:
        """`n` images `[n, C, H, W]` with z from the prior, or `prior`; without `noise` E[x_i | x_<i, z] of each pixel."""
        drawn = self.decoder.draw(self._sample_latent(n, generator, prior), self.decoder.noise(n, generator))
        return drawn.x if noise else self.likelihood.mean(drawn.output)

    def _start_output(self, mean: Tensor) -> None:
        """A pixel's probability starts from what is before it, not from its mean."""

    def _decoder_output(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        lead, x = z.shape[:-1], x.expand(*z.shape[:-1], *self.shape).flatten(0, -len(self.shape) - 1)
        parts = zip(z.flatten(0, -2).split(_ROWS), x.split(_ROWS), strict=True)
        return torch.cat([self.decoder(*part) for part in parts]).unflatten(0, lead)


def _decoder(config: VLAEConfig, shape: Sequence[int]) -> nn.Module:
    if config.likelihood == "bernoulli":
        return PixelCNN(config.latent_dim, shape, config.kernels, config.width, config.features)
    return PixelCNNPlusPlus(latent_maps(shape, config.latent_dim), shape, config.blocks, config.width, config.mixtures)
