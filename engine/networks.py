"""Networks: a decoder maps z `[N, D]` to the parameters of p(x | z), one for each feature, `[N, C, H, W]`; an encoder maps
x `[N, C, H, W]` to `[N, outputs]`, e.g. the mean and log-variance of q(z | x), side by side."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}


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


def mlp(sizes: Sequence[int], activation: str = "relu") -> nn.Sequential:
    """Linear layers between consecutive `sizes`, with one of ACTIVATIONS after each but the last."""
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), ACTIVATIONS[activation]())]
    return nn.Sequential(*layers[:-1])


def mlp_encoder(shape: Sequence[int], outputs: int, hidden: Sequence[int] = (200, 200),
                activation: str = "tanh") -> nn.Sequential:
    """A fully connected encoder; with its defaults that of Burda et al. 2016 (§5)."""
    return nn.Sequential(nn.Flatten(), *mlp([math.prod(shape), *hidden, outputs], activation))


def mlp_decoder(latent_dim: int, shape: Sequence[int], hidden: Sequence[int] = (30, 200),
                activation: str = "relu") -> nn.Sequential:
    """A fully connected decoder for observations of any `shape` (C, H, W)."""
    return nn.Sequential(*mlp([latent_dim, *hidden, math.prod(shape)], activation), nn.Unflatten(1, tuple(shape)))


def residual_decoder(latent_dim: int, shape: Sequence[int], width: int = 400, blocks: int = 3) -> nn.Sequential:
    """A fully connected decoder of residual blocks of two layers each, activations first (He et al. 2016)."""
    layers = [Residual(nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
              for _ in range(blocks)]
    return nn.Sequential(nn.Linear(latent_dim, width), *layers, nn.ReLU(), nn.Linear(width, math.prod(shape)),
                         nn.Unflatten(1, tuple(shape)))


def conv_encoder(shape: Sequence[int], outputs: int, capacity: int = 32) -> nn.Sequential:
    """Two 4×4 convolutions of stride 2 with `capacity` and 2 `capacity` channels, and two linear layers."""
    channels, *sides = shape
    size = 2 * capacity * math.prod(_quarter(sides))
    return nn.Sequential(
        nn.Conv2d(channels, capacity, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(capacity, 2 * capacity, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(size, 8 * capacity), nn.ReLU(), nn.Linear(8 * capacity, outputs))


def conv_decoder(latent_dim: int, shape: Sequence[int], capacity: int = 32) -> nn.Sequential:
    """The mirror image of `conv_encoder`."""
    channels, *sides = shape
    inner = (2 * capacity, *_quarter(sides))
    return nn.Sequential(
        nn.Linear(latent_dim, 8 * capacity), nn.ReLU(),
        nn.Linear(8 * capacity, math.prod(inner)), nn.ReLU(), nn.Unflatten(1, inner),
        UpConv2d(2 * capacity, capacity), nn.ReLU(), UpConv2d(capacity, channels))


def dgd_cifar_decoder(latent_dim: int, shape: Sequence[int], capacity: int = 32, depth: str = "standard") -> nn.Sequential:
    """The decoders of Schuster & Krogh (A.3) for images of 32×32; without the sigmoid that A.3 puts at their end.

    Transposed 4×4 convolutions of stride 2, each with batch normalisation and ReLU, then a 1×1 convolution, between
    4c, 2c, 2c, c, c and C channels for the capacity c. `depth`: "standard" starts from 4c × 1 × 1, so that
    `latent_dim` is 4c; "shallow" lacks the first convolution and starts from 2c × 4 × 4, `latent_dim` 32c; "linear"
    is the shallow one after a linear layer from any `latent_dim`.
    """
    _check_dgd_cifar(latent_dim, shape, capacity, depth)
    c = capacity
    start = {"standard": [nn.Unflatten(1, (4 * c, 1, 1)), nn.ConvTranspose2d(4 * c, 2 * c, 4), *_norm(2 * c)],
             "shallow": [nn.Unflatten(1, (2 * c, 4, 4))],
             "linear": [nn.Linear(latent_dim, 32 * c), nn.Unflatten(1, (2 * c, 4, 4))]}[depth]
    blocks = [layer for i, o in ((2 * c, 2 * c), (2 * c, c), (c, c)) for layer in (UpConv2d(i, o), *_norm(o))]
    return nn.Sequential(*start, *blocks, nn.ConvTranspose2d(c, shape[0], 1))


def dgd_cifar_encoder(latent_dim: int, shape: Sequence[int], capacity: int = 32, depth: str = "standard") -> nn.Sequential:
    """The mirror image of `dgd_cifar_decoder`, to `[N, latent_dim]`. Our reading of A.3: no normalisation at its end."""
    _check_dgd_cifar(latent_dim, shape, capacity, depth)
    c = capacity
    blocks = [layer for i, o in ((c, c), (c, 2 * c)) for layer in (nn.Conv2d(i, o, 4, 2, 1), *_norm(o))]
    end = {"standard": [*_norm(2 * c), nn.Conv2d(2 * c, 4 * c, 4), nn.Flatten()],
           "shallow": [nn.Flatten()],
           "linear": [nn.Flatten(), nn.Linear(32 * c, latent_dim)]}[depth]
    return nn.Sequential(nn.Conv2d(shape[0], c, 1), *_norm(c), *blocks, nn.Conv2d(2 * c, 2 * c, 4, 2, 1), *end)


class Residual(nn.Module):
    """x + network(x), for a network whose output has the shape of its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


