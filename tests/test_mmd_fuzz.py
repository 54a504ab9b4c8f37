"""Random calls of the C++ backend: any sizes, layouts, kernels, scales and values agree with the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_engine.kernels import kernel_sums, mmd2, native
from latent_engine.kernels.mmd import ESTIMATORS, KERNELS

from oracles import assert_within_budget
from oracles import mmd as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    kernel, estimator = draw(st.sampled_from(KERNELS)), draw(st.sampled_from(ESTIMATORS))
    least = {"sum": 0, "unbiased": 2, "biased": 1}[estimator]
    N, M, D = (draw(st.integers(low, high)) for low, high in ((least, 80), (least, 20), (1, 9)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    size = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    x = size * (torch.randn(D, N, generator=g, dtype=dtype).T if draw(st.booleans())
                else torch.randn(N, 2 * D, generator=g, dtype=dtype)[:, ::2])
    y = size * torch.randn(M, D, generator=g, dtype=dtype)
    if draw(st.booleans()) and N > 3:
        x[1:3] = x[0]
        y[:1] = x[0]
    if draw(st.booleans()):
        x[-1:] *= 1e3
    scales = tuple(10.0 ** draw(st.integers(-2, 2)) * (1 + 0.5 * i) for i in range(draw(st.integers(1, 10))))
    unit = draw(st.sampled_from([0.5, 2.0 * D, 300.0]))
    return x, y, kernel, () if kernel == "energy" else scales, unit, estimator


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    x, y, kernel, scales, unit, estimator = call
    options = {} if kernel == "energy" else {"scales": scales, "unit": unit}
    outputs = {}
    for backend in ("cpp", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        if estimator == "sum":
            value = sum(kernel_sums(*leaves, kernel=kernel, backend=backend, **options))
        else:
            value = mmd2(*leaves, kernel=kernel, estimator=estimator, backend=backend, **options)
        outputs[backend] = [value.detach(), *torch.autograd.grad(value, leaves)]
    exact, sizes = oracle.exact(x, y, kernel, scales, unit, estimator, (1, 1, 1) if estimator == "sum" else (1, 1, -2))
    for name, actual, direct, e, s in zip(("value", "x", "y"), outputs["cpp"], outputs["reference"], exact, sizes, strict=True):
        assert_within_budget(name, actual, direct, e, s)
