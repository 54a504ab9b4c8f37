"""Normalizing flows: invertible maps z → u of R^D with a triangular Jacobian, which turn a density of u into one of z.

    log p(z) = log p(u) + log |det ∂u/∂z|

A block maps dimension d by an affine function that is computed from the dimensions of lower degree:

    u_d = (z_d − m_d) exp(−s_d),    (m_d, s_d) = MADE(z)_d,    log |det ∂u/∂z| = −Σ_d s_d

    autoregressive    degrees 1, ..., D, in every other block D, ..., 1     Papamakarios et al. 2017 (MAF); Kingma et al. 2016
    RealNVP           degrees 1 and 2, in turn, exchanged from block to block                Dinh et al. 2017, coupling layers

The map z → u is one pass through the network, its inverse as many as there are degrees: D for an autoregressive flow, two
for RealNVP. Whoever needs densities at given z lets z → u be the flow (MAF), whoever draws samples only, and their densities,
its inverse (IAF).

Scales lie in e^±2 in each block (s = 2 tanh(raw / 2)), so that far points stay finite. A flow starts as the identity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST_LOG_SCALE = 2.0


class MaskedLinear(nn.Linear):
    """nn.Linear whose weights are multiplied by `mask` `[outputs, inputs]`."""

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__(mask.shape[1], mask.shape[0], bias)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked ReLU layers, and a direct connection, whose outputs for a dimension see the dimensions of lower degree alone.

    Germain et al. 2015; hidden units have all degrees in turn. Outputs start at zero.

    Args:
        dim: D.
        hidden: widths of the hidden layers.
        outputs: for each dimension.
        degrees: integers `[D]` from 1, by default 1, ..., D.
        context: dimensions of a further input, which every output sees.
    """

    def __init__(self, dim: int, hidden: Sequence[int], outputs: int = 2, *, degrees: Tensor | None = None,
                 context: int = 0) -> None:
        super().__init__()
        self.outputs, self.context = outputs, context
        degrees = torch.arange(1, dim + 1) if degrees is None else degrees
        self.register_buffer("degrees", degrees, persistent=False)
        self.highest_degree = int(degrees.max())
        first = 0 if context else 1
        inputs = last = torch.cat([degrees, degrees.new_zeros(context)])
        layers = []
        for width in hidden:
            units = first + torch.arange(width) % max(1, self.highest_degree - first)
            layers += [MaskedLinear(units[:, None] >= last), nn.ReLU()]
            last = units
        self.hidden = nn.Sequential(*layers)
        self.head = MaskedLinear(degrees.repeat(outputs)[:, None] > last)
        self.direct = MaskedLinear(degrees.repeat(outputs)[:, None] > inputs, bias=False)
        for parameter in (*self.head.parameters(), *self.direct.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs `[..., outputs, D]` of `x` `[..., D]` and `context`, whose shape is, or broadcasts to, `[..., context]`."""
        if self.context:
            x = torch.cat([x, context.expand(*x.shape[:-1], self.context)], -1)
        return (self.head(self.hidden(x)) + self.direct(x)).unflatten(-1, (self.outputs, -1))


class AutoregressiveFlow(nn.Module):
    """A stack of autoregressive blocks whose order is reversed from one to the next; its `forward` is z → u.

    Args:
        dim: D.
        blocks: their number.
        hidden: widths of the hidden layers of each block's `MADE`.
        context: dimensions of a further input on which the map depends.

    With the defaults the prior of Ma et al. 2019 (MAE) and Chen et al. 2017 (VLAE) for 32 dimensions, as in the code of Ma et
    al.: eight blocks with one hidden layer of 10 D units, which also connect inputs to outputs directly.
    """

    def __init__(self, dim: int, blocks: int = 8, hidden: Sequence[int] = (320,), context: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MADE(dim, hidden, degrees=self.degrees(dim, block), context=context)
                                    for block in range(blocks))

    @staticmethod
    def degrees(dim: int, block: int) -> Tensor:
        """Of the dimensions in that block, `[D]`."""
        degrees = torch.arange(1, dim + 1)
        return degrees.flip(0) if block % 2 else degrees

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u `[..., D]` and log |det ∂u/∂z| `[...]` of `z` `[..., D]`, with `context` `[..., C]` of a flow that has one.

        Time of one pass through each block.
        """
        log_det = z.new_zeros(z.shape[:-1])
        for block in self.blocks:
            shift, log_scale = _shift_and_log_scale(block, z, context)
            z = (z - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(-1)
        return z, log_det

    def inverse(self, u: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z `[..., D]` and log |det ∂z/∂u| `[...]` of `u` `[..., D]`. Time of as many passes as there are degrees, D or two."""
        log_det = u.new_zeros(u.shape[:-1])
        for block in reversed(self.blocks):
            z = torch.zeros_like(u)
            for degree in range(1, block.highest_degree + 1):
                shift, log_scale = _shift_and_log_scale(block, z, context)
                # Zero where z is not known yet: its values may grow from pass to pass.
                z = torch.where(block.degrees <= degree, u * log_scale.exp() + shift, 0)
            u, log_det = z, log_det + log_scale.sum(-1)
        return u, log_det


class RealNVP(AutoregressiveFlow):
    """As `AutoregressiveFlow`, of coupling layers: one half of the dimensions, every other one, is mapped given the other.

    The half that is given is mapped too, by numbers that are learned, or computed from the context.
    """

    @staticmethod
    def degrees(dim: int, block: int) -> Tensor:
        """Of the dimensions in that block, `[D]`."""
        return 1 + (torch.arange(dim) + block) % 2


def _shift_and_log_scale(block: MADE, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    shift, raw = block(z, context).unbind(-2)
    return shift, _LARGEST_LOG_SCALE * torch.tanh(raw / _LARGEST_LOG_SCALE)
