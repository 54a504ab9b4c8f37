"""Distances between sets of images or features: what a model generates against what it was trained on.

The Fréchet distance of two Gaussians (Dowson & Landau 1982), which is their squared 2-Wasserstein distance:

    d²(N(m₁, S₁), N(m₂, S₂)) = |m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁ S₂)^½

Heusel et al. (2017) take it between the features of two sets of images under an Inception network (FID). With any factors
S = A Aᵀ it needs no root of the matrix S₁ S₂, which is not symmetric and has a complex one where it is singular:

    tr S = Σ A²,    tr (S₁ S₂)^½ = Σ singular values of A₁ᵀ A₂

Factors are triangles of Cholesky, eigenvectors where a covariance is singular, or the centred rows themselves where they are
fewer than features.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TypeVar

import torch
from torch import Generator, Tensor

from .data import DataError
from .features import Features, Images, Inception, extract, image_files
from .moments import Moments, add_gram, factor_covariance, read_arrays

Rows = Tensor | Moments  # feature rows [N, D], or what is known of them
Source = Rows | str | os.PathLike[str]
Result = TypeVar("Result")
TOLERANCE = 1e-10  # error of the distance, relative to the traces of both covariances


def frechet_distance(x: Rows, y: Rows) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features `x` `[N, D]` and `y` `[M, D]`; covariances over N − 1.

    Either may be given by its `Moments`. The estimate is biased upwards, the more the fewer the rows: compare sets of equal
    size, or extrapolate (`frechet_infinity`). In float64, never negative; its error is of the order of D·eps·(tr S₁ + tr S₂).
    Time O((N + M)·D² + D³), the second term about 5 D³ operations; O((N + M)²·D) for sets of up to D rows.

    Raises:
        ValueError: shapes do not fit, fewer than two rows, or values that are not finite.
    """
    _check("frechet_distance", x, y)
    return _distance(_gaussian(x), _gaussian(y))


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
    return _distance((mean1, factor_covariance(cov1)), (mean2, factor_covariance(cov2)))


