"""Diagnostics against the linear Gaussian model, of which everything is known in closed form."""

import math

import numpy as np
import pytest
import torch

from latent_engine.bounds import Posterior, kl_to_normal
from latent_engine.diagnostics import (
    active_dimensions,
    aggregate_split,
    bits_per_dimension,
    dequantise,
    encode,
    log_likelihood,
    mmd2_to_prior,
)
from latent_engine.kernels import mmd2
from latent_engine.priors import GaussianMixturePrior, StandardNormal

from oracles.linear_gaussian import LinearGaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(system, n, seed=1):
    return system.sample(n, generator(seed))


@pytest.mark.parametrize("samples", [1, 3, 40])
def test_exact_posteriors_give_the_exact_likelihood_with_any_number_of_samples(samples):
    system = LinearGaussian([2.0, 0.5, 0.1])
    x = data(system, 11)
    found = log_likelihood(system, x, samples, generator=generator())
    exact = system.marginal().log_prob(x.flatten(1))
    assert torch.allclose(found.log_px, exact, rtol=1e-12) and torch.allclose(found.elbo, exact, rtol=1e-12)
    assert torch.allclose(found.effective_samples, torch.full_like(exact, samples))
    assert found.samples == samples and found.mean == pytest.approx(exact.mean().item())
    if samples > 1:
        assert found.monte_carlo_error < 1e-7


def test_inexact_posteriors_give_it_within_the_standard_error():
    system = LinearGaussian([2.0, 0.5], shift=0.3, log_scale=0.2)
    x = data(system, 60)
    found = log_likelihood(system, x, 4000, generator=generator())
    error = (found.log_px - system.marginal().log_prob(x.flatten(1))) / found.standard_error
    assert error.abs().max() < 4 and 0.7 < error.std() < 1.4
    assert found.monte_carlo_error == pytest.approx(found.standard_error.square().mean().sqrt().item() / 60**0.5)
    assert (found.elbo < found.log_px).all() and (found.pareto_k < 0.7).all()
    assert ((found.effective_samples > 1000) & (found.effective_samples < 4000)).all()


def test_a_bad_encoder_shows_in_effective_samples_and_pareto_k():
    system = LinearGaussian([2.0, 0.5], log_scale=-1.5)  # posteriors far too narrow: weights have no variance
    found = log_likelihood(system, data(system, 20), 2000, generator=generator())
    assert (found.effective_samples < 500).all() and (found.pareto_k > 0.7).float().mean() > 0.8


@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 3), (7, 4), (64, 10), (1000, 100), (10**6, 5)])
def test_chunks_bound_the_decoder_and_count_every_sample(chunk, batch_size):
    system = LinearGaussian([1.0, 0.5], shift=0.2)
    x = data(system, 10)
    system.decoded.clear()
    found = log_likelihood(system, x, 50, chunk=chunk, batch_size=batch_size, generator=generator())
    assert sum(system.decoded) == 500 and max(system.decoded) <= chunk
    error = (found.log_px - system.marginal().log_prob(x.flatten(1))) / found.standard_error
    assert error.abs().max() < 5


def test_the_interval_of_the_mean_covers_the_population():
    """95 % intervals of 200 data sets of 30 rows hold E log p(x), which is minus the entropy of the marginal."""
    system = LinearGaussian([1.5, 0.7])
    truth = -system.marginal().entropy().item()
    held = 0
    for seed in range(200):
        low, high = log_likelihood(system, data(system, 30, seed), 1).interval()
        held += low < truth < high
    assert 178 <= held <= 199
    assert log_likelihood(system, data(system, 1), 1).interval() == (-math.inf, math.inf)


def test_training_mode_is_put_back():
    system = LinearGaussian([1.0]).train()
    log_likelihood(system, data(system, 2), 2)
    encode(system, data(system, 2))
    assert system.training


def test_bad_arguments_fail_before_work():
    system = LinearGaussian([1.0])
    x = data(system, 2)
    with pytest.raises(ValueError, match="samples must be at least 1, given 0"):
        log_likelihood(system, x, 0)
    with pytest.raises(ValueError, match="rows of x must be at least 1, given 0"):
        log_likelihood(system, x[:0])
    with pytest.raises(ValueError, match="chunk must be at least 1, given 0"):
        log_likelihood(system, x, chunk=0)


