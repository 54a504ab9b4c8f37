"""The encoders and decoders that configurations name."""

import math
from typing import TYPE_CHECKING

from torch import nn

from .. import networks
from ..resnet import resnet_decoder, resnet_encoder

if TYPE_CHECKING:
    from .ae import AEConfig

CONVOLUTIONAL = {"conv": (networks.conv_encoder, networks.conv_decoder), "resnet": (resnet_encoder, resnet_decoder)}
# depth of encoder and decoder
DGD_DEPTHS = {"dgd": ("standard", "standard"), "dgd-shallow": ("shallow", "shallow"),
              "dgd-encoder-linear": ("linear", "shallow"), "dgd-linear": ("linear", "linear")}


def make_encoder(config: "AEConfig", shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Observations of `shape` to `[N, outputs · latent_dim]`."""
    if config.network in ("mlp", "residual"):
        return networks.mlp_encoder(shape, outputs * config.latent_dim, config.hidden, config.activation)
    if config.network in CONVOLUTIONAL:
        return CONVOLUTIONAL[config.network][0](shape, outputs * config.latent_dim, config.capacity)
    depth, _ = DGD_DEPTHS[config.network]
    parts = [networks.dgd_cifar_encoder(config.latent_dim, shape, config.capacity, depth) for _ in range(outputs)]
    return parts[0] if outputs == 1 else networks.SideBySide(*parts)


def make_decoder(config: "AEConfig", shape: tuple[int, ...]) -> nn.Module:
    """z `[N, latent_dim]` to what the likelihood of observations of `shape` takes."""
    if is_decoded(config):
        shape = (2 * shape[0], *shape[1:])
    if config.network == "mlp":
        decoder = networks.mlp_decoder(config.latent_dim, shape, config.hidden[::-1], config.activation)
    elif config.network == "residual":
        if not config.hidden:
            raise ValueError("network='residual' takes the width of its decoder from the last of hidden, given ().")
        decoder = networks.residual_decoder(config.latent_dim, shape, config.hidden[-1])
    elif config.network in CONVOLUTIONAL:
        decoder = CONVOLUTIONAL[config.network][1](config.latent_dim, shape, config.capacity)
    else:
        _, depth = DGD_DEPTHS[config.network]
        decoder = networks.dgd_cifar_decoder(config.latent_dim, shape, config.capacity, depth)
    if config.affine_skip:
        decoder = networks.AffineBridge(decoder, config.latent_dim, math.prod(shape))
    squash = config.likelihood == "gaussian" and config.mean_activation == "sigmoid" and not is_decoded(config)
    return nn.Sequential(decoder, nn.Sigmoid()) if squash else decoder


def is_decoded(config: "AEConfig") -> bool:
    """Whether the decoder gives variances too."""
    return config.likelihood == "gaussian" and config.gamma == "decoded"
