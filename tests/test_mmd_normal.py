"""mmd2_to_normal: the closed form against dense integration, SciPy and sampling; every implementation within the budget."""

import itertools

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from scipy import integrate
from torch import Tensor

from latent_engine.kernels import BackendError, mmd2_to_normal, native
from latent_engine.kernels.mmd_normal import POINTS_REACH, POSTERIORS_REACH, WAE_SCALES
from latent_engine.kernels.quadrature import inverse_multiquadric

from oracles import assert_within_budget
from oracles import mmd_normal as oracle

# N, D: the least rows, odd sizes, several tiles, panels and node blocks
SIZES = [(2, 1), (17, 5), (20, 33), (130, 1)]
SMALL = [(5, 3)]  # for the interpreter, in which each row is a program
FEW_NODES = 1e-2  # a tolerance that keeps the interpreter, the emulation and the oracle fast
CASES = list(itertools.product(("points", "posteriors"), ("imq", "gaussian"), ("unbiased", "biased")))


def sample(kind: str, N: int, D: int, dtype=torch.float32, device="cpu", seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = 0.3 + torch.randn(N, D, generator=g), 0.7 * torch.randn(N, D, generator=g) - 1
    return [t.to(device, dtype) for t in tensors[:1 if kind == "points" else 2]]


def run(inputs: list[Tensor], **options) -> list[Tensor]:
    """The value and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = mmd2_to_normal(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def rows(implementation: tuple[str, str], N: int) -> int:
    """N, or few rows for the interpreter."""
    return min(N, 5) if implementation == ("triton", "cpu") else N


def check(inputs: list[Tensor], backend: str, kernel: str = "imq", scales: tuple = WAE_SCALES,
          estimator: str = "unbiased", tolerance: float = FEW_NODES) -> None:
    """Value and gradients are within the budget; the truth is the sum of Gaussian kernels in 80-bit arithmetic."""
    options = {"kernel": kernel, "scales": scales, "estimator": estimator, "tolerance": tolerance}
    actual = run(inputs, backend=backend, **options)
    direct = run(inputs, backend="reference", **options)
    x, log_var = (*inputs, None)[:2]
    rates, weights, widths = rule(kernel, scales, log_var is None, tolerance)
    exact, sizes = oracle.exact(x, log_var, rates, weights, widths, estimator)
    for name, a, d, e, s in zip(("value", "x", "log_var"), actual, direct, exact, sizes, strict=False):
        assert_within_budget(name, a, d, e, s)


def rule(kernel: str, scales: tuple, points: bool,
         tolerance: float = FEW_NODES) -> tuple[list[float], list[float], list[float]]:
    widths = [2 * s for s in scales]
    if kernel == "gaussian":
        return [1 / C for C in widths], [1.0] * len(widths), []
    reach = POINTS_REACH if points else POSTERIORS_REACH
    return *inverse_multiquadric(tuple(widths), reach, tolerance), widths if points else []


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


def sizes_of(backend: str, device: str) -> list[tuple[int, int]]:
    return SMALL if backend == "triton" and device == "cpu" else SIZES


@pytest.mark.parametrize(("kind", "kernel", "estimator"), CASES, ids=lambda v: v)
def test_values_and_gradients(implementation, kind, kernel, estimator):
    backend, device = implementation
    for size, dtype in itertools.product(sizes_of(backend, device), dtypes_of(backend)):
        check(sample(kind, *size, dtype, device), backend, kernel=kernel, estimator=estimator, tolerance=1e-6)


@pytest.mark.parametrize(("kind", "kernel", "estimator"), CASES, ids=lambda v: v)
def test_reference_is_the_integral(kind, kernel, estimator):
    """Dense integration in 80 bits, to the tolerance asked for: relative to the sum of the three terms."""
    prior_std = 0.3
    inputs = [prior_std * t if i == 0 else t for i, t in enumerate(sample(kind, 6, 8, torch.float64))]
    value, size = oracle.integral(*inputs, kernel=kernel, estimator=estimator, prior_std=prior_std)
    for tolerance in (1e-4, 1e-6, 1e-10):
        ours = mmd2_to_normal(*inputs, kernel=kernel, estimator=estimator, prior_std=prior_std, tolerance=tolerance,
                              backend="reference").item()
        assert abs(ours - value) <= (tolerance if kernel == "imq" else 1e-13) * size


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("scales", [WAE_SCALES, (1.0,), (1e-3, 1.0, 1e3)], ids=str)
@pytest.mark.parametrize("reach", [1e3, 1e6])
def test_sum_of_gaussian_kernels_keeps_its_tolerance(scales, tolerance, reach):
    widths = tuple(2 * s for s in scales)
    rates, weights = (np.array(part) for part in inverse_multiquadric(widths, reach, tolerance))
    squares = np.concatenate(([0.0], np.geomspace(1e-6, reach, 3000)))[:, None]
    kernel = (np.array(widths) / (np.array(widths) + squares)).sum(1)
    assert abs((weights * np.exp(-rates * squares)).sum(1) / kernel - 1).max() <= tolerance
    assert (weights > 0).all() and (rates > 0).all()


def test_cross_term_against_scipy():
    """E C / (C + |z − y|²) over y ~ N(0, I), for |z| up to 3 √D, D from 1 to 128: SciPy's adaptive integration."""
    for D, scale, radius in itertools.product((1, 8, 64, 128), (0.1, 1.0, 10.0), (0.0, 1.0, 3.0)):
        C, square = 2 * D * scale, radius**2 * D
        truth, _ = integrate.quad(lambda t: np.exp(-t - D / 2 * np.log1p(2 * t / C) - t * square / (C + 2 * t)), 0, np.inf,  # noqa: B023
                                  epsabs=0, epsrel=1e-11, limit=400)
        z = torch.full((1, D), radius, dtype=torch.float64)
        prior, _ = integrate.quad(lambda t: np.exp(-t - D / 2 * np.log1p(4 * t / C)), 0, np.inf, epsabs=0, epsrel=1e-11,  # noqa: B023
                                  limit=400)
        value = mmd2_to_normal(z, scales=(scale,), estimator="biased", tolerance=1e-9).item()  # 1 − 2 cross + prior
        assert value == pytest.approx(1 - 2 * truth + prior, abs=4e-9)


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_agrees_with_an_ordinary_mmd_to_prior_samples(kernel):
    """Mean and standard error over batches of prior samples, of points and of samples of the posteriors."""
    D = 6
    x, log_var = sample("posteriors", 40, D, torch.float64)
    g = torch.Generator().manual_seed(5)

    def kernel_of(a, b):
        square = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
        return sum(2 * D * s / (2 * D * s + square) if kernel == "imq" else (-square / (2 * D * s)).exp() for s in WAE_SCALES)

    def draws(with_posteriors):
        for _ in range(60):
            y = torch.randn(200, D, generator=g, dtype=torch.float64)
            z = x + (log_var / 2).exp() * torch.randn(40, D, generator=g, dtype=torch.float64) if with_posteriors else x
            zz, yy = kernel_of(z, z), kernel_of(y, y)
            yield ((zz.sum() - zz.diagonal().sum()) / (40 * 39) - 2 * kernel_of(z, y).mean()
                   + (yy.sum() - yy.diagonal().sum()) / (200 * 199)).item()

    for inputs in ((x,), (x, log_var)):
        values = np.array(list(draws(len(inputs) == 2)))
        error = values.std(ddof=1) / np.sqrt(values.size)
        assert abs(values.mean() - mmd2_to_normal(*inputs, kernel=kernel).item()) < 4 * error


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_posteriors_without_spread_are_points(implementation, estimator):
    backend, device = implementation
    (x,) = sample("points", rows(implementation, 30), 4, device=device)
    certain = torch.full_like(x, -60)
    value, dx, dlog_var = run([x, certain], estimator=estimator, backend=backend)
    expected = run([x], estimator=estimator, backend=backend)
    torch.testing.assert_close([value, dx], expected, atol=2e-5, rtol=1e-4)
    assert dlog_var.abs().max() < 1e-20


def test_zero_for_the_prior_itself():
    """One posterior that is the prior: the biased estimate is zero, and so is its gradient."""
    for kernel in ("imq", "gaussian"):
        value, dx, dlog_var = run([torch.zeros(1, 7), torch.zeros(1, 7)], kernel=kernel, estimator="biased")
        assert abs(value) < 3e-6 and dx.abs().max() < 1e-6 and dlog_var.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["points", "posteriors"])
