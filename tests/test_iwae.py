"""Importance-weighted autoencoders: losses against NumPy, gradients against their formulas, bounds in their order."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from latent_engine import IWAE, VAE, Batch, IWAEConfig, VAEConfig
from latent_engine.bounds import Posterior, reparametrize

SHAPE = (1, 3, 5)
S = 6


def tiny(kind=IWAE, config=IWAEConfig, scale=1.0, **settings):
    """A system on five small random binary images, in float64; `scale` multiplies its weights."""
    torch.manual_seed(0)
    settings = {"latent_dim": 4, "hidden": (7,), "top_dim": 3, "top_hidden": (5,), "components": 3, "samples": S} | settings
    system = kind(config(**settings), SHAPE).double()
    with torch.no_grad():
        for p in [*system.encoder.parameters(), *system.decoder.parameters()]:
            p.mul_(scale)
        for flow in (getattr(system.prior, "flow", None), system.flow):
            for block in [] if flow is None else flow.blocks:  # which start as the identity
                block.head.weight.normal_(std=0.02)
    x = torch.rand(5, *SHAPE, dtype=torch.float64).round()
    return system, Batch(x, torch.arange(5))


def total(system, batch, seed=0):
    torch.manual_seed(seed)
    return system.loss(batch, "main")["total"]


def log_w(system, x, seed=0):
    """Log-weights `[S, N]` of the samples that the loss draws from `seed`, by SciPy."""
    with torch.no_grad():
        posterior = system.encode(x)
        torch.manual_seed(seed)
        z = reparametrize(posterior, S)
        log_pz = stats.norm.logpdf(z).sum(2) if system.config.prior == "normal" else system.prior(z).numpy()
        p = torch.stack([system.decoder(part) for part in z]).sigmoid().numpy()
    log_px = stats.bernoulli(p).logpmf(x.numpy()).sum((2, 3, 4))
    return log_px + log_pz - stats.norm(posterior.mean, (0.5 * posterior.log_var).exp()).logpdf(z).sum(2)


def iwae(w):
    return logsumexp(w, axis=0) - math.log(len(w))


BOUNDS = {
    "iwae": ({}, iwae),
    "dreg": ({"estimator": "dreg"}, iwae),
    "miwae": ({"groups": 2}, lambda w: (iwae(w[:3]) + iwae(w[3:])) / 2),
    "ciwae": ({"elbo_weight": 0.3}, lambda w: 0.3 * w.mean(0) + 0.7 * iwae(w)),
    "piwae": ({"estimator": "piwae", "groups": 3}, iwae),
    "vr": ({"alpha": 0.4}, lambda w: iwae(0.6 * w) / 0.6),
    "vr-negative": ({"alpha": -2.0}, lambda w: iwae(3 * w) / 3),
    "elbo": ({"alpha": 1.0}, lambda w: w.mean(0)),
    "vr-max": ({"alpha": -math.inf}, lambda w: w.max(0)),
}


@pytest.mark.parametrize(("bound", "prior"), [
    (bound, prior) for bound, (settings, _) in BOUNDS.items() for prior in ("normal", "mixture", "hierarchical", "vamp")
    if prior != "hierarchical" or "estimator" not in settings])  # the others' estimators are of one layer
def test_the_loss_is_the_negative_bound(bound, prior):
    settings, formula = BOUNDS[bound]
    system, batch = tiny(prior=prior, **settings)
    assert total(system, batch).item() == pytest.approx(-formula(log_w(system, batch.x)).mean(), rel=1e-10)


def surrogates(estimator, log_w, path):
    """What has the estimator's gradient in q and in the decoder and prior; `path` is log w with q's parameters fixed."""
    w = log_w.detach().softmax(0)
    if estimator == "iwae":
        return (w * log_w).sum(0), (w * log_w).sum(0)
    if estimator == "stl":
        return (w * path).sum(0), (w * log_w).sum(0)
    if estimator == "dreg":
        return (w**2 * path).sum(0), (w * log_w).sum(0)
    groups = log_w.detach().unflatten(0, (3, 2)).softmax(1).flatten(0, 1) / 3
    return (groups * log_w).sum(0), (w * log_w).sum(0)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg", "piwae"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "maf", "iaf"])
def test_gradients_are_those_of_the_estimator(estimator, prior):
    system, batch = tiny(estimator=estimator, prior=prior, scale=2.0, groups=3 if estimator == "piwae" else 1)
    twin = copy.deepcopy(system)  # whose encoder is that of a VampPrior alone
    posterior = system.encode(batch.x)
    torch.manual_seed(0)
    z = reparametrize(posterior, S)
    normal, bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli
    logits = system.decoder(z.flatten(0, 1)).unflatten(0, (S, 5))
    log_joint = bernoulli(logits=logits).log_prob(batch.x).sum((2, 3, 4))
    log_joint = log_joint + (normal(0, 1).log_prob(z).sum(2) if prior == "normal" else twin.prior(z))
    free, fixed = (log_joint - normal(mean, (0.5 * log_var).exp()).log_prob(z).sum(2)
                   for mean, log_var in (posterior, Posterior(*(t.detach() for t in posterior))))
    encoder, decoder = list(system.encoder.parameters()), list(system.decoder.parameters())
    for_encoder, for_decoder = surrogates(estimator, free, fixed)
    expected = [*torch.autograd.grad(-for_encoder.mean(), encoder, retain_graph=True),
                *torch.autograd.grad(-for_decoder.mean(), decoder, retain_graph=True)]
    if prior == "vamp":
        of_prior = torch.autograd.grad(-for_decoder.mean(), list(twin.encoder.parameters()))
        expected[:len(encoder)] = [a + b for a, b in zip(expected, of_prior, strict=False)]
    total(system, batch).backward()
    torch.testing.assert_close([p.grad for p in encoder + decoder], expected)


def test_vr_max_has_the_gradient_of_the_best_sample():
    system, batch = tiny(alpha=-math.inf, scale=2.0)
    total(system, batch).backward()
    found = [p.grad.clone() for p in system.parameters()]
    near, _ = tiny(alpha=-1e9, scale=2.0)
    total(near, batch).backward()
    torch.testing.assert_close(found, [p.grad for p in near.parameters()])


@pytest.mark.parametrize("prior", ["normal", "hierarchical"])
def test_more_samples_tighten_the_bound(prior):
    """Each over 10,000 draws; one sample is the ELBO, whose KL the VAE has in closed form."""
    def bound(*kind, samples):
        system, batch = tiny(*kind, prior=prior, samples=samples, scale=1.5)
        return -total(system, Batch(batch.x.repeat(2000, 1, 1, 1), batch.index.repeat(2000))).item()
    elbo, one, five, fifty = bound(VAE, VAEConfig, samples=1), *(bound(samples=n) for n in (1, 5, 50))
    assert one == pytest.approx(elbo, abs=0.1)
    assert one + 0.3 < five < fifty - 0.1


def test_renyi_bounds_fall_with_their_order():
    orders = (-math.inf, -5.0, -1.0, 0.0, 0.5, 0.9, 1.0)
    found = [-total(*tiny(alpha=alpha, scale=3.0)).item() for alpha in orders]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] + 0.5


@pytest.mark.parametrize(("prior", "flow"), [("normal", "none"), ("mixture", "none"), ("hierarchical", "none"),
                                             ("normal", "iaf"), ("mixture", "iaf"), ("hierarchical", "realnvp")])
def test_log_weights_give_the_marginal_likelihood_of_a_decoder_that_ignores_z(prior, flow):
    """p(x | z) = p(x): with q(z | x) near the prior the weights of one layer, and of two, all average to p(x)."""
    system, batch = tiny(prior=prior, posterior_flow=flow)
    with torch.no_grad():
        system.decoder[-2].weight.zero_()
        logits = system.decoder(torch.zeros(1, 4, dtype=torch.float64))
        exact = stats.bernoulli(logits.sigmoid().numpy()).logpmf(batch.x).sum((1, 2, 3))
        if prior == "mixture":
            system.prior.log_vars.fill_(math.log(0.7))
            system.prior.means.mul_(0.5)
        posterior = Posterior(torch.zeros(5, 4, dtype=torch.float64), torch.full((5, 4), 0.8, dtype=torch.float64))
        weights = system.log_weights(posterior, batch.x, 40_000, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(iwae(weights.numpy()), exact, atol=0.06)


def test_samples_of_two_layers_follow_the_chain_of_their_distributions():
    system, _ = tiny(prior="hierarchical")
    z = system.prior.sample(20_000, torch.Generator().manual_seed(0))
    u = torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, log_var = system.prior.decoder(u).detach().chunk(2, 1)
    np.testing.assert_allclose(z.mean(0), mean.mean(0), atol=0.05)
    np.testing.assert_allclose(z.var(0), mean.var(0) + log_var.exp().mean(0), rtol=0.05)


@pytest.mark.parametrize(("settings", "words"), [
    ({"alpha": 1.5}, r"alpha must be at most 1, the order of the ELBO, given 1\.5"),
    ({"alpha": math.nan}, "alpha must be at most 1, .* given nan"),
    ({"samples": 0}, "samples must be at least 1, given 0"),
    ({"groups": 4}, "groups must divide the 6 samples, given 4"),
    ({"groups": 0}, "groups must divide the 6 samples, given 0"),
    ({"elbo_weight": 1.5}, r"elbo_weight must lie in \[0, 1\], given 1\.5"),
    ({"estimator": "reinforce"}, "estimator must be one of iwae, stl, dreg, piwae, given 'reinforce'"),
    ({"alpha": -math.inf, "estimator": "dreg"}, r"VR-max \(alpha=-inf\) goes by one sample"),
    ({"alpha": -math.inf, "groups": 2}, r"VR-max \(alpha=-inf\) goes by one sample"),
    ({"prior": "hierarchical", "estimator": "stl"}, "'stl' is that of one stochastic layer"),
    ({"posterior_flow": "iaf", "estimator": "dreg"}, "'dreg' is that of a Gaussian posterior; with posterior_flow='iaf' use"),
    ({"likelihood": "gaussian", "gamma": "optimal"}, "best variance for an ELBO"),
])
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
