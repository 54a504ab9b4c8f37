"""Triton kernels of `pairwise_kl` and `pairwise_kl_diversity`; formulas and notation are in kernels/pairwise_kl.py.

A program keeps a block of posteriors [BLOCK_N, BLOCK_D] in registers and takes the others one after the other, each pair in
both directions where gradients are needed: every sum over pairs then belongs to one program, and is the same on every run.
Sums over splits of the others are merged by PyTorch in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WAVE = 2 * 132  # programs that fill an H200; a constant, so that the bits do not depend on the device
ROUND = 64  # posteriors whose terms are summed before they join the running sum; factors of a product below 2^64
NUM_WARPS = 4
SUMS = 5  # of a dimension: Σ m, Σ w, Σ m w, Σ (v + m²), Σ m² w


@triton.jit
def _load(x, n, d, N, D):
    return tl.load(x + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _softplus_weight(kl, n, j):
    """exp(−KL), 0 for a posterior with itself, and the weight of the gradient."""
    e = tl.where((n == j)[:, None], 0.0, tl.exp(-kl))
    return e, e / (1.0 + e)


@triton.jit
def _diversity(mu, log_var, values, grads, N, D, share, GRAD: tl.constexpr, ROUND: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Σ softplus(−KL_d(i‖j)) over the block and `share` posteriors j [programs], and its gradients [splits, 2, N, D]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    own = tl.cast(n, tl.int64)
    mean, level = _load(mu, own, d, N, D), _load(log_var, own, d, N, D)
    var, inverse = tl.exp(level), tl.exp(-level)
    inside = (n < N)[:, None] & (d < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    by_mu = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    by_log_var = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.minimum(split * share + share, N)
    for first in range(split * share, end, ROUND):
        q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        part_mu = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        part_log_var = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for j in range(first, tl.minimum(first + ROUND, end)):
            at = tl.cast(j, tl.int64) * D + d
            other_mean = tl.load(mu + at, mask=d < D, other=0.0)[None, :]
            other_level = tl.load(log_var + at, mask=d < D, other=0.0)[None, :]
            other_var, other_inverse = tl.exp(other_level), tl.exp(-other_level)
            delta, distance = mean - other_mean, level - other_level
            ratio = (var + delta * delta) * other_inverse
            e, weight = _softplus_weight(0.5 * (ratio - 1.0 - distance), n, j)
            q += e + q * e
            if GRAD:
                back = (other_var + delta * delta) * inverse
                _, back_weight = _softplus_weight(0.5 * (back - 1.0 + distance), n, j)
                part_mu += weight * other_inverse * delta + back_weight * inverse * delta
                part_log_var += weight * (var * other_inverse - 1.0) + back_weight * (1.0 - back)
        # log(1 + q) with the digits that 1 + q loses
        whole = 1.0 + q
        total += tl.log(whole) + (q - (whole - 1.0)) / whole
        by_mu += part_mu
        by_log_var += part_log_var
    program = (split * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(values + program, tl.sum(tl.sum(tl.where(inside, total, 0.0).to(tl.float64), 1), 0))
    if GRAD:
        pairs = tl.cast(N, tl.float32) * (N - 1)
        at = (tl.cast(split, tl.int64) * 2 * N + own)[:, None] * D + d[None, :]
        tl.store(grads + at, -by_mu / pairs, mask=inside)
        tl.store(grads + at + tl.cast(N, tl.int64) * D, -0.5 * by_log_var / pairs, mask=inside)


@triton.jit
def _moments(mu, log_var, centre, sums, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums over rows of BLOCK_D dimensions, [SUMS, D] in float64."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    middle = tl.load(centre + d, mask=d < D, other=0.0)
    m_sum = tl.zeros([BLOCK_D], tl.float64)
    w_sum = tl.zeros([BLOCK_D], tl.float64)
    mw_sum = tl.zeros([BLOCK_D], tl.float64)
    vm_sum = tl.zeros([BLOCK_D], tl.float64)
    mmw_sum = tl.zeros([BLOCK_D], tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        level = _load(log_var, tl.cast(n, tl.int64), d, N, D)
        m = tl.where(inside, _load(mu, tl.cast(n, tl.int64), d, N, D) - middle[None, :], 0.0).to(tl.float64)
        v = tl.where(inside, tl.exp(level), 0.0).to(tl.float64)
        w = tl.where(inside, tl.exp(-level), 0.0).to(tl.float64)
        m_sum += tl.sum(m, 0)
        w_sum += tl.sum(w, 0)
        mw_sum += tl.sum(m * w, 0)
        vm_sum += tl.sum(v + m * m, 0)
        mmw_sum += tl.sum(m * m * w, 0)
    tl.store(sums + d, m_sum, mask=d < D)
    tl.store(sums + D + d, w_sum, mask=d < D)
    tl.store(sums + 2 * D + d, mw_sum, mask=d < D)
    tl.store(sums + 3 * D + d, vm_sum, mask=d < D)
    tl.store(sums + 4 * D + d, mmw_sum, mask=d < D)


@triton.jit
def _deviation(mu, log_var, mean_total, squares, grads, N, D, share, GRAD: tl.constexpr, ROUND: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ (KL − mean) and its square over the block and `share` posteriors j [2, programs], and half the gradient of the
    latter [splits, 2, N, D]. All dimensions in one block."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    own = tl.cast(n, tl.int64)
    mean, level = _load(mu, own, d, N, D), _load(log_var, own, d, N, D)
    var, inverse = tl.exp(level), tl.exp(-level)
    middle = tl.load(mean_total)
    inside = (n < N)[:, None] & (d < D)[None, :]
    sum_ = tl.zeros([BLOCK_N], tl.float64)
    square = tl.zeros([BLOCK_N], tl.float64)
    by_mu = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    by_log_var = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.minimum(split * share + share, N)
    for first in range(split * share, end, ROUND):
        part_mu = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        part_log_var = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for j in range(first, tl.minimum(first + ROUND, end)):
            at = tl.cast(j, tl.int64) * D + d
            other_mean = tl.load(mu + at, mask=d < D, other=0.0)[None, :]
            other_level = tl.load(log_var + at, mask=d < D, other=0.0)[None, :]
            other_var, other_inverse = tl.exp(other_level), tl.exp(-other_level)
            delta, distance = mean - other_mean, level - other_level
            ratio = (var + delta * delta) * other_inverse
            counts = (n != j) & (n < N)
            kl = 0.5 * tl.sum(tl.where(inside, ratio - 1.0 - distance, 0.0), 1)
            weight = tl.where(counts, kl - middle, 0.0)
            sum_ += weight.to(tl.float64)
            square += weight.to(tl.float64) * weight
            if GRAD:
                back = (other_var + delta * delta) * inverse
                back_kl = 0.5 * tl.sum(tl.where(inside, back - 1.0 + distance, 0.0), 1)
                weight = weight[:, None]
                back_weight = tl.where(counts, back_kl - middle, 0.0)[:, None]
                part_mu += weight * other_inverse * delta + back_weight * inverse * delta
                part_log_var += weight * (var * other_inverse - 1.0) + back_weight * (1.0 - back)
        by_mu += part_mu
        by_log_var += part_log_var
    program = split * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + program, tl.sum(sum_, 0))
    tl.store(squares + tl.num_programs(0) * tl.num_programs(1) + program, tl.sum(square, 0))
    if GRAD:
        at = (tl.cast(split, tl.int64) * 2 * N + own)[:, None] * D + d[None, :]
        tl.store(grads + at, by_mu, mask=inside)
        tl.store(grads + at + tl.cast(N, tl.int64) * D, 0.5 * by_log_var, mask=inside)


def blocks(D: int, numbers: int = 2048, widest: int = 64) -> dict[str, int]:
    """The shape of a block of posteriors: 16 numbers a thread."""
    block_d = min(triton.next_power_of_2(max(D, 1)), widest)
    return {"BLOCK_N": max(1, min(128, numbers // block_d)), "BLOCK_D": block_d}


def _split(N: int, programs: int) -> tuple[int, int]:
    """Splits of N posteriors that fill the device beside `programs` programs, whole rounds each: count, size."""
    count = min(triton.cdiv(WAVE, max(programs, 1)), triton.cdiv(N, ROUND))
    share = triton.cdiv(triton.cdiv(N, ROUND), count) * ROUND
    return triton.cdiv(N, share), share


def pairwise_kl_diversity_fwd(mu: Tensor, log_var: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """The primitive `pairwise_kl_diversity_fwd` of kernels/pairwise_kl.py."""
    (N, D), mu, log_var = mu.shape, mu.contiguous(), log_var.contiguous()
    shape = blocks(D)
    grid = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(D, shape["BLOCK_D"])
    splits, share = _split(N, grid[0] * grid[1])
    values = mu.new_zeros(splits, *grid, dtype=torch.float64)
    grads = mu.new_empty(splits, 2, N, D) if need_grad else mu.new_empty(1, 0, N, D)
    if D:
        with torch.cuda.device_of(mu):
            _diversity[(*grid, splits)](mu, log_var, values, grads, N, D, share, GRAD=need_grad, ROUND=ROUND, **shape,
                                        num_warps=NUM_WARPS)
    return (values.sum() / (N * (N - 1))).to(mu.dtype), grads.sum(0) if splits > 1 and need_grad else grads[0]


def pairwise_kl_fwd(mu: Tensor, log_var: Tensor, need_std: bool, need_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive `pairwise_kl_fwd` of kernels/pairwise_kl.py."""
    (N, D), mu, log_var = mu.shape, mu.contiguous(), log_var.contiguous()
    need_grad = need_grad and need_std
    centre, sums = mu.mean(0, dtype=torch.float64).float(), mu.new_zeros(SUMS, D, dtype=torch.float64)
    if D:
        with torch.cuda.device_of(mu):
            _moments[(triton.cdiv(D, 32),)](mu, log_var, centre, sums, N, D, BLOCK_N=64, BLOCK_D=32, num_warps=NUM_WARPS)
    m, w, mw, v_m2, mmw = sums
    mean = 0.5 * (v_m2 * w - 2 * m * mw + N * mmw - N * N) / (N * (N - 1))
    moments = torch.cat((centre[None], sums[:4].float()))
    if not need_std:
        return mean.float(), mu.new_empty(0), moments, mu.new_empty(0, N, D)
    deviation, unit = _std(mu, log_var, mean.sum().float(), need_grad)
    return mean.float(), deviation, moments, unit


