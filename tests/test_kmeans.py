"""k-means against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from latent_engine.kmeans import kmeans, nearest


def clusters(n=600, k=7, d=3):
    g = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(k, d, generator=g, dtype=torch.float64)
    return centres[torch.randint(k, (n,), generator=g)] + torch.randn(n, d, generator=g, dtype=torch.float64) + 100


def inertia(x, centres):
    return (x - centres[nearest(x, centres)]).square().sum().item()


def test_finds_clusters_as_well_as_scikit_learn():
    x = clusters()
    ours = [inertia(x, kmeans(x, 7, generator=torch.Generator().manual_seed(s))) for s in range(10)]
    theirs = [KMeans(7, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(10)]
    assert min(ours) == pytest.approx(min(theirs), rel=1e-3)
    assert np.median(ours) <= 1.1 * np.median(theirs)


def test_converged_centres_are_the_means_of_their_points():
    x = clusters()
    centres = kmeans(x, 7, max_iter=300, generator=torch.Generator().manual_seed(0))
    index = nearest(x, centres)
    assert torch.equal(index, torch.cdist(x, centres).argmin(1))
    for k in range(7):
        torch.testing.assert_close(centres[k], x[index == k].mean(0))


def test_seeds_are_points_apart():
    x = torch.cat([torch.randn(200, 2), torch.randn(1, 2) + 1e3])
    seeds = kmeans(x, 2, max_iter=0, generator=torch.Generator().manual_seed(0))
    assert (seeds > 500).any() and (torch.cdist(seeds, x).min(1).values < 1e-3).all()


def test_fewer_distinct_points_than_clusters():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(5, 1)
    centres = kmeans(x, 4)
    assert inertia(x, centres) == 0
    assert torch.equal(kmeans(x[:1], 1), x[:1])


def test_the_same_generator_gives_the_same_bits():
    x = clusters().float()
    first, second = (kmeans(x, 20, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32


@pytest.mark.parametrize(("x", "k"), [(torch.zeros(3, 2), 4), (torch.zeros(3, 2), 0), (torch.zeros(3), 1)])
def test_mistakes_have_one_clear_error(x, k):
    with pytest.raises(ValueError, match="from 1 to N clusters"):
        kmeans(x, k)
