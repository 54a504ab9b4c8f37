"""Autoencoders: their losses against NumPy, what makes their variants, and settings that contradict each other."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from vaes import NORMAL, SHAPE, kl, log_bernoulli, loss, seen, tiny

from latent_engine import (
    AE,
    IWAE,
    VAE,
    AEConfig,
    Batch,
    Data,
    IWAEConfig,
    TrainConfig,
    VAEConfig,
    fit,
    fit_mixture,
    load_data,
)
from latent_engine.balance import balance
from latent_engine.likelihoods import DecodedGaussian, LearnedGaussian, OptimalGaussian
from latent_engine.networks import conv_decoder, conv_encoder, dgd_cifar_decoder, dgd_cifar_encoder, set_output_bias


def test_the_loss_is_the_negative_elbo():
    system, batch = tiny(samples=3)
    mean, std, _, logits = seen(system, batch.x)
    reconstruction = log_bernoulli(logits, batch.x.numpy()).mean()
    terms = loss(system, batch)
    assert terms["log_px_z"] == pytest.approx(reconstruction, rel=1e-12)
    assert terms["kl"] == pytest.approx(kl(mean, std).mean(), rel=1e-12)
    assert terms["total"] == pytest.approx(kl(mean, std).mean() - reconstruction, rel=1e-12)


@pytest.mark.parametrize("gamma", ["fixed", "learned", "learned_std"])
def test_the_loss_with_gaussian_pixels(gamma):
    system, batch = tiny(likelihood="gaussian", gamma=gamma, variance=0.3)
    mean, std, _, output = seen(system, batch.x)
    expected = kl(mean, std).mean() - NORMAL(output, math.sqrt(0.3)).logpdf(batch.x).sum((2, 3, 4)).mean()
    assert loss(system, batch)["total"] == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_an_autoencoder_has_no_noise():
    system, batch = tiny(AE, AEConfig)
    logits = system.decoder(system.encoder(batch.x)).detach().numpy()
    assert loss(system, batch, 0) == loss(system, batch, 1)
    assert loss(system, batch)["total"] == pytest.approx(-log_bernoulli(logits[None], batch.x.numpy()).mean(), rel=1e-12)


@pytest.mark.parametrize(("settings", "penalty"), [
    ({"beta": 3.0}, lambda kl: 3 * kl.sum(1).mean()),
    ({"beta": 3.0, "normalize_beta": True}, lambda kl: 3 * 4 / 15 * kl.sum(1).mean()),
    ({"free_bits": 100.0}, lambda kl: 100),
    ({"free_bits": 0.04, "free_bits_per": "dimension"}, lambda kl: np.maximum(kl.mean(0), 0.04).sum()),
    ({"target_kl": 3.0, "beta": 2.0}, lambda kl: 2 * abs(kl.sum(1).mean() - 3)),
    ({"warmup": "linear", "warmup_steps": 8, "beta": 2.0}, lambda kl: 2 * 3 / 8 * kl.sum(1).mean()),
    ({"warmup": "cyclical", "warmup_steps": 2, "beta": 2.0}, lambda kl: 2 * kl.sum(1).mean()),
    ({"warmup": "linear", "warmup_steps": 8, "target_kl": 3.0}, lambda kl: abs(kl.sum(1).mean() - 3 * 3 / 8)),
], ids=["beta", "normalized", "free-bits", "free-bits-dimension", "target", "linear", "cyclical", "rising-target"])
def test_what_takes_the_place_of_the_kl_after_three_steps(settings, penalty):
    system, batch = tiny(**settings)
    system.after_step(3)
    mean, std, _, _ = seen(system, batch.x)
    per_dimension = np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5
    terms = loss(system, batch)
    assert terms["total"] + terms["log_px_z"] == pytest.approx(penalty(per_dimension), rel=1e-6)
    assert terms["kl"] == pytest.approx(per_dimension.sum(1).mean())


def test_a_warm_up_follows_the_steps_of_the_trainer():
    system, batch = tiny(warmup="linear", warmup_steps=100)
    fit(system.float(), Data(batch.x.float()), TrainConfig(epochs=5, batch_size=2), progress=False)
    assert system.step.item() == 15


def test_held_out_rows_are_scored_at_the_end_of_a_warm_up():
    system, batch = tiny(warmup="linear", warmup_steps=100, beta=2.0)
    terms = {name: value.item() for name, value in system.eval().validation_loss(batch).items()}
    assert terms["total"] == pytest.approx(2 * terms["kl"] - terms["log_px_z"])


def record_of(system, x, **settings):
    """Of one epoch of three steps, validated on the same rows."""
    data = Data(x.float())
    return fit(system.float(), data, TrainConfig(epochs=1, batch_size=2, **settings), validation=data, progress=False)[0]


def test_the_log_of_a_run_has_the_elbo():
    system, batch = tiny(beta=3.0)
    record = record_of(system, batch.x)
    assert list(record)[3:7] == ["total", "log_px_z", "kl", "elbo"]
    for prefix in ("", "validation/"):
        total, log_px_z, kl, elbo = (record[prefix + name] for name in ("total", "log_px_z", "kl", "elbo"))
        assert elbo == log_px_z - kl == pytest.approx(2 * kl - total)


def test_the_bound_of_several_samples_is_not_logged_as_an_elbo():
    system, batch = tiny(IWAE, IWAEConfig, samples=3)
    record = record_of(system, batch.x)
    assert {"kl", "validation/kl"} <= record.keys() and not {"elbo", "validation/elbo"} & record.keys()


@pytest.mark.parametrize("gamma", ["learned", "learned_std", "optimal"])
@pytest.mark.parametrize(("kind", "config"), [(AE, AEConfig), (VAE, VAEConfig)])
def test_the_log_of_a_run_has_the_variance_at_the_end_of_an_epoch(kind, config, gamma):
    system, batch = tiny(kind, config, likelihood="gaussian", gamma=gamma)
    record = record_of(system, batch.x)
    assert record["gamma"] == record["validation/gamma"] == system.likelihood.variance.item() != 1


def test_the_variance_in_the_log_is_that_of_the_weights_in_use():
    system, batch = tiny(likelihood="gaussian")
    record = record_of(system, batch.x, ema_decay=0.5)
    assert record["gamma"] < record["validation/gamma"] == system.likelihood.variance.item()


@pytest.mark.parametrize("settings", [{}, {"likelihood": "gaussian", "gamma": "fixed"},
                                      {"likelihood": "gaussian", "gamma": "decoded"}], ids=str)
def test_a_variance_that_is_not_one_that_adapts_is_not_logged(settings):
    system, batch = tiny(**settings)
    assert not {"gamma", "validation/gamma"} & record_of(system, batch.x).keys()


def test_the_log_of_a_run_has_the_balance():
    system, batch = tiny()
    record, = fit(system.float(), Data(batch.x.float()), TrainConfig(epochs=1), progress=False)
    assert record["balance/verdict"] == balance(system, batch.x.float())["verdict"]
    assert len(record["balance/kl"]) == record["balance/dimensions"] == system.config.latent_dim


def test_handicapped_heads_are_the_exponentials_of_a_sigmoid_and_never_negative():
    system, batch = tiny(heads="relu_sigmoid")
    mean, log_var = system.encode(batch.x)
    raw = system.encoder(batch.x)
    torch.testing.assert_close(mean, raw[:, :4].clamp(min=0))
    torch.testing.assert_close((0.5 * log_var).exp(), raw[:, 4:].sigmoid())


def test_a_decoder_may_give_the_variance_of_each_pixel():
    likelihood, rng = DecodedGaussian(sigmoid=True), np.random.default_rng(0)
    output, x = torch.from_numpy(rng.normal(size=(3, 4, 2, 3, 5))), torch.from_numpy(rng.random((4, 1, 3, 5)))
    raw = output.numpy()
    pixels = NORMAL(1 / (1 + np.exp(-raw[:, :, :1])), np.exp(0.5 * raw[:, :, 1:]))
    np.testing.assert_allclose(likelihood.log_prob(output, x), pixels.logpdf(x).sum((2, 3, 4)))
    np.testing.assert_allclose(likelihood.mean(output), pixels.mean())
    draws = likelihood.sample(output.expand(5000, *output.shape), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(draws.std(0), pixels.std(), rtol=0.06)
    # By quadrature: the integral of a power of the density of one row.
    grid = np.linspace(-40, 40, 100_001)
    integrals = [np.trapezoid(NORMAL(0, s).pdf(grid) ** 1.3, grid) for s in pixels.std()[2, 1].ravel()]
    found = likelihood.log_power_integral(output, 1.3, 3)
    assert found.shape == (3, 4) and found[2, 1].item() == pytest.approx(np.log(integrals).sum())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_robust_loss_is_a_beta_divergence(likelihood):
    """(1 + β)/β (p^β − 1) − ∫ p^(1 + β) of all pixels together; the sum over images of two values, by brute force."""
    system, batch = tiny(likelihood=likelihood, divergence_beta=0.2, variance=0.7)
    mean, std, _, output = seen(system, batch.x)
    output, x = output.reshape(6, 15), batch.x.numpy().reshape(6, 15)
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-output))
        density = np.where(x == 1, p, 1 - p).prod(1)
        images = (np.arange(2**15)[:, None] >> np.arange(15)) & 1
        integral = np.array([np.where(images == 1, row, 1 - row).prod(1).__pow__(1.2).sum() for row in p])
    else:
        density = NORMAL(output, math.sqrt(0.7)).pdf(x).prod(1)
        grid = np.linspace(-20, 20, 100_001)
        integral = np.trapezoid(NORMAL(0, math.sqrt(0.7)).pdf(grid) ** 1.2, grid) ** 15
    expected = kl(mean, std).mean() - (1.2 / 0.2 * (density**0.2 - 1) - integral).mean()
    assert loss(system, batch)["total"] == pytest.approx(expected, rel=1e-6)


def test_the_robust_loss_is_the_vae_s_for_small_beta_and_heeds_an_outlier_less():
    plain, batch = tiny(likelihood="gaussian", gamma="fixed")
    robust, _ = tiny(likelihood="gaussian", gamma="fixed", divergence_beta=1e-7)
    assert loss(robust, batch)["total"] == pytest.approx(loss(plain, batch)["total"] + 1, rel=1e-5)
    outlier = torch.cat([batch.x[:5], batch.x[5:] + 10])

    def pull(system):
        """Gradient of the output bias, of which each row's part is its residual, weighted."""
        system.zero_grad()
        torch.manual_seed(0)
        system.loss(Batch(outlier, batch.index), "main")["total"].backward()
        return system.decoder[-2].bias.grad.norm()
    strong, _ = tiny(likelihood="gaussian", gamma="fixed", divergence_beta=0.1)
    assert pull(plain) > 5 and pull(strong) < 1


