"""The table and the pictures of a trained Deep Generative Decoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import write_json
from .data import Data
from .explorer import write_explorer
from .figures import image_grid, latent_scatter, model_sheet, training_curves, write_png
from .probes import knn_accuracy, probe
from .systems.dgd import DGD

_TEXT = {
    "train_nll": "−log p(x | z), training images (nats an image)",
    "test_nll": "−log p(x | z), test images at their MAP z (nats an image)",
    "mean_image_nll": "    the same for the mean training image",
    "purity": "purity of the components",
    "ari": "adjusted Rand index of the components and the labels",
    "nmi": "normalised mutual information of the components and the labels",
    "knn": "10-NN accuracy in representation space, leave one out",
    "test_knn": "10-NN accuracy of the test images",
    "own_component": "training images nearest to a component of their own class",
}


def components_of(system: DGD, z: Tensor) -> Tensor | None:
    """The most responsible component of each row of `z` `[N, D]`, `[N]`; None for a prior without components."""
    return system.prior.responsibilities(z).argmax(1) if system.config.prior == "mixture" else None


def evaluate(system: DGD, train: Data, test: Data | None = None) -> dict[str, float]:
    """The numbers of `format_scores`, as far as there are components, test images, and labels of more than the ten rows
    that a nearest-neighbour vote needs.

    `train` are the rows that the system was trained on; labels are those of the data, which a DGD without `classes`
    never saw.
    """
    z, y = system.latents.z, train.y if len(train.x) > 10 else None
    scores = {"train_nll": _nll(system, train.x, z)}
    components = components_of(system, z)
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
    return {name: scores[name] for name in _TEXT if name in scores}


def format_scores(scores: Mapping[str, float], beside: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A line for each score; `beside` adds columns by title, e.g. those of a baseline."""
    beside = beside or {}
    width = max(len(text) for text in _TEXT.values())
    lines = [" " * (width + 10) + "".join(f"{title:>10}" for title in beside)] if beside else []
    for name, value in scores.items():
        values = [value, *(column.get(name) for column in beside.values())]
        cells = (" " * 10 if v is None else f"{v:>10.1f}" if name.endswith("nll") else f"{v:>10.3f}" for v in values)
        lines.append(f"{_TEXT[name]:<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def write_pictures(system: DGD, data: Data, records: Sequence[Mapping[str, float]], folder: Path,
                   title: str) -> list[Path]:
    """Figures in the style of the paper's Figures 3 and 4, training curves and the HTML explorer of a trained system.

    `data` are the training rows, `records` those of metrics.jsonl. Returns the files, the explorer last.
    """
    generator = torch.Generator().manual_seed(0)
    samples = system.sample(100, generator, noise=False)
    z, means, captions, decoded = system.latents.z, None, [], None
    figures = {"samples.png": image_grid(samples, title="100 samples")}
    if system.config.prior == "mixture":
        means = system.prior.means.detach()
        with torch.no_grad():
            decoded = system.decode(means)
        captions = [f"{k}: {w:.0%}" for k, w in enumerate(system.prior.log_weights.exp().tolist())]
        figures["components.png"] = image_grid(decoded, captions=captions, title="Component means, decoded")
        figures["sheet.png"] = model_sheet(z, data.y, means, samples, decoded, captions)
    figures["space.png"] = latent_scatter(z, data.y, means, title)
    if records:
        curves = [{k: v for k, v in record.items() if k not in ("step", "seconds")} for record in records]
        figures["curves.png"] = training_curves(curves)
    paths = [folder / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_png(path, figure)
    return [*paths, write_explorer(folder / "explorer.html", z, data.x, system.decode, data.y, means, title=title)]


def write_scores(scores: Mapping[str, float], path: Path) -> None:
    write_json(path, dict(scores))


@torch.no_grad()
def _nll(system: DGD, x: Tensor, z: Tensor) -> float:
    """Mean of −log p(x | z) over the rows, in nats."""
    parts = zip(x.split(1000), z.split(1000), strict=True)
    return -torch.cat([system.likelihood.log_prob(system.decoder(part), rows) for rows, part in parts]).mean().item()
