"""The balance monitor on linear models whose balance is known."""

from types import SimpleNamespace

import pytest
import torch

from latent_engine.balance import balance, verdict
from latent_engine.bounds import Posterior, kl_to_normal

from oracles.linear_gaussian import LinearGaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_model_of_its_own_data_is_balanced():
    """Rank 2 data, 5 dimensions: the exact posterior uses two, and their aggregate is the prior."""
    system = LinearGaussian([3.0, 2.0, 1e-4, 1e-4, 1e-4], variance=0.1).train()
    x = system.sample(400, generator(1))
    state = balance(system, x, generator())
    assert (state["active"], state["dimensions"]) == (2, 5)
    assert state["kl"] == pytest.approx(kl_to_normal(system.encode(x)).mean(0).tolist())
    assert state["gamma"] == pytest.approx(0.1) and abs(state["mmd2"]) < 0.01
    assert state["verdict"].startswith("balanced: 2 of 5 dimensions are active and reconstruct 9")
    assert system.training and system.weight.grad is None


def test_explained_variance_is_that_of_the_decoded_means():
    system = LinearGaussian([1.0, 1.0], variance=0.5)
    x = system.sample(300, generator(1))
    residual = (x - system.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert balance(system, x)["explained"] == pytest.approx(1 - residual.item())


def test_the_gradient_is_that_of_the_joint_density_at_z():
    """−∇ log p(x, z) = z − Wᵀ(x − b − W z)/γ."""
    system = LinearGaussian([2.0, 0.5], shift=0.4, log_scale=0.1)
    x = system.sample(50, generator(1))
    mean, log_var = system.encode(x)
    z = mean + (0.5 * log_var).exp() * torch.randn(1, 50, 2, generator=generator(), dtype=torch.float64)[0]
    expected = z - (x.flatten(1) - system.bias - z @ system.weight.T) @ system.weight / system.variance
    assert balance(system, x, generator())["gradient"] == pytest.approx(expected.norm(dim=1).mean().item())


def test_too_few_or_unused_dimensions_are_over_regularised():
    full = LinearGaussian([2.0, 2.0, 2.0, 2.0], variance=0.01)
    x = full.sample(200, generator(1))
    narrow = LinearGaussian([2.0], variance=0.01)  # one direction of the four
    narrow.weight.data, narrow.bias = full.weight.data[:, :1].clone(), full.bias
    assert balance(narrow, x)["verdict"].startswith("over-regularised: 1 of 1 dimensions are active and reconstruct only 2")
    assert "more dimensions may help" in balance(narrow, x)["verdict"]
    collapsed = LinearGaussian([1e-3, 1e-3], variance=5.0)
    state = balance(collapsed, x)
    assert state["active"] == 0 and "a learned variance, skip connections or a weaker KL" in state["verdict"]


def test_an_autoencoder_without_regularisation_is_under_regularised():
    """The model of the data, but representations 20 times as large and without noise."""
    system = LinearGaussian([2.0, 1.0], variance=0.01)
    x = system.sample(200, generator(1))
    encode, decode = system.encode, system.decode
    system.encode = lambda x: Posterior(20 * encode(x).mean, torch.full((len(x), 2), -20.0, dtype=torch.float64))
    system.decode = lambda z: decode(z / 20)
    state = balance(system, x)
    assert state["verdict"].startswith("under-regularised: 2 of 2 dimensions are active and reconstruct 9")
    assert state["mmd2"] > 0.1


def test_likelihoods_without_a_variance_have_no_gamma():
    system = LinearGaussian([1.0])
    system.likelihood = SimpleNamespace()
    assert "gamma" not in balance(system, system.sample(20, generator(1)))


def test_verdicts_and_too_few_rows():
    assert verdict(0, 8, -0.2, 0.0).startswith("over-regularised: 0 of 8 dimensions are active and reconstruct only 0% of")
    assert verdict(5, 8, 0.9, 0.06).startswith("under-regularised") and verdict(5, 8, 0.9, 0.04).startswith("balanced")
    with pytest.raises(ValueError, match="two or more rows to compare, given 1"):
        balance(LinearGaussian([1.0]), torch.zeros(1, 1, 2, 3, dtype=torch.float64))
