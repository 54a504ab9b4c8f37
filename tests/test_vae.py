"""Autoencoders: their losses against NumPy, what makes their variants, and settings that contradict each other."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from torch import nn

from latent_engine import AE, VAE, AEConfig, Batch, Data, TrainConfig, VAEConfig, fit, fit_mixture, load_data
from latent_engine.balance import balance
from latent_engine.bounds import Posterior, reparametrize
from latent_engine.diagnostics import encode
from latent_engine.likelihoods import DecodedGaussian, LearnedGaussian, OptimalGaussian
from latent_engine.networks import conv_decoder, conv_encoder, dgd_cifar_decoder, dgd_cifar_encoder, set_output_bias
from latent_engine.priors import HierarchicalPrior

SHAPE = (1, 3, 5)
NORMAL = stats.norm


def tiny(kind=VAE, config=VAEConfig, rows=6, **settings):
    """A system on small random binary images, in float64."""
    torch.manual_seed(0)
    settings = {"latent_dim": 4, "hidden": (7,)} | settings
    system = kind(config(**settings), SHAPE).double()
    x = torch.rand(rows, *SHAPE, dtype=torch.float64).round()
    return system, Batch(x, torch.arange(rows))


def seen(system, x, seed=0, samples=None):
    """Posterior mean and deviation, the z that the loss draws from `seed`, and the decoder's output, in NumPy."""
    with torch.no_grad():
        posterior = system.encode(x)
        torch.manual_seed(seed)
        z = reparametrize(posterior, samples or system.config.samples)
        output = torch.stack([system.decoder(part) for part in z])
    return posterior.mean.numpy(), np.exp(0.5 * posterior.log_var.numpy()), z.numpy(), output.numpy()


def loss(system, batch, seed=0):
    torch.manual_seed(seed)
    return {name: term.item() for name, term in system.loss(batch, "main").items()}


def log_bernoulli(logits, x):
    return np.log(np.where(x == 1, 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits)))).reshape(*logits.shape[:2], -1).sum(-1)


def kl(mean, std):
    return (np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5).sum(1)


def test_the_loss_is_the_negative_elbo():
    system, batch = tiny(samples=3)
    mean, std, _, logits = seen(system, batch.x)
    reconstruction = log_bernoulli(logits, batch.x.numpy()).mean()
    terms = loss(system, batch)
    assert terms["log_px_z"] == pytest.approx(reconstruction, rel=1e-12)
    assert terms["kl"] == pytest.approx(kl(mean, std).mean(), rel=1e-12)
    assert terms["total"] == -terms["elbo"] == pytest.approx(kl(mean, std).mean() - reconstruction, rel=1e-12)


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
    elbo = np.mean([loss(system, batch, seed)["elbo"] for seed in range(300)])
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
    network = "dgd" if depth == "standard" else f"dgd-{depth}"
    system = VAE(VAEConfig(network=network, latent_dim=latent_dim, capacity=4), (3, 32, 32))
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


def test_a_latent_dimension_that_does_not_fit_the_capacity_is_refused():
    with pytest.raises(ValueError, match=r"capacity 32 the standard network .* latent_dim=128, given 50"):
        VAE(VAEConfig(network="dgd"), (3, 32, 32))


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
