"""The likelihoods: values and gradients of every implementation against independent formulas, on odd inputs."""

import itertools

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from scipy import stats
from torch import Tensor

from latent_engine.kernels import (
    bernoulli_log_prob,
    discretized_logistic_log_prob,
    gaussian_log_prob,
    logistic_mixture_log_prob,
    negative_binomial_log_prob,
)

from oracles import assert_within_budget
from oracles import likelihood as oracle

# NumPy, on which Triton's interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
OPS = (bernoulli_log_prob, gaussian_log_prob, discretized_logistic_log_prob, negative_binomial_log_prob)
KINDS = pytest.mark.parametrize("kind", range(4), ids=["bernoulli", "gaussian", "logistic", "counts"])
NAMES = ("x", "a", "b")
SIZES = [(1, 1, 1), (2, 2, 5), (3, 1, 16), (1, 2, 33), (1, 1, 1100)]


def draw(kind: int, S: int, N: int, P: int, dtype: torch.dtype = torch.float32, device: str = "cpu", shared: tuple = (),
         seed: int = 0) -> list[Tensor]:
    """x[N, P] near a decoder's output [S, N, P], and the second parameter of shape `shared`."""
    g = torch.Generator().manual_seed(seed)
    noise, z = torch.randn(S, N, P, generator=g), torch.randn(N, P, generator=g)
    second = torch.randn(shared, generator=g)
    tensors = ([(z > 0).float(), 3 * noise], [z, noise, second],
               [(127.5 * (1 + z.tanh())).round() / 127.5 - 1, z.tanh() + 0.1 * noise, second - 3],
               [(4 * z.exp()).round(), (z + noise).exp(), second])[kind]
    return [t.to(device, dtype) for t in tensors]


def run(kind: int, inputs: list[Tensor], grad: Tensor | None, **options) -> list[Tensor]:
    """Sum of the log-densities and the gradients of all inputs, zeros for data."""
    leaves = [t.detach().requires_grad_(kind < 2 or i > 0) for i, t in enumerate(inputs)]
    value = OPS[kind](*leaves, **options)
    if grad is None:
        return [value.detach()]
    grads = iter(torch.autograd.grad(value, [t for t in leaves if t.requires_grad], grad))
    return [value.detach(), *(next(grads) if t.requires_grad else torch.zeros_like(t) for t in leaves)]


def check(kind: int, inputs: list[Tensor], backend: str, mask: Tensor | None = None, **options) -> None:
    """Value and gradients of `backend` are within the error budget."""
    shape = OPS[kind](*inputs, backend="reference", **options).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    actual = run(kind, inputs, grad, backend=backend, mask=mask, **options)
    direct = run(kind, inputs, grad, backend="reference", mask=mask, **options)
    extra = {"exact": True} if kind == 3 and grad.dtype == torch.float64 else {}
    exact, scales = oracle.exact(kind, inputs, mask, grad, options.get("event_dims", 1), **extra)
    for name, a, d, e, s in zip(("value", *NAMES), actual, direct, exact, scales, strict=False):
        assert_within_budget(name, a, d, e, s)


def skip_interpreter(backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow; test_gpu_likelihood.py has the cases that it serves")


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@KINDS
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "S{}-N{}-P{}".format(*s))
def test_values_and_gradients(implementation, kind, size):
    backend, device = implementation
    skip_interpreter(backend, device)
    for dtype in dtypes_of(backend):
        if kind == 3 and dtype == torch.float64 and size[2] > 100:
            continue  # mpmath takes a second
        for shared in ((), size[2:], size):
            check(kind, draw(kind, *size, dtype, device, shared), backend)


@pytest.mark.parametrize(("name", "kind"), [("reference", k) for k in range(4)])
def test_reference_is_the_formula(name, kind):
    for dtype in (torch.float32, torch.float64):
        check(kind, draw(kind, 2, 3, 7, dtype, shared=(7,)), name)


@KINDS
@pytest.mark.parametrize("shared", [(2, 1, 1), (2, 1), (2, 1, 9), (2, 9)], ids=str)
def test_second_parameter_broadcasts(implementation, kind, shared):
    backend, device = implementation
    skip_interpreter(backend, device)
    check(kind, draw(kind, 2, 2, 9, device=device, shared=shared), backend)


@KINDS
@pytest.mark.parametrize("shape", [(2, 2, 21), (2, 21), (21,), (2, 1)], ids=str)
def test_missing_entries(implementation, kind, shape):
    """They count nothing whatever they hold."""
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 2, 2, 21, device=device, shared=(2, 2, 21))
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6).to(device)
    check(kind, inputs, backend, mask)
    inputs[1] = inputs[1].masked_fill(~mask, torch.nan)
    outputs = run(kind, inputs, torch.ones(2, 2, device=device), backend=backend, mask=mask)
    assert all(t.isfinite().all() for t in outputs)
    assert (outputs[2].masked_select(~mask) == 0).all()


