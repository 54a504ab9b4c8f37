"""What trained autoencoders, with or without posteriors, are evaluated by: `report` says which functions a family has."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from .balance import balance
from .bounds import Posterior
from .data import Data
from .diagnostics import (
    active_dimensions,
    aggregate_split,
    bits_per_dimension,
    dequantise,
    encode,
    log_likelihood,
    mmd2_to_prior,
    on_grid,
)
from .figures import image_grid, interpolations, manifold, pairs, traversals
from .kernels import pairwise_kl
from .likelihoods import LogisticMixture
from .priors import GaussianMixturePrior, StandardNormal
from .probes import knn_accuracy
from .systems.ae import AE
from .systems.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = {
    "test_images": ("test images, of which all below is", ".0f"),
    "train_images": ("training images, of which all below is (there are no test images)", ".0f"),
    "nll": ("−log p(x), importance-weighted (nats an image)", ".2f"),
    "nll_low": ("    95 % interval of its mean over images, from", ".2f"),
    "nll_high": ("    to", ".2f"),
    "nll_samples": ("    importance samples of each image", ".0f"),
    "log_mass": ("    log ∫ of the implicit prior, estimated: −log p(x) and −ELBO are too low by it, and no bounds", ".2f"),
    "effective_samples": ("    effective ones, median", ".1f"),
    "pareto_k_high": ("    share of images with Pareto k̂ above 0.7: too few samples", ".3f"),
    "bits_per_dim": ("    bits/dim of 256 levels; of a density under uniform dequantisation noise", ".3f"),
    "negative_elbo": ("−ELBO (nats an image)", ".2f"),
    "reconstruction": ("    −E log p(x | z) under the posterior", ".2f"),
    "kl": ("    KL(q(z | x) ‖ p(z))", ".2f"),
    "mutual_information": ("        of it I(x; z) of these images", ".2f"),
    "information_limit": ("            the most that so many images can show, log N", ".2f"),
    "kl_aggregate": ("        of it KL(q(z) ‖ p(z)) of the aggregate posterior", ".2f"),
    "mse": ("mean squared error of reconstructions (a pixel)", ".5f"),
    "active": ("active dimensions", ".0f"),
    "dimensions": ("    of all", ".0f"),
    "mmd2": ("MMD² of the aggregate posterior to the prior (0 to 2)", ".4f"),
    "mpd": ("mutual posterior diversity, mean KL of pairs of posteriors (nats)", ".1f"),
    "mpd_std": ("    their standard deviation", ".1f"),
    "knn": ("10-NN accuracy of representations of training images, leave one out", ".3f"),
    "test_knn": ("10-NN accuracy of the test images", ".3f"),
}
NLL_SAMPLES = 1000
_PAIRED_ROWS = 5000  # for the MMD, which takes longer than the rest
_BALANCE_ROWS = 500


def evaluate(system: AE, train: Data, test: Data | None, nll_samples: int | None) -> dict[str, object]:
    """The numbers of `TEXT`, and for a model with posteriors the "balance" of its training rows (`balance.balance`).

    `nll_samples` importance samples of each image, 1,000 if left out. Statistics of the representation space need two rows,
    and accuracies labels of more than the ten rows that a nearest-neighbour vote needs.
    """
    if nll_samples is not None and not isinstance(system, VAE):
        raise ValueError("An autoencoder without posteriors has no log p(x): leave --nll-samples out.")
    data = test or train
    z = _represent(system, data.x)
    squared = [(rows - system.reconstruct(rows)).square().flatten(1).mean(1) for rows in data.x.split(1000)]
    scores = {"test_images" if test else "train_images": len(data), "mse": torch.cat(squared).mean().item(),
              "dimensions": z.shape[1]}
    if len(z) > 1:
        scores["active"] = int(active_dimensions(z).sum())
        if isinstance(system, VAE) and len(train) > 1:
            scores |= _posterior_scores(system, train, data, nll_samples or NLL_SAMPLES)
    if train.y is not None and len(train) > 10:
        known = z if test is None else _represent(system, train.x)
        scores["knn"] = knn_accuracy(known, train.y)
        if test is not None and test.y is not None:
            scores["test_knn"] = knn_accuracy(known, train.y, queries=z, query_labels=test.y)
    return scores


def _posterior_scores(system: VAE, train: Data, data: Data, nll_samples: int) -> dict[str, object]:
    generator = Generator(data.x.device).manual_seed(0)
    if system.flow is not None:  # the rest is of Gaussian posteriors
        return _likelihood_scores(system, data, nll_samples, generator)
    posterior = encode(system, data.x)
    split = aggregate_split(posterior, system.prior, generator=generator)
    diversity = pairwise_kl(*(t.double() for t in posterior))
    few = Posterior(*(t[:_PAIRED_ROWS] for t in posterior))
    scores = _likelihood_scores(system, data, nll_samples, generator)
    kl = split.mutual_information + split.kl
    return scores | {
        "reconstruction": scores["negative_elbo"] - kl, "kl": kl, "mutual_information": split.mutual_information,
        "information_limit": math.log(len(data)), "kl_aggregate": split.kl,
        "mmd2": mmd2_to_prior(few, system.prior, generator), "mpd": diversity.mpd.item(), "mpd_std": diversity.std.item(),
        "balance": balance(system, train.x[:_BALANCE_ROWS], generator)}


def _likelihood_scores(system: VAE, data: Data, samples: int, generator: Generator) -> dict[str, float]:
    found = log_likelihood(system, data.x, samples, generator=generator)
    low, high = found.interval()
    scores = {"nll": -found.mean, "nll_low": -high, "nll_high": -low, "nll_samples": samples,
              "effective_samples": found.effective_samples.median().item(),
              "pareto_k_high": (found.pareto_k > 0.7).double().mean().item(), "negative_elbo": -found.elbo.mean().item()}
    if hasattr(system.prior, "log_mass"):
        scores["log_mass"] = system.prior.log_mass(generator=generator)
    gray = bool(((data.x > 0) & (data.x < 1)).any())
    if isinstance(system.likelihood, LogisticMixture):
        scores["bits_per_dim"] = -found.mean / (data.x[0].numel() * math.log(2))
    if hasattr(system.likelihood, "variance") and gray and on_grid(data.x):
        noisy = log_likelihood(system, dequantise(data.x, generator=generator), samples, generator=generator)
        scores["bits_per_dim"] = bits_per_dimension(noisy.log_px, data.x[0].numel()).mean().item()
    return scores


def evaluation_figures(system: AE, train: Data, test: Data | None) -> dict[str, "Figure"]:
    """Reconstructions, walks through representation space, and for a model with a prior its samples; of up to 50 rows."""
    x = (test or train).x[:50]
    z, columns = _represent(system, x), min(10, len(x))
    widest = z.double().var(0, correction=0).argsort(descending=True)[:10].tolist()
    half = min(len(z) // 2, 8)
    walks = {"traversals": (traversals(z[0], widest, z.amin(0), z.amax(0)), 11, "Each row: one dimension over its range"),
             "interpolations": (interpolations(z[:half], z[half:2 * half]), 11, "From image to image")}
    if isinstance(_prior(system), StandardNormal) and z.shape[1] == 2:
        walks["manifold"] = (manifold(20).to(z), 20, "Quantiles of the prior in both dimensions")
    images = pairs(x, system.reconstruct(x), columns)
    drawn = {"reconstructions.png": image_grid(images, columns, title="Images, and below them their reconstructions")}
    with torch.no_grad():
        for name, (places, steps, title) in walks.items():
            if len(places):
                drawn[f"{name}.png"] = image_grid(system.decode(places), steps, title=title)
    return drawn | figures(system, train)


def represent(system: AE, x: Tensor, steps: int | None) -> dict[str, Tensor | None]:
    """Representations, for a model with Gaussian posteriors their means, and then the log-variances."""
    if steps is not None:
        raise ValueError(f"{type(system).__name__} represents images by its encoder: leave --steps out.")
    if not isinstance(system, VAE) or system.flow is not None:
        return {"z": _represent(system, x)}
    mean, log_var = encode(system, x)
    return {"z": mean, "log_var": log_var}


def space(system: AE, data: Data) -> tuple[Tensor, Tensor | None]:
    """The representations of the rows, and the component means of a mixture prior."""
    prior = _prior(system)
    return _represent(system, data.x), prior.means.detach() if isinstance(prior, GaussianMixturePrior) else None


def figures(system: AE, data: Data) -> dict[str, "Figure"]:
    """Samples, of a model with a prior."""
    if _prior(system) is None:
        return {}
    samples = system.sample(100, torch.Generator().manual_seed(0), noise=False)
    return {"samples.png": image_grid(samples, title="100 samples")}


def _prior(system: AE) -> nn.Module | None:
    return system.prior if isinstance(system, VAE) else None


def _represent(system: AE, x: Tensor) -> Tensor:
    return torch.cat([system.represent(rows) for rows in x.split(1000)])
