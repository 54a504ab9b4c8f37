"""Triton kernel of `mmd2_to_normal`; formulas and notation are in kernels/mmd_normal.py.

A program keeps one row and takes the others in blocks [BLOCK_N, BLOCK_D], all of D at once; then the prior, as one more
posterior. Each ordered pair is visited: a program writes to its own row only. Lengths are in units of the power of two nearest
to √D σ, so that scaling rounds nothing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
LARGEST_VARIANCE = 1e27  # as good as infinite: the expectation is below 1e-12


@triton.jit
def _expectation(delta, variances, rates, weights, nodes, GRADIENT: tl.constexpr):
    """Σ_q w_q E exp(−a_q |u|²) over u ~ N(δ, diag variances), and Σ_q e_q r_q, Σ_q e_q r_q² with r = 2a / (1 + 2a s)."""
    square = delta * delta
    value = tl.zeros_like(tl.sum(square, 1))
    first = tl.zeros_like(delta)
    second = tl.zeros_like(delta)
    for q in range(nodes):
        twice = 2 * tl.load(rates + q)
        t = 1 + twice * variances
        r = twice / t
        e = tl.load(weights + q) * tl.exp(-0.5 * tl.sum(square * r + tl.log(t), 1))
        value += e
        if GRADIENT:
            part = e[:, None] * r
            first += part
            second += part * r
    return value, first, second


@triton.jit
def _inverse_multiquadrics(delta, widths, count):
    """Σ_s C_s / (C_s + r²) and −2 times its derivative in r²."""
    square = tl.sum(delta * delta, 1)
    value = tl.zeros_like(square)
    slope = tl.zeros_like(square)
    for s in range(count):
        width = tl.load(widths + s)
        term = width / (width + square)
        value += term
        slope += 2 * term * (term / width)
    return value, slope


@triton.jit
def _load(data, rows, d, stride_n, stride_d, N, D):
    inside = (rows < N)[:, None] & (d < D)[None, :]
    return tl.load(data + rows[:, None].to(tl.int64) * stride_n + d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _variances(log_var, rows, d, stride_n, stride_d, N, D, unit, largest):
    """In the kernel's units; 0 in the padding, which then has t = 1."""
    v = tl.exp(_load(log_var, rows, d, stride_n, stride_d, N, D)) * unit * unit
    v = tl.where(v > largest, largest, v)
    return tl.where((d < D)[None, :], v, 0.0)


@triton.jit
def _rows(x, log_var, rates, weights, widths, values, dx, dlog_var, N, D, nodes, count, x_stride_n, x_stride_d, v_stride_n,
          v_stride_d, unit, prior_variance, pair_weight, cross_weight, largest, BIASED: tl.constexpr, POSTERIORS: tl.constexpr,
          IMQ: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The share of one row in the value, and its gradients. `pair_weight` is that of an ordered pair."""
    i = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    row = i + tl.zeros([1], tl.int32)
    mean = _load(x, row, d, x_stride_n, x_stride_d, N, D) * unit
    spread = tl.zeros_like(mean)
    if POSTERIORS:
        spread = _variances(log_var, row, d, v_stride_n, v_stride_d, N, D, unit, largest)
    total = tl.zeros([BLOCK_N], tl.float32)
    slopes = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    spreads = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        delta = mean - _load(x, j, d, x_stride_n, x_stride_d, N, D) * unit
        counts = j < N
        if not BIASED:
            counts = counts & (j != i)
        if IMQ:
            value, slope = _inverse_multiquadrics(delta, widths, count)
            slopes -= tl.where(counts[:, None], slope[:, None] * delta, 0.0)
        else:
            s = tl.zeros_like(delta)
            if POSTERIORS:
                s = spread + _variances(log_var, j, d, v_stride_n, v_stride_d, N, D, unit, largest)
            value, first, second = _expectation(delta, s, rates, weights, nodes, GRADIENT)
            slopes -= tl.where(counts[:, None], first * delta, 0.0)
            spreads += tl.where(counts[:, None], second * delta * delta - first, 0.0)
        total += tl.where(counts, value, 0.0)
    s = spread + tl.where((d < D)[None, :], prior_variance, 0.0)
    value, first, second = _expectation(mean, s, rates, weights, nodes, GRADIENT)
    tl.store(values + i, pair_weight * tl.sum(total, 0) + cross_weight * tl.sum(value, 0))
    if GRADIENT:
        at = tl.cast(i, tl.int64) * D + d
        slope = 2 * pair_weight * tl.sum(slopes, 0) - cross_weight * tl.sum(first * mean, 0)
        tl.store(dx + at, unit * slope, mask=d < D)
        if POSTERIORS:
            cross = tl.sum(second * mean * mean - first, 0)
            v = tl.sum(spread, 0)
            tl.store(dlog_var + at, v * (pair_weight * tl.sum(spreads, 0) + 0.5 * cross_weight * cross), mask=d < D)


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of rows: 1024 numbers, 8 a thread, of which the kernel holds seven such blocks."""
    block_d = triton.next_power_of_2(max(D, 1))
    return {"BLOCK_N": min(128, max(1, 1024 // block_d)), "BLOCK_D": block_d}


def mmd_normal_fwd(x: Tensor, log_var: Tensor | None, rates: list[float], weights: list[float], widths: list[float],
                   prior_std: float, biased: bool, need_x: bool, need_log_var: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The primitive `mmd_normal_fwd` of kernels/mmd_normal.py."""
    N, D = x.shape
    unit = 2.0 ** -round(math.log2(prior_std * math.sqrt(D)))
    squared = D * (prior_std * unit) ** 2  # D σ² in the kernel's units
    rates = [a / squared for a in rates]
    pair_weight = 1 / (N * N if biased else N * (N - 1))
    tables = torch.tensor([*rates, *weights, *(C * squared for C in widths)], dtype=torch.float32, device=x.device)
    parts = tables.split([len(rates), len(rates), len(widths)])
    gradient = need_x or need_log_var
    values = tables.new_empty(N)
    dx = tables.new_empty((N, D) if gradient else (0, 0))
    dlog_var = tables.new_empty((N, D) if gradient and log_var is not None else (0, 0))
    strides = (0, 0) if log_var is None else log_var.stride()
    with torch.cuda.device_of(x):
        _rows[(N,)](x, log_var, *parts, values, dx, dlog_var, N, D, len(rates), len(widths), *x.stride(), *strides, unit,
                    squared / D, pair_weight, -2 / N, LARGEST_VARIANCE, BIASED=biased, POSTERIORS=log_var is not None,
                    IMQ=bool(widths), GRADIENT=gradient, num_warps=NUM_WARPS, **blocks(D))
    prior = sum(w * math.exp(-0.5 * D * math.log1p(4 * a * squared / D)) for a, w in zip(rates, weights, strict=True))
    none = tables.new_empty(0, 0)
    return (values.sum(dtype=torch.float64) + prior).float(), dx if need_x else none, dlog_var if need_log_var else none
