"""The kernels of both GPU backends run on the host, in all their tile shapes and splits, against float64.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch

from latent_engine.kernels.reference.gmm import gmm_log_prob, gmm_moments

from emulation import compile_emulation

# NumPy, on which the interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
EPS = torch.finfo(torch.float32).eps
POINTERS = ("z", "means", "log_vars", "log_weights", "labels", "allowed")
SIZES = ("N", "K", "D", "z_row", "z_col", "log_vars_row", "log_vars_col", "z_type", "wave", "backwards")
OUTPUTS = ("log_prob", "responsibilities", "z", "means", "log_vars", "log_weights")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES])


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, z, means, log_vars, log_weights, labels, allowed, grad, coef, wave, backwards):
        pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
        (N, D), K = z.shape, means.shape[0]
        call = Arguments(*(pointer(t) for t in (z, means, log_vars, log_weights, labels, allowed)), N, K, D,
                         *z.stride(), *log_vars.stride(), TYPES[z.dtype], wave, backwards)
        void = lambda *tensors: [ctypes.c_void_p(pointer(t)) for t in tensors]  # noqa: E731
        empty = lambda *shape: torch.full(shape, torch.nan)  # noqa: E731
        log_prob, r = empty(N), empty(N, K)
        self.library.emulate_forward(ctypes.byref(call), *void(log_prob, r))
        if grad is None:
            return log_prob, r
        grads = [empty(N, D).to(z.dtype), empty(K, D), empty(K, D), empty(K)]
        self.library.emulate_backward(ctypes.byref(call), *void(grad, log_prob, coef, *grads))
        return log_prob, r, *grads

    def moments(self, weights, z, means, log_vars, log_weights, wave):
        log_prob, _ = self.run(z, means, log_vars, log_weights, None, None, None, None, wave, False)
        (N, D), K = z.shape, means.shape[0]
        call = Arguments(*(t.data_ptr() for t in (z, means, log_vars, log_weights)), None, None, N, K, D, *z.stride(),
                         *log_vars.stride(), TYPES[z.dtype], wave, False)
        sums = [torch.full(shape, torch.nan) for shape in ((K,), (K, D), (K, D))]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weights, log_prob, *sums)]
        self.library.emulate_moments(ctypes.byref(call), *pointers)
        return log_prob, *sums


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def run(self, z, means, log_vars, log_weights, labels, allowed, grad, coef, wave, backwards):
        from latent_engine.kernels.triton import gmm

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gmm, "WAVE", wave)
            log_prob, r = gmm.gmm_fwd(z, means, log_vars, log_weights, labels, allowed, True)
            if grad is None:
                return log_prob, r
            return log_prob, r, *gmm.gmm_bwd(grad, z, means, log_vars, log_weights, log_prob, labels, allowed, coef,
                                             True, True)

    def moments(self, weights, z, means, log_vars, log_weights, wave):
        from latent_engine.kernels.triton import gmm

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gmm, "WAVE", wave)
            return gmm.gmm_moments(weights, z, means, log_vars, log_weights)


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("gmm", tmp_path_factory.mktemp("cuda")))


def run(kernels, z, means, log_vars, log_weights, labels=None, allowed=None, grad=None, coef=None, wave=264,
        backwards=False):
    """log_prob, responsibilities and, for `grad`, the four gradients.

    `wave` is the number of blocks that the work is split for; `backwards` lets the last thread of a block run first.
    """
    return kernels.run(z, means, log_vars, log_weights, labels, allowed, grad, coef, wave, backwards)


def expected(dtype, z, means, log_vars, log_weights, labels=None, allowed=None, grad=None, grad_resp=None):
    """The same from the reference and PyTorch's autograd, in `dtype`."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (z, means, log_vars, log_weights)]
    log_prob, r = gmm_log_prob(*inputs, labels, allowed)
    total = (log_prob.masked_fill(log_prob == -torch.inf, 0) * grad).sum()
    if grad_resp is not None:
        total = total + (r * grad_resp).sum()
    return [t.detach() for t in (log_prob, r, *torch.autograd.grad(total, inputs))]


