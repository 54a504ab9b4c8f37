"""Two-level VAEs: losses and weights of both layers against SciPy, and settings that cannot work."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from latent_engine import HVAE, Batch, Data, HVAEConfig, TrainConfig, fit, load_data, log_likelihood
from latent_engine.bounds import Posterior, kl_between, reparametrize
from latent_engine.mixtures import GaussianMixture

SHAPE = (1, 3, 5)
NORMAL = stats.norm


def tiny(scale=2.0, **settings):
    """A system on four small random binary images, in float64; `scale` multiplies its weights."""
    torch.manual_seed(0)
    settings = {"latent_dim": 3, "lower_dim": 2, "hidden": (7,), "components": 3, "top_dim": 2, "top_hidden": (5,),
                "flow_blocks": 2, "flow_hidden": (5,)} | settings
    system = HVAE(HVAEConfig(**settings), SHAPE).double()
    with torch.no_grad():
        for p in system.parameters():
            p.mul_(scale)
    return system, Batch(torch.rand(4, *SHAPE, dtype=torch.float64).round(), torch.arange(4))


def normal(parameters):
    mean, log_var = (t.detach().numpy() for t in parameters.chunk(2, -1))
    return NORMAL(mean, np.exp(0.5 * log_var))


def drawn(system, x, samples, seed=0):
    """z₂, z₁ and the distributions q(z₂ | x), q(z₁ | x, z₂) and p(z₁ | z₂) that the loss has from `seed`; log p(x | z₁, z₂)."""
    with torch.no_grad():
        torch.manual_seed(seed)
        posterior = system.encode(x)
        upper = reparametrize(posterior, samples)
        given_x, given_upper = (torch.stack([f(z) for z in upper]) for f in (lambda z: system.lower_encoder(x, z),
                                                                             system.lower_prior))
        lower = reparametrize(Posterior(*given_x.chunk(2, -1)), 1)[0]
        p = torch.stack([system.decoder(torch.cat(z, 1)) for z in zip(upper, lower, strict=True)]).sigmoid().numpy()
    log_px = stats.bernoulli(p).logpmf(x.numpy()).sum((2, 3, 4))
    return upper, lower, normal(torch.cat(posterior, 1)), normal(given_x), normal(given_upper), log_px


@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "maf"])
def test_the_loss_is_the_negative_elbo_of_both_layers(prior):
    system, batch = tiny(prior=prior, samples=3)
    upper, _, q2, q1, p1, log_px = drawn(system, batch.x, 3)
    kl_lower = (np.log(p1.std() / q1.std()) + (q1.var() + (q1.mean() - p1.mean())**2) / (2 * p1.var()) - 0.5).sum(2).mean()
    if prior == "normal":
        kl_upper = (-np.log(q2.std()) + (q2.var() + q2.mean()**2) / 2 - 0.5).sum(1).mean()
    else:
        kl_upper = -q2.entropy().sum(1).mean() - system.prior(upper).mean().item()
    torch.manual_seed(0)
    terms = {name: value.item() for name, value in system.loss(batch).items()}
    assert terms["kl_lower"] == pytest.approx(kl_lower, rel=1e-9)
    assert terms["kl"] == pytest.approx(kl_lower + kl_upper, rel=1e-9)
    assert terms["log_px_z"] == pytest.approx(log_px.mean(), rel=1e-9)
    assert terms["total"] == pytest.approx(kl_lower + kl_upper - log_px.mean(), rel=1e-9)


@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_log_weights_are_the_ratio_of_the_densities_of_both_layers(prior):
    system, batch = tiny(prior=prior)
    upper, lower, q2, q1, p1, log_px = drawn(system, batch.x, 5)
    log_p2 = NORMAL.logpdf(upper).sum(2) if prior == "normal" else system.prior(upper).detach().numpy()
    expected = (log_px + log_p2 + p1.logpdf(lower).sum(2) - q1.logpdf(lower).sum(2) - q2.logpdf(upper).sum(2))
    torch.manual_seed(0)
    found = system.log_weights(system.encode(batch.x), batch.x, 5)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9)


@pytest.mark.parametrize("prior", ["normal", "vamp", "hierarchical"])
def test_log_weights_give_the_marginal_likelihood_of_a_decoder_that_ignores_both_layers(prior):
    system, batch = tiny(prior=prior, scale=1.0)
    with torch.no_grad():
        system.decoder[-2].weight.zero_()
        logits = system.decoder(torch.zeros(1, 5, dtype=torch.float64))
        exact = stats.bernoulli(logits.sigmoid().numpy()).logpmf(batch.x).sum((1, 2, 3))
        posterior = Posterior(torch.zeros(4, 3, dtype=torch.float64), torch.full((4, 3), 0.8, dtype=torch.float64))
        weights = system.log_weights(posterior, batch.x, 20_000, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(logsumexp(weights, axis=0) - math.log(20_000), exact, atol=0.06)


def test_the_kl_divergence_of_two_gaussians_is_that_of_pytorch():
    q, p = (Posterior(*torch.randn(2, 5, 3, dtype=torch.float64)) for _ in range(2))
    oracle = [torch.distributions.Normal(mean, (0.5 * log_var).exp()) for mean, log_var in (q, p)]
    torch.testing.assert_close(kl_between(q, p), torch.distributions.kl_divergence(*oracle))


def test_reconstructions_see_the_image_in_both_layers_and_decoding_in_the_upper_one_alone():
    system, batch = tiny()
    upper, first = system.represent(batch.x), batch.x[:1].expand(4, *SHAPE)
    lower = system.lower_encoder(batch.x, upper).chunk(2, 1)[0]
    expected = system.decoder(torch.cat([upper, lower], 1)).sigmoid()
    torch.testing.assert_close(system.reconstruct(batch.x), expected.detach())
    mean = system.lower_prior(upper).chunk(2, 1)[0]
    torch.testing.assert_close(system.decode(upper), system.decoder(torch.cat([upper, mean], 1)).sigmoid())
    assert not torch.equal(system.reconstruct(first)[1:], system.reconstruct(batch.x)[1:])


def test_samples_descend_from_the_prior_through_both_layers():
    system, _ = tiny(prior="mixture")
    z = system._sample_latent(20_000, torch.Generator().manual_seed(0)).detach()
    upper = system.prior.sample(20_000, torch.Generator().manual_seed(1))
    given = normal(system.lower_prior(upper))
    np.testing.assert_allclose(z[:, :3].mean(0), upper.mean(0), atol=0.05)
    np.testing.assert_allclose(z[:, 3:].mean(0), given.mean().mean(0), atol=0.05)
    np.testing.assert_allclose(z[:, 3:].var(0), given.mean().var(0) + given.var().mean(0), rtol=0.05)


def test_a_prior_that_is_given_takes_the_place_of_that_of_the_upper_layer():
    system, _ = tiny()
    other = GaussianMixture(torch.ones(1), torch.full((1, 3), 5.0), torch.full((1, 3), 1e-4)).double()
    given = system.sample(4, torch.Generator().manual_seed(0), prior=other)
    assert not torch.allclose(given, system.sample(4, torch.Generator().manual_seed(0)))
    system.prior = other
    torch.testing.assert_close(given, system.sample(4, torch.Generator().manual_seed(0)))


def test_a_trained_model_has_a_likelihood_by_importance_sampling():
    digits = load_data("digits").pixels(binarize=True)
    data = dataclasses.replace(digits, x=digits.x[:300], y=None)
    torch.manual_seed(0)
    config = HVAEConfig(latent_dim=4, lower_dim=4, hidden=(30,), prior="vamp", components=20, pseudo_inputs="data")
    system = HVAE.for_data(config, data)
    before = log_likelihood(system, data.x[:50], 100, generator=torch.Generator().manual_seed(0))
    fit(system, Data(data.x), TrainConfig(epochs=30, batch_size=20), progress=False)
    after = log_likelihood(system, data.x[:50], 100, generator=torch.Generator().manual_seed(0))
    assert after.mean > before.mean + 2 and (after.log_px > after.elbo).all()


@pytest.mark.parametrize(("settings", "words"), [
    ({"lower_dim": 0}, "lower_dim must be at least 1, given 0"),
    ({"hidden": ()}, r"hidden needs a layer, in which x and z₂ meet; given \(\)"),
    ({"posterior_flow": "iaf"}, "posterior_flow must be one of none, given 'iaf'"),
    ({"free_bits": 1.0, "free_bits_per": "dimension"}, "free_bits_per must be one of batch, given 'dimension'"),
])
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
