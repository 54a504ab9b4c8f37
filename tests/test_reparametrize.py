"""reparametrize: samples, divergence and gradients of every implementation against an 80-bit oracle, on odd inputs."""

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, explain, native, reparametrize

from oracles import assert_within_budget, longdouble
from oracles import reparametrize as oracle

# NumPy, on which Triton's interpreter stands, warns of the NaNs that a test is about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# S (None: no axis of samples), N, D: one element, part of a vector, whole vectors, vectors that reach back
SIZES = [(None, 1, 1), (1, 7, 2), (3, 5, 16), (None, 3, 17), (None, 13, 50), (5, 4, 50), (2, 2, 64), (1, 1, 1300)]
GRADS = {"both": (True, True), "z": (True, False), "kl": (False, True)}


def posterior(S: int | None, N: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
              seed: int = 0) -> list[Tensor]:
    """Mean and log-variance as halves of an encoder's output, and noise."""
    g = torch.Generator().manual_seed(seed)
    mean, log_var = torch.randn(N, 2 * D, generator=g).to(device, dtype).chunk(2, 1)
    return [mean, log_var, torch.randn(*(() if S is None else (S,)), N, D, generator=g).to(device, dtype)]


def incoming(inputs: list[Tensor], used: tuple[bool, bool] = (True, True)) -> list[Tensor | None]:
    """Gradients of z and of the divergence, None for one that is not used."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=g).to(inputs[1]) if use else None
            for t, use in zip((inputs[2], inputs[1]), used, strict=True)]


def run(inputs: list[Tensor], grads: list[Tensor | None], **options) -> list[Tensor]:
    """z, the divergence and the gradients of mean and log_var."""
    mean, log_var, noise = inputs
    leaves = [mean.detach().requires_grad_(), log_var.detach().requires_grad_()]
    outputs = reparametrize(*leaves, noise, **options)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    gradients = torch.autograd.grad([output for output, _ in used], leaves, [grad for _, grad in used])
    return [*(output.detach() for output in outputs), *gradients]


def check(inputs: list[Tensor], backend: str, used: tuple[bool, bool] = (True, True)) -> None:
    """Samples, divergence and gradients are within the error budget."""
    grads = incoming(inputs, used)
    results = run(inputs, grads, backend=backend), run(inputs, grads, backend="reference")
    for name, actual, direct, exact, scale in zip(oracle.NAMES, *results, *oracle.exact(*inputs, *grads), strict=True):
        assert_within_budget(name, actual, direct, exact, scale)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "S{}-N{}-D{}".format(*s))
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        check(posterior(*size, dtype, device), backend)


@pytest.mark.parametrize("used", GRADS.values(), ids=GRADS)
def test_gradients_of_one_output(implementation, used):
    backend, device = implementation
    for S in (None, 4):
        check(posterior(S, 6, 19, device=device), backend, used)


def test_reference_is_the_formula():
    for dtype in (torch.float32, torch.float64):
        check(posterior(3, 4, 5, dtype), "reference")


def test_agrees_with_torch_distributions(implementation):
    backend, device = implementation
    mean, log_var, noise = posterior(None, 6, 5, device=device)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    z, kl = reparametrize(mean, log_var, noise, backend=backend)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)),
                               rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.log_prob(z).sum(), (-0.5 * (noise**2 + log_var + np.log(2 * np.pi))).sum())


def test_divergence_next_to_the_prior_keeps_its_digits(implementation):
    """Relative to each divergence: the formula as written is may have none at log σ² = 1e-7."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        sizes = torch.cat((torch.logspace(-15, -3, 61), torch.linspace(1e-3, 4, 3000), torch.linspace(4, 80, 100))).to(dtype)
        log_var = torch.cat((sizes, -sizes)).to(device)[None]
        _, kl = reparametrize(torch.zeros_like(log_var), log_var, torch.zeros_like(log_var), backend=backend)
        (_, exact, *_), _ = oracle.exact(0 * log_var, log_var, log_var)
        assert (abs(longdouble(kl) - exact) <= 6 * torch.finfo(dtype).eps * exact).all()
        _, kl = reparametrize(log_var, log_var, log_var, backend=backend)
        (_, exact, *_), _ = oracle.exact(log_var, log_var, log_var)
        assert (abs(longdouble(kl) - exact) <= 4 * torch.finfo(dtype).eps * exact).all()


