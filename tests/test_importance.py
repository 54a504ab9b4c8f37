"""Importance log-weights and bounds: values and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import math

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from scipy.special import logsumexp
from torch import Tensor

from latent_engine.kernels import importance_bound, importance_log_weights, importance_objective, importance_weights

from oracles import assert_within_budget, longdouble
from oracles import importance as oracle

NAMES = ("z", "mu", "log_var", "log_px")
# S, N, D: ones, primes, whole and broken groups of lanes, several blocks and chunks
SIZES = [(1, 1, 1), (3, 2, 1), (5, 17, 3), (8, 4, 16), (50, 20, 50), (13, 67, 33), (7, 130, 2), (301, 5, 17), (2, 3, 64)]
OPTIONS = [{}, {"alpha": 1.0}, {"alpha": 0.5}, {"alpha": -2.0}, {"alpha": 3.0}, {"alpha": -math.inf}, {"alpha": math.inf},
           {"groups": 4}, {"elbo_weight": 0.3}, {"alpha": 0.5, "groups": 2, "elbo_weight": 0.7}]


def samples(S: int, N: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Samples of posteriors, and log-likelihoods of a spread that leaves several weights."""
    g = torch.Generator().manual_seed(seed)
    mu, log_var = torch.randn(N, D, generator=g), torch.randn(N, D, generator=g) - 1
    z = mu + torch.exp(0.5 * log_var) * torch.randn(S, N, D, generator=g)
    return [t.to(device, dtype) for t in (z, mu, log_var, torch.randn(S, N, generator=g) - 90)]


