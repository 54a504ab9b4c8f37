"""The densely connected encoder (Huang et al. 2017) of "MAE: Mutual Posterior-Divergence Regularization for Variational
Autoencoders" for natural images (§4.2): a quarter of their height and width remains.

The paper gives no widths; they are our choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conv_flow import latent_maps
from .weight_norm import weight_norm

LAYERS = 4  # of a dense block


def densenet_encoder(shape: Sequence[int], outputs: int, capacity: int = 32) -> nn.Sequential:
    """Images of `shape` (C, H, W) to `[N, outputs]`, maps of a quarter of their height and width side by side.

    Three dense blocks, with `capacity` channels a layer; between them, convolutions of stride 2 halve the channels too.
    """
    maps, *_ = latent_maps(shape, outputs)
    layers, width = [weight_norm(nn.Conv2d(shape[0], 2 * capacity, 3, padding=1))], 2 * capacity
    for block in range(3):
        layers += [DenseLayer(width + layer * capacity, capacity) for layer in range(LAYERS)]
        width += LAYERS * capacity
        if block < 2:
            layers += [nn.ELU(), weight_norm(nn.Conv2d(width, width // 2, 3, 2, 1))]
            width //= 2
    return nn.Sequential(*layers, nn.ELU(), weight_norm(nn.Conv2d(width, maps, 3, padding=1)), nn.Flatten())


class DenseLayer(nn.Module):
    """x, and beside it a 3×3 convolution of elu(x): `[N, C, H, W]` -> `[N, C + growth, H, W]`."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(channels, growth, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.elu(x))], 1)