def test_optimal_variance_is_the_mean_squared_error_and_evaluation_remembers_it():
    likelihood, rng = OptimalGaussian().double(), np.random.default_rng(0)
    x, mean = torch.from_numpy(rng.normal(size=(4, 2, 3))), torch.from_numpy(rng.normal(size=(5, 4, 2, 3))).requires_grad_()
    error = np.square(x.numpy() - mean.detach().numpy()).mean()
    for _ in range(100):
        found = likelihood.log_prob(mean, x)
    np.testing.assert_allclose(found.detach(), NORMAL(mean.detach(), math.sqrt(error)).logpdf(x).sum((2, 3)))
    assert likelihood.variance.item() == pytest.approx(error, rel=1e-3)
    # The gradient is that of −½ P log MSE, in which γ follows the mean.
    (grad,) = torch.autograd.grad(found.mean(), mean)
    (expected,) = torch.autograd.grad(-0.5 * 6 * (x - mean).square().mean().log(), mean)
    torch.testing.assert_close(grad, expected)
    likelihood.eval()
    before = likelihood.log_prob(mean, x)
    likelihood.log_prob(mean, 3 * x)
    assert torch.equal(likelihood.log_prob(mean, x), before)


def test_perfect_means_keep_the_optimal_variance_finite():
    x = torch.ones(2, 3)
    assert OptimalGaussian().log_prob(x, x).isfinite().all()


