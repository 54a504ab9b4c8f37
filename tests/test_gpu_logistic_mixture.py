"""The kernels of both GPU backends run on the host against the 80-bit oracle.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch
from test_logistic_mixture import images
from torch import Tensor

from latent_engine.kernels import logistic_mixture_log_prob

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import logistic_mixture as oracle

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in ("x", "params", "mask")]
                + [(name, ctypes.c_int64) for name in ("images", "N", "C", "K", "P", "type", "backwards")])


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, x: Tensor, params: Tensor, mask: Tensor | None, grad: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        (n, P), (N, C) = (params.shape[0], params.shape[2]), x.shape[:2]
        call = Arguments(x.data_ptr(), params.data_ptr(), None if mask is None else mask.data_ptr(), n, N, C,
                         params.shape[1] // (10 if C == 3 else 3), P, TYPES[params.dtype], backwards)
        log_prob, stats = torch.full((n,), torch.nan), torch.full((n, 4, P), torch.nan)
        grad_params = torch.full_like(params, torch.nan)
        void = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
        self.library.emulate_forward(ctypes.byref(call), void(log_prob), None)
        without_stats = log_prob.clone()
        self.library.emulate_forward(ctypes.byref(call), void(log_prob), void(stats))
        assert torch.equal(log_prob.nan_to_num(), without_stats.nan_to_num())
        self.library.emulate_backward(ctypes.byref(call), void(grad), void(stats), void(grad_params))
        return log_prob, grad_params


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def run(self, x: Tensor, params: Tensor, mask: Tensor | None, grad: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        from latent_engine.kernels.triton import logistic_mixture

        log_prob, stats = logistic_mixture.logistic_mixture_fwd(x, params, mask, True)
        return log_prob, logistic_mixture.logistic_mixture_bwd(grad, x, params, mask, stats)


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("logistic_mixture", tmp_path_factory.mktemp("cuda")))


def run(kernels, x: Tensor, params: Tensor, mask: Tensor | None = None, backwards: bool = False) -> list[Tensor]:
    """Log-likelihood and gradient in the shapes of the public function; `backwards` lets a block's last thread run first."""
    lead = params.shape[:-3]
    grad = torch.randn(lead, generator=torch.Generator().manual_seed(1))
    value, grad_params = kernels.run(x.flatten(2).contiguous(), params.flatten(-2).flatten(0, -3).contiguous(),
                                     None if mask is None else mask.flatten(1).contiguous(), grad.reshape(-1), backwards)
    return [value.reshape(lead), grad_params.reshape(params.shape)]


def check(kernels, x: Tensor, params: Tensor, mask: Tensor | None = None, scaled: bool = False) -> None:
    grad = torch.randn(params.shape[:-3], generator=torch.Generator().manual_seed(1))
    leaf = params.detach().float().requires_grad_()
    direct = logistic_mixture_log_prob(x, leaf, mask=mask, backend="reference")
    direct = [direct.detach(), torch.autograd.grad(direct, leaf, grad)[0].to(params.dtype)]
    exact, scales = oracle.exact(x, params, grad, mask)
    for name, a, d, e, s in zip(("value", "params"), run(kernels, x, params, mask), direct, exact, scales, strict=True):
        assert_within_budget(name, a, d, e, s if scaled else None)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 2, 5, 7), (2, 1, 3, 13, 11), (1, 3, 1, 23, 12)], ids=str)
def test_values_and_gradients(kernels, size):
    check(kernels, *images(*size))


@pytest.mark.parametrize("C", [1, 3])
def test_sample_axes_and_mask(kernels, C):
    x, params = images(2, C, 2, 5, 3, lead=(2,))
    mask = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    check(kernels, x, params, mask)
    params[..., ~mask[0]] = torch.nan
    params[:, 1] = images(2, C, 2, 5, 3, lead=(2,))[1][:, 1]
    value, grad = run(kernels, x, params, mask)
    assert value.isfinite().all() and grad.isfinite().all()
    assert (grad.movedim(-3, 0)[:, :, ~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_parameters(kernels, dtype):
    x, params = images(2, 3, 2, 3, 4)
    params.view(2, 10, 2, 3, 4)[:, 2::3].clamp_(min=-3)  # gradients within the range of float16
    check(kernels, x, params.to(dtype))


@pytest.mark.parametrize("C", [1, 3])
def test_extreme_parameters(kernels, C):
    x, params = images(1, C, 3, 4, 4)
    p = params.view(1, -1, 3, 4, 4)
    p[:, 2::3, 0], p[:, 2::3, 1] = -10, 10
    p[:, 1::3, 2, 0], p[:, 0, 1:, 3] = 1e3, -torch.inf
    x[:, :, :, 0], x[:, :, :, 1] = -1, 1
    check(kernels, x, params, scaled=True)
    assert all(t.isfinite().all() for t in run(kernels, x, params))


@pytest.mark.parametrize("level", [-1e4, 1e20, 1e4 * torch.arange(-2.0, 3.0)[:, None, None]], ids=["-1e4", "1e20", "rising"])
def test_levels_of_the_logits_cost_no_digits(kernels, level):
    x, params = images(1, 1, 5, 3, 4)
    params.view(1, 3, 5, 3, 4)[:, 0] += torch.as_tensor(level)
    check(kernels, x, params)
    params.view(1, 3, 5, 3, 4)[:, 0] = params.view(1, 3, 5, 3, 4)[:, 0].flip(1)
    check(kernels, x, params)


@pytest.mark.parametrize("backwards", [False, True])
def test_nan_reaches_only_its_image_and_pixel(kernels, backwards):
    x, params = images(2, 3, 2, 12, 13)
    params[1, 7, 2, 3] = torch.nan
    value, grad = run(kernels, x, params, backwards=backwards)
    assert value.isnan().tolist() == [False, True]
    pixels = grad.isnan().any(1)
    assert pixels[1, 2, 3] and pixels.sum() == 1


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 1, 0, 3)], ids=str)
def test_empty(kernels, shape):
    N, C, H, W = shape
    value, grad = run(kernels, *images(N, C, 2, H, W))
    assert torch.equal(value, torch.zeros(N)) and grad.numel() == 0
