"""What a trained Deep Generative Decoder is evaluated by: `report` says which functions a family of systems has."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import Data
from .figures import image_grid, model_sheet
from .probes import knn_accuracy, probe
from .systems.dgd import DGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = {
    "train_nll": ("−log p(x | z), training images (nats an image)", ".1f"),
    "test_nll": ("−log p(x | z), test images at their MAP z (nats an image)", ".1f"),
    "mean_image_nll": ("    the same for the mean training image", ".1f"),
    "purity": ("purity of the components", ".3f"),
    "ari": ("adjusted Rand index of the components and the labels", ".3f"),
    "nmi": ("normalised mutual information of the components and the labels", ".3f"),
    "knn": ("10-NN accuracy in representation space, leave one out", ".3f"),
    "test_knn": ("10-NN accuracy of the test images", ".3f"),
    "own_component": ("training images nearest to a component of their own class", ".3f"),
}


def evaluate(system: DGD, train: Data, test: Data | None, nll_samples: int | None) -> dict[str, float]:
    """The numbers of `TEXT`, as far as there are components, test images, and labels of more than the ten rows that a
    nearest-neighbour vote needs."""
    if nll_samples is not None:
        raise ValueError("A DGD has no encoder to draw importance samples from: leave --nll-samples out.")
    z, y = system.latents.z.to(train.x.device), train.y if len(train.x) > 10 else None
    scores = {"train_nll": _nll(system, train.x, z)}
    components = _components(system, z)
    if y is not None:
        if components is None:
            scores["knn"] = knn_accuracy(z, y)
        else:
            scores |= probe(z, y, components)
        if system.config.classes:
            nearest = torch.cdist(z, system.prior.means.detach()).argmin(1)
            scores["own_component"] = system.prior.allowed[y, nearest].float().mean().item()
    if test is not None:
        z_test = system.represent(test.x, batch_size=250)  # twice as fast as 1000: activations stay in the cache
        scores["test_nll"] = _nll(system, test.x, z_test)
        if system.config.likelihood == "bernoulli":
            mean = train.x.mean(0).clamp(1e-3, 1 - 1e-3).logit()
            scores["mean_image_nll"] = -system.likelihood.log_prob(mean.expand_as(test.x), test.x).mean().item()
        if y is not None and test.y is not None:
            scores["test_knn"] = knn_accuracy(z, y, queries=z_test, query_labels=test.y)
    return scores


def evaluation_figures(system: DGD, train: Data, test: Data | None) -> dict[str, "Figure"]:
    """None: `latent-engine explore` draws them."""
    return {}


def represent(system: DGD, x: Tensor, steps: int | None) -> dict[str, Tensor | None]:
    """MAP representations after `steps` of gradient descent (20 if left out), and their components."""
    z = system.represent(x, **({} if steps is None else {"steps": steps}))
    return {"z": z, "component": _components(system, z)}


def space(system: DGD, data: Data) -> tuple[Tensor, Tensor | None]:
    """The representations of the training rows and the component means."""
    return system.latents.z, system.prior.means.detach() if system.config.prior == "mixture" else None


def figures(system: DGD, data: Data) -> dict[str, "Figure"]:
    """Figures in the style of the paper's Figures 3 and 4."""
    samples = system.sample(100, torch.Generator().manual_seed(0), noise=False)
    drawn = {"samples.png": image_grid(samples, title="100 samples")}
    z, means = space(system, data)
    if means is not None:
        with torch.no_grad():
            decoded = system.decode(means)
        captions = [f"{k}: {w:.0%}" for k, w in enumerate(system.prior.log_weights.exp().tolist())]
        drawn["components.png"] = image_grid(decoded, captions=captions, title="Component means, decoded")
        drawn["sheet.png"] = model_sheet(z, data.y, means, samples, decoded, captions)
    return drawn


def _components(system: DGD, z: Tensor) -> Tensor | None:
    """The most responsible component of each row of `z` `[N, D]`, `[N]`; None for a prior without components."""
    return system.prior.responsibilities(z).argmax(1) if system.config.prior == "mixture" else None


@torch.no_grad()
def _nll(system: DGD, x: Tensor, z: Tensor) -> float:
    """Mean of −log p(x | z) over the rows, in nats."""
    parts = zip(x.split(1000), z.split(1000), strict=True)
    return -torch.cat([system.likelihood.log_prob(system.decoder(part), rows) for rows, part in parts]).mean().item()
