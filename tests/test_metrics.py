"""Fréchet distance against the textbook formula with a matrix square root, pytorch-fid's, and closed forms."""

import importlib
import warnings

import numpy as np
import pytest
import torch

from latent_engine.metrics import (
    JackknifeEstimate,
    frechet_distance,
    frechet_distance_of_moments,
    frechet_infinity,
    frechet_jackknife,
)
from latent_engine.moments import Moments


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


@pytest.mark.parametrize(("n", "m", "d"), [(6, 9, 20), (6, 400, 20), (400, 6, 20), (19, 20, 20), (2, 2, 50)])
def test_fewer_rows_than_features(n, m, d):
    """Thin factors against the full covariances, and against a root that needs no inverse."""
    x, y = (torch.from_numpy(features(rows, d, seed)) for seed, rows in enumerate((n, m)))
    covariances = [torch.from_numpy(np.cov(rows, rowvar=False)) for rows in (x, y)]
    expected = frechet_distance_of_moments(x.mean(0), covariances[0], y.mean(0), covariances[1])
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    centred = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y)]
    nuclear = np.linalg.svd(centred[0].numpy() @ centred[1].numpy().T, compute_uv=False).sum()
    closed = (x.mean(0) - y.mean(0)).square().sum() + sum(c.square().sum() for c in centred) - 2 * nuclear
    assert frechet_distance(x, y) == pytest.approx(float(closed), rel=1e-11)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e14])
def test_ill_conditioned_covariances_keep_ten_digits(condition):
    """Commuting covariances in axes of their own: Σ (√a − √b)², whose terms are all small."""
    D = 40
    turn = torch.linalg.qr(torch.from_numpy(features(D, D, 7))).Q
    a = torch.logspace(0, -float(np.log10(condition)), D, dtype=torch.float64)
    b = 1.21 * a
    d2 = frechet_distance_of_moments(torch.zeros(D), turn * a @ turn.T, torch.zeros(D), turn * b @ turn.T)
    assert d2 == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-10 * float(a.sum() + b.sum()))


