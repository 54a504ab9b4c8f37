"""The kernels of both GPU backends run on the host, in several tiles and splits, against float64.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch

from latent_engine.kernels.mmd import ESTIMATORS, KERNELS
from latent_engine.kernels.reference import mmd as reference

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import mmd as oracle

# NumPy, on which the interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
POINTERS = ("x", "y", "scales", "sections")
SIZES = ("N", "M", "D", "x_row", "x_col", "y_row", "y_col", "kernel", "count", "estimator", "wave", "backwards")


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]
                + [("unit", ctypes.c_double)])


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, x, y, kernel, scales, unit, estimator, sections, needs, wave, backwards):
        (N, D), M = x.shape, y.shape[0]
        lists = [(ctypes.c_double * len(values))(*values) for values in (scales, sections)]
        call = Arguments(x.data_ptr(), y.data_ptr(), *map(ctypes.addressof, lists), N, M, D, *x.stride(), *y.stride(), kernel,
                         len(scales), estimator, wave, backwards, unit)
        value, matrix, *grads = (torch.full(shape, torch.nan) for shape in ((), (N, M), (N, D), (M, D)))
        void = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
        self.library.emulate_matrix(ctypes.byref(call), void(matrix))
        self.library.emulate_forward(ctypes.byref(call), void(value),
                                     *(void(g) if need else None for g, need in zip(grads, needs, strict=True)))
        return value, *grads, matrix


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def run(self, x, y, kernel, scales, unit, estimator, sections, needs, wave, backwards):
        from latent_engine.kernels.triton import mmd

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mmd, "WAVE", wave)
            found = mmd.mmd_fwd(x, y, kernel, scales, unit, estimator, sections, *needs)
            return *found, mmd.mmd_kernel(x, y, kernel, scales, unit)


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("mmd", tmp_path_factory.mktemp("cuda")))


def check(kernels, x, y, kernel="imq", estimator="unbiased", scales=(0.2, 1.0, 5.0), sections=(1.0, 1.0, -2.0), wave=264,
          backwards=False):
    """Value, gradients and kernel matrix are within the error budget, and so is the value without gradients."""
    scales, unit = [] if kernel == "energy" else list(scales), 2.0 * x.shape[1]
    options = KERNELS.index(kernel), scales, unit, ESTIMATORS.index(estimator), list(sections)
    *got, matrix = kernels.run(x, y, *options, (True, True), wave, backwards)
    alone = kernels.run(x, y, *options, (False, False), wave, backwards)[0]
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    value = reference.mmd(*leaves, kernel, scales, unit, estimator, sections)
    direct = [value.detach(), *torch.autograd.grad(value, leaves)]
    exact, sizes = oracle.exact(x, y, kernel, scales, unit, estimator, sections)
    for name, g, d, e, s in zip(("value", "x", "y"), got, direct, exact, sizes, strict=True):
        assert_within_budget(name, g, d, e, s)
    assert_within_budget("value alone", alone, direct[0], exact[0], sizes[0])
    truth = reference.kernel_matrix(x.double(), y.double(), kernel, scales, unit)
    assert_within_budget("matrix", matrix, reference.kernel_matrix(x, y, kernel, scales, unit), truth.numpy())


def samples(N, M, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), 0.3 + torch.randn(M, D, generator=generator)


@pytest.mark.parametrize("wave", [1, 264], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(2, 3, 1), (70, 21, 2), (40, 67, 17), (20, 9, 70)], ids=str)
def test_values_and_gradients(kernels, shape, wave):
    check(kernels, *samples(*shape), wave=wave)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_estimator(kernels, kernel, estimator):
    x, y = samples(19, 12, 3)
    x[1], y[0] = x[0], x[0]
    check(kernels, x, y, kernel, estimator)


@pytest.mark.parametrize("sections", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=["x", "y", "both"])
def test_one_sum_alone(kernels, sections):
    check(kernels, *samples(9, 70, 3), estimator="sum", sections=sections)


def test_strided_samples(kernels):
    x, y = samples(70, 40, 33)
    check(kernels, x.t().contiguous().t()[::4, 3:20], y[:9, 5:22], backwards=True)


def test_far_and_identical_points(kernels):
    x, y = samples(20, 12, 3)
    x[5:9], y[3], x[11], y[7] = x[4].clone(), x[4].clone(), 1e4, -1e6
    for kernel in KERNELS:
        check(kernels, x, y, kernel)


@pytest.mark.parametrize("backwards", [False, True])
def test_nan_reaches_only_what_it_affects(kernels, backwards):
    x, y = samples(70, 20, 3)
    x[69, 1] = torch.nan
    options = KERNELS.index("imq"), [1.0], 6.0, ESTIMATORS.index("sum")
    for sections, spoilt in (([1.0, 0.0, 0.0], True), ([0.0, 1.0, 0.0], False), ([0.0, 0.0, 1.0], True)):
        value, _, dy, matrix = kernels.run(x, y, *options, sections, (True, True), 264, backwards)
        assert value.isnan() == spoilt
        assert dy.isnan().any() == (sections[2] != 0)
        assert torch.equal(matrix.isnan().all(1), torch.arange(70) == 69) and matrix[:69].isfinite().all()
