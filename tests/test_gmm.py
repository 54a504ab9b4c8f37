"""gmm_log_prob: values and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import mixture_checks
import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, gmm_log_prob, native
from latent_engine.kernels.reference.gmm import allowed_mask

from oracles import assert_within_budget
from oracles import gmm as oracle

NAMES = ("z", "means", "log_vars", "log_weights")
# N, K, D: ones, primes, whole and broken tiles, more components than rows and the other way round
SIZES = [(1, 1, 1), (3, 2, 1), (17, 5, 3), (33, 20, 2), (64, 13, 17), (5, 131, 4), (70, 67, 33), (130, 4, 64)]


def mixture(N: int, K: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Points near the means of a random mixture."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(K, D, generator=g)
    near = means[torch.randint(max(K, 1), (N,), generator=g)] if K else torch.zeros(N, D)
    tensors = (near + torch.randn(N, D, generator=g), means, 0.7 * torch.randn(K, D, generator=g),
               torch.randn(K, generator=g))
    return [t.to(device, dtype) for t in tensors]


def run(inputs: list[Tensor], grad: Tensor | None, **options) -> list[Tensor]:
    """Log-density and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = gmm_log_prob(*leaves, **options)
    return [value.detach()] if grad is None else [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def check(inputs: list[Tensor], backend: str, mask: Tensor | None = None, **options) -> None:
    """Value and gradients of `backend` are within the error budget."""
    N = inputs[0].shape[0]
    grad = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    actual = run(inputs, grad, backend=backend, **options)
    direct = run(inputs, grad, backend="reference", **options)
    exact, _ = oracle.exact(*inputs, mask=mask, grad=grad)
    for name, a, d, e in zip(("value", *NAMES), actual, direct, (exact[0], *exact[2:]), strict=True):
        assert_within_budget(name, a, d, e)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(mixture(*size, dtype, device), backend)


def test_reference_is_the_formula():
    for dtype in (torch.float32, torch.float64):
        check(mixture(17, 5, 3, dtype), "reference")


def test_agrees_with_scikit_learn(implementation):
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(40, 6, 3, device=device)
    log_weights = log_weights.log_softmax(0)
    theirs = pytest.importorskip("sklearn.mixture").GaussianMixture(6, covariance_type="diag")
    theirs.means_, theirs.weights_ = means.double().cpu().numpy(), log_weights.double().exp().cpu().numpy()
    theirs.precisions_cholesky_ = (-0.5 * log_vars.double()).exp().cpu().numpy()
    points = z.double().cpu().numpy()
    ours, resp = gmm_log_prob(z, means, log_vars, log_weights, responsibilities=True, backend=backend)
    np.testing.assert_allclose(ours.cpu(), theirs.score_samples(points), rtol=2e-5)
    np.testing.assert_allclose(resp.cpu(), theirs.predict_proba(points), atol=2e-5)


@pytest.mark.parametrize("shape", ["K1", "D", "1D", "scalar"])
def test_shared_and_isotropic_variances(implementation, shape):
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(19, 7, 5, device=device)
    log_vars = {"K1": log_vars[:, :1], "D": log_vars[0], "1D": log_vars[:1], "scalar": log_vars[0, 0]}[shape].clone()
    check([z, means, log_vars, log_weights], backend)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0],
            "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    inputs = [make(t) for t in mixture(37, 11, 6, device=device)]
    check(inputs, backend)


def test_label_is_the_only_component(implementation):
    backend, device = implementation
    inputs = mixture(23, 6, 3, device=device)
    labels = torch.randint(-1, 6, (23,), generator=torch.Generator().manual_seed(2)).to(device)
    check(inputs, backend, allowed_mask(labels, None, 6), labels=labels)


def test_labels_with_several_components_a_class(implementation):
    backend, device = implementation
    inputs = mixture(23, 6, 3, device=device)
    allowed = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=device)
    labels = torch.tensor([0, 1, -1, 2] * 6, device=device)[:23]
    check(inputs, backend, allowed[labels.clamp(min=0)] | (labels < 0)[:, None], labels=labels, allowed=allowed)
    barred = labels == 2
    value, dz, *_ = run(inputs, torch.ones(23, device=device), backend=backend, labels=labels, allowed=allowed)
    assert (value[barred] == -torch.inf).all() and (dz[barred] == 0).all()


