"""PixelCNN++ as a decoder of colour images: p(x | z) = Π_i p(x_i | x_<i, z), pixels in raster order (Salimans et al. 2017).

Two stacks of gated blocks, without the blind spot of one: the first sees the rows above a pixel, the second those, the pixels
left of it, and the first stack. A pixel is a discretised mixture of logistics (`likelihoods.LogisticMixture`), blocks are

    h + a σ(b),    (a, b) = conv(c(conv(c(h)) + W c(other))) + V z,    c(h) = (elu(h), elu(−h))

Our reading, at one resolution: the paper's network halves the images twice, and has dropout. z is a map, enlarged to the size
of the images, as in the code of "MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders".
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .causal import CausalConv2d, Map, Window
from .likelihoods import LogisticMixture
from .pixelcnn import Draw
from .system import check_sizes
from .weight_norm import weight_norm

DOWN, RIGHT = (1, 1, 1, 3), (1, 1, 0, 2)  # windows of 2×3, with all of a row, and 2×2, up to the pixel


class GatedBlock(nn.Module):
    """A block of a stack, of `width` channels, that sees `features` of z at each pixel; W is there with `has_other`."""

    def __init__(self, width: int, features: int, window: tuple[int, int, int, int], has_other: bool = False) -> None:
        super().__init__()
        self.first = weight_norm(CausalConv2d(2 * width, width, *window))
        self.second = weight_norm(CausalConv2d(2 * width, 2 * width, *window))
        self.condition = nn.Linear(features, 2 * width, bias=False)
        self.other = weight_norm(nn.Linear(2 * width, width)) if has_other else None

    def forward(self, h: Tensor, z: Tensor, other: Tensor | None = None, first: Map | None = None,
                second: Map | None = None) -> Tensor:
        """`[..., width]`; `first` and `second` take the place of the convolutions at single rows or pixels."""
        inner = (first or self.first)(_concat_elu(h))
        if self.other is not None:
            inner = inner + self.other(_concat_elu(other))
        a, b = ((second or self.second)(_concat_elu(inner)) + self.condition(z)).chunk(2, -1)
        return h + a * b.sigmoid()


class PixelCNNPlusPlus(nn.Module):
    """The parameters of `LogisticMixture` of p(x_i | x_<i, z), for images of `shape` (C, H, W) with C = 3 or 1, in [0, 1].

    Args:
        maps: (F, h, w): what z `[N, F · h · w]` is; h and w divide H and W.
        shape: of the images.
        blocks: gated blocks in each of the stacks.
        width: channels of a layer.
        components: K, of the mixtures.
    """

    def __init__(self, maps: Sequence[int], shape: Sequence[int], blocks: int = 6, width: int = 96,
                 components: int = 10) -> None:
        super().__init__()
        check_sizes(blocks=blocks, width=width, components=components)
        self.maps, self.shape, self.components = tuple(maps), tuple(shape), components
        channels, height, across = self.shape
        if channels not in (1, 3) or height % maps[1] or across % maps[2]:
            raise ValueError("A PixelCNN++ takes images of 3 channels or 1, with a height and width that are multiples of "
                             f"those of z, given {'×'.join(map(str, shape))} and {'×'.join(map(str, maps))}.")
        self.likelihood = LogisticMixture(channels)
        self.above = weight_norm(CausalConv2d(channels + 1, width, 2, 1, 1, 0))
        self.left = weight_norm(CausalConv2d(channels + 1, width, 1, 1, 1, 1))
        self.down = nn.ModuleList(GatedBlock(width, maps[0], DOWN) for _ in range(blocks))
        self.right = nn.ModuleList(GatedBlock(width, maps[0], RIGHT, has_other=True) for _ in range(blocks))
        self.head = weight_norm(nn.Linear(width, components * (10 if channels == 3 else 3)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Parameters `[N, 10 K or 3 K, H, W]` of each pixel, given z `[N, D]` and the pixels of x `[N, C, H, W]` before it."""
        z, x = self._enlarged(z), _with_ones(x.movedim(1, -1))
        above, left = self.above(x), self.left(x)
        for down, right in zip(self.down, self.right, strict=True):
            above = down(above, z)
            left = right(left, z, above)
        return self.head(F.elu(left)).movedim(-1, 1)

    def noise(self, n: int, generator: Generator | None = None) -> Tensor:
        """What `draw` makes `n` images from: uniform in [0, 1), `[n, K + C, H, W]`."""
        channels, *sides = self.shape
        like = self.head.bias
        return torch.rand(n, self.components + channels, *sides, generator=generator, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def draw(self, z: Tensor, noise: Tensor) -> Draw:
        """x ~ p(x | z) of each z `[N, D]`, levels in [0, 1], from `noise`.

        As H·W calls of `forward` would give it, at the cost of about one, and of some forty small calls of PyTorch for each
        pixel and block; memory of a few rows of the inputs of all convolutions.
        """
        _, height, width = self.shape
        with parametrize.cached():
            z = self._enlarged(z)
            x, output = z.new_empty(len(z), *self.shape), z.new_empty(len(z), self.head.out_features, height, width)
            above, left = (Window(conv, len(z), width) for conv in (self.above, self.left))
            stacks = [[(block, *(Window(conv, len(z), width) for conv in (block.first, block.second))) for block in stack]
                      for stack in (self.down, self.right)]
            for row in range(height):
                for window in (above, left, *(window for stack in stacks for _, *windows in stack for window in windows)):
                    window.next_row()
                h, rows = above.read_row(), []
                for block, first, second in stacks[0]:
                    h = block(h, z[:, row], None, first.row, second.row)
                    rows.append(h)
                for column in range(width):
                    h = left.read(column)
                    for (block, first, second), other in zip(stacks[1], rows, strict=True):
                        h = block(h, z[:, row, column], other[:, column], partial(first.at, column), partial(second.at, column))
                    output[:, :, row, column] = found = self.head(F.elu(h))
                    pixel = self.likelihood.draw(found[:, :, None, None], noise[:, :, row, column, None, None])[..., 0, 0]
                    x[:, :, row, column] = pixel
                    for window in (above, left):
                        window.write(column, _with_ones(pixel))
        return Draw(x, output)

    def _enlarged(self, z: Tensor) -> Tensor:
        """`[N, H, W, F]` of z `[N, F · h · w]`."""
        return F.interpolate(z.unflatten(1, self.maps), self.shape[1:]).movedim(1, -1)


def _with_ones(x: Tensor) -> Tensor:
    """Pixels `[..., C]` in [−1, 1], and a one, which tells them from what is outside of the image, `[..., C + 1]`."""
    return F.pad(2 * x - 1, (0, 1), value=1.0)


def _concat_elu(h: Tensor) -> Tensor:
    return F.elu(torch.cat([h, -h], -1))