def test_frechet_distance_of_moments_is_that_of_their_rows():
    x, y = (torch.from_numpy(features(n, 5, seed)) for seed, n in enumerate((60, 80)))
    parts = [Moments().add(part) for part in y.split(7)]
    merged = Moments()
    for part in parts:
        merged.merge(part)
    expected = frechet_distance(x, y)
    assert frechet_distance(x, merged) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(Moments().add(x), y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_frechet_distance_is_that_of_pytorch_fid(pytorch_fid):
    """Its function calls SciPy in a way that ended with SciPy 1.18."""
    distance = importlib.import_module("pytorch_fid.fid_score").calculate_frechet_distance
    try:
        distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
    except TypeError as error:
        pytest.skip(str(error))
    x, y = features(300, 12, 0), 2 * features(200, 12, 1)
    moments = [t for rows in (x, y) for t in (rows.mean(0), np.cov(rows, rowvar=False))]
    expected = distance(*moments)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


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
    with pytest.raises(ValueError, match=r"given \[3, 2\] and \[5, 4\]"):
        frechet_distance(Moments().add(torch.zeros(3, 2)), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"given \[0, None\] and \[5, 4\]"):
        frechet_distance(Moments(), torch.zeros(5, 4))


def normal(n, d, generator, scale=1.0, shift=0.0):
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def exact_moments(d, scale, tmp_path):
    """N(0, scale² I) as statistics of no finite set."""
    np.savez(tmp_path / "exact.npz", mu=np.zeros(d), sigma=scale**2 * np.eye(d))
    return Moments.load(tmp_path / "exact.npz")


def test_extrapolation_removes_the_bias_of_the_judged_set(tmp_path):
    """N(0, I) against N(0, 2 I): d² = D (√2 − 1)²; a quarter of the bias is 3 standard errors of 160 sets."""
    D, generator = 10, torch.Generator().manual_seed(0)
    reference, truth = exact_moments(D, 2**0.5, tmp_path), D * (2**0.5 - 1) ** 2
    sets = [normal(400, D, generator) for _ in range(160)]
    plain = torch.tensor([frechet_distance(x, reference) for x in sets])
    found = torch.tensor([frechet_infinity(x, reference, smallest=100, generator=generator) for x in sets])
    assert plain.mean() - truth > 5 * plain.std() / 160**0.5
    assert abs(found.mean() - truth) < 3 * found.std() / 160**0.5
    assert abs(found.mean() - truth) < 0.25 * (plain.mean() - truth)


def test_extrapolation_is_the_value_at_zero_of_a_line_through_random_subsets(tmp_path):
    x, reference = normal(50, 3, torch.Generator().manual_seed(1)), exact_moments(3, 1.5, tmp_path)
    found = frechet_infinity(x, reference, points=4, smallest=20, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    distances = [frechet_distance(x[torch.randperm(50, generator=generator)[:n]], reference) for n in (20, 30, 40, 50)]
    assert found == pytest.approx(np.polynomial.Polynomial.fit([1 / n for n in (20, 30, 40, 50)], distances, 1)(0), rel=1e-9)


def test_jackknife_removes_the_bias_of_both_sets_and_covers_the_truth():
    """N(0, I) against N(½, 2 I), 60 pairs of sets: 95 % intervals miss the known distance at most 8 times (99.7 %)."""
    D, generator = 6, torch.Generator().manual_seed(0)
    truth = D * (0.25 + (2**0.5 - 1) ** 2)
    sets = [(normal(150, D, generator), normal(120, D, generator, 2**0.5, 0.5)) for _ in range(60)]
    plain = torch.tensor([frechet_distance(x, y) for x, y in sets])
    found = [frechet_jackknife(x, y, generator=generator) for x, y in sets]
    values, errors = (torch.tensor([getattr(e, name) for e in found]) for name in ("value", "standard_error"))
    missed = sum(not low < truth < high for low, high in (e.interval() for e in found))
    assert plain.mean() - truth > 4 * plain.std() / 60**0.5
    assert abs(values.mean() - truth) < 3 * values.std() / 60**0.5
    assert 0.7 < errors.mean() / values.std() < 1.4
    assert missed <= 8


def test_jackknife_leaves_out_one_group_at_a_time():
    """As many groups as rows: the pseudo-values of leaving out each row once, here of a fixed reference."""
    x, y = normal(9, 2, torch.Generator().manual_seed(3)), Moments().add(normal(40, 2, torch.Generator().manual_seed(4), 2.0))
    without = np.array([frechet_distance(torch.cat((x[:i], x[i + 1:])), y) for i in range(9)])
    pseudo = 9 * frechet_distance(x, y) - 8 * without
    found = frechet_jackknife(x, y, groups=9)
    assert found.value == pytest.approx(pseudo.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(pseudo.std(ddof=1) / 3, rel=1e-9)


@pytest.mark.parametrize("groups", [5, 10, 20, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_interval_is_that_of_students_t(groups, confidence):
    expected = pytest.importorskip("scipy.stats").t.interval(confidence, groups - 1, 3.0, 2.0)
    assert JackknifeEstimate(3.0, 2.0, groups).interval(confidence) == pytest.approx(expected, rel=5e-3)


def test_estimates_that_cannot_be_made():
    x, y = torch.zeros(20, 3), Moments().add(torch.zeros(9, 3))
    for points, smallest in ((1, 5), (5, 1), (5, 20)):
        with pytest.raises(ValueError, match=f"between 2 and 19 for 20 rows, given {points} and {smallest}"):
            frechet_infinity(x, y, points=points, smallest=smallest)
    for groups in (4, 21):
        with pytest.raises(ValueError, match=f"at most the number of rows, given {groups} for 20 rows"):
            frechet_jackknife(x, y, groups=groups)
    with pytest.raises(ValueError, match="given 10 for 20 and 9 rows"):
        frechet_jackknife(x, torch.zeros(9, 3), groups=10)
    for estimate in (frechet_infinity, frechet_jackknife):
        with pytest.raises(ValueError, match=r"x must be feature rows \[N, D\], given Moments"):
            estimate(y, x)
        with pytest.raises(ValueError, match=r"given \[20, 3\] and \[9, 4\]"):
            estimate(x, torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), given 95"):
        JackknifeEstimate(1.0, 1.0, 5).interval(95)
