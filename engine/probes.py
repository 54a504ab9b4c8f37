"""What a representation tells about labels that the model never saw.

Every function takes tensors or arrays: representations `z` `[N, D]`, labels `[N]`, and for each row the index of its
component (`[N]`, for a mixture the most responsible one). Needs scikit-learn (extra `eval`).
"""

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