def assert_within_budget(got, *args, **kwargs):
    """err <= 2 err(PyTorch's float32) + 4 eps scale, against float64; eps of the output's type."""
    exact, direct = expected(torch.float64, *args, **kwargs), expected(torch.float32, *args, **kwargs)
    for name, g, e, d in zip(OUTPUTS, got, exact, direct, strict=True):
        dead = torch.isinf(e)
        assert torch.equal(torch.isinf(g), dead), name
        g, e, d = (t.double()[~dead] for t in (g, e, d))
        if not e.numel():
            continue
        eps = max(EPS, torch.finfo(got[2].dtype).eps / 4) if name == "z" else EPS
        bound = 2 * (d - e).abs().max() + 4 * eps * e.abs().max()
        assert (g - e).abs().max() <= bound, f"{name}: {(g - e).abs().max():.3g} > {bound:.3g}"


def mixture(N, K, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(N, D), draw(K, D), 0.5 * draw(K, D) - 0.5, draw(K).log_softmax(0), draw(N)


# Every tile of the table: K <= 16 or more, D <= 4, 16, 32, 64 or several chunks; odd sizes, one and several tiles.
@pytest.mark.parametrize("wave", [1, 264], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (131, 5, 2), (200, 16, 7), (130, 10, 40), (70, 130, 3), (67, 65, 13),
                                   (65, 70, 29), (33, 67, 64), (17, 66, 150), (129, 3, 70)], ids=str)
def test_values_and_gradients(kernels, shape, wave):
    z, means, log_vars, log_weights, grad = mixture(*shape)
    got = run(kernels, z, means, log_vars, log_weights, grad=grad, wave=wave)
    assert_within_budget(got, z, means, log_vars, log_weights, grad=grad)


@pytest.mark.parametrize("wave", [1, 264], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(131, 5, 2), (130, 10, 40), (67, 65, 13), (17, 66, 150)], ids=str)
def test_moments(kernels, shape, wave):
    z, means, log_vars, log_weights, weights = mixture(*shape)
    inputs = weights, z, means, log_vars, log_weights
    exact, direct = gmm_moments(*(t.double() for t in inputs)), gmm_moments(*inputs)
    for g, e, d in zip(kernels.moments(*inputs, wave), exact, direct, strict=True):
        assert (g - e).abs().max() <= 2 * (d - e).abs().max() + 4 * EPS * e.abs().max()


