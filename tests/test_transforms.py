"""torch.func over every differentiable op: gradients of native kernels equal those of plain autograd through the reference."""

import pytest
import torch
from torch.autograd import forward_ad

from latent_engine.kernels import (
    bernoulli_log_prob,
    gmm_full_log_prob,
    gmm_log_prob,
    importance_bound,
    importance_objective,
    logistic_mixture_log_prob,
    mmd2,
    mmd2_to_normal,
    mmd_witness,
    native,
    pairwise_kl,
    pairwise_kl_diversity,
    reparametrize,
)

T = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ONE = T.new_ones(6, 1)
FACTORS = T[:4, :, None] * T[:4, None] + 4 * torch.eye(3)
OPS = {
    "gmm": lambda x, b: gmm_log_prob(x, T[:4], T[:4], T[:4, 0], backend=b),
    "gmm_full": lambda x, b: gmm_full_log_prob(x, T[:4], FACTORS, T[:4, 0], backend=b),
    "pairwise_kl": lambda x, b: torch.hstack((*pairwise_kl(x, T, backend=b),)),
    "pairwise_kl_diversity": lambda x, b: pairwise_kl_diversity(x, T, backend=b),
    "mmd": lambda x, b: mmd2(x, T, backend=b),
    "mmd_witness": lambda x, b: mmd_witness(x, T, T + 1, backend=b),
    "mmd_normal": lambda x, b: mmd2_to_normal(x, T, backend=b),
    "importance_bound": lambda x, b: importance_bound(x, 0.3, backend=b),
    "importance_objective": lambda x, b: importance_objective(x[None], T, T, ONE.T, backend=b),
    "likelihood": lambda x, b: bernoulli_log_prob(T.sigmoid(), x, backend=b),
    "reparametrize": lambda x, b: torch.hstack(reparametrize(x, x.cos(), T, backend=b)),
    "logistic_mixture": lambda x, b: logistic_mixture_log_prob(T[:1, :1, None, None], x.reshape(1, 18, 1, 1), backend=b),
}


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_tangents_are_refused_also_without_gradients(op):
    for enabled in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(enabled), pytest.raises(NotImplementedError, match="forward-mode"):
            op(forward_ad.make_dual(T, T), None)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vjp_and_jacobian(op):
    expected = torch.autograd.functional.jacobian(lambda x: op(x, "reference"), T)
    torch.testing.assert_close(torch.func.jacrev(lambda x: op(x, None))(T), expected)
    value, pull = torch.func.vjp(lambda x: op(x, None), T)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], expected.reshape(-1, *T.shape).sum(0))
