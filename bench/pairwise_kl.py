"""Cases and peers of `pairwise_kl_diversity` (Eq. 8 of MAE) and of the deviation of `pairwise_kl` (its L_smooth)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from latent_engine.kernels import pairwise_kl, pairwise_kl_diversity
from latent_engine.kernels.reference import pairwise_kl as reference

from .suite import Suite
from .timing import Work

# name: (N, D)
CASES = {
    "mae-binary": (100, 32),
    "mae-cifar": (64, 1024),
    "mae-mid": (512, 64),
    "mae-large": (2048, 64),
}
BLOCK = 2**18  # numbers of a block of the formulas that take rows in blocks
MOST_BLOCKS = 64  # torch.compile unrolls them


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Posteriors of an encoder half-way through training: apart by a few of their widths."""
    N, D = CASES[case]
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(N, D, generator=generator)
    return tuple(t.to(device, dtype) for t in (mu, 0.5 * torch.randn(N, D, generator=generator) - 1))


def size_of(case: str) -> int:
    """Pairs × dimensions."""
    N, D = CASES[case]
    return N * N * D


def std(mu: Tensor, log_var: Tensor, backend: str | None = None) -> Tensor:
    """L_smooth, the deviation of the total."""
    return pairwise_kl(mu, log_var, backend=backend).std


std.__name__ = "pairwise_kl.std"


def diversity_work(case: str, backward: bool) -> Work:
    """Eq. 8 in operations of the FMA pipes: two to form the exponent, six for 2^x to 1e-7 and one for the product; with
    gradients four more for the sums and a division, six. The general exp, with its own range reduction, takes twice that.
    Additions are seven, two of them before the exponent, three in its reduction, a comparison and one for the product; with
    gradients one more and three for the sums."""
    N, D = CASES[case]
    return Work(4 * 2 * N * D * (2 if backward else 1), (19 if backward else 9) * size_of(case), 0,
                (11 if backward else 7) * size_of(case))


def std_work(case: str, backward: bool) -> Work:
    """The cheaper of the pair matrix and of Gram matrices in float64, where an FMA counts for two. The pair matrix takes both
    divergences of a pair at once: two subtractions and four FMAs; for the gradients of both two subtractions, an addition,
    three products and six FMAs."""
    N, D = CASES[case]
    pairs, gram = (6.5 if backward else 2) * N * N * D, (24 if backward else 8) * N * D * D
    additions = (2.5 if backward else 1) * N * N * D if pairs < gram else 0
    return Work(4 * 2 * N * D * (2 if backward else 1), min(pairs, gram), 0, additions)


