"""Importance weights and PyTorch: autocast, gradcheck, opcheck, compile, transforms; one error a mistake."""

import math

import pytest
import torch
from test_importance import run, samples

from latent_engine.kernels import (
    BackendError,
    explain,
    importance_bound,
    importance_log_weights,
    importance_objective,
    importance_weights,
    native,
)


def test_half_precision_and_autocast_give_float32(implementation):
    backend, device = implementation
    inputs = samples(7, 5, 3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        z = inputs[0].to(dtype).requires_grad_()
        value = importance_objective(z, *inputs[1:], backend=backend)
        value.sum().backward()
        torch.testing.assert_close(value, importance_objective(z.detach().float(), *inputs[1:], backend="reference"))
        assert z.grad.dtype == dtype and value.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        value = importance_objective(inputs[0].bfloat16(), *inputs[1:], backend=backend)
        assert value.dtype == importance_bound(inputs[3].bfloat16(), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "groups": 2, "elbo_weight": 0.3}, {"alpha": 2.0}, {"alpha": 1.0},
                                     {"alpha": 0.999}],
                         ids=str)
def test_gradcheck_once_and_twice(backend, options):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    leaves = [t.requires_grad_() for t in samples(4, 2, 3, torch.float64)]
    log_pz = leaves[3].detach().clone().requires_grad_()
    for function, args in ((lambda *a: importance_objective(*a, backend=backend, **options), (*leaves, log_pz)),
                           (lambda *a: importance_objective(*a, backend=backend, **options), leaves),
                           (lambda x: importance_bound(x, backend=backend, **options), (log_pz,)),
                           (lambda *a: importance_log_weights(*a, backend=backend), leaves)):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


