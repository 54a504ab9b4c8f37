"""Representation priors and parameter priors, against SciPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.mixture import GaussianMixture

from latent_engine.bounds import Posterior
from latent_engine.priors import (
    GaussianMixturePrior,
    StandardNormal,
    VampPrior,
    dirichlet_log_prob,
    normal_log_prob,
    soft_ball_log_prob,
    uniform_ball,
)


@pytest.fixture
def prior():
    """Six components over three dimensions, two for each of three classes, nothing at its initial value."""
    torch.manual_seed(0)
    prior = GaussianMixturePrior(6, 3, classes=3, concentration=2.0).double()
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_vars.normal_()
    return prior


@pytest.fixture
def z():
    return 5 * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def terms(prior, z):
    """log π_k + log N(z; μ_k, σ²_k) `[N, K]` by SciPy."""
    weights = prior.logits.detach().softmax(0).log().numpy()
    means, variances = prior.means.detach().numpy(), prior.log_vars.detach().exp().numpy()
    components = zip(weights, means, variances, strict=True)
    return np.stack([w + stats.multivariate_normal(m, np.diag(v)).logpdf(z) for w, m, v in components], 1)


def test_mixture_is_the_density_scikit_learn_computes(prior, z):
    oracle = GaussianMixture(6, covariance_type="diag")
    oracle.weights_ = prior.logits.detach().softmax(0).numpy()
    oracle.means_ = prior.means.detach().numpy()
    oracle.precisions_cholesky_ = (-0.5 * prior.log_vars.detach()).exp().numpy()
    np.testing.assert_allclose(prior(z).detach(), oracle.score_samples(z.numpy()), rtol=1e-10)
    shares = prior.responsibilities(z).detach()
    np.testing.assert_allclose(shares, oracle.predict_proba(z.numpy()), rtol=1e-8, atol=1e-12)


def test_labels_restrict_the_components_and_unknown_ones_do_not(prior, z):
    labels = torch.arange(50) % 4 - 1
    of_class = np.stack([np.logaddexp.reduce(terms(prior, z)[:, 2 * c:2 * c + 2], 1) for c in range(3)], 1)
    expected = np.where(labels < 0, np.logaddexp.reduce(of_class, 1), of_class[np.arange(50), labels])
    np.testing.assert_allclose(prior(z, labels).detach(), expected, rtol=1e-10)
    shares = prior.responsibilities(z, labels).detach()
    assert (shares[labels == 2][:, :4] == 0).all()
    np.testing.assert_allclose(shares.sum(1), 1)


def test_isotropic_components_have_one_variance_each():
    prior = GaussianMixturePrior(4, 5, covariance="isotropic")
    assert prior.log_vars.shape == (4, 1)
    z = torch.randn(7, 5)
    wide = GaussianMixturePrior(4, 5)
    wide.load_state_dict({**prior.state_dict(), "log_vars": prior.log_vars.detach().expand(4, 5)})
    torch.testing.assert_close(prior(z), wide(z))


def test_log_prior_is_the_sum_of_its_three_parts(prior):
    weights = prior.logits.detach().softmax(0).numpy()
    radius = np.linalg.norm(prior.means.detach().numpy(), axis=1)
    ball = -np.log1p(np.exp(5 * (radius / 10 - 1))) - math.log(4 / 3 * math.pi * 10**3)
    precisions = stats.norm(2, 2).logpdf(-prior.log_vars.detach().numpy())
    expected = ball.sum() + stats.dirichlet(np.full(6, 2.0)).logpdf(weights / weights.sum()) + precisions.sum()
    assert prior.log_prior().item() == pytest.approx(expected, rel=1e-10)


def test_the_initial_mixture_sits_inside_the_ball_with_equal_weights():
    prior = GaussianMixturePrior(500, 2, radius=3.0, log_precision_mean=1.0)
    assert prior.means.norm(dim=1).max() <= 3
    torch.testing.assert_close(prior.log_weights.exp(), torch.full((500,), 1 / 500))
    assert (prior.log_vars == -1).all()


def test_components_of_classes_start_apart():
    """Ten points fit into a disc of radius 10 at distances of up to 6.2; uniform ones come as close as 1."""
    closest = [torch.pdist(GaussianMixturePrior(10, 2, classes=10).means.detach()).min() for _ in range(20)]
    assert min(closest) > 3


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_soft_ball_integrates_to_one_but_for_its_tail(dim):
    """∫ r over R^D exceeds the hard ball's volume by the tail, which a hardness of 50 makes small."""
    surface = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)

    def density(r):
        x = torch.tensor([r] + [0.0] * (dim - 1), dtype=torch.float64)
        return surface * r ** (dim - 1) * soft_ball_log_prob(x, radius=2.0, hardness=50.0).exp().item()

    assert integrate.quad(density, 0, 4, points=[2.0])[0] == pytest.approx(1, abs=5e-3)