def test_symmetries(kind):
    """Order of rows and dimensions, signs, and units do not matter."""
    inputs = sample(kind, 40, 6, torch.float64)
    value = mmd2_to_normal(*inputs)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(1)) for n in (40, 6))
    torch.testing.assert_close(mmd2_to_normal(*(t[rows][:, columns] for t in inputs)), value)
    torch.testing.assert_close(mmd2_to_normal(-inputs[0], *inputs[1:]), value)
    scaled = [3 * inputs[0], *(t + 2 * np.log(3.0) for t in inputs[1:])]
    torch.testing.assert_close(mmd2_to_normal(*scaled, prior_std=3.0), value)
    parts = sum(mmd2_to_normal(*inputs, scales=(s,), tolerance=1e-9) for s in WAE_SCALES)
    torch.testing.assert_close(mmd2_to_normal(*inputs, tolerance=1e-9), parts, atol=1e-8, rtol=0)
    torch.testing.assert_close(mmd2_to_normal(*inputs, combine="mean"), value / 7)


@pytest.mark.parametrize("kind", ["points", "posteriors"])
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(implementation, kind, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0], "transposed": lambda t: t.T.contiguous().T,
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    check([make(t) for t in sample(kind, rows(implementation, 37), 6, device=device)], backend)


@pytest.mark.parametrize("kind", ["points", "posteriors"])
@pytest.mark.parametrize("scales", [(0.5,), (1e-3, 1.0, 1e4), tuple(np.geomspace(0.01, 100, 19))], ids=["1", "3", "19"])
def test_any_scales(implementation, kind, scales):
    backend, device = implementation
    check(sample(kind, rows(implementation, 20), 5, device=device), backend, scales=scales)