@pytest.mark.parametrize("labels", [False, True], ids=["no-labels", "labels"])
@pytest.mark.parametrize("allowed", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("K", [7, 70])
def test_allowed_components(kernels, labels, allowed, K):
    z, means, log_vars, log_weights, grad = mixture(70, K, 5)
    generator = torch.Generator().manual_seed(1)
    classes = 6 if allowed else K
    label = torch.randint(-1, classes, (70,), generator=generator) if labels else None
    mask = torch.rand(classes if labels else 70, K, generator=generator) < 0.3 if allowed else None
    if mask is not None:
        mask[2] = False  # rows without any component
        log_weights[1] = -torch.inf
    got = run(kernels, z, means, log_vars, log_weights, label, mask, grad)
    assert_within_budget(got, z, means, log_vars, log_weights, label, mask, grad)


def test_given_coefficients_replace_the_recomputed_ones(kernels):
    z, means, log_vars, log_weights, grad = mixture(70, 20, 70)
    grad_resp = torch.randn(70, 20, generator=torch.Generator().manual_seed(2))
    _, r = run(kernels, z, means, log_vars, log_weights)
    coef = r * (grad_resp - (grad_resp * r).sum(1, keepdim=True)) + r * grad[:, None]
    got = run(kernels, z, means, log_vars, log_weights, grad=grad, coef=coef)
    assert_within_budget(got, z, means, log_vars, log_weights, grad=grad, grad_resp=grad_resp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_and_strided_points(kernels, dtype):
    wide, means, log_vars, log_weights, grad = mixture(70, 20, 33)
    z = wide.to(dtype).t().contiguous().t()[::2, 3:20]  # columns first, every second row, an offset
    means, log_vars, grad = means[:, :17].contiguous(), log_vars[:1, :1].expand(20, 17), grad[:35].contiguous()
    got = run(kernels, z, means, log_vars, log_weights, grad=grad)
    assert_within_budget(got, z, means, log_vars, log_weights, grad=grad)


def test_extreme_variances_far_modes_and_identical_points(kernels):
    z, means, _, log_weights, grad = mixture(66, 18, 6)
    means, log_vars = 10 + means, torch.linspace(-30, 30, 18)[:, None].expand(18, 6)
    z[:18] = means
    z[20], means[3] = 1e4, -1e4
    got = run(kernels, z, means, log_vars, log_weights, grad=grad)
    assert all(torch.isfinite(t).all() for t in got)
    assert_within_budget(got, z, means, log_vars, log_weights, grad=grad)


@pytest.mark.parametrize("backwards", [False, True])
def test_nan_reaches_only_what_it_affects(kernels, backwards):
    z, means, log_vars, log_weights, grad = mixture(150, 20, 5)
    mask = torch.ones(150, 20, dtype=torch.bool)
    z[3, 1], mask[3, 10:] = torch.nan, False
    means[7, 2], mask[5:, 7], mask[:3, 7] = torch.nan, False, False  # allowed to rows 3 and 4 only
    z[9, 0], mask[9] = torch.nan, False
    log_prob, _, *grads = run(kernels, z, means, log_vars, log_weights, allowed=mask, grad=grad,
                                backwards=backwards)
    rows = torch.zeros(150, dtype=torch.bool).index_fill(0, torch.tensor([3, 4]), True)
    assert torch.equal(log_prob.isnan(), rows)
    assert torch.equal(grads[0].isnan().any(1), rows)
    touched = mask[3] | mask[4]  # every component that an affected row may use
    for g in (grads[1], grads[2], grads[3][:, None]):
        assert torch.equal(g.isnan().any(1), touched)


@pytest.mark.parametrize("backwards", [False, True])
def test_infinitely_far_means_and_points_weigh_nothing(kernels, backwards):
    z, means, log_vars, log_weights, grad = mixture(70, 20, 5)
    z[40, 0], grad[40] = torch.inf, 1.0
    means[15, 2] = torch.inf
    got = run(kernels, z, means, log_vars, log_weights, grad=grad, backwards=backwards)
    means[15, 2], z[40, 0], grad[40], log_weights[15] = 0.0, 0.0, 0.0, -torch.inf
    want = run(kernels, z, means, log_vars, log_weights, grad=grad, backwards=backwards)
    assert got[0][40] == -torch.inf
    got[0][40], got[1][40] = want[0][40], want[1][40]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(3, 0, 2), (3, 20, 0), (0, 3, 2), (5, 3, 0)], ids=str)
def test_empty(kernels, shape):
    z, means, log_vars, log_weights, grad = mixture(*shape)
    log_prob, r, *grads = run(kernels, z, means, log_vars, log_weights, grad=grad)
    want = expected(torch.float64, z, means, log_vars, log_weights, grad=grad)
    torch.testing.assert_close(log_prob.double(), want[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(r.double(), want[1], atol=1e-6, rtol=1e-6)
    if shape[0]:  # with no rows the binding returns zeros
        for g, w in zip(grads, want[2:], strict=True):
            torch.testing.assert_close(g.double(), w, atol=1e-6, rtol=1e-6)


def test_many_rows_keep_their_digits(kernels):
    z, means, log_vars, log_weights, _ = mixture(20_000, 2, 1)
    grad = torch.ones(20_000)
    got = run(kernels, z, means, log_vars, log_weights, grad=grad, wave=1)
    assert_within_budget(got, z, means, log_vars, log_weights, grad=grad)