@KINDS
@pytest.mark.parametrize(("x", "a", "b", "event_dims"), [
    ((2, 2, 3, 3), (2, 2, 2, 3, 3), (2, 1, 1), 3), ((2, 3, 3, 2), (2, 3, 3, 2), (2,), 3), ((7,), (7,), (), 1),
    ((2, 1, 4), (1, 2, 2, 4), (2, 4), 1), ((2, 1, 2, 4), (1, 2, 1, 4), (1,), 1), ((3, 5), (3, 5), (5,), 2),
    ((3,), (1, 3), (3,), 0)], ids=str)
def test_axes_of_batch_and_features(implementation, kind, x, a, b, event_dims):
    backend, device = implementation
    skip_interpreter(backend, device)
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randint(2, x, generator=g).float(), torch.rand(a, generator=g), torch.randn(b, generator=g) - 1]
    inputs = [t.to(device) for t in inputs[:2 if kind == 0 else 3]]
    check(kind, inputs, backend, event_dims=event_dims)
    lead = torch.broadcast_shapes(x, a)
    assert OPS[kind](*inputs, backend=backend, event_dims=event_dims).shape == lead[:len(lead) - event_dims]


@KINDS
def test_strided_inputs(implementation, kind):
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 2, 2, 11, device=device, shared=(11,))
    for make in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
                 lambda t: torch.cat((t, t))[:len(t)], lambda t: t[..., :1].expand_as(t), lambda t: t[:, ::2] if t.dim() > 2
                 else t[::2] if t.dim() > 1 else t):
        check(kind, [make(t) for t in inputs], backend)


def test_agrees_with_scipy(implementation):
    backend, device = implementation
    x, l = draw(0, 2, 2, 30, device=device)
    pmf = stats.bernoulli(1 / (1 + np.exp(-l.double().cpu().numpy()))).logpmf(x.cpu().numpy())
    np.testing.assert_allclose(bernoulli_log_prob(x, l, backend=backend).cpu(), pmf.sum(-1), rtol=1e-6)
    x, m, v = draw(1, 2, 2, 30, device=device, shared=(30,))
    pdf = stats.norm(m.double().cpu().numpy(), np.exp(0.5 * v.double().cpu().numpy())).logpdf(x.cpu().numpy())
    np.testing.assert_allclose(gaussian_log_prob(x, m, v, backend=backend).cpu(), pdf.sum(-1), rtol=1e-6)
    x, m, s = (t.double() for t in draw(2, 2, 2, 30, device=device, shared=(30,)))
    logistic = stats.logistic(m.cpu().numpy(), s.exp().cpu().numpy())
    level = x.cpu().numpy()
    upper, lower = np.where(level > 0.999, np.inf, level + 1 / 255), np.where(level < -0.999, -np.inf, level - 1 / 255)
    mass = np.where(level > m.cpu().numpy(), logistic.sf(lower) - logistic.sf(upper), logistic.cdf(upper) - logistic.cdf(lower))
    found = discretized_logistic_log_prob(x.float(), m.float(), s.float(), backend=backend)
    np.testing.assert_allclose(found.cpu(), np.log(mass).sum(-1), rtol=3e-6)
    x, mean, log_r = draw(3, 2, 2, 30, device=device, shared=(30,))
    r = log_r.double().exp().cpu().numpy()
    pmf = stats.nbinom(r, r / (r + mean.double().cpu().numpy())).logpmf(x.cpu().numpy())
    np.testing.assert_allclose(negative_binomial_log_prob(x, mean, log_r, backend=backend).cpu(), pmf.sum(-1), rtol=1e-6)


@pytest.mark.parametrize("log_scale", [-10.0, -7.0, -3.0, 0.0, 3.0, 10.0])
def test_256_levels_sum_to_one(implementation, log_scale):
    backend, device = implementation
    skip_interpreter(backend, device)
    levels = (torch.arange(256, device=device) / 127.5 - 1)[:, None, None]
    mean = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.77, 1.0, 2.0], device=device)[:, None]
    log_prob = discretized_logistic_log_prob(levels, mean.expand(256, 7, 1), torch.tensor(log_scale, device=device),
                                             backend=backend)
    torch.testing.assert_close(log_prob.double().exp().sum(0), torch.ones(7, device=device, dtype=torch.float64),
                               rtol=0, atol=4e-6 + 2**-25 * np.exp(-log_scale))  # the levels themselves are rounded


