"""What every system does: it learns, resumes to the same bits, comes back from disk, and samples."""

import dataclasses
import math

import pytest
import torch

from latent_engine import Batch, TrainConfig, fit, load_data, load_system
from latent_engine.systems import PRESETS
from latent_engine.systems.ae import AE, AEConfig
from latent_engine.systems.hvae import HVAE, HVAEConfig
from latent_engine.systems.implicit import ImplicitConfig, ImplicitVAE
from latent_engine.systems.iwae import IWAE, IWAEConfig
from latent_engine.systems.two_stage import TwoStageConfig, TwoStageVAE
from latent_engine.systems.vae import VAE, VAEConfig
from latent_engine.systems.vlae import VLAE, VLAEConfig

SMALL = {"latent_dim": 4, "hidden": (20,), "top_dim": 3, "top_hidden": (8,), "components": 5, "capacity": 4,
         "code_dim": 5, "code_hidden": (12,), "autoencoder_epochs": 1, "first_epochs": 1,
         "flow_blocks": 2, "flow_hidden": (16,), "lower_dim": 3, "ratio_hidden": (8,), "ratio_steps": 2,
         "blocks": 2, "mixtures": 2, "kernels": (5, 3), "width": 8}
VARIANTS = {
    "ae-optimal": (AE, AEConfig(likelihood="gaussian", gamma="optimal")),
    "vae-conv": (VAE, VAEConfig(network="conv", samples=3)),
    "vae-fixed": (VAE, VAEConfig(likelihood="gaussian", gamma="fixed", variance=0.1, mean_activation="sigmoid")),
    "vae-learned-std": (VAE, VAEConfig(likelihood="gaussian", gamma="learned_std")),
    "vae-warmup": (VAE, VAEConfig(warmup="linear", warmup_steps=30, free_bits=0.1, free_bits_per="dimension")),
    "vae-cyclical": (VAE, VAEConfig(warmup="cyclical", warmup_steps=8, activation="relu", free_bits=1.0)),
    "vae-target": (VAE, VAEConfig(target_kl=2.0, warmup="linear", warmup_steps=10)),
    "vae-conv-skip": (VAE, VAEConfig(network="conv", affine_skip=True)),
    "vae-handicapped": (VAE, VAEConfig(heads="relu_sigmoid", normalize_beta=True)),
    "vae-decoded-variance": (VAE, VAEConfig(likelihood="gaussian", gamma="decoded", mean_activation="sigmoid",
                                            activation="softplus")),
    "vae-resnet-gaussian": (VAE, VAEConfig(likelihood="gaussian", network="resnet")),
    "vlae-mixture": (VLAE, VLAEConfig(prior="mixture", samples=2)),
    "vae-decoded-conv": (VAE, VAEConfig(likelihood="gaussian", gamma="decoded", network="conv")),
    "vae-robust-gaussian": (VAE, VAEConfig(likelihood="gaussian", divergence_beta=0.01)),
    "vae-diverse-as-in-the-code": (VAE, VAEConfig(diversity=1.0, diversity_form="code", free_bits=0.5)),
    "iwae-diverse": (IWAE, IWAEConfig(diversity=1.0, smoothness=0.1)),
    "two-stage-diverse": (TwoStageVAE, TwoStageConfig(diversity=0.5, smoothness=0.1)),
    "iwae-gaussian-mixture": (IWAE, IWAEConfig(likelihood="gaussian", prior="mixture", estimator="stl")),
    "vae-iaf-posterior": (VAE, VAEConfig(posterior_flow="iaf", free_bits=0.5)),
    "iwae-flows": (IWAE, IWAEConfig(posterior_flow="realnvp", prior="maf", samples=5, likelihood="gaussian")),
    "vae-iaf-prior": (VAE, VAEConfig(prior="iaf")),
    "iwae-vamp": (IWAE, IWAEConfig(prior="vamp", estimator="dreg", samples=5)),
    "hvae-gaussian": (HVAE, HVAEConfig(likelihood="gaussian", samples=2, free_bits=0.5)),
    "hvae-conv": (HVAE, HVAEConfig(network="conv", prior="maf")),
    "vae-iop-gaussian": (ImplicitVAE, ImplicitConfig(likelihood="gaussian", warmup="linear", warmup_steps=10)),
    "vr-max-2": (IWAE, IWAEConfig(alpha=-math.inf, prior="hierarchical")),
}
SYSTEMS = {name: (preset.system, preset.config) for name, preset in PRESETS.items()} | VARIANTS