def test_double_backward_where_one_argument_is_computed_from_another():
    z, mu, log_var, _ = samples(4, 2, 3, torch.float64)
    z = z.requires_grad_()

    def f(z):
        return importance_objective(z, mu, log_var, -z.square().sum(-1))

    assert torch.autograd.gradcheck(f, z)
    assert torch.autograd.gradgradcheck(f, z)
    (once,) = torch.autograd.grad(f(z).sum(), z)
    (kept,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    torch.testing.assert_close(once, kept)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    inputs = [t.requires_grad_(grad) for t in samples(6, 5, 3)]
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, None, 0.0, 0.0, 2, grad))
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, inputs[3].detach().clone(), 0.5, 0.25, 1, grad))
    torch.library.opcheck(ops.importance_fwd.default, (*inputs, None, 0.0, 0.0, 0, grad))
    torch.library.opcheck(ops.importance_fwd.default, (None, None, None, inputs[3], None, -math.inf, 0.0, 1, grad))
    detached = [t.detach() for t in inputs[:3]]
    weights = torch.rand(6, 5)
    for upstream, need_z, need_posterior in ((torch.ones(5), True, True), (None, True, False), (torch.ones(5), False, True)):
        torch.library.opcheck(ops.importance_bwd.default, (upstream, weights, *detached, True, need_z, need_posterior))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(z, mu, log_var, log_px):
        objective = importance_objective(z.tanh(), mu, log_var, log_px, estimator="stl", alpha=0.5)
        return (2 * objective + importance_bound(importance_log_weights(z, mu, log_var, log_px))).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for S in (17, 18):
        leaves = [t.requires_grad_() for t in samples(S, 5, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_transforms():
    inputs = samples(4, 5, 3)
    grads = torch.func.grad(lambda z: importance_objective(z, *inputs[1:]).sum())(inputs[0])
    torch.testing.assert_close(grads, run(inputs, torch.ones(5))[1])
    with pytest.raises(NotImplementedError, match=r"vmap is not supported; loop over the batches, or use backend='reference'"):
        torch.func.vmap(importance_bound)(torch.zeros(2, 4, 5))


def test_explain_names_the_backends():
    inputs = samples(4, 5, 3)
    for op in (importance_objective, importance_log_weights):
        assert set(explain(op, *inputs)) == {"cpp", "cuda", "triton", "reference"}
    assert explain(importance_bound, inputs[3].to("meta"))["reference"] == "chosen"


GOOD = {"z": torch.zeros(4, 3, 2), "mu": torch.zeros(3, 2), "log_var": torch.zeros(3, 2), "log_px": torch.zeros(4, 3)}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"z": torch.zeros(3, 2)}, ValueError, r"z must have shape \[S, N, D\], given \[3, 2\]"),
    ({"mu": torch.zeros(3, 1)}, ValueError, r"mu must have shape \[N, D\] as in z\[S, N, D\] = \[3, 2\], given \[3, 1\]"),
    ({"log_var": torch.zeros(2)}, ValueError, r"log_var must have shape .* given \[2\]"),
    ({"log_px": torch.zeros(3, 4)}, ValueError, r"log_px must have shape \[S, N\] .* = \[4, 3\], given \[3, 4\]"),
    ({"log_pz": torch.zeros(4)}, ValueError, r"log_pz must have shape \[S, N\] .* given \[4\]"),
    ({"z": [[0.0]]}, TypeError, "z must be a tensor, given list"),
    ({"z": torch.zeros(4, 3, 2, dtype=torch.int64)}, TypeError, "z is torch.int64 but mu is torch.float32"),
    ({"log_px": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "log_px is torch.float64 but mu is torch.float32"),
    ({"mu": torch.zeros(3, 2, dtype=torch.float64), "log_px": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError,
     "z is torch.float32 but mu is torch.float64"),
    ({**{k: t.double() for k, t in GOOD.items()}, "log_px": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError,
     "log_px is torch.bfloat16 but mu is torch.float64"),
    ({"log_pz": 0.0}, TypeError, "log_pz must be a tensor, given float"),
    ({"z": torch.zeros(4, 3, 2, device="meta")}, ValueError, "z is on meta but mu is on cpu"),
    ({"z": torch.zeros(0, 3, 2), "log_px": torch.zeros(0, 3)}, ValueError, "a bound needs at least one sample, given S = 0"),
    ({"alpha": math.nan}, ValueError, "alpha must be a number or ±inf, given nan"),
    ({"alpha": "max"}, ValueError, "alpha must be a number or ±inf, given 'max'"),
    ({"groups": 3}, ValueError, "groups must divide the S = 4 samples, given 3"),
    ({"groups": 0}, ValueError, "groups must divide the S = 4 samples, given 0"),
    ({"elbo_weight": "half"}, ValueError, r"elbo_weight must lie in \[0, 1\], given 'half'"),
    ({"elbo_weight": 1.5}, ValueError, r"elbo_weight must lie in \[0, 1\], given 1.5"),
    ({"estimator": "vimco"}, ValueError, "estimator must be one of iwae, stl, dreg, piwae, given 'vimco'"),
    ({"estimator": "dreg", "alpha": -math.inf}, ValueError, "estimator='dreg' needs a finite alpha, given -inf; use 'stl'"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "importance_objective: the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(changes, error, message):
    if changes.get("backend") == "cuda" and torch.cuda.is_available():
        message = "serves cuda tensors, given a cpu tensor"
    with pytest.raises(error, match=message):
        importance_objective(**{**GOOD, **changes})


def test_mistakes_of_the_bound():
    with pytest.raises(ValueError, match=r"log_w must have shape \[S, ...\], given a scalar"):
        importance_bound(torch.zeros(()))
    with pytest.raises(ValueError, match=r"importance_weights: log_w must have shape \[S, ...\], given a scalar"):
        importance_weights(torch.zeros(()))
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="importance_weights: a bound needs at least one sample, given S = 0"):
            importance_weights(torch.zeros(0, 3), alpha)
    with pytest.raises(ValueError, match="importance_weights: alpha must be a number or ±inf, given nan"):
        importance_weights(torch.zeros(4, 3), math.nan)
    with pytest.raises(TypeError, match=r"log_w must be a floating-point tensor, given torch.int64"):
        importance_bound(torch.zeros(3, 2, dtype=torch.int64))
