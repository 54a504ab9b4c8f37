"""gmm_moments: the sums of an EM step, against the formula in 80 bits."""

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from test_gmm import SIZES, dtypes_of, mixture

from latent_engine.kernels import gmm_moments, native

from oracles import assert_within_budget, longdouble
from oracles import gmm as oracle

# NumPy, on which Triton's interpreter stands, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
NAMES = ("log_prob", "counts", "first", "second")


def exact(inputs, weights):
    """The outputs and their scales, in 80 bits."""
    (value, r, *_), (size, wide, *_) = oracle.exact(*inputs, grad=torch.ones(len(inputs[0])))
    z, means, w = longdouble(inputs[0]), longdouble(inputs[1]), longdouble(weights)[:, None]
    delta = z[:, None, :] - means

    def sums(a, d):
        return a.sum(0), np.einsum("nk,nkd->kd", a, d), np.einsum("nk,nkd->kd", a, d**2)

    return (value, *sums(w * r, delta)), (size, *sums(np.abs(w) * wide, np.abs(delta)))


def check(inputs, weights, backend):
    actual = gmm_moments(*inputs, weights, backend=backend)
    direct = gmm_moments(*inputs, weights, backend="reference")
    for name, a, d, e, s in zip(NAMES, actual, direct, *exact(inputs, weights), strict=True):
        assert not a.requires_grad
        assert_within_budget(name, a, d, e, s)


@pytest.mark.parametrize("size", [*SIZES, (2000, 9, 3)], ids=lambda s: f"N{s[0]}-K{s[1]}-D{s[2]}")
def test_moments(implementation, size):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        inputs = mixture(*size, dtype, device)
        check(inputs, torch.rand(size[0], generator=torch.Generator().manual_seed(1)).to(inputs[0]), backend)


def test_a_mixture_far_wider_than_the_data_keeps_all_digits(implementation):
    """Where moments made of gradients would be differences of numbers 10¹² times as large."""
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(50, 3, 4, device=device)
    z, means = 1e-6 * z, 0 * means[:1]
    _, counts, first, second = gmm_moments(z, means, log_vars[:1] + 14, log_weights[:1], backend=backend)
    delta = z.double() - means.double()
    assert counts.item() == pytest.approx(50, rel=1e-5)
    torch.testing.assert_close(first.double(), delta.sum(0, keepdim=True), rtol=1e-5, atol=1e-6 * delta.abs().sum().item())
    torch.testing.assert_close(second.double(), delta.square().sum(0, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", ["K1", "D", "scalar"])
def test_shared_variances_leading_axes_and_strides(implementation, shape):
    backend, device = implementation
    z, means, log_vars, log_weights = mixture(24, 7, 5, device=device)
    log_vars = {"K1": log_vars[:, :1], "D": log_vars[0], "scalar": log_vars[0, 0]}[shape]
    expected = gmm_moments(z, means, log_vars.expand(7, 5), log_weights, backend="reference")
    wide = torch.zeros(2, 12, 10, device=device)
    wide[..., ::2] = z.view(2, 12, 5)
    actual = gmm_moments(wide[..., ::2], means.T.contiguous().T, log_vars, log_weights, backend=backend)
    assert actual[0].shape == (2, 12)
    for a, e in zip((actual[0].flatten(), *actual[1:]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_no_points_and_points_that_no_component_reaches(implementation):
    backend, device = implementation
    z, *mixture_ = mixture(6, 4, 3, device=device)
    value, *sums = gmm_moments(z[:0], *mixture_, backend=backend)
    assert value.shape == (0,) and all(not s.any() for s in sums)
    z[2] = 1e30
    value, *sums = gmm_moments(z, *mixture_, backend=backend)
    kept = gmm_moments(z[torch.arange(6) != 2], *mixture_, backend=backend)
    assert value[2] == -torch.inf
    for a, e in zip(sums, kept[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_same_bits_at_any_number_of_threads():
    inputs = mixture(3000, 70, 9)
    same_at_any_threads(lambda: gmm_moments(*inputs))


@needs_avx512
def test_same_bits_at_avx2_and_avx512():
    inputs = mixture(700, 70, 9)
    same_at_avx2_and_avx512(lambda: gmm_moments(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(dtype):
    z, *mixture_ = mixture(12, 5, 3)
    actual = gmm_moments(z.to(dtype), *mixture_)
    for a, e in zip(actual, gmm_moments(z.to(dtype).float(), *mixture_), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)


def test_mistakes_have_one_clear_error():
    inputs = mixture(6, 4, 3)
    with pytest.raises(ValueError, match=r"^gmm_moments: weights must have shape \[...\].* = \[6\], given \[5\]"):
        gmm_moments(*inputs, torch.ones(5))
    with pytest.raises(TypeError, match=r"weights is torch.float64 but means is torch.float32"):
        gmm_moments(*inputs, torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^gmm_moments: means must have shape"):
        gmm_moments(inputs[0], inputs[1][:, :2], *inputs[2:])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    compiled = torch.compile(gmm_moments, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (24, 30):
        inputs = mixture(N, 5, 3)
        for a, e in zip(compiled(*inputs), gmm_moments(*inputs), strict=True):
            assert torch.equal(a, e)


def test_opcheck():
    if native.cpp is None:
        pytest.skip("no C++ library")
    torch.library.opcheck(torch.ops.latent_engine.gmm_moments, (torch.ones(3), *mixture(3, 4, 2)))