def test_soft_ball_is_finite_and_pulls_inward_however_far_the_point():
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0], [1e3, 0.0], [1e15, 0.0]], requires_grad=True)
    log_prob = soft_ball_log_prob(x, radius=10.0, hardness=5.0)
    (grad,) = torch.autograd.grad(log_prob.sum(), x)
    assert log_prob.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(grad[2:, 0], torch.full((2,), -0.5))  # −a/b
    assert grad[0, 0] == 0
    torch.testing.assert_close(log_prob[2], torch.tensor(-5.0 * (100 - 1) - math.log(math.pi * 100)))


def test_uniform_ball_is_uniform():
    """The share of points within a radius r is (r/b)^D."""
    radius = uniform_ball(4000, 3, 10.0, torch.Generator().manual_seed(0)).norm(dim=1)
    assert stats.kstest((radius / 10) ** 3, "uniform").pvalue > 0.01


@pytest.mark.parametrize("concentration", [0.5, 1.0, 3.0])
def test_dirichlet_matches_scipy(concentration):
    weights = np.random.default_rng(0).dirichlet(np.ones(5))
    found = dirichlet_log_prob(torch.from_numpy(weights).log(), concentration).item()
    assert found == pytest.approx(stats.dirichlet(np.full(5, concentration)).logpdf(weights), rel=1e-10)


def test_uniform_dirichlet_accepts_an_empty_component():
    assert dirichlet_log_prob(torch.tensor([0.0, -torch.inf]), 1.0).item() == 0


def test_normal_matches_scipy():
    x = np.linspace(-3, 3, 7)
    np.testing.assert_allclose(normal_log_prob(torch.from_numpy(x), 1.0, 0.3), stats.norm(1, 0.3).logpdf(x))


def test_standard_normal_matches_scipy_and_has_nothing_to_learn(z):
    prior = StandardNormal(3)
    np.testing.assert_allclose(prior(z), stats.multivariate_normal(np.zeros(3)).logpdf(z))
    assert not list(prior.parameters()) and prior.log_prior() == 0
    assert stats.kstest(prior.sample(2000, torch.Generator().manual_seed(0)).flatten(), "norm").pvalue > 0.01


def test_samples_follow_the_components_they_are_asked_from(prior):
    generator = torch.Generator().manual_seed(0)
    few = prior.sample(3000, generator, components=torch.full((3000,), 4))
    np.testing.assert_allclose(few.mean(0), prior.means[4].detach(), atol=0.3)
    np.testing.assert_allclose(few.var(0), prior.log_vars[4].detach().exp(), rtol=0.15)
    chosen = prior.sample_components(500, generator, labels=torch.tensor([2, -1]).repeat(250))
    assert set(chosen[::2].tolist()) == {4, 5} and set(chosen[1::2].tolist()) == set(range(6))
    share = (prior.sample_components(5000, generator) == 0).double().mean()
    assert share == pytest.approx(prior.log_weights[0].exp().item(), abs=0.03)


def test_a_vamp_prior_is_normalised_and_draws_its_components_at_random():
    """Four pseudo-inputs of one pixel, whose posteriors are N(10 u, 0.1²)."""
    prior = VampPrior(lambda x: Posterior(10 * x, torch.full_like(x, math.log(0.01))), 4, (1,)).double()
    with torch.no_grad():
        prior.inputs.copy_(torch.tensor([[0.0], [0.25], [0.5], [1.0]]))
    grid = torch.linspace(-2, 12, 20_001, dtype=torch.float64)
    assert np.trapezoid(prior(grid[:, None]).detach().exp(), grid) == pytest.approx(1)
    first, second = (prior.sample(1000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1000, 1) and not first.requires_grad
    components = np.abs(first.numpy() - prior.inputs.detach().numpy().T * 10).argmin(1)
    assert np.bincount(components[:50], minlength=4).min() > 4
    assert stats.chisquare(np.bincount(components, minlength=4)).pvalue > 0.01
    assert (first[:, 0] - 10 * prior.inputs.detach()[components, 0]).std().item() == pytest.approx(0.1, rel=0.1)


def test_sampling_is_reproducible(prior):
    first, second = (prior.sample(10, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"components": 0, "dim": 2}, "at least one component"),
    ({"components": 10, "dim": 2, "classes": 3}, "10 components for 3 classes"),
    ({"components": 2, "dim": 2, "covariance": "full"}, "diagonal, isotropic, given 'full'"),
    ({"components": 2, "dim": 2, "radius": 0.0}, "radius must be positive, given 0.0"),
])
def test_a_mixture_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GaussianMixturePrior(**arguments)


def test_labels_and_components_out_of_range_are_refused(prior, z):
    with pytest.raises(ValueError, match=r"labels must lie in \[-1, 3\)"):
        prior(z, torch.full((50,), 3))
    with pytest.raises(ValueError, match=r"components must be 2 integers in \[0, 6\)"):
        prior.sample(2, components=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="not both"):
        prior.sample(1, components=torch.tensor([0]), labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="have no classes"):
        GaussianMixturePrior(2, 3)(z, torch.zeros(50, dtype=torch.long))
