"""What a two-sample test by MMD needs beside the statistic: witness function, bandwidth, p-value.

They take the kernel matrix in blocks of rows, of which none outlives its use. With K the matrix of the pooled sample, its
diagonal zero, and a ∈ {0, 1}^{N+M} the points called x, the three sums of the statistic are

    Σ_xx = aᵀKa        Σ_xy = aᵀK1 − aᵀKa        Σ_yy = 1ᵀK1 − 2 aᵀK1 + aᵀKa

so that P relabellings at once are the product of K with a matrix [N + M, P].
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Op, register
from .checks import checked_floats
from .library import Differentiable, reference_gradients
from .mmd import KERNELS, MATRIX, SUPPORT, check
from .reference import mmd as reference

BLOCK = 1 << 22  # numbers of a block


class TwoSampleTest(NamedTuple):
    """The unbiased MMD² of the samples, and the p-value of "both come from one distribution"."""

    statistic: Tensor
    p_value: float


def mmd_witness(points: Tensor, x: Tensor, y: Tensor, *, kernel: str = "imq", scales: Sequence[float] | None = None,
                unit: float | None = None, backend: str | None = None) -> Tensor:
    """The witness function mean_i k(x_i, t) − mean_j k(y_j, t) at points t: positive where x is denser than y.

    Args:
        points: `[P, D]`.
        x, y, kernel, scales, unit, backend: as for `mmd2`; the scales are summed. One point or more in x and in y.

    Returns:
        `[P]`, in the dtype that `mmd2` would give. Differentiable, twice, in points, x and y: the gradients are those of the
        reference, a block at a time. Time O(P·(N + M)·D).

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit.
        BackendError: the backend asked for cannot serve the call.

    >>> mmd_witness(torch.tensor([[0.0], [3.0]]), torch.zeros(2, 1), torch.full((2, 1), 3.0), kernel="energy")
    tensor([ 3., -3.])
    """
    points, x, y = checked_floats("mmd_witness", "x", points=points, x=x, y=y)
    x, y, options = check("mmd_witness", x, y, kernel, scales, unit, least=1)
    if points.dim() != 2 or points.shape[1] != x.shape[1]:
        raise ValueError(f"mmd_witness: points must have shape [P, D] with D = {x.shape[1]} as in x and y, "
                         f"given {list(points.shape)}.")
    name = WITNESS_OP.choose(x, backend, len(options[1]))
    each = x.shape[1] if torch.is_grad_enabled() or name == "reference" else 1  # numbers a pair of the reference
    rows = max(1, BLOCK // (each * max(x.shape[0], y.shape[0])))
    parts = [_matrix_of(name, part, x, options).mean(1) - _matrix_of(name, part, y, options).mean(1)
             for part in points.to(x.dtype).split(rows)]
    return torch.cat(parts)


@torch.no_grad()
def median_heuristic(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The median distance between the points of x, or of x and y together: the usual bandwidth (Gretton et al. 2012, §8).

    Args:
        x, y: `[N, D]` and `[M, D]`; two points or more in all.

    Returns:
        A scalar tensor of the dtype that `mmd2` would give: exactly the (lower) median over all pairs. NaN if any point is,
        or if the median is a distance between infinite points.
        Found digit by digit of 16 bits, each from a count over blocks of distances: time O((N + M)²·D), extra memory
        O(N + M). Not differentiable.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> median_heuristic(torch.tensor([[0.0], [1.0], [4.0]]))
    tensor(3.)
    """
    x, other, _ = check("median_heuristic", x, x if y is None else y, "energy", None, None, least=0)
    pool = x if y is None else torch.cat((x, other))
    pairs = pool.shape[0] * (pool.shape[0] - 1) // 2
    if pairs == 0:
        raise ValueError(f"median_heuristic: needs two or more points, given {pool.shape[0]}.")
    if pool.isnan().any():
        return pool.new_tensor(torch.nan)
    exponent = math.frexp(pool.abs().max().item())[1]
    unit = math.ldexp(1, max(-126, min(126, exponent)))  # in this unit squares stay in the range of floats
    pool = pool / unit
    bits, integer = (64, torch.int64) if pool.dtype == torch.float64 else (32, torch.int32)
    prefix, rank = 0, (pairs - 1) // 2
    for shift in range(bits - 16, -1, -16):  # the order of floats ≥ 0 is that of their bits
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=pool.device)
        for start, stop in _blocks(pool.shape[0]):
            distances = torch.cdist(pool[start:stop], pool[start:], compute_mode="donot_use_mm_for_euclid_dist")
            later = torch.ones_like(distances, dtype=torch.bool).triu_(1)
            keys = distances[later].abs().view(integer).long() >> shift  # NaN, of two infinite points, comes last
            counts += torch.bincount(keys[keys >> 16 == prefix] & 0xFFFF, minlength=1 << 16)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=integer, device=pool.device).view(pool.dtype) * unit


