"""logistic_mixture_log_prob: values and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import numpy as np
import pytest
import scipy.stats
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, logistic_mixture_log_prob, native

from oracles import assert_within_budget
from oracles import logistic_mixture as oracle

# NumPy, on which Triton's interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
LEVELS = torch.arange(256) / 127.5 - 1
# N, C, K, H, W: one, primes, whole and broken groups of pixels, several parts of an image, more than one group of each
SIZES = [(1, 1, 1, 1, 1), (2, 3, 1, 1, 3), (3, 1, 5, 4, 4), (2, 3, 4, 5, 7), (1, 3, 10, 8, 8), (2, 1, 3, 28, 28),
         (1, 3, 2, 23, 29)]


def images(N: int, C: int, K: int, H: int, W: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
           lead: tuple[int, ...] = (), seed: int = 0) -> list[Tensor]:
    """Levels, of which a quarter are at the edges, and parameters of components that are thin, wide, near and far."""
    g = torch.Generator().manual_seed(seed)
    level = torch.randint(256, (N, C, H, W), generator=g)
    level = torch.where(torch.rand(level.shape, generator=g) < 0.25, 255 * (level // 128), level)
    rows = 10 if C == 3 else 3
    params = torch.randn(*lead, N, rows, K, H, W, generator=g)
    params[..., 2::3, :, :, :] = 2 * params[..., 2::3, :, :, :] - 4
    return [LEVELS[level].to(device, dtype), params.flatten(-4, -3).to(device, dtype)]


def run(inputs: list[Tensor], grad: Tensor | None, **options) -> list[Tensor]:
    """Log-likelihood and the gradient of the parameters."""
    x, params = inputs[0], inputs[1].detach().requires_grad_()
    value = logistic_mixture_log_prob(x, params, **options)
    return [value.detach()] if grad is None else [value.detach(), *torch.autograd.grad(value, params, grad)]


def check(inputs: list[Tensor], backend: str, scaled: bool = False, **options) -> None:
    """Value and gradient of `backend` are within the error budget."""
    grad = torch.randn(inputs[1].shape[:-3], generator=torch.Generator().manual_seed(1)).to(inputs[1])
    actual = run(inputs, grad, backend=backend, **options)
    direct = run(inputs, grad, backend="reference", **options)
    exact, scales = oracle.exact(*inputs, grad, options.get("mask"))
    for name, a, d, e, s in zip(("value", "params"), actual, direct, exact, scales, strict=True):
        assert_within_budget(name, a, d, e, s if scaled else None)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "N{}-C{}-K{}-{}x{}".format(*s))
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(images(*size, dtype, device), backend)


def test_reference_is_the_formula():
    for dtype in (torch.float32, torch.float64):
        for C in (1, 3):
            check(images(2, C, 4, 5, 3, dtype), "reference")


def test_agrees_with_scipy():
    """One component of one channel is the difference of two logistic distribution functions."""
    x, params = images(1, 1, 1, 16, 16, torch.float64)
    mean, scale = params[0, 1].numpy(), params[0, 2].clamp(min=-7).exp().numpy()
    logistic, x_ = scipy.stats.logistic(mean, scale), x[0, 0].numpy()
    upper = np.where(x_ > 1 - 1e-9, 1, logistic.cdf(x_ + 1 / 255))
    lower = np.where(x_ < -1 + 1e-9, 0, logistic.cdf(x_ - 1 / 255))
    wide = (scale > 0.02) & (np.abs(x_ - mean) < 5 * scale)  # where the difference keeps its digits
    ours = logistic_mixture_log_prob(x, params, mask=torch.from_numpy(wide)[None])
    assert wide.sum() > 50
    np.testing.assert_allclose(ours.item(), np.log((upper - lower)[wide]).sum(), rtol=1e-11)


def test_grey_levels_sum_to_one(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for hundreds of images")
    for dtype in dtypes_of(backend):
        _, params = images(1, 1, 4, 3, 5, dtype, device)
        params = params[0].reshape(12, -1).T[:, :, None, None]  # every pixel an image
        log_prob = torch.stack([logistic_mixture_log_prob(level.expand(15, 1, 1, 1), params, backend=backend)
                                for level in LEVELS.to(params)])
        torch.testing.assert_close(log_prob.exp().sum(0), torch.ones_like(log_prob[0]))


def test_blue_sums_to_the_density_of_red_and_green(implementation):
    """Summed over the 256 levels of the last channel, what is left is the mixture of the first two."""
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for hundreds of images")
    x, params = images(1, 3, 3, 1, 1, device=device)
    x[0, :2, 0, 0] = torch.tensor([-1.0, 51 / 255])
    images_of_all_blues = x.repeat(256, 1, 1, 1)
    images_of_all_blues[:, 2, 0, 0] = LEVELS.to(x)
    with_blue = logistic_mixture_log_prob(images_of_all_blues, params.expand(256, -1, -1, -1), backend=backend)
    logits, rest = params[0, :3, 0, 0].double(), params[0, 3:, 0, 0].double().view(3, 3, 3)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for k in range(3):
        bins = 1.0
        for c in range(2):
            mean = rest[c, 0, k] + (rest[0, 2, k].tanh() * x[0, 0, 0, 0] if c else 0)
            parameters = torch.stack((torch.zeros_like(mean), mean, rest[c, 1, k])).view(1, 3, 1, 1)
            bins *= logistic_mixture_log_prob(x[:, c:c + 1].double(), parameters, backend="reference").exp()[0]
        total += logits.softmax(0)[k] * bins
    torch.testing.assert_close(with_blue.double().exp().sum(), total, rtol=1e-5, atol=0)


def test_sample_axes_broadcast_the_image(implementation):
    backend, device = implementation
    x, params = images(2, 3, 1, 4, 5, device=device, lead=(2, 2))
    check([x, params], backend)
    value = logistic_mixture_log_prob(x, params, backend=backend)
    assert value.shape == (2, 2, 2)
    torch.testing.assert_close(value[1, 0], logistic_mixture_log_prob(x, params[1, 0], backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("C", [1, 3])
def test_mask(implementation, C):
    backend, device = implementation
    x, params = images(3, C, 2, 7, 11, device=device, lead=(2,))
    mask = (torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(2)) < 0.6).to(device)
    mask[1] = False
    params[..., :, 0, 0], x[:, :, 0, 1] = torch.nan, torch.nan
    mask[:, 0, :2] = False
    check([x.nan_to_num(0), params.nan_to_num(0)], backend, scaled=True, mask=mask)
    clean = run([x.nan_to_num(0), params.nan_to_num(0)], torch.ones(2, 3, device=device), backend=backend, mask=mask)
    for a, b in zip(run([x, params], torch.ones(2, 3, device=device), backend=backend, mask=mask), clean, strict=True):
        assert torch.equal(a, b)
    assert (clean[0][:, 1] == 0).all() and (clean[1].movedim(-3, 0)[:, :, ~mask] == 0).all()


@pytest.mark.parametrize("layout", ["sliced", "channels-last", "expanded"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0],
            "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
            "expanded": lambda t: t[:1].expand_as(t)}[layout]
    check([make(t) for t in images(3, 3, 2, 5, 4, device=device)], backend)


@pytest.mark.parametrize("C", [1, 3])
def test_extreme_parameters(implementation, C):
    """Scales of e^±10, means of ±1000, a component with all of the weight, each at inner and edge levels."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        x, params = images(2, C, 4, 6, 6, dtype, device)
        p = params.view(2, -1, 4, 6, 6)
        p[:, 2::3, 0], p[:, 2::3, 1] = -10, 10
        p[:, 1::3, 2, 0], p[:, 1::3, 2, 1] = 1e3, -1e3
        p[:, 0, 1:, 3], p[:, 0, :, 4] = -torch.inf, 40 * p[:, 0, :, 4]
        x[:, :, :, 0], x[:, :, :, 1] = -1, 1
        check([x, params], backend, scaled=True)
        value, grad = run([x, params], torch.ones(2, device=device, dtype=dtype), backend=backend)
        assert value.isfinite().all() and grad.isfinite().all()
        assert (grad.view_as(p)[:, :, 1:, 3] == 0).all()
        assert (grad.view_as(p)[:, 2::3, 0] == 0).all(), "no gradient below the least log-scale"