@pytest.mark.parametrize("D", [1, 7, 30])
def test_wide_kernels_keep_all_digits(implementation, D):
    """The determinant of the variances is near that of the kernel alone, a large power."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(sample("posteriors", 3, D, dtype, device), backend, kernel="gaussian", scales=(400.0,))


@pytest.mark.parametrize("log_var", [-20.0, -5.0, -2.0, 1.0, 4.0])
def test_variances_of_any_size_beside_the_kernels(implementation, log_var):
    """From variances that are small beside every kernel to some that are large beside all: no, some and all nodes need them
    dimension by dimension."""
    backend, device = implementation
    for (N, D), dtype in itertools.product([(5, 3)] if device == "cpu" and backend == "triton" else [(20, 3), (18, 150)],
                                           dtypes_of(backend)):
        x, noise = sample("posteriors", N, D, dtype, device)
        check([x, noise + log_var], backend, kernel="imq", tolerance=1e-3)


def test_infinitely_far_posteriors_do_not_count(implementation):
    backend, device = implementation
    x, log_var = sample("posteriors", rows(implementation, 20), 5, device=device)
    x[3, 1] = 1e18
    far = mmd2_to_normal(x, log_var, backend=backend, tolerance=FEW_NODES)
    x[3, 1] = torch.inf
    assert far == mmd2_to_normal(x, log_var, backend=backend, tolerance=FEW_NODES)


def test_gradients_of_far_posteriors_keep_their_digits(implementation):
    """All pairs are so far apart that the gradients are near 1e-26."""
    backend, device = implementation
    N = rows(implementation, 20)
    x, log_var = sample("posteriors", N, 4, torch.float64)
    x, log_var = 30 + 5 * torch.arange(N, dtype=torch.float64)[:, None] + 0.1 * x, log_var - 5
    options = {"kernel": "gaussian", "scales": (0.02, 0.05, 0.07, 0.1, 0.15, 0.2)}
    exact = run([x, log_var], backend="reference", **options)[1:]
    actual = run([t.to(device, torch.float32) for t in (x, log_var)], backend=backend, **options)[1:]
    for a, e in zip(actual, exact, strict=True):
        assert 1e-30 < e.abs().max() < 1e-24
        assert (a.cpu() - e).norm() < 3e-5 * e.norm()


def test_extremes_stay_finite(implementation):
    """Log-variances of ±30, points far away, identical points, a mean offset of 1e3."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        x, log_var = sample("posteriors", rows(implementation, 24), 5, dtype, device)
        x[0], x[1], x[2:4] = 1e4, -1e4, x[4]
        log_var[1], log_var[2], log_var[3, 0] = 30.0, -30.0, 80.0
        for inputs, estimator in (([x], "unbiased"), ([x, log_var], "unbiased"), ([x + 1e3, log_var], "biased"),
                                  ([0 * x, log_var], "biased")):
            check(inputs, backend, estimator=estimator)  # where the truth is finite, so must be the result


