"""The parts of a VLAE of natural images: PixelCNN++, its mixtures of logistics, the flow of maps, and the whole."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_engine import VLAE, Data, TrainConfig, VLAEConfig, fit, load_data, log_likelihood, report
from latent_engine.conv_flow import ConvFlow, latent_maps
from latent_engine.densenet import densenet_encoder
from latent_engine.likelihoods import LogisticMixture
from latent_engine.pixelcnn_pp import PixelCNNPlusPlus
from latent_engine.priors import FlowPrior
from latent_engine.system import OptimizerConfig
from latent_engine.systems.vae import VAEOptim

SMALL = {"latent_dim": 32, "network": "densenet", "likelihood": "logistic_mixture", "prior": "conv", "flow_blocks": 2,
         "flow_hidden": (8,), "capacity": 4, "width": 8, "blocks": 1, "mixtures": 3}


def decoder(shape, maps=(2, 2, 2), **sizes):
    torch.manual_seed(0)
    return PixelCNNPlusPlus(maps, shape, **{"blocks": 2, "width": 5, "components": 3, **sizes}).double()


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 6)])
def test_every_output_of_a_pixelcnnpp_depends_on_all_pixels_before_it_and_on_no_other(shape):
    network, pixels = decoder(shape), shape[1] * shape[2]
    z, x = torch.randn(1, 8, dtype=torch.float64), torch.rand(1, *shape, dtype=torch.float64)
    of_z, of_x = torch.autograd.functional.jacobian(lambda z, x: network(z, x).squeeze(0), (z, x))
    by_pixel = of_x.abs().view(-1, pixels, shape[0], pixels).sum((0, 2))
    assert torch.equal(by_pixel > 0, torch.ones(pixels, pixels, dtype=torch.bool).tril(-1))
    assert (of_z.abs().sum((0, 3, 4)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 6, 4), (3, 2, 2)])
def test_a_pixelcnnpp_draws_the_images_of_full_passes(shape, dtype):
    network = decoder(shape).to(dtype)
    z, noise = torch.randn(3, 8, dtype=dtype), network.noise(3, torch.Generator().manual_seed(0))
    found, x = network.draw(z, noise), torch.zeros(3, *shape, dtype=dtype)
    with torch.no_grad():
        for row, column in np.ndindex(shape[1:]):
            at = (..., slice(row, row + 1), slice(column, column + 1))
            x[at] = LogisticMixture(shape[0]).draw(network(z, x)[at], noise[at])
        torch.testing.assert_close(found.output, network(z, found.x))
    torch.testing.assert_close(found.x, x)
    levels = found.x * 255
    torch.testing.assert_close(levels, levels.round())
    assert len(levels.unique()) > 5 and levels.min() >= 0 and levels.max() <= 255


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_of_a_mixture_have_its_probabilities_and_mean(channels):
    """The most frequent of 100,000 draws, with scales of about a level."""
    torch.manual_seed(0)
    likelihood, n = LogisticMixture(channels), 100_000
    output = torch.randn(1, 20 if channels == 3 else 6, 1, 1, dtype=torch.float64)
    params = output[:, 2:].view(channels, -1, 2)
    params[:, 0] = 0.3 * torch.randn(channels, 2)
    params[:, 1] = -5.5
    draws = likelihood.draw(output.expand(n, -1, 1, 1), torch.rand(n, 2 + channels, 1, 1, dtype=torch.float64))
    images, counts = draws.unique(dim=0, return_counts=True)
    top = counts.argsort(descending=True)[:10]
    expected = likelihood.log_prob(output.expand(10, -1, 1, 1), images[top]).exp()
    np.testing.assert_allclose(counts[top] / n, expected, atol=5 * math.sqrt(expected.max() / n))
    np.testing.assert_allclose(draws.mean(0), likelihood.mean(output)[0], atol=0.005)


def test_edges_own_the_tails_of_a_mixture():
    output = torch.tensor([0.0, 5.0, -3.0])[None, :, None, None]  # one logistic, its mean far right of the last level
    assert LogisticMixture(1).draw(output, torch.full((1, 2, 1, 1), 0.5)).item() == 1
    assert LogisticMixture(1).mean(output).item() == 1
    assert LogisticMixture(1).draw(output, torch.zeros(1, 2, 1, 1)).isfinite().all()  # at the end of the noise


def flow(blocks=3):
    torch.manual_seed(0)
    network = ConvFlow((2, 3, 4), blocks, (6, 5)).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


def test_a_place_of_a_map_is_mapped_given_those_before_it():
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(1)(z)[0], torch.randn(24, dtype=torch.float64))
    by_place = jacobian.abs().view(2, 12, 2, 12).sum((0, 2)).flip(0)  # a block turns the order of its outputs round
    assert (by_place.triu(1) == 0).all() and (by_place.diagonal() > 0).all() and (by_place.tril(-1) > 0).sum() > 30


def test_a_flow_of_maps_has_the_determinant_of_its_jacobian_and_an_inverse():
    network, z = flow(), torch.randn(2, 5, 24, dtype=torch.float64)
    u, log_det = network(z)
    assert u.shape == z.shape and log_det.shape == (2, 5)
    jacobian = torch.autograd.functional.jacobian(lambda z: network(z)[0], z[1, 2])
    assert log_det[1, 2].item() == pytest.approx(np.linalg.slogdet(jacobian.numpy())[1])
    again, back = network.inverse(u.detach())
    torch.testing.assert_close(again, z)
    torch.testing.assert_close(back, -log_det.detach())


def test_a_prior_of_maps_starts_as_a_standard_normal():
    prior, z = FlowPrior((2, 3, 4), "conv", 3, (5,)), torch.randn(7, 24)
    torch.testing.assert_close(prior(z), torch.distributions.Normal(0, 1).log_prob(z).sum(1))
    assert prior.sample(5, torch.Generator().manual_seed(0)).shape == (5, 24)


def test_a_dense_encoder_gives_maps():
    assert latent_maps((3, 32, 32), 1024) == (16, 8, 8)
    assert densenet_encoder((3, 8, 12), 2 * 24, 2)(torch.zeros(2, 3, 8, 12)).shape == (2, 48)


def tiny(x, **settings):
    torch.manual_seed(0)
    return VLAE.for_data(VLAEConfig(**SMALL | settings), Data(x))


def test_bits_per_dimension_are_those_of_levels():
    x = torch.randint(0, 256, (6, 3, 8, 8)).float() / 255
    system = tiny(x)
    record, = fit(system, Data(x), TrainConfig(epochs=1), progress=False)
    assert record["bits_per_dim"] == pytest.approx(record["total"] / (192 * math.log(2)))
    scores = report.evaluate(system, Data(x), Data(x), nll_samples=8)
    assert scores["bits_per_dim"] == pytest.approx(scores["nll"] / (192 * math.log(2)))
    found = log_likelihood(system, x, 64, generator=torch.Generator().manual_seed(0))
    assert (found.log_px > found.elbo).all() and 5 < -found.mean / (192 * math.log(2)) < 12


def test_natural_images_are_learned_drawn_and_reported_in_bits_per_dimension():
    """A uniform distribution over the levels has 8 bits/dim."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data" / "cifar10"
    if not folder.exists():
        pytest.skip("needs the CIFAR-10 subset beside the project")
    data = load_data(str(folder)).pixels(binarize=False).take(torch.arange(64))
    torch.manual_seed(0)
    fast = OptimizerConfig("adam", lr=1e-2)
    system = VLAE.for_data(VLAEConfig(**SMALL | {"latent_dim": 128, "optim": VAEOptim(fast, fast, fast, fast)}), data)
    records = fit(system, data, TrainConfig(epochs=6, batch_size=8, clip_norm=5.0), progress=False)
    assert records[-1]["bits_per_dim"] < min(records[0]["bits_per_dim"], 7)
    assert system.sample(2, noise=True).shape == system.reconstruct(data.x[:2]).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("settings", "shape", "words"), [
    ({"latent_dim": 30}, (3, 8, 8), "60 numbers are no such maps for images of 8×8|30 numbers"),
    ({}, (3, 8, 6), "a quarter of the height and width"),
    ({"network": "resnet"}, (2, 8, 8), "images of 3 channels or 1, .* given 2×8×8"),
    ({"mixtures": 0}, (3, 8, 8), "mixtures must be at least 1, given 0"),
    ({"divergence_beta": 0.1}, (3, 8, 8), "pixels are independent given z"),
])
def test_settings_that_cannot_work_are_refused(settings, shape, words):
    with pytest.raises(ValueError, match=words):
        tiny(torch.zeros(4, *shape), **settings)


def test_pixels_between_levels_are_refused_before_training():
    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"256 levels.*--binarize none"):
        tiny(x)
    system = tiny((x * 255).round() / 255)
    with pytest.raises(ValueError, match="256 levels"):
        fit(system, dataclasses.replace(Data(x)), progress=False)
