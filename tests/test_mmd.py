"""mmd2 and kernel_sums: values and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, explain, kernel_sums, mmd2, native
from latent_engine.kernels.backends import Op
from latent_engine.kernels.mmd import ESTIMATORS, KERNELS, RATIONAL_SCALES, SUPPORT, WAE_SCALES

from oracles import assert_within_budget, longdouble
from oracles import mmd as oracle

# N, M, D: the least, primes, whole and broken blocks, one sample much larger than the other
SIZES = [(2, 2, 1), (3, 2, 5), (17, 33, 3), (64, 64, 8), (65, 130, 7), (5, 140, 2), (70, 67, 33)]
OTHERS = [k for k in KERNELS if k != "imq"]


def samples(N: int, M: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, D, generator=g).to(device, dtype), (0.3 + 1.2 * torch.randn(M, D, generator=g)).to(device, dtype)]


def run(inputs: list[Tensor], **options) -> list[Tensor]:
    """MMD² and its gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = mmd2(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def kernel_arguments(kernel: str, D: int, scales=None, unit=None) -> tuple[str, tuple[float, ...], float]:
    default = {"energy": (), "rational_quadratic": RATIONAL_SCALES}.get(kernel, WAE_SCALES)
    return kernel, default if scales is None else scales, 2.0 * D if unit is None else unit


def check(inputs: list[Tensor], backend: str, kernel: str = "imq", estimator: str = "unbiased", **options) -> None:
    """Value and gradients of `backend` are within the error budget."""
    actual = run(inputs, backend=backend, kernel=kernel, estimator=estimator, **options)
    direct = run(inputs, backend="reference", kernel=kernel, estimator=estimator, **options)
    exact, scales = oracle.exact(*inputs, *kernel_arguments(kernel, inputs[0].shape[1], **options), estimator)
    for name, a, d, e, s in zip(("value", "x", "y"), actual, direct, exact, scales, strict=True):
        assert_within_budget(f"{kernel} {estimator} {name}", a, d, e, s)


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter takes milliseconds a block: few points, test_gpu_mmd.py has the blocks and splits."""
    return backend == "triton" and device == "cpu"


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-M{s[1]}-D{s[2]}")
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    if interpreted(backend, device) and size[0] * size[1] > 1000:
        pytest.skip("too slow in the interpreter")
    for dtype, estimator in itertools.product(dtypes_of(backend), ESTIMATORS[1:]):
        check(samples(*size, dtype, device), backend, estimator=estimator)


@pytest.mark.parametrize("kernel", OTHERS)
def test_every_kernel(implementation, kernel):
    backend, device = implementation
    for dtype, estimator in itertools.product(dtypes_of(backend), ESTIMATORS[1:]):
        check(samples(9 if interpreted(backend, device) else 67, 35, 5, dtype, device), backend, kernel, estimator)


@pytest.mark.parametrize("scales", [(1.0,), (0.3, 4.0), tuple(0.1 * s for s in range(1, 9)),
                                    tuple(0.1 * s for s in range(1, 12)), (1e-6, 1.0, 1e6)],
                         ids=lambda s: f"{len(s)}-to-{s[-1]:g}")
def test_any_list_of_scales(implementation, scales):
    backend, device = implementation
    for kernel in (KERNELS[:4] if device == "cuda" or backend == "cpp" else KERNELS[:2]):
        check(samples(20, 9, 3, device=device), backend, kernel, scales=scales, unit=0.7)


def test_reference_is_the_formula():
    for kernel, dtype, estimator in itertools.product(KERNELS, (torch.float32, torch.float64), ESTIMATORS[1:]):
        check(samples(17, 5, 3, dtype), "reference", kernel, estimator)


def test_two_pairs_by_hand():
    """x = {0, 0}, y = {r, r}: MMD² = 2k(0) − 2k(r)."""
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 3.0, dtype=torch.float64)
    values = {"gaussian": np.exp(-9 / 2), "imq": 2 / 11, "laplacian": np.exp(-3 / 2**0.5), "rational_quadratic": 1 / 5.5}
    for kernel, k in values.items():
        assert mmd2(x, y, kernel=kernel, scales=[1.0]).item() == pytest.approx(2 - 2 * k, rel=1e-14)
        assert mmd2(x, y, kernel=kernel, scales=[1.0], estimator="biased").item() == pytest.approx(2 - 2 * k, rel=1e-14)
    assert mmd2(x, y, kernel="energy").item() == pytest.approx(6)


def test_agrees_with_scipys_energy_distance():
    stats = pytest.importorskip("scipy.stats")
    x, y = samples(40, 31, 1, torch.float64)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert mmd2(x, y, kernel="energy", estimator="biased").item() == pytest.approx(expected, rel=1e-12)


def test_penalty_of_wasserstein_auto_encoders():
    """The authors' formula: C = 2·D·σ²·scale; means over n(n−1) and n²; scales summed."""
    z, prior = samples(30, 30, 8, torch.float64)
    prior = prior * 2
    expected = 0.0
    for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        C = 2 * 8 * 2.0**2 * s
        zz, pp, zp = (C / (C + torch.cdist(a, b).square()) for a, b in ((z, z), (prior, prior), (z, prior)))
        expected += ((zz.sum() - 30) + (pp.sum() - 30)) / (30 * 29) - 2 * zp.sum() / 900
    assert mmd2(z, prior, unit=2 * 8 * 2.0**2).item() == pytest.approx(expected.item(), rel=1e-10)
    mean = mmd2(z, prior, unit=2 * 8 * 2.0**2, combine="mean")
    assert mean.item() == pytest.approx(expected.item() / 7, rel=1e-10)


def test_unbiased_over_all_samples_of_a_small_population():
    """The mean over all pairs of samples drawn without replacement is the unbiased value of the population."""
    population = samples(5, 5, 2, torch.float64)
    for kernel in KERNELS:
        values = [mmd2(population[0][list(i)], population[1][list(j)], kernel=kernel)
                  for i in itertools.combinations(range(5), 3) for j in itertools.combinations(range(5), 3)]
        torch.testing.assert_close(torch.stack(values).mean(), mmd2(*population, kernel=kernel))


def test_biased_is_never_negative_and_zero_for_equal_samples():
    for kernel in KERNELS:
        x, y = samples(20, 20, 3, torch.float64)
        assert mmd2(x, y, kernel=kernel, estimator="biased") > 0
        assert mmd2(x, x.clone(), kernel=kernel, estimator="biased").abs() < 1e-14


def test_kernel_sums(implementation):
    backend, device = implementation
    inputs = samples(40, 23, 4, device=device)
    weights = torch.tensor([0.3, -1.2, 2.0], device=device)
    for kernel in ("gaussian", "energy"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        sums = torch.stack(kernel_sums(*leaves, kernel=kernel, backend=backend))
        direct = torch.stack(kernel_sums(*leaves, kernel=kernel, backend="reference"))
        arguments = kernel_arguments(kernel, 4)
        exact = np.array([oracle.exact(*inputs, *arguments, "sum", s)[0][0] for s in np.eye(3)])
        assert_within_budget("sums", sums.detach(), direct.detach(), exact)
        want, scales = oracle.exact(*inputs, *arguments, "sum", [float(w) for w in weights])
        for name, a, d, e, s in zip("xy", torch.autograd.grad((sums * weights).sum(), leaves),
                                    torch.autograd.grad((direct * weights).sum(), leaves), want[1:], scales[1:], strict=True):
            assert_within_budget(name, a, d, e, s)


def test_kernel_sums_of_empty_samples(implementation):
    backend, device = implementation
    for N, M in ((0, 3), (3, 0), (0, 0), (1, 1)):
        x, y = samples(N, M, 2, device=device)
        leaves = [x.requires_grad_(), y.requires_grad_()]
        sums = kernel_sums(*leaves, kernel="gaussian", backend=backend)
        torch.testing.assert_close(sums, kernel_sums(*leaves, kernel="gaussian", backend="reference"))
        grads = torch.autograd.grad(sum(sums), leaves)
        assert [g.shape for g in grads] == [(N, 2), (M, 2)] and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0], "transposed": lambda t: t.mT.contiguous().mT,
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    check([make(t) for t in samples(37, 11, 6, device=device)], backend)


@pytest.mark.parametrize("kernel", KERNELS)
def test_identical_and_far_points(implementation, kernel):
    """Points on one another, where cusps have no slope, and points so far that powers of their distance overflow."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        x, y = samples(20 if interpreted(backend, device) else 70, 12, 3, dtype, device)
        x[5:9], y[3] = x[4], x[4]
        check([x, y], backend, kernel)
        x[11], y[7], x[12] = 1e4, -1e6, 3e9
        check([x, y], backend, kernel)
        check([torch.zeros_like(x), torch.zeros_like(y)], backend, kernel)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-12, 3e-14, 1e-16])
def test_tiny_points_and_widths(kernel, scale):
    inputs = [scale * t for t in samples(33, 20, 3)]
    unit = {} if kernel == "energy" else {"unit": 6 * scale**2}
    actual = run(inputs, kernel=kernel, **unit)
    exact = run([t.double() for t in inputs], kernel=kernel, **unit, backend="reference")
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() <= 1e-6 * e.norm()


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
def test_widths_beyond_the_range_of_floats():
    inputs = samples(9, 7, 3)
    for options in ({"scales": [1e-300]}, {"unit": 1e-60}, {"scales": [1e-30, 1.0], "kernel": "imq"}):
        value, *gradients = run(inputs, **{"kernel": "gaussian", **options})
        assert value.isfinite() and all(g.isfinite().all() for g in gradients)


def test_a_common_offset_costs_no_digits(implementation):
    """The direct form: the differences of samples around 1000 are those around 0."""
    backend, device = implementation
    x, y = (torch.round(t * 64) / 64 for t in samples(40, 30, 5, device=device))
    for a, b in zip(run([x + 1000, y + 1000], backend=backend), run([x, y], backend=backend), strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_only_what_depends_on_it(implementation):
    backend, device = implementation
    x, y = samples(13 if interpreted(backend, device) else 70, 12, 3, device=device)
    x[-1, 1] = torch.nan
    for kernel in KERNELS:
        value, dx, dy = run([x, y], backend=backend, kernel=kernel)
        assert value.isnan() and dx.isnan().any(1).all() and dy.isnan().any(1).all()
        xx, yy, xy = kernel_sums(x, y, kernel=kernel, backend=backend)
        assert xx.isnan() and xy.isnan() and yy.isfinite()


def test_infinite_points_have_kernel_zero(implementation):
    backend, device = implementation
    x, y = samples(20, 12, 3, device=device)
    kept = kernel_sums(x[1:], y, backend=backend)
    x[0] = torch.inf
    torch.testing.assert_close(kernel_sums(x, y, backend=backend), kept)


def test_only_needed_gradients(implementation):
    backend, device = implementation
    inputs = samples(30, 17 if interpreted(backend, device) else 70, 3, device=device)
    full = run(inputs, backend=backend)
    for i in range(2):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        value = mmd2(*leaves, backend=backend)
        value.backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(2)]
        torch.testing.assert_close(value.detach(), full[0])
        torch.testing.assert_close(leaves[i].grad, full[1 + i])
    torch.testing.assert_close(mmd2(*inputs, backend=backend), full[0])


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if interpreted(backend, device):
        pytest.skip("too slow in the interpreter")
    for N, M in ((700, 500), (100, 130)):
        inputs = samples(N, M, 17, device=device)
        first = same_at_any_threads(lambda inputs=inputs: run(inputs, backend=backend))
        x, y = (t.double() for t in inputs)
        expected = run([x, y], backend="reference")
        for name, a, e in zip(("value", "x", "y"), first, expected, strict=True):
            assert (a - e).norm() <= 1e-5 * e.norm(), name


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64) for kernel in KERNELS
        for t in run(samples(*size, dtype), kernel=kernel, backend="cpp")])


def test_half_precision_gives_float32(implementation):
    backend, device = implementation
    for dtype in (torch.bfloat16, torch.float16):
        x, y = (t.requires_grad_() for t in samples(21, 13, 3, dtype, device))
        value = mmd2(x, y, backend=backend)
        value.backward()
        assert value.dtype == torch.float32 and x.grad.dtype == dtype
        torch.testing.assert_close(value, mmd2(x.detach().float(), y.detach().float(), backend="reference"))


def test_autocast_computes_in_float32():
    x, y = samples(21, 13, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value = mmd2(x.bfloat16(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mmd2(x.bfloat16().float(), y))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_once_and_twice(kernel):
    leaves = [t.requires_grad_() for t in samples(4, 3, 2, torch.float64)]
    for backend in (["cpp"] if native.cpp else []) + ["reference"]:
        def f(*args, backend=backend):
            return mmd2(*args, kernel=kernel, backend=backend)

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    x, y = (t.requires_grad_(grad) for t in samples(6, 5, 3))
    torch.library.opcheck(ops.mmd_fwd.default, (x, y, 1, [1.0, 2.0], 3.0, 1, [1.0, 1.0, -2.0], grad, grad))
    torch.library.opcheck(ops.mmd_kernel.default, (x, y, 0, [1.0], 3.0))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: 3 * mmd2(x, y), fullgraph=True, dynamic=dynamic)
    for N in (20, 33):
        leaves = [t.requires_grad_() for t in samples(N, 12, 4)]
        value = compiled(*leaves)
        torch.testing.assert_close(value, 3 * mmd2(*leaves))
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(3 * mmd2(*leaves), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_functional_transforms():
    x, y = samples(20, 12, 4, torch.float64)
    expected = run([x, y])
    torch.testing.assert_close(torch.func.grad(mmd2)(x, y), expected[1])
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.func.vmap(lambda a: mmd2(a, y))(x.expand(3, 20, 4))


GOOD = {"x": torch.zeros(4, 3), "y": torch.zeros(5, 3)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"y": torch.zeros(5, 2)}, ValueError, r"x and y must have shapes \[N, D\] and \[M, D\] .* given \[4, 3\] and \[5, 2\]"),
    ({"x": torch.zeros(3)}, ValueError, r"must have shapes \[N, D\] and \[M, D\]"),
    ({"x": torch.zeros(4, 0), "y": torch.zeros(5, 0)}, ValueError, "one D ≥ 1"),
    ({"x": torch.zeros(1, 3)}, ValueError, "needs 2 or more points in each .* N = 1 and M = 5; use larger samples or"),
    ({"y": torch.zeros(0, 3), "estimator": "biased"}, ValueError, "needs 1 or more points in each .* N = 4 and M = 0"),
    ({"x": [[0.0]]}, TypeError, "x must be a tensor, given list"),
    ({"y": None}, TypeError, "y must be a floating-point tensor, given NoneType"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x is torch.int64 but y is torch.float32"),
    ({"y": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "x is torch.float32 but y is torch.float64"),
    ({"y": torch.zeros(5, 3, device="meta")}, ValueError, "x is on cpu but y is on meta"),
    ({"kernel": "rbf"}, ValueError, "kernel must be one of 'gaussian', 'imq', .* given 'rbf'"),
    ({"estimator": "sum"}, ValueError, "estimator must be one of 'unbiased', 'biased', given 'sum'"),
    ({"combine": "max"}, ValueError, "combine must be one of 'sum', 'mean', given 'max'"),
    ({"scales": []}, ValueError, r"scales must be a list of one or more positive numbers, given \[\]"),
    ({"scales": [1.0, -1.0]}, ValueError, "scales must be a list of one or more positive numbers"),
    ({"scales": [float("nan")]}, ValueError, "scales must be a list of one or more positive numbers"),
    ({"scales": 1.0}, ValueError, "scales must be a list of one or more positive numbers, given 1.0"),
    ({"unit": 0.0}, ValueError, "unit must be a positive number, given 0.0"),
    ({"unit": torch.ones(())}, ValueError, "unit must be a positive number, given tensor.* a tensor's value is"),
    ({"kernel": "energy", "scales": [1.0]}, ValueError, "the energy kernel −r has no scale; leave scales and unit out"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "mmd2: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    with pytest.raises(error, match=message):
        mmd2(**{**GOOD, **changes})


def test_too_many_scales_for_a_backend():
    """The CUDA kernels take 64: the automatic choice falls back, and a forced backend says why."""
    x = torch.zeros(4, 3)
    limit = replace(SUPPORT["cuda"], devices=("cpu",))
    assert limit.rejection(x, 64) is None
    op = Op("mmd2", "mmd_fwd", {"cpp": limit, "triton": SUPPORT["cpp"]})
    if native.cpp:
        assert op.choose(x, scales=64) == "cpp" and op.choose(x, scales=65) == "reference"
        with pytest.raises(BackendError, match=r"mmd2: the backend 'cpp' .* serves up to 64 scales, given 65"):
            op.choose(x, "cpp", 65)
    assert set(explain(mmd2, x, x, scales=[1.0] * 65)) == {"cpp", "cuda", "triton", "reference"}
    value = mmd2(x, x + 1, scales=[0.5] * 65)
    torch.testing.assert_close(value, 65 * mmd2(x, x + 1, scales=[0.5]))


def test_longdouble_oracle_slopes_are_those_of_the_values():
    u = np.linspace(0.1, 9, 40).astype(np.longdouble)
    for kernel in KERNELS:
        arguments = kernel_arguments(kernel, 3)
        h = np.longdouble(1e-6)
        numeric = (oracle.profile(u + h, *arguments)[0] - oracle.profile(u - h, *arguments)[0]) / (2 * h)
        np.testing.assert_allclose(oracle.profile(u, *arguments)[1].astype(float), numeric.astype(float), rtol=1e-8)
    assert longdouble(torch.zeros(1)).dtype == np.longdouble
