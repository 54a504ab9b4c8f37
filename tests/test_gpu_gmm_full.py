"""The kernels of both GPU backends run on the host, in all their tile shapes and splits, against the 80-bit oracle.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch
from test_gmm_full import mixture

from latent_engine.kernels.reference import gmm_full as reference

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import gmm_full as oracle

# NumPy, on which the interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
POINTERS = ("z", "means", "chol", "log_weights")
SIZES = ("N", "K", "D", "z_row", "z_col", "z_type", "wave", "backwards")
OUTPUTS = ("log_prob", "responsibilities", "z", "weight", "first", "second")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES])


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, z, means, chol, log_weights, grad, coef, wave, backwards):
        (N, D), K = z.shape, means.shape[0]
        call = Arguments(*(t.data_ptr() for t in (z, means, chol, log_weights)), N, K, D, *z.stride(), TYPES[z.dtype], wave,
                         backwards)
        void = lambda *tensors: [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]  # noqa: E731
        empty = lambda *shape, dtype=torch.float32: torch.full(shape, torch.nan, dtype=dtype)  # noqa: E731
        log_prob, r = empty(N), empty(N, K)
        self.library.emulate_forward(ctypes.byref(call), *void(log_prob, r))
        grads = [empty(N, D).to(z.dtype), *(empty(*shape, dtype=torch.float64) for shape in ((K,), (K, D), (K, D, D)))]
        self.library.emulate_backward(ctypes.byref(call), *void(grad, log_prob, coef, *grads))
        return log_prob, r, *grads


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def run(self, z, means, chol, log_weights, grad, coef, wave, backwards):
        from latent_engine.kernels.triton import gmm, gmm_full

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gmm, "WAVE", wave)
            patch.setattr(gmm_full, "ROUND", 1 if wave == 1 else 64)  # several launches, or one
            log_prob, r = gmm_full.gmm_full_fwd(z, means, chol, log_weights, True)
            return log_prob, r, *gmm_full.gmm_full_bwd(grad, z, means, chol, log_weights, log_prob, coef, True, True)


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("gmm_full", tmp_path_factory.mktemp("cuda")))


def run(kernels, inputs, grad=None, coef=None, wave=264, backwards=False):
    """log_prob, responsibilities, the gradient of z and the moments, weighted by `grad` or given as `coef`.

    `wave` is the number of blocks that the work is split for; `backwards` lets the last thread of a block run first.
    """
    return kernels.run(*inputs, incoming(inputs) if grad is None else grad, coef, wave, backwards)


def incoming(inputs):
    return torch.randn(inputs[0].shape[0], generator=torch.Generator().manual_seed(1))


def check(got, inputs):
    grad, leaf = incoming(inputs), inputs[0].detach().requires_grad_()
    arguments = leaf if leaf.dtype == torch.float32 else leaf.float(), *inputs[1:]
    log_prob, r = reference.gmm_full_log_prob(*arguments)
    direct = [log_prob, r, *torch.autograd.grad(log_prob, leaf, grad),
              *reference.gmm_full_moments(*arguments, grad)[1:]]
    exact, _ = oracle.exact(*inputs, grad=grad)
    for name, g, d, e in zip(OUTPUTS, got, direct, [*exact[:3], *exact[5:]], strict=True):
        assert_within_budget(name, g, d.detach(), e)


# One, two and more tiles a thread, with and without shares; odd sizes; splits of rows and of components, and several rounds.
@pytest.mark.parametrize("wave", [264, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 3, 2), (130, 9, 5), (65, 5, 31), (66, 2, 64), (33, 2, 128)], ids=str)
def test_values_gradients_and_moments(kernels, shape, wave):
    inputs = mixture(*shape)
    check(run(kernels, inputs, wave=wave), inputs)


def test_given_coefficients_replace_the_recomputed_ones(kernels):
    inputs = mixture(70, 6, 7)
    _, r, *_ = run(kernels, inputs)
    check(run(kernels, inputs, grad=torch.zeros(70), coef=r * incoming(inputs)[:, None]), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_and_strided_points(kernels, dtype):
    wide, *mixture_ = mixture(70, 6, 17)
    z = torch.cat((wide, wide), 1).to(dtype).t().contiguous().t()[::2, 5:22]  # columns first, every second row, an offset
    check(run(kernels, [z, *mixture_]), [z, *mixture_])


@pytest.mark.parametrize("backwards", [False, True])
def test_nan_and_rows_without_weight(kernels, backwards):
    """NaN reaches its row and the sums; a row of weight zero reaches neither, whatever it holds."""
    inputs = mixture(70, 4, 5)
    grad = incoming(inputs)
    inputs[0][3, 1] = torch.nan
    log_prob, _, dz, *sums = run(kernels, inputs, backwards=backwards)
    only = torch.arange(70) == 3
    assert torch.equal(log_prob.isnan(), only) and torch.equal(dz.isnan().any(1), only)
    assert all(t.isnan().any() for t in sums)
    inputs[0][3, 1], inputs[3][2] = 1e30, -torch.inf  # so far away that its density is zero
    got = run(kernels, inputs, backwards=backwards)
    assert got[0][3] == -torch.inf and (got[3][2] == 0).all()
    inputs[0][3, 1], grad[3] = 0.0, 0.0
    for g, w in zip(got[3:], run(kernels, inputs, grad=grad, backwards=backwards)[3:], strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("shape", [(3, 0, 2), (3, 5, 0), (5, 3, 0)], ids=str)
def test_empty(kernels, shape):
    inputs = mixture(*shape)
    check(run(kernels, inputs), inputs)


def test_many_rows_keep_their_digits(kernels):
    inputs = mixture(5000, 1, 1)
    check(run(kernels, inputs, wave=4), inputs)
