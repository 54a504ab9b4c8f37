"""Cases and peers of `mmd2_to_normal`: WAE's seven inverse multiquadrics, unbiased, between points and between posteriors.

Peers use the same nodes, where they need any: what is compared is how fast the pairs are summed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latent_engine.kernels import mmd2_to_normal
from latent_engine.kernels.mmd_normal import POINTS_REACH, POSTERIORS_REACH, WAE_SCALES
from latent_engine.kernels.quadrature import inverse_multiquadric
from latent_engine.kernels.reference.mmd_normal import smoothed

from .suite import Suite
from .timing import Work

WIDTHS = tuple(2 * s for s in WAE_SCALES)  # of the kernels, in units of D
POINTS = {"mmd-normal-points": (4096, 64)}
POSTERIORS = {"mmd-normal-posteriors": (256, 64)}
NARROW_NODES = 5  # beside the variances of these posteriors


def nodes(posteriors: bool) -> tuple[list[float], list[float]]:
    return inverse_multiquadric(WIDTHS, POSTERIORS_REACH if posteriors else POINTS_REACH, 1e-6)


def points(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor]:
    """Points of the prior, moved a little."""
    N, D = POINTS[case]
    return ((0.2 + torch.randn(N, D, generator=torch.Generator().manual_seed(0))).to(device, dtype),)


def posteriors(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Means and log-variances of an encoder whose aggregate is near the prior."""
    N, D = POSTERIORS[case]
    g = torch.Generator().manual_seed(0)
    tensors = 0.8 * torch.randn(N, D, generator=g), 0.5 * torch.randn(N, D, generator=g) - 1
    return tuple(t.to(device, dtype) for t in tensors)


def points_work(case: str, backward: bool) -> Work:
    """Over the pairs i < j, a dimension: one FMA for the distance and one each for the gradients of both points. Scales cost
    two polynomials in the distance, and a third for the derivative. The distance takes a subtraction, the gradients
    another."""
    N, D = POINTS[case]
    pairs, scales = N * (N - 1) / 2, len(WIDTHS)
    return Work(4 * N * D * (2 if backward else 1), pairs * (D * (3 if backward else 1) + scales * (4 if backward else 2)),
                N * len(nodes(False)[0]), pairs * D * (2 if backward else 1))


def posteriors_work(case: str, backward: bool) -> Work:
    """Over the pairs i < j, as the C++ kernels do it. A dimension and node of those that are narrow beside the variances:
    numerator and denominator of Σ δ²/t, three operations, and an addition for t. A dimension, for all other nodes: 15 moments
    and their powers. A node of these: two sums over the moments. An exp a node, six operations and four additions as in Eq. 8
    of MAE; for a narrow one as many for a logarithm, and six for a division. Gradients take, a dimension, two polynomials of
    degree 7 in 15 operations; for the narrow nodes a fraction, whose degrees grow with their number: four operations for each
    of them and eight with the division; and seven operations for the sums, with three additions in all. A node adds its
    expectation to each of those polynomials' coefficients."""
    N, D = POSTERIORS[case]
    pairs, count = N * (N - 1) / 2, len(nodes(True)[0])
    wide = count - NARROW_NODES
    fmas = D * (15 + 3 * NARROW_NODES) + 15 * wide + 6 * count + 12 * NARROW_NODES
    additions = D * (10 + NARROW_NODES) + 4 * count + 4 * NARROW_NODES
    if backward:
        fmas += D * (30 + 4 * NARROW_NODES) + 16 * wide + NARROW_NODES * (3 * NARROW_NODES - 1)
        additions += 3 * D
    return Work(8 * N * D * (2 if backward else 1), pairs * fmas, pairs * count, pairs * additions)


def _imq(squares: Tensor) -> Tensor:
    """Sum of the kernels over the ordered pairs of different points, from the squared distances in units of D."""
    return sum((C / (C + squares)).sum() for C in WIDTHS) - len(WIDTHS) * squares.shape[0]


def _points(x: Tensor, pairs: Tensor) -> Tensor:
    N, D = x.shape
    square = x.square().sum(1) / D
    cross = sum(w * (1 + 2 * a / D) ** (-D / 2) * torch.exp(-a / (1 + 2 * a / D) * square).mean()
                for a, w in zip(*nodes(False), strict=True))
    prior = sum(w * (1 + 4 * a / D) ** (-D / 2) for a, w in zip(*nodes(False), strict=True))
    return pairs / (N * (N - 1)) - 2 * cross + prior


def points_plain(x: Tensor) -> Tensor:
    """Distances from differences, without keeping these."""
    return _points(x, _imq(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / x.shape[1]))


def points_gemm(x: Tensor) -> Tensor:
    """The expanded square as a matrix product: fastest in PyTorch, at the price of cancellation."""
    square = x.square().sum(1)
    squares = torch.addmm(square, x, x.T, alpha=-2).add(square[:, None]).clamp(min=0)
    return _points(x, _imq(squares / x.shape[1]))


