"""Random calls of the C++ backend: any tables, batches and settings agree with dense steps in 80-bit arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row_update import check, moments

from latent_engine.kernels import adam_history, native, row_adam_, row_catch_up_, row_sgd_

from oracles.row_update import Table

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@st.composite
def runs(draw):
    N, D, dtype = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1e-4, 1.0, 1e4]))
    steps = [(torch.randint(N, (draw(st.integers(0, 60)),), generator=g), 10.0 ** draw(st.integers(-3, -1)))
             for _ in range(draw(st.integers(1, 4)))]
    batches = [(index, size * torch.randn(len(index), D, generator=g, dtype=dtype), lr) for index, lr in steps]
    decay = {"weight_decay": draw(st.sampled_from([0.0, 0.3])), "decoupled_weight_decay": draw(st.booleans())}
    betas = draw(st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9), (0.99, 0.9)]))
    return torch.randn(N, D, generator=g, dtype=dtype), batches, decay, betas, draw(st.integers(0, 300))


def sgd(table, batches, decay, backend):
    table, velocity = table.clone(), torch.zeros_like(table)
    for index, grad, lr in batches:
        row_sgd_(table, velocity, index, grad, lr=lr, momentum=0.8, **decay, backend=backend)
    return table, velocity


def adam(table, batches, decay, betas, backend):
    table = table.clone()
    state = moments(table)
    for index, grad, lr in batches:
        row_adam_(table, *state, index, grad, lr=lr, betas=betas, **decay, backend=backend)
    return table, *state


def catch_up(after, lrs, betas, weight_decay, backend):
    """Brings all rows to the last of the steps `lrs`."""
    after = [t.clone() for t in after]
    row_catch_up_(*after, None, adam_history(lrs, 1, betas, weight_decay), now=len(lrs), betas=betas, backend=backend)
    return after


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(runs())
def test_random_runs(run):
    table, batches, decay, betas, rest = run
    truths, options = (Table(table), Table(table)), {"weight_decay": decay["weight_decay"]}
    decoupled = decay["decoupled_weight_decay"]
    for index, grad, lr in batches:
        truths[0].sgd(index, grad, lr, 0.8, **options, decoupled=decoupled)
        truths[1].adam(index, grad, lr, betas, **options, decoupled=decoupled)
    names = "z mean square step"
    check("z velocity", *(sgd(table, batches, decay, backend) for backend in ("cpp", "reference")), truths[0], table)
    lazy = [adam(table, batches, decay, betas, backend) for backend in ("cpp", "reference")]
    check(names, *lazy, truths[1], table)

    # From where lazy Adam has left them, all rows rest until the same step.
    before, last = Table(table), len(batches) + rest
    before.z, before.mean, before.square = (t.numpy().astype(before.z.dtype) for t in lazy[0][:3])
    before.step = lazy[0][3].numpy().astype(before.step.dtype)
    lrs = [10.0 ** -(1 + t % 3) for t in range(last)]
    for t in range(last):
        before.rest(before.step == t, lrs[t], betas, **options)
    check(names, *(catch_up(lazy[0], lrs, betas, backend=b, **options) for b in ("cpp", "reference")), before, table)