@pytest.mark.parametrize("level", [100.0, -1e4, 1e20, 1e4 * torch.arange(-2.0, 3.0)[:, None, None]],
                         ids=["100", "-1e4", "1e20", "rising"])
def test_levels_of_the_logits_cost_no_digits(implementation, level):
    """A level that all logits share, and levels so different that only the last component counts."""
    backend, device = implementation
    for C in (1, 3):
        x, params = images(2, C, 5, 4, 4, device=device)
        params.view(2, -1, 5, 4, 4)[:, 0] += torch.as_tensor(level, device=device)
        check([x, params], backend)


@pytest.mark.parametrize("log_scale", [-7.0, -6.9, 0.0, 30.0, 60.0])
def test_single_scales_keep_their_digits(implementation, log_scale):
    """Bins much wider and much thinner than the scale; a bin's probability is never 0."""
    backend, device = implementation
    x = LEVELS.view(16, 1, 1, 16).to(device)
    params = torch.zeros(16, 3, 1, 16, device=device)
    params[:, 1], params[:, 2] = 0.1, log_scale
    check([x, params], backend, scaled=True)
    assert logistic_mixture_log_prob(x, params, backend=backend).isfinite().all()


def test_nan_reaches_only_its_image(implementation):
    backend, device = implementation
    for row in (0, 2, 5, 7, 19):  # logit, mean, log-scale, coefficient
        x, params = images(3, 3, 2, 2, 5, device=device)
        params[1, row, 1, 3] = torch.nan
        value, grad = run([x, params], torch.ones(3, device=device), backend=backend)
        assert value.isnan().tolist() == [False, True, False]
        pixels = grad.isnan().any(1)
        assert pixels[1, 1, 3] and pixels.sum() == 1
    x[2, 1, 1, 4], params[1] = torch.nan, 0.0
    assert run([x, params], None, backend=backend)[0].isnan().tolist() == [False, False, True]