class AffineBridge(nn.Module):
    """network(z) + W z + b for z `[N, inputs]` and a network with outputs `[N, ...]`, `outputs` numbers a row.

    b is the bias of the network's last layer. Where that layer is linear, this is the network whose last hidden layer has
    z beside it.
    """

    def __init__(self, network: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bridge = nn.Linear(inputs, outputs, bias=False)
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        output = self.network(z)
        return output + self.bridge(z).view_as(output)


class SideBySide(nn.Module):
    """The outputs `[N, ...]` of several networks for one input, concatenated along their second axis."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in self.networks], 1)


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def _check_dgd_cifar(latent_dim: int, shape: Sequence[int], capacity: int, depth: str) -> None:
    if tuple(shape[1:]) != (32, 32):
        raise ValueError(f"The DGD paper's CIFAR networks take images of 32×32, given {'×'.join(map(str, shape[1:]))}; "
                         "network='conv' takes other sizes.")
    needed = {"standard": 4 * capacity, "shallow": 32 * capacity, "linear": latent_dim}[depth]
    if latent_dim != needed:
        raise ValueError(f"With capacity {capacity} the {depth} network of the DGD paper has latent_dim={needed}, "
                         f"given {latent_dim}.")


def _quarter(sides: Sequence[int]) -> tuple[int, ...]:
    if any(side % 4 for side in sides):
        raise ValueError(f"A convolutional network needs a height and width that are multiples of 4, given {list(sides)}.")
    return tuple(side // 4 for side in sides)


@torch.no_grad()
def set_output_bias(decoder: nn.Module, value: Tensor) -> None:
    """Makes `value` `[C, H, W]` the bias of the decoder's last layer: its mean over each channel where that is convolutional.

    A decoder that starts from the mean of the data (Burda et al. 2016, their code) need not learn it.
    """
    *_, last = (m for m in decoder.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)))
    last.bias.copy_(value.flatten() if isinstance(last, nn.Linear) else value.flatten(1).mean(1))


def decoder_for(latent_dim: int, shape: Sequence[int]) -> nn.Sequential:
    """The paper's decoder where the observations are 28×28 with one channel, a fully connected one elsewhere."""
    return dgd_mnist_decoder(latent_dim) if tuple(shape) == (1, 28, 28) else mlp_decoder(latent_dim, shape)
