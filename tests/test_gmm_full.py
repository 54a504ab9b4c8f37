"""gmm_full_log_prob and gmm_full_moments: every implementation against an 80-bit oracle, on odd inputs."""

import mixture_checks
import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, gmm_full_log_prob, gmm_full_moments, gmm_log_prob, native

from oracles import assert_within_budget
from oracles import gmm_full as oracle

NAMES = ("z", "means", "precision_cholesky", "log_weights")
# N, K, D: ones, primes, whole and broken tiles, more components than rows, and more dimensions than rows
SIZES = [(1, 1, 1), (3, 2, 1), (17, 5, 3), (33, 20, 2), (64, 7, 16), (5, 67, 4), (70, 13, 33), (300, 3, 9), (21, 3, 65)]


def mixture(N: int, K: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Points of a random mixture whose covariances overlap, and NaN below the diagonal of the factors."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(K, D, generator=g)
    near = means[torch.randint(max(K, 1), (N,), generator=g)] if K else torch.zeros(N, D)
    off = torch.randn(K, D, D, generator=g).triu(1) / max(D, 1) ** 0.5
    chol = off + torch.diag_embed((0.3 * torch.randn(K, D, generator=g)).exp())
    chol = chol.masked_fill(torch.ones(D, D, dtype=torch.bool).tril(-1), torch.nan)
    tensors = near + torch.randn(N, D, generator=g), means, chol, torch.randn(K, generator=g)
    return [t.to(device, dtype) for t in tensors]


def upper(covariance: Tensor) -> Tensor:
    """P, upper triangular, with P Pᵀ the inverse of the covariance."""
    return torch.linalg.inv(torch.linalg.cholesky(covariance)).mT.contiguous()


def run(inputs: list[Tensor], grad: Tensor | None, **options) -> list[Tensor]:
    """Log-density and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = gmm_full_log_prob(*leaves, **options)
    return [value.detach()] if grad is None else [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def outputs(inputs: list[Tensor], grad: Tensor, **options) -> list[tuple[str, Tensor]]:
    """All that the oracle gives, in its order, and then the rest of the moments."""
    value, resp = gmm_full_log_prob(*inputs, responsibilities=True, **options)
    moments = gmm_full_moments(*inputs, grad, **options)
    both = [value, resp, *run(inputs, grad, **options)[1:], moments.first, moments.second]
    names = ("value", "responsibilities", *NAMES, "first moment", "second moment")
    return [*zip(names, both, strict=True), ("value of the moments", moments.log_prob), ("weight", moments.weight)]


def everything(inputs: list[Tensor], backend: str) -> list[Tensor]:
    return [t for _, t in outputs(inputs, torch.ones_like(inputs[0][:, 0]), backend=backend)]


def check(inputs: list[Tensor], backend: str, scaled: bool = False) -> None:
    """Everything that `backend` gives is within the error budget, which `scaled` takes of the sizes of the terms."""
    grad = torch.randn(inputs[0].shape[0], generator=torch.Generator().manual_seed(1)).to(inputs[1])
    actual, direct = outputs(inputs, grad, backend=backend), outputs(inputs, grad, backend="reference")
    exact, scales = ([*s, s[0], s[5]] for s in oracle.exact(*inputs, grad=grad))
    for (name, a), (_, d), e, s in zip(actual, direct, exact, scales, strict=True):
        assert_within_budget(name, a, d, e, s if scaled else None)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32] if backend in ("triton", "cuda") else [torch.float32, torch.float64]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_values_gradients_and_moments(implementation, size):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(mixture(*size, dtype, device), backend)


def test_reference_is_the_formula():
    for dtype in dtypes_of("reference"):
        check(mixture(17, 5, 3, dtype), "reference")


def test_reference_agrees_with_scipy():
    z, means, chol, log_weights = mixture(9, 3, 4, torch.float64)
    normal = pytest.importorskip("scipy.stats").multivariate_normal
    precision = (chol.triu() @ chol.triu().mT).numpy()
    densities = [normal(means[k].numpy(), np.linalg.inv(precision[k])).pdf(z.numpy()) for k in range(3)]
    expected = np.log(log_weights.exp().numpy() @ np.stack(densities))
    np.testing.assert_allclose(gmm_full_log_prob(z, means, chol, log_weights, backend="reference"), expected, rtol=1e-12)


def test_agrees_with_scikit_learn(implementation):
    backend, device = implementation
    z, means, chol, log_weights = mixture(40, 6, 3, device=device)
    log_weights = log_weights.log_softmax(0)
    theirs = pytest.importorskip("sklearn.mixture").GaussianMixture(6, covariance_type="full")
    theirs.means_, theirs.weights_ = means.double().cpu().numpy(), log_weights.double().exp().cpu().numpy()
    theirs.precisions_cholesky_ = chol.double().triu().cpu().numpy()
    points = z.double().cpu().numpy()
    ours, resp = gmm_full_log_prob(z, means, chol, log_weights, responsibilities=True, backend=backend)
    np.testing.assert_allclose(ours.cpu(), theirs.score_samples(points), rtol=2e-5)
    np.testing.assert_allclose(resp.cpu(), theirs.predict_proba(points), atol=2e-5)


def test_diagonal_factors_are_the_diagonal_mixture(implementation):
    backend, device = implementation
    z, means, chol, log_weights = mixture(30, 4, 6, device=device)
    log_vars = -2 * chol.diagonal(dim1=1, dim2=2).log()
    chol = torch.diag_embed((-0.5 * log_vars).exp())
    torch.testing.assert_close(gmm_full_log_prob(z, means, chol, log_weights, backend=backend),
                               gmm_log_prob(z, means, log_vars, log_weights))


def test_moments_make_the_step_of_expectation_maximisation(implementation):
    """Far from the origin, where uncentred float32 moments have no digit of the covariance left."""
    backend, device = implementation
    z, means, chol, log_weights = mixture(400, 3, 4, device=device, seed=1)
    z, means = z + 3000, means + 3000
    log_prob, weight, first, second = gmm_full_moments(z, means, chol, log_weights, backend=backend)
    shift = first / weight[:, None]
    covariance = second / weight[:, None, None] - shift[:, :, None] * shift[:, None, :]
    resp = gmm_full_log_prob(*(t.double() for t in (z, means, chol, log_weights)), responsibilities=True)[1].cpu().numpy()
    for k in range(3):
        expected = np.cov(z.double().cpu().numpy().T, aweights=resp[:, k], ddof=0)
        np.testing.assert_allclose(covariance[k].cpu(), expected, atol=1e-4 * np.abs(expected).max())
    torch.testing.assert_close(weight.sum(), torch.tensor(400.0, device=device))
    after = gmm_full_log_prob(z, means + shift, upper(covariance), (weight / 400).log(), backend=backend)
    before = gmm_full_log_prob(z, means, chol, log_weights.log_softmax(0), backend=backend)
    assert after.mean() > before.mean() and log_prob.shape == (400,)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0],
            "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    check([make(t) for t in mixture(37, 11, 6, device=device)], backend)


def test_components_apart_leave_most_pairs_out(implementation):
    """Each row has one component or two; every third row weighs nothing."""
    backend, device = implementation
    z, means, chol, log_weights = mixture(150, 9, 5, device=device)
    means = 40 * means
    row = torch.arange(150, device=device)
    z = means[row % 9] + z / 3
    z[::10] = (means[0] + means[1]) / 2
    check([z, means, chol, log_weights], backend)
    weights = (row % 3 != 0).float()
    kept = weights == 1
    some = gmm_full_moments(z, means, chol, log_weights, weights, backend=backend)
    torch.testing.assert_close(some[1:], gmm_full_moments(z[kept], means, chol, log_weights, backend=backend)[1:])


def test_removed_component(implementation):
    """A component of weight zero contributes nothing, and neither NaN nor a gradient."""
    backend, device = implementation
    z, means, chol, log_weights = mixture(9, 4, 3, device=device)
    log_weights[2] = -torch.inf
    value, dz, dmeans, *_ = run([z, means, chol, log_weights], torch.ones(9, device=device), backend=backend)
    keep = torch.tensor([0, 1, 3], device=device)
    torch.testing.assert_close(value, gmm_full_log_prob(z, means[keep], chol[keep], log_weights[keep]))
    assert dz.isfinite().all() and (dmeans[2] == 0).all()
    removed = [z, means, chol, torch.full_like(log_weights, -torch.inf)]
    value, *grads = run(removed, torch.ones(9, device=device), backend=backend)
    assert (value == -torch.inf).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("sizes", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)], ids=lambda s: "N{}-K{}-D{}".format(*s))
def test_empty_sizes(implementation, sizes):
    backend, device = implementation
    inputs, grad = mixture(*sizes, device=device), torch.ones(sizes[0], device=device)
    expected = dict(outputs(inputs, grad, backend="reference"))
    torch.testing.assert_close(dict(outputs(inputs, grad, backend=backend)), expected)


def test_extreme_parameters_stay_exact(implementation):
    """Far means, standard deviations of e^±15 along an oblique axis, a point on a mean, all points the same."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        z, means, chol, log_weights = mixture(20, 6, 4, dtype, device)
        means[0], means[1] = 1e3, -1e3
        chol[2] *= torch.e**15
        chol[3] *= torch.e**-15
        chol[4, 0, 0] = 1e4
        z[0], z[1:5] = means[3], means[0]
        check([z, means, chol, log_weights], backend)


def test_nearly_singular_covariances(implementation):
    """Dimensions that are copies of one another but for a thousandth."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        z, means, _, log_weights = mixture(60, 3, 4, dtype, device)
        z = z[:, :1] + z * 1e-3
        chol = upper(torch.ones(4, 4, device=device, dtype=torch.float64) + 1e-6 * torch.eye(4, device=device)).to(dtype)
        check([z, means[:, :1] + means * 1e-3, chol.expand(3, 4, 4), log_weights], backend, scaled=True)


def test_nan_reaches_only_what_depends_on_it(implementation):
    backend, device = implementation
    inputs = mixture(40, 5, 3, device=device)
    inputs[0][7, 1] = torch.nan
    value, dz, dmeans, *_ = run(inputs, torch.ones(40, device=device), backend=backend)
    others = torch.arange(40, device=device) != 7
    assert value[7].isnan() and value[others].isfinite().all()
    assert dz[7].isnan().any() and dz[others].isfinite().all()
    assert dmeans.isnan().any()
    for argument, wrong in ((1, torch.nan), (2, torch.nan), (2, -1.0)):
        inputs = mixture(40, 5, 3, device=device)
        inputs[argument][2] = wrong
        assert run(inputs, None, backend=backend)[0].isnan().all()


def test_responsibilities_and_their_gradient(implementation):
    backend, device = implementation
    mixture_checks.responsibilities_and_their_gradient(gmm_full_log_prob, mixture(21, 70, 3, device=device), NAMES, backend)


def test_only_needed_gradients(implementation):
    backend, device = implementation
    inputs = mixture(30, 5, 3, device=device)
    full = run(inputs, torch.ones(30, device=device), backend=backend)[1:]
    mixture_checks.only_needed_gradients(gmm_full_log_prob, inputs, full, backend)


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    for size in ((1500, 30, 9), (40, 200, 20)):
        inputs = mixture(*size, device=device)
        same_at_any_threads(lambda inputs=inputs: everything(inputs, backend))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [t for size in SIZES for dtype in dtypes_of("cpp")
                                     for t in everything(mixture(*size, dtype), "cpp")])


@pytest.mark.parametrize("size", [(200_000, 3, 2), (3, 2000, 12), (700, 300, 24)], ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_large_sizes(implementation, size):
    """Many rows, many components split between tasks, and both."""
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for large sizes")
    inputs, grad = mixture(*size, device=device), torch.ones(size[0], device=device)
    actual = outputs(inputs, grad, backend=backend)
    expected = outputs([t.double() for t in inputs], grad.double(), backend="reference")
    for (name, a), (_, e) in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


def test_leading_dimensions():
    inputs = mixture(24, 5, 3)
    weights = torch.rand(24, generator=torch.Generator().manual_seed(2))
    deep = inputs[0].reshape(2, 3, 4, 3)
    flat, flat_resp = gmm_full_log_prob(*inputs, responsibilities=True)
    value, resp = gmm_full_log_prob(deep, *inputs[1:], responsibilities=True)
    assert value.shape == (2, 3, 4) and resp.shape == (2, 3, 4, 5)
    assert torch.equal(value.reshape(-1), flat) and torch.equal(resp.reshape(-1, 5), flat_resp)
    assert gmm_full_log_prob(inputs[0][0], *inputs[1:]).shape == ()
    moments = gmm_full_moments(deep, *inputs[1:], weights.reshape(2, 3, 4))
    assert moments.log_prob.shape == (2, 3, 4)
    assert torch.equal(moments.second, gmm_full_moments(*inputs, weights).second)


def test_half_precision_points_give_float32(implementation):
    backend, device = implementation
    inputs = mixture(21, 5, 3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        z = inputs[0].to(dtype).requires_grad_()
        value = gmm_full_log_prob(z, *inputs[1:], backend=backend)
        value.sum().backward()
        expected = gmm_full_log_prob(z.detach().float(), *inputs[1:], backend="reference")
        torch.testing.assert_close(value, expected)
        assert z.grad.dtype == dtype and value.dtype == torch.float32
        moments = gmm_full_moments(z.detach(), *inputs[1:], backend=backend)
        torch.testing.assert_close(moments, gmm_full_moments(z.detach().float(), *inputs[1:], backend="reference"))


def test_autocast_computes_in_float32():
    inputs = mixture(21, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value = gmm_full_log_prob(inputs[0].bfloat16(), *inputs[1:])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, gmm_full_log_prob(inputs[0].bfloat16().float(), *inputs[1:]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_once_and_twice(backend):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    leaves = [t.nan_to_num(0.0).requires_grad_() for t in mixture(4, 3, 2, torch.float64)]

    def f(*args):
        return gmm_full_log_prob(*args, responsibilities=True, backend=backend)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    inputs = [t.nan_to_num(0.0).requires_grad_(grad) for t in mixture(6, 5, 3)]
    strided = [inputs[0].detach().T.contiguous().T.requires_grad_(grad), *inputs[1:]]
    torch.library.opcheck(ops.gmm_full_fwd.default, (*inputs, False))
    torch.library.opcheck(ops.gmm_full_fwd.default, (*strided, True))
    detached = [t.detach() for t in inputs]
    log_prob, _ = ops.gmm_full_fwd(*detached, False)
    for need_z, need_mixture in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.gmm_full_bwd.default, (torch.ones(6), *detached, log_prob, None, need_z, need_mixture))
    torch.library.opcheck(ops.gmm_full_moments.default, (None, *detached))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(z, means, chol, log_weights):
        points, weights = z.tanh(), log_weights.log_softmax(0)
        moments = gmm_full_moments(points.detach(), means.detach(), chol.detach(), weights.detach())
        return (2 * gmm_full_log_prob(points, means, chol, weights)).sum() + moments.first.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (17, 18):
        leaves = [t.requires_grad_() for t in mixture(N, 5, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(compiled(*leaves), loss(*leaves))
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_vmap_over_points_and_func_grad():
    z, *rest = mixture(24, 5, 3)
    rest[1] = rest[1].triu()
    batched = torch.func.vmap(lambda x: gmm_full_log_prob(x, *rest))(z.reshape(4, 6, 3))
    torch.testing.assert_close(batched.reshape(-1), gmm_full_log_prob(z, *rest))
    per_point = torch.func.vmap(torch.func.grad(lambda x: gmm_full_log_prob(x, *rest)))(z)
    leaf = z.clone().requires_grad_()
    gmm_full_log_prob(leaf, *rest).sum().backward()
    torch.testing.assert_close(per_point, leaf.grad)
    with pytest.raises(NotImplementedError, match="vmap over the mixture"):
        torch.func.vmap(lambda m: gmm_full_log_prob(z, m, *rest[1:]))(rest[0].expand(2, 5, 3))


def test_invariances():
    z, means, chol, log_weights = mixture(50, 9, 4, torch.float64)
    chol = chol.triu()
    value = gmm_full_log_prob(z, means, chol, log_weights)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gmm_full_log_prob(z, means[order], chol[order], log_weights[order]), value)
    torch.testing.assert_close(gmm_full_log_prob(z + 3, means + 3, chol, log_weights), value)
    torch.testing.assert_close(gmm_full_log_prob(z, means, chol, log_weights + 1.5), value + 1.5)
    A = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = upper(A.mT @ torch.linalg.inv(chol @ chol.mT) @ A)  # z A has covariance AᵀΣA, and its volume grows by |det A|
    torch.testing.assert_close(gmm_full_log_prob(z @ A, means @ A, turned, log_weights), value - A.det().abs().log())


GOOD = {"z": torch.zeros(4, 3), "means": torch.zeros(5, 3), "precision_cholesky": torch.eye(3).expand(5, 3, 3),
        "log_weights": torch.zeros(5)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"means": torch.zeros(5, 2)}, ValueError, r"means must have shape \[K, D\] with D = 3 .* given \[5, 2\]"),
    ({"precision_cholesky": torch.eye(3)}, ValueError,
     r"precision_cholesky must have shape \[K, D, D\] = \[5, 3, 3\], given \[3, 3\]"),
    ({"log_weights": torch.zeros(4)}, ValueError, r"log_weights must have shape \[K\] = \[5\], given \[4\]"),
    ({"z": torch.zeros(())}, ValueError, r"z must have shape \[..., D\], given a scalar"),
    ({"z": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "z is torch.int64 but means is torch.float32"),
    ({"means": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "z is torch.float32 but means is torch.float64"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'; the backends are cpp, cuda, triton, reference"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    for op in (gmm_full_log_prob, gmm_full_moments):
        with pytest.raises(error, match=message):
            op(**{**GOOD, **changes})


def test_weights_are_one_a_row():
    with pytest.raises(ValueError, match=r"gmm_full_moments: weights must have shape .* = \[4\], given \[5\]"):
        gmm_full_moments(**GOOD, weights=torch.ones(5))
