"""Random calls of the C++ backend: any sizes, layouts, masks and values are within the error budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_engine.kernels import logistic_mixture_log_prob, native

from oracles import assert_within_budget
from oracles import logistic_mixture as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    C, K, N = draw(st.sampled_from([1, 3])), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    H, W = draw(st.integers(0, 3)), draw(st.integers(0, 23))
    lead = draw(st.sampled_from([(), (2,), (1, 2), (0,)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randint(256, (N, C, H, W), generator=g).to(dtype) / 127.5 - 1
    kind = draw(st.sampled_from(["levels", "between", "edges"]))
    if kind == "between":  # the levels, or anywhere in and around [−1, 1]
        x += 0.01 * torch.randn(x.shape, generator=g, dtype=dtype)
    elif kind == "edges":
        x = x.sign()
    centre, spread = draw(st.sampled_from([-8.0, -4.0, 0.0, 9.0])), draw(st.sampled_from([0.1, 1.0, 4.0]))
    rows = 10 if C == 3 else 3
    shape = (*lead, N, rows * K, H, W)
    if draw(st.booleans()):
        params = torch.randn(*shape, generator=g, dtype=dtype)
    else:
        params = torch.randn(*shape[:-1], 2 * W, generator=g, dtype=dtype)[..., ::2]
    planes = params.unflatten(-3, (rows, K))
    planes[..., 2::3, :, :, :] = spread * planes[..., 2::3, :, :, :] + centre
    planes[..., :2, :, :, :] *= draw(st.sampled_from([0.1, 1.0, 30.0]))
    mask = torch.rand(N, H, W, generator=g) < 0.7 if draw(st.booleans()) else None
    return x, params, mask, torch.randn(*lead, N, generator=g, dtype=dtype)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    x, params, mask, grad = call
    outputs = {}
    for backend in ("cpp", "reference"):
        leaf = params.detach().requires_grad_()
        value = logistic_mixture_log_prob(x, leaf, mask=mask, backend=backend)
        outputs[backend] = [value.detach(), *torch.autograd.grad(value, leaf, grad)]
    exact = oracle.exact(x, params, grad, mask)
    for name, actual, direct, e, s in zip(("value", "params"), outputs["cpp"], outputs["reference"], *exact, strict=True):
        assert_within_budget(name, actual, direct, e, s)
