"""Networks: a decoder maps z `[N, D]` to the parameters of p(x | z), one for each feature, `[N, C, H, W]`."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class UpConv2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of kernel 4, stride 2, padding 1, which doubles height and width: `[N, C, H, W]` -> `[N, O, 2H, 2W]`.

    The same function, parameters and initialisation. While training on CPU, one output channel takes PyTorch's matrix
    product and col2im, a quarter of the time of oneDNN's forward pass. That kernel has no forward-mode derivative, and
    vmap loops over it; in eval mode this is nn.ConvTranspose2d, without these limits.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        same_dtype = x.dtype == self.weight.dtype  # not so under autocast
        if self.training and self.out_channels == 1 and x.device.type == "cpu" and same_dtype:
            return torch.ops.aten.slow_conv_transpose2d(x, self.weight, self.kernel_size, self.bias, self.stride,
                                                        self.padding)
        return super().forward(x)


def dgd_mnist_decoder(latent_dim: int = 2) -> nn.Sequential:
    """The decoder of Schuster & Krogh 2021 for 28×28 images of one channel; its outputs are logits.

    A.7 says "one hidden layer with 30 units followed by two layers of 4×4 transposed convolutions with 64 and 32
    channels", §4.1 has a second layer of hidden units between. Our reading, which ends at 28×28:
    D → 30 → 64·7·7 → transposed convolution 64→32 → transposed convolution 32→1, each 4×4, stride 2, padding 1.
    """
    return nn.Sequential(
        nn.Linear(latent_dim, 30), nn.ReLU(),
        nn.Linear(30, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
        UpConv2d(64, 32), nn.ReLU(),
        UpConv2d(32, 1),
    )


def mlp_decoder(latent_dim: int, shape: Sequence[int], hidden: Sequence[int] = (30, 200)) -> nn.Sequential:
    """A fully connected ReLU decoder for observations of any `shape` (C, H, W)."""
    sizes = [latent_dim, *hidden]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], math.prod(shape)), nn.Unflatten(1, tuple(shape)))


def decoder_for(latent_dim: int, shape: Sequence[int]) -> nn.Sequential:
    """The paper's decoder where the observations are 28×28 with one channel, a fully connected one elsewhere."""
    return dgd_mnist_decoder(latent_dim) if tuple(shape) == (1, 28, 28) else mlp_decoder(latent_dim, shape)
