"""What a model with an encoder has learned: its likelihood, and how it uses its representation space.

For data x_n, n = 1, ..., N, with posteriors q(z | x_n) = N(mean_n, exp(log_var_n)) and prior p(z), in nats:

    log p(x)             log 1/S Σ_s p(x, z_s) / q(z_s | x), z_s ~ q(z | x)              importance-weighted: Burda et al. 2016
    ELBO                 E_q[log p(x | z)] − KL(q(z | x) ‖ p(z))                         reconstruction − KL
    aggregate posterior  q(z) = 1/N Σ_n q(z | x_n)
                         mean_n KL(q(z | x_n) ‖ p(z)) = I(x; z) + KL(q(z) ‖ p(z))        Hoffman & Johnson 2016
    active dimension     Var_n(mean_nd) > 0.01                                           Burda et al. 2016, §5.2

The model is a system with `encode` and `log_weights` (`systems.vae`); everything else are functions of posteriors or tensors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Generator, Tensor, nn

from .bounds import Posterior, entropy, kl_to_normal, reparametrize
from .kernels import ImportanceAccumulator, gaussian_log_prob, gmm_log_prob, mmd2, mmd2_to_normal
from .priors import StandardNormal
from .system import System

ACTIVE_VARIANCE = 0.01
_CHUNK_VALUES = 2**20  # of x in one call of the decoder: its activations stay in the cache of a CPU
_CHUNK_VALUES_GPU = 2**25


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Estimates of log p(x) for N data points, float64 `[N]` each, in nats.

    Attributes:
        log_px: importance-weighted, a lower bound in expectation.
        elbo: the mean log-weight.
        effective_samples: (Σ w)² / Σ w², of `samples`.
        standard_error: of `log_px`, from the weights; not to be trusted where `pareto_k` exceeds 0.7.
        pareto_k: k̂ of the largest weights; ∞ for 20 samples and fewer.
        samples: importance samples of each data point.
    """

    log_px: Tensor
    elbo: Tensor
    effective_samples: Tensor
    standard_error: Tensor
    pareto_k: Tensor
    samples: int

    @property
    def mean(self) -> float:
        """Mean of log p(x) over the data points."""
        return self.log_px.mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of `mean` for these data points, from the importance samples alone."""
        return (self.standard_error.square().sum().sqrt() / len(self.log_px)).item()

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Normal confidence interval of the mean over the population of which the data points are a sample.

        It holds the scatter of the data points and that of their estimates; infinite for one data point.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"interval: confidence must lie in (0, 1), given {confidence!r}.")
        N = len(self.log_px)
        error = (self.log_px.std() / math.sqrt(N)).item() if N > 1 else math.inf
        half = NormalDist().inv_cdf(0.5 + 0.5 * confidence) * error
        return self.mean - half, self.mean + half


@torch.no_grad()
def log_likelihood(system: System, x: Tensor, samples: int = 4096, *, chunk: int | None = None, batch_size: int = 100,
                   generator: Generator | None = None) -> LogLikelihood:
    """log p(x_n) of each row by importance sampling from the encoder.

    Args:
        x: `[N, *shape]`; each batch is encoded once.
        samples: S of each row.
        chunk: rows (image and sample) of one call of the decoder. Left out, as many as stay in the cache of a CPU, which is
            as fast as any larger number: e.g. 1,337 digits.
        batch_size: images encoded together.

    Time of N·S decoder rows; memory for `chunk` of them and O(batch_size·(chunk + √S)) numbers, however many samples there
    are. Another `chunk` draws other samples.

    Raises:
        ValueError: no rows, no samples, or a chunk of none.
    """
    for name, value in (("rows of x", len(x)), ("samples", samples), ("batch_size", batch_size),
                        ("chunk", 1 if chunk is None else chunk)):
        if value < 1:
            raise ValueError(f"log_likelihood: {name} must be at least 1, given {value}.")
    if chunk is None:
        chunk = max(1, (_CHUNK_VALUES if x.device.type == "cpu" else _CHUNK_VALUES_GPU) // max(1, x[0].numel()))
    # Samples of few images at a time: each image and posterior is then read from the cache.
    images = min(max(1, chunk // samples), batch_size)
    calls = math.ceil(samples / (chunk // images))
    draws = math.ceil(samples / calls)
    parts = []
    with evaluating(system):
        for rows in x.split(batch_size):
            posterior = system.encode(rows)
            weights = ImportanceAccumulator(max_samples=samples)
            for first in range(0, samples, draws):
                count = min(draws, samples - first)
                groups = zip(rows.split(images), *(t.split(images) for t in posterior), strict=True)
                weights.add(torch.cat([system.log_weights(Posterior(*q), group, count, generator)
                                       for group, *q in groups], dim=1))
            parts.append((weights.log_likelihood(), weights.elbo(), weights.effective_sample_size(),
                          weights.standard_error(), weights.pareto_k()))
    return LogLikelihood(*map(torch.cat, zip(*parts, strict=True)), samples)


@torch.no_grad()
def encode(system: System, x: Tensor, batch_size: int = 1000) -> Posterior:
    """q(z | x) of all rows of `x`, in evaluation mode. ValueError where it is no Gaussian, for it has a flow."""
    check_gaussian("encode", system)
    with evaluating(system):
        mean, log_var = zip(*(system.encode(rows) for rows in x.split(batch_size)), strict=True)
    return Posterior(torch.cat(mean), torch.cat(log_var))


def check_gaussian(name: str, system: System) -> None:
    """Raises ValueError, for the function `name`, if a flow follows the Gaussian that `system.encode` gives."""
    if getattr(system, "flow", None) is not None:
        raise ValueError(f"{name}: needs a Gaussian posterior, and that of this system has a flow (posterior_flow).")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and the mode from before after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def active_dimensions(mean: Tensor, threshold: float = ACTIVE_VARIANCE) -> Tensor:
    """Boolean `[D]`: which dimensions of the posterior means `[N, D]` vary over the data by more than `threshold`.

    The variance is unbiased and taken in float64 (Burda et al. 2016).
    """
    return mean.double().var(0) > threshold


@dataclass(frozen=True)
class AggregateSplit:
    """The two parts of mean KL(q(z | x) ‖ p(z)), in nats: `mutual_information` I(x; z) and `kl` KL(q(z) ‖ p(z))."""

    mutual_information: float
    kl: float


@torch.no_grad()
def aggregate_split(posterior: Posterior, prior: nn.Module, samples: int = 8,
                    generator: Generator | None = None) -> AggregateSplit:
    """Splits the mean KL to the prior into I(x; z) + KL(q(z) ‖ p(z)), with q(z) the mixture of all N posteriors.

    Args:
        posterior: of N rows.
        prior: its `forward` is the log-density of z `[..., D]`. The sum of the parts is exact for N(0, I), an estimate for
            others; a hierarchical one gives log-densities that are low in expectation, and so a KL that is high.
        samples: of each posterior; the error falls with √(N·samples).

    The values are those of the N rows. As estimates for the distribution that the rows come from, the mutual information is
    biased downwards and the KL upwards by the same amount: the first is at most log N, and is to be trusted where it stays
    well below. Time O(samples·N²·D); extra memory O(N·D).
    """
    exact = Posterior(*(t.double() for t in posterior))
    uniform = exact.mean.new_full((len(exact.mean),), -math.log(len(exact.mean)))
    information = cross = 0.0
    for _ in range(samples):
        z = reparametrize(exact, 1, generator)[0]
        log_qz_x = gaussian_log_prob(z, *exact)
        information += (log_qz_x - gmm_log_prob(z, *exact, uniform)).mean().item() / samples
        cross -= prior(z.to(posterior.mean.dtype)).mean().item() / samples
    total = kl_to_normal(exact).sum(1) if isinstance(prior, StandardNormal) else cross - entropy(exact)
    return AggregateSplit(information, total.mean().item() - information)


@torch.no_grad()
def mmd2_to_prior(posterior: Posterior, prior: nn.Module, generator: Generator | None = None) -> float:
    """Unbiased squared MMD between the aggregate posterior and the prior, with WAE's kernel: the mean over its seven scales.

    In closed form for N(0, I); for any other prior between one sample of each posterior and as many of the prior. From 0
    to 2, and negative within its error. O(N²·D).
    """
    if isinstance(prior, StandardNormal):
        return mmd2_to_normal(*posterior, combine="mean").item()
    z = reparametrize(posterior, 1, generator)[0]
    return mmd2(z, prior.sample(len(z), generator), combine="mean").item()


def bits_per_dimension(log_px: Tensor, dimensions: int, levels: int = 256) -> Tensor:
    """−log₂ P of each of `dimensions` values on the grid of `levels`, from densities log p(x) in nats, elementwise.

    `log_px` is that of values scaled to [0, 1] and dequantised, (v + u) / levels with u uniform in [0, 1): the result then
    bounds the bits of the integers v from above (Theis et al. 2016). Without the noise u it bounds nothing.
    """
    return math.log2(levels) - log_px / (dimensions * math.log(2))


def dequantise(x: Tensor, levels: int = 256, generator: Generator | None = None) -> Tensor:
    """Pixels v / (levels − 1) in [0, 1] as (v + u) / levels, u uniform in [0, 1).

    Raises:
        ValueError: x does not lie on that grid.
    """
    if not on_grid(x, levels):
        raise ValueError(f"dequantise: x must hold {levels} levels from 0 to 1, given values between them.")
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return ((x * (levels - 1)).round() + noise) / levels


def on_grid(x: Tensor, levels: int = 256) -> bool:
    """Whether all values are v / (levels − 1), v = 0, ..., levels − 1, to float32 rounding."""
    v = (x * (levels - 1)).double()
    return bool(((v - v.round()).abs() < 1e-3).all() & (v > -0.5).all() & (v < levels - 0.5).all())
