"""The CUDA kernels of reparametrize run on the host through an emulation of blocks and barriers; Triton's are among the
implementations of test_reparametrize.py."""

import ctypes

import pytest
import torch
from test_reparametrize import GRADS, LAYOUTS, incoming, posterior, run

from emulation import compile_emulation
from oracles import assert_within_budget, longdouble
from oracles import reparametrize as oracle

POINTERS = ("mean", "log_var", "noise", "grad_z", "grad_kl")
SIZES = ("S", "N", "D", "mean_type", "backwards", "mean_n", "mean_d", "log_var_n", "log_var_d",
         *(f"{name}_{axis}" for name in ("noise", "grad_z") for axis in "snd"), "grad_kl_n", "grad_kl_d")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    library = compile_emulation("reparametrize", tmp_path_factory.mktemp("cuda"))

    def call(mean, log_var, noise, grad_z, grad_kl, needs=(True, True), backwards=False):
        """z, the divergence and the gradients that are needed; `backwards` lets the last thread of a block run first."""
        of_samples = [t if t is None or t.dim() == 3 else t[None] for t in (noise, grad_z)]
        S, N, D = of_samples[0].shape
        strides = [(0, 0, 0)[:n] if t is None else t.stride() for t, n in (
            (mean, 2), (log_var, 2), (of_samples[0], 3), (of_samples[1], 3), (grad_kl, 2))]
        arguments = Arguments(*(None if t is None else t.data_ptr() for t in (mean, log_var, noise, grad_z, grad_kl)), S, N, D,
                              TYPES[mean.dtype], backwards, *(n for of_one in strides for n in of_one))
        outputs = [torch.full(noise.shape, torch.nan), torch.full((N, D), torch.nan),
                   torch.full((N, D), torch.nan, dtype=mean.dtype) if needs[0] else None,
                   torch.full((N, D), torch.nan) if needs[1] else None]
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in outputs]
        library.emulate_forward(ctypes.byref(arguments), *pointers[:2])
        library.emulate_backward(ctypes.byref(arguments), *pointers[2:])
        return outputs

    return call


def check(actual, inputs, grads):
    """Within the budget of the plain formula in float32."""
    inputs = [t.float() for t in inputs]
    direct = run(inputs, grads, backend="reference")
    for name, a, d, e, s in zip(oracle.NAMES, actual, direct, *oracle.exact(*inputs, *grads), strict=True):
        if a.dtype == torch.float32:
            assert_within_budget(name, a, d, e, s)
        else:
            torch.testing.assert_close(a, d.to(a.dtype))


# several rows a block, part of one, several blocks a row; without and with threads that share the samples of an element
SHAPES = [(None, 1, 1), (None, 9, 3), (None, 5, 50), (1, 3, 150), (3, 4, 1), (70, 3, 5), (9, 5, 50), (200, 2, 2)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(emulate, shape, backwards):
    inputs = posterior(*shape)
    for used in GRADS.values():
        grads = incoming(inputs, used)
        check(emulate(*inputs, *grads, backwards=backwards), inputs, grads)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strided_and_half_precision_inputs(emulate, layout, dtype):
    for S in (None, 3):
        inputs = [layout(t) for t in posterior(S, 5, 40)]
        inputs[0] = layout(posterior(S, 5, 40)[0].to(dtype))
        grads = [layout(t) for t in incoming(inputs)]
        check(emulate(*inputs, *grads), inputs, grads)


def test_only_what_is_needed(emulate):
    inputs = posterior(3, 5, 40)
    grads = incoming(inputs)
    full = emulate(*inputs, *grads)
    assert torch.equal(emulate(*inputs, *grads, needs=(True, False))[2], full[2])
    assert torch.equal(emulate(*inputs, *grads, needs=(False, True))[3], full[3])


def test_divergence_next_to_the_prior_keeps_its_digits(emulate):
    log_var = torch.cat((torch.logspace(-15, -3, 31), torch.linspace(1e-3, 4, 300), torch.linspace(4, 80, 20)))
    log_var = torch.cat((log_var, -log_var))[None]
    zeros = torch.zeros_like(log_var)
    kl = emulate(zeros, log_var, zeros, zeros, zeros)[1]
    exact = oracle.exact(zeros, log_var, zeros)[0][1]
    assert (abs(longdouble(kl) - exact) <= 6 * torch.finfo(torch.float32).eps * exact).all()


def test_nan_spoils_its_element_only(emulate):
    for which, outputs in ((0, [0, 1, 2]), (1, [0, 1, 3]), (2, [0, 3])):
        inputs = posterior(1, 4, 35)
        inputs[which][..., 2, 33] = torch.nan
        for i, t in enumerate(emulate(*inputs, *incoming(inputs))):
            assert t.isnan().nonzero().tolist() == ([[*([0] if i == 0 else []), 2, 33]] if i in outputs else [])