def run(inputs: list[Tensor], grad: Tensor | None, function=importance_objective, **options) -> list[Tensor]:
    """The value and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = function(*leaves, **options)
    return [value.detach()] if grad is None else [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def check(inputs: list[Tensor], backend: str, **options) -> None:
    """Bound, log-weights and gradients of `backend` are within the error budget."""
    grad = torch.randn(inputs[1].shape[0], generator=torch.Generator().manual_seed(1)).to(inputs[1])
    results = []
    for name in (backend, "reference"):
        value, *grads = run(inputs, grad, backend=name, **options)
        results.append([value, importance_log_weights(*inputs, backend=name), *grads[:4]])
    exact, scales = oracle.exact(*inputs, grad=grad, **options)
    for name, a, d, e, s in zip(oracle.NAMES, *results, exact, scales, strict=True):
        assert_within_budget(name, a, d, e, s)
    if len(inputs) == 5:
        assert torch.equal(grads[4], grads[3]), "log p(z) enters as log p(x|z) does"


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


def interpreted(implementation: tuple[str, str]) -> bool:
    return implementation == ("triton", "cpu")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "S{}-N{}-D{}".format(*s))
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    if interpreted(implementation) and size[0] * size[1] > 300:
        pytest.skip("the interpreter is slow; test_gpu_importance.py has such shapes")
    for dtype in dtypes_of(backend):
        inputs = samples(*size, dtype, device)
        check(inputs, backend)
        check([*inputs, inputs[3] + 80], backend)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "iwae")
def test_every_bound(implementation, options):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(samples(8, 19, 5, dtype, device), backend, **options)
        check(samples(64, 3, 5, dtype, device), backend, **options)


def test_reference_is_the_formula():
    for dtype in (torch.float32, torch.float64):
        for options in OPTIONS:
            check(samples(8, 3, 2, dtype), "reference", **options)


@pytest.mark.parametrize("alpha", [0.9, 0.999, 1 - 1e-5, 1 - 1e-7, 1 - 1e-15, 1 + 1e-9, 1.5], ids=str)
def test_bounds_next_to_the_elbo(implementation, alpha):
    """The logarithm of a mean next to 1, over 1 − α, is off by eps / |1 − α|."""
    backend, device = implementation
    g = torch.Generator().manual_seed(0)
    outliers = torch.zeros(99, 2)
    outliers[7] = torch.tensor([100.0, -100.0])
    for log_w in (3 * torch.randn(100, 5, generator=g), torch.randn(1100, 23, generator=g) - 90, outliers):
        for dtype in dtypes_of(backend):
            x = log_w.to(device, dtype)
            for groups in (1, 11):
                x = x[:len(x) // groups * groups]
                exact, weights = oracle.bound_and_weights(longdouble(x), alpha, 0.0, groups)
                scale = (weights * abs(longdouble(x))).sum(0)
                direct = importance_bound(x, alpha, groups=groups, backend="reference")
                assert_within_budget("reference", direct, torch.from_numpy(exact.astype(float)).to(x), exact, scale)
                assert_within_budget("bound", importance_bound(x, alpha, groups=groups, backend=backend), direct, exact, scale)


def test_log_weights_agree_with_torch_distributions_and_bounds_with_scipy(implementation):
    backend, device = implementation
    z, mu, log_var, log_px = inputs = samples(12, 5, 3, device=device)
    normal = torch.distributions.Normal
    log_q = normal(mu, (0.5 * log_var).exp()).log_prob(z).sum(-1)
    log_w = importance_log_weights(*inputs, backend=backend)
    torch.testing.assert_close(log_w, log_px + normal(0, 1).log_prob(z).sum(-1) - log_q, rtol=1e-5, atol=1e-5)
    iwae = logsumexp(log_w.double().cpu().numpy(), axis=0) - math.log(12)
    np.testing.assert_allclose(importance_bound(log_w, backend=backend).cpu(), iwae, rtol=1e-6)
    np.testing.assert_allclose(importance_bound(log_w, 0.25, backend=backend).cpu(),
                               (logsumexp(0.75 * log_w.double().cpu().numpy(), axis=0) - math.log(12)) / 0.75, rtol=1e-6)


def test_gradient_of_log_weights(implementation):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        inputs = samples(9, 7, 21, dtype, device)
        grad = torch.randn(9, 7, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        actual = run(inputs, grad, importance_log_weights, backend=backend)
        direct = run(inputs, grad, importance_log_weights, backend="reference")
        exact = run([t.double() for t in inputs], grad.double(), importance_log_weights, backend="reference")
        for name, a, d, e in zip(("value", *NAMES), actual, direct, exact, strict=True):
            assert_within_budget(name, a, d, longdouble(e))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "iwae")
def test_objective_is_the_bound_of_the_log_weights(implementation, options):
    backend, device = implementation
    inputs = samples(8, 6, 3, device=device)
    objective = importance_objective(*inputs, backend=backend, **options)
    log_w = importance_log_weights(*inputs, backend=backend).requires_grad_()
    assert torch.equal(objective, importance_bound(log_w.detach(), backend=backend, **options))
    importance_bound(log_w, backend=backend, **options).sum().backward()
    _, weights = oracle.bound_and_weights(longdouble(log_w), *(options.get(k, d) for k, d in (
        ("alpha", 0.0), ("elbo_weight", 0.0), ("groups", 1))))
    np.testing.assert_allclose(log_w.grad.cpu(), weights.astype(float), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("N", [1, 2, 5, 7, 13, 15, 20, 64, 65, 100])
def test_narrow_and_wide_rows_of_log_weights(implementation, N):
    """Several narrow rows share a vector, the last of them padded."""
    backend, device = implementation
    for S in (1, 2, 63, 64, 129):
        log_w = (5 * torch.randn(S, N, generator=torch.Generator().manual_seed(S)) - 90).to(device).requires_grad_()
        bound = importance_bound(log_w, backend=backend)
        (grad,) = torch.autograd.grad(bound.sum(), log_w)
        value, weights = oracle.bound_and_weights(longdouble(log_w), 0.0, 0.0, 1)
        np.testing.assert_allclose(bound.detach().cpu(), value.astype(float), rtol=4e-7)
        np.testing.assert_allclose(grad.cpu(), weights.astype(float), rtol=4e-6, atol=1e-30)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0], "transposed": lambda t: t.mT.contiguous().mT,
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    check([make(t) for t in samples(9, 11, 6, device=device)], backend)


@pytest.mark.parametrize("size", [(3, 0, 2), (3, 2, 0), (1, 0, 0)], ids=lambda s: "S{}-N{}-D{}".format(*s))
def test_empty_sizes(implementation, size):
    backend, device = implementation
    inputs = samples(*size, device=device)
    for a, e in zip(*(run(inputs, torch.ones(size[1], device=device), backend=b) for b in (backend, "reference")), strict=True):
        torch.testing.assert_close(a, e)


def test_weights_of_zero_and_points_without_any(implementation):
    backend, device = implementation
    inputs = samples(6, 4, 3, device=device)
    inputs[3][2, 1] = -torch.inf
    inputs[3][:, 3] = -torch.inf
    value, dz, dmu, dlog_var, dlog_px = run(inputs, torch.ones(4, device=device), backend=backend)
    assert value[3] == -torch.inf and value[:3].isfinite().all()
    assert all(g.isfinite().all() for g in (dz, dmu, dlog_var, dlog_px))
    assert dlog_px[2, 1] == 0 and (dlog_px[:, 3] == 0).all() and (dz[:, 3] == 0).all()
    torch.testing.assert_close(dlog_px[:, :3].sum(0), torch.ones(3, device=device))
    log_w = torch.tensor([[0.0, -torch.inf, torch.inf], [1.0, 2.0, 0.0]], device=device)
    for alpha, expected in ((-math.inf, [1.0, 2.0, torch.inf]), (1.0, [0.5, -torch.inf, torch.inf]),
                            (2.0, [-math.log((1 + math.exp(-1)) / 2), -torch.inf, math.log(2)]),
                            (0.0, [math.log((1 + math.e) / 2), 2 - math.log(2), torch.inf])):
        torch.testing.assert_close(importance_bound(log_w, alpha, backend=backend), torch.tensor(expected, device=device))


def test_nan_reaches_only_its_data_point(implementation):
    backend, device = implementation
    for options in OPTIONS[:2] if interpreted(implementation) else OPTIONS:
        for which, at in ((0, (3, 2, 1)), (1, (2, 0)), (2, (2, 4)), (3, (5, 2))):
            inputs = samples(8, 5, 6, device=device)
            inputs[which][at] = torch.nan
            value, dz, dmu, dlog_var, dlog_px = run(inputs, torch.ones(5, device=device), backend=backend, **options)
            others = torch.arange(5, device=device) != 2
            assert value[2].isnan() and value[others].isfinite().all()
            assert dz[:, others].isfinite().all() and dlog_px[:, others].isfinite().all()
            assert dmu[others].isfinite().all() and dlog_var[others].isfinite().all()


def test_huge_spreads_and_extreme_posteriors_stay_exact(implementation):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        z, mu, log_var, log_px = samples(8, 6, 4, dtype, device)
        log_px = 1e4 * log_px
        mu[0], z[:, 1] = 1e3, mu[1]
        log_var[2], log_var[3] = 30.0, -30.0
        z[:, 3] = mu[3] + torch.exp(0.5 * log_var[3]) * torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).to(z)
        for options in ({}, {"alpha": 0.5}, {"alpha": 2.0}, {"groups": 4}):
            check([z, mu, log_var, log_px], backend, **options)


def test_one_sample_is_its_own_bound(implementation):
    backend, device = implementation
    log_w = samples(1, 9, 3, device=device)[3]
    for alpha in (0.0, 1.0, 0.5, -3.0, 4.0, math.inf, -math.inf):
        torch.testing.assert_close(importance_bound(log_w, alpha, backend=backend), log_w[0], rtol=2e-7, atol=0)


def test_invariances_and_order_of_bounds(implementation):
    backend, device = implementation
    log_w = (3 * torch.randn(12, 50, generator=torch.Generator().manual_seed(0))).to(device)
    bound = lambda x, *args, **kw: importance_bound(x, *args, backend=backend, **kw)  # noqa: E731
    torch.testing.assert_close(bound(log_w + 100), bound(log_w) + 100, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(bound(log_w.flip(0)), bound(log_w))
    alphas = (-math.inf, -5.0, -0.5, 0.0, 0.5, 1.0, 2.0, math.inf)
    bounds = torch.stack([bound(log_w, alpha) for alpha in alphas])
    assert (bounds[:-1] >= bounds[1:] - 1e-5).all(), "Rényi bounds fall with alpha"
    elbo, iwae = bound(log_w, 1.0), bound(log_w)
    miwae = bound(log_w, groups=3)
    assert ((elbo <= miwae) & (miwae <= iwae)).all()
    torch.testing.assert_close(bound(log_w, groups=12), elbo)
    torch.testing.assert_close(bound(log_w, elbo_weight=0.25), 0.25 * elbo + 0.75 * iwae)
    # IW_S is at least the mean over its subsets of S − 1: so IW_{S−1} ≤ IW_S in expectation
    kept = torch.stack([bound(torch.cat((log_w[:s], log_w[s + 1:]))) for s in range(12)]).mean(0)
    assert (kept <= iwae + 1e-5).all()


def test_only_needed_gradients(implementation):
    backend, device = implementation
    inputs = samples(6, 5, 3, device=device)
    inputs.append(inputs[3] + 80)
    full = run(inputs, torch.ones(5, device=device), backend=backend)[1:]
    for i in range(5):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        importance_objective(*leaves, backend=backend).sum().backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(5)]
        torch.testing.assert_close(leaves[i].grad, full[i])


@pytest.mark.parametrize("size", [(600, 50, 33), (3, 2503, 33), (13, 1201, 33)], ids=lambda s: "S{}-N{}-D{}".format(*s))
def test_same_bits_every_time_at_any_number_of_threads(implementation, size):
    backend, device = implementation
    if interpreted(implementation):
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    inputs = samples(*size, device=device)
    grad = torch.randn(size[1], generator=torch.Generator().manual_seed(1)).to(device)
    first = same_at_any_threads(lambda: run(inputs, grad, backend=backend))
    expected = run([t.double() for t in inputs], grad.double(), backend="reference")
    for name, a, e in zip(("value", *NAMES), first, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


def test_gradients_too_large_for_the_cache(implementation):
    backend, device = implementation
    if interpreted(implementation):
        pytest.skip("the interpreter is too slow for large sizes")
    inputs = samples(1100, 64, 64, device=device)  # 18 MB
    grad = torch.ones(64, device=device)
    outputs = run(inputs, grad, backend=backend)
    expected = run([t.double() for t in inputs], grad.double(), backend="reference")
    for name, a, e in zip(("value", *NAMES), outputs, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64) for options in OPTIONS[:3]
        for t in run(samples(*size, dtype), torch.ones(size[1], dtype=dtype), backend="cpp", **options)])


def test_normalised_weights():
    log_w = samples(6, 5, 2, torch.float64)[3]
    log_w[:, 4] = -torch.inf
    for alpha in (0.0, 0.5, 1.0, -math.inf):
        weights = importance_weights(log_w, alpha)
        expected = oracle.bound_and_weights(longdouble(log_w[:, :4]), alpha, 0.0, 1)[1]
        np.testing.assert_allclose(weights[:, :4], expected.astype(float), rtol=1e-12)
    assert (importance_weights(log_w)[:, 4] == 0).all()
    leaf = log_w[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(importance_weights, leaf)


def test_leading_shapes_of_log_weights():
    log_w = samples(6, 24, 1)[3]
    flat = importance_bound(log_w)
    assert torch.equal(importance_bound(log_w.reshape(6, 2, 3, 4)), flat.reshape(2, 3, 4))
    assert torch.equal(importance_bound(log_w[:, 0]), flat[0])
    assert importance_bound(log_w[:, :0].reshape(6, 2, 0)).shape == (2, 0)
