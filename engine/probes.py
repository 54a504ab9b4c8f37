"""What a representation tells about labels that the model never saw.

Every function takes tensors or arrays: representations `z` `[N, D]`, labels `[N]`, and for each row the index of its
component (`[N]`, for a mixture the most responsible one); `queries` `[M, D]` and `query_labels` `[M]` are rows to judge by.
Needs scikit-learn (extra `eval`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .extras import require

_PURPOSE = "latent_engine.probes"


def component_purity(components: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows that carry the commonest label of their component, in (0, 1]; it grows with their number."""
    contingency = require("sklearn.metrics.cluster", "eval", _PURPOSE).contingency_matrix(labels, components)
    return float(contingency.max(0).sum() / contingency.sum())


def adjusted_rand_index(components: ArrayLike, labels: ArrayLike) -> float:
    """Agreement over pairs of rows: 0 in expectation for random components, 1 for a perfect match (Hubert & Arabie)."""
    return float(require("sklearn.metrics", "eval", _PURPOSE).adjusted_rand_score(labels, components))


def normalized_mutual_info(components: ArrayLike, labels: ArrayLike) -> float:
    """Mutual information over the mean of the two entropies, in [0, 1]."""
    return float(require("sklearn.metrics", "eval", _PURPOSE).normalized_mutual_info_score(labels, components))


def knn_accuracy(z: ArrayLike, labels: ArrayLike, k: int = 10, *, queries: ArrayLike | None = None,
                 query_labels: ArrayLike | None = None) -> float:
    """Accuracy of the vote of the `k` nearest rows of `z` (Euclidean; a tie goes to the smallest label).

    With `queries` and `query_labels`, of those rows; without, of each row of `z` by the others (leave one out).
    """
    z, labels = np.asarray(z), np.asarray(labels)
    available = len(z) - (queries is None)
    if not 1 <= k <= available:
        raise ValueError(f"knn_accuracy: k must lie between 1 and {available} for {len(z)} rows, given {k}.")
    neighbors = require("sklearn.neighbors", "eval", _PURPOSE).NearestNeighbors(n_neighbors=k).fit(z)
    nearest = neighbors.kneighbors(None if queries is None else np.asarray(queries), return_distance=False)
    classes, codes = np.unique(labels, return_inverse=True)
    votes = (codes[nearest][:, :, None] == np.arange(len(classes))).sum(1)
    truth = labels if queries is None else np.asarray(query_labels)
    return float((classes[votes.argmax(1)] == truth).mean())


def kmeans_scores(z: ArrayLike, labels: ArrayLike, clusters: int, *, queries: ArrayLike, query_labels: ArrayLike,
                  seed: int = 0) -> dict[str, float]:
    """How well clusters of `z`, found by k-means from one k-means++ start, fit the labels of the queries.

    Returns:
        The "accuracy" of the labels of the clusters, which are those of the row of `z` closest to the head of each (Ma et al.
        2019, §4.1.2), and "ari" and "nmi" of the clusters.
    """
    z, labels, queries = np.asarray(z, np.float64), np.asarray(labels), np.asarray(queries, np.float64)
    if not 1 <= clusters <= len(z):
        raise ValueError(f"kmeans_scores: clusters must lie between 1 and {len(z)}, the number of rows, given {clusters}.")
    found = require("sklearn.cluster", "eval", _PURPOSE).KMeans(clusters, n_init=1, random_state=seed).fit(z)
    closest = require("sklearn.metrics", "eval", _PURPOSE).pairwise_distances_argmin(found.cluster_centers_, z)
    nearest = found.predict(queries)
    return {"accuracy": float((labels[closest][nearest] == np.asarray(query_labels)).mean()),
            "ari": adjusted_rand_index(nearest, query_labels), "nmi": normalized_mutual_info(nearest, query_labels)}


def linear_accuracy(z: ArrayLike, labels: ArrayLike, *, queries: ArrayLike, query_labels: ArrayLike) -> float:
    """Accuracy on the queries of a logistic regression on `z`, with scikit-learn's penalty.

    Rows are divided by the root of their mean variance over the dimensions, so that the scale of `z` does not matter;
    dimensions are not scaled apart, which would turn unused ones to noise.
    """
    z, labels, queries = np.asarray(z, np.float64), np.asarray(labels), np.asarray(queries, np.float64)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"linear_accuracy: needs labels of two or more classes, given {np.unique(labels).tolist()}.")
    scale = np.sqrt(z.var(0).mean()) or 1.0
    regression = require("sklearn.linear_model", "eval", _PURPOSE).LogisticRegression(max_iter=2000)
    return float((regression.fit(z / scale, labels).predict(queries / scale) == np.asarray(query_labels)).mean())


