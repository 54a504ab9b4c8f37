"""Triton kernels of the importance ops; formulas and notation are in kernels/importance.py.

A program of the forward pass keeps a block of samples of one data point after the other in registers; one of the backward pass
keeps a data point and takes one block of its samples after the other, whose gradients of mu and log_var it sums. Reductions
over samples take a block of data points, and are merged over blocks of samples by PyTorch in fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # samples of a block
COLUMNS = 32  # data points of a block of log-weights
WAVE = 2 * 132  # programs that fill an H200; a constant, so that the bits do not depend on the device
NUM_WARPS = 4


@triton.jit
def _load_block(z, s, n, d, S, D, stride_s, stride_n, stride_d):
    inside = (s < S)[:, None] & (d < D)[None, :]
    at = s[:, None] * stride_s + n * stride_n + d[None, :] * stride_d
    return tl.load(z + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _log_weights(z, mu, inv_vars, constants, log_px, log_pz, log_w, S, N, D, stride_s, stride_n, stride_d,
                 NORMAL_PRIOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mean = tl.load(mu + n * D + d, mask=d < D, other=0.0)
        inv_var = tl.load(inv_vars + n * D + d, mask=d < D, other=0.0)
        x = _load_block(z, s, n, d, S, D, stride_s, stride_n, stride_d)
        delta = x - mean[None, :]
        terms = delta * inv_var[None, :] * delta
        if NORMAL_PRIOR:
            terms -= x * x
        total += tl.sum(terms, 1)
    value = tl.load(log_px + s * N + n, mask=s < S, other=0.0) + (tl.load(constants + n) + 0.5 * total)
    if not NORMAL_PRIOR:
        value += tl.load(log_pz + s * N + n, mask=s < S, other=0.0)
    tl.store(log_w + s * N + n, value, mask=s < S)


@triton.jit
def _power(x, top, scale, EXTREME: tl.constexpr):
    """exp(scale · (x − top)); 1 for the largest and 0 for the others where only they count."""
    if EXTREME:
        return tl.where(x == top, 1.0, tl.where(x == x, 0.0, x))
    else:
        infinite = (top == float("inf")) | (top == -float("inf"))
        return tl.exp(scale * (x - tl.where(infinite, 0.0, top)))


@triton.jit
def _expm1(t):
    """exp(t) − 1 to 4 ULP: Taylor's polynomial where the difference would cancel."""
    near = 1.0 + t * (1 / 5) * (1.0 + t * (1 / 6) * (1.0 + t * (1 / 7) * (1.0 + t * (1 / 8))))
    near = t * (1.0 + t * (1 / 2) * (1.0 + t * (1 / 3) * (1.0 + t * (1 / 4) * near)))
    return tl.where(tl.abs(t) < 0.5, near, tl.exp(t) - 1.0)


