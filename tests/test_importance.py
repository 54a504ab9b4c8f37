"""Importance log-weights and bounds: values and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import math

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from scipy.special import logsumexp
from torch import Tensor

from latent_engine.kernels import (
    BackendError,
    explain,
    importance_bound,
    importance_log_weights,
    importance_objective,
    importance_weights,
    native,
)

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


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if interpreted(implementation):
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    inputs = samples(600, 50, 33, device=device)
    grad = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(device)
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


def test_half_precision_and_autocast_give_float32(implementation):
    backend, device = implementation
    inputs = samples(7, 5, 3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        z = inputs[0].to(dtype).requires_grad_()
        value = importance_objective(z, *inputs[1:], backend=backend)
        value.sum().backward()
        torch.testing.assert_close(value, importance_objective(z.detach().float(), *inputs[1:], backend="reference"))
        assert z.grad.dtype == dtype and value.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        value = importance_objective(inputs[0].bfloat16(), *inputs[1:], backend=backend)
        assert value.dtype == importance_bound(inputs[3].bfloat16(), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "groups": 2, "elbo_weight": 0.3}, {"alpha": 2.0}, {"alpha": 1.0},
                                     {"alpha": 0.999}],
                         ids=str)
def test_gradcheck_once_and_twice(backend, options):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    leaves = [t.requires_grad_() for t in samples(4, 2, 3, torch.float64)]
    log_pz = leaves[3].detach().clone().requires_grad_()
    for function, args in ((lambda *a: importance_objective(*a, backend=backend, **options), (*leaves, log_pz)),
                           (lambda *a: importance_objective(*a, backend=backend, **options), leaves),
                           (lambda x: importance_bound(x, backend=backend, **options), (log_pz,)),
                           (lambda *a: importance_log_weights(*a, backend=backend), leaves)):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


def test_double_backward_where_one_argument_is_computed_from_another():
    z, mu, log_var, _ = samples(4, 2, 3, torch.float64)
    z = z.requires_grad_()

    def f(z):
        return importance_objective(z, mu, log_var, -z.square().sum(-1))

    assert torch.autograd.gradcheck(f, z)
    assert torch.autograd.gradgradcheck(f, z)
    (once,) = torch.autograd.grad(f(z).sum(), z)
    (kept,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    torch.testing.assert_close(once, kept)


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


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    inputs = [t.requires_grad_(grad) for t in samples(6, 5, 3)]
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, None, 0.0, 0.0, 2, grad))
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, inputs[3].detach().clone(), 0.5, 0.25, 1, grad))
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, None, 0.0, 0.0, 0, grad))
    torch.library.opcheck(ops.importance_fwd.default, (None, None, None, inputs[3], None, -math.inf, 0.0, 1, grad))
    detached = [t.detach() for t in inputs[:3]]
    weights = torch.rand(6, 5)
    for upstream, need_z, need_posterior in ((torch.ones(5), True, True), (None, True, False), (torch.ones(5), False, True)):
        torch.library.opcheck(ops.importance_bwd.default, (upstream, weights, *detached, True, need_z, need_posterior))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(z, mu, log_var, log_px):
        objective = importance_objective(z.tanh(), mu, log_var, log_px, estimator="stl", alpha=0.5)
        return (2 * objective + importance_bound(importance_log_weights(z, mu, log_var, log_px))).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for S in (17, 18):
        leaves = [t.requires_grad_() for t in samples(S, 5, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_transforms():
    inputs = samples(4, 5, 3)
    grads = torch.func.grad(lambda z: importance_objective(z, *inputs[1:]).sum())(inputs[0])
    torch.testing.assert_close(grads, run(inputs, torch.ones(5))[1])
    with pytest.raises(NotImplementedError, match=r"vmap is not supported; loop over the batches, or use backend='reference'"):
        torch.func.vmap(importance_bound)(torch.zeros(2, 4, 5))


def test_explain_names_the_backends():
    inputs = samples(4, 5, 3)
    for op in (importance_objective, importance_log_weights):
        assert set(explain(op, *inputs)) == {"cpp", "cuda", "triton", "reference"}
    assert explain(importance_bound, inputs[3].to("meta"))["reference"] == "chosen"


GOOD = {"z": torch.zeros(4, 3, 2), "mu": torch.zeros(3, 2), "log_var": torch.zeros(3, 2), "log_px": torch.zeros(4, 3)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"z": torch.zeros(3, 2)}, ValueError, r"z must have shape \[S, N, D\], given \[3, 2\]"),
    ({"mu": torch.zeros(3, 1)}, ValueError, r"mu must have shape \[N, D\] as in z\[S, N, D\] = \[3, 2\], given \[3, 1\]"),
    ({"log_var": torch.zeros(2)}, ValueError, r"log_var must have shape .* given \[2\]"),
    ({"log_px": torch.zeros(3, 4)}, ValueError, r"log_px must have shape \[S, N\] .* = \[4, 3\], given \[3, 4\]"),
    ({"log_pz": torch.zeros(4)}, ValueError, r"log_pz must have shape \[S, N\] .* given \[4\]"),
    ({"z": [[0.0]]}, TypeError, "z must be a tensor, given list"),
    ({"z": torch.zeros(4, 3, 2, dtype=torch.int64)}, TypeError, "z is torch.int64 but mu is torch.float32"),
    ({"log_px": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "log_px is torch.float64 but mu is torch.float32"),
    ({"mu": torch.zeros(3, 2, dtype=torch.float64), "log_px": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError,
     "z is torch.float32 but mu is torch.float64"),
    ({**{k: t.double() for k, t in GOOD.items()}, "log_px": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError,
     "log_px is torch.bfloat16 but mu is torch.float64"),
    ({"log_pz": 0.0}, TypeError, "log_pz must be a tensor, given float"),
    ({"z": torch.zeros(4, 3, 2, device="meta")}, ValueError, "z is on meta but mu is on cpu"),
    ({"z": torch.zeros(0, 3, 2), "log_px": torch.zeros(0, 3)}, ValueError, "a bound needs at least one sample, given S = 0"),
    ({"alpha": math.nan}, ValueError, "alpha must be a number or ±inf, given nan"),
    ({"alpha": "max"}, ValueError, "alpha must be a number or ±inf, given 'max'"),
    ({"groups": 3}, ValueError, "groups must divide the S = 4 samples, given 3"),
    ({"groups": 0}, ValueError, "groups must divide the S = 4 samples, given 0"),
    ({"elbo_weight": "half"}, ValueError, r"elbo_weight must lie in \[0, 1\], given 'half'"),
    ({"elbo_weight": 1.5}, ValueError, r"elbo_weight must lie in \[0, 1\], given 1.5"),
    ({"estimator": "vimco"}, ValueError, "estimator must be one of iwae, stl, dreg, piwae, given 'vimco'"),
    ({"estimator": "dreg", "alpha": -math.inf}, ValueError, "estimator='dreg' needs a finite alpha, given -inf; use 'stl'"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "importance_objective: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    if changes.get("backend") == "cuda" and torch.cuda.is_available():
        message = "serves cuda tensors, given a cpu tensor"
    with pytest.raises(error, match=message):
        importance_objective(**{**GOOD, **changes})


def test_mistakes_of_the_bound():
    with pytest.raises(ValueError, match=r"log_w must have shape \[S, ...\], given a scalar"):
        importance_bound(torch.zeros(()))
    with pytest.raises(ValueError, match=r"importance_weights: log_w must have shape \[S, ...\], given a scalar"):
        importance_weights(torch.zeros(()))
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="importance_weights: a bound needs at least one sample, given S = 0"):
            importance_weights(torch.zeros(0, 3), alpha)
    with pytest.raises(ValueError, match="importance_weights: alpha must be a number or ±inf, given nan"):
        importance_weights(torch.zeros(4, 3), math.nan)
    with pytest.raises(TypeError, match=r"log_w must be a floating-point tensor, given torch.int64"):
        importance_bound(torch.zeros(3, 2, dtype=torch.int64))
