"""Weight normalisation that starts from data (Salimans & Kingma 2016).

The weights of an output are g v / |v|. For the first rows that pass through a new network, the gain g and the bias are set so
that each output of each layer has mean 0 and variance 1 over these rows (§3 there).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from .data import Data
from .diagnostics import evaluating
from .system import Batch, System

START_ROWS = 100


def weight_norm(layer: nn.Module) -> nn.Module:
    """`layer`, linear or a convolution, with a gain for each output."""
    return parametrizations.weight_norm(layer, dim=int(isinstance(layer, nn.ConvTranspose2d)))


@contextmanager
def starting(network: nn.Module) -> Iterator[bool]:
    """Within, each layer with gains is set by the outputs of its first call; yields whether there are such layers.

    The layers after it see what it then gives: one pass through the network is enough.
    """
    layers = [module for module in network.modules() if is_parametrized(module, "weight")]
    hooks = [layer.register_forward_hook(_start) for layer in layers]
    try:
        yield bool(layers)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def start_from(system: System, data: Data) -> None:
    """Starts the layers with gains that the loss of a new system calls, from up to `START_ROWS` rows, spread over `data`."""
    with starting(system) as needed, evaluating(system):
        if needed:
            index = torch.arange(0, len(data), math.ceil(len(data) / START_ROWS))
            system.loss(Batch(data.take(index).fixed().x, index), system.phases()[0].name)


@torch.no_grad()
def _start(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> Tensor:
    """Outputs `[N, ..., O]` of a linear layer, or `[N, O, H, W]`, with mean 0 and variance 1, and the layer that gives them."""
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    variance, mean = torch.var_mean(output, [i for i in range(output.dim()) if i != axis], correction=0)
    scale = torch.where(variance > 1e-10, variance.rsqrt(), 1)  # an output that is the same for all rows keeps its gain
    gain = layer.parametrizations.weight.original0
    gain.mul_(scale.view_as(gain))
    layer.bias.sub_(mean).mul_(scale)
    shape = [-1 if i == axis else 1 for i in range(output.dim())]
    return (output - mean.view(shape)) * scale.view(shape)
