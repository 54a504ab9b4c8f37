"""Random calls of the C++ backend: any sizes, layouts and values are within the error budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reparametrize import GRADS, LAYOUTS, check

from latent_engine.kernels import native

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    N, D = draw(st.integers(1, 9)), draw(st.integers(0, 40))
    samples = draw(st.sampled_from([(), (1,), (2,), (5,)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(scale, *shape):
        made = scale * torch.randn(*shape, generator=g, dtype=dtype)
        return draw(st.sampled_from([lambda t: t, *LAYOUTS.values()]))(made)

    scale, spread = draw(st.sampled_from([1e-3, 1.0, 30.0])), draw(st.sampled_from([1e-6, 1e-2, 1.0, 15.0]))
    return [tensor(scale, N, D), tensor(spread, N, D), tensor(1.0, *samples, N, D)], draw(st.sampled_from([*GRADS.values()]))


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    inputs, used = call
    check(inputs, "cpp", used)
