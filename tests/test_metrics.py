"""Fréchet distance against the textbook formula with a matrix square root, and against closed forms."""

import warnings

import numpy as np
import pytest
import torch

from latent_engine.metrics import frechet_distance, frechet_distance_of_moments


def textbook(x, y):
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½) with SciPy's root of the product, in float64."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    s1, s2 = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular products, whose root SciPy still returns
        root = np.real(sqrtm(s1 @ s2))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root))


def features(n, d, seed, rank=None):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d)) + rng.normal(size=d)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 1), (200, 300, 7), (2, 3, 2), (500, 90, 33)])
def test_frechet_distance_is_the_textbook_formula(n, m, d):
    x, y = features(n, d, 0), 3 * features(m, d, 1)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(textbook(x, y), rel=1e-8)


@pytest.mark.parametrize(("n", "rank"), [(40, 3), (8, None), (5, 2)])
def test_frechet_distance_of_singular_covariances(n, rank):
    """Fewer directions than dimensions, or fewer rows than that: SciPy's root is good to half the digits there."""
    x, y = features(n, 12, 0, rank), features(n, 12, 1, rank)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(textbook(x, y), rel=1e-5)


def test_frechet_distance_of_diagonal_covariances_in_closed_form():
    """Commuting covariances: Σ (√a − √b)²; singular ones need no care."""
    a, b = torch.tensor([4.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 2.0, 0.0, 9.0])
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5])
    expected = float((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum())
    assert frechet_distance_of_moments(mean, a.diag(), torch.zeros(4), b.diag()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d", "rank"), [(300, 20, None), (10, 64, None), (50, 16, 2)])
def test_equal_sets_are_at_distance_zero_and_a_shift_counts_squared(n, d, rank):
    x = torch.from_numpy(features(n, d, 3, rank))
    scale = float(x.var(0).sum())
    assert 0 <= frechet_distance(x, x) < 1e-9 * scale
    assert frechet_distance(x, x + 2) == pytest.approx(4 * d, abs=1e-9 * scale)
    assert frechet_distance(x.float(), x.float().flip(0)) < 1e-9 * scale  # float32 features, another order


def test_frechet_distance_is_symmetric_and_does_not_depend_on_the_axes():
    x, y = (torch.from_numpy(features(60, 9, seed)) for seed in (4, 5))
    turn = torch.linalg.qr(torch.from_numpy(features(9, 9, 6))).Q
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-10)


def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match=r"N and M at least 2, given \[1, 4\] and \[9, 4\]"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"given \[9, 1, 2, 2\] and \[9, 4\]; flatten images"):
        frechet_distance(torch.zeros(9, 1, 2, 2), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="must be finite; look for NaN"):
        frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"given \[2\], \[2, 2\], \[3\], \[3, 3\]"):
        frechet_distance_of_moments(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
