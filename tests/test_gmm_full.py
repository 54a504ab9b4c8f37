"""gmm_full_log_prob and gmm_full_moments: every implementation against an 80-bit oracle, on odd inputs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_engine.kernels import gmm_full_log_prob, gmm_full_moments

from oracles import assert_within_budget
from oracles import gmm_full as oracle

NAMES = ("z", "means", "precision_cholesky", "log_weights")
# N, K, D: ones, primes, whole and broken tiles, more components than rows, and more dimensions than rows
SIZES = [(1, 1, 1), (3, 2, 1), (17, 5, 3), (33, 20, 2), (64, 7, 16), (5, 67, 4), (70, 13, 33), (300, 3, 9), (21, 3, 65)]


def mixture(N: int, K: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Points of a random mixture whose covariances overlap, and NaN below the diagonal of the factors."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(K, D, generator=g)
    near = means[torch.randint(max(K, 1), (N,), generator=g)] if K else torch.zeros(N, D)
    off = torch.randn(K, D, D, generator=g).triu(1) / max(D, 1) ** 0.5
    chol = off + torch.diag_embed((0.3 * torch.randn(K, D, generator=g)).exp())
    chol = chol.masked_fill(torch.ones(D, D, dtype=torch.bool).tril(-1), torch.nan)
    tensors = near + torch.randn(N, D, generator=g), means, chol, torch.randn(K, generator=g)
    return [t.to(device, dtype) for t in tensors]


def run(inputs: list[Tensor], grad: Tensor | None, **options) -> list[Tensor]:
    """Log-density and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = gmm_full_log_prob(*leaves, **options)
    return [value.detach()] if grad is None else [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def outputs(inputs: list[Tensor], grad: Tensor, **options) -> list[tuple[str, Tensor]]:
    """All that the oracle gives, in its order, and then the rest of the moments."""
    value, resp = gmm_full_log_prob(*inputs, responsibilities=True, **options)
    moments = gmm_full_moments(*inputs, grad, **options)
    both = [value, resp, *run(inputs, grad, **options)[1:], moments.first, moments.second]
    names = ("value", "responsibilities", *NAMES, "first moment", "second moment")
    return [*zip(names, both, strict=True), ("value of the moments", moments.log_prob), ("weight", moments.weight)]


def check(inputs: list[Tensor], backend: str, scaled: bool = False) -> None:
    """Everything that `backend` gives is within the error budget, which `scaled` takes of the sizes of the terms."""
    grad = torch.randn(inputs[0].shape[0], generator=torch.Generator().manual_seed(1)).to(inputs[1])
    actual, direct = outputs(inputs, grad, backend=backend), outputs(inputs, grad, backend="reference")
    exact, scales = ([*s, s[0], s[5]] for s in oracle.exact(*inputs, grad=grad))
    for (name, a), (_, d), e, s in zip(actual, direct, exact, scales, strict=True):
        assert_within_budget(name, a, d, e, s if scaled else None)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32] if backend in ("triton", "cuda") else [torch.float32, torch.float64]


def test_reference_is_the_formula():
    for dtype in dtypes_of("reference"):
        check(mixture(17, 5, 3, dtype), "reference")


def test_reference_agrees_with_scipy():
    z, means, chol, log_weights = mixture(9, 3, 4, torch.float64)
    normal = pytest.importorskip("scipy.stats").multivariate_normal
    precision = (chol.triu() @ chol.triu().mT).numpy()
    densities = [normal(means[k].numpy(), np.linalg.inv(precision[k])).pdf(z.numpy()) for k in range(3)]
    expected = np.log(log_weights.exp().numpy() @ np.stack(densities))
    np.testing.assert_allclose(gmm_full_log_prob(z, means, chol, log_weights, backend="reference"), expected, rtol=1e-12)