@pytest.mark.parametrize("parameter", ["log_var", "log_std"])
@pytest.mark.parametrize("shape", [(), (2, 1, 1), (2, 3, 5)], ids=["shared", "channel", "pixel"])
def test_learned_variance_finds_the_mean_squared_error(parameter, shape):
    torch.manual_seed(0)
    likelihood = LearnedGaussian(2.0, shape, parameter).double()
    assert likelihood.variance.unique().item() == pytest.approx(2.0)
    x = torch.randn(50, 2, 3, 5, dtype=torch.float64) * torch.tensor([0.1, 0.5])[:, None, None]
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = -likelihood.log_prob(torch.zeros_like(x), x).mean()
        total.backward()
        return total
    optimizer.step(closure)
    axes = [0, *(i + 1 for i in range(3) if not shape or shape[i] == 1)]
    np.testing.assert_allclose(likelihood.variance.detach(), x.square().mean(axes).reshape(shape), rtol=1e-4)


def test_a_fixed_gaussian_has_no_child_that_steps():
    for gamma, children in (("fixed", ("encoder", "decoder")), ("optimal", ("encoder", "decoder")),
                            ("learned", ("encoder", "decoder", "likelihood"))):
        assert tiny(likelihood="gaussian", gamma=gamma)[0].phases()[0].updates == children
    assert tiny(prior="mixture")[0].phases()[0].updates == ("encoder", "decoder", "prior")