def frechet_infinity(x: Tensor, y: Rows, *, points: int = 15, smallest: int | None = None,
                     generator: Generator | None = None) -> float:
    """Fréchet distance extrapolated to infinitely many rows of `x`: FID∞ (Chong & Forsyth 2020).

    The bias of the estimate is linear in 1/N to first order. The distances of `points` random subsets of `x`, of sizes evenly
    spaced from `smallest` to N, are fitted by a line in 1/size; its value at 0 is the result, which may be negative.

    Args:
        x: features `[N, D]` of what is judged.
        y: the reference, held fixed: the bias from its own number of rows stays. `frechet_jackknife` removes both.
        smallest: rows of the smallest subset; left out, N/10 (as 5,000 of 50,000 in the paper). The line needs subsets of
            several times D rows.

    Time of `points` distances.

    Raises:
        ValueError: as `frechet_distance`; fewer than two points, or no subset of two rows and fewer than N.
    """
    _check_rows("frechet_infinity", x, y)
    N = len(x)
    smallest = max(2, N // 10) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < N:
        raise ValueError(f"frechet_infinity: points must be at least 2 and smallest between 2 and {N - 1} for {N} rows, given "
                         f"{points} and {smallest}.")
    reference = _gaussian(y)
    sizes = torch.linspace(smallest, N, points, dtype=torch.float64).round()
    subsets = (x[_shuffled(x, generator)[:int(size)]] for size in sizes)
    distances = [_distance(_gaussian(rows), reference) for rows in subsets]
    line = torch.stack((torch.ones_like(sizes), 1 / sizes), 1)
    return torch.linalg.lstsq(line, sizes.new_tensor(distances)[:, None]).solution[0].item()


@dataclass(frozen=True)
class JackknifeEstimate:
    """A bias-corrected `value`, its `standard_error`, and the `groups` they come from."""

    value: float
    standard_error: float
    groups: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval by Student's t with groups − 1 degrees of freedom."""
        if not 0 < confidence < 1:
            raise ValueError(f"interval: confidence must lie in (0, 1), given {confidence!r}.")
        half = _student_quantile(0.5 + 0.5 * confidence, self.groups - 1) * self.standard_error
        return self.value - half, self.value + half


def frechet_jackknife(x: Tensor, y: Rows, *, groups: int = 20, generator: Generator | None = None) -> JackknifeEstimate:
    """Fréchet distance with its bias of order 1/N removed, and its standard error, by the jackknife over random groups.

    With d the distance of all rows and d₍g₎ that without group g of G, the mean of the pseudo-values G·d − (G − 1)·d₍g₎ is the
    estimate, and their standard deviation over √G its error (Quenouille 1956, Tukey 1958).

    Args:
        x: features `[N, D]`.
        y: features `[M, D]`, of which a group is left out together with one of `x`: the bias from both sets is removed and
            the error holds both; or `Moments`, held fixed as if they were exact.
        groups: G; more cost more and give little.

    Time of G + 1 distances. Needs several times D rows: below, the bias is not of order 1/N.

    Raises:
        ValueError: as `frechet_distance`; fewer than 5 groups, or too few rows for them.
    """
    _check_rows("frechet_jackknife", x, y)
    resampled = [rows for rows in (x, y) if isinstance(rows, Tensor)]
    if not 5 <= groups <= min(map(len, resampled)):
        raise ValueError(f"frechet_jackknife: groups must be at least 5 and at most the number of rows, given {groups} for "
                         f"{' and '.join(str(len(r)) for r in resampled)} rows.")
    labels = [_shuffled(r, generator) % groups for r in resampled]
    fixed = None if isinstance(y, Tensor) else _gaussian(y)
    whole = _distance(_gaussian(x), fixed or _gaussian(y))
    without = []
    for g in range(groups):
        left = [_gaussian(r[label != g]) for r, label in zip(resampled, labels, strict=True)]
        without.append(_distance(left[0], fixed or left[1]))
    pseudo = groups * whole - (groups - 1) * torch.tensor(without, dtype=torch.float64)
    return JackknifeEstimate(pseudo.mean().item(), pseudo.std().item() / math.sqrt(groups), groups)


def feature_moments(source: Source, features: Features | None = None, *, batch_size: int = 50) -> Moments:
    """Moments of the features of a set of images; their `save` writes the file that `fid` and pytorch-fid take for the set.

    Arguments and errors are those of `fid`. Memory O(D²), whatever the number of images.
    """
    opened = _open(source)
    return _moments(opened, _features(features, opened), batch_size)


def fid(x: Source, y: Source, features: Features | None = None, *, batch_size: int = 50,
        estimator: Callable[[Rows, Rows], Result] = frechet_distance) -> Result:
    """Fréchet distance between the features of two sets of images: FID, where the features are Inception's.

    Args:
        x: the set that is judged: a folder of image files; a tensor `[N, C, H, W]` of images, uint8 from 0 to 255 or float32 in
            [0, 1]; a tensor `[N, D]` of features; `Moments`; or an .npz file with the statistics `mu` and `sigma`
            (pytorch-fid's, and those of `Moments.save`) or with an array `features` `[N, D]`.
        y: the reference, in any of these forms.
        features: from images `[B, C, H, W]` in [0, 1] to features `[B, D]`, e.g. `Inception(weights=PATH)` or a classifier of
            one's own data, on whatever device it is. Left out, `Inception()` (extra `fid`), loaded if there are images.
        batch_size: images of one call of it.
        estimator: `frechet_distance`, `frechet_infinity`, `frechet_jackknife`, or any function of two sets of features; what
            it returns is returned. All but the first are given rows where there are some, which are then kept in memory.

    Values compare only with the same features, image sizes and numbers of images. Published ones differ also by what was done
    to the images before: none is resized or normalised here but by the network itself.

    Raises:
        DataError: nothing there, or files that are damaged or of the wrong kind.
        ValueError: as the estimator.
        MissingExtraError: Inception without the extra `fid`, image files without Pillow.
        FileNotFoundError: Inception without its weights.
    """
    sets = _open(x), _open(y)
    features = _features(features, *sets)
    if estimator is frechet_distance:
        return frechet_distance(*(_moments(opened, features, batch_size) for opened in sets))
    return estimator(*(torch.cat(list(extract(features, opened, batch_size))) if _is_images(opened) else opened
                       for opened in sets))


def _open(source: Source) -> Rows | Images:
    """What a source holds; of a folder the names of its files."""
    if isinstance(source, Moments):
        return source
    if isinstance(source, Tensor):
        if source.dim() not in (2, 4) or not len(source):
            raise ValueError(f"fid: a tensor must hold images [N, C, H, W] or features [N, D], given {list(source.shape)}.")
        return source
    if Path(source).suffix != ".npz":
        return image_files(source)
    arrays = read_arrays(source)
    if "features" in arrays:
        return torch.from_numpy(arrays["features"])
    if "mu" not in arrays:
        raise DataError(f"{source} holds {', '.join(arrays) or 'no arrays'}; looked for features, or mu and sigma.")
    return Moments.load(source)


def _is_images(opened: Rows | Images) -> bool:
    return isinstance(opened, list) or (isinstance(opened, Tensor) and opened.dim() == 4)


def _features(given: Features | None, *sets: Rows | Images) -> Features | None:
    return Inception() if given is None and any(map(_is_images, sets)) else given


def _moments(opened: Rows | Images, features: Features | None, batch_size: int) -> Moments:
    if isinstance(opened, Moments):
        return opened
    moments = Moments()
    for rows in extract(features, opened, batch_size) if _is_images(opened) else [opened]:
        moments.add(rows)
    return moments


def _check(name: str, x: Rows, y: Rows) -> None:
    """Whether `x` and `y` are sets of at least two rows of the same features."""
    shapes = [list(rows.shape) if isinstance(rows, Tensor) else [rows.count, rows.dimensions] for rows in (x, y)]
    if any(len(shape) != 2 or shape[0] in (0, 1) for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"{name}: x and y must have shapes [N, D] and [M, D] with N and M at least 2, "
                         f"given {' and '.join(map(str, shapes))}; flatten images to rows.")


def _check_rows(name: str, x: Tensor, y: Rows) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: x must be feature rows [N, D], given {type(x).__name__}, of which no part can be left out.")
    _check(name, x, y)


def _gaussian(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and a factor `[D, r]` of the covariance."""
    moments = rows if isinstance(rows, Moments) else Moments().add(rows)
    return moments.mean(), moments.factor()


@torch.no_grad()
def _distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (mean1, factor1), (mean2, factor2) = first, (t.to(first[0].device) for t in second)
    traces = factor1.square().sum() + factor2.square().sum()
    common = _nuclear_norm(factor1.T @ factor2, TOLERANCE * traces)
    return max(((mean1 - mean2).square().sum() + traces - 2 * common).item(), 0.0)


def _nuclear_norm(matrix: Tensor, tolerance: Tensor) -> Tensor:
    """Sum of the singular values: roots of the eigenvalues of the smaller Gram matrix, up to three times as fast, where
    their error is below `tolerance`.

    A rounding of the largest eigenvalue may be in each of them, so that small ones lose half of their digits or all.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    # Cholesky's triangles grade the matrix downwards; LAPACK keeps small eigenvalues when it reads what is below the diagonal.
    values = torch.linalg.eigvalsh(add_gram(tall.new_zeros(tall.shape[1], tall.shape[1]), tall).T, UPLO="L")
    rounding = torch.finfo(values.dtype).eps * values.amax() if len(values) else values.sum()
    if 0.5 * rounding * values.clamp(min=rounding).rsqrt().norm() <= tolerance:
        return values.clamp(min=0).sqrt().sum()
    return torch.linalg.svdvals(matrix).sum()


def _shuffled(rows: Tensor, generator: Generator | None) -> Tensor:
    return torch.randperm(len(rows), generator=generator, device=rows.device)


def _student_quantile(p: float, degrees: int) -> float:
    """By the expansion in 1/degrees of Abramowitz & Stegun 26.7.5; within 0.1 % at p = 0.975 from 4 degrees on."""
    z = NormalDist().inv_cdf(p)
    terms = (z,
             (z**3 + z) / 4,
             (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return sum(term / degrees**k for k, term in enumerate(terms))
