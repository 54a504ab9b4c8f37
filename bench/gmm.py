"""Cases and peers of `gmm_log_prob`. The gradients taken are those of all four arguments."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from latent_engine.kernels import gmm_log_prob, gmm_log_prob_and_grad
from latent_engine.kernels.reference import gmm as reference

from .suite import Suite
from .timing import Work

# name: (N, K, D)
CASES = {
    "dgd-step": (32, 20, 2),
    "dgd-eval": (5000, 50, 2),
    "scdgd": (512, 45, 50),
    "mid": (4096, 128, 64),
    "wide": (65536, 50, 32),
    "vamp": (1024, 1000, 64),
}


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Points near the means of a random mixture."""
    N, K, D = CASES[case]
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=generator)
    log_vars = 0.5 * torch.randn(K, D, generator=generator)
    z = means[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    log_weights = torch.randn(K, generator=generator).log_softmax(0)
    return tuple(t.to(device, dtype) for t in (z, means, log_vars, log_weights))


def work(case: str, backward: bool) -> Work:
    """Forward: multiplication and FMA a pair and dimension, one exp a pair. Backward does that again (only [N] is saved),
    then one multiplication and two FMAs for the three gradients; subtractions and additions have pipes of their own."""
    N, K, D = CASES[case]
    size = 4 * (N * D + 2 * K * D + K + N)
    return Work(2 * size if backward else size, (7 if backward else 2) * N * K * D, (2 if backward else 1) * N * K)


def direct_work(case: str, backward: bool) -> Work:
    """As forward and backward, with the logits and their exps computed once."""
    N, K, D = CASES[case]
    return Work(work(case, True).bytes, 5 * N * K * D, N * K)


def plain(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor) -> Tensor:
    """The formula as one writes it."""
    return reference.gmm_log_prob(z, means, log_vars, log_weights)[0]


def gemm(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor) -> Tensor:
    """The expanded square as two matrix products: the fastest PyTorch formula, at the price of cancellation."""
    inverse = torch.exp(-log_vars)
    scaled = means * inverse
    constant = log_weights - 0.5 * ((means * scaled + log_vars).sum(1) + means.shape[1] * math.log(2 * math.pi))
    logits = torch.addmm(torch.addmm(constant, z, scaled.T), z.square(), inverse.T, alpha=-0.5)
    return logits.logsumexp(1)


def keops(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor) -> Tensor:
    """A LazyTensor reduction."""
    from pykeops.torch import LazyTensor

    constant = log_weights - 0.5 * (log_vars.sum(1) + means.shape[1] * math.log(2 * math.pi))
    delta = LazyTensor(z[:, None, :]) - LazyTensor(means[None])
    logits = LazyTensor(constant[None, :, None]) - 0.5 * (delta**2 * LazyTensor(torch.exp(-log_vars)[None])).sum(-1)
    return logits.logsumexp(1).squeeze(-1)


def jax_peer(form: str) -> Callable:
    """The same formulas in JAX."""
    import jax.numpy as jnp
    from jax.scipy.special import logsumexp

    def log_prob(z, means, log_vars, log_weights):
        inverse = jnp.exp(-log_vars)
        half = 0.5 * means.shape[1] * math.log(2 * math.pi)
        if form == "plain":
            square = (jnp.square(z[:, None] - means) * inverse).sum(-1)
            return logsumexp(log_weights - 0.5 * (square + log_vars.sum(1)) - half, axis=1)
        scaled = means * inverse
        constant = log_weights - 0.5 * (means * scaled + log_vars).sum(1) - half
        return logsumexp(constant + z @ scaled.T - 0.5 * jnp.square(z) @ inverse.T, axis=1)

    return jax_builder(log_prob)


def jax_builder(log_prob: Callable) -> Callable:
    """`jax.jit` of a log-density: forward, or value and gradients."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def gradients(incoming, *args):
        value, pullback = jax.vjp(log_prob, *args)
        return value, pullback(incoming)

    forward = jax.jit(log_prob)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        incoming = jnp.ones(arrays[0].shape[0], jnp.float32)
        return lambda: jax.block_until_ready(gradients(incoming, *arrays) if backward else forward(*arrays))

    return build


SUITE = Suite(
    op=gmm_log_prob,
    sizes=("N", "K", "D"),
    cases=CASES,
    inputs=inputs,
    work=work,
    plain=plain,
    formulas={"plain": plain, "gemm": gemm},
    keops=keops,
    jax={"jax plain": lambda: jax_peer("plain"), "jax gemm": lambda: jax_peer("gemm")},
    # values of the plain formula: N·K·D differences and their squares
    plain_bytes=lambda case: 3 * 4 * math.prod(CASES[case]),
)
# The same cases without autograd, as JAX's gradients are.
DIRECT = replace(SUITE, op=gmm_log_prob_and_grad, work=direct_work, directions=(True,), direct=True)
SUITES = (SUITE, DIRECT)
