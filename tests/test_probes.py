"""Probes against counts made by hand."""

from collections import Counter
from itertools import combinations
from math import comb, log

import numpy as np
import pytest
import torch

from latent_engine.data import load
from latent_engine.probes import (
    adjusted_rand_index,
    component_purity,
    knn_accuracy,
    normalized_mutual_info,
    pca_baseline,
    probe,
)

pytest.importorskip("sklearn")


@pytest.fixture
def clustering():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    return np.where(rng.random(60) < 0.7, labels + 3, rng.integers(0, 9, 60)), labels


def test_purity_counts_the_commonest_label(clustering):
    components, labels = clustering
    groups = [Counter(labels[components == c]) for c in set(components)]
    assert component_purity(components, labels) == sum(max(g.values()) for g in groups) / 60
    assert component_purity([0, 0, 0, 1], [5, 5, 7, 7]) == 0.75


def test_adjusted_rand_index_is_chance_corrected_pair_counting(clustering):
    components, labels = clustering
    pairs = list(combinations(range(60), 2))
    same = [(components[i] == components[j], labels[i] == labels[j]) for i, j in pairs]
    both, left, right = (sum(s) for s in zip(*((a and b, a, b) for a, b in same), strict=True))
    expected = left * right / comb(60, 2)
    assert adjusted_rand_index(components, labels) == pytest.approx((both - expected) / ((left + right) / 2 - expected))


def test_normalized_mutual_info(clustering):
    components, labels = clustering

    def entropy(values):
        return -sum(c / 60 * log(c / 60) for c in Counter(values).values())

    joint = entropy(zip(components, labels, strict=True))
    a, b = entropy(components), entropy(labels)
    assert normalized_mutual_info(components, labels) == pytest.approx((a + b - joint) / ((a + b) / 2))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_knn_accuracy_leaves_the_row_itself_out(k):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 3, 80)
    z = rng.normal(size=(80, 2)) + labels[:, None]
    distance = ((z[:, None] - z) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    votes = [np.bincount(labels[np.argsort(row)[:k]]).argmax() for row in distance]
    assert knn_accuracy(torch.from_numpy(z), torch.from_numpy(labels), k) == np.mean(votes == labels)


def test_knn_accuracy_of_new_rows():
    z, labels = [[0.0], [0.1], [5.0], [5.1]], [7, 7, 9, 9]
    assert knn_accuracy(z, labels, 2, queries=[[0.05], [5.2], [4.9]], query_labels=[7, 9, 7]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="k must lie between 1 and 3 for 4 rows, given 4"):
        knn_accuracy(z, labels, 4)


def test_well_separated_clusters_score_one():
    labels = np.repeat(np.arange(5), 20)
    z = labels[:, None] * 10 + np.random.default_rng(0).normal(size=(100, 2))
    assert probe(z, labels, labels) == {"purity": 1, "ari": 1, "nmi": pytest.approx(1), "knn": 1}


def test_pca_baseline_of_the_embedded_digits():
    data = load("mnist5k").pixels(binarize=True)
    scores = pca_baseline(data.x, data.y)
    assert scores["knn"] == pytest.approx(0.44, abs=0.01)
    assert scores["purity"] == pytest.approx(0.44, abs=0.015)
