"""The Deep Generative Decoder (Schuster & Krogh 2021): MAP estimates of representations, decoder and their prior.

There is no encoder: the representation z_i of each of N training samples is a parameter. Training maximises

    Σ_i [log p(x_i | z_i, θ) + log p(z_i | φ)] + log P(φ)                                              (Eq. 3)

by gradient descent in Z, θ and φ at once; log P(θ) is the decoder's weight decay. A mini-batch B has the loss

    −Σ_{i∈B} [log p(x_i | z_i) + log p(z_i)] − (|B|/N) log P(φ)

with sums, so that the step of a row does not depend on the size of its batch. p(z | φ) is a Gaussian mixture with
priors on its parameters (§2.4, `priors`), or N(0, I). With `classes`, components belong to classes and the label of a
sample chooses among them: log p(z, y) takes the place of log p(z), and samples without a label (−1) keep log p(z).

Traps. Eq. 3 counts log P(φ) once; the authors' code adds it to every sample, which makes it N times stronger. Both
are here (`prior_count`). Representations may shrink while the first layer's weights grow (§2.3): under N(0, I)
`normalize` puts their variance back to one after each epoch.

New samples: component means and training representations are decoded once, each row starts at its best one, then
gradient steps on z alone (§2.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..data import Data
from ..latents import LatentTable, map_inference
from ..likelihoods import Bernoulli, Gaussian, check_unit_interval
from ..networks import decoder_for
from ..priors import GaussianMixturePrior, StandardNormal
from ..system import Batch, OptimizerConfig, System


@dataclass(frozen=True)
class DGDOptim:
    """Optimizer of each child (Table 4)."""

    decoder: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-3, weight_decay=1e-5))
    latents: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("row_sgd", lr=1e-2, momentum=0.9))
    prior: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-1))


@dataclass(frozen=True)
class DGDConfig:
    """Defaults: the MNIST model of the paper (§4.1, A.7, Table 4)."""

    latent_dim: int = 2
    prior: Literal["mixture", "normal"] = "mixture"  # a Gaussian mixture that is learned, or N(0, I)
    components: int = 20  # of the mixture
    classes: int = 0  # > 0: labelled components, components/classes for each class
    covariance: Literal["diagonal", "isotropic"] = "diagonal"  # of each component
    prior_count: Literal["once", "per_sample"] = "once"  # log P(φ) once in all (Eq. 3), or once a sample (authors' code)
    ball_radius: float = 10.0  # of the soft ball that the means are drawn from
    ball_hardness: float = 5.0  # of its surface
    dirichlet: float = 1.0  # concentration of the prior on the weights; 1 is flat
    log_precision_mean: float = 2.0  # of the Gaussian prior on log 1/σ²
    log_precision_std: float = 2.0
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # of a pixel
    std: float = 0.1  # of the Gaussian likelihood
    latent_init: Literal["normal", "zeros", "prior"] = "normal"  # prior: p(z | φ) at the start, given the label
    latent_transform: Literal["identity", "sigmoid", "tanh"] = "identity"  # g of z = g(h), where h is learned (§2.1)
    normalize: bool = False  # representations to variance one after each epoch; for the normal prior
    optim: DGDOptim = field(default_factory=DGDOptim)


def _check_config(config: DGDConfig) -> None:
    if config.latent_dim < 1:
        raise ValueError(f"latent_dim must be at least 1, given {config.latent_dim}.")
    if config.classes and config.prior == "normal":
        raise ValueError("A normal prior has no components to label: classes needs prior='mixture'.")
    if config.normalize and config.prior == "mixture":
        raise ValueError("normalize gives representations the variance of a fixed N(0, I): it needs prior='normal'.")
    for name, active in (("normalize", config.normalize), ("latent_init='prior'", config.latent_init == "prior")):
        if active and config.latent_transform != "identity":
            raise ValueError(f"{name} sets z itself: it needs latent_transform='identity'.")


class DGD(System):
    """A DGD over `rows` training samples of `shape` (C, H, W).

    `decoder` maps `[N, latent_dim]` to logits or means `[N, C, H, W]`; left out, it is the paper's for 28×28 images and
    fully connected for others.
    `labels` `[rows]` are those of the training samples (−1 or left out: unknown), for `latent_init="prior"`.
    `latents` `[rows, latent_dim]` is a table of representations to start from, e.g. one in a file (`latents.mapped`), instead
    of one by `latent_init`.
    Children: `decoder`, `latents` (the table of representations), `prior`.
    """

    name = "dgd"
    config_type = DGDConfig
    reduction = "sum"
    local = ("latents",)

    def __init__(self, config: DGDConfig, rows: int, shape: Sequence[int], decoder: nn.Module | None = None,
                 labels: Tensor | None = None, latents: LatentTable | None = None) -> None:
        super().__init__()
        _check_config(config)
        if latents is not None and latents.h.shape != (rows, config.latent_dim):
            raise ValueError(f"latents must be a table of [rows, latent_dim] = {[rows, config.latent_dim]}, given "
                             f"{list(latents.h.shape)}.")
        self.config, self.rows, self.shape = config, rows, tuple(shape)
        self.decoder = decoder or decoder_for(config.latent_dim, shape)
        self.prior = StandardNormal(config.latent_dim) if config.prior == "normal" else GaussianMixturePrior(
            config.components, config.latent_dim, covariance=config.covariance, classes=config.classes,
            radius=config.ball_radius, hardness=config.ball_hardness, concentration=config.dirichlet,
            log_precision_mean=config.log_precision_mean, log_precision_std=config.log_precision_std)
        self.latents = latents or LatentTable(self._start(labels), config.latent_transform)
        self.likelihood = Bernoulli() if config.likelihood == "bernoulli" else Gaussian(config.std)

    @classmethod
    def for_data(cls, config: DGDConfig, data: Data) -> "DGD":
        return cls(config, len(data), data.x.shape[1:], labels=data.y)

    def arguments(self) -> dict[str, Any]:
        return {"config": self.config, "rows": self.rows, "shape": self.shape}

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Sums over the batch, in nats; the row gradients are never divided by its size."""
        z = self.latents(batch.index)
        log_px_z = self.likelihood.log_prob(self.decoder(z), batch.x).sum()
        log_pz = self._log_pz(z, batch.y).sum()
        count = len(z) / self.rows if self.config.prior_count == "once" else len(z)
        log_prior = count * self.prior.log_prior()
        total = -(log_px_z + log_pz + log_prior)
        return {"total": total, "log_px_z": log_px_z, "log_pz": log_pz, "log_prior": log_prior}

    def after_epoch(self, epoch: int) -> None:
        if self.config.normalize:
            self.latents.normalize_()

    def log_joint(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x | z) + log p(z) `[N]`, in nats; with labels, log p(x | z) + log p(z, y). `[N, C, H, W]`, `[N, D]`."""
        return self.likelihood.log_prob(self.decoder(z), x) + self._log_pz(z, labels)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] `[N, C, H, W]` of `z` `[N, D]`."""
        return self.likelihood.mean(self.decoder(z))

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None, *, components: Tensor | None = None,
               labels: Tensor | None = None, noise: bool = False) -> Tensor:
        """E[x | z] `[n, C, H, W]`, or with `noise` draws from p(x | z).

        z comes from the prior, from its `components` `[n]`, or from those of the classes `labels` `[n]`.
        """
        chosen = {k: v for k, v in (("components", components), ("labels", labels)) if v is not None}
        if chosen and self.config.prior == "normal":
            raise ValueError(f"A normal prior has no components: {' and '.join(chosen)} cannot choose among them.")
        output = self.decoder(self.prior.sample(n, generator, **chosen))
        return self.likelihood.sample(output, generator) if noise else self.likelihood.mean(output)

    def represent(self, x: Tensor, labels: Tensor | None = None, *, candidates: int = 1000, steps: int = 20,
                  lr: float = 0.05, batch_size: int = 128) -> Tensor:
        """MAP representations of new samples, `[N, C, H, W]` -> `[N, D]`.

        Args:
            x: floating point.
            labels: `[N]`, −1 where unknown: restrict the components of a labelled DGD. Left out, all are allowed.
            candidates: how many training representations are tried as starts, beside the component means. On MNIST
                1,000 and 20 steps reach 9 nats more than the means alone and 100 steps, in a quarter of the time.
            steps, lr: of `map_inference`.
        """
        self.check_rows(x)
        self._check_labels(labels)
        g, training = self.latents.transform, self.training
        self.eval()
        try:
            starts = self._candidates(candidates)
            search = self._search(g(starts))
            parts = []
            for rows in torch.arange(len(x), device=x.device).split(batch_size):
                x_, labels_ = x[rows], None if labels is None else labels[rows]
                parts.append(g(map_inference(lambda h, x=x_, y=labels_: self.log_joint(x, g(h), y), starts[search(x_, labels_)],
                                             steps=steps, lr=lr)))
        finally:
            self.train(training)
        return torch.cat(parts)

    def reconstruct(self, x: Tensor, labels: Tensor | None = None, **inference: Any) -> Tensor:
        """E[x | z] at the MAP representation of each row of `x`; the options are those of `represent`."""
        z = self.represent(x, labels, **inference)
        with torch.no_grad():
            return self.decode(z)

    def check(self, data: Data) -> None:
        self.check_rows(data.x)
        if len(data) != self.rows:
            raise ValueError(f"This DGD has representations of {self.rows} training samples, given {len(data)}.")
        if self.config.likelihood == "bernoulli":
            check_unit_interval(data.x)
        if self.config.classes and data.y is None:
            raise ValueError(f"This DGD has components for {self.config.classes} classes and needs labels (−1: unknown).")
        self._check_labels(data.y)

    def _check_labels(self, labels: Tensor | None) -> None:
        classes = self.config.classes
        if classes and labels is not None and len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"Labels must lie in [−1, {classes}), given from {labels.min()} to {labels.max()}.")

    def _start(self, labels: Tensor | None) -> Tensor:
        """Initial h `[N, D]` of the latent table."""
        size = (self.rows, self.config.latent_dim)
        if self.config.latent_init == "prior":
            return self.prior.sample(self.rows, **({"labels": labels} if self.config.classes else {}))
        return torch.randn(size) if self.config.latent_init == "normal" else torch.zeros(size)

    def _log_pz(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return self.prior(z, labels) if self.config.classes else self.prior(z)

    def _candidates(self, rows: int) -> Tensor:
        """Starts of inference before g: the component means and about `rows` training representations."""
        h, means = self.latents.learned, self.prior.means.detach()
        chosen = (h[:: max(1, self.rows // rows)] if rows else h[:0]).to(means.device)
        return torch.cat([means, chosen]) if self.config.latent_transform == "identity" else chosen

    @torch.no_grad()
    def _search(self, z: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        """What gives the index `[N]` of the candidate `z` `[K, D]` of highest log-joint for rows of `x` and their labels.

        The candidates are decoded here, once; rows are scored against all by `Likelihood.pairwise`.
        """
        log_px_z, classes = self.likelihood.pairwise(self.decoder(z)), self.config.classes
        if classes:  # for each class, and at −1 for no label
            each = torch.tensor([*range(classes), -1], device=z.device)[:, None].expand(-1, len(z))
            log_pz = self.prior(z.expand(classes + 1, -1, -1), each)
        else:
            log_pz = self.prior(z)[None]
        return lambda x, labels: (log_px_z(x) + log_pz[-1 if labels is None or not classes else labels]).argmax(1)
