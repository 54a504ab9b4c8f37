"""Cases and peers of the likelihoods. The gradients taken are those of the parameters."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_engine.kernels import (
    bernoulli_log_prob,
    discretized_logistic_log_prob,
    gaussian_log_prob,
    negative_binomial_log_prob,
)
from latent_engine.kernels.reference import likelihood as reference

from .suite import Suite
from .timing import Work

# likelihood: {name: (S, N, P)}
CASES = {
    "bernoulli": {"bernoulli": (50, 100, 784), "bernoulli-step": (1, 100, 784)},
    "gaussian": {"gaussian": (8, 100, 3072), "gaussian-genes": (1, 256, 2000)},
    "logistic": {"discretized-logistic": (1, 32, 3072)},
    "counts": {"negative-binomial": (1, 256, 2000)},
}
# Multiplications and FMAs, exps, additions and comparisons a value, forward and backward, as the C++ kernels do it. An exp or a
# logarithm takes six multiplications and four additions, the latter a division more, which counts as six multiplications.
COST = {
    "bernoulli": ((8, 1, 7), (14, 1, 8)),
    "gaussian": ((2, 0, 2), (5, 0, 2)),
    "logistic": ((16, 2, 20), (31, 2, 19)),
    "counts": ((127, 3, 43), (80, 1, 30)),  # nine and six divisions
}


def inputs(kind: str, case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The parameters [S, N, P], those shared by rows, and x [N, P], drawn from the likelihood or near it."""
    S, N, P = CASES[kind][case]
    g = torch.Generator().manual_seed(0)
    draw = torch.randn(S, N, P, generator=g)
    if kind == "bernoulli":
        tensors = 3 * draw, torch.rand(N, P, generator=g).round()
    elif kind == "gaussian":
        tensors = draw, torch.tensor(-0.5), torch.randn(N, P, generator=g)
    elif kind == "logistic":
        x = torch.randint(256, (N, P), generator=g) / 127.5 - 1
        tensors = x + 0.1 * draw, -3 + 0.5 * torch.randn(P, generator=g), x
    else:
        mean = draw.exp()
        tensors = mean, torch.randn(P, generator=g), torch.poisson(mean[0] * torch.rand(N, P, generator=g).exp(), generator=g)
    return tuple(t.to(device, dtype) for t in tensors)


def work(kind: str, case: str, backward: bool) -> Work:
    """Forward reads the parameters and writes one number a row; backward reads them again and writes as many gradients."""
    S, N, P = CASES[kind][case]
    passes = COST[kind] if backward else COST[kind][:1]
    fmas, exps, additions = (S * N * P * sum(costs) for costs in zip(*passes, strict=True))
    size = 4 * (S * N * P + N * P)
    return Work(3 * size if backward else size, fmas, exps, additions)


def parameters_first(op: Callable) -> Callable:
    """`op` with x as the last argument: it needs no gradient."""
    @functools.wraps(op)
    def call(*tensors: Tensor, **options: object) -> Tensor:
        return op(tensors[-1], *tensors[:-1], **options)
    return call


# The formulas as one writes them; functions of their own, because torch.compile counts recompilations by function.


