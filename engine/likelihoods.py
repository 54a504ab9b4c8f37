"""Observation models p(x | decoder output), summed over the features of a row.

    Bernoulli   log p = Σ_p x_p l_p − softplus(l_p)               l: logits
    Gaussian    log p = −½ Σ_p (x_p − m_p)²/γ + log(2π γ)         m: means, γ: variance
    mixture of discretised logistics: `LogisticMixture`

`x` are rows `[N, ...]`, a decoder's output has their shape, or `[S, N, ...]` for S samples of each; log p is `[N]` or
`[S, N]`. The variance is fixed (`Gaussian`), learned (`LearnedGaussian`), the decoder's for each feature
(`DecodedGaussian`), or the best one (`OptimalGaussian`): the mean squared error, at which −log p is ½ P log γ but for a
constant (Dai & Wipf 2019; Rybkin et al. 2021).

Traps. γ is a variance in the papers; the code of Dai & Wipf learns the logarithm of a standard deviation of that name,
which moves log γ twice as far a step under Adam. Where the decoder fits all pixels, γ tends to 0 and log p to ∞.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import kernels

if TYPE_CHECKING:
    from .systems.ae import AEConfig


def check_unit_interval(x: Tensor) -> None:
    """Raises ValueError if some of `x` cannot be data of a Bernoulli likelihood."""
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("A Bernoulli likelihood needs pixels in [0, 1]; likelihood='gaussian' takes any.")


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Σ over features of log Bernoulli(x; sigmoid(logits)): `[N, ...]`, x in [0, 1] of that shape -> `[N]`, in nats."""
    return kernels.bernoulli_log_prob(x, logits, event_dims=x.dim() - 1)


def gaussian_log_prob(mean: Tensor, x: Tensor, std: float) -> Tensor:
    """Σ over features of log N(x; mean, std²): `[N, ...]`, x of that shape -> `[N]`, in nats."""
    log_var = torch.full((), 2 * math.log(std), dtype=x.dtype, device=x.device)
    return kernels.gaussian_log_prob(x, mean, log_var, event_dims=x.dim() - 1)


class Likelihood:
    """An observation model; subclasses give its `log_prob`, `mean` and `sample`."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        raise NotImplementedError

    def pairwise(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """log p of rows against each of K decoded candidates, `[N, ...]` -> `[N, K]`; nothing of size N×K×P is written.

        What is of the candidates alone is computed once, for all rows that follow. In general the fused op goes through all
        pairs; where log p is linear in x but for a term of x alone, a matrix product does.
        """
        return lambda x: self.log_prob(outputs.unsqueeze(1), x).T


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent Bernoulli features; the decoder gives logits. For x in (0, 1) this is the usual cross entropy."""

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        return bernoulli_log_prob(logits, x)

    def pairwise(self, logits: Tensor) -> Callable[[Tensor], Tensor]:
        """As in `Likelihood`, by a matrix product."""
        logits = logits.flatten(1)
        log_p_zeros = -F.softplus(logits).sum(1)
        return lambda x: torch.addmm(log_p_zeros, x.flatten(1), logits.T)

    def log_power_integral(self, logits: Tensor, power: float, event_dims: int) -> Tensor:
        """log Σ_x p(x)^power over all x of zeros and ones, summed over the last `event_dims` axes of `logits`."""
        # Of log(σ(l)^a + σ(−l)^a) = softplus(a l) − a softplus(l), softplus(l) is −log p(0).
        zeros = logits.new_zeros(logits.shape[logits.dim() - event_dims:])
        one, scaled = (kernels.bernoulli_log_prob(zeros, l, event_dims=event_dims) for l in (logits, power * logits))
        return power * one - scaled

    def mean(self, logits: Tensor) -> Tensor:
        """E[x], of the shape of `logits`."""
        return logits.sigmoid()

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        """x of zeros and ones, of the shape of `logits`."""
        return torch.bernoulli(logits.sigmoid(), generator=generator)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent Gaussian features of one fixed standard deviation `std`; the decoder gives means."""

    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"The standard deviation of a Gaussian likelihood must be positive, given {self.std}.")

    @property
    def variance(self) -> float:
        return self.std**2

    def log_prob(self, mean: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        return gaussian_log_prob(mean, x, self.std)

    def log_power_integral(self, mean: Tensor, power: float, event_dims: int) -> Tensor:
        """log ∫ p(x)^power dx over the last `event_dims` axes of `mean`, the same for all means: `[]`."""
        log_var = mean.new_tensor(2 * math.log(self.std))
        return _gaussian_log_power_integral(log_var, power).expand(mean.shape[mean.dim() - event_dims:]).sum()

    def pairwise(self, mean: Tensor) -> Callable[[Tensor], Tensor]:
        """As in `Likelihood`, by a matrix product: the squares are expanded about the mean of the candidates."""
        mean = mean.flatten(1)
        centre = mean.mean(0)
        scaled = (mean - centre) / self.std
        of_mean = -0.5 * scaled.square().sum(1) - mean.shape[1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

        def log_prob(x: Tensor) -> Tensor:
            x = (x.flatten(1) - centre) / self.std
            return torch.addmm(of_mean, x, scaled.T).sub_(0.5 * x.square().sum(1, keepdim=True))

        return log_prob

    def mean(self, mean: Tensor) -> Tensor:
        """E[x] is the decoder's output."""
        return mean

    def sample(self, mean: Tensor, generator: Generator | None = None) -> Tensor:
        """x of the shape of `mean`."""
        return mean + self.std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


