"""Cases and peers of `gmm_full_log_prob` and `gmm_full_moments`. The gradients taken are those of all four arguments."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from latent_engine.kernels import gmm_full_log_prob, gmm_full_moments
from latent_engine.kernels.reference import gmm_full as reference

from .gmm import jax_builder
from .suite import Suite
from .timing import Work

# name: (N, K, D)
CASES = {
    "dgd-full": (5000, 50, 2),
    "gmm-full": (10_000, 20, 32),
    "gmm-full-apart": (10_000, 20, 32),
    "wide-full": (2000, 10, 128),
}
APART = {"gmm-full-apart": 8.0}  # distance of the means, in standard deviations of a coordinate


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Points of a random mixture. Its means are close, so that most pairs of row and component have a responsibility above
    zero in float32, but for "apart", where a row has one component."""
    N, K, D = CASES[case]
    g = torch.Generator().manual_seed(0)
    means = APART.get(case, 0.5) * torch.randn(K, D, generator=g)
    factors = torch.eye(D) + 0.3 / D**0.5 * torch.randn(K, D, D, generator=g)
    chol = torch.linalg.inv(torch.linalg.cholesky(factors @ factors.mT)).mT.contiguous()
    k = torch.randint(K, (N,), generator=g)
    z = means[k] + torch.einsum("nij,nj->ni", factors[k], torch.randn(N, D, generator=g))
    log_weights = torch.randn(K, generator=g).log_softmax(0)
    return tuple(t.to(device, dtype) for t in (z, means, chol, log_weights))


@cache
def active_pairs(case: str) -> int:
    """Pairs whose responsibility is not zero in float32."""
    return int((reference.gmm_full_log_prob(*inputs(case, torch.float32, "cpu"))[1] > 0).sum())


def work(case: str, backward: bool) -> Work:
    """Forward: a triangle of FMAs and D squares, and one exp, a pair. Backward does that again (only [N] is saved), then a
    triangle of FMAs for dz and one for the second moment, with 2 D multiplications, a pair that has a responsibility."""
    N, K, D = CASES[case]
    size, triangle, pairs = 4 * (N * D + K * (D * D + D + 1) + N), D * (D + 1) // 2, N * K
    fmas = pairs * (triangle + D)
    if not backward:
        return Work(size, fmas, pairs)
    return Work(2 * size, 2 * (fmas + active_pairs(case) * (triangle + D)), 2 * pairs)


def moments_work(case: str, backward: bool) -> Work:
    """Forward, and a triangle of FMAs and D multiplications for each pair that has a responsibility."""
    N, K, D = CASES[case]
    forward = work(case, False)
    return Work(forward.bytes + 4 * K * (D * D + D + 1), forward.fmas + active_pairs(case) * (D * (D + 1) // 2 + D), 2 * N * K)


def plain(z: Tensor, means: Tensor, chol: Tensor, log_weights: Tensor) -> Tensor:
    """The formula as one writes it: differences, a batch of matrix products and their squares."""
    return reference.gmm_full_log_prob(z, means, chol, log_weights)[0]


def gemm(z: Tensor, means: Tensor, chol: Tensor, log_weights: Tensor) -> Tensor:
    """z P_k of all components as one matrix product, less μ_k P_k."""
    chol = chol.triu()
    K, D = means.shape
    shifts = torch.einsum("ki,kij->kj", means, chol)
    white = torch.addmm(-shifts.reshape(-1), z, chol.permute(1, 0, 2).reshape(D, K * D)).reshape(-1, K, D)
    constant = log_weights + chol.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * D * math.log(2 * math.pi)
    return (constant - 0.5 * white.square().sum(2)).logsumexp(1)


def distributions(z: Tensor, means: Tensor, chol: Tensor, log_weights: Tensor) -> Tensor:
    """torch.distributions, which normalises the weights: their logarithm is put back."""
    scale = torch.linalg.solve_triangular(chol, torch.eye(means.shape[1], device=z.device, dtype=z.dtype).expand_as(chol),
                                          upper=True).mT
    normals = torch.distributions.MultivariateNormal(means, scale_tril=scale, validate_args=False)
    weights = torch.distributions.Categorical(logits=log_weights, validate_args=False)
    mixture = torch.distributions.MixtureSameFamily(weights, normals, validate_args=False)
    return mixture.log_prob(z) + log_weights.logsumexp(0)


def scikit_learn(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    """`GaussianMixture.score_samples`."""
    from sklearn.mixture import GaussianMixture

    z, means, chol, log_weights = (t.cpu().numpy() for t in tensors)
    model = GaussianMixture(len(means))
    model.means_, model.precisions_cholesky_, model.weights_ = means, chol, np.exp(log_weights)
    return lambda: model.score_samples(z)


def plain_moments(z: Tensor, means: Tensor, chol: Tensor, log_weights: Tensor) -> tuple[Tensor, ...]:
    """Responsibilities, then the sums one component after the other, as a matrix product each."""
    log_prob, resp = reference.gmm_full_log_prob(z, means, chol, log_weights)
    first, second = [], []
    for mean, r in zip(means, resp.T, strict=True):
        delta = z - mean
        weighted = delta * r[:, None]
        first.append(weighted.sum(0))
        second.append(weighted.T @ delta)
    return log_prob, resp.sum(0), torch.stack(first), torch.stack(second)


def jax_peer(form: str) -> Callable:
    """The same formulas in JAX."""
    import jax.numpy as jnp
    from jax.scipy.special import logsumexp

    def log_prob(z, means, chol, log_weights):
        chol = jnp.triu(chol)
        if form == "plain":
            white = jnp.einsum("nki,kij->nkj", z[:, None] - means, chol)
        else:
            white = jnp.einsum("ni,kij->nkj", z, chol) - jnp.einsum("ki,kij->kj", means, chol)
        log_det = jnp.log(jnp.diagonal(chol, axis1=1, axis2=2)).sum(1)
        half = 0.5 * means.shape[1] * math.log(2 * math.pi)
        return logsumexp(log_weights + log_det - half - 0.5 * jnp.square(white).sum(-1), axis=1)

    return jax_builder(log_prob)


SUITE = Suite(
    op=gmm_full_log_prob,
    sizes=("N", "K", "D"),
    cases=CASES,
    inputs=inputs,
    work=work,
    plain=plain,
    formulas={"plain": plain, "gemm": gemm, "distributions": distributions},
    # differences, their products with the factors, and squares
    plain_bytes=lambda case: 3 * 4 * math.prod(CASES[case]),
    jax={"jax plain": lambda: jax_peer("plain"), "jax gemm": lambda: jax_peer("gemm")},
)
FORWARD = replace(SUITE, directions=(False,), builders={"scikit-learn": scikit_learn})
BACKWARD = replace(SUITE, directions=(True,))
MOMENTS = replace(FORWARD, op=gmm_full_moments, work=moments_work, plain=plain_moments, formulas={"plain": plain_moments},
                  builders={}, jax={}, direct=True)
SUITES = (FORWARD, BACKWARD, MOMENTS)