def _std(mu: Tensor, log_var: Tensor, mean: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    N, D = mu.shape
    shape, pairs = blocks(D, widest=max(triton.next_power_of_2(max(D, 1)), 1)), N * (N - 1)
    programs = triton.cdiv(N, shape["BLOCK_N"])
    splits, share = _split(N, programs)
    sums = mu.new_empty(2, splits, programs, dtype=torch.float64)
    grads = mu.new_empty(splits, 2 if need_grad else 0, N, D)
    with torch.cuda.device_of(mu):
        _deviation[(programs, splits)](mu, log_var, mean, sums, grads, N, D, share, GRAD=need_grad, ROUND=ROUND, **shape,
                                       num_warps=NUM_WARPS)
    first, second = sums.sum((1, 2))
    square = (second - first * first / pairs).clamp(min=0)
    deviation = (square / (pairs - 1)).sqrt()
    scale = torch.where(square > 0, 1 / (deviation * (pairs - 1)), 0.0).float()
    return deviation.float(), grads.sum(0) * scale


def pairwise_kl_bwd(grad_mean: Tensor, grad_std: Tensor | None, mu: Tensor, log_var: Tensor, moments: Tensor,
                    unit: Tensor) -> tuple[Tensor, Tensor]:
    """The primitive `pairwise_kl_bwd` of kernels/pairwise_kl.py; of the size of the inputs, so PyTorch serves."""
    N = mu.shape[0]
    centre, sum_m, sum_w, sum_mw, sum_v_m2 = moments
    m, v, w, g = mu - centre, log_var.exp(), torch.exp(-log_var), grad_mean / (N * (N - 1))
    by_mu = g * ((m * sum_w - sum_mw) + (N * m - sum_m) * w)
    by_log_var = 0.5 * g * (v * sum_w - w * (sum_v_m2 + m * (N * m - 2 * sum_m)))
    if grad_std is not None:
        by_mu, by_log_var = by_mu + grad_std * unit[0], by_log_var + grad_std * unit[1]
    return by_mu, by_log_var
