"""VAEs under other priors and with flows after their posteriors: their densities against NumPy."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from vaes import NORMAL, SHAPE, log_bernoulli, loss, seen, tiny

from latent_engine import VAE, Batch, Data, VAEConfig
from latent_engine.balance import balance
from latent_engine.bounds import Posterior, reparametrize
from latent_engine.diagnostics import encode
from latent_engine.priors import HierarchicalPrior


def test_a_mixture_prior_has_a_monte_carlo_kl():
    system, batch = tiny(prior="mixture", components=3, samples=2)
    with torch.no_grad():
        system.prior.log_vars.normal_()
        system.prior.logits.normal_()
    mean, std, z, logits = seen(system, batch.x)
    means, variances = system.prior.means.detach().numpy(), system.prior.log_vars.detach().exp().numpy()
    weights = system.prior.logits.softmax(0).detach().numpy()
    density = sum(w * stats.multivariate_normal(m, np.diag(v)).pdf(z)
                  for w, m, v in zip(weights, means, variances, strict=True))
    entropy = NORMAL(mean, std).entropy().sum(1)
    expected = -log_bernoulli(logits, batch.x.numpy()).mean() - entropy.mean() - np.log(density).mean()
    assert loss(system, batch)["total"] == pytest.approx(expected, rel=1e-10)


def test_a_vamp_prior_is_the_mixture_of_the_posteriors_of_its_pseudo_inputs():
    system, batch = tiny(prior="vamp", components=3, samples=2)
    with torch.no_grad():
        system.prior.inputs.copy_(2 * torch.rand(3, *SHAPE) - 0.5)
    mean, std, z, logits = seen(system, batch.x)
    means, stds, *_ = seen(system, system.prior.inputs.clamp(0, 1))
    density = sum(NORMAL(m, s).pdf(z).prod(2) for m, s in zip(means, stds, strict=True)) / 3
    kl = -NORMAL(mean, std).entropy().sum(1).mean() - np.log(density).mean()
    assert loss(system, batch)["kl"] == pytest.approx(kl, rel=1e-10)
    assert loss(system, batch)["total"] == pytest.approx(kl - log_bernoulli(logits, batch.x.numpy()).mean(), rel=1e-10)


@pytest.mark.parametrize("settings", [{}, {"likelihood": "gaussian", "mean_activation": "sigmoid"}, {"likelihood": "gaussian"}],
                         ids=["bernoulli", "sigmoid", "unbounded"])
def test_pseudo_inputs_stay_in_the_range_of_the_data_and_are_parameters_of_the_prior_alone(settings):
    system, batch = tiny(prior="vamp", components=3, **settings)
    assert [name for name, _ in system.prior.named_parameters()] == ["inputs"]
    with torch.no_grad():
        system.prior.inputs.fill_(1.5)
    system.loss(batch)["total"].backward()
    assert bool(system.prior.inputs.grad.any()) == (settings == {"likelihood": "gaussian"})


def test_pseudo_inputs_may_start_from_training_rows():
    x = torch.rand(20, *SHAPE).round()
    x[:, 0, 0, 0] = torch.arange(20) / 20  # by which a row is known
    torch.manual_seed(0)
    config = VAEConfig(latent_dim=4, hidden=(7,), prior="vamp", components=12, pseudo_inputs="data")
    inputs = VAE.for_data(config, Data(x)).prior.inputs.detach()
    rows = torch.cdist(inputs.flatten(1), x.flatten(1)).argmin(1)
    assert len(rows.unique()) == 12 and 0 <= inputs.min() < inputs.max() <= 1
    torch.testing.assert_close(inputs, x[rows], atol=0.06, rtol=0)
    with pytest.raises(ValueError, match="as many different rows as components, given 20 rows for 21"):
        VAE.for_data(dataclasses.replace(config, components=21), Data(x))


def test_a_copy_of_a_vae_has_a_vamp_prior_of_its_own_posteriors():
    system, batch = tiny(prior="vamp", components=3)
    twin, before = copy.deepcopy(system), loss(system, batch)
    with torch.no_grad():
        for p in system.encoder.parameters():
            p.mul_(3)
    assert loss(twin, batch) == before != loss(system, batch)


def flowing(flow, prior="normal", **settings):
    """A `tiny` VAE whose posterior's flow is far from the identity, at two dimensions."""
    sizes = {"latent_dim": 2, "flow_blocks": 2, "flow_hidden": (8,), "components": 3}
    system, batch = tiny(posterior_flow=flow, prior=prior, **sizes, **settings)
    with torch.no_grad():
        for p in system.flow.parameters():
            p.normal_(std=0.15)
    return system, batch


