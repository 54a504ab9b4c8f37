"""Gradient estimators: formulas sample by sample, expectations in a linear-Gaussian model with exact answers."""

import math

import pytest
import torch
from torch import Tensor

from latent_engine.kernels import importance_objective, importance_weights

BACKENDS = ("reference", None)
ALPHAS = (0.0, 0.5, -1.0, 1.0)


def model(S: int, N: int = 3, D: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x | z ~ N(z θ, I) with an encoder (mu, log_var) for each data point, and noise for its samples."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    return {"x": draw(N, 4), "theta": draw(D, 4), "mu": 0.5 * draw(N, D), "log_var": 0.3 * draw(N, D) - 1,
            "noise": draw(S, N, D)}


def log_likelihood(x: Tensor, z: Tensor, theta: Tensor) -> Tensor:
    return -0.5 * ((x - z @ theta).square() + math.log(2 * math.pi)).sum(-1)


def gradients(m: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Value and gradients of the summed objective, as in a training step."""
    theta, mu, log_var = (m[k].detach().requires_grad_() for k in ("theta", "mu", "log_var"))
    z = mu + (0.5 * log_var).exp() * m["noise"]
    value = importance_objective(z, mu, log_var, log_likelihood(m["x"], z, theta), **options)
    grads = torch.autograd.grad(value.sum(), (theta, mu, log_var))
    return dict(zip(("value", "theta", "mu", "log_var"), (value.detach(), *grads), strict=True))


def by_hand(m: dict[str, Tensor], decoder: Tensor, path: Tensor, direct: Tensor) -> dict[str, Tensor]:
    """Σ_s decoder_s ∂θ log w_s, and Σ_s path_s ∂z log w_s · ∂φ z − direct_s ∂φ log q(z_s), without autograd."""
    sigma = (0.5 * m["log_var"]).exp()
    z = m["mu"] + sigma * m["noise"]
    residual = m["x"] - z @ m["theta"]
    score = residual @ m["theta"].T - z + m["noise"] / sigma  # ∂z log w
    return {"theta": torch.einsum("sn,snd,snp->dp", decoder, z, residual),
            "mu": (path[..., None] * score - direct[..., None] * m["noise"] / sigma).sum(0),
            "log_var": 0.5 * (path[..., None] * score * m["noise"] * sigma - direct[..., None] * (m["noise"] ** 2 - 1)).sum(0)}


def log_weights(m: dict[str, Tensor]) -> Tensor:
    sigma = (0.5 * m["log_var"]).exp()
    z = m["mu"] + sigma * m["noise"]
    log_q = torch.distributions.Normal(m["mu"], sigma).log_prob(z).sum(-1)
    return log_likelihood(m["x"], z, m["theta"]) + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - log_q


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_formulas_of_iwae_stl_and_dreg(backend, alpha):
    m = model(6)
    w = importance_weights(log_weights(m), alpha)
    none = torch.zeros_like(w)
    assert_gradients(gradients(m, alpha=alpha, backend=backend), by_hand(m, w, w, w))
    assert_gradients(gradients(m, alpha=alpha, estimator="stl", backend=backend), by_hand(m, w, w, none))
    dreg = alpha * w + (1 - alpha) * w**2
    assert_gradients(gradients(m, alpha=alpha, estimator="dreg", backend=backend), by_hand(m, w, dreg, none))


@pytest.mark.parametrize("backend", BACKENDS)
def test_formulas_of_miwae_ciwae_and_piwae(backend):
    m = model(6)
    log_w = log_weights(m)
    w = importance_weights(log_w)
    groups = torch.cat([importance_weights(part) for part in log_w.split(3)])
    none = torch.zeros_like(w)
    assert_gradients(gradients(m, groups=2, backend=backend), by_hand(m, groups / 2, groups / 2, groups / 2))
    mixed = 0.3 / 6 + 0.7 * w
    assert_gradients(gradients(m, elbo_weight=0.3, backend=backend), by_hand(m, mixed, mixed, mixed))
    piwae = gradients(m, groups=2, estimator="piwae", backend=backend)
    assert_gradients(piwae, by_hand(m, w, groups / 2, groups / 2))
    torch.testing.assert_close(piwae["value"], gradients(m, backend=backend)["value"])
    both = gradients(m, groups=2, elbo_weight=0.3, estimator="dreg", backend=backend)
    assert_gradients(both, by_hand(m, 0.05 + 0.35 * groups, 0.05 + 0.35 * groups**2, none))


def test_gradient_of_iwae_has_normalised_weights():
    """The survey "Generative Models", Eq. 22, prints the mean of ∂ log w, which is the ELBO's gradient."""
    m = model(6)
    uniform = torch.full((6, 3), 1 / 6, dtype=torch.float64)
    printed = by_hand(m, uniform, uniform, uniform)
    assert_gradients(gradients(m, alpha=1.0), printed)
    iwae = gradients(m)
    for name, value in printed.items():
        assert (iwae[name] - value).norm() > 0.1 * value.norm()
    step = 1e-6  # the finite difference of the bound itself
    moved = dict(m, theta=m["theta"].clone())
    moved["theta"][0, 0] += step
    slope = (gradients(moved)["value"].sum() - iwae["value"].sum()) / step
    assert slope.item() == pytest.approx(iwae["theta"][0, 0].item(), rel=1e-4)


def test_prior_with_parameters_gets_the_decoders_weights():
    m = model(6)
    centre = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    mu = m["mu"].clone().requires_grad_()
    z = mu + (0.5 * m["log_var"]).exp() * m["noise"]
    log_pz = torch.distributions.Normal(centre, 1.0).log_prob(z).sum(-1)
    log_q = torch.distributions.Normal(m["mu"], (0.5 * m["log_var"]).exp()).log_prob(z).sum(-1)
    log_px = log_likelihood(m["x"], z, m["theta"])
    w = importance_weights((log_px + log_pz - log_q).detach())
    importance_objective(z, mu, m["log_var"], log_px, log_pz, estimator="dreg").sum().backward()
    torch.testing.assert_close(centre.grad, (w * (z - centre).sum(-1)).sum().detach())


def exact_posterior(m: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The model with orthogonal rows in θ, so that its posterior is diagonal, as encoder; log p(x) and its gradient."""
    q, _ = torch.linalg.qr(m["theta"].T)
    theta = (q * torch.tensor([1.5, 0.7], dtype=q.dtype)).T.contiguous().requires_grad_()
    precision = 1 + theta.square().sum(1)
    mu = (m["x"] @ theta.T) / precision
    covariance = torch.eye(4, dtype=q.dtype) + theta.T @ theta
    log_px = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=q.dtype), covariance).log_prob(m["x"])
    (slope,) = torch.autograd.grad(log_px.sum(), theta)
    encoder = {"theta": theta.detach(), "mu": mu.detach(), "log_var": (-precision.log()).detach().expand(mu.shape)}
    return {**m, **encoder}, log_px.detach(), slope


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg", "piwae"])
def test_exact_posterior_gives_the_exact_likelihood(estimator):
    """All weights are equal: every bound is log p(x), and STL and DReG have a gradient of exactly zero for the encoder."""
    S = 4000
    m, log_px, slope = exact_posterior(model(S))
    result = gradients(m, estimator=estimator, groups=4)
    torch.testing.assert_close(result["value"], log_px, rtol=1e-12, atol=1e-12)
    z = m["mu"] + (0.5 * m["log_var"]).exp() * m["noise"]
    each = torch.einsum("snd,snp->sdp", z, m["x"] - z @ m["theta"])  # one sample's gradient of θ
    assert ((result["theta"] - slope).abs() <= 5 * each.std(0) / math.sqrt(S)).all()
    for name in ("mu", "log_var"):
        limit = 1e-12 if estimator in ("stl", "dreg") else 5 * 2 / math.sqrt(S)
        assert result[name].abs().max() <= limit


def replicates(estimator: str, R: int, S: int, **options) -> dict[str, Tensor]:
    """Gradients of `R` independent replicates of one data point."""
    one = model(1, N=1, seed=3)
    noise = torch.randn(S, R, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    m = {"x": one["x"].expand(R, 4), "theta": one["theta"], "mu": one["mu"].expand(R, 2),
         "log_var": one["log_var"].expand(R, 2), "noise": noise}
    return gradients(m, estimator=estimator, **options)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"groups": 2}, {"elbo_weight": 0.4}], ids=str)
def test_dreg_has_the_expectation_of_the_plain_gradient_and_less_variance(options):
    R, S = 40_000, 4
    plain, dreg = (replicates(estimator, R, S, **options) for estimator in ("iwae", "dreg"))
    torch.testing.assert_close(dreg["theta"], plain["theta"])
    for name in ("mu", "log_var"):
        difference = dreg[name] - plain[name]
        assert (difference.mean(0).abs() <= 4.5 * difference.std(0) / math.sqrt(R)).all()
    assert (dreg["mu"].var(0) < plain["mu"].var(0)).all()


def test_stl_is_unbiased_for_one_sample_and_biased_for_several():
    R = 40_000
    for options, biased in (({"alpha": 1.0}, False), ({}, True)):
        plain, stl = (replicates(estimator, R, 4, **options) for estimator in ("iwae", "stl"))
        difference = stl["log_var"] - plain["log_var"]
        errors = difference.mean(0).abs() / (difference.std(0) / math.sqrt(R))
        assert (errors > 10).all() if biased else (errors <= 4.5).all()


def test_underflowed_weights_leave_finite_gradients():
    for estimator in ("dreg", "piwae"):
        m = model(6, dtype=torch.float32)
        m["noise"][4] *= 40
        result = gradients(m, estimator=estimator, groups=2)
        assert all(g.isfinite().all() for g in result.values())


@pytest.mark.parametrize("gap", [60, 86, 90, 95, 103, 110])
def test_piwae_where_weights_of_a_group_are_not_normal_numbers(gap):
    """The quotient of encoder's and decoder's weight overflows from there on."""
    m = model(6, dtype=torch.float32)
    behind = torch.tensor([0.0, gap]).repeat_interleave(3)[:, None]
    found = []
    for backend in BACKENDS:
        mu = m["mu"].detach().requires_grad_()
        z = mu + m["noise"]
        log_px = log_likelihood(m["x"], z, m["theta"]) - behind
        value = importance_objective(z, mu, torch.zeros_like(mu), log_px, estimator="piwae", groups=2, backend=backend)
        found += torch.autograd.grad(value.sum(), mu)
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_hook_serves_a_leaf_and_none_is_left_without_gradients():
    m = model(5)
    z = (m["mu"] + m["noise"]).requires_grad_()
    mu = m["mu"].requires_grad_()
    log_px = log_likelihood(m["x"], z, m["theta"])
    importance_objective(z, mu, m["log_var"], log_px, estimator="dreg").sum().backward()
    assert z.grad.isfinite().all() and mu.grad is None
    frozen = z.detach().clone().requires_grad_()  # an encoder without gradients of its own
    log_px = log_likelihood(m["x"], frozen, m["theta"])
    importance_objective(frozen, mu.detach(), m["log_var"], log_px, estimator="piwae").sum().backward()
    assert frozen.grad.isfinite().all()
    with torch.no_grad():
        importance_objective(z, mu, m["log_var"], log_px, estimator="dreg")
    assert not z._backward_hooks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["dreg", "piwae"])
def test_calls_on_one_leaf_do_not_scale_each_others_gradients(estimator, backend):
    m = model(6)
    z = (m["mu"] + m["noise"]).requires_grad_()

    def objective(name, shift=0.0):
        log_px = log_likelihood(m["x"] + shift, z, m["theta"])
        groups = 1 if name == "stl" else 2
        return importance_objective(z, m["mu"], m["log_var"], log_px, estimator=name, groups=groups, backend=backend).sum()

    def gradient(value, **options):
        return torch.autograd.grad(value, z, **options)[0]

    first, plain = gradient(objective(estimator)), gradient(objective("stl"))
    assert (first - plain).norm() > 1e-3 * plain.norm()
    kept, other = objective(estimator), objective(estimator, shift=1.0)
    moved = gradient(other)
    assert torch.equal(gradient(kept, retain_graph=True), first) and torch.equal(gradient(kept), first)
    assert torch.equal(gradient(objective("stl")), plain) and torch.equal(gradient(z.sum()), torch.ones_like(z))
    assert torch.equal(gradient(objective(estimator, shift=1.0)), moved)
    del kept, other
    assert not z._backward_hooks


def test_routed_estimators_refuse_to_be_compiled():
    m = model(4)
    args = (m["noise"].requires_grad_(), m["mu"], m["log_var"], m["noise"].sum(-1).detach())
    compiled = torch.compile(lambda *a: importance_objective(*a, estimator="dreg"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"hooks the gradient of z, which torch.compile does not trace"):
        compiled(*args)
