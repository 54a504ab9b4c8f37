"""Residual networks with weight normalisation, as "MAE: Mutual Posterior-Divergence Regularization for Variational
Autoencoders" has them for images of 28×28 (B.1.1, after Kingma et al. 2016): a convolutional encoder and its mirror image.

The paper refers to others for the widths; they are those of its authors' code. Three blocks halve height and width, to 32, 64
and 64 channels, a convolution over what is left has 512 outputs, and a linear layer follows. Our choice: the decoder ends with
a 3×3 convolution of its last block's 32 channels.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .weight_norm import weight_norm


def resnet_encoder(shape: Sequence[int], outputs: int, capacity: int = 32) -> nn.Sequential:
    """Images of `shape` (C, H, W) to `[N, outputs]`; `capacity` channels in the first block, twice as many in the others."""
    c = capacity
    blocks = [DownBlock(i, o) for i, o in ((shape[0], c), (c, 2 * c), (2 * c, 2 * c))]
    return nn.Sequential(*blocks, weight_norm(nn.Conv2d(2 * c, 16 * c, _pyramid(shape)[-1])), nn.ELU(), nn.Flatten(),
                         weight_norm(nn.Linear(16 * c, outputs)))


def resnet_decoder(latent_dim: int, shape: Sequence[int], capacity: int = 32) -> nn.Sequential:
    """The mirror image of `resnet_encoder`: z `[N, latent_dim]` to logits or means of images of `shape` (C, H, W)."""
    c, (large, middle, small, least) = capacity, _pyramid(shape)
    blocks = [UpBlock(2 * c, 2 * c, least, small), UpBlock(2 * c, c, small, middle), UpBlock(c, c, middle, large)]
    return nn.Sequential(weight_norm(nn.Linear(latent_dim, 16 * c)), nn.ELU(), nn.Unflatten(1, (16 * c, 1, 1)),
                         weight_norm(nn.ConvTranspose2d(16 * c, 2 * c, least)), nn.ELU(), *blocks,
                         weight_norm(nn.Conv2d(c, shape[0], 3, padding=1)))


class ResidualBlock(nn.Module):
    """elu(W₂ elu(W₁ x) + W₀ x): `outer` and `skip`, W₁ and W₀, change the size of the images, 3×3 as `inner`, W₂."""

    def __init__(self, outer: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        channels = outer.out_channels
        self.outer, self.skip = weight_norm(outer), weight_norm(skip)
        self.inner = weight_norm(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.inner(F.elu(self.outer(x))) + self.skip(x))


class DownBlock(ResidualBlock):
    """`[N, C, H, W]` -> `[N, O, ⌈H/2⌉, ⌈W/2⌉]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(*(nn.Conv2d(in_channels, out_channels, 3, 2, 1) for _ in range(2)))


class UpBlock(ResidualBlock):
    """The mirror image of `DownBlock`: `[N, C, *sides]` -> `[N, O, *target]`."""

    def __init__(self, in_channels: int, out_channels: int, sides: Sequence[int], target: Sequence[int]) -> None:
        more = [to - (2 * side - 1) for side, to in zip(sides, target, strict=True)]
        super().__init__(*(nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, more) for _ in range(2)))


def _pyramid(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Height and width of images of `shape` (C, H, W), and those after each of three halvings, which round up."""
    return [tuple(math.ceil(side / 2**level) for side in shape[1:]) for level in range(4)]