@triton.jit
def _moments(log_w, tops, sums, squares, totals, S, N, share, sign, scale, EXTREME: tl.constexpr, DTYPE: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of samples [split · share, (split + 1) · share), a column a data point: the largest sign · log w, Σ e, Σ e², Σ log w."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    end = tl.minimum(split * share + share, S)
    top = tl.full([COLUMNS], float("-inf"), DTYPE)
    total = tl.zeros([COLUMNS], DTYPE)
    for s0 in range(split * share, end, ROWS):
        s = s0 + tl.arange(0, ROWS)
        inside = (s < end)[:, None] & (n < N)[None, :]
        x = tl.load(log_w + s[:, None] * N + n[None, :], mask=inside, other=0.0).to(DTYPE)
        total += tl.sum(x, 0)
        top = tl.maximum(top, tl.max(tl.where(inside & (x == x), sign * x, float("-inf")), 0))
    sum_ = tl.zeros([COLUMNS], DTYPE)
    square = tl.zeros([COLUMNS], DTYPE)
    for s0 in range(split * share, end, ROWS):
        s = s0 + tl.arange(0, ROWS)
        inside = (s < end)[:, None] & (n < N)[None, :]
        x = tl.load(log_w + s[:, None] * N + n[None, :], mask=inside, other=0.0).to(DTYPE)
        e = tl.where(inside, _power(sign * x, top[None, :], scale, EXTREME), 0.0)
        sum_ += tl.sum(e, 0)
        square += tl.sum(e * e, 0)
    at = split * N + n
    tl.store(tops + at, top, mask=n < N)
    tl.store(sums + at, sum_, mask=n < N)
    tl.store(squares + at, square, mask=n < N)
    tl.store(totals + at, total, mask=n < N)


@triton.jit
def _excess(log_w, centres, sums, S, N, share, sign, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of samples [split · share, (split + 1) · share): Σ exp(scale · (sign · log w − centre)) − 1."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    end = tl.minimum(split * share + share, S)
    centre = tl.load(centres + n, mask=n < N, other=0.0)
    total = tl.zeros([COLUMNS], tl.float32)
    for s0 in range(split * share, end, ROWS):
        s = s0 + tl.arange(0, ROWS)
        inside = (s < end)[:, None] & (n < N)[None, :]
        x = tl.load(log_w + s[:, None] * N + n[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, _expm1(scale * (sign * x - centre[None, :])), 0.0), 0)
    tl.store(sums + split * N + n, total, mask=n < N)


@triton.jit
def _weights(log_w, tops, factors, weights, S, N, size, sign, scale, elbo, EXTREME: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (s < S) & (n < N)
    group = s // size * N + n
    x = tl.load(log_w + s * N + n, mask=inside, other=0.0)
    e = _power(sign * x, tl.load(tops + group, mask=inside, other=0.0), scale, EXTREME)
    value = e * tl.load(factors + group, mask=inside, other=0.0) + elbo
    tl.store(weights + s * N + n, value, mask=inside)


@triton.jit
def _backward(z, mu, inv_vars, weights, grad, grad_log_w, grad_z, first_out, second_out, weight_out, S, N, D, share, stride_s,
              stride_n, stride_d, NORMAL_PRIOR: tl.constexpr, HAS_GRAD: tl.constexpr, NEED_Z: tl.constexpr,
              NEED_POSTERIOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of `share` samples of one data point and a block of dimensions: gradients of z, parts of those of mu and log_var."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean = tl.load(mu + n * D + d, mask=d < D, other=0.0)
    inv_var = tl.load(inv_vars + n * D + d, mask=d < D, other=0.0)
    first = tl.zeros([BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_D], tl.float32)
    weight = 0.0
    end = tl.minimum(split * share + share, S)
    for s0 in range(split * share, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        coef = tl.load(weights + s * N + n, mask=s < end, other=0.0)
        if HAS_GRAD:
            coef *= tl.load(grad + n)
            coef = tl.where(s < end, coef, 0.0)
            if tl.program_id(2) == 0:
                tl.store(grad_log_w + s * N + n, coef, mask=s < end)
        x = _load_block(z, s, n, d, end, D, stride_s, stride_n, stride_d)
        delta = tl.where((s < end)[:, None], x - mean[None, :], 0.0)
        scaled = delta * inv_var[None, :]
        if NEED_Z:
            moved = scaled - x if NORMAL_PRIOR else scaled
            at = (s * N + n)[:, None] * D + d[None, :]
            tl.store(grad_z + at, (coef[:, None] * moved).to(grad_z.dtype.element_ty),
                     mask=(s < end)[:, None] & (d < D)[None, :])
        if NEED_POSTERIOR:
            weighted = coef[:, None] * scaled
            first += tl.sum(weighted, 0)
            second += tl.sum(weighted * delta, 0)
            weight += tl.sum(coef, 0)
    if NEED_POSTERIOR:
        row = split * N + n
        tl.store(first_out + row * D + d, first, mask=d < D)
        tl.store(second_out + row * D + d, second, mask=d < D)
        if tl.program_id(2) == 0:
            tl.store(weight_out + row, weight)


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of samples: 2048 numbers, 16 a thread."""
    block_d = min(256, triton.next_power_of_2(max(D, 1)))
    return {"BLOCK_S": min(128, 2048 // block_d), "BLOCK_D": block_d}


def _split(S: int, least: int, programs: int) -> tuple[int, int]:
    """Splits of S samples that fill the device beside `programs` programs, each a multiple of `least`: count, size."""
    count = min(triton.cdiv(WAVE, max(programs, 1)), triton.cdiv(S, least))
    size = triton.cdiv(triton.cdiv(S, max(count, 1)), least) * least
    return triton.cdiv(S, max(size, 1)), size


def _reduce(log_w: Tensor, sign: float, scale: float, dtype: torch.dtype) -> Tensor:
    """The moments [4, N] of log_w[S, N] in `dtype`."""
    S, N = log_w.shape
    columns = triton.cdiv(N, COLUMNS)
    splits, share = _split(S, 4 * ROWS, columns)
    parts = log_w.new_empty(4, splits, N, dtype=dtype)
    extreme = math.isinf(scale)
    if N:
        _moments[(columns, splits)](log_w, *parts, S, N, share, sign, 1.0 if extreme else scale, EXTREME=extreme,
                                    DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, ROWS=ROWS, COLUMNS=COLUMNS,
                                    num_warps=NUM_WARPS)
    return _merge(parts, scale)


def _merge(parts: Tensor, scale: float) -> Tensor:
    """Moments [4, splits, N] -> [4, N]."""
    tops = parts[0]
    top = tops.amax(0)
    if math.isinf(scale):
        factor = (tops == top).to(tops.dtype)
    else:
        factor = torch.exp(scale * (tops - top.masked_fill(top.isinf(), 0.0)))
    return torch.stack((top, (parts[1] * factor).sum(0), (parts[2] * factor.square()).sum(0), parts[3].sum(0)))


def importance_fwd(z: Tensor | None, mu: Tensor | None, log_var: Tensor | None, log_px: Tensor, log_pz: Tensor | None,
                   alpha: float, elbo_weight: float, groups: int, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The primitive `importance_fwd` of kernels/importance.py."""
    S = log_px.shape[0]
    log_px = log_px.contiguous()
    with torch.cuda.device_of(log_px):
        log_w = log_px.new_empty(0, 0) if z is None else _all_log_weights(z, mu, log_var, log_px, log_pz)
        if not groups:
            return log_px.new_empty(0), log_w, log_px.new_empty(0, 0)
        x = log_px if z is None else log_w
        sign, scale = -1.0 if alpha > 1 else 1.0, abs(1 - alpha)
        moments = torch.stack([_reduce(part, sign, scale, torch.float32) for part in x.split(S // groups)], 1)
        renyi = _renyi(moments, S, sign, scale)
        if scale < 1 and elbo_weight != 1:
            renyi = _refined(renyi, x, moments, sign, scale)
        bound = _bound(renyi, moments, S, elbo_weight)
        if not need_weights:
            return bound, log_w, log_px.new_empty(0, 0)
        return bound, log_w, _all_weights(x, moments, sign, scale, elbo_weight)


def _all_log_weights(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor, log_pz: Tensor | None) -> Tensor:
    S, N, D = z.shape
    constants = 0.5 * (log_var.sum(1, dtype=torch.float64) + (0.0 if log_pz is None else D * math.log(2 * math.pi))).float()
    log_w = torch.empty_like(log_px)
    if S * N:
        _log_weights[(N, triton.cdiv(S, blocks(D)["BLOCK_S"]))](
            z, mu.contiguous(), torch.exp(-log_var).contiguous(), constants, log_px,
            None if log_pz is None else log_pz.contiguous(), log_w, S, N, D, *z.stride(), NORMAL_PRIOR=log_pz is None,
            **blocks(D), num_warps=NUM_WARPS)
    return log_w


def _renyi(moments: Tensor, S: int, sign: float, scale: float) -> Tensor:
    """moments [4, groups, N] -> Rényi bounds [groups, N]."""
    top, total, _, _ = moments
    if math.isinf(scale):
        return sign * top + (total - total)
    return sign * (top.masked_fill(top.isinf(), 0.0) + (total * (len(top) / S)).log() / scale)


def _refined(renyi: Tensor, log_w: Tensor, moments: Tensor, sign: float, scale: float) -> Tensor:
    """Rényi bounds [groups, N] from rough ones: log(Σ e / size) next to 1 has lost what the division by a small scale shows.

    The mean is closer to the bound where all log-weights are.
    """
    (groups, N), S = renyi.shape, len(log_w)
    size = S // groups
    mean = moments[3] * (groups / S)
    centres = torch.where(scale * (moments[0] - sign * mean) < 2.0**-10, mean, renyi)
    columns = triton.cdiv(N, COLUMNS)
    splits, share = _split(size, 4 * ROWS, columns)
    sums = log_w.new_empty(groups, splits, N)
    if N:
        for part, centre, out in zip(log_w.split(size), sign * centres, sums, strict=True):
            _excess[(columns, splits)](part, centre, out, size, N, share, sign, scale, ROWS=ROWS, COLUMNS=COLUMNS,
                                       num_warps=NUM_WARPS)
    correction = torch.log1p(sums.sum(1) * (groups / S)) * (sign / scale)
    return torch.where(centres.isfinite(), centres + correction, renyi)


def _bound(renyi: Tensor, moments: Tensor, S: int, elbo_weight: float) -> Tensor:
    """Rényi bounds [groups, N] and moments [4, groups, N] -> bound [N]."""
    if elbo_weight == 0:
        return renyi.mean(0)
    elbo = moments[3].sum(0) / S
    return elbo if elbo_weight == 1 else elbo_weight * elbo + (1 - elbo_weight) * renyi.mean(0)


def _all_weights(log_w: Tensor, moments: Tensor, sign: float, scale: float, elbo_weight: float) -> Tensor:
    S, N = log_w.shape
    if elbo_weight == 1:
        return torch.full_like(log_w, 1 / S)
    tops, sums = moments[0].contiguous(), moments[1]
    groups, extreme = len(tops), math.isinf(scale)
    factors = torch.where(sums == 0, 0.0, (1 - elbo_weight) / (groups * sums))
    weights = torch.empty_like(log_w)
    if N:
        _weights[(triton.cdiv(S, ROWS), triton.cdiv(N, COLUMNS))](
            log_w, tops, factors, weights, S, N, S // groups, sign, 1.0 if extreme else scale, elbo_weight / S,
            EXTREME=extreme, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS)
    return weights


def importance_bwd(grad: Tensor | None, weights: Tensor, z: Tensor, mu: Tensor, log_var: Tensor, normal_prior: bool,
                   need_z: bool, need_posterior: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive `importance_bwd` of kernels/importance.py."""
    S, N, D = z.shape
    shape = blocks(D)
    splits, share = _split(S, shape["BLOCK_S"], N * triton.cdiv(D, shape["BLOCK_D"]))
    inv_vars = torch.exp(-log_var).contiguous()
    grad_log_w = weights.new_empty((0, 0) if grad is None else (S, N))
    grad_z = z.new_empty((S, N, D) if need_z else (0, 0, 0))
    n, d = (N, D) if need_posterior else (0, 0)
    first, second, weight = mu.new_empty(splits, n, d), mu.new_empty(splits, n, d), mu.new_empty(splits, n)
    if S * N:
        with torch.cuda.device_of(z):
            _backward[(N, splits, max(1, triton.cdiv(D, shape["BLOCK_D"])))](
                z, mu.contiguous(), inv_vars, weights.contiguous(), None if grad is None else grad.contiguous(), grad_log_w,
                grad_z, first, second, weight, S, N, D, share, *z.stride(), NORMAL_PRIOR=normal_prior,
                HAS_GRAD=grad is not None, NEED_Z=need_z, NEED_POSTERIOR=need_posterior, **shape, num_warps=NUM_WARPS)
    return grad_z, -first.sum(0), 0.5 * (weight.sum(0)[:, None] - second.sum(0)), grad_log_w


def importance_moments(log_w: Tensor, state: Tensor) -> Tensor:
    """The primitive `importance_moments` of kernels/importance_statistics.py."""
    with torch.cuda.device_of(log_w):
        return _merge(torch.stack((state, _reduce(log_w.contiguous(), 1.0, 1.0, torch.float64)), 1), 1.0)
