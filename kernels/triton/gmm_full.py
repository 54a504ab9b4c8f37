"""Triton kernels of `gmm_full_log_prob` and `gmm_full_moments`; formulas and notation are in kernels/gmm_full.py.

A program keeps a block of points [BLOCK_N, BLOCK_D] in registers, all of D at once, and takes one component after the
other, or keeps the sums of a component and takes one block of points after the other. δ is formed first, so that the matrix
products δ P, (a δ P) Pᵀ and (a δ)ᵀ δ cancel nothing that the formula does not; they take three TF32 products each, which
together have float32's digits. Programs sum up to ROUND blocks in float32; PyTorch adds these sums up in float64, in fixed
order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gmm import cut, fold, load_points, merge_log_sums

ROUND = 64  # blocks of points that a program sums in float32
COMPONENTS = 4  # of a split, at least


@triton.jit
def _load_factor(chol, k, d, D):
    """The upper triangle of P."""
    at = chol + tl.cast(k, tl.int64) * D * D + d[:, None] * D + d[None, :]
    return tl.load(at, mask=(d[:, None] <= d[None, :]) & (d < D)[None, :], other=0.0)


@triton.jit
def _delta(points, means, k, d, D):
    mean = tl.load(means + tl.cast(k, tl.int64) * D + d, mask=d < D, other=0.0)
    return points - mean[None, :]


@triton.jit
def _logits(white, constants, k):
    return tl.load(constants + k) - 0.5 * tl.sum(white * white, 1)


@triton.jit
def _weights(white, constants, grad, log_prob, coef, n, k, N, K, HAS_COEF: tl.constexpr):
    """a_nk of one component, 0 beyond the last row."""
    if HAS_COEF:
        return tl.load(coef + n * K + k, mask=n < N, other=0.0)
    else:
        logits = _logits(white, constants, k)
        return tl.where((logits == float("-inf")) | (n >= N), 0.0, grad * tl.exp(logits - log_prob))


@triton.jit
def _forward(z, means, chol, constants, tops, sums, logits_out, N, K, D, stride_n, stride_d, share,
             WITH_LOGITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Log-sum-exp over `share` components: its maximum and sum [splits, N], or if `WHOLE` the log-density in `tops`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    points = load_points(z, stride_n, stride_d, n, d, N, D)
    # A finite first maximum spares −inf a case of its own; NaN lives in the sum.
    top = tl.full([BLOCK_N], -3.4028234e38, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(split * share, tl.minimum(split * share + share, K)):
        white = tl.dot(_delta(points, means, k, d, D), _load_factor(chol, k, d, D), input_precision="tf32x3")
        logits = _logits(white, constants, k)
        if WITH_LOGITS:
            tl.store(logits_out + n * K + k, logits, mask=n < N)
        top, total = fold(logits, top, total)
    at_row = tl.cast(split, tl.int64) * N + n
    if WHOLE:
        tl.store(tops + at_row, top + tl.log(total), mask=n < N)
    else:
        tl.store(tops + at_row, top, mask=n < N)
        tl.store(sums + at_row, total, mask=n < N)


@triton.jit
def _rows(z, means, chol, constants, grad, log_prob, coef, grad_z, N, K, D, stride_n, stride_d, share,
          HAS_COEF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of z over `share` components, [splits, N, D]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    points = load_points(z, stride_n, stride_d, n, d, N, D)
    row_grad = tl.load(grad + n, mask=n < N, other=0.0)
    row_log_prob = tl.load(log_prob + n, mask=n < N, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k in range(split * share, tl.minimum(split * share + share, K)):
        factor = _load_factor(chol, k, d, D)
        white = tl.dot(_delta(points, means, k, d, D), factor, input_precision="tf32x3")
        a = _weights(white, constants, row_grad, row_log_prob, coef, n, k, N, K, HAS_COEF)[:, None]
        total -= tl.dot(tl.where(a != 0, a * white, 0.0), tl.trans(factor), input_precision="tf32x3")
    at = (tl.cast(split, tl.int64) * N + n)[:, None] * D + d[None, :]
    tl.store(grad_z + at, total.to(grad_z.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _moments(z, means, chol, constants, grad, log_prob, coef, weight_out, first_out, second_out, N, K, D, stride_n, stride_d,
             begin, share, HAS_COEF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ a [splits, K], Σ a δ [splits, K, D] and Σ a δ δᵀ [splits, K, D, D] of one component over `share` blocks of points
    from block `begin` on."""
    k = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    factor = _load_factor(chol, k, d, D)
    weight = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for block in range(begin + split * share, tl.minimum(begin + split * share + share, tl.cdiv(N, BLOCK_N))):
        n = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        delta = _delta(load_points(z, stride_n, stride_d, n, d, N, D), means, k, d, D)
        row_grad = tl.load(grad + n, mask=n < N, other=0.0)
        row_log_prob = tl.load(log_prob + n, mask=n < N, other=0.0)
        white = tl.dot(delta, factor, input_precision="tf32x3")
        a = _weights(white, constants, row_grad, row_log_prob, coef, n, k, N, K, HAS_COEF)
        weight += a
        delta = tl.where(a[:, None] != 0, delta, 0.0)
        weighted = a[:, None] * delta
        first += tl.sum(weighted, 0)
        second = tl.dot(tl.trans(weighted), delta, second, input_precision="tf32x3")
    row = tl.cast(split, tl.int64) * K + k
    tl.store(weight_out + row, tl.sum(weight, 0))
    tl.store(first_out + row * D + d, first, mask=d < D)
    tl.store(second_out + (row * D + d[:, None]) * D + d[None, :], second, mask=(d < D)[:, None] & (d < D)[None, :])


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of points, 16 or more a side for a matrix product, and warps: up to D = 64 nothing spills."""
    block_d = max(16, triton.next_power_of_2(D))
    return {"BLOCK_N": 64 if block_d <= 32 else 32, "BLOCK_D": block_d, "num_warps": 4 if block_d <= 32 else 8}


class _Call:
    """The arguments that the kernels share."""

    def __init__(self, z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor) -> None:
        self.N, self.K, self.D = z.shape[0], *means.shape
        log_dets = precision_cholesky.diagonal(dim1=1, dim2=2).double().log().sum(1)
        constants = log_weights + log_dets - 0.5 * self.D * math.log(2 * math.pi)
        self.tensors = z, means.contiguous(), precision_cholesky.contiguous(), constants.float()
        self.sizes = (self.N, self.K, self.D, *z.stride())
        self.options = blocks(self.D)
        self.row_blocks = triton.cdiv(self.N, self.options["BLOCK_N"])


def gmm_full_fwd(z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor,
                 responsibilities: bool) -> tuple[Tensor, Tensor | None]:
    """The primitive `gmm_full_fwd` of kernels/gmm_full.py."""
    call = _Call(z, means, precision_cholesky, log_weights)
    splits, share = cut(call.K, COMPONENTS, call.row_blocks)
    tops, sums = means.new_empty(splits, call.N), means.new_empty(splits if splits > 1 else 0, call.N)
    resp = means.new_empty(call.N, call.K) if responsibilities else None
    if call.N:
        with torch.cuda.device_of(z):
            _forward[(call.row_blocks, splits)](*call.tensors, tops, sums, resp, *call.sizes, share,
                                                WITH_LOGITS=responsibilities, WHOLE=splits == 1, **call.options)
    log_prob = tops[0] if splits == 1 else merge_log_sums(tops, sums)
    if responsibilities:
        resp.sub_(log_prob.masked_fill(log_prob == -torch.inf, 0.0)[:, None]).exp_()
    return log_prob, resp


def gmm_full_bwd(grad: Tensor, z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor, log_prob: Tensor,
                 coef: Tensor | None, need_z: bool, need_mixture: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive `gmm_full_bwd` of kernels/gmm_full.py."""
    call = _Call(z, means, precision_cholesky, log_weights)
    upstream = grad.contiguous(), log_prob.contiguous(), None if coef is None else coef.contiguous()
    call.options["HAS_COEF"] = coef is not None
    with torch.cuda.device_of(z):
        return (_grad_z(call, upstream) if need_z else z.new_empty(0, 0)), *_sums(call, upstream, need_mixture)


