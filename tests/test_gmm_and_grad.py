"""gmm_log_prob_and_grad: the values and gradients of gmm_log_prob under autograd, in one call."""

import pytest
import torch
from test_gmm import SIZES, mixture

from latent_engine.kernels import gmm_log_prob, gmm_log_prob_and_grad, native, use_backend


def by_autograd(inputs, grad, **options):
    """The same from gmm_log_prob, in float64 through the reference."""
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    value = gmm_log_prob(*leaves, **options, backend="reference")
    return [value.detach(), *torch.autograd.grad(value, leaves, grad.double())]


def assert_same(actual, expected):
    value, grads = actual
    for a, e in zip((value, *grads), expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES[:6], ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_agrees_with_autograd(implementation, size):
    backend, device = implementation
    inputs = mixture(*size, device=device)
    grad = torch.randn(size[0], generator=torch.Generator().manual_seed(1)).to(device)
    assert_same(gmm_log_prob_and_grad(*inputs, grad, backend=backend), by_autograd(inputs, grad))


@pytest.mark.parametrize("shape", ["K1", "D", "scalar"])
def test_gradients_have_the_shapes_of_their_arguments(implementation, shape):
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(24, 7, 5, device=device)
    log_vars = {"K1": log_vars[:, :1], "D": log_vars[0], "scalar": log_vars[0, 0]}[shape]
    inputs = [z.reshape(2, 3, 4, 5), means, log_vars, log_weights]
    value, grads = gmm_log_prob_and_grad(*inputs, backend=backend)
    assert value.shape == (2, 3, 4) and [g.shape for g in grads] == [t.shape for t in inputs]
    assert_same((value, grads), by_autograd(inputs, torch.ones(2, 3, 4, device=device)))


def test_labels_masks_and_points_without_a_component(implementation):
    backend, device = implementation
    inputs = mixture(30, 9, 3, device=device)
    g = torch.Generator().manual_seed(2)
    allowed = (torch.rand(4, 9, generator=g) < 0.4).to(device)
    allowed[2] = False
    options = {"labels": torch.randint(-1, 4, (30,), generator=g).to(device), "allowed": allowed}
    assert_same(gmm_log_prob_and_grad(*inputs, **options, backend=backend),
                by_autograd(inputs, torch.ones(30, device=device), **options))


def test_blocks_of_many_components():
    """More logits than a block of 512 rows holds, so that blocks shrink."""
    inputs = mixture(700, 3000, 2)
    grad = torch.randn(700, generator=torch.Generator().manual_seed(1))
    assert_same(gmm_log_prob_and_grad(*inputs, grad), by_autograd(inputs, grad))


def test_same_bits_at_any_number_of_threads_and_level():
    if native.cpp is None:
        pytest.skip("no C++ library")
    inputs, threads, level = mixture(3000, 70, 9), torch.get_num_threads(), native.cpp.cpu_isa()
    results = []
    try:
        for isa in {"avx2", "avx512"} & set(native.cpp.cpu_isas()):
            for n in (1, 2, 3):
                native.cpp.set_cpu_isa(isa)
                torch.set_num_threads(n)
                value, grads = gmm_log_prob_and_grad(*inputs)
                results.append((value, *grads))
    finally:
        torch.set_num_threads(threads)
        native.cpp.set_cpu_isa(level)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(dtype):
    z, *mixture_ = mixture(12, 5, 3)
    value, grads = gmm_log_prob_and_grad(z.to(dtype), *mixture_)
    assert {t.dtype for t in (value, *grads)} == {torch.float32}
    ones = torch.ones(12, dtype=dtype)
    assert_same(gmm_log_prob_and_grad(z.to(dtype), *mixture_, ones), by_autograd([z.to(dtype), *mixture_], ones))
    inputs = [t.double() for t in (z, *mixture_)]
    with torch.autocast("cpu", torch.bfloat16):
        found = gmm_log_prob_and_grad(*inputs, ones.double())
    assert_same(found, by_autograd(inputs, ones))
    assert_same((value, grads), by_autograd([z.to(dtype), *mixture_], torch.ones(12)))


def test_mistakes_have_one_clear_error():
    inputs = mixture(6, 4, 3)
    with pytest.raises(ValueError, match=r"grad must have shape \[...\] as in z\[..., D\] = \[6\], given \[5\]"):
        gmm_log_prob_and_grad(*inputs, torch.ones(5))
    with pytest.raises(TypeError, match=r"grad is torch.float64 but means is torch.float32"):
        gmm_log_prob_and_grad(*inputs, torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^gmm_log_prob_and_grad: means must have shape"):
        gmm_log_prob_and_grad(inputs[0], inputs[1][:, :2], *inputs[2:])
    with use_backend("reference"):
        assert_same(gmm_log_prob_and_grad(*inputs), by_autograd(inputs, torch.ones(6)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    compiled = torch.compile(gmm_log_prob_and_grad, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (24, 30):
        z, *mixture_ = mixture(N, 5, 3)
        inputs = [z.reshape(2, N // 2, 3), *mixture_]
        assert_same(compiled(*inputs), by_autograd(inputs, torch.ones(2, N // 2)))


def test_opcheck():
    if native.cpp is None:
        pytest.skip("no C++ library")
    labels = torch.tensor([0, -1, 2])
    torch.library.opcheck(torch.ops.latent_engine.gmm_fwd_bwd, (torch.ones(3), *mixture(3, 4, 2), labels, None))
