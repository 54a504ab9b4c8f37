"""The kernels of both GPU backends run on the host, in all their block shapes and splits, against an 80-bit oracle.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import math
import os

import pytest
import torch

from latent_engine.kernels.importance import _reference
from latent_engine.kernels.reference import importance_statistics as statistics

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import importance as oracle

# NumPy, on which the interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTERS = ("z", "mu", "log_var", "log_px", "log_pz")
SIZES = ("S", "N", "D", "z_s", "z_n", "z_d", "log_var_n", "log_var_d", "z_type", "groups", "sign", "extreme", "wave",
         "backwards")


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]
                + [("scale", ctypes.c_double), ("elbo_weight", ctypes.c_double)])


def pointers(*tensors):
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL, wave: int, backwards: bool) -> None:
        self.library, self.wave, self.backwards = library, wave, backwards

    def arguments(self, z, mu, log_var, log_px, log_pz=None, alpha=0.0, elbo_weight=0.0, groups=1):
        S, N = log_px.shape
        strides, log_var_strides = ((0, 0, 0), (0, 0)) if z is None else (z.stride(), log_var.stride())
        extreme = math.isinf(alpha)
        D, z_type = (0, 0) if z is None else (z.shape[2], TYPES[z.dtype])
        return Arguments(*(None if t is None else t.data_ptr() for t in (z, mu, log_var, log_px, log_pz)), S, N, D, *strides,
                         *log_var_strides, z_type, groups, -1 if alpha > 1 else 1, extreme, self.wave, self.backwards,
                         1.0 if extreme else abs(1 - alpha), elbo_weight)

    def forward(self, z, mu, log_var, log_px, log_pz, alpha, elbo_weight, groups):
        call = self.arguments(z, mu, log_var, log_px, log_pz, alpha, elbo_weight, groups)
        S, N = log_px.shape
        bound, log_w, weights = torch.full((N,), torch.nan), torch.full((S, N), torch.nan), torch.full((S, N), torch.nan)
        self.library.emulate_forward(ctypes.byref(call), *pointers(bound, log_w, weights))
        return bound, log_w, weights

    def backward(self, grad, weights, z, mu, log_var, normal_prior, need_z, need_posterior):
        log_px = torch.empty(z.shape[:2])
        call = self.arguments(z, mu, log_var, log_px, None if normal_prior else log_px)
        outputs = [torch.full(shape, torch.nan) for shape in (z.shape, mu.shape, mu.shape, z.shape[:2])]
        outputs[0] = outputs[0].to(z.dtype)
        given = (outputs[0] if need_z else None, *(outputs[1:3] if need_posterior else (None, None)), outputs[3])
        self.library.emulate_backward(ctypes.byref(call), *pointers(weights, grad, *given))
        return outputs

    def moments(self, log_w, state):
        out = torch.full_like(state, torch.nan)
        self.library.emulate_moments(ctypes.byref(self.arguments(None, None, None, log_w)), *pointers(state, out))
        return out


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def __init__(self, wave: int) -> None:
        from latent_engine.kernels.triton import importance

        self.module, self.wave = importance, wave

    def run(self, name, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, "WAVE", self.wave)
            return getattr(self.module, name)(*args)

    def forward(self, *args):
        return self.run("importance_fwd", *args, True)

    def backward(self, *args):
        return self.run("importance_bwd", *args)

    def moments(self, *args):
        return self.run("importance_moments", *args)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_emulation("importance", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(params=["cuda-whole", "cuda-split", "cuda-backwards", "triton-whole", "triton-split"])
def kernels(request):
    """`whole` and `split`: whether samples of a data point are split; `backwards`: the last thread of a block runs first."""
    backend, _, kind = request.param.partition("-")
    wave = 1 if kind == "whole" else 264
    if backend == "cuda":
        return Emulation(request.getfixturevalue("library"), wave, kind == "backwards")
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
    return Interpreter(wave)


def samples(S, N, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    mu, log_var = torch.randn(N, D, generator=g), torch.randn(N, D, generator=g) - 1
    z = mu + torch.exp(0.5 * log_var) * torch.randn(S, N, D, generator=g)
    return [z, mu, log_var, torch.randn(S, N, generator=g) - 90, None], torch.randn(N, generator=g)


def check(kernels, inputs, grad, alpha=0.0, elbo_weight=0.0, groups=1):
    """All outputs of both primitives, of a half-precision z in its own."""
    z, mu, log_var, log_px, log_pz = inputs
    bound, log_w, weights = kernels.forward(*inputs, alpha, elbo_weight, groups)
    grads = kernels.backward(grad, weights, z, mu, log_var, log_pz is None, True, True)
    leaves = [t.detach().float().requires_grad_() for t in (z, mu, log_var, log_px)]
    direct, direct_log_w, _ = _reference(*leaves, log_pz, alpha, elbo_weight, groups, False)
    direct_grads = torch.autograd.grad(direct, leaves, grad)
    exact, scales = oracle.exact(*(t.float() for t in inputs[:4]), log_pz, grad=grad, alpha=alpha, elbo_weight=elbo_weight,
                                 groups=groups)
    for name, a, d, e, s in zip(oracle.NAMES, (bound, log_w, *grads), (direct, direct_log_w, *direct_grads), exact, scales,
                                strict=True):
        if a.dtype == torch.float32:
            assert_within_budget(name, a, d.detach(), e, s)
        else:
            torch.testing.assert_close(a, d.to(a.dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 3, 2), (9, 33, 5), (130, 2, 17), (5, 4, 64), (3, 2, 150), (40, 2, 300)],
                         ids=str)
def test_values_and_gradients(kernels, shape):
    inputs, grad = samples(*shape)
    check(kernels, inputs, grad)
    inputs[4] = inputs[3] + 80
    check(kernels, inputs, grad)


@pytest.mark.parametrize("options", [(1.0, 1.0, 1), (0.5, 0.0, 3), (3.0, 0.0, 1), (-math.inf, 0.0, 2), (math.inf, 0.3, 1),
                                     (0.0, 0.3, 4), (0.999, 0.0, 1), (1 - 1e-5, 0.3, 3), (1 - 1e-7, 0.0, 4),
                                     (1 + 1e-7, 0.0, 1)], ids=str)
def test_every_bound(kernels, options):
    inputs, grad = samples(84, 5, 3)
    check(kernels, inputs, grad, *options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_and_strided_samples(kernels, dtype):
    inputs, grad = samples(9, 8, 33)
    z = inputs[0].to(dtype).permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, ::2, 3:20]
    parameters = [t[::2, 3:20].contiguous() for t in inputs[1:3]]
    log_var, log_px = parameters[1].t().contiguous().t(), inputs[3][:, ::2].contiguous()
    check(kernels, [z, parameters[0], log_var, log_px, None], grad[::2].contiguous())


def test_only_what_is_needed(kernels):
    inputs, grad = samples(20, 3, 5)
    z, mu, log_var, *_ = inputs
    _, _, weights = kernels.forward(*inputs, 0.0, 0.0, 1)
    full = kernels.backward(grad, weights, z, mu, log_var, True, True, True)
    only_z = kernels.backward(grad, weights, z, mu, log_var, True, True, False)
    rest = kernels.backward(grad, weights, z, mu, log_var, True, False, True)
    assert torch.equal(only_z[0], full[0])
    assert all(torch.equal(a, b) for a, b in zip(rest[1:], full[1:], strict=True))
    given = kernels.backward(None, full[3], z, mu, log_var, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(given[:3], full[:3], strict=True))


def test_zero_weights_and_nan(kernels):
    inputs, grad = samples(70, 4, 3)
    inputs[3][2, 1] = -torch.inf
    inputs[3][:, 2] = -torch.inf
    inputs[0][5, 3, 1] = torch.nan
    z, mu, log_var, *_ = inputs
    for alpha in (0.0, -math.inf):
        bound, log_w, weights = kernels.forward(*inputs, alpha, 0.0, 1)
        grads = kernels.backward(grad, weights, z, mu, log_var, True, True, True)
        assert bound[:2].isfinite().all() and bound[2] == -torch.inf and bound[3].isnan()
        assert log_w[5, 3].isnan() and weights[2, 1] == 0
        assert grads[0][:, :3].isfinite().all() and grads[1][:3].isfinite().all() and grads[1][3].isnan().any()


@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (70, 40)], ids=str)
def test_moments(kernels, shape):
    log_w = 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) - 90
    state = statistics.moments(torch.randn(7, shape[1]) - 85)
    expected = statistics.merge_moments(state, statistics.moments(log_w))
    torch.testing.assert_close(kernels.moments(log_w, state), expected, rtol=1e-13, atol=0)
    empty = torch.tensor([-torch.inf, 0, 0, 0], dtype=torch.float64)[:, None].repeat(1, shape[1])
    torch.testing.assert_close(kernels.moments(log_w, empty), statistics.moments(log_w), rtol=1e-13, atol=0)
