"""The likelihoods' kernels of both GPU backends run on the host, against float64, in every way of summing gradients.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch

from latent_engine.kernels.reference.likelihood import log_prob

from emulation import compile_emulation

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
EPS = torch.finfo(torch.float32).eps
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = pytest.mark.parametrize("kind", range(4), ids=["bernoulli", "gaussian", "logistic", "counts"])


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in ("x", "a", "b", "mask")]
                + [(name, ctypes.c_int64) for name in ("S", "N", "P", "kind", "a_type", "backwards")]
                + [("strides", ctypes.c_int64 * 12), ("sizes", ctypes.c_int64 * 9)])


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, kind, x, a, b, mask, grad, backwards):
        pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
        strides = [0 if t is None or t.shape[i] == 1 else t.stride(i) for t in (x, a, b, mask) for i in range(3)]
        sizes = [0 if t is None else n for t in (x, a, b) for n in ((1, 1, 1) if t is None else t.shape)]
        S, N, P = torch.broadcast_shapes(x.shape, a.shape)
        call = Arguments(*(pointer(t) for t in (x, a, b, mask)), S, N, P, kind, TYPES[a.dtype], backwards,
                         (ctypes.c_int64 * 12)(*strides), (ctypes.c_int64 * 9)(*sizes))
        value = torch.full((S, N), torch.nan)
        self.library.emulate_forward(ctypes.byref(call), ctypes.c_void_p(pointer(value)))
        grads = [None if t is None else torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (x, a, b)]
        self.library.emulate_backward(ctypes.byref(call), *(ctypes.c_void_p(pointer(t)) for t in (grad, *grads)))
        return [value, *(g for g in grads if g is not None)]


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def run(self, kind, x, a, b, mask, grad, backwards):
        from latent_engine.kernels.triton import likelihood

        value = likelihood.likelihood_fwd(x, a, b, mask, kind, 1)
        gradients = likelihood.likelihood_bwd(grad, x, a, b, mask, kind, 1, True, True, b is not None)
        return [value, *gradients][:3 + (b is not None)]


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("likelihood", tmp_path_factory.mktemp("cuda")))


def draw(kind, x_shape, a_shape, b_shape):
    g = torch.Generator().manual_seed(0)
    z, noise, b = torch.randn(x_shape, generator=g), torch.randn(a_shape, generator=g), torch.randn(b_shape, generator=g)
    return ((z > 0).float(), 3 * noise, None) if kind == 0 else (z, noise, b) if kind == 1 else \
        ((127.5 * (1 + z.tanh())).round() / 127.5 - 1, 0.5 * noise, b - 3) if kind == 2 else \
        ((4 * z.exp()).round(), noise.exp(), b)


def expected(dtype, kind, x, a, b, mask, grad):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a, b) if t is not None]
    value = log_prob(*leaves, *([None] if b is None else []), mask, kind)
    grads = torch.autograd.grad(value, leaves, grad.to(dtype), allow_unused=True)
    return [value.detach(), *grads]


def check(kernels, kind, x, a, b, mask=None, backwards=False):
    """err <= 2 err(PyTorch's float32) + 4 eps scale, against float64; eps of the output's type. Gradients of data are not
    looked at."""
    grad = torch.randn(torch.broadcast_shapes(x.shape, a.shape)[:2], generator=torch.Generator().manual_seed(1))
    got = kernels.run(kind, x, a, b, mask, grad, backwards)
    exact, direct = (expected(t, kind, x, a, b, mask, grad) for t in (torch.float64, torch.float32))
    for i, (actual, e, d) in enumerate(zip(got, exact, direct, strict=True)):
        if i == 1 and kind > 1:
            continue
        eps = max(EPS, torch.finfo(actual.dtype).eps / 4)
        bound = 2 * (d - e).abs().max() + 4 * eps * e.abs().max()
        error = (actual.double() - e).abs().max()
        assert error <= bound, f"output {i}: {error:.3g} > {bound:.3g}"


# Each gradient: an entry for every one, by feature over rows, over s or n only, one number a row, one in all.
@KINDS
@pytest.mark.parametrize(("x", "a", "b"), [
    ((1, 3, 37), (2, 3, 37), (1, 1, 37)), ((2, 2, 5), (2, 2, 5), (2, 2, 5)), ((1, 3, 140), (1, 3, 140), (1, 1, 1)),
    ((2, 1, 9), (2, 3, 9), (1, 3, 1)), ((2, 3, 9), (1, 3, 9), (2, 1, 9)), ((2, 1, 33), (1, 2, 33), (2, 2, 1))], ids=str)
def test_values_and_gradients(kernels, kind, x, a, b):
    check(kernels, kind, *draw(kind, x, a, b))


@KINDS
@pytest.mark.parametrize("backwards", [False, True])
def test_missing_entries(kernels, kind, backwards):
    x, a, b = draw(kind, (1, 2, 21), (2, 2, 21), (2, 2, 21))
    mask = torch.rand(1, 2, 21, generator=torch.Generator().manual_seed(2)) < 0.6
    check(kernels, kind, x.masked_fill(~mask, torch.nan), a, b, mask, backwards)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_parameters(kernels, kind, dtype):
    x, a, b = draw(kind, (1, 2, 40), (2, 2, 40), (1, 1, 40))
    check(kernels, kind, x, a.to(dtype), b)


@KINDS
def test_many_rows_keep_their_digits(kernels, kind):
    rows = 70 if isinstance(kernels, Interpreter) else 150  # more than ROWS
    x, a, b = draw(kind, (1, rows, 3), (1, rows, 3), (1, 1, 3))
    check(kernels, kind, x, a, b)
    check(kernels, kind, x, a, None if b is None else b[..., :1])


@KINDS
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)], ids=str)
def test_empty(kernels, kind, shape):
    x, a, b = draw(kind, shape, shape, (1, 1, 1))
    value, *grads = kernels.run(kind, x, a, b, None, torch.ones(shape[:2]), False)
    assert value.shape == shape[:2] and (value == 0).all()
    if kind:
        assert grads[-1].item() == 0
