"""Cases and peers of `logistic_mixture_log_prob`. The gradient taken is that of the parameters."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from latent_engine.kernels import logistic_mixture_log_prob
from latent_engine.kernels.reference import logistic_mixture as reference

from .suite import Suite
from .timing import Work

LOG_BIN = 4.8481163645984805  # log(255/2)
# name: (images, channels, components, pixels a side)
CASES = {
    "dmol-pixel": (16, 3, 5, 4),
    "dmol-grey": (64, 1, 10, 28),
    "dmol": (32, 3, 10, 32),
}


@functools.wraps(logistic_mixture_log_prob)
def params_first(params: Tensor, x: Tensor, **options: str) -> Tensor:
    return logistic_mixture_log_prob(x, params, **options)


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Parameters as of a network in training: means around the levels, scales of 2 to 20 levels."""
    N, C, K, side = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (N, C, side, side), generator=generator) / 127.5 - 1
    params = torch.randn(N, 10 if C == 3 else 3, K, side, side, generator=generator)
    params[:, 1::3] = x[:, :, None] + 0.1 * params[:, 1::3]
    params[:, 2::3] = 0.6 * params[:, 2::3] - 3.5
    params[:, 3::3] *= 0.1
    return params.flatten(1, 2).to(device, dtype), x.to(device, dtype)


def work(case: str, backward: bool) -> Work:
    """A pixel and component takes two exps a channel, one a coefficient and two for the log-sum-exps; the polynomials of
    sinh and cosh are 13 FMAs a channel. Backward does that again and writes a gradient for each parameter."""
    N, C, K, side = CASES[case]
    pixels, rows = N * side * side, 10 if C == 3 else 3
    size, exps = 4 * pixels * (rows * K + C), pixels * K * (11 if C == 3 else 4)
    passes = 2 if backward else 1
    return Work(size * passes + (4 * pixels * rows * K if backward else 0), passes * 13 * C * K * pixels, passes * exps)


def plain(params: Tensor, x: Tensor) -> Tensor:
    """The formula without subtracting the two sigmoids: the reference."""
    return reference.logistic_mixture_log_prob(x.flatten(2), params.flatten(2))


def published(params: Tensor, x: Tensor) -> Tensor:
    """The formula of PixelCNN++: the difference of two sigmoids, and the density at the middle where that is below 1e-5."""
    C = x.shape[1]
    K = params.shape[1] // (10 if C == 3 else 3)
    logits, rest = params[:, :K], params[:, K:].unflatten(1, (C, -1, K))
    x, means, log_scales = x[:, :, None], rest[:, :, 0], rest[:, :, 1].clamp(min=-7)
    if C == 3:
        coefs = rest[:, :, 2].tanh()
        means = torch.stack((means[:, 0], means[:, 1] + coefs[:, 0] * x[:, 0],
                             means[:, 2] + coefs[:, 1] * x[:, 0] + coefs[:, 2] * x[:, 1]), 1)
    centred, inv = x - means, torch.exp(-log_scales)
    upper, lower, middle = inv * (centred + 1 / 255), inv * (centred - 1 / 255), inv * centred
    difference = upper.sigmoid() - lower.sigmoid()
    thin = middle - log_scales - 2 * softplus(middle) - LOG_BIN
    inside = torch.where(difference > 1e-5, difference.clamp(min=1e-12).log(), thin)
    log_prob = torch.where(x < -0.999, upper - softplus(upper), torch.where(x > 0.999, -softplus(lower), inside))
    return (log_prob.sum(1) + logits.log_softmax(1)).logsumexp(1).sum((1, 2))


def jax_peer(form: str) -> Callable:
    """`jax.jit` of the same formulas: forward, or value and gradient."""
    import jax
    import jax.numpy as jnp

    def exact(upper, middle, lower, log_scales):
        width = -jnp.expm1(-2 / 255 * jnp.exp(-log_scales))
        return jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower) + jnp.log(width)

    def switched(upper, middle, lower, log_scales):
        difference = jax.nn.sigmoid(upper) - jax.nn.sigmoid(lower)
        thin = middle - log_scales - 2 * jax.nn.softplus(middle) - LOG_BIN
        return jnp.where(difference > 1e-5, jnp.log(jnp.maximum(difference, 1e-12)), thin)

    def log_prob(params, x):
        N, C, *size = x.shape
        K = params.shape[1] // (10 if C == 3 else 3)
        logits, rest = params[:, :K], params[:, K:].reshape(N, C, -1, K, *size)
        x, means, log_scales = x[:, :, None], rest[:, :, 0], jnp.maximum(rest[:, :, 1], -7)
        if C == 3:
            coefs = jnp.tanh(rest[:, :, 2])
            means = jnp.stack((means[:, 0], means[:, 1] + coefs[:, 0] * x[:, 0],
                               means[:, 2] + coefs[:, 1] * x[:, 0] + coefs[:, 2] * x[:, 1]), 1)
        inv = jnp.exp(-log_scales)
        upper, middle, lower = (inv * (x - means + shift) for shift in (1 / 255, 0, -1 / 255))
        inside = (exact if form == "plain" else switched)(upper, middle, lower, log_scales)
        edges = jnp.where(x > 0.999, jax.nn.log_sigmoid(-lower), inside)
        values = jnp.where(x < -0.999, jax.nn.log_sigmoid(upper), edges)
        return jax.nn.logsumexp(values.sum(1) + jax.nn.log_softmax(logits, 1), axis=1).sum((1, 2))

    @jax.jit
    def gradients(incoming, *args):
        value, pullback = jax.vjp(log_prob, *args)
        return value, pullback(incoming)[0]

    forward = jax.jit(log_prob)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        incoming = jnp.ones(arrays[1].shape[0], jnp.float32)
        return lambda: jax.block_until_ready(gradients(incoming, *arrays) if backward else forward(*arrays))

    return build


SUITES = (Suite(
    op=params_first,
    sizes=("N", "C", "K", "side"),
    cases=CASES,
    inputs=inputs,
    work=work,
    plain=plain,
    formulas={"plain": plain, "published": published},
    jax={"jax plain": lambda: jax_peer("plain"), "jax published": lambda: jax_peer("published")},
    constant=1,
    # about ten values a channel, component and pixel
    plain_bytes=lambda case: 40 * CASES[case][0] * CASES[case][1] * CASES[case][2] * CASES[case][3] ** 2,
),)
