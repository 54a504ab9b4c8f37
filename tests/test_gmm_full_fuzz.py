"""Random calls of the C++ backend: any sizes, layouts and values are within the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gmm_full import check

from latent_engine.kernels import native

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    N, K, D = draw(st.integers(0, 40)), draw(st.integers(1, 20)), draw(st.integers(0, 11))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([0.1, 3.0]))
    z = scale * torch.randn(N, D, generator=g, dtype=dtype)
    means = scale * torch.randn(D, K, generator=g, dtype=dtype).T if draw(st.booleans()) \
        else scale * torch.randn(K, 2 * D, generator=g, dtype=dtype)[:, ::2][:, :D]
    diagonal = (spread * torch.randn(K, D, generator=g, dtype=dtype)).exp()
    chol = draw(st.sampled_from([0.0, 0.3, 2.0])) * torch.randn(K, D, D, generator=g, dtype=dtype)
    chol = chol.triu(1) + torch.diag_embed(diagonal) + torch.full_like(chol, 7.0).tril(-1)
    if draw(st.booleans()):
        chol = chol.mT.contiguous().mT
    return [z, means, chol, torch.randn(K, generator=g, dtype=dtype)]


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(inputs):
    check(inputs, "cpp", scaled=True)
