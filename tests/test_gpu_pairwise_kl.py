"""The kernels of both GPU backends run on the host, in all their blocks and splits, against float64.

CUDA through an emulation of blocks and barriers (needs only a C++ compiler), Triton through its interpreter.
"""

import ctypes
import os

import pytest
import torch

from latent_engine.kernels.reference import pairwise_kl as reference

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import pairwise_kl as oracle

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SIZES = ("N", "D", "mu_row", "mu_col", "log_var_row", "log_var_col", "wave", "backwards")


class Arguments(ctypes.Structure):
    _fields_ = [("mu", ctypes.c_void_p), ("log_var", ctypes.c_void_p), *((name, ctypes.c_int64) for name in SIZES)]


class Emulation:
    """The CUDA kernels, compiled for the host with coroutines in place of threads: the primitives of kernels/pairwise_kl.py."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.wave, self.backwards = library, 264, False

    def _call(self, name, mu, log_var, *tensors):
        sizes = (*mu.shape, *mu.stride(), *log_var.stride(), self.wave, self.backwards)
        call = Arguments(mu.data_ptr(), log_var.data_ptr(), *sizes)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        getattr(self.library, name)(ctypes.byref(call), *pointers)

    def diversity(self, mu, log_var, need_grad):
        value, unit = torch.full((), torch.nan), torch.full((2, *mu.shape), torch.nan) if need_grad else None
        self._call("emulate_diversity", mu, log_var, value, unit)
        return value, unit

    def statistics(self, mu, log_var, need_std, need_grad):
        mean, moments = torch.full(mu.shape[1:], torch.nan), torch.full((5, mu.shape[1]), torch.nan)
        deviation = torch.full((), torch.nan) if need_std else None
        unit = torch.full((2, *mu.shape), torch.nan) if need_grad else None
        self._call("emulate_statistics", mu, log_var, mean, moments, deviation, unit)
        return mean, deviation, moments, unit

    def backward(self, grad_mean, grad_std, mu, log_var, moments, unit):
        grads = torch.full((2, *mu.shape), torch.nan)
        self._call("emulate_backward", mu, log_var, moments, grad_mean, grad_std, unit, *grads)
        return grads


class Interpreter:
    """The Triton kernels in Triton's interpreter."""

    def __init__(self) -> None:
        from latent_engine.kernels.triton import pairwise_kl as kernels

        self.diversity, self.statistics = kernels.pairwise_kl_diversity_fwd, kernels.pairwise_kl_fwd
        self.backward = kernels.pairwise_kl_bwd


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernels(request, tmp_path_factory):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is not 1: Triton kernels run on the device")
        return Interpreter()
    return Emulation(compile_emulation("pairwise_kl", tmp_path_factory.mktemp("cuda")))


def posteriors(N, D):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=g), 0.7 * torch.randn(N, D, generator=g) - 0.5


def run(kernels, mu, log_var, grad_mean):
    """Values and gradients under the names of the oracle."""
    value, unit = kernels.diversity(mu, log_var, True)
    mean, deviation, moments, std_unit = kernels.statistics(mu, log_var, True, True)
    found = {"mean_per_dim": mean, "std": deviation, "diversity": value}
    grads = {"diversity": unit, "std": std_unit,
             "mean_per_dim": kernels.backward(grad_mean, None, mu, log_var, moments, std_unit)}
    both = kernels.backward(grad_mean, torch.tensor(2.0), mu, log_var, moments, std_unit)
    for name, (by_mu, by_log_var) in grads.items():
        found[f"{name} by mu"], found[f"{name} by log_var"] = by_mu, by_log_var
    for i in range(2):
        torch.testing.assert_close(both[i], grads["mean_per_dim"][i] + 2 * std_unit[i])
    assert torch.equal(kernels.diversity(mu, log_var, False)[0], value) or value.isnan()
    return found


def direct(mu, log_var, grad_mean):
    """The same by PyTorch's float32 and autograd."""
    leaves = [t.clone().requires_grad_() for t in (mu, log_var)]
    mean, deviation = reference.pairwise_kl(*leaves)
    outputs = {"mean_per_dim": mean, "std": deviation, "diversity": reference.pairwise_kl_diversity(*leaves)}
    found = {name: t.detach() for name, t in outputs.items()}
    for name, t in outputs.items():
        grads = torch.autograd.grad(t, leaves, grad_mean if t.dim() else torch.ones_like(t), retain_graph=True)
        found[f"{name} by mu"], found[f"{name} by log_var"] = grads
    return found


def check(kernels, mu, log_var):
    grad_mean = torch.linspace(-1, 1.5, mu.shape[1])
    exact, scales = oracle.exact(mu, log_var, grad_mean)
    found, plain = run(kernels, mu, log_var, grad_mean), direct(mu, log_var, grad_mean)
    for name in exact:
        assert_within_budget(name, found[name], plain[name], exact[name], scales[name])


# One row tile and several, one round of the other posteriors and several, chunks of dimensions, broken tiles
@pytest.mark.parametrize("shape", [(2, 1), (7, 3), (33, 5), (70, 1), (5, 70), (131, 1)], ids=str)
def test_values_and_gradients(kernels, shape):
    check(kernels, *posteriors(*shape))


@pytest.mark.parametrize("backwards", [False, True])
def test_several_chunks_of_the_pair_matrix_and_whole_waves(kernels, backwards):
    if isinstance(kernels, Interpreter):
        pytest.skip("Triton has no pair matrix, and no order of threads")
    kernels.backwards, kernels.wave = backwards, 1
    try:
        check(kernels, *posteriors(290, 1))
    finally:
        kernels.backwards, kernels.wave = False, 264


def test_strided_offset_and_extreme_inputs(kernels):
    mu, log_var = posteriors(20, 6)
    if isinstance(kernels, Emulation):  # Triton's primitives make contiguous copies
        mu, log_var = mu.t().contiguous().t(), torch.stack((log_var, log_var), -1)[..., 0]
    check(kernels, mu + 1e3, log_var)
    check(kernels, mu * 1e-3, log_var * 1e-3)
    check(kernels, mu * 1e-10, log_var - 50)
    mu[::2] += 1e3
    check(kernels, mu, 10 * torch.sign(log_var))


def test_equal_far_and_nan(kernels):
    mu, log_var = posteriors(12, 4)
    found = run(kernels, mu[:1].repeat(12, 1), log_var[:1].repeat(12, 1), torch.ones(4))
    assert all(t.isfinite().all() for t in found.values())
    found = run(kernels, 1e6 * torch.arange(12.0)[:, None].expand(12, 4).contiguous(), torch.zeros(12, 4), torch.ones(4))
    assert found["diversity"] == 0 and (found["diversity by mu"] == 0).all() and all(t.isfinite().all() for t in found.values())
    mu[3, 1] = torch.nan
    value, unit = kernels.diversity(mu, log_var, True)
    mean, deviation, *_ = kernels.statistics(mu, log_var, True, False)
    others = torch.tensor([0, 2, 3])
    assert value.isnan() and unit[:, :, 1].isnan().all() and unit[:, :, others].isfinite().all()
    assert deviation.isnan() and mean[1].isnan() and mean[others].isfinite().all()


def test_no_dimensions(kernels):
    value, unit = kernels.diversity(*posteriors(5, 0), True)
    mean, deviation, _, _ = kernels.statistics(*posteriors(5, 0), True, True)
    assert value == 0 and unit.shape == (2, 5, 0) and mean.shape == (0,) and deviation == 0
