"""VAE with implicit optimal prior (VAE-IOP: Takahashi et al. 2019).

Of all priors the aggregate posterior q(z), the mean of q(z | x) over the data, makes the mean ELBO largest. It has no density
at hand, but the KL divergence to it needs only its ratio to N(0, I),

    KL(q(z | x) ‖ q(z)) = KL(q(z | x) ‖ N(0, I)) − E_q(z|x) T(z),     T(z) = log q(z) − log N(z; 0, I)

and a classifier of z ~ q(z) from z ~ N(0, I), with logits T, learns that. In turn, `ratio_steps` times the first and once the
second, on fresh batches each time:

    ratio     max over T           E_q(z) log σ(T(z)) + E_N(0,I) log σ(−T(z))
    main      min over the rest    −E log p(x | z) + β [KL(q(z | x) ‖ N(0, I)) − E T(z)]

An epoch is one pass of the first: the second sees one batch in `ratio_steps` of the data.

Traps. The prior N(z; 0, I) e^T(z) is normalised only where T is right. Where it is not, neither the ELBO nor the
importance-weighted log p(x) is a bound: both are too high by log ∫ N(z; 0, I) e^T(z) dz. They are given as in the paper,
without that constant; `ImplicitPrior.log_mass` estimates it, and evaluation shows it beside them. The authors' code has no
samples of the prior; here they are resampled from N(0, I), see `ImplicitPrior.sample`. Their ratio network has dropout too,
and ten epochs of ratio are followed by one of main.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .. import bounds
from ..bounds import Posterior
from ..networks import mlp
from ..priors import StandardNormal
from ..system import Batch, OptimizerConfig, Phase, check_sizes
from .vae import VAE, VAEConfig, VAEOptim

_PROPOSALS = 100  # of N(0, I) for a sample


def _adam() -> OptimizerConfig:
    return OptimizerConfig("adam", lr=1e-4)


@dataclass(frozen=True)
class ImplicitOptim(VAEOptim):
    """Optimizer of each child."""

    encoder: OptimizerConfig = field(default_factory=_adam)
    decoder: OptimizerConfig = field(default_factory=_adam)
    likelihood: OptimizerConfig = field(default_factory=_adam)
    ratio: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-3))


@dataclass(frozen=True)
class ImplicitConfig(VAEConfig):
    """Defaults: those of the code of Takahashi et al. 2019."""

    latent_dim: int = 40
    hidden: tuple[int, ...] = (500, 500, 500)
    ratio_hidden: tuple[int, ...] = (500, 500, 500)  # tanh layers of T
    ratio_steps: int = 10  # of T, for one of the rest
    prior: Literal["normal"] = "normal"  # that T is the ratio to
    posterior_flow: Literal["none"] = "none"
    free_bits_per: Literal["batch"] = "batch"
    optim: ImplicitOptim = field(default_factory=ImplicitOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(ratio_hidden=self.ratio_hidden, ratio_steps=self.ratio_steps)


class ImplicitPrior(nn.Module):
    """N(z; 0, I) e^T(z) over `dim` dimensions, for T `[...]` = `log_ratio(z)` of z `[..., dim]`; it owns no parameters."""

    def __init__(self, log_ratio: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.log_ratio, self.base = log_ratio, StandardNormal(dim)

    def forward(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) + T(z) of `z` `[..., D]`, in nats, `[...]`: a log-density up to a constant, zero where T is right."""
        return self.base(z) + self.log_ratio(z)

    @torch.no_grad()
    def log_mass(self, samples: int = 100_000, generator: Generator | None = None) -> float:
        """log ∫ N(z; 0, I) e^T(z) dz, in nats, from draws of N(0, I): too low in expectation, the more so the more T varies."""
        parts = [self.log_ratio(self.base.sample(count, generator)).double().logsumexp(0)
                 for count in _split(samples, 10_000)]
        return torch.stack(parts).logsumexp(0).item() - math.log(samples)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`, each one of 100 draws of N(0, I), chosen with weights e^T.

        They follow the prior where 100 draws are enough to hit it; in many dimensions they lie between N(0, I) and it.
        """
        parts = []
        for count in _split(n, 1000):
            z = self.base.sample(count * _PROPOSALS, generator).unflatten(0, (count, _PROPOSALS))
            chosen = torch.multinomial(self.log_ratio(z).softmax(1), 1, generator=generator)
            parts.append(z.take_along_dim(chosen[..., None], 1)[:, 0])
        return torch.cat(parts)


class ImplicitVAE(VAE):
    """A VAE-IOP of observations of `shape` (C, H, W); `encoder` and `decoder` are as in `VAE`.

    Children: `encoder`, `decoder`, `likelihood` where its variance is not fixed; `ratio`, T; `prior`, an `ImplicitPrior`.
    """

    name = "vae-iop"
    config_type = ImplicitConfig
    config: ImplicitConfig

    def __init__(self, config: ImplicitConfig, shape: Sequence[int], encoder: nn.Module | None = None,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(config, shape, encoder, decoder)
        self.ratio = mlp([config.latent_dim, *config.ratio_hidden, 1], "tanh")
        for parameter in self.ratio[-1].parameters():  # a VAE to begin with
            nn.init.zeros_(parameter)
        self.prior = ImplicitPrior(self.log_ratio, config.latent_dim)

    def phases(self) -> tuple[Phase, ...]:
        """`ratio_steps` steps of T and one of the rest, in turn."""
        rest = tuple(child for child in super().phases()[0].updates if child != "ratio")
        return Phase("ratio", ("ratio",), repeat=self.config.ratio_steps), Phase("main", rest)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """As in `VAE`; in the phase "ratio" the cross-entropy of the classifier, whose logits are T."""
        if phase != "ratio":
            return super().loss(batch)
        with torch.no_grad():
            z = bounds.reparametrize(self.encode(batch.x), 1)[0]
        of_posterior, of_normal = F.softplus(-self.log_ratio(z)), F.softplus(self.log_ratio(torch.randn_like(z)))
        return {"total": of_posterior.mean() + of_normal.mean()}

    def validation_loss(self, batch: Batch) -> dict[str, Tensor]:
        """That of the phase "main"."""
        return self.loss(batch)

    def log_ratio(self, z: Tensor) -> Tensor:
        """T `[...]` of `z` `[..., D]`: log q(z) − log N(z; 0, I) where it is trained to the end."""
        return self.ratio(z)[..., 0]

    def _log_pz(self, z: Tensor, log_det: None = None, generator: Generator | None = None) -> Tensor:
        return self.prior(z)

    def _divergence(self, posterior: Posterior, kl_to_normal: Tensor, z: Tensor, log_det: None) -> Tensor:
        return kl_to_normal.sum(1) - bounds.mean_over_samples(self.log_ratio(z))


def _split(n: int, size: int) -> list[int]:
    """Numbers of at most `size` that sum to `n`."""
    return [min(size, n - first) for first in range(0, n, size)]
