"""The likelihoods and PyTorch: autocast, gradcheck, opcheck, compile, vmap; the closed-form variance; one error a mistake."""

import pytest
import torch
from test_likelihood import KINDS, OPS, draw

from latent_engine.kernels import BackendError, bernoulli_log_prob, gaussian_log_prob, gaussian_variance, native


def test_autocast_computes_in_float32():
    x, logits = draw(0, 2, 3, 21)
    with torch.autocast("cpu", torch.bfloat16):
        value = bernoulli_log_prob(x, logits.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, bernoulli_log_prob(x, logits.bfloat16().float()))


@KINDS
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_once_and_twice(kind, backend):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    inputs = draw(kind, 2, 2, 3, torch.float64, shared=(3,))
    leaves = [t.requires_grad_(kind < 2 or i > 0) for i, t in enumerate(inputs)]
    mask = torch.tensor([True, False, True])

    def f(*args):
        return OPS[kind](*args, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("kind", [0, 3], ids=["one parameter", "two parameters"])
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(kind, grad):
    ops = torch.ops.latent_engine
    x, *parameters = draw(kind, 2, 3, 5, shared=(5,))
    parameters = [t.requires_grad_(grad) for t in parameters] + [None] * (2 - len(parameters))
    detached = [None if t is None else t.detach() for t in parameters]
    for mask in (None, torch.rand(3, 5) < 0.7):
        tensors = (x, *parameters, mask)
        folded = [None if t is None else t.reshape((1,) * (3 - t.dim()) + t.shape) for t in tensors]
        images = [None if t is None else t.unflatten(-1, (1, 5, 1)) for t in tensors]
        for inputs, event_dims in ((folded, 1), (tensors, 1), (images, 3)):
            torch.library.opcheck(ops.likelihood_fwd.default, (*inputs, kind, event_dims))
    for needs in ((kind == 0, True, kind > 0), (False, True, False)):
        torch.library.opcheck(ops.likelihood_bwd.default, (torch.ones(2, 3), x, *detached, None, kind, 1, *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(x, logits, mean, log_var):
        return (2 * bernoulli_log_prob(x, logits.tanh()) + gaussian_log_prob(x, mean.tanh(), log_var)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (17, 18):
        leaves = [t.requires_grad_() for t in (*draw(0, 3, N, 5), *draw(1, 3, N, 5, shared=(5,))[1:])]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_vmap_over_all_but_the_mean():
    (x, logits), (counts, mean, log_r), generator = draw(0, 1, 4, 3), draw(3, 1, 4, 3), torch.Generator().manual_seed(0)
    masks = torch.rand(5, 4, 3, generator=generator) > 0.5
    calls = {"mask": (lambda m, b: bernoulli_log_prob(x, logits, mask=m, backend=b), masks),
             "variance": (lambda v, b: gaussian_log_prob(x, logits, v, backend=b), torch.randn(5, generator=generator)),
             "dispersion": (lambda r, b: OPS[3](counts, mean, r, backend=b), log_r + torch.arange(5.0)[:, None, None])}
    for name, (call, batch) in calls.items():
        expected = torch.stack([call(t, "reference") for t in batch])
        torch.testing.assert_close(torch.func.vmap(lambda t, call=call: call(t, None))(batch), expected, msg=name)


def test_vmap_and_func_grad():
    x, mean, log_var = draw(1, 4, 6, 5, shared=(5,))
    batched = torch.func.vmap(lambda m: gaussian_log_prob(x, m, log_var))(mean)
    torch.testing.assert_close(batched, gaussian_log_prob(x, mean, log_var))
    both = torch.func.vmap(lambda m, v: gaussian_log_prob(x, m, v), (0, None))(mean, log_var)
    torch.testing.assert_close(both, batched)
    over_x = torch.func.vmap(lambda x_: gaussian_log_prob(x_, mean[0], log_var))(x.expand(4, 6, 5))
    torch.testing.assert_close(over_x[2], gaussian_log_prob(x, mean[0], log_var))
    per_sample = torch.func.vmap(torch.func.grad(lambda m: gaussian_log_prob(x, m, log_var).sum()))(mean)
    leaf = mean.clone().requires_grad_()
    gaussian_log_prob(x, leaf, log_var).sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)


def test_variance_is_the_optimum():
    g = torch.Generator().manual_seed(5)
    x, mean = torch.randn(6, 3, 4, 4, generator=g).double(), torch.randn(2, 6, 3, 4, 4, generator=g).double()
    mask = torch.rand(6, 3, 4, 4, generator=g) < 0.8
    for shape in ((), (3, 1, 1), (3, 4, 4), (6, 1, 1, 1)):
        for options in ({}, {"mask": mask}):
            variance = gaussian_variance(x, mean, shape, **options)
            assert variance.shape == shape
            log_var = variance.log().requires_grad_()
            (slope,) = torch.autograd.grad(gaussian_log_prob(x, mean, log_var, event_dims=3, **options).sum(), log_var)
            torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    torch.testing.assert_close(gaussian_variance(x, mean), torch.nn.functional.mse_loss(x.expand_as(mean), mean))
    with pytest.raises(ValueError, match=r"must broadcast to the shape of x and mean, given .* \[5\] and None"):
        gaussian_variance(x, mean, (5,))


def test_variance_of_missing_entries_and_none():
    mean = torch.zeros(2, 2, requires_grad=True)
    x, mask = torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), torch.tensor([[True, False], [True, True]])
    variance = gaussian_variance(x, mean, mask=mask)
    variance.backward()
    torch.testing.assert_close(variance, torch.tensor(14 / 3))
    torch.testing.assert_close(mean.grad, -2 / 3 * torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    assert gaussian_variance(torch.zeros(3, 0), torch.zeros(3, 0), (0,)).shape == (0,)
    assert gaussian_variance(torch.zeros(0, 3), torch.zeros(0, 3), (3,)).isnan().all()


def test_variance_of_half_precision_is_float32():
    x, mean = torch.linspace(0, 1, 1001).bfloat16(), torch.zeros(1001, dtype=torch.bfloat16)
    assert torch.equal(gaussian_variance(x, mean), gaussian_variance(x.float(), mean.float()))


X, L = torch.zeros(3, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(("args", "options", "error", "message"), [
    ((X, torch.zeros(2, 3, 5)), {}, ValueError, r"x and logits must have the same 1 trailing axes .* given \[3, 4\] and"),
    ((X[:, :1], L), {}, ValueError, r"x and logits must have the same 1 trailing axes .* given \[3, 1\]"),
    ((torch.zeros(5, 4), L), {}, ValueError, r"leading axes that broadcast, given \[5, 4\] and \[2, 3, 4\]"),
    ((X, L), {"event_dims": 3}, ValueError, r"event_dims must lie between 0 and the dimensions of x\[3, 4\]"),
    ((X, L), {"mask": torch.ones(3, 4)}, TypeError, "mask must be a boolean tensor, given torch.float32"),
    ((X, L), {"mask": [True]}, TypeError, "mask must be a boolean tensor, given list"),
    ((X, L), {"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask must broadcast .* \[2, 3, 4\], given \[2, 4\]"),
    ((X, L), {"mask": torch.ones(5, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask must broadcast against x and logits"),
    ((X, L), {"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta but x is on cpu"),
    ((X.long(), L), {}, TypeError, "x must be a floating-point tensor, given torch.int64"),
    ((X, L.double()), {}, TypeError, "logits is torch.float64 but x is torch.float32"),
    ((X.double(), L.bfloat16()), {}, TypeError, "logits is torch.bfloat16 but x is torch.float64"),
    ((X, L), {"event_dims": 1.0}, TypeError, "event_dims must be an integer, given 1.0"),
    ((X, [0.0]), {}, TypeError, "logits must be a tensor, given list"),
    ((X, L.to("meta")), {}, ValueError, "logits is on meta but x is on cpu"),
    ((X, L), {"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
])
def test_mistakes_get_one_clear_error(args, options, error, message):
    with pytest.raises(error, match=message):
        bernoulli_log_prob(*args, **options)


@pytest.mark.parametrize("op", OPS[2:], ids=lambda op: op.__name__)
def test_data_that_requires_a_gradient(op):
    with pytest.raises(ValueError, match=r"x is data and gets no gradient, but it requires one; pass x.detach\(\)"):
        op(X.clone().requires_grad_(), L, torch.zeros(()))


@pytest.mark.parametrize("op", OPS[1:], ids=lambda op: op.__name__)
def test_second_parameter_that_does_not_fit(op):
    with pytest.raises(ValueError, match=r"must broadcast against x and mean, whose shape is \[2, 3, 4\], given \[3\]"):
        op(X, L, torch.zeros(3))
    with pytest.raises(TypeError, match=r"x must be a .*tensor, given list"):
        op([[0.0]], L, torch.zeros(()))