@pytest.mark.parametrize("prior", ["normal", "mixture", "maf"])
@pytest.mark.parametrize("flow", ["iaf", "realnvp"])
def test_the_kl_of_a_posterior_with_a_flow_is_that_of_its_density(flow, prior):
    """q(z | x) by the flow's inverse on a grid, against the mean of 20,000 draws."""
    system, batch = flowing(flow, prior, samples=20_000)
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    z, area = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]).item() ** 2
    with torch.no_grad():
        posterior = Posterior(*(t[:1] for t in system.encode(batch.x)))
        base, log_det = system.flow.inverse(z, torch.cat(posterior, 1))
    mean, std = posterior.mean.numpy(), (0.5 * posterior.log_var).exp().numpy()
    log_q = NORMAL(mean, std).logpdf(base).sum(1) + log_det.numpy()
    assert np.exp(log_q).sum() * area == pytest.approx(1, abs=1e-4)
    expected = (np.exp(log_q) * (log_q - system.prior(z).detach().numpy())).sum() * area
    found = loss(system, Batch(batch.x[:1], batch.index[:1]))
    assert found["kl"] == pytest.approx(expected, abs=0.05)


def test_a_posterior_with_a_flow_represents_rows_where_it_maps_their_means_to():
    system, batch = flowing("iaf")
    posterior = system.encode(batch.x)
    expected = system.flow(posterior.mean, torch.cat(posterior, 1))[0]
    assert torch.equal(system.represent(batch.x), expected) and (expected - posterior.mean).abs().min() > 1e-4
    torch.testing.assert_close(system.reconstruct(batch.x), system.decode(expected))


def test_a_posterior_with_a_flow_has_no_diagnostics_of_gaussians():
    system, batch = flowing("iaf")
    assert system.monitor(batch.x) == {}
    for function in (balance, encode):
        with pytest.raises(ValueError, match=f"{function.__name__}: needs a Gaussian posterior, .* flow"):
            function(system, batch.x)


def test_a_hierarchical_prior_weighs_both_layers():
    """log p(u) + log p(z | u) − log q(u | z), by SciPy; the mean of its exponential is the marginal p(z)."""
    torch.manual_seed(0)
    prior = HierarchicalPrior(2, 1, (5,)).double()
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    with torch.no_grad():
        log_pz = prior(z, generator=torch.Generator().manual_seed(1))
        q_mean, q_log_var = prior.encoder(z.reshape(12, 2)).chunk(2, 1)
        u = reparametrize(Posterior(q_mean, q_log_var), 1, torch.Generator().manual_seed(1))[0]
        p_mean, p_log_var = prior.decoder(u).chunk(2, 1)
        expected = (NORMAL.logpdf(u).sum(1) + NORMAL(p_mean, (0.5 * p_log_var).exp()).logpdf(z.reshape(12, 2)).sum(1)
                    - NORMAL(q_mean, (0.5 * q_log_var).exp()).logpdf(u).sum(1))
        np.testing.assert_allclose(log_pz.reshape(12), expected)

        grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
        p_mean, p_log_var = prior.decoder(grid).chunk(2, 1)
        density = NORMAL(p_mean, (0.5 * p_log_var).exp()).pdf(z[0, 0]).prod(1) * NORMAL.pdf(grid[:, 0])
        draws = prior(z[0, 0].expand(100_000, 2), generator=torch.Generator().manual_seed(2)).exp()
    assert draws.mean().item() == pytest.approx(np.trapezoid(density, grid[:, 0]), rel=0.01)


@pytest.mark.parametrize("prior", ["normal", "mixture", "hierarchical", "vamp", "maf", "iaf", "realnvp"])
def test_log_weights_average_to_the_elbo_and_chunks_are_one_stream(prior):
    system, batch = tiny(prior=prior, components=3, top_dim=2, top_hidden=(5,))
    posterior = system.encode(batch.x)
    log_w = system.log_weights(posterior, batch.x, 4000, torch.Generator().manual_seed(0))
    assert log_w.shape == (4000, 6)
    terms = [loss(system, batch, seed) for seed in range(300)]
    elbo = np.mean([term["log_px_z"] - term["kl"] for term in terms])
    assert log_w.mean().item() == pytest.approx(elbo, abs=0.1)
    generator = torch.Generator().manual_seed(0)
    chunks = [system.log_weights(posterior, batch.x, 3, generator) for _ in range(2)]
    assert not torch.equal(*chunks)


def test_log_weights_are_the_ratio_of_the_densities():
    system, batch = tiny()
    mean, std, z, logits = seen(system, batch.x, samples=5)
    torch.manual_seed(0)
    found = system.log_weights(system.encode(batch.x), batch.x, 5)
    expected = log_bernoulli(logits, batch.x.numpy()) + NORMAL.logpdf(z).sum(2) - NORMAL(mean, std).logpdf(z).sum(2)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10)