@pytest.mark.parametrize("settings", [
    {}, {"network": "conv"}, {"likelihood": "gaussian"}, {"likelihood": "gaussian", "mean_activation": "sigmoid"},
    {"likelihood": "gaussian", "gamma": "decoded"}, {"network": "residual", "affine_skip": True},
    {"likelihood": "gaussian", "mean_activation": "sigmoid", "affine_skip": True},
], ids=["mlp", "conv", "gaussian", "sigmoid", "decoded", "residual", "skip"])
def test_a_decoder_starts_from_the_mean_of_the_data(settings):
    data = load_data("mnist5k").pixels(binarize=True)
    system = VAE.for_data(VAEConfig(**settings), data)
    with torch.no_grad():
        for p in system.decoder.parameters():
            if p.dim() > 1:
                p.zero_()
    expected = data.x.mean(0).clamp(1e-3, 1 - 1e-3) if settings.get("network") != "conv" else None
    found = system.decode(torch.zeros(1, 50))[0]
    if expected is None:
        assert found.std() < 1e-6
    else:
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 28, 20)])
def test_conv_networks_have_the_shape_of_the_images(shape):
    assert conv_encoder(shape, 6, 4)(torch.zeros(2, *shape)).shape == (2, 6)
    assert conv_decoder(3, shape, 4)(torch.zeros(2, 3)).shape == (2, *shape)


@pytest.mark.parametrize(("depth", "latent_dim"), [("standard", 16), ("shallow", 128), ("linear", 10)])
def test_the_cifar_networks_of_the_dgd_paper(depth, latent_dim):
    decoder = dgd_cifar_decoder(latent_dim, (3, 32, 32), 4, depth)
    kernels = [tuple(p.shape) for p in decoder.parameters() if p.dim() == 4]
    assert kernels[-4:] == [(8, 8, 4, 4), (8, 4, 4, 4), (4, 4, 4, 4), (4, 3, 1, 1)]
    assert decoder(torch.randn(2, latent_dim)).shape == (2, 3, 32, 32)
    assert dgd_cifar_encoder(latent_dim, (3, 32, 32), 4, depth)(torch.randn(2, 3, 32, 32)).shape == (2, latent_dim)


@pytest.mark.parametrize(("network", "latent_dim", "encoder", "decoder"), [
    ("dgd", 16, [], []), ("dgd-shallow", 128, [], []), ("dgd-encoder-linear", 128, [(128, 128)] * 2, []),
    ("dgd-linear", 10, [(10, 128)] * 2, [(128, 10)])])
def test_the_cifar_vaes_of_the_dgd_paper(network, latent_dim, encoder, decoder):
    """`encoder` and `decoder` are the shapes of their linear layers; there is an encoder of means and one of deviations."""
    system = VAE(VAEConfig(network=network, latent_dim=latent_dim, capacity=4), (3, 32, 32))
    for part, expected in ((system.encoder, encoder), (system.decoder, decoder)):
        assert [tuple(p.shape) for p in part.parameters() if p.dim() == 2] == expected
    assert system.loss(Batch(torch.rand(2, 3, 32, 32), torch.arange(2)), "main")["total"].isfinite()


def test_output_bias_of_a_convolution_is_the_mean_of_a_channel():
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1))
    set_output_bias(decoder, torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]]))
    assert decoder[2].bias.tolist() == [2.0, 5.0] and decoder[0].bias.abs().max() < 1


def test_networks_of_ones_own_are_given_again_when_loading(tmp_path):
    def own():
        return {"encoder": nn.Sequential(nn.Flatten(), nn.Linear(15, 8)),
                "decoder": nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, SHAPE))}
    system = VAE(VAEConfig(latent_dim=4), SHAPE, **own())
    system.save(tmp_path)
    again = VAE.load(tmp_path, **own())
    assert torch.equal(again.decode(torch.ones(1, 4)), system.decode(torch.ones(1, 4)))


