"""Distributions over representation space, and priors over their parameters.

The prior of a Deep Generative Decoder (Schuster & Krogh 2021, §2.4 and A.7) is a Gaussian mixture p(z | φ) with
φ = (means, log-variances, weights), and log P(φ) is the sum of

    soft ball on each mean        log r(μ) = −softplus(a (|μ|/b − 1)) − log V_b      radius b, hardness a
    Dirichlet on the weights      log Dir(π; α, ..., α)
    Gaussian on log-precisions    log N(−log σ²; m, s²)                              one a component and dimension

V_b is the volume of the hard ball of radius b, as in the authors' code: r is flat inside the ball, and normalised up to
the mass of its tail. Densities are in the parameters named, with no Jacobian to the logits that are stored.

Each parameter prior is a function of plain tensors. A representation prior is a module whose `forward` is the
log-density of its argument, with `sample` and `log_prior`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .bounds import Posterior, reparametrize
from .conv_flow import ConvFlow, latent_maps
from .flows import AutoregressiveFlow, RealNVP
from .kernels import gaussian_log_prob, gmm_log_prob, importance_log_weights
from .networks import mlp

if TYPE_CHECKING:
    from .systems.vae import EncoderConfig

COVARIANCES = ("diagonal", "isotropic")
FLOWS = {"maf": AutoregressiveFlow, "iaf": AutoregressiveFlow, "realnvp": RealNVP, "conv": ConvFlow}


def soft_ball_log_prob(x: Tensor, radius: float = 10.0, hardness: float = 5.0) -> Tensor:
    """Log-density of the soft ball at `x` `[..., D]`, in nats, `[...]`; linear in |x| far outside, no overflow."""
    dim = x.shape[-1]
    log_volume = dim * (math.log(radius) + 0.5 * math.log(math.pi)) - math.lgamma(1 + dim / 2)
    return -F.softplus(hardness * (torch.linalg.vector_norm(x, dim=-1) / radius - 1)) - log_volume


def uniform_ball(n: int, dim: int, radius: float = 10.0, generator: Generator | None = None) -> Tensor:
    """`n` points `[n, dim]`, uniform in the ball of `radius`: where the soft ball is flat."""
    direction = F.normalize(torch.randn(n, dim, generator=generator), dim=-1)
    return direction * radius * torch.rand(n, 1, generator=generator) ** (1 / dim)


def spread_ball(n: int, dim: int, radius: float = 10.0, generator: Generator | None = None) -> Tensor:
    """`n` points `[n, dim]` of the ball, apart: each is the farthest from those before it of 10 `n` uniform ones."""
    chosen = uniform_ball(1, dim, radius, generator)
    for _ in range(n - 1):
        offers = uniform_ball(10 * n, dim, radius, generator)
        farthest = torch.cdist(offers, chosen).min(1).values.argmax()
        chosen = torch.cat([chosen, offers[farthest, None]])
    return chosen


def dirichlet_log_prob(log_weights: Tensor, concentration: float = 1.0) -> Tensor:
    """Log-density of a symmetric Dirichlet at the weights exp(`log_weights`) `[..., K]`, in nats, `[...]`."""
    K = log_weights.shape[-1]
    constant = math.lgamma(K * concentration) - K * math.lgamma(concentration)
    if concentration == 1:  # uniform on the simplex, also at its border, where 0 · −inf would be NaN
        return log_weights.new_full(log_weights.shape[:-1], constant)
    return constant + (concentration - 1) * log_weights.sum(-1)


def normal_log_prob(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Log-density of N(mean, std²) at each element of `x`, in nats."""
    return -0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)


