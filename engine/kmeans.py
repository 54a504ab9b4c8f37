"""k-means: centres that k-means++ draws apart (Arthur & Vassilvitskii 2007), moved by Lloyd's iterations."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_BLOCK = 2**22  # distances in memory at a time


@torch.no_grad()
def kmeans(x: Tensor, clusters: int, *, max_iter: int = 30, generator: Generator | None = None) -> Tensor:
    """Centres `[K, D]` of `clusters` clusters of the points `x` `[N, D]`, on their device and in their dtype.

    Lloyd's iterations end when no centre moves, or after `max_iter`; with 0 the centres are those of k-means++. A cluster that
    loses its points keeps its centre. Time O(N·K·D) an iteration; extra memory O(N·D). The same generator gives the same bits.

    Raises:
        ValueError: fewer points than clusters, or no clusters.
    """
    if x.dim() != 2 or not 1 <= clusters <= len(x):
        raise ValueError(f"kmeans: needs points [N, D] and from 1 to N clusters, given {list(x.shape)} and {clusters}.")
    shift = x.mean(0)
    x = x - shift  # for distances are taken as differences of squares
    centres = _seeds(x, clusters, generator)
    for _ in range(max_iter):
        before, centres = centres, _means(x, centres)
        if torch.equal(before, centres):
            break
    return centres + shift


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index `[N]` of the centre of `[K, D]` that is nearest to each point of `x` `[N, D]`."""
    shift = centres.mean(0)
    x, centres = x - shift, centres - shift
    half = 0.5 * centres.square().sum(1)
    blocks = x.split(max(1, _BLOCK // len(centres)))
    return torch.cat([torch.addmm(half, rows, centres.T, alpha=-1).argmin(1) for rows in blocks])


def _seeds(x: Tensor, clusters: int, generator: Generator | None) -> Tensor:
    """Points of `x`, each drawn by its squared distance to those before it: of 2 + ⌊log K⌋ such the one that lowers the sum of
    the distances most."""
    draws = 2 + int(math.log(clusters))
    distances = x.new_full((len(x),), torch.inf)
    chosen = []
    for _ in range(clusters):
        drawable = chosen and bool(distances.any())  # not the first, nor when every point has been chosen
        odds = distances if drawable else torch.ones_like(distances)
        drawn = torch.multinomial(odds, draws, replacement=True, generator=generator)
        after = torch.stack([torch.minimum(distances, (x - x[i]).square().sum(1)) for i in drawn])
        best = after.sum(1).argmin()
        distances = after[best]
        chosen.append(drawn[best])
    return x[torch.stack(chosen)]


def _means(x: Tensor, centres: Tensor) -> Tensor:
    """Means of the points that are nearest to each centre: by matrix products, which add in fixed order."""
    K = len(centres)
    sums, counts = torch.zeros_like(centres), centres.new_zeros(K)
    for rows, index in zip(*(t.split(max(1, _BLOCK // K)) for t in (x, nearest(x, centres))), strict=True):
        members = F.one_hot(index, K).to(x.dtype)
        sums.addmm_(members.T, rows)
        counts += members.sum(0)
    return torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