@dataclass(frozen=True)
class DecodedGaussian(Likelihood):
    """Independent Gaussian pixels; the decoder gives their means and log-variances, side by side in the channels.

    Its output is `[..., 2C, H, W]` for x `[..., C, H, W]` (Kingma & Welling 2014, appendix C.2). `sigmoid` confines the
    means to (0, 1).
    """

    sigmoid: bool = False

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        mean, log_var = self._split(output)
        return kernels.gaussian_log_prob(x, mean, log_var, event_dims=x.dim() - 1)

    def log_power_integral(self, output: Tensor, power: float, event_dims: int) -> Tensor:
        """log ∫ p(x)^power dx over the last `event_dims` axes of `output`, `[N]` or `[S, N]`."""
        _, log_var = self._split(output)
        return _gaussian_log_power_integral(log_var, power).flatten(-event_dims).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """E[x] `[..., C, H, W]`."""
        return self._split(output)[0]

    def sample(self, output: Tensor, generator: Generator | None = None) -> Tensor:
        """x `[..., C, H, W]`."""
        mean, log_var = self._split(output)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return torch.addcmul(mean, (0.5 * log_var).exp(), noise)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = output.chunk(2, -3)
        return (mean.sigmoid() if self.sigmoid else mean), log_var


@dataclass(frozen=True)
class LogisticMixture(Likelihood):
    """Pixels of 256 levels in [0, 1] under a discretised mixture of logistics (Salimans et al. 2017).

    The decoder gives its parameters, in the order of `kernels.logistic_mixture_log_prob`: `[..., 10 K, H, W]` for x
    `[..., 3, H, W]`, `[..., 3 K, H, W]` for x of one channel. log p is that of the levels, not a density.
    """

    channels: int = 3

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        return kernels.logistic_mixture_log_prob(2 * x - 1, output)

    def mean(self, output: Tensor) -> Tensor:
        """E[x] `[..., C, H, W]`, but for what rounding to levels and the edges change: Σ_k π_k m_k, within [0, 1]."""
        logits, params = self._split(output)
        means = []
        for channel in range(self.channels):
            means.append(_mean_given(params, channel, means))
        mixed = torch.stack([(logits.softmax(-3) * mean).sum(-3) for mean in means], -3)
        return ((mixed + 1) / 2).clamp(0, 1)

    def draw(self, output: Tensor, noise: Tensor) -> Tensor:
        """x `[..., C, H, W]`, whose levels a `noise` `[..., K + C, H, W]`, uniform in [0, 1), chooses: components, channels."""
        logits, params = self._split(output)
        noise = noise.clamp(torch.finfo(noise.dtype).eps, 1 - torch.finfo(noise.dtype).eps)
        gumbel, logistic = -(-noise[..., :-self.channels, :, :].log()).log(), noise[..., -self.channels:, :, :].logit()
        chosen = (logits + gumbel).argmax(-3, keepdim=True)[..., None, None, :, :, :]
        params = params.gather(-3, chosen.expand(*params.shape[:-3], 1, *params.shape[-2:])).squeeze(-3)
        x: list[Tensor] = []
        for channel in range(self.channels):
            scale = params[..., channel, 1, :, :].clamp(min=-7).exp()
            value = _mean_given(params.unsqueeze(-3), channel, [c.unsqueeze(-3) for c in x]).squeeze(-3)
            x.append(((value + scale * logistic[..., channel, :, :]).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1)
        return (torch.stack(x, -3) + 1) / 2

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[..., K, H, W]`, and `[..., C, 3 or 2, K, H, W]`: means, log-scales, and coefficients of three channels."""
        kinds = 3 if self.channels == 3 else 2
        K = output.shape[-3] // (1 + kinds * self.channels)
        return output[..., :K, :, :], output[..., K:, :, :].unflatten(-3, (self.channels, kinds, K))


def _mean_given(params: Tensor, channel: int, before: list[Tensor]) -> Tensor:
    """Means `[..., K, H, W]` of a channel under each component, given the values of the channels before it, of that shape."""
    mean = params[..., channel, 0, :, :, :]
    for other, value in enumerate(before):
        mean = mean + params[..., channel - 1 + other, 2, :, :, :].tanh() * value  # slots 0; 1, 2: green on red; blue on both
    return mean


class _GaussianOfVariance(Likelihood, nn.Module):
    """What Gaussians share whose `variance` γ `[]`, or of a shape that broadcasts against a row, is not fixed."""

    variance: Tensor

    def log_prob(self, mean: Tensor, x: Tensor) -> Tensor:
        """Row by row, `[N, ...]` or `[S, N, ...]` against `[N, ...]` -> `[N]` or `[S, N]`."""
        return kernels.gaussian_log_prob(x, mean, self._log_var(mean, x), event_dims=x.dim() - 1)

    def mean(self, mean: Tensor) -> Tensor:
        """E[x] is the decoder's output."""
        return mean

    def sample(self, mean: Tensor, generator: Generator | None = None) -> Tensor:
        """x of the shape of `mean`."""
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.variance.sqrt() * noise

    def log_power_integral(self, mean: Tensor, power: float, event_dims: int) -> Tensor:
        """log ∫ p(x)^power dx over the last `event_dims` axes of `mean`, the same for all means: `[]`."""
        return _gaussian_log_power_integral(self.variance.log(), power).expand(mean.shape[mean.dim() - event_dims:]).sum()

    def _log_var(self, mean: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class LearnedGaussian(_GaussianOfVariance):
    """Independent Gaussian features with a variance that is learned; the decoder gives means.

    Args:
        variance: where it starts.
        shape: of the variance: `()` shared, `(C, 1, 1)` one a channel, `(C, H, W)` one a feature.
        parameter: what gradient descent moves: "log_var", the logarithm of the variance, or "log_std", of its root.
    """

    def __init__(self, variance: float = 1.0, shape: tuple[int, ...] = (), parameter: str = "log_var") -> None:
        super().__init__()
        _check_variance(variance)
        if parameter not in ("log_var", "log_std"):
            raise ValueError(f"parameter must be log_var or log_std, given {parameter!r}.")
        self.parameter = parameter
        start = math.log(variance) / (1 if parameter == "log_var" else 2)
        self.register_parameter(parameter, nn.Parameter(torch.full(shape, start)))

    @property
    def variance(self) -> Tensor:
        return self._log_var().exp()

    def _log_var(self, *_: Tensor) -> Tensor:
        return self.log_var if self.parameter == "log_var" else 2 * self.log_std


class OptimalGaussian(_GaussianOfVariance):
    """Independent Gaussian features with the variance that fits best; the decoder gives means.

    While training, γ is the mean squared error of the batch, and constant in gradients: at an optimum that changes none
    of them. Evaluation uses its running mean, kept with the momentum 0.1 of `nn.BatchNorm2d`, from `variance` on.
    """

    def __init__(self, variance: float = 1.0, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        _check_variance(variance)
        self.register_buffer("variance", torch.full(shape, float(variance)))

    @torch.no_grad()
    def _log_var(self, mean: Tensor, x: Tensor) -> Tensor:
        if not self.training:
            return self.variance.log()
        best = kernels.gaussian_variance(x, mean, tuple(self.variance.shape))
        self.variance.lerp_(best.to(self.variance.dtype), 0.1)
        return best.clamp_min(torch.finfo(best.dtype).tiny).log()


def likelihood_for(config: "AEConfig", shape: Sequence[int],
                   ) -> Bernoulli | Gaussian | DecodedGaussian | LearnedGaussian | OptimalGaussian | LogisticMixture:
    """The likelihood named in `config`, of observations of `shape`."""
    if config.likelihood == "bernoulli":
        return Bernoulli()
    if config.likelihood == "logistic_mixture":
        return LogisticMixture(shape[0])
    if config.gamma == "fixed":
        return Gaussian(math.sqrt(config.variance))
    if config.gamma == "decoded":
        return DecodedGaussian(sigmoid=config.mean_activation == "sigmoid")
    if config.gamma == "optimal":
        return OptimalGaussian(config.variance)
    return LearnedGaussian(config.variance, parameter="log_std" if config.gamma == "learned_std" else "log_var")


def _gaussian_log_power_integral(log_var: Tensor, power: float) -> Tensor:
    """log ∫ N(x; m, σ²)^a dx = ½ [(1 − a) log(2π σ²) − log a], elementwise."""
    return 0.5 * ((1 - power) * (log_var + math.log(2 * math.pi)) - math.log(power))


def _check_variance(variance: float) -> None:
    if not 0 < variance < math.inf:
        raise ValueError(f"The variance of a Gaussian likelihood must be positive and finite, given {variance}.")
