"""Cases and peers of the importance-weighted bound: log-weights and the bound over them, from samples of the posterior. The
gradients taken are those of z, mu, log_var and log p(x|z)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latent_engine.kernels import ImportanceAccumulator, importance_log_weights, importance_objective
from latent_engine.kernels.reference import importance as reference

from .suite import Suite
from .timing import Work

# name: (S, N, D)
CASES = {
    "iwae": (50, 20, 50),
    "iw-train": (50, 100, 50),
    "mae-nll": (4096, 100, 32),
}
STREAMED = {"mae-nll-streamed": CASES["mae-nll"]}
CHUNK = 512  # samples decoded at a time


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Samples of posteriors, with log-likelihoods of the size that MNIST has."""
    S, N, D = (CASES | STREAMED)[case]
    generator = torch.Generator().manual_seed(0)
    mu, log_var = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator) - 2
    z = mu + torch.exp(0.5 * log_var) * torch.randn(S, N, D, generator=generator)
    log_px = 3 * torch.randn(S, N, generator=generator) - 90
    return tuple(t.to(device, dtype) for t in (z, mu, log_var, log_px))


def work(case: str, backward: bool) -> Work:
    """Forward: z is read; a multiplication and two FMAs an element, one exp a log-weight. Backward: z is read again and dz
    written, four multiplications and FMAs an element; the weights are kept, at a second exp a log-weight."""
    S, N, D = (CASES | STREAMED)[case]
    z, log_w = S * N * D, S * N
    size = 4 * (z + 2 * log_w)
    return Work(2 * size + 4 * (z + log_w) if backward else size, (7 if backward else 3) * z, (2 if backward else 1) * log_w)


def plain(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor) -> Tensor:
    """The formula as one writes it."""
    return reference.bound(reference.log_weights(z, mu, log_var, log_px))


def gemm(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor) -> Tensor:
    """The expanded square as batched matrix products: two passes over z, at the price of cancellation."""
    inverse = torch.exp(-log_var)
    constant = 0.5 * (mu.square() * inverse + log_var).sum(-1)
    points = z.transpose(0, 1)
    square = torch.bmm(points.square(), (0.5 * (inverse - 1)).unsqueeze(-1)).squeeze(-1)
    log_w = log_px + (constant[:, None] + square - torch.bmm(points, (mu * inverse).unsqueeze(-1)).squeeze(-1)).T
    return log_w.logsumexp(0) - math.log(len(z))


def jax_peer() -> Callable:
    """`jax.jit` of the plain formula: forward, or value and gradients."""
    import jax
    import jax.numpy as jnp
    from jax.scipy.special import logsumexp

    def bound(z, mu, log_var, log_px):
        terms = jnp.square(z - mu) * jnp.exp(-log_var) + log_var - jnp.square(z)
        return logsumexp(log_px + 0.5 * terms.sum(-1), axis=0) - math.log(z.shape[0])

    @jax.jit
    def gradients(incoming, *args):
        value, pullback = jax.vjp(bound, *args)
        return value, pullback(incoming)

    forward = jax.jit(bound)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        incoming = jnp.ones(arrays[1].shape[0], jnp.float32)
        return lambda: jax.block_until_ready(gradients(incoming, *arrays) if backward else forward(*arrays))

    return build


def importance_streamed(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor, backend: str | None = None) -> Tensor:
    """The same in chunks of samples, with effective sample size and ELBO in passing."""
    samples = ImportanceAccumulator(backend=backend)
    for chunk, log_px_chunk in zip(z.split(CHUNK), log_px.split(CHUNK), strict=True):
        samples.add(importance_log_weights(chunk, mu, log_var, log_px_chunk, backend=backend))
    return samples.log_likelihood()


def plain_streamed(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor) -> Tensor:
    """Chunks of the plain formula, merged by log-sum-exp: no other statistics."""
    parts = [reference.log_weights(z_, mu, log_var, log_px_).logsumexp(0)
             for z_, log_px_ in zip(z.split(CHUNK), log_px.split(CHUNK), strict=True)]
    return torch.stack(parts).logsumexp(0) - math.log(len(z))


def plain_bytes(case: str) -> int:
    """z − mu, its square and their product with 1/σ², z²."""
    return 4 * 4 * math.prod((CASES | STREAMED)[case])


SUITES = (
    Suite(
        op=importance_objective,
        sizes=("S", "N", "D"),
        cases=CASES,
        inputs=inputs,
        work=work,
        plain=plain,
        formulas={"plain": plain, "gemm": gemm},
        jax={"jax plain": jax_peer},
        plain_bytes=plain_bytes,
    ),
    Suite(
        op=importance_streamed,
        sizes=("S", "N", "D"),
        cases=STREAMED,
        inputs=inputs,
        work=work,
        plain=plain_streamed,
        formulas={"plain": plain_streamed, "whole": plain, "gemm": gemm},
        jax={"jax plain": jax_peer},
        plain_bytes=plain_bytes,
        directions=(False,),
    ),
)
