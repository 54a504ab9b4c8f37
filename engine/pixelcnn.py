"""Autoregressive decoders of binary images: p(x | z) = Π_i p(x_i | x_<i, z), pixels in raster order.

`PixelCNN` (van den Oord et al. 2016) is the decoder of the variational lossy autoencoder (Chen et al. 2017) with the kernels of
"MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders" (§4.1). It gives the parameters of all pixels of
known images in one pass, and draws images at the cost of about one (`causal`).

Traps. The paper has six masked convolutions, kernels (7, 7, 5, 5, 3, 3); its authors' code has (7, 7, 7, 5, 5, 3, 3), the
first one without the pixel itself, and more skip connections, past three blocks each. Such a stack has a blind spot above and
right of each pixel, which grows with the distance.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .causal import Map, Window, masked_conv
from .system import check_sizes
from .weight_norm import weight_norm


class Draw(NamedTuple):
    """Images `x` `[N, C, H, W]`, and the decoder's `output` that each pixel was drawn from, given those before it."""

    x: Tensor
    output: Tensor


class MaskedBlock(nn.Module):
    """elu(h + W₂ elu(masked convolution(elu(W₁ h)))), with half as many channels inside."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.narrow, self.wide = weight_norm(nn.Linear(width, inner)), weight_norm(nn.Linear(inner, width))
        self.conv = weight_norm(masked_conv(inner, inner, kernel, centre=True))

    def forward(self, h: Tensor, conv: Map | None = None) -> Tensor:
        """`[..., width]`; `conv` takes the place of the convolution where it is evaluated at single pixels."""
        return F.elu(h + self.wide(F.elu((conv or self.conv)(F.elu(self.narrow(h))))))


class PixelCNN(nn.Module):
    """The logits of p(x_i | x_<i, z) of binary images of `shape` (C, H, W); channels of a pixel are independent.

    z becomes `features` maps as large as the image, which are read around each pixel, also below and right of it.

    Args:
        latent_dim: D, of z.
        shape: of the images.
        kernels: odd widths of the masked convolutions, of which the first reads the image and leaves the pixel itself out; the
            others are in residual blocks.
        width: channels of a layer; the convolutions of the blocks have half of them.
        features: maps that z becomes.
    """

    def __init__(self, latent_dim: int, shape: Sequence[int], kernels: Sequence[int] = (7, 7, 5, 5, 3, 3), width: int = 64,
                 features: int = 4) -> None:
        super().__init__()
        if not kernels:
            raise ValueError("A PixelCNN needs at least one convolution: kernels is empty.")
        check_sizes(latent_dim=latent_dim, width=width, features=features)
        self.shape = channels, *sides = tuple(shape)
        first, *rest = kernels
        self.conv = weight_norm(masked_conv(channels, width, first, centre=False))
        self.condition = nn.Sequential(weight_norm(nn.Linear(latent_dim, features * math.prod(sides))), nn.ELU(),
                                       nn.Unflatten(1, (features, *sides)),
                                       weight_norm(nn.Conv2d(features, width, first, padding=first // 2)))
        self.blocks = nn.ModuleList(MaskedBlock(width, kernel) for kernel in rest)
        self.head = nn.Sequential(weight_norm(nn.Linear(width, width)), nn.ELU(), weight_norm(nn.Linear(width, channels)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits `[N, C, H, W]` of each pixel, given z `[N, D]` and the pixels of x `[N, C, H, W]` before it."""
        h = F.elu(self.conv(x.movedim(1, -1)) + self.condition(z).movedim(1, -1))
        for block in self.blocks:
            h = block(h)
        return self.head(h).movedim(-1, 1)

    def noise(self, n: int, generator: Generator | None = None) -> Tensor:
        """What `draw` makes `n` images from: uniform in [0, 1), `[n, C, H, W]`."""
        like = self.head[-1].bias
        return torch.rand(n, *self.shape, generator=generator, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def draw(self, z: Tensor, noise: Tensor) -> Draw:
        """x ~ p(x | z) of each z `[N, D]`: a pixel is one where the `noise` is below its probability.

        As H·W calls of `forward` would give it. Time of about one of them, and H·W times that of some fifty small calls of
        PyTorch; memory of a few rows of the inputs of all masked convolutions.
        """
        _, height, width = self.shape
        with parametrize.cached():
            condition = self.condition(z).movedim(1, -1)
            image, *windows = (Window(conv, len(z), width) for conv in (self.conv, *(block.conv for block in self.blocks)))
            logits = torch.empty_like(noise)
            for row in range(height):
                for window in (image, *windows):
                    window.next_row()
                for column in range(width):
                    h = F.elu(image.read(column) + condition[:, row, column])
                    for block, window in zip(self.blocks, windows, strict=True):
                        h = block(h, partial(window.at, column))
                    logits[:, :, row, column] = found = self.head(h)
                    image.write(column, noise[:, :, row, column] < found.sigmoid())
        return Draw((noise < logits.sigmoid()).to(noise.dtype), logits)
