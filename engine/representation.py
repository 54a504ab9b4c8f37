"""The table and the picture of what representations tell about labels: fitted to training images, judged on test images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .checkpoint import write_file, write_json
from .data import Data
from .figures import latent_scatter, write_png
from .probes import RepresentationScore, check_probe, representation_probe
from .report import representations
from .system import System

CLUSTERS, LABELS = (10, 20, 30), (100, 1000)
_TABLES = {
    "clusters (k-means)": {"kmeans_accuracy": "accuracy", "kmeans_ari": "adjusted Rand", "kmeans_nmi": "mutual info."},
    "labelled images": {"knn_accuracy": "10-NN", "linear_accuracy": "linear"},
}


def evaluate(system: System, train: Data, test: Data | None, *, clusters: Sequence[int] = CLUSTERS,
             labels: Sequence[int] = LABELS) -> tuple[list[RepresentationScore], Tensor]:
    """The scores of `probes.representation_probe`, and the representations of the test images `[M, D]`.

    Raises:
        ValueError: images without labels, no test images, or numbers of clusters or labels that the data do not allow; before
            anything is computed.
    """
    if test is None:
        raise ValueError(f"Representations are judged on test images, and {train.name} has none.")
    for data in (train, test):
        if data.y is None:
            raise ValueError(f"Representations are judged by labels, and {data.name} ({data.split}) has none.")
    check_probe(train.y, clusters, labels)
    z, queries = representations(system, train, test)
    return representation_probe(z, train.y, queries=queries, query_labels=test.y, clusters=clusters, counts=labels), queries


def format_scores(scores: Sequence[RepresentationScore]) -> str:
    """A table with a line for each number of clusters, and one with a line for each number of labels."""
    lines = []
    for title, columns in _TABLES.items():
        found = {(score.measure, score.size): score for score in scores if score.measure in columns}
        sizes = dict.fromkeys(size for _, size in found)
        lines.append(f"{title:>18}" + "".join(f"{column:>18}" for column in columns.values()))
        lines += [f"{size:>18}" + "".join(f"{_text(found[measure, size]):>18}" for measure in columns) for size in sizes]
    runs = max(score.runs for score in scores)
    lines += [f"Mean ± standard deviation over {runs} starts of k-means, {runs} draws of balanced labels; on the test images.",
              "A cluster has the label of the training image closest to its head."]
    return "\n".join(line.rstrip() for line in lines)


def write(scores: Sequence[RepresentationScore], queries: Tensor, test: Data, folder: Path) -> list[Path]:
    """representation.json and .csv, and representation.png: the test images in the plane of two principal components.

    Returns the files; a representation of one dimension has no picture.
    """
    paths = [folder / f"representation.{suffix}" for suffix in ("json", "csv", "png")]
    write_json(paths[0], {"test_images": len(test), "scores": [score._asdict() for score in scores]})
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([RepresentationScore._fields, *scores])
    write_file(paths[1], table.getvalue().encode())
    if queries.shape[1] < 2:
        return paths[:2]
    write_png(paths[2], latent_scatter(queries, test.y, title=f"Representations of {test.name}, {test.split}"))
    return paths


def _text(score: RepresentationScore) -> str:
    return f"{score.mean:.3f}" + (" " * len(" ± 0.000") if score.deviation is None else f" ± {score.deviation:.3f}")
