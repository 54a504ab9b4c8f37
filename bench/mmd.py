"""Cases and peers of `mmd2` with the seven scales of Wasserstein auto-encoders; gradients of both samples."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_engine.kernels import mmd2
from latent_engine.kernels.mmd import WAE_SCALES
from latent_engine.kernels.reference import mmd as reference

from .suite import Suite
from .timing import Work

# name: (N, D), with N points in each sample
CASES = {"wae-mnist": (100, 8), "wae-celeba": (100, 64), "mmd-mid": (1024, 64), "mmd-large": (4096, 64)}
TEST_CASES = {"two-sample": (10000, 64)}
SIZES = CASES | TEST_CASES


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Codes, and points of the prior."""
    N, D = SIZES[case]
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.8 * torch.randn(N, D, generator=generator)
    return tuple(t.to(device, dtype) for t in (x, torch.randn(N, D, generator=generator)))


def work(case: str, backward: bool) -> Work:
    """A pair of one sample counts once. One FMA a pair and dimension for the distance, one for each of its two gradients;
    13 a pair for the seven scales over one denominator, 12 more for their slope. One subtraction for the distance and,
    since the slope comes between them, another for the gradients."""
    N, D = SIZES[case]
    pairs = N * (N - 1) + N * N
    return Work(4 * 2 * N * D * (2 if backward else 1), pairs * (3 * D + 25 if backward else D + 13), 0,
                pairs * D * (2 if backward else 1))


def plain(x: Tensor, y: Tensor) -> Tensor:
    """The formula as one writes it."""
    return reference.mmd(x, y, "imq", WAE_SCALES, 2.0 * x.shape[1], "unbiased", (1, 1, -2))


def streamed(x: Tensor, y: Tensor) -> Tensor:
    """The plain formula a block of rows at a time, without the differences in memory; backward computes a block again."""
    N, D = x.shape

    def block(rows: Tensor, others: Tensor) -> Tensor:
        squared = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square()
        return reference.profile(squared, "imq", WAE_SCALES, 2.0 * D).sum(dtype=torch.float64)

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(checkpoint(block, rows, b, use_reentrant=False) for rows in a.split(max(1, 2**22 // b.numel())))

    diagonal = N * len(WAE_SCALES)
    value = (total(x, x) + total(y, y) - 2 * diagonal) / (N * (N - 1)) - 2 * total(x, y) / N**2
    return value.to(x.dtype)


def gemm(x: Tensor, y: Tensor) -> Tensor:
    """The expanded square as a matrix product: the fastest PyTorch formula, at the price of cancellation."""
    N, D = x.shape
    xx, yy = x.square().sum(1), y.square().sum(1)

    def kernel(a: Tensor, b: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
        squared = torch.addmm(aa[:, None] + bb, a, b.T, alpha=-2).clamp(min=0)
        return sum(2 * D * s / (2 * D * s + squared) for s in WAE_SCALES)

    one_sample = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x, xx, xx), kernel(y, y, yy, yy)))
    return one_sample / (N * (N - 1)) - 2 * kernel(x, y, xx, yy).mean()


def keops(x: Tensor, y: Tensor) -> Tensor:
    """LazyTensor reductions."""
    from pykeops.torch import LazyTensor

    N, D = x.shape

    def total(a: Tensor, b: Tensor) -> Tensor:
        squared = (LazyTensor(a[:, None, :]) - LazyTensor(b[None])).square().sum(-1)
        return sum(2 * D * s / (2 * D * s + squared) for s in WAE_SCALES).sum(1).sum()

    diagonal = N * len(WAE_SCALES)
    return (total(x, x) + total(y, y) - 2 * diagonal) / (N * (N - 1)) - 2 * total(x, y) / N**2


def jax_peer(form: str) -> Callable:
    """`jax.jit` of the same formulas: forward, or value and gradients."""
    import jax
    import jax.numpy as jnp

    def squared_distances(a, b):
        if form == "plain":
            return jnp.square(a[:, None] - b).sum(-1)
        return jnp.maximum(jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1) - 2 * a @ b.T, 0)

    def value(x, y):
        N, D = x.shape

        def kernel(a, b):
            squared = squared_distances(a, b)
            return sum(2 * D * s / (2 * D * s + squared) for s in WAE_SCALES)

        one_sample = sum(k.sum() - jnp.trace(k) for k in (kernel(x, x), kernel(y, y)))
        return one_sample / (N * (N - 1)) - 2 * kernel(x, y).mean()

    forward, gradients = jax.jit(value), jax.jit(jax.value_and_grad(value, (0, 1)))

    def build(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]
        return lambda: jax.block_until_ready(gradients(*arrays) if backward else forward(*arrays))

    return build


def _suite(cases: dict[str, tuple[int, ...]], directions: tuple[bool, ...], slow: tuple[str, ...] = ()) -> Suite:
    return Suite(
        op=mmd2,
        sizes=("N", "D"),
        cases=cases,
        inputs=inputs,
        work=work,
        plain=plain,
        formulas={"plain": plain, "gemm": gemm},
        keops=keops,
        jax={"jax plain": lambda: jax_peer("plain"), "jax gemm": lambda: jax_peer("gemm")},
        # values of the plain formula: differences, kept for the three kernel matrices
        plain_bytes=lambda case: 3 * 4 * SIZES[case][0] ** 2 * SIZES[case][1],
        directions=directions,
        slow=slow,
        exact=streamed,
    )


SUITES = (_suite(CASES, (False, True)), _suite(TEST_CASES, (False,), slow=("gemm", "compiled plain", "jax plain")))
