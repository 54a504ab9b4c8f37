"""The regularisation balance in closed form ("On the Regularization Balance in Autoencoder-Based Generative Models").

The affine VAE (its Eq. 3) is probabilistic PCA; penalties on the energy of representations (its Eq. 6) prune them to as
few as the data need only where their gradient at zero is unbounded (its Theorem 3).
"""

import math

import numpy as np
import pytest
import torch

from latent_engine import VAE, VAEConfig
from latent_engine.bounds import Posterior, kl_to_normal

D, RANK, KAPPA = 6, 3, 5
VARIANCES = np.array([4.0, 2.0, 0.7])


def low_rank(rows=50):
    """Rows `[N, D]` whose covariance has exactly these variances and no others, about a mean that is not zero."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(rows, RANK))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(rows * VARIANCES)
    return z @ np.linalg.qr(rng.normal(size=(D, RANK)))[0].T + rng.normal(size=D)


def minimise(value, parameters):
    """The minimum that L-BFGS finds."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        result = value()
        result.backward()
        return result
    optimizer.step(closure)
    return value().item()


def affine_vae(gamma, **settings):
    torch.manual_seed(0)
    config = VAEConfig(latent_dim=KAPPA, hidden=(), likelihood="gaussian", gamma="fixed", variance=gamma, **settings)
    return VAE(config, (1, 1, D)).double()


def negative_elbo(system, x):
    """Its exact expectation for an affine decoder: −log p(x | z) is quadratic in z, and so has the same mean over the 2κ
    points μ ± √κ s_k e_k as over N(μ, diag s²)."""
    posterior = system.encode(x)
    steps = math.sqrt(KAPPA) * torch.diag_embed((0.5 * posterior.log_var).exp()).movedim(1, 0)
    z = torch.cat([posterior.mean + steps, posterior.mean - steps])
    log_px_z = system.likelihood.log_prob(system.decoder(z.flatten(0, 1)).view(len(z), *x.shape), x)
    return (kl_to_normal(posterior).sum(1) - log_px_z.mean(0)).mean()


def equation_3(system, x, gamma):
    """The energy as the paper has it, from the parameters of the networks, in NumPy; s² of the first row stands for all."""
    (encoder,), (decoder,) = ([m for m in part.modules() if isinstance(m, torch.nn.Linear)]
                              for part in (system.encoder, system.decoder))
    W_z, b_z, W_x, b_x = (p.detach().numpy() for m in (encoder, decoder) for p in (m.weight, m.bias))
    x = x.flatten(1).numpy()
    mean, s2 = x @ W_z[:KAPPA].T + b_z[:KAPPA], np.exp(x[0] @ W_z[KAPPA:].T + b_z[KAPPA:])
    error = np.square(x - mean @ W_x.T - b_x).sum(1) + (np.square(W_x) * s2).sum()
    return np.mean(error / gamma + D * np.log(gamma) + (s2 - np.log(s2)).sum() + np.square(mean).sum(1))


def ppca_nll(x, gamma):
    """Of a row, in nats, at the best W for a fixed γ: from the eigenvalues of the covariance (Tipping & Bishop 1999, §3.2)."""
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    kept = np.where(np.arange(D) < KAPPA, np.maximum(eigenvalues, gamma), gamma)
    return 0.5 * (D * np.log(2 * np.pi) + np.log(kept).sum() + (eigenvalues / kept).sum())


@pytest.mark.parametrize("gamma", [3.0, 1.0, 0.1, 1e-3])
def test_the_affine_vae_is_probabilistic_pca_at_every_fixed_variance(gamma):
    rows = low_rank()
    system, x = affine_vae(gamma), torch.from_numpy(rows).view(-1, 1, 1, D)
    minimum = minimise(lambda: negative_elbo(system, x), system.parameters())
    nll = ppca_nll(rows, gamma)
    assert minimum == pytest.approx(nll, abs=1e-6)
    assert equation_3(system, x, gamma) == pytest.approx(2 * nll - D * np.log(2 * np.pi) + KAPPA, abs=1e-4)
    log_w = system.log_weights(system.encode(x), x, 4, torch.Generator().manual_seed(0)).detach()
    np.testing.assert_allclose(log_w.mean(), -nll, atol=1e-3)  # q is the posterior: the bound is tight for every sample
    assert log_w.std(0).max() < 0.01
    # A dimension for each direction of more variance than γ, and N(0, 1) in the others.
    posterior = Posterior(*(t.detach() for t in system.encode(x)))
    used = VARIANCES[gamma < VARIANCES]
    expected = np.concatenate([np.sort(gamma / used), np.ones(KAPPA - len(used))])
    np.testing.assert_allclose(posterior.log_var.exp().sort(1).values, np.tile(expected, (len(x), 1)), rtol=1e-2)
    energy = posterior.mean.var(0, correction=0).sort(descending=True).values
    np.testing.assert_allclose(energy, np.concatenate([1 - gamma / used, np.zeros(KAPPA - len(used))]), atol=1e-3)


def penalised(h):
    """Reconstruction error 1/(dn) ‖X − W Z‖² and energies 1/n ‖z_k‖² `[κ]` at a minimum of Eq. 6 with h(u + ε).

    W has orthonormal columns, without which Z could shrink at no cost; the encoder is linear. ε falls from 1 to 1e-8, each
    minimum the start of the next: the homotopy of the paper's §5.
    """
    x = torch.from_numpy(low_rank())
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(0)
    free, encoder = (torch.randn(D, KAPPA, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))

    def parts():
        q, r = torch.linalg.qr(free)
        z, w = x @ encoder, q * r.diagonal().sign()  # the decomposition with a positive diagonal is continuous
        return (x - z @ w.T).square().mean(), z.square().mean(0)

    for smoothing in np.geomspace(1, 1e-8, 5):
        def value(smoothing=smoothing):
            error, energy = parts()
            return h(error + smoothing) + h(energy + smoothing).sum() / D
        minimise(value, [free, encoder])
    error, energy = parts()
    return error.item(), energy.detach().sort(descending=True).values.numpy()


@pytest.mark.parametrize("h", [torch.sqrt, torch.log])
def test_a_penalty_of_unbounded_gradient_keeps_as_many_dimensions_as_the_data_have(h):
    error, energy = penalised(h)
    assert error < 1e-5
    np.testing.assert_allclose(energy[:RANK], VARIANCES, rtol=1e-2)
    assert (energy[RANK:] < 1e-5).all()


def test_a_penalty_of_bounded_gradient_neither_prunes_nor_reconstructs():
    error, energy = penalised(lambda u: u)
    assert error == pytest.approx(VARIANCES.sum() / 4 / D, rel=1e-3)  # half of every signal is given up
    assert (energy > 0.01).all() and energy.sum() == pytest.approx(VARIANCES.sum() / 4, rel=1e-3)
