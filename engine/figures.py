"""Pictures of a trained model as matplotlib figures: no pyplot, no global state, no display. Needs the extra `plot`.

    latent_scatter(z, y, means).savefig("space.png")

`model_sheet` is the layout of Figures 3 and 4 of Schuster & Krogh (2021). Walks through representation space are tensors of
z, decoded by the model and drawn by `image_grid` with as many columns as a walk has steps:

    image_grid(system.decode(manifold(20)), columns=20)
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .checkpoint import write_file
from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Any two are at least 30 apart (CIELAB) in normal vision, deuteranopia, protanopia and tritanopia; tab10 has 5.
COLORS = ("#3530f3", "#d87c0c", "#0e8e5c", "#9c1600", "#6e1086", "#48cfff", "#fab3b9", "#c2db7e", "#001d2c", "#8c709a")


def plane(z: Tensor) -> tuple[Tensor, Tensor]:
    """The plane in which representations `z` `[N, D]` are drawn: its origin `[D]` and orthonormal directions `[2, D]`.

    With D = 2 it is the representation space itself, otherwise that of the first two principal components.
    """
    if z.dim() != 2 or z.shape[1] < 2:
        raise ValueError(f"A picture of the representation space needs z of shape [N, D] with D of at least 2, "
                         f"given {list(z.shape)}.")
    if z.shape[1] == 2:
        return z.new_zeros(2), torch.eye(2, dtype=z.dtype, device=z.device)
    center = z.mean(0)
    return center, torch.linalg.svd(z - center, full_matrices=False).Vh[:2]


def montage(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """Images `[N, C, H, W]` in [0, 1] as one picture, row by row: `[rows, cols]` (ink on white) or `[..., C]`."""
    images = images.detach().cpu().float().clamp(0, 1)
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    if channels == 1:
        images = 1 - images
    sheet = torch.ones(rows * columns, channels, height + gap, width + gap)
    sheet[:n, :, :height, :width] = images
    sheet = sheet.view(rows, columns, channels, height + gap, width + gap).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (height + gap), columns * (width + gap), channels)
    return sheet[: -gap or None, : -gap or None].squeeze(2).numpy()


def manifold(steps: int = 20) -> Tensor:
    """The points `[steps², 2]` of a square grid in probability under N(0, I): its inverse distribution function.

    Row by row, the first coordinate to the right and the second upwards; each point stands for the same share of samples.
    Figure 4 of Kingma & Welling (2014).
    """
    quantiles = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)
    return torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)


def traversals(z: Tensor, dimensions: Sequence[int], low: Tensor, high: Tensor, steps: int = 11) -> Tensor:
    """`z` `[D]` with one of `dimensions` at a time going from its `low` to its `high` `[D]`: `[len(dimensions) · steps, D]`."""
    walks = z.expand(len(dimensions), steps, len(z)).clone()
    for walk, d in zip(walks, dimensions, strict=True):
        walk[:, d] = torch.linspace(float(low[d]), float(high[d]), steps, dtype=z.dtype, device=z.device)
    return walks.flatten(0, 1)


def interpolations(start: Tensor, end: Tensor, steps: int = 11) -> Tensor:
    """Straight lines from each row of `start` `[N, D]` to that of `end`, both included: `[N · steps, D]`."""
    share = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None]
    return torch.lerp(start[:, None], end[:, None], share).flatten(0, 1)


def pairs(images: Tensor, others: Tensor, columns: int = 10) -> Tensor:
    """Two sets of images `[N, C, H, W]`, e.g. originals and reconstructions: a row of `columns`, below it its counterparts.

    A last row that is not full is left out. `image_grid` draws them with the same number of columns.
    """
    rows = len(images) // columns
    sets = (part[:rows * columns].unflatten(0, (rows, columns)) for part in (images, others))
    return torch.stack(list(sets), 1).flatten(0, 2)


def latent_scatter(z: Tensor, y: Tensor | None = None, means: Tensor | None = None, title: str = "") -> "Figure":
    """The representation space: points `z` `[N, D]` coloured by class `y` `[N]`, component means `[K, D]` on top."""
    figure = _figure(7.2, 6)
    _draw_scatter(figure.add_subplot(), z, y, means, title)
    return figure


def image_grid(images: Tensor, columns: int = 10, captions: Sequence[str] = (), title: str = "") -> "Figure":
    """Images `[N, C, H, W]` in [0, 1] in a grid, with a caption under each if given."""
    rows = -(-len(images) // columns)
    aspect = images.shape[2] / images.shape[3]
    figure = _figure(0.6 * columns, 0.6 * rows * aspect * (1.25 if captions else 1) + (0.35 if title else 0))
    _draw_images(figure.add_subplot(), images, columns, captions, title)
    return figure


def comparison(images: Mapping[str, Tensor], sets: int = 4) -> "Figure":
    """Images side by side with their counterparts, e.g. inputs and reconstructions by two models: `[N, C, H, W]` by name.

    Row by row, `sets` to a row with a gap between them: Figure 2 of Ma et al. (2019).
    """
    n, channels, height, width = next(iter(images.values())).shape
    sets = min(sets, n)
    rows = -(-n // sets)
    figure = _figure(0.6 * (len(images) + 0.3) * sets, 0.6 * rows * height / width + 0.35)
    together = torch.stack([part.detach().cpu().float() for part in images.values()], 1)
    for column, axes in enumerate(figure.subplots(1, sets, squeeze=False)[0]):
        own = together[column::sets]
        _draw_images(axes, own.reshape(-1, channels, height, width), len(images), (), "")
    figure.suptitle("In each set: " + ", ".join(images), fontsize=10)
    return figure


def training_curves(history: Sequence[Mapping[str, float]], x: str = "epoch") -> "Figure":
    """One panel for each quantity in the records of a run (metrics.jsonl), over the column `x`."""
    names = list(dict.fromkeys(name for record in history for name in record if name != x))
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = _figure(3.4 * columns, 2.5 * rows)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = [(record[x], record[name]) for record in history if x in record and name in record]
        axes.plot(*zip(*points, strict=True), color=COLORS[0], marker="o" if len(points) == 1 else None)
        axes.set_title(name, fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if i + columns >= len(names):
            axes.set_xlabel(x)
    return figure


def model_sheet(z: Tensor, y: Tensor | None, means: Tensor, samples: Tensor, decoded_means: Tensor,
                captions: Sequence[str] = ()) -> "Figure":
    """Representation space, 100 samples and decoded component means on one sheet."""
    columns = 10 if len(decoded_means) <= 10 or len(decoded_means) % 10 == 0 else 15
    rows = -(-len(decoded_means) // columns)
    figure = _figure(12.5, 5.8 + 1.1 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=(5.8, 1.1 * rows))
    left, right = top.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_scatter(left, z, y, means, "Representation space")
    _draw_images(right, samples, 10, (), "Samples")
    _draw_images(bottom.subplots(), decoded_means, columns, captions, "Component means, decoded")
    return figure


def write_png(path: Path, figure: "Figure") -> None:
    """Writes the figure in one piece, at 150 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    write_file(path, file.getvalue())