def test_extremes_stay_finite(implementation):
    """Variances from e^-160 to e^80, means of 1e4, and the limits: no spread, and more than float32 has."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        mean, log_var, noise = posterior(3, 6, 18, dtype, device)
        mean[0] = 1e4
        log_var[1], log_var[2], log_var[3] = -160.0, 80.0, 0.0
        check([mean, log_var, noise], backend)
    log_var = torch.tensor([[-torch.inf, -1e4, 1e4]], device=device)
    z, kl = reparametrize(log_var.new_full((1, 3), 0.5), log_var, torch.ones_like(log_var), backend=backend)
    assert z.tolist() == [[0.5, 0.5, torch.inf]]
    torch.testing.assert_close(kl, kl.new_tensor([[torch.inf, 4999.625, torch.inf]]))


LAYOUTS = {"sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0], "transposed": lambda t: t.mT.contiguous().mT,
           "expanded": lambda t: t[:1].expand_as(t), "padded": lambda t: torch.cat((t, t + 9), -1)[..., :t.shape[-1]]}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    for S in (None, 3):
        check([layout(t) for t in posterior(S, 5, 18, device=device)], backend)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_gradients(implementation, layout):
    backend, device = implementation
    for S in (None, 3):
        inputs = posterior(S, 5, 18, device=device)
        strided = [layout(t) for t in incoming(inputs)]
        expected = run(inputs, [t.contiguous() for t in strided], backend=backend)
        for actual, other in zip(run(inputs, strided, backend=backend), expected, strict=True):
            assert torch.equal(actual, other)


def test_sums_have_shared_gradients(implementation):
    backend, device = implementation
    inputs = posterior(3, 5, 18, device=device)
    for shared in (torch.ones((), device=device), torch.rand(5, 1, device=device), torch.rand(18, device=device)):
        grads = [shared.expand(3, 5, 18), shared.expand(5, 18)]
        expected = run(inputs, [g.contiguous() for g in grads], backend=backend)
        for actual, other in zip(run(inputs, grads, backend=backend), expected, strict=True):
            assert torch.equal(actual, other)


def test_gradients_of_single_columns_with_no_stride(implementation):
    backend, device = implementation
    inputs = [t.contiguous() for t in posterior(3, 5, 1, device=device)]
    grads = [torch.rand(3, 5, 1, device=device), torch.rand(5, device=device).as_strided((5, 1), (1, 0))]
    expected = run(inputs, [g.contiguous() for g in grads], backend="reference")
    for actual, other in zip(run(inputs, grads, backend=backend), expected, strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (2, 6, 3, 2)], ids=str)
def test_any_shape(implementation, shape):
    backend, device = implementation
    g = torch.Generator().manual_seed(0)
    for samples in ((), (3,)):
        tensors = [torch.randn(s, generator=g).to(device) for s in (shape, shape, (*samples, *shape))]
        for actual, expected in zip(run(tensors, incoming(tensors), backend=backend),
                                    run(tensors, incoming(tensors), backend="reference"), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("size", [(None, 0, 3), (None, 3, 0), (2, 3, 0), (0, 3, 2)], ids=str)
def test_empty_sizes(implementation, size):
    backend, device = implementation
    inputs = posterior(*size, device=device)
    for actual, expected in zip(*(run(inputs, incoming(inputs), backend=b) for b in (backend, "reference")), strict=True):
        torch.testing.assert_close(actual, expected)


def test_nan_spoils_its_element_only(implementation):
    backend, device = implementation
    names = ("mean", "log_var", "noise")
    reached = {"mean": ("z", "kl", "mean"), "log_var": ("z", "kl", "log_var"), "noise": ("z", "log_var")}
    for S in (None, 3):
        for which, name in enumerate(names):
            inputs = posterior(S, 4, 35, device=device)
            at = (1,) if S and name == "noise" else ()
            inputs[which][(*at, 2, 33)] = torch.nan
            for output, t in zip(oracle.NAMES, run(inputs, incoming(inputs), backend=backend), strict=True):
                spoilt = t.isnan().nonzero().tolist()
                places = [[*at, 2, 33]] if at else [[2, 33]]
                if output == "z" and S and not at:
                    places = [[s, 2, 33] for s in range(S)]
                if output != "z":
                    places = [[2, 33]]
                assert spoilt == (places if output in reached[name] else []), (name, output)


def test_only_needed_gradients(implementation):
    backend, device = implementation
    mean, log_var, noise = posterior(3, 5, 18, device=device)
    full = run([mean, log_var, noise], incoming([mean, log_var, noise]), backend=backend)[2:]
    for i in range(2):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate((mean, log_var))]
        outputs = reparametrize(*leaves, noise, backend=backend)
        torch.autograd.backward(outputs, incoming([mean, log_var, noise]))
        assert [t.grad is not None for t in leaves] == [j == i for j in range(2)]
        assert torch.equal(leaves[i].grad, full[i])


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    for size in ((None, 700, 65), (40, 130, 50)):
        inputs = posterior(*size, device=device)
        same_at_any_threads(lambda inputs=inputs: run(inputs, incoming(inputs), backend=backend))


@pytest.mark.parametrize("size", [(None, 3200, 1024), (50, 130, 512)], ids=["of one", "of many"])
def test_outputs_too_large_for_the_cache_are_those_of_their_halves(implementation, size):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for large sizes")
    inputs, half = posterior(*size, device=device), size[1] // 2  # 13 MB
    grads = incoming(inputs)
    halves = [run([t[..., rows, :] for t in inputs], [g[..., rows, :] for g in grads], backend=backend)
              for rows in (slice(half), slice(half, None))]
    for found, *parts in zip(run(inputs, grads, backend=backend), *halves, strict=True):
        assert torch.equal(found, torch.cat(parts, -2))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64)
        for t in run(posterior(*size, dtype), incoming(posterior(*size, dtype)), backend="cpp")])


def test_half_precision_and_autocast_give_float32(implementation):
    backend, device = implementation
    inputs = posterior(3, 5, 18, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        halves = [t.to(dtype) for t in inputs]
        mean, log_var = (t.detach().requires_grad_() for t in halves[:2])
        outputs = reparametrize(mean, log_var, halves[2], backend=backend)
        (outputs[0].sum() + outputs[1].sum()).backward()
        expected = reparametrize(*(t.float() for t in halves), backend="reference")
        torch.testing.assert_close(outputs, expected)
        assert mean.grad.dtype == log_var.grad.dtype == dtype
    with torch.autocast(device, torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in reparametrize(*(t.bfloat16() for t in inputs), backend=backend))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("S", [None, 2])
def test_gradcheck_once_and_twice(backend, S):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    mean, log_var, noise = posterior(S, 2, 3, torch.float64)
    leaves = [t.detach().requires_grad_() for t in (mean, log_var)]
    for outputs in (slice(2), slice(1), slice(1, 2)):
        def f(*leaves, outputs=outputs):
            return reparametrize(*leaves, noise, backend=backend)[outputs]

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("S", [None, 2])
def test_opcheck(S):
    ops = torch.ops.latent_engine
    mean, log_var, noise = posterior(S, 5, 3)
    for grad in (False, True):
        leaves = [t.detach().requires_grad_(grad) for t in (mean, log_var)]
        torch.library.opcheck(ops.reparametrize_fwd.default, (*leaves, noise))
    grad_z, grad_kl = incoming([mean, log_var, noise])
    for grads, needs in (((grad_z, grad_kl), (True, True)), ((None, grad_kl), (True, False)), ((grad_z, None), (False, True))):
        torch.library.opcheck(ops.reparametrize_bwd.default, (*grads, mean, log_var, noise, *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(output, noise):
        z, kl = reparametrize(*output.chunk(2, 1), noise)
        return z.square().sum() + 2 * kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (17, 18):
        output, noise = torch.randn(N, 6, requires_grad=True), torch.randn(2, N, 3)
        expected = torch.autograd.grad(loss(output, noise), output)
        torch.testing.assert_close(torch.autograd.grad(compiled(output, noise), output), expected)


@pytest.mark.parametrize("S", [None, 2])
def test_vmap_and_func_grad(implementation, S):
    backend, device = implementation
    mean, log_var, noise = posterior(S, 6, 5, device=device)
    batched = torch.stack((mean, mean + 1, mean - 1), 1)
    f = lambda mean, log_var, noise: reparametrize(mean, log_var, noise, backend=backend)  # noqa: E731
    for dims, inputs in (((1, None, None), (batched, log_var, noise)),
                         ((None, None, 0), (mean, log_var, torch.stack((noise, 2 * noise)))),
                         ((1, 1, -1), (batched, batched, torch.stack((noise, noise, 2 * noise), -1)))):
        results = []
        for i in range(3 if dims[0] else 2):
            results.append(f(*(t if d is None else t.select(d, i) for d, t in zip(dims, inputs, strict=True))))
        expected = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        torch.testing.assert_close(torch.func.vmap(f, dims)(*inputs), expected)
    grads = torch.func.grad(lambda m: f(m, log_var, noise)[0].square().sum())(mean)
    torch.testing.assert_close(grads, run([mean, log_var, noise], [2 * f(mean, log_var, noise)[0], None])[2])


def test_explain_names_the_backends():
    assert explain(reparametrize, *posterior(None, 2, 3)).keys() == {"cpp", "cuda", "triton", "reference"}


GOOD = {"mean": torch.zeros(4, 3), "log_var": torch.zeros(4, 3), "noise": torch.zeros(2, 4, 3)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"log_var": torch.zeros(4, 1)}, ValueError, r"log_var must have shape that of mean = \[4, 3\], given \[4, 1\]"),
    ({"noise": torch.zeros(3)}, ValueError, r"noise must have the shape of mean = \[4, 3\], or \[S, ...\] .* given \[3\]"),
    ({"noise": torch.zeros(4, 2)}, ValueError, r"noise must have the shape of mean .* given \[4, 2\]"),
    ({"noise": torch.zeros(2, 2, 4, 3)}, ValueError, r"noise must have the shape of mean .* given \[2, 2, 4, 3\]"),
    ({"noise": torch.zeros(4, 3, requires_grad=True)}, ValueError, r"noise is data and gets no gradient.*noise.detach\(\)"),
    ({"noise": 0.0}, TypeError, "noise must be a tensor, given float"),
    ({"mean": [[0.0]]}, TypeError, "mean must be a tensor, given list"),
    ({"log_var": None}, TypeError, "log_var must be a floating-point tensor, given NoneType"),
    ({"mean": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "mean is torch.int64 but log_var is torch.float32"),
    ({"noise": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "noise is torch.float64 but log_var is torch.float32"),
    ({"noise": torch.zeros(4, 3, device="meta")}, ValueError, "noise is on meta but log_var is on cpu"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "reparametrize: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    with pytest.raises(error, match=message):
        reparametrize(**{**GOOD, **changes})
