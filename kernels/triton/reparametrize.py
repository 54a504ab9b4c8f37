"""Triton kernels of reparametrised samples and their KL divergence; formulas and notation are in kernels/reparametrize.py.

A program has some rows and dimensions, and takes one block of their samples after the other, whose gradients it sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024  # numbers a block, 8 a thread
SAMPLES = 8  # a block, at most
WAVE = 2 * 132  # programs that fill an H200; a constant, so that the bits do not depend on the device
NUM_WARPS = 4

SMALLEST, LARGEST = tl.constexpr(-87.33654), tl.constexpr(88.37626)  # of which exp is a normal number


@triton.jit
def _scale(log_var):
    """σ = e^h, u = e^h − 1 and u − h for h = log_var / 2: the polynomial and reduction of csrc/cpu/simd.inl."""
    h = 0.5 * log_var
    x = tl.maximum(h, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.69287109375) - n * 2.7608680994530943e-04
    p = 0.0013863756321370602 * r + 0.008367509581148624
    p = p * r + 0.041667237877845764
    p = p * r + 0.16666534543037415
    p = p * r + 0.5
    excess = p * r * r
    rest = excess + r
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    std = tl.where(h < SMALLEST, 0.0, rest * power + power)
    std = tl.where(h > LARGEST, float("inf"), std)
    u = tl.where(h > LARGEST, float("inf"), rest * power + (power - 1.0))
    return std, u, tl.where(n == 0.0, excess, u - h)


@triton.jit
def _elements(N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and dimensions of this program, as axes of [samples, rows, dimensions], and which are inside."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, None, :]
    return n, d, (n < N) & (d < D)


@triton.jit
def _forward(mean, log_var, noise, z, kl, S, N, D, share, mean_n, mean_d, log_var_n, log_var_d, noise_s, noise_n, noise_d,
             BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n, d, inside = _elements(N, D, BLOCK_N, BLOCK_D)
    mu = tl.load(mean + n * mean_n + d * mean_d, mask=inside, other=0.0).to(tl.float32)
    std, u, u_minus_h = _scale(tl.load(log_var + n * log_var_n + d * log_var_d, mask=inside, other=0.0))
    split = tl.program_id(2).to(tl.int64)
    if split == 0:
        tl.store(kl + n * D + d, 0.5 * (mu * mu + (u * u + 2.0 * u_minus_h)), mask=inside)
    end = tl.minimum(split * share + share, S)
    for first in range(split * share, end, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S))[:, None, None]
        mask = (s < end) & inside
        eps = tl.load(noise + s * noise_s + n * noise_n + d * noise_d, mask=mask, other=0.0)
        tl.store(z + (s * N + n) * D + d, mu + std * eps, mask=mask)


@triton.jit
def _backward(grad_z, grad_kl, mean, log_var, noise, dmean, dlog_var, S, N, D, grad_z_s, grad_z_n, grad_z_d, grad_kl_n,
              grad_kl_d, mean_n, mean_d, log_var_n, log_var_d, noise_s, noise_n, noise_d, HAS_Z: tl.constexpr,
              HAS_KL: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_LOG_VAR: tl.constexpr, BLOCK_S: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n, d, inside = _elements(N, D, BLOCK_N, BLOCK_D)
    of_mean = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
    of_std = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
    if HAS_Z:
        for first in range(0, S, BLOCK_S):
            s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None, None]
            mask = (s < S) & inside
            g = tl.load(grad_z + s * grad_z_s + n * grad_z_n + d * grad_z_d, mask=mask, other=0.0)
            of_mean += tl.sum(g, 0, keep_dims=True)
            if NEED_LOG_VAR:
                eps = tl.load(noise + s * noise_s + n * noise_n + d * noise_d, mask=mask, other=0.0)
                of_std += tl.sum(g * eps, 0, keep_dims=True)
    if HAS_KL:
        k = tl.load(grad_kl + n * grad_kl_n + d * grad_kl_d, mask=inside, other=0.0)
        of_mean += k * tl.load(mean + n * mean_n + d * mean_d, mask=inside, other=0.0).to(tl.float32)
    if NEED_MEAN:
        tl.store(dmean + n * D + d, of_mean.to(dmean.dtype.element_ty), mask=inside)
    if NEED_LOG_VAR:
        std, u, _ = _scale(tl.load(log_var + n * log_var_n + d * log_var_d, mask=inside, other=0.0))
        value = std * of_std
        if HAS_KL:
            value += k * (u * (u + 2.0))
        tl.store(dlog_var + n * D + d, 0.5 * value, mask=inside)


def blocks(S: int, D: int) -> dict[str, int]:
    """The shape of a block."""
    block_s, block_d = min(SAMPLES, triton.next_power_of_2(max(S, 1))), min(64, triton.next_power_of_2(max(D, 1)))
    return {"BLOCK_S": block_s, "BLOCK_N": SIZE // (block_s * block_d), "BLOCK_D": block_d}


def _samples(t: Tensor) -> Tensor:
    """[N, D] or [S, N, D] as [S, N, D]."""
    return t if t.dim() == 3 else t[None]


def reparametrize_fwd(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The primitive `reparametrize_fwd` of kernels/reparametrize.py."""
    z, kl, noise = noise.new_empty(noise.shape), log_var.new_empty(log_var.shape), _samples(noise)
    S, N, D = noise.shape
    if N * D:
        shape = blocks(S, D)
        rows, columns = triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(D, shape["BLOCK_D"])
        splits = max(1, min(triton.cdiv(WAVE, rows * columns), triton.cdiv(S, shape["BLOCK_S"])))
        share = triton.cdiv(triton.cdiv(S, splits), shape["BLOCK_S"]) * shape["BLOCK_S"]
        with torch.cuda.device_of(mean):
            _forward[(rows, columns, splits)](mean, log_var, noise, z, kl, S, N, D, share, *mean.stride(), *log_var.stride(),
                                              *noise.stride(), **shape, num_warps=NUM_WARPS)
    return z, kl


def reparametrize_bwd(grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, log_var: Tensor, noise: Tensor,
                      need_mean: bool, need_log_var: bool) -> tuple[Tensor, Tensor]:
    """The primitive `reparametrize_bwd` of kernels/reparametrize.py."""
    dmean = mean.new_empty(mean.shape if need_mean else (0, 0))
    dlog_var = log_var.new_empty(log_var.shape if need_log_var else (0, 0))
    noise = _samples(noise)
    S, N, D = noise.shape
    if N * D:
        shape = blocks(S, D)
        strides = (0, 0, 0) if grad_z is None else _samples(grad_z).stride(), (0, 0) if grad_kl is None else grad_kl.stride()
        with torch.cuda.device_of(mean):
            _backward[(triton.cdiv(N, shape["BLOCK_N"]), triton.cdiv(D, shape["BLOCK_D"]))](
                grad_z, grad_kl, mean, log_var, noise, dmean, dlog_var, S, N, D, *strides[0], *strides[1], *mean.stride(),
                *log_var.stride(), *noise.stride(), HAS_Z=grad_z is not None, HAS_KL=grad_kl is not None, NEED_MEAN=need_mean,
                NEED_LOG_VAR=need_log_var, **shape, num_warps=NUM_WARPS)
    return dmean, dlog_var