def test_encode_is_that_of_all_rows_at_once():
    system = LinearGaussian([1.0, 0.5])
    x = data(system, 13)
    mean, log_var = encode(system, x, batch_size=5)
    assert torch.allclose(mean, system.encode(x).mean) and torch.allclose(log_var, system.encode(x).log_var)
    assert not mean.requires_grad


def test_active_dimensions():
    z = torch.randn(400, 3, generator=generator())
    mean = torch.stack([z[:, 0], 0.05 * z[:, 1], 7 + 0.2 * z[:, 2], torch.full((400,), 3.0)], 1)
    assert active_dimensions(mean).tolist() == [True, False, True, False]
    assert active_dimensions(mean, 0.001).tolist() == [True, True, True, False]
    assert np.isclose(mean[:, 2].double().var(), np.var(mean[:, 2].numpy().astype(float), ddof=1))


def test_aggregate_split_of_the_exact_model():
    """That of infinitely many rows is the prior: KL 0 and I(x; z) = −½ log det S, of which N rows see less."""
    system = LinearGaussian([1.5, 0.5])
    x = data(system, 3000)
    posterior = Posterior(*(t.float() for t in encode(system, x)))
    prior = StandardNormal(2)
    split = aggregate_split(posterior, prior, samples=64, generator=generator())
    assert split.mutual_information == pytest.approx(system.mutual_information, abs=0.03)
    assert 0 <= split.kl < 0.03
    kl = kl_to_normal(posterior).sum(1).mean().item()
    assert split.mutual_information + split.kl == pytest.approx(kl, rel=1e-6)
    mixture = GaussianMixturePrior(1, 2, radius=1e-6, log_precision_mean=0.0)  # N(0, I) again, its density sampled
    again = aggregate_split(posterior, mixture, samples=64, generator=generator())
    assert again.kl == pytest.approx(split.kl, abs=0.02)
    few = aggregate_split(Posterior(*(t[:10] for t in posterior)), prior, samples=500, generator=generator())
    assert few.mutual_information < min(system.mutual_information, math.log(10)) and few.kl > split.kl


def test_aggregate_split_of_far_posteriors_is_log_n():
    posterior = Posterior(100 * torch.eye(6), torch.zeros(6, 6))
    split = aggregate_split(posterior, GaussianMixturePrior(4, 6, generator=generator()), generator=generator())
    assert split.mutual_information == pytest.approx(math.log(6), rel=1e-6)


def test_mmd_to_the_prior():
    """0 for the exact posteriors of model data; in closed form for N(0, I), sampled otherwise."""
    system = LinearGaussian([1.5, 0.5])
    mean, log_var = (t.float() for t in encode(system, data(system, 800)))
    assert abs(mmd2_to_prior(Posterior(mean, log_var), StandardNormal(2))) < 3e-3
    far = mmd2_to_prior(Posterior(mean + 3, log_var), StandardNormal(2))
    z = mean + 3 + (0.5 * log_var).exp() * torch.randn(800, 2, generator=generator())
    sampled = mmd2(z, torch.randn(800, 2, generator=generator(1)), combine="mean").item()
    assert far == pytest.approx(sampled, rel=0.05) and 0.3 < far < 2
    mixture = GaussianMixturePrior(3, 2, generator=generator())
    points = mixture.sample(900, generator())
    narrow = torch.full_like(points, -20.0)
    assert abs(mmd2_to_prior(Posterior(points, narrow), mixture, generator(1))) < 0.01
    assert mmd2_to_prior(Posterior(points + 5, narrow), mixture, generator(1)) > 0.1


def test_bits_per_dimension_bound_those_of_a_known_source():
    """Uniform noise makes the density constant on each cell, so that the bound is the entropy of the integers."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    v = torch.multinomial(p, 60000, replacement=True, generator=generator()).view(-1, 3)
    x = dequantise(v / 3.0, levels=4, generator=generator(1))
    assert ((x * 4).floor() == v).all() and x.min() >= 0 and x.max() < 1
    log_px = (4 * p[(x * 4).long()]).log().sum(1)
    assert bits_per_dimension(log_px, 3, levels=4).mean().item() == pytest.approx(1.75, abs=0.02)
    assert bits_per_dimension(torch.zeros(1), 784).item() == 8
    with pytest.raises(ValueError, match="must hold 256 levels from 0 to 1"):
        dequantise(torch.tensor([0.5, 0.1]))
