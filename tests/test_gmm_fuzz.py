"""Random calls of the C++ backend: any sizes, layouts, masks and values agree with the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_engine.kernels import gmm_log_prob, gmm_log_prob_and_grad, native
from latent_engine.kernels.reference.gmm import allowed_mask

from oracles import assert_within_budget
from oracles import gmm as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    N, K, D = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([0.1, 3.0]))
    z = scale * torch.randn(N, D, generator=g, dtype=dtype)
    means = scale * torch.randn(D, K, generator=g, dtype=dtype).T if draw(st.booleans()) \
        else scale * torch.randn(K, 2 * D, generator=g, dtype=dtype)[:, ::2][:, :D]
    log_vars = spread * torch.randn(draw(st.sampled_from([(K, D), (K, 1), (D,), ()])), generator=g, dtype=dtype)
    log_weights = torch.randn(K, generator=g, dtype=dtype)
    options = {}
    kind = draw(st.sampled_from(["none", "labels", "classes", "mask"]))
    if kind == "labels":
        options["labels"] = torch.randint(-1, K, (N,), generator=g)
    elif kind == "classes":
        options["labels"] = torch.randint(-1, 3, (N,), generator=g)
        options["allowed"] = torch.rand(3, K, generator=g) < 0.5
    elif kind == "mask":
        options["allowed"] = torch.rand(N, K, generator=g) < 0.5
    return [z, means, log_vars, log_weights], options, torch.randn(N, generator=g, dtype=dtype)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    inputs, options, grad = call
    mask = allowed_mask(options.get("labels"), options.get("allowed"), inputs[1].shape[0])
    outputs = {}
    for backend in ("cpp", "reference"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        value, resp = gmm_log_prob(*leaves, **options, responsibilities=True, backend=backend)
        outputs[backend] = [value.detach(), resp.detach(), *torch.autograd.grad(value, leaves, grad)]
    value, grads = gmm_log_prob_and_grad(*inputs, grad, **options)
    direct = [value, None, *grads]
    exact, scales = oracle.exact(*inputs, mask=mask, grad=grad)
    names = ("value", "responsibilities", "z", "means", "log_vars", "log_weights")
    for name, actual, both, plain, e, s in zip(names, outputs["cpp"], direct, outputs["reference"], exact, scales, strict=True):
        assert_within_budget(name, actual, plain, e, s)
        if both is not None:
            assert_within_budget(f"{name} of gmm_log_prob_and_grad", both, plain, e, s)
