"""Triton kernels of `gmm_log_prob`; formulas and notation are in kernels/gmm.py.

A program keeps a block of points [BLOCK_N, BLOCK_D] in registers, all of D at once, and takes one component after the
other, or keeps a component and takes one block of points after the other. Only the direct form is used: the expanded
one, which `tl.dot` needs, is off by 3e8 nats at means near 10 and σ² = e^-30 in fp32, the direct one by 2e-7.

A component that is not allowed, or a row without any, has weight 0 whatever its numbers are: sums skip weights of 0,
because 0·NaN is NaN. Sums over programs are merged by PyTorch in fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WAVE = 2 * 132  # programs that fill an H200; a constant, so that the bits do not depend on the device
ROUND = 64  # components whose gradients of z are summed before they join the running sum
NUM_WARPS = 4


@triton.jit
def load_points(z, stride_n, stride_d, n, d, N, D):
    inside = (n < N)[:, None] & (d < D)[None, :]
    return tl.load(z + n[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def fold(logits, top, total):
    """The maximum and sum of a running log-sum-exp, with one more term."""
    larger = logits > top
    smaller_term = tl.exp(-tl.abs(logits - top))
    return tl.where(larger, logits, top), tl.where(larger, total * smaller_term + 1.0, total + smaller_term)


@triton.jit
def _load_sets(labels, n, N, HAS_LABELS: tl.constexpr):
    """The row of `allowed` that holds for each point, or its only component where there is no `allowed`."""
    if HAS_LABELS:
        return tl.load(labels + n, mask=n < N, other=-1)
    else:
        return n


@triton.jit
def _is_allowed(allowed, sets, n, k, N, K, HAS_LABELS: tl.constexpr, HAS_ALLOWED: tl.constexpr):
    if HAS_ALLOWED:
        return tl.load(allowed + sets * K + k, mask=(n < N) & (sets >= 0), other=1) != 0
    elif HAS_LABELS:
        return (sets == k) | (sets < 0)
    else:
        return n >= 0


@triton.jit
def _logits(delta, inv_var, constant, is_allowed):
    distance = tl.sum(delta * delta * inv_var[None, :], 1)
    return tl.where(is_allowed, constant - 0.5 * distance, float("-inf"))


@triton.jit
def _weights(delta, inv_var, constant, is_allowed, grad, log_prob, coef, n, k, N, K, HAS_COEF: tl.constexpr):
    """a_nk of one component, 0 where it is not allowed."""
    if HAS_COEF:
        return tl.load(coef + n * K + k, mask=is_allowed & (n < N), other=0.0)
    else:
        logits = _logits(delta, inv_var, constant, is_allowed)
        return tl.where(logits == float("-inf"), 0.0, grad * tl.exp(logits - log_prob))


@triton.jit
def _forward(z, means, inv_vars, constants, labels, allowed, tops, sums, logits_out, N, K, D, stride_n, stride_d, share,
             HAS_LABELS: tl.constexpr, HAS_ALLOWED: tl.constexpr, WITH_LOGITS: tl.constexpr, WHOLE: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Log-sum-exp over `share` components: its maximum and sum [splits, N], or if `WHOLE` the log-density in `tops`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    points = load_points(z, stride_n, stride_d, n, d, N, D)
    sets = _load_sets(labels, n, N, HAS_LABELS)
    # A finite first maximum spares −inf a case of its own; NaN lives in the sum.
    top = tl.full([BLOCK_N], -3.4028234e38, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(split * share, tl.minimum(split * share + share, K)):
        at = tl.cast(k, tl.int64) * D + d
        mean = tl.load(means + at, mask=d < D, other=0.0)
        inv_var = tl.load(inv_vars + at, mask=d < D, other=0.0)
        is_allowed = _is_allowed(allowed, sets, n, k, N, K, HAS_LABELS, HAS_ALLOWED)
        logits = _logits(points - mean[None, :], inv_var, tl.load(constants + k), is_allowed)
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
def _backward_rows(z, means, inv_vars, constants, labels, allowed, grad, log_prob, coef, grad_z, N, K, D, stride_n,
                   stride_d, share, HAS_LABELS: tl.constexpr, HAS_ALLOWED: tl.constexpr, HAS_COEF: tl.constexpr,
                   ROUND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of z over `share` components, [splits, N, D]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    points = load_points(z, stride_n, stride_d, n, d, N, D)
    sets = _load_sets(labels, n, N, HAS_LABELS)
    row_grad = tl.load(grad + n, mask=n < N, other=0.0)
    row_log_prob = tl.load(log_prob + n, mask=n < N, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.minimum(split * share + share, K)
    for first in range(split * share, end, ROUND):
        part = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for k in range(first, tl.minimum(first + ROUND, end)):
            at = tl.cast(k, tl.int64) * D + d
            mean = tl.load(means + at, mask=d < D, other=0.0)
            inv_var = tl.load(inv_vars + at, mask=d < D, other=0.0)
            delta = points - mean[None, :]
            is_allowed = _is_allowed(allowed, sets, n, k, N, K, HAS_LABELS, HAS_ALLOWED)
            a = _weights(delta, inv_var, tl.load(constants + k), is_allowed, row_grad, row_log_prob, coef, n, k, N, K,
                         HAS_COEF)[:, None]
            part += tl.where(a != 0, a * inv_var[None, :] * delta, 0.0)
        total -= part
    at = (tl.cast(split, tl.int64) * N + n)[:, None] * D + d[None, :]
    tl.store(grad_z + at, total.to(grad_z.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _backward_components(z, means, inv_vars, constants, labels, allowed, grad, log_prob, coef, weight_out, first_out,
                         second_out, N, K, D, stride_n, stride_d, share, HAS_LABELS: tl.constexpr,
                         HAS_ALLOWED: tl.constexpr, HAS_COEF: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    """Σ a [splits, K], Σ a δ and Σ a δ² [splits, K, D] over `share` blocks of points, for one component."""
    k = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    at = tl.cast(k, tl.int64) * D + d
    mean = tl.load(means + at, mask=d < D, other=0.0)
    inv_var = tl.load(inv_vars + at, mask=d < D, other=0.0)
    constant = tl.load(constants + k)
    weight = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, tl.cdiv(N, BLOCK_N))):
        n = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        delta = load_points(z, stride_n, stride_d, n, d, N, D) - mean[None, :]
        sets = _load_sets(labels, n, N, HAS_LABELS)
        row_grad = tl.load(grad + n, mask=n < N, other=0.0)
        row_log_prob = tl.load(log_prob + n, mask=n < N, other=0.0)
        is_allowed = _is_allowed(allowed, sets, n, k, N, K, HAS_LABELS, HAS_ALLOWED) & (n < N)
        a = _weights(delta, inv_var, constant, is_allowed, row_grad, row_log_prob, coef, n, k, N, K, HAS_COEF)
        weight += a
        delta = tl.where(a[:, None] != 0, delta, 0.0)
        weighted = a[:, None] * delta
        first += weighted
        second += weighted * delta
    row = tl.cast(split, tl.int64) * K + k
    tl.store(weight_out + row, tl.sum(weight, 0))
    tl.store(first_out + row * D + d, tl.sum(first, 0), mask=d < D)
    tl.store(second_out + row * D + d, tl.sum(second, 0), mask=d < D)


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of points: 2048 numbers, 16 a thread. With 4096 the backward kernels spill registers."""
    block_d = triton.next_power_of_2(max(D, 1))
    return {"BLOCK_N": min(256, max(1, 2048 // block_d)), "BLOCK_D": block_d}


def cut(items: int, least: int, programs: int) -> tuple[int, int]:
    """Splits of `items` that fill the device beside `programs` programs, with at least `least` each: count, size."""
    count = min(triton.cdiv(WAVE, max(programs, 1)), triton.cdiv(items, least))
    size = triton.cdiv(items, max(count, 1))
    return (triton.cdiv(items, size), size) if items else (1, 0)


class _Call:
    """The arguments that the kernels share; `None` stands for a pointer that is not read."""

    def __init__(self, z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, labels: Tensor | None,
                 allowed: Tensor | None) -> None:
        self.N, self.K, self.D = z.shape[0], *means.shape
        self.inv_vars = torch.exp(-log_vars).contiguous()
        log_norms = log_vars.sum(1, dtype=torch.float64) + self.D * math.log(2 * math.pi)
        self.tensors = (z, means.contiguous(), self.inv_vars, (log_weights - 0.5 * log_norms).float(),
                        None if labels is None else labels.contiguous(),
                        None if allowed is None else allowed.contiguous().view(torch.uint8))
        self.sizes = (self.N, self.K, self.D, *z.stride())
        self.options = {"HAS_LABELS": labels is not None, "HAS_ALLOWED": allowed is not None, **blocks(self.D),
                        "num_warps": NUM_WARPS}
        self.row_blocks = triton.cdiv(self.N, self.options["BLOCK_N"])


def gmm_fwd(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, labels: Tensor | None,
            allowed: Tensor | None, responsibilities: bool) -> tuple[Tensor, Tensor | None]:
    """The primitive `gmm_fwd` of kernels/gmm.py."""
    call = _Call(z, means, log_vars, log_weights, labels, allowed)
    splits, share = cut(call.K, ROUND, call.row_blocks)
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


def merge_log_sums(tops: Tensor, sums: Tensor) -> Tensor:
    top = tops.amax(0)
    return top + (sums * torch.exp(tops - top)).sum(0).log()


def gmm_bwd(grad: Tensor, z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, log_prob: Tensor,
            labels: Tensor | None, allowed: Tensor | None, coef: Tensor | None, need_z: bool,
            need_mixture: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive `gmm_bwd` of kernels/gmm.py."""
    call = _Call(z, means, log_vars, log_weights, labels, allowed)
    upstream = (grad.contiguous(), log_prob.contiguous(), None if coef is None else coef.contiguous())
    call.options["HAS_COEF"] = coef is not None
    with torch.cuda.device_of(z):
        grad_z = _grad_z(call, upstream) if need_z else z.new_empty(0, 0)
        if need_mixture:
            weight, first, second = _sums(call, upstream)
            inv_vars = call.inv_vars.nan_to_num(0.0, 0.0, 0.0)
            return grad_z, inv_vars * first, 0.5 * (inv_vars * second - weight[:, None]), weight
    return grad_z, means.new_empty(0, 0), means.new_empty(0, 0), means.new_empty(0)


def gmm_fwd_bwd(grad, z, means, log_vars, log_weights, labels, allowed):
    """Log-density and gradients; the logits are computed twice."""
    log_prob, _ = gmm_fwd(z, means, log_vars, log_weights, labels, allowed, False)
    return log_prob, *gmm_bwd(grad, z, means, log_vars, log_weights, log_prob, labels, allowed, None, True, True)


def _grad_z(call: _Call, upstream: tuple[Tensor | None, ...]) -> Tensor:
    z = call.tensors[0]
    splits, share = cut(call.K, ROUND, call.row_blocks)
    parts = z.new_empty(splits, call.N, call.D, dtype=z.dtype if splits == 1 else torch.float32)
    if parts.numel():
        _backward_rows[(call.row_blocks, splits)](*call.tensors, *upstream, parts, *call.sizes, share, ROUND=ROUND,
                                                  **call.options)
    return parts[0] if splits == 1 else parts.sum(0).to(z.dtype)


def gmm_moments(weights, z, means, log_vars, log_weights):
    """Log-density and moments; the logits are computed twice."""
    log_prob, _ = gmm_fwd(z, means, log_vars, log_weights, None, None, False)
    call = _Call(z, means, log_vars, log_weights, None, None)
    call.options["HAS_COEF"] = False
    with torch.cuda.device_of(z):
        return log_prob, *_sums(call, (weights.contiguous(), log_prob, None))


def _sums(call: _Call, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ a [K], Σ a δ and Σ a δ² [K, D]."""
    splits, share = cut(call.row_blocks, 1, call.K)
    new = call.inv_vars.new_zeros if call.N == 0 else call.inv_vars.new_empty
    weight, first, second = new(splits, call.K), new(splits, call.K, call.D), new(splits, call.K, call.D)
    if call.N and call.K:
        _backward_components[(call.K, splits)](*call.tensors, *upstream, weight, first, second, *call.sizes, share,
                                               **call.options)
    return weight.sum(0), first.sum(0), second.sum(0)
