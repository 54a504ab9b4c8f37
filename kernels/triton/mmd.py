"""Triton kernels of `mmd2`; formulas and notation are in kernels/mmd.py.

A program keeps a block of points [BLOCK_N, BLOCK_D] in registers, all of D at once, and takes the points of the other set
BLOCK_M at a time. Without gradients it takes each pair of one sample once; with them it takes both orders, so that a point's
gradient is one program's own sum and nothing is added atomically. Parts are merged by PyTorch in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WAVE = 2 * 132  # programs that fill an H200; a constant, so that the bits do not depend on the device
NUM_WARPS = 8


@triton.jit
def _profile(squared, scales, unit, COUNT: tl.constexpr, KERNEL: tl.constexpr):
    """k of squared distances and −dk/du; the slope at a cusp is 0."""
    value = tl.zeros_like(squared)
    slope = tl.zeros_like(squared)
    distance = tl.sqrt(squared)
    half = tl.where(squared == 0, 0.0, 0.5 / tl.where(squared == 0, 1.0, distance))
    if KERNEL == 4:
        value = -distance
        slope = half
    for s in range(COUNT):
        scale = tl.load(scales + s)
        width = unit * scale
        if KERNEL == 0:
            k = tl.exp(-squared / width)
            slope += k / width
        elif KERNEL == 1:
            k = width / (width + squared)
            slope += k * k / width
        elif KERNEL == 2:
            root = tl.sqrt(width)
            k = tl.exp(-distance / root)
            slope += k / root * half
        else:
            base = 1.0 + squared / width
            k = tl.exp(-scale * tl.log(base))
            slope += k / (unit * base)
        value += k
    return value, slope


@triton.jit
def _load(points, n, d, N, D, stride_n, stride_d):
    return tl.load(points + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
                   mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _pairs(rows, others, scales, unit, sums, grads, N, M, D, row_n, row_d, other_n, other_d, share, factor,
           COUNT: tl.constexpr, KERNEL: tl.constexpr, SAME: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of k of a block of rows and `share` others, [splits, blocks], and factor·Σ slope·δ, [splits, N, D]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    points = _load(rows, n, d, N, D, row_n, row_d)
    total = tl.zeros([BLOCK_N], tl.float64)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = split * share
    end = tl.minimum(begin + share, M)
    if SAME and not WITH_GRAD:
        begin = tl.maximum(begin, tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        delta = points[:, None, :] - _load(others, m, d, M, D, other_n, other_d)[None, :, :]
        value, slope = _profile(tl.sum(delta * delta, 2), scales, unit, COUNT, KERNEL)
        counts = (n < N)[:, None] & (m < end)[None, :]
        if SAME:
            if WITH_GRAD:
                counts = counts & (n[:, None] != m[None, :])
            else:
                counts = counts & (n[:, None] < m[None, :])
        total += tl.sum(tl.where(counts, value, 0.0), 1).to(tl.float64)
        if WITH_GRAD:
            grad += tl.sum(tl.where(counts, slope, 0.0)[:, :, None] * delta, 1)
    twice = 2.0 if SAME and not WITH_GRAD else 1.0
    tl.store(sums + split * tl.num_programs(0) + tl.program_id(0), twice * tl.sum(total, 0))
    if WITH_GRAD:
        at = (tl.cast(split, tl.int64) * N + n)[:, None] * D + d[None, :]
        tl.store(grads + at, factor * grad, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _matrix(x, y, scales, unit, out, N, M, D, x_n, x_d, y_n, y_d, share, COUNT: tl.constexpr, KERNEL: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """k of a block of rows of x and `share` rows of y."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    begin = tl.program_id(1) * share
    points = _load(x, n, d, N, D, x_n, x_d)
    for first in range(begin, tl.minimum(begin + share, M), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        delta = points[:, None, :] - _load(y, m, d, M, D, y_n, y_d)[None, :, :]
        value, _ = _profile(tl.sum(delta * delta, 2), scales, unit, COUNT, KERNEL)
        tl.store(out + n.to(tl.int64)[:, None] * M + m[None, :], value, mask=(n < N)[:, None] & (m < M)[None, :])


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of differences: 4096 numbers, 16 a thread; with 32 the gradients spill registers."""
    block_d = triton.next_power_of_2(max(D, 1))
    pairs = max(4, 4096 // block_d)
    block_m = {4: 2, 8: 2, 16: 4, 32: 4, 64: 8, 128: 8}.get(pairs, 16)
    return {"BLOCK_N": pairs // block_m, "BLOCK_M": block_m, "BLOCK_D": block_d}


def _split(items: int, block: int, programs: int) -> tuple[int, int]:
    """Splits of `items` into whole blocks that fill the device beside `programs` programs: count, size."""
    wanted = triton.cdiv(WAVE, max(programs, 1))
    size = triton.cdiv(triton.cdiv(items, wanted), block) * block
    return triton.cdiv(items, size), size


def _section(rows: Tensor, others: Tensor, kernel: int, scales: Tensor, unit: float, weight: float,
             need: bool) -> tuple[Tensor | float, Tensor | None]:
    """weight·Σ k over ordered pairs i ≠ j, or all pairs of two samples, and its gradient with respect to `rows`."""
    if weight == 0 or rows.shape[0] * others.shape[0] == 0:
        return 0.0, None
    (N, D), M, same, shape = rows.shape, others.shape[0], others is rows, blocks(rows.shape[1])
    row_blocks = triton.cdiv(N, shape["BLOCK_N"])
    splits, share = _split(M, shape["BLOCK_M"], row_blocks)
    sums = rows.new_empty(splits, row_blocks, dtype=torch.float64)
    grads = rows.new_empty((splits, N, D) if need else (0,))
    _pairs[(row_blocks, splits)](rows, others, scales, unit, sums, grads, N, M, D, *rows.stride(), *others.stride(), share,
                                 (-4 if same else -2) * weight, COUNT=scales.numel(), KERNEL=kernel, SAME=same, WITH_GRAD=need,
                                 **shape, num_warps=NUM_WARPS)
    return weight * sums.sum(), grads.sum(0) if need else None


def mmd_fwd(x: Tensor, y: Tensor, kernel: int, scales: list[float], unit: float, estimator: int, sections: list[float],
            need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The primitive `mmd_fwd` of kernels/mmd.py."""
    N, M, diagonal = x.shape[0], y.shape[0], len(scales) if estimator == 2 else 0
    xx, yy, xy = sections
    if estimator:
        less = 1 if estimator == 1 else 0
        value = diagonal * (xx / N + yy / M)
        xx, yy, xy = xx / (N * (N - less)), yy / (M * (M - less)), xy / (N * M)
    else:
        value = 0.0
    factors = torch.tensor(scales, dtype=torch.float32, device=x.device)
    grads = [[], []]
    with torch.cuda.device_of(x):
        for rows, others, weight, i, need in ((x, x, xx, 0, need_x), (y, y, yy, 1, need_y), (x, y, xy, 0, need_x)):
            part, grad = _section(rows, others, kernel, factors, unit, weight, need)
            value = value + part
            grads[i] += [grad] if grad is not None else []
        if need_y:  # the rows of y against x, for their gradient; the value is known
            _, grad = _section(y, x, kernel, factors, unit, xy, True)
            grads[1] += [grad] if grad is not None else []
    found = [sum(g, torch.zeros_like(t, memory_format=torch.contiguous_format)) if need else t.new_empty(0, 0)
             for t, g, need in ((x, grads[0], need_x), (y, grads[1], need_y))]
    return torch.as_tensor(value, device=x.device).to(x.dtype), *found


def mmd_kernel(x: Tensor, y: Tensor, kernel: int, scales: list[float], unit: float) -> Tensor:
    """The primitive `mmd_kernel` of kernels/mmd.py."""
    (N, D), M, shape = x.shape, y.shape[0], blocks(x.shape[1])
    out, row_blocks = x.new_empty(N, M), triton.cdiv(N, shape["BLOCK_N"])
    if out.numel():
        splits, share = _split(M, shape["BLOCK_M"], row_blocks)
        factors = torch.tensor(scales, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _matrix[(row_blocks, splits)](x, y, factors, unit, out, N, M, D, *x.stride(), *y.stride(), share,
                                          COUNT=len(scales), KERNEL=kernel, **shape, num_warps=NUM_WARPS)
    return out