def test_nan_reaches_what_depends_on_it(implementation):
    """Each pair couples two rows: one NaN reaches the value and every row's gradient in all that they share."""
    backend, device = implementation
    for kind, where in (("points", 0), ("posteriors", 0), ("posteriors", 1)):
        inputs = sample(kind, rows(implementation, 20), 3, device=device)
        inputs[where][3, 1] = torch.nan
        value, *grads = run(inputs, backend=backend, tolerance=FEW_NODES)
        assert value.isnan() and all(g[3].isnan().any() for g in grads)


def test_only_needed_gradients(implementation):
    backend, device = implementation
    inputs = sample("posteriors", rows(implementation, 30), 5, device=device)
    full = run(inputs, backend=backend, tolerance=FEW_NODES)[1:]
    for i in range(2):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        mmd2_to_normal(*leaves, backend=backend, tolerance=FEW_NODES).backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(2)]
        torch.testing.assert_close(leaves[i].grad, full[i])


@pytest.mark.parametrize("kind", ["points", "posteriors"])
def test_same_bits_every_time_at_any_number_of_threads(implementation, kind):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    inputs = sample(kind, 700 if kind == "points" else 200, 9, device=device)
    same_at_any_threads(lambda: run(inputs, backend=backend))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in (*SIZES, (600, 4)) for dtype in (torch.float32, torch.float64)
        for kind, kernel, estimator in CASES if size[0] < 600 or kind == "points"
        for t in run(sample(kind, *size, dtype), kernel=kernel, estimator=estimator, backend="cpp")])