def balanced_draw(labels: ArrayLike, count: int, seed: int = 0) -> np.ndarray:
    """The numbers of `count` random rows, spread over the classes as evenly as their rows allow."""
    labels = np.asarray(labels)
    if not 1 <= count <= len(labels):
        raise ValueError(f"balanced_draw: count must lie between 1 and {len(labels)}, the number of labels, given {count}.")
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)  # of a row among those of its class
    for label in np.unique(labels):
        own = labels[order] == label
        turn[own] = np.arange(own.sum())
    return order[np.argsort(turn, kind="stable")[:count]]


class RepresentationScore(NamedTuple):
    """One number about a representation, over runs that differ by their seed.

    `measure` is "kmeans_accuracy", "kmeans_ari", "kmeans_nmi", "knn_accuracy" or "linear_accuracy"; `size` the number of
    clusters, or of labels; `deviation` the standard deviation over the runs, None for a single one.
    """

    measure: str
    size: int
    mean: float
    deviation: float | None
    runs: int


def check_probe(labels: ArrayLike, clusters: Sequence[int], counts: Sequence[int], k: int = 10) -> None:
    """Raises ValueError if `representation_probe` cannot be had from these labels of the rows."""
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"Probes of a representation need labels of two or more classes, given {np.unique(labels).tolist()}.")
    for what, sizes, low in (("clusters", clusters, 1), ("labels", counts, k)):
        for size in sizes:
            if not low <= size <= len(labels):
                raise ValueError(f"The number of {what} must lie between {low} and {len(labels)}, the number of labelled "
                                 f"training rows, given {size}; choose others (--{what}).")


def representation_probe(z: ArrayLike, labels: ArrayLike, *, queries: ArrayLike, query_labels: ArrayLike,
                         clusters: Sequence[int] = (10, 20, 30), counts: Sequence[int] = (100, 1000), runs: int = 5,
                         k: int = 10, seed: int = 0) -> list[RepresentationScore]:
    """Table 2 of Ma et al. (2019): clusters of `z`, and classifiers that learn from few of its labels, judged on the queries.

    Args:
        clusters: their numbers, for k-means (`kmeans_scores`), from `runs` starts.
        counts: of labels, in `runs` draws balanced over the classes, for `k` nearest neighbours and a logistic regression;
            all labels come after them.

    Raises:
        ValueError: labels of one class, more clusters than rows, more labels than there are or fewer than `k`.
    """
    z, labels, queries = np.asarray(z), np.asarray(labels), np.asarray(queries)
    check_probe(labels, clusters, counts, k)
    judged = {"queries": queries, "query_labels": np.asarray(query_labels)}
    scores = []
    for size in clusters:
        found = [kmeans_scores(z, labels, size, **judged, seed=seed + run) for run in range(runs)]
        scores += [_score(f"kmeans_{name}", size, [values[name] for values in found]) for name in found[0]]
    for size in dict.fromkeys((*counts, len(z))):
        draws = [balanced_draw(labels, size, seed + run) for run in range(runs if size < len(z) else 1)]
        scores.append(_score("knn_accuracy", size, [knn_accuracy(z[d], labels[d], k, **judged) for d in draws]))
        scores.append(_score("linear_accuracy", size, [linear_accuracy(z[d], labels[d], **judged) for d in draws]))
    return scores


def _score(measure: str, size: int, values: list[float]) -> RepresentationScore:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return RepresentationScore(measure, size, float(np.mean(values)), deviation, len(values))


def pca_baseline(x: ArrayLike, labels: ArrayLike, components: int = 20, k: int = 10, seed: int = 0) -> dict[str, float]:
    """What the plane of the first two principal components gives on the same images: the numbers to beat.

    Args:
        x: images `[N, ...]`, floating point.
        labels: `[N]`.
        components: number of full-covariance Gaussians fitted to the plane by EM.

    Returns:
        "purity", "ari" and "nmi" of those Gaussians, and the leave-one-out "knn" accuracy of the plane.
    """
    flat = np.asarray(x).reshape(len(x), -1)
    z = require("sklearn.decomposition", "eval", _PURPOSE).PCA(2, random_state=seed).fit_transform(flat)
    mixture = require("sklearn.mixture", "eval", _PURPOSE).GaussianMixture(components, random_state=seed)
    return probe(z, labels, mixture.fit_predict(z), k)


def probe(z: ArrayLike, labels: ArrayLike, components: ArrayLike, k: int = 10) -> dict[str, float]:
    """The table of a clustered representation: component "purity", "ari", "nmi", and leave-one-out "knn" accuracy."""
    return {"purity": component_purity(components, labels), "ari": adjusted_rand_index(components, labels),
            "nmi": normalized_mutual_info(components, labels), "knn": knn_accuracy(z, labels, k)}