def test_counts_sum_to_one(implementation):
    backend, device = implementation
    skip_interpreter(backend, device)
    counts = torch.arange(4000.0, device=device)[:, None, None]
    mean = torch.tensor([0.0, 0.01, 1.0, 10.0, 60.0], device=device)[:, None].expand(4000, 5, 1)
    for log_r in (-1.0, 2.0, 20.0):
        log_prob = negative_binomial_log_prob(counts, mean, torch.tensor(log_r, device=device), backend=backend)
        torch.testing.assert_close(log_prob.double().exp().sum(0), torch.ones(5, device=device).double(), rtol=0, atol=1e-5)


def test_extreme_logits(implementation):
    backend, device = implementation
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 30.0, -30.0, 0.0], device=device)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5], device=device)
    check(0, [x, logits], backend)
    check(0, [x[4:6], logits[4:6]], backend)  # 2e^-30: nothing of it may be lost beside ones
    value = bernoulli_log_prob(x[:1], logits[:1], backend=backend)
    assert value.item() <= 0 and value.isfinite()


def test_extreme_scales(implementation):
    backend, device = implementation
    levels = (torch.tensor([0.0, 1.0, 127.0, 128.0, 254.0, 255.0], device=device) / 127.5 - 1).expand(5, 6)
    mean = torch.tensor([-3.0, -1.0, 0.001, 0.99, 5.0], device=device)[:, None].expand(5, 6)
    for log_scale in (-10.0, 10.0):
        check(2, [levels, mean, torch.tensor(log_scale, device=device)], backend)
    x, mean, _ = draw(1, 2, 3, 5, device=device)
    for log_var in (-60.0, 60.0):
        check(1, [x, mean, torch.tensor(log_var, device=device)], backend)
    value = gaussian_log_prob(x, x, torch.tensor(-100.0, device=device), backend=backend)  # 1/σ² overflows
    torch.testing.assert_close(value, torch.full((3,), 5 * 0.5 * (100 - np.log(2 * np.pi)), device=device))


def test_extreme_counts(implementation):
    """Where log-Gamma functions of 1e7 cancel to a few nats, and zero means."""
    backend, device = implementation
    x = torch.tensor([0.0, 1.0, 100.0, 1e5, 1e5, 1e6, 3.0, 0.0], device=device)
    mean = torch.tensor([1e-6, 1e-6, 90.0, 1e5, 1.01e5, 1e6, 1e4, 0.0], device=device)
    for log_r in (0.0,) if backend == "triton" and device == "cpu" else (-10.0, -2.0, 0.0, 5.0, 14.0, 25.0):
        check(3, [x, mean, torch.tensor(log_r, device=device)], backend)
        r = np.exp(log_r)
        value = negative_binomial_log_prob(x[:, None], mean[:, None], torch.tensor(log_r, device=device), backend=backend)
        expected = stats.nbinom.logpmf(x.double().cpu(), r, r / (r + mean.double().cpu()))
        spread = 1e-6 * (np.abs(expected) + (x - mean).abs().cpu().numpy()) + 1e-6
        if log_r < 20:  # SciPy's own r / (r + μ) rounds to one beyond
            assert (np.abs(value.cpu().numpy() - expected) <= 4 * spread + 1e-9 * r).all()
    zero = negative_binomial_log_prob(torch.tensor([[0.0], [2.0]], device=device), torch.zeros(2, 1, device=device),
                                      torch.tensor(0.0, device=device), backend=backend)
    assert zero.tolist() == [0.0, -torch.inf]


@pytest.mark.parametrize("log_r", [-60.0, -70.0, -75.0, -80.0])
def test_extreme_dispersions(implementation, log_r):
    """Where x² / r overflows, and at x = 0 r / μ underflows."""
    backend, device = implementation
    x = torch.tensor([1.0, 3.0, 1e3, 1e5, 1e7], device=device)
    inputs, grad = [x, torch.ones_like(x), torch.full_like(x, log_r)], torch.ones((), device=device)
    for name, a, e, s in zip(("value", *NAMES), run(3, inputs, grad, backend=backend), *oracle.exact(3, inputs, None, grad),
                             strict=True):
        assert_within_budget(name, a, torch.from_numpy(np.asarray(e, np.float32)), e, s)
    inputs = [torch.zeros(1, device=device), torch.tensor([1e20], device=device), torch.tensor([log_r], device=device)]
    for a, e in zip(run(3, inputs, grad, backend=backend), oracle.exact(3, inputs, None, grad)[0], strict=True):
        np.testing.assert_allclose(a.double().cpu(), e.astype(float), rtol=0, atol=100 * np.exp(log_r))