class StandardNormal(nn.Module):
    """The fixed prior N(0, I) over D dimensions: nothing to learn, and nothing to choose a component from."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(1, dim), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Log-density of `z` `[..., D]`, in nats, `[...]`."""
        return normal_log_prob(z).sum(-1)

    def log_prior(self) -> Tensor:
        """log P(φ) of no parameters: zero."""
        return self.means.new_zeros(())

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`."""
        return torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype, device=self.means.device)


class GaussianMixturePrior(nn.Module):
    """A mixture of K Gaussians over D dimensions with priors on its parameters.

    Args:
        components: K.
        dim: D.
        covariance: "diagonal" (a variance for each component and dimension) or "isotropic" (one for each component).
        classes: C > 0 gives each of C classes the next K/C components, so that labels choose among components (§2.4).
        radius, hardness: of the soft ball on the means. The means start uniform inside the ball; with `classes` they
            also start apart, for classes that start on top of each other are not driven apart by training.
        concentration: α of the Dirichlet on the weights, which start equal.
        log_precision_mean, log_precision_std: of the Gaussian on log(1/σ²), which starts at its mean.
        generator: of the initial means.

    Attributes: `means` `[K, D]`, `log_vars` `[K, D]` or `[K, 1]` (log σ²), `logits` `[K]` (unnormalised log-weights).
    """

    def __init__(self, components: int, dim: int, *, covariance: str = "diagonal", classes: int = 0,
                 radius: float = 10.0, hardness: float = 5.0, concentration: float = 1.0,
                 log_precision_mean: float = 2.0, log_precision_std: float = 2.0,
                 generator: Generator | None = None) -> None:
        super().__init__()
        if components < 1 or dim < 1:
            raise ValueError(f"A mixture needs at least one component and one dimension, given {components} and {dim}.")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, given {covariance!r}.")
        if classes < 0 or (classes and components % classes):
            raise ValueError("components must be a multiple of classes, "
                             f"given {components} components for {classes} classes.")
        for name, value in (("radius", radius), ("hardness", hardness), ("concentration", concentration),
                            ("log_precision_std", log_precision_std)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, given {value}.")
        self.radius, self.hardness, self.concentration = radius, hardness, concentration
        self.log_precision_mean, self.log_precision_std = log_precision_mean, log_precision_std
        place = spread_ball if classes else uniform_ball
        self.means = nn.Parameter(place(components, dim, radius, generator))
        shape = (components, dim if covariance == "diagonal" else 1)
        self.log_vars = nn.Parameter(torch.full(shape, -float(log_precision_mean)))
        self.logits = nn.Parameter(torch.zeros(components))
        allowed = torch.eye(classes, dtype=torch.bool).repeat_interleave(components // classes, 1) if classes else None
        self.register_buffer("allowed", allowed, persistent=False)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(z) `[...]` of `z` `[..., D]`, in nats; where a label y is given, log p(z, y).

        `labels`: class of each point, integers `[...]`, −1 where unknown; only for a mixture with `classes`.
        """
        return gmm_log_prob(z, self.means, self.log_vars, self.log_weights, **self._allowed(labels))

    def responsibilities(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """p(component | z), or given the label too, `[..., K]`."""
        return gmm_log_prob(z, self.means, self.log_vars, self.log_weights, **self._allowed(labels),
                            responsibilities=True)[1]

    def log_prior(self) -> Tensor:
        """log P(φ), a scalar in nats: counted once for the whole data set in Eq. 3."""
        return (soft_ball_log_prob(self.means, self.radius, self.hardness).sum()
                + dirichlet_log_prob(self.log_weights, self.concentration)
                + normal_log_prob(-self.log_vars, self.log_precision_mean, self.log_precision_std).sum())

    @property
    def log_weights(self) -> Tensor:
        """Normalised log π `[K]`."""
        return self.logits.log_softmax(0)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None, *, components: Tensor | None = None,
               labels: Tensor | None = None) -> Tensor:
        """`n` points `[n, D]`: from the whole mixture, from `components` `[n]`, or from the classes `labels` `[n]`."""
        if components is None:
            components = self.sample_components(n, generator, labels=labels)
        elif labels is not None:
            raise ValueError("Choose the components or the labels to sample from, not both.")
        K, dim = self.means.shape
        components = _indices("components", components, n, 0, K, self.means.device)
        noise = torch.randn(n, dim, generator=generator, device=self.means.device)
        return self.means[components] + noise * (0.5 * self.log_vars[components]).exp()

    @torch.no_grad()
    def sample_components(self, n: int, generator: Generator | None = None, *, labels: Tensor | None = None) -> Tensor:
        """`n` component indices `[n]` by weight, among those of the class where a label is given (`[n]`, −1: none)."""
        weights = self.log_weights.exp()
        if labels is None:
            return torch.multinomial(weights, n, replacement=True, generator=generator)
        allowed = self._allowed(labels)["allowed"]
        labels = _indices("labels", labels, n, -1, len(allowed), self.means.device)
        return torch.multinomial(weights * (allowed[labels] | (labels < 0)[:, None]), 1, generator=generator)[:, 0]

    def _allowed(self, labels: Tensor | None) -> dict[str, Tensor]:
        if labels is None:
            return {}
        if self.allowed is None:
            raise ValueError("Labels were given to a mixture whose components have no classes; build it with classes=.")
        return {"labels": labels, "allowed": self.allowed}


class HierarchicalPrior(nn.Module):
    """An upper stochastic layer u as the prior of a lower one: p(z) = ∫ p(z | u) N(u; 0, I) du (Burda et al. 2016, §5).

    p(z | u) and q(u | z) are diagonal Gaussians whose means and log-variances come from tanh layers of sizes `hidden`.

    Args:
        dim: D, of z.
        top_dim: T, of u.
        hidden: between the two, from z to u; from u to z in reverse.
    """

    def __init__(self, dim: int, top_dim: int, hidden: Sequence[int] = (100, 100)) -> None:
        super().__init__()
        self.encoder = mlp([dim, *hidden, 2 * top_dim], "tanh")
        self.decoder = mlp([top_dim, *hidden[::-1], 2 * dim], "tanh")
        self.top = StandardNormal(top_dim)

    def forward(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        """log p(u) + log p(z | u) − log q(u | z) of `z` `[..., D]` at one u ~ q(u | z) for each, in nats, `[...]`.

        Its exponential is an unbiased estimate of p(z): with z ~ q(z | x), importance weights of both layers.
        """
        rows = z.reshape(-1, z.shape[-1])
        posterior = Posterior(*self.encoder(rows).chunk(2, 1))
        u = reparametrize(posterior, 1, generator)
        mean, log_var = self.decoder(u).chunk(2, 2)
        return importance_log_weights(u, *posterior, gaussian_log_prob(rows, mean, log_var)).reshape(z.shape[:-1])

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`."""
        given_u = Posterior(*self.decoder(self.top.sample(n, generator)).chunk(2, 1))
        return reparametrize(given_u, 1, generator)[0]


class VampPrior(nn.Module):
    """The mixture of the posteriors of K learned pseudo-inputs u_k, p(z) = 1/K Σ_k q(z | u_k) (Tomczak & Welling 2018, Eq. 9).

    Args:
        encode: gives q(z | x) of `x` `[N, *shape]`; it is called in every evaluation of the density. Its parameters are
            not those of the prior, but gradients reach them through it.
        components: K.
        shape: of an observation.
        unit_interval: whether observations lie in [0, 1]; pseudo-inputs are then clamped to it, as in the authors' code.

    Attributes: `inputs` `[K, *shape]`, which start at N(0.05, 0.01²), as in the authors' code for digits.

    Traps. The authors' samples are those of the first n pseudo-inputs; here a component is drawn for each. They train with
    a warm-up of the KL divergence; without one, all posteriors may stay close to each other, and the prior with them.
    """

    def __init__(self, encode: Callable[[Tensor], Posterior], components: int, shape: Sequence[int], *,
                 unit_interval: bool = True) -> None:
        super().__init__()
        self.encode, self.unit_interval = encode, unit_interval
        self.inputs = nn.Parameter(0.05 + 0.01 * torch.randn(components, *shape))

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Makes random rows of `x` `[N, *shape]` the pseudo-inputs, with noise of deviation 0.01 (the authors' code)."""
        K = len(self.inputs)
        if len(x) < K:
            raise ValueError(f"pseudo_inputs='data' takes as many different rows as components, given {len(x)} rows for {K}: "
                             "lower components, or use pseudo_inputs='random'.")
        noise = 0.01 * torch.randn_like(self.inputs)
        self.inputs.copy_(self._clamp(x[torch.randperm(len(x))[:K]] + noise))

    def forward(self, z: Tensor) -> Tensor:
        """Log-density of `z` `[..., D]`, in nats, `[...]`. Time of K rows through the encoder, and of `gmm_log_prob`."""
        posterior = self.encode(self._clamp(self.inputs))
        K = len(self.inputs)
        return gmm_log_prob(z, *posterior, posterior.mean.new_full((K,), -math.log(K)))

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`, each of a component drawn at random."""
        components = torch.randint(len(self.inputs), (n,), generator=generator, device=self.inputs.device)
        return reparametrize(self.encode(self._clamp(self.inputs[components])), 1, generator)[0]

    def _clamp(self, inputs: Tensor) -> Tensor:
        return inputs.clamp(0, 1) if self.unit_interval else inputs


class FlowPrior(nn.Module):
    """A normalizing flow between N(0, I) and z over D dimensions; it starts as N(0, I).

    Args:
        dim: D; of "conv" (F, h, w), with D = F h w.
        kind: "maf", fast densities (Papamakarios et al. 2017), whose samples take D passes; "iaf", fast samples (Kingma et al.
            2016), whose densities take D passes; "realnvp", both in at most two (Dinh et al. 2017); "conv", both in about one.
        blocks, hidden: of the flow (`flows.AutoregressiveFlow`, `flows.RealNVP`).
    """

    def __init__(self, dim: int | Sequence[int], kind: str = "maf", blocks: int = 8, hidden: Sequence[int] = (320,)) -> None:
        super().__init__()
        if kind not in FLOWS:
            raise ValueError(f"kind must be one of {', '.join(FLOWS)}, given {kind!r}.")
        self.kind, self.base = kind, StandardNormal(dim if isinstance(dim, int) else math.prod(dim))
        self.flow = FLOWS[kind](dim, blocks, hidden)

    def forward(self, z: Tensor) -> Tensor:
        """Log-density of `z` `[..., D]`, in nats, `[...]`."""
        u, log_det = self.flow.inverse(z) if self.kind == "iaf" else self.flow(z)
        return self.base(u) + log_det

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` points `[n, D]`."""
        u = self.base.sample(n, generator)
        return (self.flow(u) if self.kind == "iaf" else self.flow.inverse(u))[0]


def prior_for(config: "EncoderConfig", encode: Callable[[Tensor], Posterior], shape: Sequence[int]) -> nn.Module:
    """The prior named in `config`, of a model of observations of `shape` with posteriors `encode`."""
    if config.prior == "normal":
        return StandardNormal(config.latent_dim)
    if config.prior == "hierarchical":
        return HierarchicalPrior(config.latent_dim, config.top_dim, config.top_hidden)
    if config.prior == "vamp":
        in_unit_interval = config.likelihood == "bernoulli" or config.mean_activation == "sigmoid"
        return VampPrior(encode, config.components, shape, unit_interval=in_unit_interval)
    if config.prior in FLOWS:
        dim = latent_maps(shape, config.latent_dim) if config.prior == "conv" else config.latent_dim
        return FlowPrior(dim, config.prior, config.flow_blocks, config.flow_hidden)
    # As wide as N(0, I) at the start: means within its radius, variances of one.
    return GaussianMixturePrior(config.components, config.latent_dim, radius=config.latent_dim**0.5, log_precision_mean=0)


def flow_for(config: "EncoderConfig") -> nn.Module | None:
    """The flow after the Gaussian posterior of `config`, with its mean and log-variance as context; None without one."""
    if config.posterior_flow == "none":
        return None
    dim = config.latent_dim
    return FLOWS[config.posterior_flow](dim, config.flow_blocks, config.flow_hidden, 2 * dim)


def _indices(name: str, values: Tensor, n: int, low: int, high: int, device: torch.device) -> Tensor:
    values = torch.as_tensor(values, device=device)
    fits = values.shape == (n,) and not values.is_floating_point()
    if not fits or (n and not low <= int(values.min()) <= int(values.max()) < high):
        raise ValueError(f"{name} must be {n} integers in [{low}, {high}), one a sample, "
                         f"given {values.dtype} of shape {list(values.shape)}"
                         + (f" from {values.min()} to {values.max()}." if values.numel() else "."))
    return values
