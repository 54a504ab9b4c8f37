"""Gaussian mixtures fitted by expectation maximisation (Dempster, Laird & Rubin 1977), for density estimation.

With the responsibilities r_nk = p(k | z_n) of the present mixture and the differences δ_nk = z_n − μ_k, an iteration sets

    N_k = Σ_n r_nk,    π_k ← N_k / N,    μ_k ← μ_k + m_k,    m_k = Σ_n r_nk δ_nk / N_k
    full         Σ_k ← Σ_n r_nk δ_nk δ_nkᵀ / N_k − m_k m_kᵀ + λ I
    diagonal     the diagonal of that
    spherical    the mean of its diagonal, times I
    tied         Σ ← [S − Σ_k N_k (μ_k − z̄)(μ_k − z̄)ᵀ] / N + λ I,    S = Σ_n (z_n − z̄)(z_n − z̄)ᵀ

with z̄ the mean of all points and the new means in the last line. The sums about the present means come from one pass over the
points (`kernels.gmm_moments`): nothing of size N×K is stored, and no variance is a difference of large numbers once the means
rest. A tied covariance is whitened away: with Σ⁻¹ = P Pᵀ, the points (z_n − z̄) P have components of unit variance.

Ex-post density estimation (Ghosh et al. 2020, §4) fits such a mixture to the representations of a trained autoencoder and
samples from it:

    mixture = fit_mixture(system.represent(x), 10, "full").mixture
    images = system.sample(100, prior=mixture)

Trap. The likelihood has no maximum: a component that closes in on one point has no end to it. λ (`reg_covar`) bounds every
variance from below, in the units of the data squared; scale representations of a size far from one, or set it.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from .kernels import gmm_full_log_prob, gmm_full_moments, gmm_log_prob, gmm_moments
from .kmeans import kmeans, nearest
from .moments import Moments

Covariance = Literal["diagonal", "full", "tied", "spherical"]
SAMPLE = 10_000  # points, and 256 a component, that k-means starts from


class GaussianMixture(nn.Module):
    """A mixture of K Gaussians over D dimensions, of which nothing is learned by gradients: a prior like those of `priors`.

    Args:
        weights: `[K]`, taken in proportion.
        means: `[K, D]`.
        covariances: variances `[K, D]` (diagonal) or `[K]` (spherical), or matrices `[K, D, D]` (full) or `[D, D]` (tied).
        covariance: which of these.

    Attributes: the buffers `log_weights` `[K]`, normalised, `means`, `covariances`; for full and tied `precision_cholesky`, the
    upper triangular P of the precisions P Pᵀ, as in scikit-learn.

    Raises:
        ValueError: shapes do not fit together, or a covariance is not positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, covariance: Covariance = "diagonal") -> None:
        super().__init__()
        _check_covariance("GaussianMixture", covariance)
        K, D = means.shape if means.dim() == 2 else (0, 0)
        expected = {"diagonal": (K, D), "spherical": (K,), "full": (K, D, D), "tied": (D, D)}[covariance]
        if not K or tuple(weights.shape) != (K,) or tuple(covariances.shape) != expected:
            raise ValueError(f"GaussianMixture: weights [K], means [K, D] and {covariance} covariances must fit together, "
                             f"given {list(weights.shape)}, {list(means.shape)} and {list(covariances.shape)}.")
        self.covariance = covariance
        self.register_buffer("log_weights", weights.log().log_softmax(0))
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        if covariance in ("full", "tied"):
            factor, info = torch.linalg.cholesky_ex(covariances)
            definite = (info == 0).reshape(-1)
        else:
            definite = (covariances > 0).reshape(len(covariances), -1).all(1)
        if not bool(definite.all()):
            of = "" if covariance == "tied" else f" of component {int((~definite).nonzero()[0])}"
            raise ValueError(f"GaussianMixture: the covariance{of} is not positive definite.")
        if covariance in ("full", "tied"):
            eye = torch.eye(D, dtype=factor.dtype, device=factor.device).expand_as(factor)
            self.register_buffer("precision_cholesky", torch.linalg.solve_triangular(factor, eye, upper=False).mT.contiguous())

    def forward(self, z: Tensor) -> Tensor:
        """Log-density of `z` `[..., D]`, in nats, `[...]`."""
        if self.covariance == "full":
            return gmm_full_log_prob(z, self.means, self.precision_cholesky, self.log_weights)
        return gmm_log_prob(*self._with_variances(z), self.log_weights) + self._log_volume

    def log_prior(self) -> Tensor:
        """log P(φ) of no parameters: zero."""
        return self.means.new_zeros(())

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`."""
        like = {"dtype": self.means.dtype, "device": self.means.device}
        components = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, **like)
        if self.covariance == "diagonal":
            noise *= self.covariances[components].sqrt()
        elif self.covariance == "spherical":
            noise *= self.covariances[components, None].sqrt()
        elif self.covariance == "tied":
            noise = _unwhiten(noise, self.precision_cholesky)
        else:
            for k, factor in enumerate(self.precision_cholesky):
                own = components == k
                noise[own] = _unwhiten(noise[own], factor)
        return self.means[components] + noise

    def sums(self, z: Tensor) -> list[Tensor]:
        """Over points `z` `[N, D]`, in float64: Σ log p `[]`, Σ r `[K]`, Σ r δ `[K, D]`; and Σ r δ δᵀ `[K, D, D]` of full ones,
        its diagonal Σ r δ² `[K, D]` of diagonal and spherical ones."""
        if self.covariance == "full":
            log_prob, *sums = gmm_full_moments(z, self.means, self.precision_cholesky, self.log_weights)
        else:
            log_prob, *sums = gmm_moments(*self._with_variances(z), self.log_weights)
        sums = [log_prob.sum(dtype=torch.float64) + len(z) * self._log_volume, *(s.double() for s in sums)]
        if self.covariance == "tied":
            sums[2:] = [_unwhiten(sums[2], self.precision_cholesky.double())]
        return sums

    @property
    def _log_volume(self) -> Tensor | float:
        """log |P| where points are whitened."""
        return self.precision_cholesky.diagonal().log().sum() if self.covariance == "tied" else 0.0

    def _with_variances(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points, means and log-variances, of a tied covariance in whitened space."""
        if self.covariance == "tied":
            centre = self.log_weights.exp() @ self.means
            return (z - centre) @ self.precision_cholesky, (self.means - centre) @ self.precision_cholesky, z.new_zeros(())
        log_vars = self.covariances.log()
        return z, self.means, log_vars if self.covariance == "diagonal" else log_vars[:, None]


@dataclass(frozen=True, eq=False)
class MixtureFit:
    """What `fit_mixture` found.

    Attributes:
        mixture: with the parameters of the last iteration.
        history: of each iteration the mean log-likelihood of a point, in nats, under the parameters that it started from: it
            never falls but by rounding and `reg_covar`.
        converged: the last iteration raised it by less than `tol`.
    """

    mixture: GaussianMixture
    history: tuple[float, ...]
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.history)

    @property
    def log_likelihood(self) -> float:
        """The last of `history`, scikit-learn's `lower_bound_`."""
        return self.history[-1]


@torch.no_grad()
def fit_mixture(x: Tensor | Iterable[Tensor], components: int, covariance: Covariance = "diagonal", *,
                start: GaussianMixture | Tensor | None = None, starts: int = 1, max_iter: int = 100, tol: float = 1e-3,
                reg_covar: float = 1e-6, batch_size: int | None = None, device: torch.device | str | None = None,
                generator: Generator | None = None) -> MixtureFit:
    """Fits a mixture of Gaussians to points by EM; from the same start, with scikit-learn's iterations.

    Args:
        x: points `[N, D]`, floating point, or batches of them: a list, a DataLoader of tensors or whatever can be gone through
            again and again. Every iteration is over all of them, and its sums are added up in float64: however the points are
            cut, the iterations are the same but for rounding.
        components: K.
        covariance: "diagonal", "full", "tied" (one matrix for all components) or "spherical" (one variance for each).
        start: a mixture, or means `[K, D]`. Left out, the means are those of k-means with k-means++ seeds, on at most
            max(10,000, 256·K) of the points. Means alone start with the weights and covariances of the clusters around
            them.
        starts: how many times to begin, of which the fit of highest likelihood is returned; more than one without `start`.
        max_iter, tol: end after `max_iter` iterations, or when the mean log-likelihood rises by less than `tol` nats.
        reg_covar: λ, added to the variances.
        batch_size: points of a tensor that are worked on at a time; left out, all.
        device: where to work, to which each batch is moved; left out, where the points are.
        generator: of the starts, on that device.

    Returns:
        The fit, with a mixture on that device and in the dtype of the points (half precision: float32). Look at `converged`.
        The work is done in that dtype, the M-step in float64; float64 on CUDA is the reference's, which holds N×K×D numbers of
        a batch. A component that loses all its points keeps its place, with a
        weight of zero.

    Time O(N·K·D) an iteration, tied O(N·D·(K + D)), full O(N·K·D²); extra memory O(N·D) for tied, of a batch, else of the order
    of the parameters and of 512·K.

    Raises:
        ValueError, TypeError: arguments that do not fit together, points that are not finite or fewer than components, or a
            covariance that collapses in spite of `reg_covar`.
    """
    _check_options(components, covariance, start, starts, max_iter, tol, reg_covar, batch_size)
    batches = _Batches(x, batch_size, device)
    drawn = 0 if isinstance(start, GaussianMixture) else max(SAMPLE, 256 * components)
    points = _survey(batches, drawn, covariance == "tied", generator)
    if points.count < components:
        raise ValueError(f"fit_mixture: {components} components need at least as many points, given {points.count}.")
    if isinstance(start, GaussianMixture) and start.means.shape[1] != points.sample.shape[1]:
        raise ValueError(f"fit_mixture: start has {start.means.shape[1]} dimensions, the points {points.sample.shape[1]}.")
    fits = []
    for _ in range(starts):
        if isinstance(start, GaussianMixture):
            first = copy.deepcopy(start)
        else:
            means = kmeans(points.sample, components, generator=generator) if start is None else start.to(points.sample)
            first = _around(means, points.sample, covariance, reg_covar)
        fits.append(_iterate(first.to(points.sample), batches, points, max_iter, tol, reg_covar))
    return max(fits, key=lambda fit: fit.log_likelihood)


class _Batches:
    """The points, batch by batch and in working precision, as often as they are asked for."""

    def __init__(self, x: Tensor | Iterable[Tensor], batch_size: int | None, device: torch.device | str | None) -> None:
        if isinstance(x, Tensor):
            x = x.split(batch_size or max(1, len(x))) if x.dim() else (x,)
        elif batch_size is not None:
            raise ValueError("fit_mixture: batch_size cuts a tensor; what comes in batches is worked on as it comes.")
        elif not isinstance(x, Iterable) or isinstance(x, Iterator):
            raise TypeError("fit_mixture: x must be a tensor [N, D] or batches that can be gone through more than once "
                            f"(a list, a DataLoader), given a {type(x).__name__}.")
        self.given, self.device = x, None if device is None else torch.device(device)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.given:
            if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dim() != 2:
                kind = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
                raise TypeError(f"fit_mixture: points must be floating-point tensors [N, D], given {kind}.")
            yield rows.to(self.device, torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class _Points:
    """What is known of the points before the first iteration."""

    count: int
    sample: Tensor  # some of them, or all; none if not needed
    mean: Tensor | None  # of all, in float64, for a tied covariance
    covariance: Tensor | None  # over N


def _survey(batches: _Batches, size: int, scatter: bool, generator: Generator | None) -> _Points:
    """Checks the points, counts them and draws `size` of them without replacement, in one pass."""
    count, kept, keys, moments = 0, None, None, Moments()
    for rows in batches:
        if kept is None:
            kept, keys = rows[:0], rows.new_empty(0)
        if rows.shape[1] != kept.shape[1]:
            raise ValueError(f"fit_mixture: batches must agree in D, given {kept.shape[1]} and {rows.shape[1]}.")
        if not bool(rows.sum(dtype=torch.float64).isfinite()):  # NaN and ∞ both show in the sum
            raise ValueError("fit_mixture: points must be finite; leave out those that are not.")
        count += len(rows)
        if scatter:
            moments.add(rows)
        if size:  # the points of the largest of random keys
            own = torch.rand(len(rows), generator=generator, dtype=rows.dtype, device=rows.device)
            chosen = own.topk(min(size, len(rows))).indices
            kept, keys = torch.cat([kept, rows[chosen]]), torch.cat([keys, own[chosen]])
            chosen = keys.topk(min(size, len(keys))).indices
            kept, keys = kept[chosen], keys[chosen]
    if not count or not kept.shape[1]:
        raise ValueError("fit_mixture: x has no points, or points of no dimensions.")
    if not scatter:
        return _Points(count, kept, None, None)
    covariance = moments.covariance() * (1 - 1 / count) if count > 1 else torch.zeros_like(moments.mean()).diag()
    return _Points(count, kept, moments.mean(), covariance)


def _around(means: Tensor, sample: Tensor, covariance: Covariance, reg_covar: float) -> GaussianMixture:
    """The mixture of the clusters of points that are nearest to each of `means`.

    Each has one point more than its own, of the average covariance: clusters of a single point have one too.
    """
    if means.dim() != 2 or means.shape[1] != sample.shape[1]:
        raise ValueError(f"fit_mixture: start must be a mixture or means [K, D] of D = {sample.shape[1]}, given "
                         f"{list(means.shape)}.")
    def scatter(rows: Tensor) -> Tensor:
        return rows.T @ rows if covariance in ("full", "tied") else rows.square().sum(0)

    index = nearest(sample, means)
    offset = (sample - means[index]).double()
    clusters = [offset[index == k] for k in range(len(means))]
    covariances = average = scatter(offset) / len(sample)
    if covariance != "tied":
        covariances = torch.stack([(scatter(rows) + average) / (len(rows) + 1) for rows in clusters])
    weights = means.new_tensor([len(rows) + 1 for rows in clusters])
    return _mixture(weights, means, _regularised(covariances, covariance, reg_covar), covariance, reg_covar)


def _iterate(mixture: GaussianMixture, batches: _Batches, points: _Points, max_iter: int, tol: float,
             reg_covar: float) -> MixtureFit:
    history: list[float] = []
    for _ in range(max_iter):
        value, *moments = _expectation(mixture, batches)
        history.append(value.item() / points.count)
        if not math.isfinite(history[-1]):
            raise ValueError(f"fit_mixture: the log-likelihood is {history[-1]} in iteration {len(history)}: points too far "
                             "from every component for their precision; scale them, or give float64.")
        mixture = _maximisation(mixture, points, moments, reg_covar).to(points.sample)
        if len(history) > 1 and abs(history[-1] - history[-2]) < tol:
            return MixtureFit(mixture, tuple(history), True)
    return MixtureFit(mixture, tuple(history), False)


def _expectation(mixture: GaussianMixture, batches: _Batches) -> list[Tensor]:
    """`GaussianMixture.sums` of all points."""
    total = None
    for rows in batches:
        own = mixture.sums(rows)
        total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
    return total


def _maximisation(mixture: GaussianMixture, points: _Points, moments: list[Tensor], reg_covar: float) -> GaussianMixture:
    """The mixture of the M-step, in float64."""
    counts, first, *second = moments
    alive = counts > 0
    safe = torch.where(alive, counts, 1.0)
    move = first / safe[:, None]
    means = mixture.means.double() + move
    if mixture.covariance == "tied":
        offset = means - points.mean
        covariances = points.covariance - (offset.T * counts) @ offset / points.count
    elif mixture.covariance == "full":
        covariances = second[0] / safe[:, None, None] - move[:, :, None] * move[:, None, :]
    else:
        covariances = (second[0] / safe[:, None] - move.square()).clamp_min(0)
    covariances = _regularised(covariances, mixture.covariance, reg_covar)
    if mixture.covariance != "tied" and not bool(alive.all()):
        covariances[~alive] = mixture.covariances[~alive].to(covariances)
    return _mixture(counts, means, covariances, mixture.covariance, reg_covar)


def _mixture(weights: Tensor, means: Tensor, covariances: Tensor, covariance: Covariance, reg_covar: float) -> GaussianMixture:
    try:
        return GaussianMixture(weights.double(), means.double(), covariances, covariance)
    except ValueError as error:
        raise ValueError(f"fit_mixture: {str(error).partition(': ')[2]} Raise reg_covar, which is {reg_covar}, fit fewer "
                         "components, or leave out dimensions that depend on others.") from None


def _regularised(covariances: Tensor, covariance: Covariance, reg_covar: float) -> Tensor:
    """With λ added, of matrices to their diagonals, and of variances `[K, D]` that are to be spherical their means."""
    if covariance in ("full", "tied"):
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
        return covariances
    return reg_covar + (covariances.mean(1) if covariance == "spherical" else covariances)


def _unwhiten(y: Tensor, precision_cholesky: Tensor) -> Tensor:
    """y P⁻¹ of `y` `[..., D]`."""
    return torch.linalg.solve_triangular(precision_cholesky, y, upper=True, left=False)


def _check_covariance(who: str, covariance: str) -> None:
    if covariance not in get_args(Covariance):
        raise ValueError(f"{who}: covariance must be one of {', '.join(get_args(Covariance))}, given {covariance!r}.")


def _check_options(components: int, covariance: str, start: GaussianMixture | Tensor | None, starts: int, max_iter: int,
                   tol: float, reg_covar: float, batch_size: int | None) -> None:
    _check_covariance("fit_mixture", covariance)
    for name, value in (("components", components), ("starts", starts), ("max_iter", max_iter),
                        ("batch_size", 1 if batch_size is None else batch_size)):
        if value < 1:
            raise ValueError(f"fit_mixture: {name} must be at least 1, given {value}.")
    for name, value in (("tol", tol), ("reg_covar", reg_covar)):
        if not 0 <= value < math.inf:
            raise ValueError(f"fit_mixture: {name} must be at least 0 and finite, given {value}.")
    if start is None:
        return
    if starts > 1:
        raise ValueError(f"fit_mixture: {starts} starts from the same place end in the same; leave out start or starts.")
    given = start.means if isinstance(start, GaussianMixture) else start
    if len(given) != components or (isinstance(start, GaussianMixture) and start.covariance != covariance):
        kind = f"{start.covariance} components" if isinstance(start, GaussianMixture) else "means"
        raise ValueError(f"fit_mixture: {components} {covariance} components cannot start from {len(given)} {kind}.")
