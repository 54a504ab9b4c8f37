"""Cases and peers of reparametrised samples and their KL divergence, for given noise and with noise of their own. The gradients
taken are those of mean and log-variance, for given ones of samples and divergence."""

from collections.abc import Callable

import torch
from torch import Tensor

from latent_engine.kernels import noise_keys, reparametrize

from .suite import Suite
from .timing import Work

# name: (S, N, D)
CASES = {
    "vae": (1, 100, 50),
    "iwae": (50, 100, 50),
    "large": (1, 4096, 1024),
}


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Posteriors of a spread in width, and noise with an axis of samples if there are several."""
    S, N, D = CASES[case]
    generator = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator) - 2
    noise = torch.randn(*((S,) if S > 1 else ()), N, D, generator=generator)
    return tuple(t.to(device, dtype) for t in (mean, log_var, noise))


def work(case: str, backward: bool) -> Work:
    """Forward: mean, log-variance and noise are read, samples and divergence written; an FMA a sample, four more and an exp an
    element. Backward: all of those and two gradients written; two FMAs a sample, four and an exp an element."""
    S, N, D = CASES[case]
    elements, samples = N * D, S * N * D
    size, fmas = 4 * (3 * elements + 2 * samples), samples + 4 * elements
    if not backward:
        return Work(size, fmas, elements)
    return Work(size + 4 * (5 * elements + 2 * samples), fmas + 2 * samples + 4 * elements, 2 * elements)


def plain(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas as one writes them."""
    return mean + (0.5 * log_var).exp() * noise, 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def fused(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """With as few operations as PyTorch has for them."""
    kl = torch.addcmul(log_var.expm1() - log_var, mean, mean)
    return torch.addcmul(mean, (0.5 * log_var).exp(), noise), 0.5 * kl


def reparametrize_drawn(mean: Tensor, log_var: Tensor, like: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """With noise from keys; all that it needs of `like` is the number of samples."""
    return reparametrize(mean, log_var, noise_keys(len(like) if like.dim() == 3 else None), backend=backend)


def drawing(formula: Callable) -> Callable:
    """A formula with noise from `torch.randn`."""
    return lambda mean, log_var, like: formula(mean, log_var, torch.randn(like.shape, device=like.device))


def drawn_work(case: str, backward: bool) -> Work:
    """As `work`, but the noise is not read; a draw takes 15 FMAs for its half of a logarithm, a root, a sine and a cosine. The
    integer arithmetic of the generator is not counted."""
    S, N, D = CASES[case]
    given, passes = work(case, backward), 2 if backward else 1
    return Work(given.bytes - 4 * passes * S * N * D, given.fmas + 15 * passes * S * N * D, given.exps)


def without_chance(outputs: list[Tensor]) -> list[Tensor]:
    """Of samples, divergence and gradients the divergence and the gradient of the mean."""
    return outputs[1:3]


def jax_peer() -> Callable:
    """`jax.jit` of the plain formulas: forward, or values and gradients."""
    import jax
    import jax.numpy as jnp

    def outputs(mean, log_var, noise):
        return mean + jnp.exp(0.5 * log_var) * noise, 0.5 * (jnp.square(mean) + jnp.exp(log_var) - 1 - log_var)

    @jax.jit
    def gradients(incoming, mean, log_var, noise):
        values, pullback = jax.vjp(lambda *posterior: outputs(*posterior, noise), mean, log_var)
        return values, pullback(incoming)

    forward = jax.jit(outputs)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        incoming = jnp.ones_like(arrays[2]), jnp.ones_like(arrays[0])
        return lambda: jax.block_until_ready(gradients(incoming, *arrays) if backward else forward(*arrays))

    return build


def plain_bytes(case: str) -> int:
    """σ ε; log σ² / 2, σ, μ², e^v and three sums."""
    S, N, D = CASES[case]
    return 4 * N * D * (S + 7)


COMMON = {"sizes": ("S", "N", "D"), "cases": CASES, "inputs": inputs, "plain": plain, "plain_bytes": plain_bytes, "constant": 1}

SUITES = (
    Suite(op=reparametrize, work=work, formulas={"plain": plain, "fused": fused}, jax={"jax plain": jax_peer}, **COMMON),
    Suite(op=reparametrize_drawn, work=drawn_work, formulas={"plain": drawing(plain), "fused": drawing(fused)},
          comparable=without_chance, exact=plain, **COMMON),
)