def points_keops(x: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    squares = ((LazyTensor(x[:, None, :]) - LazyTensor(x[None])) ** 2).sum(-1) / x.shape[1]
    pairs = sum(C / (C + squares) for C in WIDTHS).sum(1).sum()
    return _points(x, pairs - len(WIDTHS) * x.shape[0])


def _posteriors(mu: Tensor, log_var: Tensor, pairs: Callable) -> Tensor:
    """The MMD from the sum of the kernel over unordered pairs, given the scaled means and variances."""
    N, D = mu.shape
    z, v, one = mu / D**0.5, log_var.exp() / D, torch.ones_like(mu[0])
    cross = smoothed(z.square(), v + 1 / D, *nodes(True)).mean()
    return 2 * pairs(z, v) / (N * (N - 1)) - 2 * cross + smoothed(0 * one, 2 * one / D, *nodes(True))


def posteriors_plain(mu: Tensor, log_var: Tensor) -> Tensor:
    """All ordered pairs, a node at a time."""
    def pairs(z, v):
        kernel = smoothed((z[:, None] - z).square(), v[:, None] + v, *nodes(True))
        return 0.5 * (kernel.sum() - kernel.diagonal().sum())

    return _posteriors(mu, log_var, pairs)


def posteriors_half(mu: Tensor, log_var: Tensor) -> Tensor:
    """Each pair once."""
    def pairs(z, v):
        i, j = torch.triu_indices(*z.shape[:1] * 2, offset=1, device=z.device)
        return smoothed((z[i] - z[j]).square(), v[i] + v[j], *nodes(True)).sum()

    return _posteriors(mu, log_var, pairs)


def posteriors_keops(mu: Tensor, log_var: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    def pairs(z, v):
        squares = (LazyTensor(z[:, None, :].contiguous()) - LazyTensor(z[None].contiguous())) ** 2
        variances = LazyTensor(v[:, None, :].contiguous()) + LazyTensor(v[None].contiguous())
        total = 0.0
        for a, w in zip(*nodes(True), strict=True):
            t = 1 + 2 * a * variances
            kernel = (-(a * squares / t + 0.5 * t.log()).sum(-1)).exp().sum(1).sum()
            total = total + w * (kernel - torch.exp(-0.5 * torch.log1p(4 * a * v).sum(1)).sum())
        return 0.5 * total

    return _posteriors(mu, log_var, pairs)


def jax_points() -> Callable:
    import jax.numpy as jnp

    def value(x):
        N, D = x.shape
        square = jnp.square(x).sum(1)
        squares = jnp.maximum(square[:, None] + square - 2 * x @ x.T, 0) / D
        pairs = sum((C / (C + squares)).sum() for C in WIDTHS) - len(WIDTHS) * N
        cross = sum(w * (1 + 2 * a / D) ** (-D / 2) * jnp.exp(-a / (1 + 2 * a / D) * square / D).mean()
                    for a, w in zip(*nodes(False), strict=True))
        prior = sum(w * (1 + 4 * a / D) ** (-D / 2) for a, w in zip(*nodes(False), strict=True))
        return pairs / (N * (N - 1)) - 2 * cross + prior

    return _jax_builder(value)


def jax_posteriors() -> Callable:
    import jax
    import jax.numpy as jnp

    rates, weights = (jnp.asarray(part, jnp.float32) for part in nodes(True))

    def kernel(squares, variances):
        def node(total, rate_weight):
            a, w = rate_weight
            t = 2 * a * variances
            return total + w * jnp.exp(-(a * squares / (1 + t) + 0.5 * jnp.log1p(t)).sum(-1)), None

        return jax.lax.scan(node, jnp.zeros(squares.shape[:-1]), (rates, weights))[0]

    def value(mu, log_var):
        N, D = mu.shape
        z, v, one = mu / D**0.5, jnp.exp(log_var) / D, jnp.ones(D)
        pairs = kernel(jnp.square(z[:, None] - z), v[:, None] + v) * (1 - jnp.eye(N))
        return (pairs.sum() / (N * (N - 1)) - 2 * kernel(jnp.square(z), v + 1 / D).mean() + kernel(0 * one, 2 * one / D))

    return _jax_builder(value)


def _jax_builder(value: Callable) -> Callable:
    import jax
    import jax.numpy as jnp

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        both = jax.jit(jax.value_and_grad(value, argnums=tuple(range(len(arrays)))))
        call = both if backward else jax.jit(value)
        return lambda: jax.block_until_ready(call(*arrays))

    return build


SUITES = (
    Suite(op=mmd2_to_normal, sizes=("N", "D"), cases=POINTS, inputs=points, work=points_work, plain=points_plain,
          formulas={"plain": points_plain, "gemm": points_gemm}, keops=points_keops, jax={"jax gemm": jax_points},
          # distances and, for each scale, C + r² and its reciprocal
          plain_bytes=lambda case: 4 * (2 * len(WIDTHS) + 1) * POINTS[case][0] ** 2, exact=points_plain),
    Suite(op=mmd2_to_normal, sizes=("N", "D"), cases=POSTERIORS, inputs=posteriors, work=posteriors_work,
          plain=posteriors_plain, formulas={"plain": posteriors_plain, "half": posteriors_half}, keops=posteriors_keops,
          jax={"jax plain": jax_posteriors},
          # for each node, the four values of N·N·D pairs that its backward pass keeps
          plain_bytes=lambda case: 16 * len(nodes(True)[0]) * math.prod(POSTERIORS[case]) * POSTERIORS[case][0]),
)