def test_a_vae_reconstructs_new_digits_better_than_the_best_linear_decoder_of_as_many_dimensions():
    data, test = (load_data("mnist5k", split).pixels(binarize=True) for split in ("train", "test"))
    data = dataclasses.replace(data, x=data.x[::5], y=data.y[::5])
    torch.manual_seed(0)
    system = VAE.for_data(VAEConfig(latent_dim=2), data)
    fit(system, data, TrainConfig(epochs=15, batch_size=20), progress=False)
    error = (system.reconstruct(test.x) - test.x).square().mean()
    pca, flat = PCA(2).fit(data.x.flatten(1).numpy()), test.x.flatten(1).numpy()
    assert error < np.square(pca.inverse_transform(pca.transform(flat)) - flat).mean()


@pytest.mark.parametrize(("settings", "words"), [
    ({"prior": "cauchy"}, "prior must be one of normal, mixture, hierarchical, vamp, maf, iaf, realnvp, given 'cauchy'"),
    ({"network": "transformer"}, "network must be one of mlp, .* given 'transformer'"),
    ({"latent_dim": 0}, "latent_dim must be at least 1, given 0"),
    ({"samples": 0}, "samples must be at least 1, given 0"),
    ({"hidden": (20, 0)}, r"hidden must be at least 1, given \(20, 0\)"),
    ({"prior": "vamp", "posterior_flow": "iaf"}, "mixture of Gaussian posteriors; with posterior_flow='iaf' use another"),
    ({"posterior_flow": "iaf", "free_bits": 1.0, "free_bits_per": "dimension"}, "KL divergence of a posterior with a flow"),
    ({"flow_blocks": 0}, "flow_blocks must be at least 1, given 0"),
    ({"variance": 0.0}, r"variance must be positive and finite, given 0\.0"),
    ({"beta": -1.0}, r"beta must be at least 0 and finite, given -1\.0"),
    ({"free_bits": math.nan}, "free_bits must be at least 0 and finite, given nan"),
    ({"warmup": "linear"}, "warmup='linear' and warmup_steps=0 contradict"),
    ({"warmup_steps": 5}, "warmup='none' and warmup_steps=5 contradict"),
    ({"divergence_beta": -0.1}, r"divergence_beta must be at least 0 and finite, given -0\.1"),
    ({"divergence_beta": 0.1, "likelihood": "gaussian", "gamma": "optimal"}, "not under divergence_beta"),
    ({"free_bits": 1.0, "target_kl": 1.0}, "free_bits and target_kl both take the place"),
    ({"free_bits": 1.0, "free_bits_per": "dimension", "prior": "mixture"}, "KL divergence to a mixture prior has no part"),
    ({"network": "conv"}, r"multiples of 4, given \[3, 5\]"),
    ({"network": "dgd"}, "images of 32×32, given 3×5"),
    ({"network": "residual", "hidden": ()}, r"width of its decoder from the last of hidden, given \(\)"),
])
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)


@pytest.mark.parametrize(("network", "words"), [
    ("dgd", "capacity 32 the standard network .* latent_dim=128, given 50"),
    ("dgd-encoder-linear", "capacity 32 the shallow network .* latent_dim=1024, given 50")])
def test_a_latent_dimension_that_does_not_fit_the_capacity_is_refused(network, words):
    with pytest.raises(ValueError, match=words):
        VAE(VAEConfig(network=network), (3, 32, 32))


@pytest.mark.parametrize(("kind", "config"), [(AE, AEConfig), (VAE, VAEConfig)])
def test_samples_of_another_prior_are_decodes_of_its_points(kind, config):
    system, batch = tiny(kind, config, rows=30)
    mixture = fit_mixture(system.represent(batch.x), 2).mixture
    z = mixture.sample(5, torch.Generator().manual_seed(0))
    expected = system.decode(z).detach()
    torch.testing.assert_close(system.sample(5, torch.Generator().manual_seed(0), prior=mixture), expected)
    noisy = system.sample(5, torch.Generator().manual_seed(0), noise=True, prior=mixture)
    assert set(noisy.unique().tolist()) == {0.0, 1.0}


def test_log_weights_of_no_samples_are_refused():
    system, batch = tiny()
    with pytest.raises(ValueError, match="samples must be at least 1, given 0"):
        system.log_weights(system.encode(batch.x), batch.x, 0)
