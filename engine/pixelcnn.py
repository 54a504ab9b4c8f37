"""Autoregressive decoders of binary images: p(x | z) = Π_i p(x_i | x_<i, z), pixels in raster order.

A PixelCNN (van den Oord et al. 2016) reads the pixels before each pixel by convolutions whose later weights are zero, so
that one pass gives p(x_i | x_<i, z) of all pixels of an image that is known. A new image takes a pixel after another, and
so a pass for each of its H·W pixels. Here a layer remembers what it has read, and evaluates the window of one pixel only:
the same numbers, at the cost of about one pass.

`PixelCNN` is the decoder of the variational lossy autoencoder (Chen et al. 2017) with the kernels of "MAE: Mutual
Posterior-Divergence Regularization for Variational Autoencoders" (§4.1). Inside, channels come last: all of it but the
convolutions are then maps of the last axis, for whole images and for single pixels alike.

Traps. The paper has six masked convolutions, kernels (7, 7, 5, 5, 3, 3); its authors' code has (7, 7, 7, 5, 5, 3, 3), the
first one without the pixel itself, and more skip connections, past three blocks each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .system import check_sizes
from .weight_norm import weight_norm


class CausalConv2d(nn.Linear):
    """A convolution over pixels before each pixel in raster order: `[N, H, W, C]` -> `[N, H, W, O]`.

    That is a masked convolution (van den Oord et al. 2016, §3.4) without the weights that the mask sets to zero. `weight`
    `[O, taps · C]` has those of the window's pixels in raster order up to the one in its middle.

    Args:
        in_channels, out_channels: C and O.
        kernel: height and width of the window around a pixel, of which the upper half counts; odd.
        centre: whether the pixel itself belongs to what is read (mask B), or not (mask A).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, centre: bool) -> None:
        if kernel % 2 == 0 or kernel + centre < 2:
            raise ValueError(f"A causal convolution needs an odd kernel, from 3 on without the centre; given {kernel}.")
        super().__init__((kernel * kernel // 2 + centre) * in_channels, out_channels)
        self.in_channels, self.kernel, self.radius = in_channels, kernel, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.radius + 1, self.kernel, self.in_channels
        weight = F.pad(self.weight, (0, math.prod(shape[1:]) - self.in_features)).view(shape)
        output = F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), self.bias, padding=self.radius)
        return output[:, :, :x.shape[1]].movedim(1, -1)  # below are the pixels whose windows reach out of the image


class Window:
    """A `CausalConv2d` for N images of `width` of which pixel after pixel becomes known: the present row and those it reads."""

    def __init__(self, conv: CausalConv2d, n: int, width: int) -> None:
        self.weight, self.bias, self.kernel, self.radius = conv.weight, conv.bias, conv.kernel, conv.radius
        self.known = self.weight.new_zeros(n, self.radius + 1, width + 2 * self.radius, conv.in_channels)

    def next_row(self) -> None:
        self.known = self.known.roll(-1, 1)
        self.known[:, -1] = 0

    def write(self, column: int, value: Tensor) -> None:
        """The input `[N, C]` at a pixel of the present row."""
        self.known[:, -1, column + self.radius] = value

    def read(self, column: int) -> Tensor:
        """The output `[N, O]` at a pixel of the present row."""
        window = self.known[:, :, column:column + self.kernel].flatten(1)
        return F.linear(window[:, :self.weight.shape[1]], self.weight, self.bias)


class MaskedBlock(nn.Module):
    """h + W₂ elu(causal convolution(elu(W₁ h))) of half as many channels inside, then elu."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.narrow, self.wide = weight_norm(nn.Linear(width, inner)), weight_norm(nn.Linear(inner, width))
        self.conv = weight_norm(CausalConv2d(inner, inner, kernel, centre=True))

    def forward(self, h: Tensor) -> Tensor:
        """`[N, H, W, width]` of whole images."""
        return F.elu(h + self.wide(F.elu(self.conv(F.elu(self.narrow(h))))))

    def at(self, column: int, h: Tensor, window: Window) -> Tensor:
        """`[N, width]` of one pixel of the present row."""
        window.write(column, F.elu(self.narrow(h)))
        return F.elu(h + self.wide(F.elu(window.read(column))))


class Draw(NamedTuple):
    """Images `x` `[N, C, H, W]` of zeros and ones, and the `logits` of their pixels given those before."""

    x: Tensor
    logits: Tensor


class PixelCNN(nn.Module):
    """The logits of p(x_i | x_<i, z) of binary images of `shape` (C, H, W); channels of a pixel are independent.

    z becomes `features` maps as large as the image, which are read around each pixel, also below and right of it.

    Args:
        latent_dim: D, of z.
        shape: of the images.
        kernels: odd widths of the windows of the causal convolutions, of which the first reads the image and leaves the
            pixel itself out; the others are in residual blocks.
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
        self.conv = weight_norm(CausalConv2d(channels, width, first, centre=False))
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

    @torch.no_grad()
    def draw(self, z: Tensor, noise: Tensor) -> Draw:
        """x ~ p(x | z) of each z `[N, D]`: a pixel is one where `noise` `[N, C, H, W]`, uniform in [0, 1), is below its p.

        As H·W calls of `forward` would give it. Time of about one of them, and H·W times that of some fifty small calls of
        PyTorch; memory of a few rows of the inputs of all causal convolutions.
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
                        h = block.at(column, h, window)
                    logits[:, :, row, column] = found = self.head(h)
                    image.write(column, noise[:, :, row, column] < found.sigmoid())
        return Draw((noise < logits.sigmoid()).to(noise.dtype), logits)
