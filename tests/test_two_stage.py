"""Two-stage VAEs and VAE+: the losses of their stages against SciPy, which stage learns when, and what the second is for."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from latent_engine import (
    Batch,
    Data,
    OptimizerConfig,
    TrainConfig,
    TwoStageConfig,
    TwoStageVAE,
    VAEPlus,
    fit,
    load_data,
    load_system,
)
from latent_engine.bounds import Posterior, reparametrize
from latent_engine.cli import main
from latent_engine.kernels import mmd2

SHAPE = (1, 3, 5)
NORMAL = stats.norm
SIZES = {"latent_dim": 3, "hidden": (7,), "top_dim": 2, "top_hidden": (6,), "first_epochs": 2}
CODES = {"code_dim": 4, "code_hidden": (8,), "autoencoder_epochs": 1}
KINDS = pytest.mark.parametrize("kind", [TwoStageVAE, VAEPlus])


def config(kind, **settings):
    return kind.config_type(**(SIZES | (CODES if kind is VAEPlus else {}) | settings))


def tiny(kind=TwoStageVAE, rows=6, seed=0, **settings):
    """A system and as many rows of small random images, in float64."""
    torch.manual_seed(seed)
    system = kind(config(kind, **settings), SHAPE).double()
    return system, Batch(torch.rand(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
                         torch.arange(rows))


def loss(system, batch, phase, seed=0):
    torch.manual_seed(seed)
    return {name: term.item() for name, term in system.loss(batch, phase).items()}


def numpy(posterior):
    return posterior.mean.numpy(), (0.5 * posterior.log_var).exp().numpy()


def kl(mean, std):
    return (np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5).sum(1)


@pytest.mark.parametrize("top_gamma", ["learned", "learned_std"])
def test_the_second_stage_minimises_the_negative_elbo_of_representations(top_gamma):
    system, batch = tiny(top_gamma=top_gamma)
    parameter = {"learned": "log_var", "learned_std": "log_std"}[top_gamma]
    nn.init.constant_(getattr(system.prior.likelihood, parameter), -0.7)
    std = math.exp(-0.7 if top_gamma == "learned_std" else -0.35)
    torch.manual_seed(0)
    with torch.no_grad():
        z = reparametrize(system.encode(batch.x), 1)[0]
        posterior = system.prior.encode(z)
        u = reparametrize(posterior, 1)[0]
        expected = kl(*numpy(posterior)).mean() - NORMAL(system.prior.decoder(u), std).logpdf(z).sum(1).mean()
    terms = loss(system, batch, "second")
    assert terms["total"] == pytest.approx(expected, rel=1e-10)
    assert terms["total"] != loss(system, batch, "second", seed=1)["total"]  # z is drawn anew


@KINDS
def test_the_first_stage_is_a_vae_of_pixels_with_a_normal_prior(kind):
    system, batch = tiny(kind, mean_activation="identity")
    with torch.no_grad():
        posterior = system.encode(batch.x)
        torch.manual_seed(0)
        output = system.decoder(reparametrize(posterior, 1)[0])
        if kind is VAEPlus:
            output = system.autoencoder.decoder(output)
    expected = kl(*numpy(posterior)).mean() - NORMAL(output, 1).logpdf(batch.x).sum((1, 2, 3)).mean()
    assert loss(system, batch, "first")["total"] == pytest.approx(expected, rel=1e-10)


def test_the_encoder_of_vae_plus_sees_codes():
    system, batch = tiny(VAEPlus)
    mean, log_var = system.encoder(system.autoencoder.encoder(batch.x)).chunk(2, 1)
    torch.testing.assert_close(system.encode(batch.x), Posterior(mean, log_var))
    error = (system.autoencoder.reconstruct(batch.x) - batch.x).square().sum() / len(batch.x)
    constant = 7.5 * math.log(math.pi)  # of Gaussian pixels of variance ½, of which there are 15
    assert loss(system, batch, "autoencoder")["total"] == pytest.approx(error.item() + constant, rel=1e-6)


@KINDS
def test_log_weights_are_those_of_both_stages(kind):
    system, batch = tiny(kind, samples=4)
    posterior = Posterior(*(t.detach() for t in system.encode(batch.x)))
    with torch.no_grad():
        found = system.log_weights(posterior, batch.x, 4, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        z = reparametrize(posterior, 4, generator)
        given_z = system.prior.encode(z.flatten(0, 1))
        u = reparametrize(given_z, 1, generator)[0]
        log_p = (NORMAL(system.decode(z), 1).logpdf(batch.x).sum((2, 3, 4)).ravel() + NORMAL.logpdf(u).sum(1)
                 + NORMAL(system.prior.decoder(u), 1).logpdf(z.flatten(0, 1)).sum(1))
    log_q = NORMAL(*numpy(posterior)).logpdf(z).sum(2).ravel() + NORMAL(*numpy(given_z)).logpdf(u).sum(1)
    np.testing.assert_allclose(found.ravel(), log_p - log_q, rtol=1e-10)
    torch.manual_seed(0)
    expected = -system.log_weights(system.encode(batch.x), batch.x, 4).mean().item()
    assert loss(system, batch, "main")["total"] == pytest.approx(expected)


def test_the_second_stage_is_a_density_of_representations_without_bias():
    system, _ = tiny(top_dim=1)
    z = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        density = NORMAL(system.prior.decoder(grid), 1).pdf(z).prod(1) * NORMAL.pdf(grid[:, 0])
        draws = system.prior(z.expand(50_000, 3), generator=torch.Generator().manual_seed(0)).exp()
    assert draws.mean().item() == pytest.approx(np.trapezoid(density, grid[:, 0]), rel=0.01)


@KINDS
def test_a_sample_goes_through_both_stages(kind):
    system, _ = tiny(kind)
    nn.init.constant_(system.prior.likelihood.log_var, math.log(0.25))
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        z = system.prior.decoder(u) + 0.5 * torch.randn(5, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(system.sample(5, torch.Generator().manual_seed(0)), system.decode(z).detach())


class Watched(VAEPlus):
    """Keeps its weights after each epoch, and may be interrupted at the end of one."""

    interrupt_after = 0

    def after_epoch(self, epoch):
        self.history = [*getattr(self, "history", []), {name: t.clone() for name, t in self.state_dict().items()}]
        if epoch == self.interrupt_after:
            raise KeyboardInterrupt


def watched(batch, seed=0):
    torch.manual_seed(seed)
    return Watched.for_data(config(VAEPlus), Data(batch.x.float()))


def test_each_stage_learns_in_its_epochs_alone_and_the_record_says_so():
    batch = tiny(rows=20)[1]
    system = watched(batch)
    records = fit(system, Data(batch.x.float()), TrainConfig(epochs=5, batch_size=4), progress=False)
    terms = [{name.partition("/")[0] for name in record if "/" in name} - {"balance"} for record in records]
    assert terms == [{"autoencoder"}, {"first"}, {"first"}, {"second"}, {"second"}]
    learning = [{"encoder", "decoder", "likelihood"}] * 2 + [{"prior"}] * 2
    for (before, after), children in zip(itertools.pairwise(system.history), learning, strict=True):
        changed = {name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])}
        assert changed - {"step"} == children


def test_the_record_has_the_variance_of_the_stage_that_learns():
    data = Data(tiny(rows=20)[1].x.float())
    torch.manual_seed(0)
    system = VAEPlus.for_data(config(VAEPlus), data)
    records = fit(system, data, TrainConfig(epochs=5, batch_size=4), progress=False)
    gamma = [{name: value for name, value in record.items() if name.endswith("/gamma")} for record in records]
    assert [set(found) - {"balance/gamma"} for found in gamma] == [set()] + [{"first/gamma"}] * 2 + [{"second/gamma"}] * 2
    assert gamma[2]["first/gamma"] == system.likelihood.variance.item() != gamma[1]["first/gamma"]
    assert gamma[4]["second/gamma"] == system.prior.likelihood.variance.item() != gamma[3]["second/gamma"]
    for phase, record in (("first", records[2]), ("second", records[4])):
        assert record[f"{phase}/elbo"] == pytest.approx(-record[f"{phase}/total"])


def test_a_run_interrupted_in_one_stage_ends_in_another_with_the_same_bits(tmp_path):
    batch = tiny(rows=20)[1]
    data, settings = Data(batch.x.float()), TrainConfig(epochs=5, batch_size=4)
    expected = watched(batch)
    fit(expected, data, settings, progress=False)
    for last in (2, 4):
        system = watched(batch, seed=last)
        system.interrupt_after = last
        run = tmp_path / str(last)
        # Weights of the start are part of a run, and so come from the same seed.
        system.load_state_dict(watched(batch).state_dict())
        with pytest.raises(KeyboardInterrupt):
            fit(system, data, settings, run_dir=run, progress=False)
        resumed = watched(batch, seed=9)
        fit(resumed, data, settings, run_dir=run, resume=True, progress=False)
        found = resumed.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_validation_compares_epochs_by_both_stages():
    digits = load_data("digits").pixels(binarize=False)
    data, held_out = (dataclasses.replace(digits, x=digits.x[rows], y=None) for rows in (slice(200), slice(200, 300)))
    torch.manual_seed(0)
    system = TwoStageVAE.for_data(config(TwoStageVAE), data)
    records = fit(system, data, TrainConfig(epochs=6, batch_size=20), validation=held_out, progress=False)
    scores = [record["validation/total"] for record in records]
    torch.manual_seed(0)
    total = system.validation_loss(Batch(held_out.x, torch.arange(100)))["total"].item()
    assert min(scores) == min(scores[2:]) == pytest.approx(total, rel=0.05)
    assert all(record["validation/elbo"] == -record["validation/total"] for record in records)
    assert "validation/gamma" not in records[-1]  # there are two


def test_what_is_fixed_is_in_evaluation_mode():
    """Running statistics of normalisation belong to the stage in which their layer learns."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(15, 6), nn.BatchNorm1d(6))
    decoder = nn.Sequential(nn.Linear(3, 15), nn.Unflatten(1, SHAPE))
    system = TwoStageVAE(config(TwoStageVAE), SHAPE, encoder, decoder).double()
    batch = tiny()[1]
    for phase, moves in (("second", False), ("first", True)):
        before = encoder[2].running_mean.clone()
        system.loss(batch, phase)
        assert torch.equal(before, encoder[2].running_mean) != moves and encoder.training