def test_values_between_levels_are_those_of_a_mixture_of_one(implementation):
    """Bins around them, the open ones nearer to −1 or 1 than to the next level."""
    backend, device = implementation
    x = torch.cat((torch.linspace(-1, 1, 511), torch.tensor([-0.999, -0.997, -0.9955, 0.9955, 0.997, 0.999]))).to(device)
    x = x[(x.abs() - 254 / 255).abs() > 1e-6]
    mean, log_scale = 0.9 * torch.linspace(-1, 1, len(x), device=device).roll(7), torch.full_like(x, -2.5)
    params = torch.stack((torch.zeros_like(x), mean, log_scale), 1)[..., None, None]
    expected = logistic_mixture_log_prob(x[:, None, None, None], params, backend=backend)
    found = discretized_logistic_log_prob(x, mean, log_scale, event_dims=0, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty_sizes(implementation, kind, sizes):
    backend, device = implementation
    inputs = draw(kind, *sizes, device=device, shared=())
    outputs = run(kind, inputs, torch.ones(sizes[:2], device=device), backend=backend)
    for a, e in zip(outputs, run(kind, inputs, torch.ones(sizes[:2], device=device), backend="reference"), strict=True):
        torch.testing.assert_close(a, e)


@KINDS
def test_nan_reaches_only_what_depends_on_it(implementation, kind):
    backend, device = implementation
    for place in range(2 if kind == 0 else 3):
        inputs = draw(kind, 2, 2, 37, device=device, shared=(2, 2, 37))
        inputs[place][..., 1, 20] = torch.nan
        outputs = run(kind, inputs, torch.ones(2, 2, device=device), backend=backend)
        touched = torch.zeros(2, 2, dtype=torch.bool, device=device)
        touched[:, 1] = True
        assert torch.equal(outputs[0].isnan(), touched)
        assert not outputs[2].isnan()[..., :20].any() and not outputs[2].isnan()[..., 21:].any()


@KINDS
def test_only_needed_gradients(implementation, kind):
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 2, 1, 19, device=device, shared=(19,))
    full = run(kind, inputs, torch.ones(2, 1, device=device), backend=backend)[1:]
    for i in range(0 if kind < 2 else 1, len(inputs)):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        OPS[kind](*leaves, backend=backend).sum().backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(len(inputs))]
        torch.testing.assert_close(leaves[i].grad, full[i])


@KINDS
def test_same_bits_every_time_at_any_number_of_threads(implementation, kind):
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 7, 60, 1003, device=device, shared=(1003,))
    grad = torch.randn(7, 60, generator=torch.Generator().manual_seed(1)).to(device)
    same_at_any_threads(lambda: run(kind, inputs, grad, backend=backend))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for kind, size, dtype in itertools.product(range(4), SIZES, (torch.float32, torch.float64)) for shared in ((), size)
        for t in run(kind, draw(kind, *size, dtype, shared=shared), torch.ones(size[:2], dtype=dtype), backend="cpp")])


@KINDS
def test_large_sizes(implementation, kind):
    """Sums over many rows, in several tasks, keep their digits."""
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 30, 200, 300, device=device, shared=())
    grad = torch.ones(30, 200, device=device)
    outputs = run(kind, inputs, grad, backend=backend)
    expected = run(kind, [t.double() for t in inputs], grad.double(), backend="reference")
    for name, a, e in zip(("value", *NAMES), outputs, expected, strict=False):
        assert (a - e).norm() <= 2e-6 * e.norm(), name


@KINDS
@pytest.mark.parametrize("size", [(30, 200, 300), (6, 300, 1000)], ids=lambda s: "S{}-N{}-P{}".format(*s))
def test_gradients_of_a_decoder_over_data(implementation, kind, size):
    """With x as data tasks share out the samples first, and the rows too where x is large."""
    backend, device = implementation
    skip_interpreter(backend, device)
    x, *parameters = draw(kind, *size, device=device, shared=())
    grad = torch.randn(size[:2], generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(x, parameters, grad, backend):
        leaves = [t.detach().clone().requires_grad_() for t in parameters]
        return torch.autograd.grad(OPS[kind](x, *leaves, backend=backend), leaves, grad)

    found = same_at_any_threads(lambda: gradients(x, parameters, grad, backend))
    expected = gradients(x.double(), [t.double() for t in parameters], grad.double(), "reference")
    for name, a, e in zip(NAMES[1:], found, expected, strict=False):
        assert (a - e).norm() <= 2e-6 * e.norm(), name


@KINDS
def test_half_precision_parameters_give_float32(implementation, kind):
    backend, device = implementation
    skip_interpreter(backend, device)
    inputs = draw(kind, 2, 3, 21, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        half = inputs[1].to(dtype).requires_grad_()
        value = OPS[kind](inputs[0], half, *inputs[2:], backend=backend)
        value.sum().backward()
        full = half.detach().float().requires_grad_()
        expected = OPS[kind](inputs[0], full, *inputs[2:], backend="reference")
        expected.sum().backward()
        torch.testing.assert_close(value, expected, rtol=3e-6, atol=1e-5)
        assert half.grad.dtype == dtype and value.dtype == torch.float32
        torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=2e-2, atol=1e-4)