def test_mask_per_point(implementation):
    backend, device = implementation
    inputs = mixture(23, 70, 3, device=device)
    mask = (torch.rand(23, 70, generator=torch.Generator().manual_seed(3)) < 0.3).to(device)
    mask[5] = False
    check(inputs, backend, mask, allowed=mask)


def test_removed_component(implementation):
    """A component of weight zero contributes nothing, and neither NaN nor a gradient."""
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(9, 4, 3, device=device)
    log_weights[2] = -torch.inf
    value, dz, dmeans, *_ = run([z, means, log_vars, log_weights], torch.ones(9, device=device), backend=backend)
    keep = torch.tensor([0, 1, 3], device=device)
    torch.testing.assert_close(value, gmm_log_prob(z, means[keep], log_vars[keep], log_weights[keep]))
    assert dz.isfinite().all() and (dmeans[2] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)], ids=lambda s: "N{}-K{}-D{}".format(*s))
def test_empty_sizes(implementation, sizes):
    backend, device = implementation
    inputs = mixture(*sizes, device=device)
    outputs = run(inputs, torch.ones(sizes[0], device=device), backend=backend)
    expected = run(inputs, torch.ones(sizes[0], device=device), backend="reference")
    for a, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, e)
    _, resp = gmm_log_prob(*inputs, responsibilities=True, backend=backend)
    assert resp.shape == sizes[:2]


