"""The table and the pictures of a trained system. Each family of systems has a module for what is its own."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from . import report_autoencoder, report_dgd
from .checkpoint import write_file, write_json
from .data import Data
from .explorer import write_explorer
from .figures import comparison, latent_scatter, training_curves, write_png
from .system import System
from .systems.ae import AE
from .systems.dgd import DGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES: dict[type[System], ModuleType] = {DGD: report_dgd, AE: report_autoencoder}
_TEXT = report_dgd.TEXT | report_autoencoder.TEXT


def evaluate(system: System, train: Data, test: Data | None = None, *, nll_samples: int | None = None) -> dict[str, object]:
    """The numbers of `format_scores`, in its order, and others.

    `train` are the rows that the system was trained on; labels are those of the data, which only a DGD with `classes` has
    seen. `nll_samples` are importance samples of log p(x), for systems with an encoder.
    """
    family = _family(system)
    scores = family.evaluate(system, train, test, nll_samples)
    return {name: scores[name] for name in (*family.TEXT, "balance") if name in scores}


def format_scores(scores: Mapping[str, object], beside: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A line for each score; `beside` adds columns by title, e.g. those of a baseline."""
    beside = beside or {}
    listed = [name for name in scores if name in _TEXT]
    width = max(len(_TEXT[name][0]) for name in listed)
    lines = [" " * (width + 10) + "".join(f"{title:>10}" for title in beside)] if beside else []
    for name in listed:
        text, form = _TEXT[name]
        values = [scores[name], *(column.get(name) for column in beside.values())]
        lines.append(f"{text:<{width}}" + "".join(" " * 10 if v is None else f"{v:>10{form}}" for v in values))
    if "verdict" in scores.get("balance", {}):
        lines.append(scores["balance"]["verdict"])
    return "\n".join(line.rstrip() for line in lines)


def write_scores(scores: Mapping[str, object], path: Path) -> None:
    """All scores as JSON, and beside it those of the table as CSV, with the columns score, value and text."""
    write_json(path, dict(scores))
    table = io.StringIO()
    rows = [(name, value, _TEXT[name][0].strip()) for name, value in scores.items() if name in _TEXT]
    csv.writer(table, lineterminator="\n").writerows([("score", "value", "text"), *rows])
    write_file(path.with_suffix(".csv"), table.getvalue().encode())


def represent(system: System, x: Tensor, steps: int | None = None) -> dict[str, Tensor]:
    """Representations "z" `[N, D]` of `x` `[N, C, H, W]`, and what else the family knows about them.

    `steps` are gradient steps, for systems without an encoder.
    """
    arrays = _family(system).represent(system, x, steps)
    return {name: array for name, array in arrays.items() if array is not None}


def representations(system: System, train: Data, test: Data) -> tuple[Tensor, Tensor]:
    """Representations of the rows that the system was trained on and of test rows, `[N, D]` and `[M, D]`."""
    return _family(system).space(system, train)[0].detach(), represent(system, test.x)["z"]


def write_comparison(systems: Mapping[str, System], x: Tensor, folder: Path) -> Path:
    """comparison.png: up to 40 images of `x`, each beside its reconstructions by the `systems`."""
    columns = {"input": x[:40], **{name: system.reconstruct(x[:40]) for name, system in systems.items()}}
    return _write({"comparison.png": comparison(columns)}, folder)[0]


def write_evaluation(system: System, train: Data, test: Data | None, folder: Path) -> list[Path]:
    """Pictures that belong to the scores, of the test images where there are some. Returns the files."""
    return _write(_family(system).evaluation_figures(system, train, test), folder)


def write_pictures(system: System, data: Data, records: Sequence[Mapping[str, float]], folder: Path,
                   title: str) -> list[Path]:
    """Samples, the representation space, training curves and the HTML explorer of a trained system.

    `data` are the training rows, `records` those of metrics.jsonl. Returns the files, the explorer last.

    Raises:
        ValueError: the representation space has one dimension, and so no plane to look around in.
    """
    family = _family(system)
    z, means = family.space(system, data)
    figures = {**family.figures(system, data), "space.png": latent_scatter(z, data.y, means, title)}
    if records:
        curves = [{name: value for name, value in record.items()
                   if name not in ("step", "seconds") and isinstance(value, (int, float))} for record in records]
        figures["curves.png"] = training_curves(curves)
    paths = _write(figures, folder)
    return [*paths, write_explorer(folder / "explorer.html", z, data.x, system.decode, data.y, means, title=title)]


def _family(system: System) -> ModuleType:
    found = (FAMILIES[kind] for kind in type(system).__mro__ if kind in FAMILIES)
    family = next(found, None)
    if family is None:
        raise ValueError(f"There is no evaluation of a {type(system).__name__}; there is of "
                         f"{', '.join(kind.__name__ for kind in FAMILIES)} and what derives from them.")
    return family


def _write(figures: Mapping[str, "Figure"], folder: Path) -> list[Path]:
    paths = [folder / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_png(path, figure)
    return paths