def test_infinitely_far_component_has_no_weight(implementation):
    backend, device = implementation
    x, params = images(2, 1, 3, 2, 2, device=device)
    params[:, 3] = torch.inf  # the mean of the first component
    value = run([x.clamp(-0.9, 0.9), params], None, backend=backend)[0]
    assert value.isfinite().all()
    params[:, 3:6] = torch.inf
    assert (run([x.clamp(-0.9, 0.9), params], None, backend=backend)[0] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 0, 5), (0, 1, 0, 0)], ids=str)
def test_empty_sizes(implementation, shape):
    backend, device = implementation
    N, C, H, W = shape
    x, params = images(N, C, 2, H, W, device=device, lead=(3,))
    value, grad = run([x, params], torch.ones(3, N, device=device), backend=backend)
    assert torch.equal(value, torch.zeros(3, N, device=device)) and grad.shape == params.shape
    value, grad = run([x, params[:0]], torch.ones(0, N, device=device), backend=backend)
    assert value.shape == (0, N) and grad.shape == (0, *params.shape[1:])


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    inputs = images(5, 3, 5, 33, 31, device=device)
    grad = torch.randn(5, generator=torch.Generator().manual_seed(1)).to(device)
    same_at_any_threads(lambda: run(inputs, grad, backend=backend))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64)
        for t in run(images(*size, dtype), torch.ones(size[0], dtype=dtype), backend="cpp")])


