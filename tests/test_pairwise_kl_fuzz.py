"""Random calls of the C++ backend: any sizes, layouts and values stay within the error budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pairwise_kl import run

from latent_engine.kernels import native

from oracles import assert_within_budget
from oracles import pairwise_kl as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    N, D = draw(st.integers(2, 28)), draw(st.integers(0, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([0.1, 1.0, 3.0]))
    offset, level = draw(st.sampled_from([0.0, 1e3])), draw(st.sampled_from([-20.0, 0.0, 20.0]))
    mu = offset + scale * torch.randn(N, D, generator=g, dtype=dtype)
    log_var = level + spread * torch.randn(N, D, generator=g, dtype=dtype)
    if draw(st.booleans()):
        mu = mu.T.contiguous().T
    if draw(st.booleans()):
        log_var = torch.stack((log_var, log_var), -1)[..., 0]
    if draw(st.booleans()):  # some posteriors are equal
        index = torch.randint(N, (N,), generator=g)
        mu, log_var = mu[index], log_var[index]
    return [mu, log_var], torch.randn(D, generator=g, dtype=dtype)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    inputs, grad_mean = call
    actual, direct = run(inputs, grad_mean, "cpp"), run(inputs, grad_mean, "reference")
    exact, scales = oracle.exact(*inputs, grad_mean)
    for name in exact:
        assert_within_budget(name, actual[name], direct[name], exact[name], scales[name])
