"""Convolutions over what comes before in raster order, for whole images and for one pixel after another.

A masked convolution (van den Oord et al. 2016) reads the pixels before a pixel only, so that one pass gives p(x_i | x_<i) of
all pixels of an image that is known. A new image takes a pixel after another; a `Window` remembers what a convolution has read,
and evaluates it at one place: the numbers of a pass for each pixel, at the cost of about one pass. Channels come last: what
else networks consist of are then maps of the last axis, for images, rows and pixels alike.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Map = Callable[[Tensor], Tensor]


class CausalConv2d(nn.Linear):
    """A convolution over a window around each pixel up to some place of its row: `[N, H, W, C]` -> `[N, H, W, O]`.

    That is a convolution whose last weights are zero, without these: `weight` `[O, taps · C]` has the others in raster order.

    Args:
        in_channels, out_channels: C and O.
        above: rows before that of the pixel.
        left, right: columns before and after that of the pixel.
        last: pixels of its own row that are read, counted from the left end of the window: `left` of them are those before it.
    """

    def __init__(self, in_channels: int, out_channels: int, above: int, left: int, right: int, last: int) -> None:
        width = left + 1 + right
        if above * width + last < 1:
            raise ValueError("A causal convolution needs a pixel to read: a window of 1×1 without its centre has none.")
        super().__init__((above * width + last) * in_channels, out_channels)
        self.in_channels, self.above, self.left, self.right, self.width = in_channels, above, left, right, width

    def forward(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.above + 1, self.width, self.in_channels
        weight = F.pad(self.weight, (0, math.prod(shape[1:]) - self.in_features)).view(shape)
        x = F.pad(x, (0, 0, self.left, self.right, self.above, 0))
        return F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), self.bias).movedim(1, -1)


def masked_conv(in_channels: int, out_channels: int, kernel: int, centre: bool) -> CausalConv2d:
    """The masked convolution of `kernel` × `kernel`, odd, that reads the pixel itself (mask B), or not (mask A)."""
    if kernel % 2 == 0:
        raise ValueError(f"A masked convolution needs an odd kernel, given {kernel}.")
    radius = kernel // 2
    return CausalConv2d(in_channels, out_channels, radius, radius, radius, radius + centre)


class Window:
    """A `CausalConv2d` for N images of `width` pixels a row, of which row after row or pixel after pixel becomes known."""

    def __init__(self, conv: CausalConv2d, n: int, width: int) -> None:
        self.weight, self.bias, self.left, self.width = conv.weight, conv.bias, conv.left, conv.width
        self.known = self.weight.new_zeros(n, conv.above + 1, width + conv.width - 1, conv.in_channels)

    def next_row(self) -> None:
        self.known = self.known.roll(-1, 1)
        self.known[:, -1] = 0

    def write(self, column: int, value: Tensor) -> None:
        """The input `[N, C]` at a pixel of the present row."""
        self.known[:, -1, column + self.left] = value

    def read(self, column: int) -> Tensor:
        """The output `[N, O]` at a pixel of the present row."""
        window = self.known[:, :, column:column + self.width].flatten(1)
        return F.linear(window[:, :self.weight.shape[1]], self.weight, self.bias)

    def at(self, column: int, value: Tensor) -> Tensor:
        """The output `[N, O]` at a pixel whose input `[N, C]` becomes known with it."""
        self.write(column, value)
        return self.read(column)

    def read_row(self) -> Tensor:
        """The outputs `[N, W, O]` of the present row."""
        windows = self.known.unfold(2, self.width, 1).permute(0, 2, 1, 4, 3).flatten(2)
        return F.linear(windows[..., :self.weight.shape[1]], self.weight, self.bias)

    def row(self, values: Tensor) -> Tensor:
        """The outputs `[N, W, O]` of the present row, whose inputs `[N, W, C]` become known with it."""
        self.known[:, -1, self.left:self.left + values.shape[1]] = values
        return self.read_row()