@pytest.fixture(params=SYSTEMS)
def named(request):
    """A system and its configuration."""
    return SYSTEMS[request.param]


@pytest.fixture
def data(named):
    """200 digits of 8×8 pixels of 256 levels; of zeros and ones for a system that takes no others."""
    kind, config = named
    digits = load_data("digits").pixels(binarize=kind is VLAE and config.likelihood == "bernoulli").take(torch.arange(200))
    return dataclasses.replace(digits, x=(digits.x * 255).round() / 255)


@pytest.fixture
def new(named, data):
    """Makes the system named, in small, from a seed."""
    kind, config = named
    sizes = {name: SMALL[name] for name in SMALL if hasattr(config, name)} if kind.name != "dgd" else {}
    config = dataclasses.replace(config, **sizes)

    def make(seed=0):
        torch.manual_seed(seed)
        return kind.for_data(config, data)
    return make


def loss(system, data):
    torch.manual_seed(0)
    return system.loss(Batch(data.x, torch.arange(len(data)), data.y), "main")["total"].item()


def state(system):
    return {name: value.clone() for name, value in system.state_dict().items()}


def test_every_system_learns_resumes_and_comes_back_from_disk(new, data, tmp_path):
    system = new()
    fit(system, data, TrainConfig(epochs=6, batch_size=20), progress=False)
    untrained = new()
    untrained.after_step(60)  # under the schedules of the trained one
    assert loss(system, data) < loss(untrained, data)
    expected = state(system)

    fit(new(), data, TrainConfig(epochs=3, batch_size=20), run_dir=tmp_path / "run", progress=False)
    resumed = new(seed=1)
    fit(resumed, data, TrainConfig(epochs=6, batch_size=20), run_dir=tmp_path / "run", resume=True, progress=False)
    found = state(resumed)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    system.save(tmp_path / "saved")
    for folder in ("saved", "run"):
        again = load_system(tmp_path / folder)
        assert type(again) is type(system) and again.config == system.config and not again.training
        found = state(again)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(again.reconstruct(data.x[:5]), system.reconstruct(data.x[:5]))


def test_every_system_represents_decodes_and_samples(new, data):
    system, x = new().eval(), data.x[:6]
    z = system.represent(x)
    assert z.shape == (6, system.config.latent_dim) and not z.requires_grad
    assert system.decode(z).shape == system.reconstruct(x).shape == (6, 1, 8, 8)
    for noise in (False, True):
        first, second = (system.sample(5, torch.Generator().manual_seed(3), noise=noise) for _ in range(2))
        assert first.shape == (5, 1, 8, 8) and torch.equal(first, second) and not first.requires_grad


def test_every_system_refuses_data_that_do_not_fit(new, data):
    system = new()
    for x, words in ((data.x[..., :4], r"takes floating-point x of shape \[N, 1, 8, 8\], given .*\[200, 1, 8, 4\]"),
                     ((data.x * 255).byte(), r"given torch\.uint8 .*Data\.pixels"),
                     (data.x * torch.nan, r"pixels in \[0, 1\]|not finite")):
        with pytest.raises(ValueError, match=words):
            fit(system, dataclasses.replace(data, x=x), progress=False)
    if system.config.likelihood == "bernoulli":
        with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
            fit(system, dataclasses.replace(data, x=2 * data.x), progress=False)