def _figure(width: float, height: float) -> "Figure":
    return require("matplotlib.figure", "plot", "latent_engine.figures").Figure((width, height), layout="constrained")


def _draw_scatter(axes: "Axes", z: Tensor, y: Tensor | None, means: Tensor | None, title: str) -> None:
    z = z.detach().cpu().float()
    origin, directions = plane(z)
    points = ((z - origin) @ directions.T).numpy()
    size = float(np.clip(20000 / max(len(z), 1), 3, 30))
    if y is None:
        axes.scatter(*points.T, s=size, color=COLORS[0], alpha=0.6, linewidths=0)
    else:
        labels = y.cpu().numpy()
        # One call in random order, so that no class lies on top of the others.
        order = np.random.default_rng(0).permutation(len(z))
        codes = np.unique(labels, return_inverse=True)[1]
        axes.scatter(*points[order].T, s=size, c=np.array(COLORS)[codes[order] % len(COLORS)], alpha=0.75, linewidths=0)
        for code, label in enumerate(np.unique(labels)):
            axes.scatter([], [], s=36, color=COLORS[code % len(COLORS)], label=str(label))
            axes.text(*_densest(points[labels == label]), str(label), fontsize=15, weight="bold", ha="center",
                      va="center", path_effects=[_white_outline()], zorder=4)
    if means is not None:
        centers = ((means.detach().cpu().float() - origin) @ directions.T).numpy()
        axes.scatter(*centers.T, s=45, marker="X", color="white", edgecolors="black", linewidths=1, zorder=3,
                     label="component\nmean")
    if y is not None or means is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, handletextpad=0.3)
    axes.set_aspect("equal", adjustable="datalim")
    names = ("z₁", "z₂") if z.shape[1] == 2 else ("first principal component", "second principal component")
    axes.set(xlabel=names[0], ylabel=names[1], title=title)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _densest(points: np.ndarray) -> np.ndarray:
    """The point with the nearest tenth of its fellows closest around it: where a class's name is written."""
    points = points[:1000]
    distance = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)
    return points[distance[:, len(points) // 10].argmin()]


def _white_outline() -> object:
    effects = require("matplotlib.patheffects", "plot", "latent_engine.figures")
    return effects.withStroke(linewidth=3, foreground="white")


def _draw_images(axes: "Axes", images: Tensor, columns: int, captions: Sequence[str], title: str) -> None:
    height, width = images.shape[2:]
    room = round(0.3 * height) if captions else 2
    sheet = montage(torch.nn.functional.pad(images, (1, 1, 1, 1)), columns, room)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for i, caption in enumerate(captions):
        row, column = divmod(i, columns)
        axes.text(column * (width + 2 + room) + width / 2, row * (height + 2 + room) + height + 3, caption,
                  ha="center", va="top", fontsize=8)
    axes.set_title(title)
    axes.set_axis_off()
