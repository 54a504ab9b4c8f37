"""Probes against counts made by hand."""

import math
from collections import Counter
from itertools import combinations
from math import comb, log

import numpy as np
import pytest
import torch

from latent_engine.data import load
from latent_engine.probes import (
    adjusted_rand_index,
    balanced_draw,
    component_purity,
    kmeans_scores,
    knn_accuracy,
    linear_accuracy,
    normalized_mutual_info,
    pca_baseline,
    probe,
    representation_probe,
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


def test_a_cluster_has_the_label_of_the_row_closest_to_its_head():
    """Not the commonest one: the head of the first three rows is 0.1, of the last three 9.9."""
    z, labels = [[-1.0], [0.1], [1.2], [8.8], [9.9], [11.0]], [3, 7, 3, 5, 5, 5]
    found = kmeans_scores(z, labels, 2, queries=[[0.5], [-3.0], [9.0], [9.5]], query_labels=[7, 3, 5, 5])
    assert found["accuracy"] == 0.75
    assert found["ari"] == adjusted_rand_index([0, 0, 1, 1], [7, 3, 5, 5])
    assert found["nmi"] == normalized_mutual_info([0, 0, 1, 1], [7, 3, 5, 5])
    with pytest.raises(ValueError, match="clusters must lie between 1 and 6, the number of rows, given 7"):
        kmeans_scores(z, labels, 7, queries=z, query_labels=labels)


def gaussians(rows, seed, scale=1.0):
    """Two classes, one deviation to either side of 0 in the first of five dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    z = rng.normal(size=(rows, 5))
    z[:, 0] += 2 * labels - 1
    return scale * z, np.where(labels == 1, 9, 4)


def test_linear_accuracy_of_two_gaussians_at_any_scale():
    found = []
    for scale in (1e-3, 1.0, 1e4):
        (z, labels), (queries, query_labels) = gaussians(4000, 0, scale), gaussians(20_000, 1, scale)
        found.append(linear_accuracy(z, labels, queries=queries, query_labels=query_labels))
    assert found == pytest.approx([0.5 * math.erfc(-1 / math.sqrt(2))] * 3, abs=0.01) and max(found) - min(found) < 1e-3
    corners, labels = [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], [1, 1, 2, 2]
    assert linear_accuracy(corners, labels, queries=corners, query_labels=labels) <= 0.75
    assert linear_accuracy(np.zeros((4, 2)), labels, queries=np.zeros((4, 2)), query_labels=labels) == 0.5
    with pytest.raises(ValueError, match=r"two or more classes, given \[3\]"):
        linear_accuracy(corners, [3] * 4, queries=corners, query_labels=[3] * 4)


def test_draws_are_spread_over_the_classes_and_random():
    labels = np.repeat([5, 6, 7], [100, 50, 4])
    for count, expected in ((3, {5: 1, 6: 1, 7: 1}), (12, {5: 4, 6: 4, 7: 4}), (54, {5: 25, 6: 25, 7: 4}),
                            (154, {5: 100, 6: 50, 7: 4})):
        drawn = balanced_draw(labels, count, seed=1)
        assert Counter(labels[drawn].tolist()) == expected and len(set(drawn.tolist())) == count
    assert balanced_draw(labels, 9, seed=1).tolist() == balanced_draw(labels, 9, seed=1).tolist()
    assert set(balanced_draw(labels, 9, seed=1)) != set(balanced_draw(labels, 9, seed=2))
    with pytest.raises(ValueError, match="count must lie between 1 and 154, the number of labels, given 155"):
        balanced_draw(labels, 155)


def test_a_representation_is_probed_with_few_and_all_labels():
    (z, labels), (queries, query_labels) = gaussians(60, 2), gaussians(300, 3)
    judged = {"queries": torch.from_numpy(queries), "query_labels": torch.from_numpy(query_labels)}
    scores = representation_probe(torch.from_numpy(z), torch.from_numpy(labels), **judged, clusters=(2, 5), counts=(10, 60),
                                  runs=3, seed=7)
    assert [(s.measure, s.size, s.runs) for s in scores] == [
        *((f"kmeans_{name}", size, 3) for size in (2, 5) for name in ("accuracy", "ari", "nmi")),
        ("knn_accuracy", 10, 3), ("linear_accuracy", 10, 3), ("knn_accuracy", 60, 1), ("linear_accuracy", 60, 1)]
    by_name = {(s.measure, s.size): s for s in scores}
    runs = [kmeans_scores(z, labels, 5, queries=queries, query_labels=query_labels, seed=seed)["nmi"] for seed in (7, 8, 9)]
    assert by_name["kmeans_nmi", 5].mean == pytest.approx(np.mean(runs))
    assert by_name["kmeans_nmi", 5].deviation == pytest.approx(np.std(runs, ddof=1))
    draws = [balanced_draw(labels, 10, seed) for seed in (7, 8, 9)]
    runs = [knn_accuracy(z[d], labels[d], queries=queries, query_labels=query_labels) for d in draws]
    assert by_name["knn_accuracy", 10].mean == pytest.approx(np.mean(runs))
    assert by_name["linear_accuracy", 60].mean == linear_accuracy(z, labels, queries=queries, query_labels=query_labels)
    assert by_name["linear_accuracy", 60].deviation is None
    again = representation_probe(z, labels, queries=queries, query_labels=query_labels, clusters=(2, 5), counts=(10, 60),
                                 runs=3, seed=7)
    assert again == scores


@pytest.mark.parametrize(("settings", "words"), [
    ({"clusters": (10, 61)}, "number of clusters must lie between 1 and 60, the number of labelled training rows, given 61"),
    ({"clusters": (0,)}, "number of clusters must lie between 1 and 60"),
    ({"counts": (100,)}, "number of labels must lie between 10 and 60, .* given 100"),
    ({"counts": (9,)}, "number of labels must lie between 10 and 60, .* given 9"),
    ({"labels": np.ones(60)}, r"labels of two or more classes, given \[1.0\]"),
])
def test_probes_that_the_rows_do_not_allow(settings, words):
    z, labels = gaussians(60, 2)
    settings = {"labels": labels, "clusters": (2,), "counts": (10,)} | settings
    with pytest.raises(ValueError, match=words):
        representation_probe(z, **settings, queries=z, query_labels=labels)


def test_pca_baseline_of_the_embedded_digits():
    data = load("mnist5k").pixels(binarize=True)
    scores = pca_baseline(data.x, data.y)
    assert scores["knn"] == pytest.approx(0.44, abs=0.01)
    assert scores["purity"] == pytest.approx(0.44, abs=0.015)
