"""Random calls of the C++ backend: any sizes, layouts, options and values are within the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mmd_normal import check

from latent_engine.kernels import native

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    N, D = draw(st.sampled_from([2, 3, 5, 8, 17])), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([0.1, 3.0, 15.0]))
    x = scale * torch.randn(N, D, generator=g, dtype=dtype) + draw(st.sampled_from([0.0, 1.0, 100.0]))
    if draw(st.booleans()):
        x = x.T.contiguous().T
    log_var = spread * torch.randn(N, 2 * D, generator=g, dtype=dtype)[:, ::2] + draw(st.sampled_from([0.0, -6.0]))
    inputs = [x, log_var] if draw(st.booleans()) else [x]
    return inputs, {"kernel": draw(st.sampled_from(["imq", "gaussian"])),
                    "tolerance": draw(st.sampled_from([1e-2, 1e-3])),
                    "estimator": draw(st.sampled_from(["unbiased", "biased"])),
                    "scales": tuple(draw(st.lists(st.sampled_from([0.01, 0.3, 1.0, 7.0, 400.0]), min_size=1, max_size=3)))}


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    inputs, options = call
    check(inputs, "cpp", **options)
