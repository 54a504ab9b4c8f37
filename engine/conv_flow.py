"""An autoregressive flow of maps, by masked convolutions (Kingma et al. 2016; Chen et al. 2017): z → u of `[N, F · h · w]`.

As in `flows`, but the numbers at a place are mapped given those at the places before it in raster order:

    u_i = (z_i − m_i) exp(−s_i),    (m_i, s_i) = CNN(z_<i)        i: a place of the map; all F numbers there together

and in every other block backwards, from the last place to the first. The inverse takes place after place, and with what its
convolutions have read (`causal`) the time of about one pass.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .causal import Map, Window, masked_conv

_LARGEST_LOG_SCALE = 2.0


def latent_maps(shape: Sequence[int], size: int) -> tuple[int, int, int]:
    """(F, H/4, W/4) with `size` numbers in all, for images of `shape` (C, H, W)."""
    _, height, width = shape
    if height % 4 or width % 4 or size % (height * width // 16):
        raise ValueError(f"Latent maps have a quarter of the height and width of the images; {size} numbers are no such maps "
                         f"for images of {height}×{width}.")
    return size // (height * width // 16), height // 4, width // 4


class MaskedCNN(nn.Module):
    """3×3 masked convolutions with elu between them, the first of which leaves the place itself out. Outputs start at zero."""

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [features, *hidden, 2 * features]
        self.convs = nn.ModuleList(masked_conv(i, o, 3, centre=layer > 0)
                                   for layer, (i, o) in enumerate(itertools.pairwise(widths)))
        for parameter in self.convs[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, convs: Sequence[Map] | None = None) -> tuple[Tensor, Tensor]:
        """Shifts and log-scales `[..., F]`; `convs` take the place of the convolutions at single places."""
        first, *others = convs or self.convs
        h = first(z)
        for conv in others:
            h = conv(F.elu(h))
        shift, raw = h.chunk(2, -1)
        return shift, _LARGEST_LOG_SCALE * torch.tanh(raw / _LARGEST_LOG_SCALE)


class ConvFlow(nn.Module):
    """A stack of blocks over maps of `shape` (F, h, w), which starts as the identity but for the order of the places.

    With the defaults that of "MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders" (B.2): eight blocks
    of three layers with 128 channels.
    """

    def __init__(self, shape: Sequence[int], blocks: int = 8, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.blocks = nn.ModuleList(MaskedCNN(shape[0], hidden) for _ in range(blocks))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u `[..., D]` and log |det ∂u/∂z| `[...]` of `z` `[..., D]`, D = F h w."""
        h = self._places(z)
        log_det = h.new_zeros(len(h))
        for block in self.blocks:
            shift, log_scale = block(h)
            h = ((h - shift) * (-log_scale).exp()).flip((1, 2))
            log_det = log_det - log_scale.sum((1, 2, 3))
        return self._flat(h).view_as(z), log_det.view(z.shape[:-1])

    @torch.no_grad()
    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z `[..., D]` and log |det ∂z/∂u| `[...]` of `u` `[..., D]`; without gradient."""
        h = self._places(u)
        log_det = h.new_zeros(len(h))
        for block in reversed(self.blocks):
            h, log_scale = _inverse(block, h.flip((1, 2)))
            log_det = log_det + log_scale
        return self._flat(h).view_as(u), log_det.view(u.shape[:-1])

    def _places(self, z: Tensor) -> Tensor:
        """`[N, h, w, F]`."""
        return z.reshape(-1, *self.shape).movedim(1, -1)

    def _flat(self, h: Tensor) -> Tensor:
        return h.movedim(-1, 1).reshape(len(h), -1)


def _inverse(block: MaskedCNN, u: Tensor) -> tuple[Tensor, Tensor]:
    """z `[N, h, w, F]` and the sums of the log-scales `[N]` of `u` of that shape."""
    _, height, width, _ = u.shape
    z, log_det = torch.empty_like(u), u.new_zeros(len(u))
    windows = first, *others = [Window(conv, len(u), width) for conv in block.convs]
    for row in range(height):
        for window in windows:
            window.next_row()
        for column in range(width):
            steps = [lambda _, column=column: first.read(column), *(partial(window.at, column) for window in others)]
            shift, log_scale = block(u[:, row, column], steps)
            z[:, row, column] = u[:, row, column] * log_scale.exp() + shift
            first.write(column, z[:, row, column])
            log_det = log_det + log_scale.sum(-1)
    return z, log_det
