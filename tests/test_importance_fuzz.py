"""Random calls of the C++ backend: any sizes, layouts, bounds and values are within the error budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_engine.kernels import ImportanceAccumulator, importance_log_weights, importance_objective, native

from oracles import assert_within_budget
from oracles import importance as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    S, N, D = groups * draw(st.integers(1, 14)), draw(st.integers(0, 21)), draw(st.integers(0, 35))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([0.1, 3.0]))

    def tensor(*shape):
        layout = draw(st.sampled_from(["whole", "sliced", "transposed"]))
        if layout == "sliced":
            return torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=g, dtype=dtype)[..., 1::2]
        made = torch.randn(*shape, generator=g, dtype=dtype)
        return made.mT.contiguous().mT if layout == "transposed" else made

    mu, log_var = scale * tensor(N, D), spread * tensor(N, D)
    z = mu + torch.exp(0.5 * log_var) * tensor(S, N, D)
    inputs = [z, mu, log_var, draw(st.sampled_from([0.0, 2.0, 100.0])) * tensor(S, N) - 90]
    if draw(st.booleans()):
        inputs.append(tensor(S, N) - D)
    if draw(st.booleans()) and N:
        inputs[3][draw(st.integers(0, S - 1)), draw(st.integers(0, N - 1))] = -torch.inf
    alpha = draw(st.sampled_from([0.0, 0.0, 0.5, -3.0]))
    elbo_weight = draw(st.sampled_from([0.0, 0.3])) if inputs[3].isfinite().all() else 0.0
    return inputs, {"alpha": alpha, "groups": groups, "elbo_weight": elbo_weight}, torch.randn(N, generator=g, dtype=dtype)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    inputs, options, grad = call
    results = []
    for backend in ("cpp", "reference"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        value = importance_objective(*leaves, backend=backend, **options)
        grads = torch.autograd.grad(value.masked_fill(value.detach() == -torch.inf, 0.0), leaves, grad)
        results.append([value.detach(), importance_log_weights(*inputs, backend=backend), *grads[:4]])
    exact, scales = oracle.exact(*inputs, grad=grad, **options)
    for name, actual, direct, e, s in zip(oracle.NAMES, *results, exact, scales, strict=True):
        assert_within_budget(name, actual, direct, e, s)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 300), st.integers(0, 40), st.integers(1, 9), st.sampled_from([0.1, 5.0, 300.0]), st.integers(0, 2**31))
def test_random_chunks(S, N, chunks, spread, seed):
    log_w = spread * torch.randn(S, N, generator=torch.Generator().manual_seed(seed)) - 90
    parts, whole = ImportanceAccumulator(backend="cpp"), ImportanceAccumulator(backend="reference").add(log_w)
    for chunk in log_w.tensor_split(chunks):
        parts.add(chunk)
    torch.testing.assert_close(parts.log_likelihood(), log_w.double().logsumexp(0) - math.log(S), rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.effective_sample_size(), whole.effective_sample_size(), rtol=1e-11, atol=0)
    torch.testing.assert_close(parts.elbo(), whole.elbo(), rtol=1e-12, atol=1e-12)