def test_extreme_parameters_stay_exact(implementation):
    """Far means, variances of e^±30, a point on a mean, all points the same."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        z, means, log_vars, log_weights = mixture(20, 6, 4, dtype, device)
        means[0], means[1] = 1e3, -1e3
        log_vars[2], log_vars[3] = 30.0, -30.0
        z[0], z[1:5] = means[3], means[0]
        check([z, means, log_vars, log_weights], backend)


def test_single_component_is_a_gaussian(implementation):
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(12, 1, 5, device=device)
    normal = torch.distributions.Normal(means[0], (0.5 * log_vars[0]).exp())
    torch.testing.assert_close(gmm_log_prob(z, means, log_vars, log_weights, backend=backend),
                               normal.log_prob(z).sum(1) + log_weights[0])


def test_nan_reaches_only_what_depends_on_it(implementation):
    backend, device = implementation
    inputs = mixture(40, 5, 3, device=device)
    inputs[0][7, 1] = torch.nan
    value, dz, dmeans, *_ = run(inputs, torch.ones(40, device=device), backend=backend)
    others = torch.arange(40, device=device) != 7
    assert value[7].isnan() and value[others].isfinite().all()
    assert dz[7].isnan().any() and dz[others].isfinite().all()
    assert dmeans.isnan().any()
    inputs = mixture(40, 5, 3, device=device)
    inputs[1][2, 0] = torch.nan
    assert run(inputs, None, backend=backend)[0].isnan().all()
    labels = torch.arange(40, device=device) % 5
    value = run(inputs, None, backend=backend, labels=labels)[0]
    assert (value.isnan() == (labels == 2)).all()


def test_infinite_points_have_density_zero(implementation):
    backend, device = implementation
    inputs = mixture(4, 5, 3, device=device)
    inputs[0][1, 2] = torch.inf
    value = run(inputs, None, backend=backend)[0]
    assert value[1] == -torch.inf and value[[0, 2, 3]].isfinite().all()


def test_responsibilities_and_their_gradient(implementation):
    backend, device = implementation
    mixture_checks.responsibilities_and_their_gradient(gmm_log_prob, mixture(21, 70, 3, device=device), NAMES, backend)


def test_only_needed_gradients(implementation):
    backend, device = implementation
    inputs = mixture(30, 5, 3, device=device)
    full = run(inputs, torch.ones(30, device=device), backend=backend)[1:]
    mixture_checks.only_needed_gradients(gmm_log_prob, inputs, full, backend)


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    inputs = mixture(3000, 150, 17, device=device)
    grad = torch.randn(3000, generator=torch.Generator().manual_seed(1)).to(device)
    same_at_any_threads(lambda: run(inputs, grad, backend=backend))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64)
        for t in run(mixture(*size, dtype), torch.ones(size[0], dtype=dtype), backend="cpp")])


@pytest.mark.parametrize("size", [(1_000_000, 3, 2), (3, 10_000, 5), (700, 1500, 8)], ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_large_sizes(implementation, size):
    """Many rows, many components split between tasks, and both."""
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for large sizes")
    inputs = mixture(*size, device=device)
    grad = torch.ones(size[0], device=device)
    outputs = run(inputs, grad, backend=backend)
    expected = run([t.double() for t in inputs], grad.double(), backend="reference")
    for name, a, e in zip(("value", *NAMES), outputs, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


def test_leading_dimensions():
    inputs = mixture(24, 5, 3)
    flat, flat_resp = gmm_log_prob(*inputs, responsibilities=True)
    deep, deep_resp = gmm_log_prob(inputs[0].reshape(2, 3, 4, 3), *inputs[1:], responsibilities=True)
    assert deep.shape == (2, 3, 4) and deep_resp.shape == (2, 3, 4, 5)
    assert torch.equal(deep.reshape(-1), flat) and torch.equal(deep_resp.reshape(-1, 5), flat_resp)
    assert gmm_log_prob(inputs[0][0], *inputs[1:]).shape == ()


def test_half_precision_points_give_float32(implementation):
    backend, device = implementation
    inputs = mixture(21, 5, 3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        z = inputs[0].to(dtype).requires_grad_()
        value = gmm_log_prob(z, *inputs[1:], backend=backend)
        value.sum().backward()
        expected = gmm_log_prob(z.detach().float(), *inputs[1:], backend="reference")
        torch.testing.assert_close(value, expected)
        assert z.grad.dtype == dtype and value.dtype == torch.float32


def test_autocast_computes_in_float32():
    inputs = mixture(21, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value = gmm_log_prob(inputs[0].bfloat16(), *inputs[1:])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, gmm_log_prob(inputs[0].bfloat16().float(), *inputs[1:]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_once_and_twice(backend):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    leaves = [t.requires_grad_() for t in mixture(4, 3, 2, torch.float64)]
    labels = torch.tensor([0, -1, 2, -1])

    def f(*args):
        return gmm_log_prob(*args, labels=labels, responsibilities=True, backend=backend)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    inputs = [t.requires_grad_(grad) for t in mixture(6, 5, 3)]
    strided = [inputs[0].detach().T.contiguous().T.requires_grad_(grad), *inputs[1:]]
    labels, allowed = torch.tensor([0, 1, -1, 0, 1, 1]), torch.rand(2, 5) < 0.7
    for args in ((*inputs, None, None, False), (*strided, labels, allowed, True)):
        torch.library.opcheck(ops.gmm_fwd.default, args)
    detached = [t.detach() for t in inputs]
    log_prob, _ = ops.gmm_fwd(*detached, None, None, False)
    for need_z, need_mixture in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.gmm_bwd.default, (torch.ones(6), *detached, log_prob, None, None, None, need_z, need_mixture))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(z, means, log_vars, log_weights):
        return (2 * gmm_log_prob(z.tanh(), means, log_vars, log_weights.log_softmax(0))).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (17, 18):
        leaves = [t.requires_grad_() for t in mixture(N, 5, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_vmap_over_points_and_func_grad():
    z, *rest = mixture(24, 5, 3)
    batched = torch.func.vmap(lambda x: gmm_log_prob(x, *rest))(z.reshape(4, 6, 3))
    torch.testing.assert_close(batched.reshape(-1), gmm_log_prob(z, *rest))
    per_point = torch.func.vmap(torch.func.grad(lambda x: gmm_log_prob(x, *rest)))(z)
    leaf = z.clone().requires_grad_()
    gmm_log_prob(leaf, *rest).sum().backward()
    torch.testing.assert_close(per_point, leaf.grad)
    labels = torch.arange(24) % 5
    by_label = torch.func.vmap(lambda x, y: gmm_log_prob(x, *rest, labels=y))(z.reshape(4, 6, 3), labels.reshape(4, 6))
    torch.testing.assert_close(by_label.reshape(-1), gmm_log_prob(z, *rest, labels=labels))
    with pytest.raises(NotImplementedError, match="vmap over the mixture"):
        torch.func.vmap(lambda m: gmm_log_prob(z, m, *rest[1:]))(rest[0].expand(2, 5, 3))


def test_invariances():
    z, means, log_vars, log_weights = mixture(50, 9, 4, torch.float64)
    value = gmm_log_prob(z, means, log_vars, log_weights)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gmm_log_prob(z, means[order], log_vars[order], log_weights[order]), value)
    torch.testing.assert_close(gmm_log_prob(z + 3, means + 3, log_vars, log_weights), value)
    torch.testing.assert_close(gmm_log_prob(z, means, log_vars, log_weights + 1.5), value + 1.5)


def test_integrates_to_one():
    _, means, log_vars, log_weights = mixture(1, 4, 1, torch.float64)
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density = gmm_log_prob(grid[:, None], means, log_vars, log_weights.log_softmax(0)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)


GOOD = {"z": torch.zeros(4, 3), "means": torch.zeros(5, 3), "log_vars": torch.zeros(5, 3), "log_weights": torch.zeros(5)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"means": torch.zeros(5, 2)}, ValueError, r"means must have shape \[K, D\] with D = 3 .* given \[5, 2\]"),
    ({"means": torch.zeros(3)}, ValueError, r"means must have shape \[K, D\]"),
    ({"log_vars": torch.zeros(5)}, ValueError, r"log_vars must have shape .* given \[5\]"),
    ({"log_weights": torch.zeros(4)}, ValueError, r"log_weights must have shape \[K\] = \[5\], given \[4\]"),
    ({"z": torch.zeros(())}, ValueError, r"z must have shape \[..., D\], given a scalar"),
    ({"z": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "z is torch.int64 but means is torch.float32"),
    ({"z": [[0.0]]}, TypeError, "z must be a tensor, given list"),
    ({"means": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "z is torch.float32 but means is torch.float64"),
    ({"means": torch.zeros(5, 3, dtype=torch.int32)}, TypeError, "means must be a floating-point tensor"),
    ({"z": torch.zeros(4, 3, device="meta")}, ValueError, "z is on meta but means is on cpu"),
    ({"labels": torch.tensor([0, 1, 2, 5])}, ValueError, r"labels must lie in \[-1, 5\), given values from 0 to 5"),
    ({"labels": torch.tensor([0, 1, 2, -2])}, ValueError, r"labels must lie in \[-1, 5\)"),
    ({"labels": torch.zeros(4)}, TypeError, "labels must be integers, given torch.float32"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have shape .* = \[4\], given \[3\]"),
    ({"allowed": torch.ones(4, 5)}, TypeError, "allowed must be a boolean tensor"),
    ({"allowed": torch.ones(2, 5, dtype=torch.bool)}, ValueError,
     r"allowed must have shape \[..., K\] = \[4, 5\], given \[2, 5\]"),
    ({"labels": torch.zeros(4, dtype=torch.int64), "allowed": torch.ones(2, 4, dtype=torch.bool)}, ValueError,
     r"with labels, allowed must have shape \[C, K\] with K = 5"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'; the backends are cpp, cuda, triton, reference"),
    ({"backend": "cuda"}, BackendError, "gmm_log_prob: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    if changes.get("backend") == "cuda" and torch.cuda.is_available():
        message = "serves cuda tensors, given a cpu tensor"
    with pytest.raises(error, match=message):
        gmm_log_prob(**{**GOOD, **changes})
