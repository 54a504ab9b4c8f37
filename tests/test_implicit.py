"""VAE with implicit optimal prior: its two losses against NumPy, the ratio it learns, and what its prior is."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

from latent_engine import Batch, Data, ImplicitConfig, ImplicitVAE, TrainConfig, fit
from latent_engine.bounds import Posterior, reparametrize
from latent_engine.systems.implicit import ImplicitPrior

SHAPE = (1, 3, 5)
NORMAL = stats.norm


def tiny(**settings):
    """A system on small random binary images, in float64, whose ratio is far from one."""
    torch.manual_seed(0)
    system = ImplicitVAE(ImplicitConfig(**{"latent_dim": 3, "hidden": (7,), "ratio_hidden": (6,)} | settings), SHAPE).double()
    with torch.no_grad():
        for p in system.ratio.parameters():
            p.normal_()
    return system, Batch(torch.rand(5, *SHAPE, dtype=torch.float64).round(), torch.arange(5))


def ratio(system, z):
    first, _, last = system.ratio
    weights = (t.detach().numpy() for t in (first.weight, first.bias, last.weight, last.bias))
    w1, b1, w2, b2 = weights
    return (np.tanh(z.numpy() @ w1.T + b1) @ w2.T + b2)[..., 0]


def test_the_main_loss_has_the_ratio_in_its_kl():
    system, batch = tiny(samples=3, beta=2.0)
    with torch.no_grad():
        posterior = system.encode(batch.x)
        torch.manual_seed(0)
        z = reparametrize(posterior, 3)
        p = torch.stack([system.decoder(part) for part in z]).sigmoid().numpy()
    mean, std = posterior.mean.numpy(), np.exp(0.5 * posterior.log_var.numpy())
    kl = (-np.log(std) + (std**2 + mean**2) / 2 - 0.5).sum(1).mean() - ratio(system, z).mean()
    log_px = stats.bernoulli(p).logpmf(batch.x.numpy()).sum((2, 3, 4))
    torch.manual_seed(0)
    terms = system.loss(batch, "main")
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-10)
    assert terms["total"].item() == pytest.approx(2 * kl - log_px.mean(), rel=1e-10)
    torch.manual_seed(0)
    weights = system.log_weights(system.encode(batch.x), batch.x, 3).detach()
    expected = log_px + NORMAL.logpdf(z).sum(2) + ratio(system, z) - NORMAL(mean, std).logpdf(z).sum(2)
    np.testing.assert_allclose(weights, expected, rtol=1e-10)


def test_the_loss_of_the_ratio_is_a_cross_entropy_that_leaves_the_encoder_alone():
    system, batch = tiny()
    with torch.no_grad():
        posterior = system.encode(batch.x)
        torch.manual_seed(0)
        z = reparametrize(posterior, 1)[0]
        normal = torch.randn_like(z)
    torch.manual_seed(0)
    total = system.loss(batch, "ratio")["total"]
    expected = -np.log(expit(ratio(system, z))).mean() - np.log(expit(-ratio(system, normal))).mean()
    assert total.item() == pytest.approx(expected, rel=1e-10)
    total.backward()
    assert all(p.grad is None for p in system.encoder.parameters()) and system.ratio[0].weight.grad.abs().sum() > 0


def test_it_starts_as_a_vae_and_its_players_take_turns():
    system = ImplicitVAE(ImplicitConfig(latent_dim=3, hidden=(7,), ratio_hidden=(6,), ratio_steps=4), SHAPE)
    z = torch.randn(5, 3)
    torch.testing.assert_close(system.prior(z), system.prior.base(z))
    ratio, main = system.phases()
    assert (ratio.updates, ratio.repeat) == (("ratio",), 4) and (main.updates, main.repeat) == (("encoder", "decoder"), 1)
    assert not list(system.prior.parameters())


def test_the_ratio_becomes_that_of_the_aggregate_posterior_to_the_normal():
    """Two rows at −1 and 1.5 with deviations of 0.5 and 1: their mixture has a density to compare with."""
    torch.manual_seed(0)
    system = ImplicitVAE(ImplicitConfig(latent_dim=1, hidden=(4,), ratio_hidden=(32, 32), ratio_steps=5), (1, 1, 1))
    x, mean, std = torch.tensor([[[[0.0]]], [[[1.0]]]]), torch.tensor([-1.0, 1.5]), torch.tensor([0.5, 1.0])
    system.encode = lambda x: Posterior(mean[x[:, 0, 0].long()], 2 * std[x[:, 0, 0].long()].log())
    optimizer = torch.optim.Adam(system.ratio.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        system.loss(Batch(x.repeat(200, 1, 1, 1), torch.arange(400)), "ratio")["total"].backward()
        optimizer.step()
    grid = torch.linspace(-2, 2.5, 50)[:, None]
    density = NORMAL(mean, std).pdf(grid).mean(1)
    error = system.prior(grid).detach().numpy() - np.log(density)
    assert np.abs(error).mean() < 0.15
    assert system.prior.log_mass(generator=torch.Generator().manual_seed(0)) == pytest.approx(0, abs=0.1)


def test_mass_and_samples_of_a_ratio_that_is_known():
    """T = z₁: e^T N(0, I) has mass √e and is N((1, 0), I)."""
    prior = ImplicitPrior(lambda z: z[..., 0], 2)
    assert prior.log_mass(150_000, torch.Generator().manual_seed(0)) == pytest.approx(0.5, abs=0.02)
    first, second = (prior.sample(2500, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2500, 2)
    np.testing.assert_allclose(first.mean(0), [1, 0], atol=0.1)
    np.testing.assert_allclose(first.std(0), 1, atol=0.05)


def test_held_out_rows_are_scored_by_the_main_loss():
    system, batch = tiny(likelihood="gaussian")
    record = fit(system.float(), Data(batch.x.float()), TrainConfig(epochs=1, batch_size=5), validation=Data(batch.x.float()),
                 progress=False)[0]
    assert {"ratio/total", "main/total", "main/kl", "main/elbo", "main/gamma", "validation/elbo"} <= record.keys()
    assert not {"ratio/elbo", "ratio/gamma"} & record.keys()
    assert record["validation/total"] == pytest.approx(-record["validation/elbo"]) and math.isfinite(record["validation/total"])


@pytest.mark.parametrize(("settings", "words"), [
    ({"ratio_steps": 0}, "ratio_steps must be at least 1, given 0"),
    ({"prior": "mixture"}, "prior must be one of normal, given 'mixture'"),
    ({"posterior_flow": "iaf"}, "posterior_flow must be one of none, given 'iaf'"),
    ({"free_bits": 1.0, "free_bits_per": "dimension"}, "free_bits_per must be one of batch, given 'dimension'"),
])
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
