"""Distances between sets of images or features: what a model generates against what it was trained on.

The Fréchet distance of two Gaussians (Dowson & Landau 1982), which is their squared 2-Wasserstein distance:

    d²(N(m₁, S₁), N(m₂, S₂)) = |m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁ S₂)^½,    tr (S₁ S₂)^½ = Σ singular values of S₁^½ S₂^½

Heusel et al. (2017) take it between the features of two sets of images under an Inception network (FID). The symmetric
roots come from eigenvalues: no root of the matrix S₁ S₂, which is not symmetric and has a complex one where it is singular.
"""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features `x` `[N, D]` and `y` `[M, D]`; covariances over N − 1.

    The estimate is biased upwards, the more the fewer the rows: compare sets of equal size. Fewer rows than D are allowed.
    In float64, O((N + M)·D² + D³). Never negative.

    Raises:
        ValueError: shapes do not fit, fewer than two rows, or values that are not finite.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError("frechet_distance: x and y must have shapes [N, D] and [M, D] with N and M at least 2, "
                         f"given {list(x.shape)} and {list(y.shape)}; flatten images to rows.")
    return frechet_distance_of_moments(*_moments(x), *_moments(y))


@torch.no_grad()
def frechet_distance_of_moments(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """`frechet_distance` from means `[D]` and covariances `[D, D]`, of which any may be singular."""
    D = len(mean1)
    shapes = [tuple(t.shape) for t in (mean1, cov1, mean2, cov2)]
    if shapes != [(D,), (D, D), (D,), (D, D)]:
        raise ValueError("frechet_distance_of_moments: takes means [D] and covariances [D, D], given "
                         + ", ".join(str(list(s)) for s in shapes) + ".")
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    if not all(bool(t.isfinite().all()) for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("frechet_distance_of_moments: means and covariances must be finite; look for NaN in the features.")
    common = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * common
    return max(distance.item(), 0.0)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and covariance `[D, D]` of rows, float64."""
    x = x.detach().double()
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
