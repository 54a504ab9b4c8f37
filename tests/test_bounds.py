"""Parts of variational bounds against SciPy and their formulas."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from latent_engine import bounds
from latent_engine.bounds import Posterior


@pytest.fixture
def posterior():
    rng = np.random.default_rng(0)
    return Posterior(*(torch.from_numpy(rng.normal(size=(7, 3))) for _ in range(2)))


def test_kl_to_normal_is_the_mean_of_the_log_ratio(posterior):
    """By quadrature in each dimension: ∫ q log (q / p)."""
    z = np.linspace(-60, 60, 400_001)
    for n, d in ((0, 0), (3, 2), (6, 1)):
        q = stats.norm(posterior.mean[n, d], math.exp(0.5 * posterior.log_var[n, d]))
        expected = np.trapezoid(q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), z)
        assert bounds.kl_to_normal(posterior)[n, d].item() == pytest.approx(expected, rel=1e-6)


def test_kl_to_normal_keeps_its_digits_near_the_prior():
    """½ (σ² − 1 − log σ²) is δ²/4 for log σ² = δ: plain float32 gives 0 or twice as much."""
    kl = bounds.kl_to_normal(Posterior(torch.zeros(1, 1), torch.full((1, 1), 1e-2)))
    assert kl.item() == pytest.approx(0.5 * (np.expm1(1e-2) - 1e-2), rel=1e-3)


def test_entropy_is_that_of_scipy(posterior):
    expected = [stats.multivariate_normal(m, np.diag(np.exp(v))).entropy()
                for m, v in zip(posterior.mean.numpy(), posterior.log_var.numpy(), strict=True)]
    np.testing.assert_allclose(bounds.entropy(posterior), expected)


def test_samples_have_the_moments_of_the_posterior_and_its_gradients(posterior):
    z = bounds.reparametrize(posterior, 20_000, torch.Generator().manual_seed(0))
    assert z.shape == (20_000, 7, 3) and z.dtype == torch.float64
    np.testing.assert_allclose(z.mean(0), posterior.mean, atol=0.06)
    np.testing.assert_allclose(z.var(0).log(), posterior.log_var, atol=0.06)
    assert torch.equal(z, bounds.reparametrize(posterior, 20_000, torch.Generator().manual_seed(0)))
    mean, log_var = (t.requires_grad_() for t in posterior)
    z = bounds.reparametrize(Posterior(mean, log_var), 2)
    z.sum().backward()
    torch.testing.assert_close(mean.grad, torch.full_like(mean, 2.0))
    torch.testing.assert_close(log_var.grad, (0.5 * (z - mean)).sum(0))


def test_free_bits_stop_gradients_below_their_threshold():
    kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]], requires_grad=True)
    for found, value, grad in ((bounds.free_bits(kl, 2.0), 2.2, [[0.5, 0.5], [0.5, 0.5]]),
                               (bounds.free_bits(kl, 3.0), 3.0, [[0, 0], [0, 0]]),
                               (bounds.free_bits(kl.sum(1), 2.0), 2.2, [[0.5, 0.5], [0.5, 0.5]]),
                               (bounds.free_bits_per_dimension(kl, 0.5), 2.5, [[0, 0.5], [0, 0.5]])):
        assert found.item() == pytest.approx(value)
        assert torch.autograd.grad(found, kl)[0].tolist() == grad


def test_distance_to_target_pulls_the_mean_from_both_sides():
    kl = torch.tensor([[0.5, 3.0], [0.5, 2.0]], requires_grad=True)  # 3 nats a row
    for target, sign in ((2.0, 0.5), (5.0, -0.5)):
        distance = bounds.distance_to_target(kl, target)
        assert distance.item() == abs(3 - target)
        assert torch.autograd.grad(distance, kl)[0].unique().tolist() == [sign]


def test_schedules_rise_to_one():
    steps = torch.arange(11)
    assert bounds.linear_warmup(steps, 4).tolist() == [0, 0.25, 0.5, 0.75, *[1] * 7]
    assert bounds.cyclical_warmup(steps, 4).tolist() == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 0, 0.5, 1]
    assert bounds.cyclical_warmup(steps[:4], 4, rise=0.25).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_beta_divergence_score_is_best_for_the_truth(beta):
    """The mean over x ~ Bernoulli(0.3) of the score of Bernoulli(p) has its maximum at p = 0.3."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    integral = (p ** (1 + beta) + (1 - p) ** (1 + beta)).log()
    score = sum(w * bounds.beta_divergence_score(q.log(), integral, beta) for w, q in ((0.3, p), (0.7, 1 - p)))
    assert p[score.argmax()].item() == pytest.approx(0.3)
