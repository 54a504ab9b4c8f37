"""Networks: a decoder maps z `[N, D]` to the parameters of p(x | z), one for each feature, `[N, C, H, W]`."""

import itertools
import math
from collections.abc import Sequence

from torch import nn


def dgd_mnist_decoder(latent_dim: int = 2) -> nn.Sequential:
    """The decoder of Schuster & Krogh 2021 for 28×28 images of one channel; its outputs are logits.

    A.7 says "one hidden layer with 30 units followed by two layers of 4×4 transposed convolutions with 64 and 32
    channels", §4.1 has a second layer of hidden units between. Our reading, which ends at 28×28:
    D → 30 → 64·7·7 → transposed convolution 64→32 → transposed convolution 32→1, each 4×4, stride 2, padding 1.
    """
    return nn.Sequential(
        nn.Linear(latent_dim, 30), nn.ReLU(),
        nn.Linear(30, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )


def mlp_decoder(latent_dim: int, shape: Sequence[int], hidden: Sequence[int] = (30, 200)) -> nn.Sequential:
    """A fully connected ReLU decoder for observations of any `shape` (C, H, W)."""
    sizes = [latent_dim, *hidden]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], math.prod(shape)), nn.Unflatten(1, tuple(shape)))


def decoder_for(latent_dim: int, shape: Sequence[int]) -> nn.Sequential:
    """The paper's decoder where the observations are 28×28 with one channel, a fully connected one elsewhere."""
    return dgd_mnist_decoder(latent_dim) if tuple(shape) == (1, 28, 28) else mlp_decoder(latent_dim, shape)