@torch.no_grad()
def two_sample_test(x: Tensor, y: Tensor, *, permutations: int = 1000, kernel: str = "imq",
                    scales: Sequence[float] | None = None, unit: float | None = None,
                    generator: torch.Generator | None = None, backend: str | None = None) -> TwoSampleTest:
    """Permutation test of whether two samples come from one distribution (Gretton et al. 2012).

    Args:
        x, y, kernel, scales, unit, backend: as for `mmd2`; two points or more in each sample.
        permutations: P, the relabellings to draw. The least p-value is 1 / (P + 1).
        generator: of the permutations, on the CPU; the global one if left out. The same state gives the same result.

    Returns:
        `TwoSampleTest(statistic, p_value)` with p = (1 + #{relabelled statistics ≥ the statistic}) / (P + 1), which is valid
        (Phipson & Smyth 2010, "Permutation p-values should never be zero"). The test is exact whatever the kernel, if its
        scales and unit do not depend on the labels; `median_heuristic(x, y)` does not. Time O((N + M)²·(D + P)), extra
        memory O((N + M)·P). Not differentiable.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit.
        BackendError: the backend asked for cannot serve the call.

    >>> two_sample_test(torch.zeros(20, 1), torch.ones(20, 1), generator=torch.Generator().manual_seed(0)).p_value < 0.01
    True
    """
    if not isinstance(permutations, int) or permutations < 1:
        raise ValueError(f"two_sample_test: permutations must be a positive integer, given {permutations!r}.")
    x, y, options = check("two_sample_test", x, y, kernel, scales, unit, least=2)
    name, N, M = TEST_OP.choose(x, backend, len(options[1])), x.shape[0], y.shape[0]
    pool = torch.cat((x, y))
    labels = pool.new_zeros(N + M, permutations + 1)
    labels[:N, 0] = 1
    for p in range(1, permutations + 1):
        labels[torch.randperm(N + M, generator=generator)[:N].to(pool.device), p] = 1
    aa, degrees, centre = _quadratic_forms(name, pool, labels, options)
    a1 = labels.T.double() @ degrees
    xx, xy, yy = aa / (N * (N - 1)), (a1 - aa) / (N * M), (degrees.sum() - 2 * a1 + aa) / (M * (M - 1))
    statistics = xx + yy - 2 * xy
    # Relabellings that only exchange equal points, or x for y, must not lose to rounding.
    slack = 16 * torch.finfo(pool.dtype).eps * (centre.abs() + xx.abs() + yy.abs() + 2 * xy.abs())[0]
    beaten = int((statistics[1:] >= statistics[0] - slack).sum())
    p_value = float("nan") if statistics[0].isnan() else (1 + beaten) / (permutations + 1)
    return TwoSampleTest(statistics[0].to(pool.dtype), p_value)


def _quadratic_forms(name: str, pool: Tensor, labels: Tensor,
                     options: tuple[str, list[float], float]) -> tuple[Tensor, Tensor, Tensor]:
    """aᵀKa [P], K1 [T] and c, where K is the kernel matrix less c off its diagonal, and zero on it.

    A constant drops out of the statistic; c, a mean of K, leaves more of its digits.
    """
    aa = labels.new_zeros(labels.shape[1], dtype=torch.float64)
    degrees = labels.new_zeros(labels.shape[0], dtype=torch.float64)
    centre = None
    each = pool.shape[1] if name == "reference" else 1
    for start, stop in _blocks(pool.shape[0], each):
        k = _matrix_of(name, pool[start:stop], pool[start:], options)
        centre = k.mean() if centre is None else centre
        k = (k - centre).triu_(1)
        aa += 2 * (labels[start:stop] * (k @ labels[start:])).sum(0, dtype=torch.float64)
        degrees[start:stop] += k.sum(1, dtype=torch.float64)
        degrees[start:] += k.sum(0, dtype=torch.float64)
    return aa, degrees, centre


def _blocks(count: int, each: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of which a block against all has at most BLOCK pairs of `each` numbers."""
    rows = max(1, BLOCK // (max(count, 1) * each))
    return ((start, min(start + rows, count)) for start in range(0, count, rows))


def _matrix_of(name: str, x: Tensor, y: Tensor, options: tuple[str, list[float], float]) -> Tensor:
    if name == "reference":
        return reference.kernel_matrix(x, y, *options)
    kernel, scales, unit = options
    return _matrix(name, x, y, KERNELS.index(kernel), scales, unit)


WITNESS_OP = register(Op("mmd_witness", "mmd_kernel", SUPPORT))
TEST_OP = register(Op("two_sample_test", "mmd_kernel", SUPPORT))


def _save(ctx, inputs, output) -> None:
    x, y, kernel, scales, unit = inputs
    ctx.save_for_backward(x, y)
    ctx.options = KERNELS[kernel], scales, unit


def _gradients(ctx, _bwd, grad):
    def formula(x, y):
        return reference.kernel_matrix(x, y, *ctx.options)

    return (*reference_gradients(formula, ctx.saved_tensors, ctx.needs_input_grad[:2], (grad,)), None, None, None)


_matrix = Differentiable(MATRIX, None, _save, _gradients)