def test_the_second_stage_comes_nearer_to_the_aggregate_posterior_than_a_normal_prior():
    digits = load_data("digits").pixels(binarize=False)
    data = dataclasses.replace(digits, x=digits.x[:500], y=digits.y[:500])
    settings = TwoStageConfig(latent_dim=4, hidden=(100,), gamma="fixed", variance=1e-3, top_dim=4, top_hidden=(100, 100),
                              first_epochs=30)
    fast = {child: OptimizerConfig("adam", lr=2e-3) for child in ("encoder", "decoder", "likelihood", "prior")}
    settings = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, **fast))
    torch.manual_seed(0)
    system = TwoStageVAE.for_data(settings, data)
    fit(system, data, TrainConfig(epochs=100, batch_size=50), progress=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = reparametrize(system.encode(data.x), 1, generator)[0]
    second, normal = system.prior.sample(500, generator), torch.randn(500, 4, generator=generator)
    assert mmd2(z, second, combine="mean") < 0.2 * mmd2(z, normal, combine="mean")


@pytest.mark.parametrize(("kind", "settings", "words"), [
    (TwoStageVAE, {"first_epochs": 0}, "first_epochs must be at least 1, given 0"),
    (TwoStageVAE, {"latent_dim": 0}, "latent_dim must be at least 1, given 0"),
    (TwoStageVAE, {"top_dim": 0}, "top_dim must be at least 1, given 0"),
    (TwoStageVAE, {"prior": "mixture"}, "prior must be one of normal, given 'mixture'"),
    (TwoStageVAE, {"top_gamma": "optimal"}, "top_gamma must be one of learned, learned_std, given 'optimal'"),
    (VAEPlus, {"code_hidden": ()}, r"code_hidden needs a layer, .* given \(\)"),
    (VAEPlus, {"code_dim": 0}, "code_dim must be at least 1, given 0"),
    (VAEPlus, {"gamma": "decoded"}, "gamma must be one of .* given 'decoded'"),
    (VAEPlus, {"warmup": "linear", "warmup_steps": 9}, "warmup must be one of none, given 'linear'"),
])
def test_settings_that_do_not_fit_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        config(kind, **settings)


def test_training_that_ends_before_the_last_stage_is_refused_before_it_begins(tmp_path):
    system, batch = tiny()
    with pytest.raises(ValueError, match=r"'second' begins with epoch 3, and training has 2 epochs: raise epochs"):
        fit(system.float(), Data(batch.x.float()), TrainConfig(epochs=2), run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["two-stage", "vae-plus"])
def test_from_the_command_line(preset, tmp_path):
    np.savez(tmp_path / "noise.npz", x=np.random.default_rng(0).random((20, 4, 8)))
    run = tmp_path / "run"
    flags = ["--capacity", "2", "--top-hidden", "8", "--first-epochs", "1", "--epochs", "3"]
    flags += ["--autoencoder-epochs", "1"] if preset == "vae-plus" else []
    assert main(["train", preset, "--data", str(tmp_path / "noise.npz"), "--run", str(run), *flags]) == 0
    assert main(["sample", str(run), "--n", "7", "--out", str(tmp_path / "x.npz")]) == 0
    expected = load_system(run).sample(7, torch.Generator().manual_seed(0))
    assert np.array_equal(np.load(tmp_path / "x.npz")["x"], expected)
