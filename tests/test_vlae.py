"""Variational lossy autoencoders: losses against NumPy, marginals that sum to one, samples, start from data, refusals."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from latent_engine import VAE, VLAE, Batch, Data, TrainConfig, VAEConfig, VLAEConfig, fit, load_data, log_likelihood, report
from latent_engine.bounds import reparametrize
from latent_engine.mixtures import GaussianMixture

SHAPE = (1, 2, 3)
SMALL = {"latent_dim": 2, "capacity": 2, "kernels": (3, 3), "width": 6, "prior": "normal"}


def tiny(shape=SHAPE, rows=6, **settings):
    """A VLAE of small random binary images, in float64, and rows."""
    torch.manual_seed(0)
    data = Data(torch.rand(rows, *shape).round())
    system = VLAE.for_data(VLAEConfig(**SMALL | settings), data).double()
    return system, Batch(data.x.double(), torch.arange(rows))


def log_bernoulli(logits, x):
    return np.log(np.where(x == 1, 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits)))).reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("samples", [1, 50])  # 50 samples of 6 rows take three calls of the decoder
def test_the_loss_is_the_negative_elbo(samples):
    system, batch = tiny(samples=samples)
    with torch.no_grad():
        mean, log_var = system.encode(batch.x)
        torch.manual_seed(1)
        z = reparametrize((mean, log_var), samples)
        log_px_z = np.mean([log_bernoulli(system.decoder(part, batch.x).numpy(), batch.x.numpy()) for part in z])
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean().item()
    torch.manual_seed(1)
    terms = system.loss(batch)
    assert terms["total"].item() == pytest.approx(kl - log_px_z, rel=1e-12)
    terms["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


IMAGES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(64, *SHAPE)  # all there are


@torch.no_grad()
def marginals(system):
    """p(x) `[64]` of all images; with a wide q(z | x), the same for each."""
    *_, head = system.encoder
    head.parametrizations.weight.original0.zero_()
    head.bias.copy_(torch.tensor([0.0, 0.0, 0.8, 0.8]))
    return log_likelihood(system, IMAGES, 4000, generator=torch.Generator().manual_seed(0)).log_px.exp().numpy()


def test_marginals_of_all_images_sum_to_one():
    system, _ = tiny()
    found = marginals(system)
    assert found.sum() == pytest.approx(1, abs=0.01) and found.max() > 3 * found.min()
    z = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given_z = log_bernoulli(system.decoder(z, IMAGES[37].expand(20_000, *SHAPE)).numpy(), IMAGES[37].expand(20_000, *SHAPE))
    assert found[37] == pytest.approx(np.exp(given_z).mean(), rel=0.05)


@pytest.mark.parametrize("prior", ["normal", "mixture", "maf"])
def test_samples_are_draws_from_the_model_and_their_probabilities(prior):
    system, _ = tiny(prior=prior, components=3, flow_blocks=2, flow_hidden=(6,))
    with torch.no_grad():
        for p in system.prior.parameters():
            p.add_(0.1 * torch.randn_like(p))
    images, p = (system.sample(20_000, torch.Generator().manual_seed(0), noise=noise) for noise in (True, False))
    assert set(images.unique().tolist()) == {0.0, 1.0}
    z = system.prior.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(p, system.decoder(z, images).sigmoid().detach())
    np.testing.assert_allclose(images.mean(0), p.mean(0), atol=0.015)
    codes = (images.flatten(1) @ torch.tensor([32, 16, 8, 4, 2, 1], dtype=torch.float64)).long()
    np.testing.assert_allclose(np.bincount(codes, minlength=64) / 20_000, marginals(system), atol=0.01)


@pytest.mark.parametrize("noise", [True, False])
def test_a_prior_that_is_given_takes_the_place_of_its_own(noise):
    system, _ = tiny()
    dim = system.config.latent_dim
    other = GaussianMixture(torch.ones(1), torch.full((1, dim), 5.0), torch.full((1, dim), 1e-4)).double()
    given = system.sample(20, torch.Generator().manual_seed(0), noise=noise, prior=other)
    assert not torch.equal(given, system.sample(20, torch.Generator().manual_seed(0), noise=noise))
    system.prior = other
    assert torch.equal(given, system.sample(20, torch.Generator().manual_seed(0), noise=noise))


def test_what_is_decoded_are_probabilities_along_one_draw_for_each_z():
    system, batch = tiny((1, 5, 4))
    z = torch.randn(3, 2, 2, dtype=torch.float64)
    p = system.decode(z)
    assert p.shape == (3, 2, 1, 5, 4)
    torch.testing.assert_close(p[1, 0], system.decode(z[1, :1])[0])
    noise = system.decoder.noise(1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(p[1, :1], system.decoder(z[1, :1], (noise < p[1, :1]).double()).sigmoid().detach())
    assert torch.equal(system.reconstruct(batch.x), system.decode(system.encode(batch.x).mean))


@pytest.mark.parametrize(("kind", "config"), [(VLAE, VLAEConfig(**SMALL)), (VAE, VAEConfig(network="resnet", capacity=2))],
                         ids=["vlae", "resnet-vae"])
def test_layers_start_from_the_data(kind, config):
    """The same start from the same seed, in which posterior means and log-variances of the data have means of 0 and 1."""
    data = load_data("digits").pixels(binarize=True)
    starts = []
    for _ in range(2):
        torch.manual_seed(3)
        starts.append(kind.for_data(config, data))
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in starts), strict=True))
    outputs = starts[0].encoder(data.x).detach().numpy()
    np.testing.assert_allclose(outputs.mean(0), 0, atol=0.3)
    np.testing.assert_allclose(outputs.std(0), 1, atol=0.3)


def test_a_factorised_decoder_keeps_the_mean_of_the_data_as_its_start():
    data = load_data("digits").pixels(binarize=True)
    system = VAE.for_data(VAEConfig(network="resnet", capacity=2), data)
    expected = stats.logistic.ppf(data.x.mean(0).clamp(1e-3, 1 - 1e-3)).mean()
    assert system.decoder[-1].bias.item() == pytest.approx(expected, rel=1e-5)


def test_pixels_before_tell_the_decoder_more_than_z_alone_does():
    """After as many steps on real digits the autoregressive decoder is ahead of the factorised one."""
    data = load_data("digits").pixels(binarize=True).take(torch.arange(600))
    config, losses = TrainConfig(epochs=6, batch_size=20), []
    for kind, own in ((VLAE, VLAEConfig(latent_dim=4, capacity=4, kernels=(5, 5, 3), width=16)),
                      (VAE, VAEConfig(latent_dim=4, capacity=4, network="resnet"))):
        torch.manual_seed(0)
        losses.append(fit(kind.for_data(own, data), data, config, progress=False)[-1]["total"])
    assert losses[0] < losses[1] - 1


def test_a_vlae_is_evaluated_like_any_vae():
    data = load_data("digits", "test").pixels(binarize=True).take(torch.arange(30))
    torch.manual_seed(0)
    scores = report.evaluate(VLAE.for_data(VLAEConfig(**SMALL), data), data, data, nll_samples=10)
    assert scores["nll"] <= scores["negative_elbo"] + 1e-6 and scores["dimensions"] == 2
    assert "verdict" not in scores["balance"] and "regularised" not in report.format_scores(scores)


def test_pseudo_inputs_of_a_vampprior_start_from_rows():
    system, batch = tiny(prior="vamp", components=3, pseudo_inputs="data")
    nearest = torch.cdist(system.prior.inputs.flatten(1), batch.x.flatten(1)).min(1).values
    assert nearest.max() < 0.1


def test_dynamically_binarised_images_are_trained_on():
    data = load_data("digits").pixels("dynamic").take(torch.arange(40))
    system = VLAE.for_data(VLAEConfig(**SMALL), data)
    assert fit(system, data, TrainConfig(epochs=1, batch_size=20), progress=False)[0]["total"] > 0


def test_gray_images_are_refused_before_training():
    data = load_data("digits").pixels(binarize=False)
    with pytest.raises(ValueError, match=r"pixels of zeros and ones.*--binarize dynamic"):
        VLAE.for_data(VLAEConfig(**SMALL), data)
    system = VLAE.for_data(VLAEConfig(**SMALL), data.pixels(binarize=True))
    with pytest.raises(ValueError, match="pixels of zeros and ones"):
        fit(system, dataclasses.replace(data), progress=False)


@pytest.mark.parametrize(("settings", "words"), [
    ({"affine_skip": True}, "affine_skip is for decoders whose pixels are independent given z"),
    ({"divergence_beta": 0.1}, "divergence_beta is for decoders whose pixels are independent given z"),
    ({"likelihood": "gaussian"}, "likelihood must be one of bernoulli, logistic_mixture, given 'gaussian'"),
    ({"network": "residual"}, "network must be one of mlp, conv, resnet, densenet, given 'residual'"),
    ({"kernels": ()}, "at least one convolution"), ({"kernels": (4, 3)}, "odd kernel"),
    ({"width": 0}, "width must be at least 1, given 0"),
])
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
