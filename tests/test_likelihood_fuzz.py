"""Random calls of the C++ backend: any sizes, broadcasts, layouts, masks and values agree with independent formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_likelihood import NAMES, run

from latent_engine.kernels import native

from oracles import assert_within_budget
from oracles import likelihood as oracle

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def calls(draw):
    kind = draw(st.integers(0, 3))
    S, N, P = draw(st.integers(0, 4)), draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 40, 150]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # SciPy's log-Gamma functions are the oracle of the counts, in float64
    dtype = torch.float32 if kind == 3 else draw(st.sampled_from([torch.float32, torch.float64]))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0]))

    def normal(*shapes):
        shape = draw(st.sampled_from(shapes))
        wide = torch.randn(*shape[:-1], 2 * shape[-1] if shape else 1, generator=g, dtype=dtype)
        return wide[..., ::2].reshape(shape) if not shape else wide[..., ::2] if draw(st.booleans()) else wide[..., :shape[-1]]

    z, a = normal((N, P), (S, N, P)), spread * normal((S, N, P), (S, 1, P), (N, P))
    b = spread * normal((), (P,), (S, N, P), (N, 1), (S, 1, P))
    x = ((z > 0).to(dtype) if draw(st.booleans()) else z.sigmoid(), z, (127.5 * (1 + z.tanh())).round() / 127.5 - 1,
         (2 * z.exp()).round())[kind]
    inputs = [x, a, b][:2 if kind == 0 else 3]
    if kind == 2:
        inputs[1] = a / 10
    elif kind == 3:
        inputs[1] = a.exp()
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(draw(st.sampled_from([(P,), (N, P), (N, 1), ()])), generator=g) < 0.6
    shape = torch.broadcast_shapes(x.shape, a.shape, *(() if kind == 0 else [b.shape]), () if mask is None else mask.shape)
    inputs[1] = inputs[1].expand(shape)  # the second parameter and the mask must not enlarge the result
    return kind, inputs, mask, torch.randn(shape[:-1], generator=g, dtype=dtype)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls(call):
    kind, inputs, mask, grad = call
    actual = run(kind, inputs, grad, backend="cpp", mask=mask)
    direct = run(kind, inputs, grad, backend="reference", mask=mask)
    exact, scales = oracle.exact(kind, inputs, mask, grad)
    for name, a, d, e, s in zip(("value", *NAMES), actual, direct, exact, scales, strict=False):
        assert_within_budget(name, a, d, e, s)