def test_large_image_keeps_its_digits(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for large sizes")
    x, params = images(1, 1, 2, 700, 500, device=device)
    value = logistic_mixture_log_prob(x, params, backend=backend)
    exact = logistic_mixture_log_prob(x.double(), params.double(), backend="reference")
    assert (value - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()


def test_gradient_too_large_for_the_cache_is_that_of_its_halves(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for large sizes")
    x, params = images(30, 3, 10, 32, 32, device=device)  # 12.3 MB
    grad = torch.randn(30, generator=torch.Generator().manual_seed(1)).to(device)
    halves = [run([x[rows], params[rows]], grad[rows], backend=backend) for rows in (slice(15), slice(15, None))]
    for found, *parts in zip(run([x, params], grad, backend=backend), *halves, strict=True):
        assert torch.equal(found, torch.cat(parts))


def test_half_precision_gives_float32(implementation):
    backend, device = implementation
    x, params = images(2, 3, 3, 4, 4, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        half = params.to(dtype).requires_grad_()
        value = logistic_mixture_log_prob(x, half, backend=backend)
        value.sum().backward()
        torch.testing.assert_close(value, logistic_mixture_log_prob(x, half.detach().float(), backend="reference"))
        assert half.grad.dtype == dtype and value.dtype == torch.float32
        assert logistic_mixture_log_prob(x.to(dtype), half, backend=backend).dtype == torch.float32


def test_autocast_computes_in_float32():
    x, params = images(2, 3, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        value = logistic_mixture_log_prob(x, params.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, logistic_mixture_log_prob(x, params.bfloat16().float()))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("C", [1, 3])
def test_gradcheck_once_and_twice(backend, C):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    x, params = images(2, C, 2, 1, 2, torch.float64, lead=(2,))
    params.requires_grad_()

    def f(params):
        return logistic_mixture_log_prob(x, params, mask=torch.tensor([[[True, True]], [[False, True]]]), backend=backend)

    assert torch.autograd.gradcheck(f, params)
    assert torch.autograd.gradgradcheck(f, params)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    for C in (1, 3):
        x, params = images(2, C, 3, 3, 4, lead=(2,))
        x, params = x.flatten(2), params.flatten(0, 1).flatten(2).requires_grad_(grad)
        for mask in (None, torch.rand(2, 12) < 0.5):
            torch.library.opcheck(ops.logistic_mixture_fwd.default, (x, params, mask, grad))
            _, stats = ops.logistic_mixture_fwd(x, params.detach(), mask, True)
            torch.library.opcheck(ops.logistic_mixture_bwd.default, (torch.ones(4), x, params.detach(), mask, stats))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(x, params):
        return (2 * logistic_mixture_log_prob(x, params.tanh())).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (2, 3):
        x, params = images(N, 3, 2, 3, 4)
        params.requires_grad_()
        expected, = torch.autograd.grad(loss(x, params), params)
        torch.testing.assert_close(torch.autograd.grad(compiled(x, params), params)[0], expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, params), loss(x, params))


def test_func_grad_and_vmap():
    x, params = images(2, 3, 2, 3, 4, torch.float64)
    leaf = params.clone().requires_grad_()
    expected, = torch.autograd.grad(logistic_mixture_log_prob(x, leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda p: logistic_mixture_log_prob(x, p).sum())(params), expected)
    if native.cpp:
        with pytest.raises(NotImplementedError, match="vmap is not supported; loop over the batches"):
            torch.func.vmap(lambda p: logistic_mixture_log_prob(x, p))(params.expand(2, *params.shape))


def test_invariances():
    x, params = images(2, 3, 5, 4, 4, torch.float64)
    value = logistic_mixture_log_prob(x, params)
    p = params.view(2, 10, 5, 4, 4)
    torch.testing.assert_close(logistic_mixture_log_prob(x, p.flip(2).flatten(1, 2)), value)
    shifted = p.clone()
    shifted[:, 0] += 3
    torch.testing.assert_close(logistic_mixture_log_prob(x, shifted.flatten(1, 2)), value)
    torch.testing.assert_close(logistic_mixture_log_prob(x, p.repeat(1, 1, 2, 1, 1).flatten(1, 2)), value)


GOOD = {"x": torch.zeros(2, 3, 4, 5), "params": torch.zeros(2, 20, 4, 5)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": torch.zeros(2, 2, 4, 5)}, ValueError, r"x must have shape \[N, C, H, W\] with C = 3 or 1, given \[2, 2, 4, 5\]"),
    ({"x": torch.zeros(3, 4, 5)}, ValueError, r"x must have shape \[N, C, H, W\]"),
    ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, TypeError, "x must be a floating-point tensor, given torch.uint8"),
    ({"x": torch.zeros(2, 3, 4, 5, requires_grad=True)}, ValueError, r"x is data and gets no gradient.* x.detach\(\)"),
    ({"x": [0.0]}, TypeError, "x must be a floating-point tensor, given list"),
    ({"x": torch.zeros(2, 3, 4, 5).double()}, TypeError, "params is torch.float32 but x is torch.float64"),
    ({"params": torch.zeros(2, 21, 4, 5)}, ValueError, r"params must have shape .* = \[..., 2, 10·K, 4, 5\] for C = 3"),
    ({"params": torch.zeros(2, 0, 4, 5)}, ValueError, "and K components, given"),
    ({"params": torch.zeros(3, 20, 4, 5)}, ValueError, r"given \[3, 20, 4, 5\]"),
    ({"params": torch.zeros(2, 20, 5, 4)}, ValueError, r"given \[2, 20, 5, 4\]"),
    ({"params": torch.zeros(20, 4, 5)}, ValueError, r"given \[20, 4, 5\]"),
    ({"params": [0.0]}, TypeError, "params must be a tensor, given list"),
    ({"params": torch.zeros(2, 20, 4, 5, device="meta")}, ValueError, "params is on meta but x is on cpu"),
    ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask must be a boolean tensor, given torch.float32"),
    ({"mask": True}, TypeError, "mask must be a boolean tensor, given bool"),
    ({"mask": torch.ones(2, 1, 4, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \[N, H, W\] = \[2, 4, 5\]"),
    ({"mask": torch.ones(2, 4, 5, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta but x is on cpu"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "logistic_mixture_log_prob: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    if changes.get("backend") == "cuda" and torch.cuda.is_available():
        message = "serves cuda tensors, given a cpu tensor"
    with pytest.raises(error, match=message):
        logistic_mixture_log_prob(**{**GOOD, **changes})