def test_half_precision_gives_float32(implementation):
    backend, device = implementation
    for kind, dtype in (("points", torch.float16), ("posteriors", torch.bfloat16)):
        x, *rest = sample(kind, rows(implementation, 21), 5, device=device)
        x = x.to(dtype).requires_grad_()
        value = mmd2_to_normal(x, *rest, backend=backend)
        value.backward()
        torch.testing.assert_close(value, mmd2_to_normal(x.detach().float(), *rest, backend="reference"), atol=1e-5, rtol=1e-4)
        assert x.grad.dtype == dtype and value.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert mmd2_to_normal(x.detach(), *rest, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("kind", ["points", "posteriors"])
@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_gradcheck_twice(kind, kernel):
    leaves = [t.requires_grad_() for t in sample(kind, 4, 2, torch.float64)]
    f = lambda *t: mmd2_to_normal(*t, kernel=kernel, scales=(0.5, 2.0), tolerance=1e-3)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("kind", ["points", "posteriors"])
def test_opcheck(kind):
    rule = [list(p) for p in inverse_multiquadric((2.0,), 1e3, 1e-6)]
    for grad in (False, True):
        x, log_var, *_ = *(t.requires_grad_(grad) for t in sample(kind, 6, 3)), None
        needs = (grad, grad and log_var is not None)
        torch.library.opcheck(torch.ops.latent_engine.mmd_normal_fwd.default,
                              (x, log_var, *rule, [2.0] if log_var is None else [], 1.0, True, *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(x, *log_var):
        return 2 * mmd2_to_normal(x.tanh(), *log_var) + mmd2_to_normal(x, kernel="gaussian", combine="mean")

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for kind, N in itertools.product(("points", "posteriors"), (17, 18)):
        leaves = [t.requires_grad_() for t in sample(kind, N, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_func_grad_and_vmap():
    (x,) = sample("points", 12, 3)
    torch.testing.assert_close(torch.func.grad(mmd2_to_normal)(x), run([x])[1])
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.func.vmap(mmd2_to_normal)(x.expand(2, 12, 3))


GOOD = {"x": torch.zeros(4, 3), "log_var": torch.zeros(4, 3)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": torch.zeros(4)}, ValueError, r"x must have shape \[N, D\] with D ≥ 1, given \[4\]"),
    ({"x": torch.zeros(4, 0), "log_var": None}, ValueError, r"with D ≥ 1, given \[4, 0\]"),
    ({"x": torch.zeros(1, 3), "log_var": None}, ValueError, r"unbiased estimator needs at least 2 rows, given x\[1, 3\]"),
    ({"x": torch.zeros(0, 3), "log_var": None, "estimator": "biased"}, ValueError, "biased estimator needs at least 1 rows"),
    ({"log_var": torch.zeros(4, 2)}, ValueError, r"log_var must have shape \[N, D\] as x = \[4, 3\], given \[4, 2\]"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x is torch.int64 but log_var is torch.float32"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64), "log_var": None}, TypeError, "x must be a floating-point tensor"),
    ({"x": [[0.0]]}, TypeError, "x must be a tensor, given list"),
    ({"log_var": 0.0}, TypeError, "log_var must be a floating-point tensor, given float"),
    ({"log_var": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "x is torch.float32 but log_var is torch.float64"),
    ({"x": torch.zeros(4, 3, device="meta")}, ValueError, "x is on meta but log_var is on cpu"),
    ({"kernel": "laplacian"}, ValueError, "kernel must be 'imq' or 'gaussian', given 'laplacian'"),
    ({"estimator": "both"}, ValueError, "estimator must be 'unbiased' or 'biased', given 'both'"),
    ({"combine": "max"}, ValueError, "combine must be 'sum' or 'mean', given 'max'"),
    ({"scales": ()}, ValueError, r"scales must be one or more positive numbers, given \(\)"),
    ({"scales": (1.0, -1.0)}, ValueError, "scales must be one or more positive numbers"),
    ({"scales": 0.5}, ValueError, "scales must be one or more positive numbers, given 0.5"),
    ({"scales": "ab"}, ValueError, "scales must be one or more positive numbers, given 'ab'"),
    ({"prior_std": torch.tensor(1.0)}, ValueError, r"prior_std must be a positive number, .* value is prior_std.item\(\)"),
    ({"tolerance": "1e-6"}, ValueError, "tolerance must lie between 1e-12 and 1e-2, given '1e-6'"),
    ({"prior_std": 0.0}, ValueError, "prior_std must be a positive number, given 0.0"),
    ({"tolerance": 0.0}, ValueError, "tolerance must lie between 1e-12 and 1e-2, given 0.0"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'; the backends are cpp, cuda, triton, reference"),
    ({"backend": "cuda"}, BackendError, "mmd2_to_normal: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    with pytest.raises(error, match=message):
        mmd2_to_normal(**{**GOOD, **changes})
