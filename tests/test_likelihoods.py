"""Observation models against SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from latent_engine.likelihoods import (
    Bernoulli,
    DecodedGaussian,
    Gaussian,
    LearnedGaussian,
    OptimalGaussian,
    bernoulli_log_prob,
    gaussian_log_prob,
)

SHAPE = (4, 1, 3, 5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_bernoulli_sums_over_the_features_of_a_row(rng):
    logits, x = rng.normal(size=SHAPE), rng.integers(0, 2, SHAPE)
    expected = stats.bernoulli(1 / (1 + np.exp(-logits))).logpmf(x).reshape(4, -1).sum(1)
    found = bernoulli_log_prob(torch.from_numpy(logits), torch.from_numpy(x).double())
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_bernoulli_is_finite_at_extreme_logits():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    wrong = bernoulli_log_prob(logits, torch.tensor([[0.0, 1.0]]))
    wrong.sum().backward()
    assert wrong.item() == -2e4
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]))


def test_gaussian_sums_over_the_features_of_a_row(rng):
    mean, x = rng.normal(size=(2, *SHAPE))
    expected = stats.norm(mean, 0.3).logpdf(x).reshape(4, -1).sum(1)
    found = gaussian_log_prob(torch.from_numpy(mean), torch.from_numpy(x), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.3), DecodedGaussian(), LearnedGaussian(0.5, (3, 1)).double(),
                                        OptimalGaussian(0.5).double().eval()], ids=lambda value: type(value).__name__)
def test_pairwise_is_every_row_against_every_candidate(likelihood, rng):
    channels = 2 if isinstance(likelihood, DecodedGaussian) else 1
    x, outputs = torch.from_numpy(rng.random(SHAPE)), torch.from_numpy(rng.normal(size=(7, channels, *SHAPE[2:])))
    expected = torch.stack([likelihood.log_prob(o.expand(4, *o.shape), x) for o in outputs], 1)
    torch.testing.assert_close(likelihood.pairwise(outputs)(x), expected)


def test_pairwise_of_pixels_far_from_zero_keeps_its_digits(rng):
    """Squares of 10⁶ would be off by 0.1 in single precision, and 10⁴ times that over the variance."""
    x, outputs = (torch.from_numpy(1e3 + rng.random((n, 1, 3, 5))) for n in (4, 7))
    expected = Gaussian(0.01).pairwise(outputs)(x)
    torch.testing.assert_close(Gaussian(0.01).pairwise(outputs.float())(x.float()).double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.3)], ids=["bernoulli", "gaussian"])
def test_samples_average_to_the_mean(likelihood, rng):
    output = torch.from_numpy(rng.normal(size=(1, 6)))
    samples = likelihood.sample(output.expand(4000, 6), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(samples.mean(0), likelihood.mean(output)[0], atol=0.04)


def test_bernoulli_samples_are_zeros_and_ones():
    samples = Bernoulli().sample(torch.zeros(100, 3), torch.Generator().manual_seed(0))
    assert set(samples.unique().tolist()) == {0.0, 1.0}


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"must be positive, given 0\.0"):
        Gaussian(0.0)