def bernoulli_plain(logits: Tensor, x: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def gaussian_plain(mean: Tensor, log_var: Tensor, x: Tensor) -> Tensor:
    return reference.gaussian(x, mean, log_var).sum(-1)


def logistic_plain(mean: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
    return reference.discretized_logistic(x, mean, log_scale).sum(-1)


def counts_plain(mean: Tensor, log_dispersion: Tensor, x: Tensor) -> Tensor:
    return reference.negative_binomial(x, mean, log_dispersion).sum(-1)


def bernoulli_fast(logits: Tensor, x: Tensor) -> Tensor:
    """Linear and convex part apart: one product instead of four passes."""
    return torch.einsum("snp,np->sn", logits, x) - F.softplus(logits).sum(-1)


def gaussian_fast(mean: Tensor, log_var: Tensor, x: Tensor) -> Tensor:
    """The shared variance taken out of the sum."""
    return -0.5 * ((x - mean).square().sum(-1) * torch.exp(-log_var) + x.shape[-1] * (log_var + math.log(2 * math.pi)))


def logistic_fast(mean: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
    """Two sigmoids instead of logarithms of each, as most code has it."""
    inverse = torch.exp(-log_scale)
    plus, minus = inverse * (x - mean + 1 / 255), inverse * (x - mean - 1 / 255)
    inside = torch.log((plus.sigmoid() - minus.sigmoid()).clamp(min=1e-12))
    return torch.where(x < -0.999, F.logsigmoid(plus), torch.where(x > 0.999, F.logsigmoid(-minus), inside)).sum(-1)


def counts_fast(mean: Tensor, log_dispersion: Tensor, x: Tensor) -> Tensor:
    """What depends on genes only is computed once a gene."""
    r = log_dispersion.exp()
    gammas = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return (gammas + r * log_dispersion + torch.xlogy(x, mean) - (x + r) * torch.log(r + mean)).sum(-1)


def jax_peer(kind: str) -> Callable:
    """`jax.jit` of the same formulas: forward, or value and gradients."""
    import jax
    import jax.numpy as jnp
    from jax.nn import log_sigmoid, softplus
    from jax.scipy.special import gammaln, xlogy

    def bernoulli(logits, x):
        return (x * logits - softplus(logits)).sum(-1)

    def gaussian(mean, log_var, x):
        return -0.5 * (jnp.square(x - mean) * jnp.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(-1)

    def logistic(mean, log_scale, x):
        inverse = jnp.exp(-log_scale)
        lower, upper = log_sigmoid(inverse * (x - mean + 1 / 255)), log_sigmoid(-inverse * (x - mean - 1 / 255))
        inside = lower + upper + jnp.log(-jnp.expm1(-2 / 255 * inverse))
        return jnp.where(x < -0.999, lower, jnp.where(x > 0.999, upper, inside)).sum(-1)

    def counts(mean, log_dispersion, x):
        r = jnp.exp(log_dispersion)
        gammas = gammaln(x + r) - gammaln(r) - gammaln(x + 1)
        return (gammas - r * jnp.log1p(mean / r) + xlogy(x, mean) - xlogy(x, mean + r)).sum(-1)

    log_prob = {"bernoulli": bernoulli, "gaussian": gaussian, "logistic": logistic, "counts": counts}[kind]

    @jax.jit
    def gradients(incoming, x, *parameters):
        value, pullback = jax.vjp(lambda *p: log_prob(*p, x), *parameters)
        return value, pullback(incoming)

    forward = jax.jit(log_prob)

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        *parameters, x = (jnp.asarray(t.detach().cpu().numpy()) for t in tensors)
        incoming = jnp.ones(parameters[0].shape[:2], jnp.float32)
        return lambda: jax.block_until_ready(gradients(incoming, x, *parameters) if backward else forward(*parameters, x))

    return build


def suite(op: Callable, kind: str, plain: Callable, fast: Callable) -> Suite:
    return Suite(
        op=parameters_first(op),
        sizes=("S", "N", "P"),
        cases=CASES[kind],
        inputs=functools.partial(inputs, kind),
        work=functools.partial(work, kind),
        plain=plain,
        formulas={"plain": plain, "fast": fast},
        jax={"jax": lambda: jax_peer(kind)},
        # about four intermediates of the size of the parameters
        plain_bytes=lambda case: 4 * 4 * math.prod(CASES[kind][case]),
        constant=1,
    )


SUITES = (
    suite(bernoulli_log_prob, "bernoulli", bernoulli_plain, bernoulli_fast),
    suite(gaussian_log_prob, "gaussian", gaussian_plain, gaussian_fast),
    suite(discretized_logistic_log_prob, "logistic", logistic_plain, logistic_fast),
    suite(negative_binomial_log_prob, "counts", counts_plain, counts_fast),
)
