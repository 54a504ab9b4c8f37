"""Mixtures fitted by EM: scikit-learn's iterations from the same start, whatever the batches; densities of SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import mixture as sklearn_mixture
from torch.utils.data import DataLoader

from latent_engine import GaussianMixture, fit_mixture

KINDS = ("diagonal", "full", "tied", "spherical")
K, D = 4, 3


def points(n=900, dtype=torch.float64, seed=0):
    """From four correlated Gaussians that overlap, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(K, D, generator=g, dtype=torch.float64)
    noise = torch.randn(n, D, generator=g, dtype=torch.float64) @ torch.randn(D, D, generator=g, dtype=torch.float64)
    return (means[torch.randint(K, (n,), generator=g)] + noise + 10).to(dtype)


def begin(kind, dtype=torch.float64):
    """A mixture to start from: unequal weights, means at points, covariances that are not round."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(K, D, D, generator=g, dtype=torch.float64)
    full = a @ a.mT + torch.eye(D, dtype=torch.float64)
    covariances = {"diagonal": full.diagonal(dim1=1, dim2=2), "full": full, "tied": full[0], "spherical": full[:, 0, 0]}[kind]
    weights = torch.arange(1, K + 1, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), points()[:K], covariances, kind).to(dtype)


def sklearn_fit(x, start, max_iter, tol=1e-6):
    covariances = start.covariances.double().numpy()
    precisions = np.linalg.inv(covariances) if start.covariance in ("full", "tied") else 1 / covariances
    theirs = sklearn_mixture.GaussianMixture(
        K, covariance_type={"diagonal": "diag"}.get(start.covariance, start.covariance), max_iter=max_iter, tol=tol,
        weights_init=start.log_weights.double().exp().numpy(), means_init=start.means.double().numpy(),
        precisions_init=precisions, init_params="random_from_data")
    return theirs.fit(x.double().numpy())


def assert_same(fit, theirs, rtol):
    assert (fit.iterations, fit.converged) == (theirs.n_iter_, theirs.converged_)
    assert fit.log_likelihood == pytest.approx(theirs.lower_bound_, rel=rtol)
    for name, a, e in (("weights", fit.mixture.log_weights.exp(), theirs.weights_), ("means", fit.mixture.means, theirs.means_),
                       ("covariances", fit.mixture.covariances, theirs.covariances_)):
        np.testing.assert_allclose(a.double().numpy(), e, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_iteration_is_that_of_scikit_learn(kind):
    x, start = points(), begin(kind)
    for max_iter in (1, 2, 5, 1000):
        assert_same(fit_mixture(x, K, kind, start=start, max_iter=max_iter, tol=1e-6), sklearn_fit(x, start, max_iter), 1e-8)
    last = fit_mixture(x, K, kind, start=start, max_iter=1000, tol=1e-6)
    assert last.converged and last.iterations > 10
    for i in (1, 2, 5):
        assert last.history[i - 1] == pytest.approx(sklearn_fit(x, start, i).lower_bound_, rel=1e-12)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_keeps_its_digits_far_from_the_origin(kind):
    """Uncentred squares of 10⁸ would be off by 6 in single precision, more than the variances."""
    x = (points() + 1e4).float()
    start = begin(kind)
    start.means += 1e4
    fit = fit_mixture(x, K, kind, start=start, max_iter=5, tol=0)
    start.means -= 1e4  # the fit has left it alone
    theirs = sklearn_fit(x.double() - 1e4, start, 5, 0.0)
    np.testing.assert_allclose(fit.mixture.covariances.double().numpy(), theirs.covariances_, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(fit.mixture.means.double().numpy() - 1e4, theirs.means_, atol=2e-3)
    assert fit.mixture.means.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_batches_make_no_difference(kind):
    x, options = points(), {"start": begin(kind), "max_iter": 4}
    whole = fit_mixture(x, K, kind, **options)
    loader = DataLoader(x, batch_size=77, collate_fn=torch.stack)
    for other in (fit_mixture(x, K, kind, batch_size=128, **options), fit_mixture(list(x.split(451)), K, kind, **options),
                  fit_mixture(loader, K, kind, **options)):
        assert other.history == pytest.approx(whole.history, rel=1e-12)
        for name, tensor in whole.mixture.state_dict().items():
            torch.testing.assert_close(other.mixture.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_and_samples_are_those_of_scipy(kind):
    mixture = begin(kind)
    covariances = {"diagonal": mixture.covariances.diag_embed() if kind == "diagonal" else None, "full": mixture.covariances,
                   "tied": mixture.covariances.expand(K, -1, -1) if kind == "tied" else None,
                   "spherical": mixture.covariances[:, None, None] * torch.eye(D) if kind == "spherical" else None}[kind]
    normals = [stats.multivariate_normal(m, c) for m, c in zip(mixture.means, covariances, strict=True)]
    z = points(60)
    terms = torch.tensor(np.array([n.logpdf(z) for n in normals])).T + mixture.log_weights
    torch.testing.assert_close(mixture(z.view(3, 20, D)), terms.logsumexp(1).view(3, 20), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.float()(z.float()), terms.logsumexp(1).float(), rtol=1e-4, atol=1e-4)
    drawn = mixture.double().sample(20_000, torch.Generator().manual_seed(3))
    weights, mean = mixture.log_weights.exp(), mixture.log_weights.exp() @ mixture.means
    offset = mixture.means - mean
    covariance = (weights[:, None, None] * (covariances + offset[:, :, None] * offset[:, None, :])).sum(0)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.06, atol=0.15)
    assert -mixture(drawn).mean() == pytest.approx(-mixture(mixture.sample(20_000)).mean().item(), abs=0.05)
    assert torch.equal(drawn, mixture.sample(20_000, torch.Generator().manual_seed(3)))
    assert mixture.log_prior() == 0 and not list(mixture.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_log_density_has_a_gradient(kind):
    mixture, z = begin(kind), points(5).requires_grad_()
    assert torch.autograd.gradcheck(mixture, z)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_rises_to_that_of_the_truth(kind):
    g = torch.Generator().manual_seed(0)
    covariances = {"diagonal": torch.tensor([[1.0, 0.1], [0.2, 1.0], [0.5, 0.5]]), "spherical": torch.tensor([1.0, 0.1, 0.5]),
                   "tied": torch.tensor([[1.0, 0.7], [0.7, 0.8]]), "full": torch.tensor([[[1.0, 0.7], [0.7, 0.8]]] * 3)}[kind]
    means = torch.tensor([[0.0, 0.0], [4.0, 1.0], [-3.0, 5.0]])
    truth = GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, covariances, kind)
    x = truth.sample(4000, g)
    fit = fit_mixture(x, 3, kind, starts=3, reg_covar=0.0, generator=g)
    assert fit.converged and fit.log_likelihood > truth(x).mean().item() - 1e-3
    assert all(after > before - 1e-5 for before, after in zip(fit.history, fit.history[1:], strict=False))
    nearest = torch.cdist(truth.means, fit.mixture.means).argmin(1)
    torch.testing.assert_close(fit.mixture.means[nearest], truth.means, rtol=0, atol=0.15)
    torch.testing.assert_close(fit.mixture.log_weights[nearest].exp(), truth.log_weights.exp(), rtol=0, atol=0.03)


def test_several_starts_keep_the_best():
    x = points(400)
    runs = [fit_mixture(x, 6, generator=torch.Generator().manual_seed(s), max_iter=4) for s in range(3)]
    g = torch.Generator().manual_seed(0)
    assert fit_mixture(x, 6, starts=8, max_iter=4, generator=g).log_likelihood > min(r.log_likelihood for r in runs)
    first, again = (fit_mixture(x, 6, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.history == again.history and torch.equal(first.mixture.means, again.mixture.means)


def test_means_are_a_start():
    means = torch.tensor([[-5.0, 0.0], [5.0, 0.0]])
    x = torch.cat([means[0] + 0.1 * torch.randn(30, 2), means[1] + 0.1 * torch.randn(10, 2)])
    fit = fit_mixture(x, 2, start=means.double() + 1)
    torch.testing.assert_close(fit.mixture.means, means, rtol=0, atol=0.1)
    torch.testing.assert_close(fit.mixture.log_weights.exp(), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_the_moments(kind):
    x = points(50)
    fit = fit_mixture(x, 1, kind, reg_covar=0.0)
    cov = x.T.cov(correction=0)
    expected = {"full": cov[None], "tied": cov, "diagonal": cov.diag()[None], "spherical": cov.diag().mean()[None]}[kind]
    assert fit.converged and fit.iterations == 2
    torch.testing.assert_close(fit.mixture.means, x.mean(0, keepdim=True))
    torch.testing.assert_close(fit.mixture.covariances, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_without_points_keeps_its_place(kind):
    start = begin(kind)
    start.means[2] = 1e6
    fit = fit_mixture(points(), K, kind, start=start, max_iter=3)
    assert fit.mixture.log_weights[2] == -math.inf and fit.mixture.log_weights.exp().sum() == pytest.approx(1)
    assert torch.equal(fit.mixture.means[2], start.means[2])
    assert bool(fit.mixture(points()).isfinite().all())
    assert not bool((fit.mixture.sample(500) > 1e5).any())


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_components_as_points(kind):
    x = points(3)
    fit = fit_mixture(x, 3, kind, reg_covar=1e-2)
    assert bool(fit.mixture(x).isfinite().all())
    torch.testing.assert_close(fit.mixture.means.sort(0).values, x.sort(0).values)


def test_half_precision_points_are_fitted_in_single_precision():
    x = points(200).to(torch.bfloat16)
    fit = fit_mixture(x, 2, start=x[:2].float())
    assert fit.mixture.means.dtype == torch.float32
    assert fit.history == fit_mixture(x.float(), 2, start=x[:2].float()).history


def test_end_of_the_iterations_is_reported():
    fit = fit_mixture(points(), K, max_iter=3, tol=0.0)
    assert not fit.converged and fit.iterations == len(fit.history) == 3 and fit.log_likelihood == fit.history[-1]
    assert fit_mixture(points(), K, tol=0.5).converged


@pytest.mark.parametrize(("x", "components", "options", "words"), [
    (points(3), 4, {}, "4 components need at least as many points, given 3"),
    (points(), 0, {}, "components must be at least 1, given 0"),
    (points(), 2, {"covariance": "diag"}, "diagonal, full, tied, spherical, given 'diag'"),
    (points(), 2, {"starts": 0}, "starts must be at least 1"),
    (points(), 2, {"starts": 2, "start": points(2)}, "2 starts from the same place"),
    (points(), 2, {"tol": -1.0}, "tol must be at least 0"),
    (points(), 2, {"start": points(3)}, "2 diagonal components cannot start from 3 means"),
    (points(), 4, {"start": begin("full")}, "4 diagonal components cannot start from 4 full components"),
    (points()[:, :2], 4, {"start": begin("diagonal")}, "start has 3 dimensions, the points 2"),
    (points(), 2, {"start": points(2)[:, :2]}, r"means \[K, D\] of D = 3, given \[2, 2\]"),
    (points()[:0], 1, {}, "no points"),
    ([], 1, {}, "no points"),
    (points()[:, :0], 1, {}, "points of no dimensions"),
    ([points(), points()[:, :2]], 2, {}, "batches must agree in D, given 3 and 2"),
    ([points(), points() * math.nan], 2, {}, "points must be finite"),
    ([points()], 2, {"batch_size": 5}, "batch_size cuts a tensor"),
    (points(5).expand(2, 5, D).reshape(10, D), 5, {"reg_covar": 0.0}, "not positive definite. Raise reg_covar, which is 0.0"),
    (points(9)[:, [0, 0]], 2, {"covariance": "full", "reg_covar": 0.0}, "component 0 is not positive definite"),
    (points(9)[:, [0, 0]], 2, {"covariance": "tied", "reg_covar": 0.0}, "leave out dimensions that depend on others"),
    (1e25 * points(dtype=torch.float32), 4, {"start": begin("diagonal")}, "log-likelihood is -inf in iteration 1"),
])
def test_mistakes_have_one_clear_error(x, components, options, words):
    with pytest.raises(ValueError, match=words):
        fit_mixture(x, components, **options)


@pytest.mark.parametrize(("x", "words"), [
    ((batch for batch in [points()]), "gone through more than once .* given a generator"), (3, "given a int"),
    ([(points(), 0)], r"floating-point tensors \[N, D\], given a tuple"), (points()[0], r"given torch.float64 \[3\]"),
    (points().long(), "given torch.int64"), (torch.tensor(1.0), r"given torch.float32 \[\]")])
def test_what_is_no_points(x, words):
    with pytest.raises(TypeError, match=words):
        fit_mixture(x, 1)


@pytest.mark.parametrize(("arguments", "words"), [
    ((torch.ones(2), torch.zeros(2, 3), torch.ones(2)), r"given \[2\], \[2, 3\] and \[2\]"),
    ((torch.ones(2), torch.zeros(2, 3), torch.tensor([[1.0] * 3, [1, 0, 1]])), "component 1 is not positive definite"),
    ((torch.ones(2), torch.zeros(2, 3), -torch.eye(3), "tied"), "the covariance is not positive definite"),
    ((torch.ones(2), torch.zeros(2, 3), torch.ones(2), "round"), "given 'round'")])
def test_a_mixture_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GaussianMixture(*arguments)