def gmm_full_moments(weights: Tensor | None, z: Tensor, means: Tensor, precision_cholesky: Tensor,
                     log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive `gmm_full_moments` of kernels/gmm_full.py; the logits are computed twice."""
    mixture = z, means, precision_cholesky, log_weights
    log_prob, _ = gmm_full_fwd(*mixture, False)
    grad = torch.ones_like(log_prob) if weights is None else weights
    return log_prob, *gmm_full_bwd(grad, *mixture, log_prob, None, False, True)[1:]


def _grad_z(call: _Call, upstream: tuple[Tensor | None, ...]) -> Tensor:
    z = call.tensors[0]
    splits, share = cut(call.K, COMPONENTS, call.row_blocks)
    parts = z.new_empty(splits, call.N, call.D, dtype=z.dtype if splits == 1 else torch.float32)
    if parts.numel():
        _rows[(call.row_blocks, splits)](*call.tensors, *upstream, parts, *call.sizes, share, **call.options)
    return parts[0] if splits == 1 else parts.sum(0).to(z.dtype)


def _sums(call: _Call, upstream: tuple[Tensor | None, ...], is_needed: bool) -> list[Tensor]:
    """The moments of all rows: launches for as many rows as the device takes at once, ROUND blocks a program."""
    K, D = (call.K, call.D) if is_needed else (0, 0)
    shapes, like = ((K,), (K, D), (K, D, D)), call.tensors[1]
    totals = [like.new_zeros(shape, dtype=torch.float64) for shape in shapes]
    splits, _ = cut(call.row_blocks, 1, call.K)
    for begin in range(0, call.row_blocks if K else 0, splits * ROUND):
        share = min(ROUND, triton.cdiv(call.row_blocks - begin, splits))
        parts = [like.new_empty(splits, *shape) for shape in shapes]
        _moments[(K, splits)](*call.tensors, *upstream, *parts, *call.sizes, begin, share, **call.options)
        for total, part in zip(totals, parts, strict=True):
            total += part.sum(0, dtype=torch.float64)
    return totals