def chunked_diversity(mu: Tensor, log_var: Tensor) -> Tensor:
    """Eq. 8 over blocks of rows that stay in cache; backward computes them again."""
    N, D = mu.shape
    var, inverse = log_var.exp(), torch.exp(-log_var)

    def block(mu_i, log_var_i, var_i, mu, log_var, inverse):
        kl = 0.5 * (log_var - log_var_i[:, None] - 1 + (var_i[:, None] + (mu_i[:, None] - mu).square()) * inverse)
        return softplus(-kl).sum()

    rows = max(1, BLOCK // (N * D), N // MOST_BLOCKS)
    total = sum(checkpoint(block, *parts, mu, log_var, inverse, use_reentrant=False)
                for parts in zip(mu.split(rows), log_var.split(rows), var.split(rows), strict=True))
    return (total - N * D * math.log(2)) / (N * (N - 1))


def gemm_std(mu: Tensor, log_var: Tensor) -> Tensor:
    """The pair matrix as one product of centred features."""
    N, D = mu.shape
    mu = mu - mu.mean(0)
    var, inverse = log_var.exp(), torch.exp(-log_var)
    scaled = mu * inverse
    row, column = -log_var.sum(1, keepdim=True), (log_var + mu * scaled).sum(1) - D
    kl = 0.5 * (torch.cat((var + mu.square(), -2 * mu), 1) @ torch.cat((inverse, scaled), 1).T + row + column)
    return kl.reshape(-1)[1:].reshape(N - 1, N + 1)[:, :-1].std()


def gram_std(mu: Tensor, log_var: Tensor) -> Tensor:
    """The squares of the pair matrix as an inner product of Gram matrices in float64, O(N·D²)."""
    dtype, (N, D) = mu.dtype, mu.shape
    mu, log_var = mu.double(), log_var.double()
    mu = mu - mu.mean(0)
    var, inverse = log_var.exp(), torch.exp(-log_var)
    scaled, one = mu * inverse, mu.new_ones(N, 1)
    f = torch.cat((var + mu.square(), -2 * mu, one, -log_var.sum(1, keepdim=True)), 1)
    g = torch.cat((inverse, scaled, (log_var + mu * scaled).sum(1, keepdim=True) - D, one), 1)
    pairs = N * (N - 1)
    mean = f.sum(0) @ g.sum(0) / pairs
    return (0.5 * (((f.T @ f) * (g.T @ g)).sum() - pairs * mean * mean).div(pairs - 1).sqrt()).to(dtype)


def plain_std(mu: Tensor, log_var: Tensor) -> Tensor:
    """The formula as one writes it."""
    return reference.pairwise_kl(mu, log_var)[1]


def _keops_divergences(mu: Tensor, log_var: Tensor):
    from pykeops.torch import LazyTensor

    delta = LazyTensor(mu[:, None]) - LazyTensor(mu[None])
    ratio = (LazyTensor(log_var.exp()[:, None]) + delta**2) * LazyTensor(torch.exp(-log_var)[None])
    return 0.5 * (LazyTensor(log_var[None]) - LazyTensor(log_var[:, None].contiguous()) + ratio - 1)


def keops_diversity(mu: Tensor, log_var: Tensor) -> Tensor:
    """A LazyTensor reduction over all pairs, of which those of a posterior with itself are log 2 each."""
    N, D = mu.shape
    terms = (1 + (-_keops_divergences(mu, log_var)).exp()).log().sum(-1)
    return (terms.sum(1).sum() - N * D * math.log(2)) / (N * (N - 1))


def keops_std(mu: Tensor, log_var: Tensor) -> Tensor:
    """Two LazyTensor reductions, of the total and of its square."""
    N = mu.shape[0]
    total, pairs = _keops_divergences(mu, log_var).sum(-1), N * (N - 1)
    mean = total.sum(1).sum() / pairs
    return (((total**2).sum(1).sum() - pairs * mean * mean) / (pairs - 1)).sqrt()


def jax_peer(what: str) -> Callable:
    """`jax.jit` of the plain formula: forward, or value and gradients."""
    import jax
    import jax.numpy as jnp

    def value(mu, log_var):
        N, D = mu.shape
        delta = mu[:, None] - mu[None]
        ratio = (jnp.exp(log_var)[:, None] + delta**2) * jnp.exp(-log_var)[None]
        kl = 0.5 * (log_var[None] - log_var[:, None] + ratio - 1)
        if what == "diversity":
            return (jax.nn.softplus(-kl).sum() - N * D * math.log(2)) / (N * (N - 1))
        return kl.sum(-1).reshape(-1)[1:].reshape(N - 1, N + 1)[:, :-1].std(ddof=1)

    both, forward = jax.jit(jax.value_and_grad(value, (0, 1))), jax.jit(value)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        return lambda: jax.block_until_ready((both if backward else forward)(*arrays))

    return build


SUITES = (
    Suite(
        op=pairwise_kl_diversity,
        sizes=("N", "D"),
        cases=CASES,
        inputs=inputs,
        work=diversity_work,
        plain=reference.pairwise_kl_diversity,
        formulas={"plain": reference.pairwise_kl_diversity, "chunked": chunked_diversity},
        keops=keops_diversity,
        jax={"jax plain": lambda: jax_peer("diversity")},
        exact=chunked_diversity,
        # the divergences, the terms of one and their softplus
        plain_bytes=lambda case: 9 * 4 * size_of(case),
    ),
    Suite(
        op=std,
        sizes=("N", "D"),
        cases=CASES,
        inputs=inputs,
        work=std_work,
        plain=plain_std,
        formulas={"plain": plain_std, "gemm": gemm_std, "gram": gram_std},
        keops=keops_std,
        jax={"jax plain": lambda: jax_peer("std")},
        exact=gram_std,
        plain_bytes=lambda case: 9 * 4 * size_of(case),
    ),
)
