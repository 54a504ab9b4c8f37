"""Triton kernels of the row updates; formulas and notation are in kernels/row_update.py.

A program takes some positions of the sorted index, of which the first of each row sums that row's gradients and writes it; the
others have nothing to do. All of a row's elements go through the same program, BLOCK_D at a time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
STEPS = 512  # step counts a program


@triton.jit
def _heads(index, s, B):
    """The rows at positions s of the sorted index, and whether each is the first with its row."""
    row = tl.load(index + s, mask=s < B, other=-1)
    before = tl.load(index + s - 1, mask=(s < B) & (s > 0), other=-1)
    return row, (s < B) & (row != before)


@triton.jit
def _rows(index, s, B, HAS_INDEX: tl.constexpr):
    """As `_heads`; without an index, position s is row s."""
    if HAS_INDEX:
        return _heads(index, s, B)
    else:
        return s.to(tl.int64), s < B


@triton.jit
def _set_steps(step, index, B, now, HAS_INDEX: tl.constexpr, IS_ONE_MORE: tl.constexpr, BLOCK_N: tl.constexpr):
    """One step more, or at least `now`: a launch of its own, since threads of the one before share what they read of a row."""
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, is_head = _rows(index, s, B, HAS_INDEX)
    before = tl.load(step + row, mask=is_head, other=0)
    tl.store(step + row, before + 1 if IS_ONE_MORE else tl.maximum(before, now), mask=is_head)


@triton.jit
def _gradient(index, order, grad, row, s, B, d, grad_row, mask):
    """Sums of the gradients of the rows that begin at positions s."""
    at = tl.load(order + s, mask=s < B, other=0)
    total = tl.load(grad + at[:, None] * grad_row + d[None, :], mask=mask, other=0.0)
    after = s + 1
    same = (after < B) & (tl.load(index + after, mask=after < B, other=-1) == row)
    while tl.max(same.to(tl.int32), 0) > 0:
        at = tl.load(order + after, mask=same, other=0)
        total += tl.load(grad + at[:, None] * grad_row + d[None, :], mask=mask & same[:, None], other=0.0)
        after += 1
        same = same & (after < B) & (tl.load(index + after, mask=after < B, other=-1) == row)
    return total


@triton.jit
def _sgd(table, velocity, index, order, grad, B, D, table_row, velocity_row, grad_row, lr, momentum, coupled, kept,
         HAS_VELOCITY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, is_head = _heads(index, s, B)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_head[:, None] & (d < D)[None, :]
        z = table + row[:, None] * table_row + d[None, :]
        point = tl.load(z, mask=mask, other=0.0)
        move = -lr * (_gradient(index, order, grad, row, s, B, d, grad_row, mask) + coupled * point)
        if HAS_VELOCITY:
            v = velocity + row[:, None] * velocity_row + d[None, :]
            move += momentum * tl.load(v, mask=mask, other=0.0)
            tl.store(v, move, mask=mask)
        tl.store(z, point * kept + move, mask=mask)


@triton.jit
def _adam(table, exp_avg, exp_avg_sq, step, index, order, grad, B, D, table_row, mean_row, square_row, grad_row, lr, log_beta1,
          log_beta2, beta1, beta2, fresh1, fresh2, eps, coupled, kept, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, is_head = _heads(index, s, B)
    t = (tl.load(step + row, mask=is_head, other=0) + 1).to(tl.float64)
    rate = (lr / (1.0 - tl.exp2(log_beta1 * t))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp2(log_beta2 * t)).to(tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_head[:, None] & (d < D)[None, :]
        z = table + row[:, None] * table_row + d[None, :]
        m = exp_avg + row[:, None] * mean_row + d[None, :]
        v = exp_avg_sq + row[:, None] * square_row + d[None, :]
        point = tl.load(z, mask=mask, other=0.0)
        g = _gradient(index, order, grad, row, s, B, d, grad_row, mask) + coupled * point
        mean = beta1 * tl.load(m, mask=mask, other=0.0) + fresh1 * g
        square = beta2 * tl.load(v, mask=mask, other=0.0) + fresh2 * g * g
        tl.store(m, mean, mask=mask)
        tl.store(v, square, mask=mask)
        tl.store(z, point * kept - rate[:, None] * mean / (tl.sqrt(square) / root[:, None] + eps), mask=mask)


@triton.jit
def _catch_up(table, exp_avg, exp_avg_sq, step, index, history, B, D, table_row, mean_row, square_row, history_row, first, now,
              terms, log_beta1, log_beta2, eps, HAS_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, is_new = _rows(index, s, B, HAS_INDEX)
    since = tl.load(step + row, mask=is_new, other=0)
    skipped = now - since
    is_new = is_new & (skipped > 0)
    skipped = tl.where(is_new, skipped, 0)
    count = tl.minimum(skipped, terms)
    most = tl.max(count, 0)
    decays = history + 2 * history_row
    decay = tl.load(decays + (now - first))
    before = tl.load(decays + (since - first), mask=is_new & (since >= first), other=0.0)
    kept = tl.exp(decay - before).to(tl.float32)
    n = tl.maximum(skipped, 1).to(tl.float64)
    mean_root = tl.exp2(0.5 * log_beta1 * n).to(tl.float32)  # a normal number where the power no longer is
    square_root = tl.exp2(0.5 * log_beta2 * n).to(tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = is_new[:, None] & (d < D)[None, :]
        z = table + row[:, None] * table_row + d[None, :]
        m = exp_avg + row[:, None] * mean_row + d[None, :]
        v = exp_avg_sq + row[:, None] * square_row + d[None, :]
        mean = tl.load(m, mask=mask, other=0.0)
        square = tl.load(v, mask=mask, other=0.0)
        root = tl.sqrt(square)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for j in range(0, most):
            used = j < count
            at = since + 1 - first + j
            power = (tl.zeros_like(count) + j + 1).to(tl.float32)
            left = tl.exp(decay - tl.load(decays + at, mask=used, other=0.0)).to(tl.float32)
            weight = tl.load(history + at, mask=used, other=0.0).to(tl.float32) * tl.exp2(log_beta1 * power) * left
            scale = tl.load(history + history_row + at, mask=used, other=1.0).to(tl.float32) * tl.exp2(0.5 * log_beta2 * power)
            total += tl.where(used[:, None], weight[:, None] / (root * scale[:, None] + eps), 0.0)
        tl.store(z, tl.load(z, mask=mask, other=0.0) * kept[:, None] - mean * total, mask=mask)
        tl.store(m, mean * mean_root[:, None] * mean_root[:, None], mask=mask)
        tl.store(v, square * square_root[:, None] * square_root[:, None], mask=mask)


def blocks(D: int) -> dict[str, int]:
    """The shape of a block of rows: up to 64 elements of each, 512 numbers, 4 a thread."""
    block_d = min(64, triton.next_power_of_2(max(D, 1)))
    return {"BLOCK_N": 512 // block_d, "BLOCK_D": block_d}


def row_sgd_(table: Tensor, velocity: Tensor | None, index: Tensor, order: Tensor, grad: Tensor, lr: float, momentum: float,
             weight_decay: float, decoupled: bool) -> None:
    """The primitive `row_sgd_` of kernels/row_update.py."""
    B, D, shape = len(index), table.shape[1], blocks(table.shape[1])
    if B and D:
        with torch.cuda.device_of(table):
            _sgd[(triton.cdiv(B, shape["BLOCK_N"]),)](
                table, table if velocity is None else velocity, index, order, grad, B, D, table.stride(0),
                0 if velocity is None else velocity.stride(0), grad.stride(0), lr, momentum,
                *_decay(lr, weight_decay, decoupled), HAS_VELOCITY=velocity is not None, **shape, num_warps=NUM_WARPS)


def row_adam_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor, order: Tensor, grad: Tensor,
              lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool) -> None:
    """The primitive `row_adam_` of kernels/row_update.py."""
    B, D, shape = len(index), table.shape[1], blocks(table.shape[1])
    if B and D:
        with torch.cuda.device_of(table):
            _adam[(triton.cdiv(B, shape["BLOCK_N"]),)](
                table, exp_avg, exp_avg_sq, step, index, order, grad, B, D, table.stride(0), exp_avg.stride(0),
                exp_avg_sq.stride(0), grad.stride(0), lr, _log2(beta1), _log2(beta2), beta1, beta2, 1 - beta1, 1 - beta2, eps,
                *_decay(lr, weight_decay, decoupled), **shape, num_warps=NUM_WARPS)
            _set_steps[(triton.cdiv(B, STEPS),)](step, index, B, 0, HAS_INDEX=True, IS_ONE_MORE=True, BLOCK_N=STEPS,
                                                 num_warps=NUM_WARPS)


def row_catch_up_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor | None, history: Tensor,
                  now: int, beta1: float, beta2: float, eps: float, terms: int) -> None:
    """The primitive `row_catch_up_` of kernels/row_update.py."""
    rows = step if index is None else index
    B, D, shape = len(rows), table.shape[1], blocks(table.shape[1])
    if B and D and history.shape[1]:
        with torch.cuda.device_of(table):
            _catch_up[(triton.cdiv(B, shape["BLOCK_N"]),)](
                table, exp_avg, exp_avg_sq, step, rows, history, B, D, table.stride(0), exp_avg.stride(0),
                exp_avg_sq.stride(0), history.stride(0), now - history.shape[1] + 1, now, terms, _log2(beta1), _log2(beta2),
                eps, HAS_INDEX=index is not None, **shape, num_warps=NUM_WARPS)
            _set_steps[(triton.cdiv(B, STEPS),)](step, rows, B, now, HAS_INDEX=index is not None, IS_ONE_MORE=False,
                                                 BLOCK_N=STEPS, num_warps=NUM_WARPS)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


def _decay(lr: float, weight_decay: float, decoupled: bool) -> tuple[float, float]:
    """Weight decay of the gradient, and what decoupled weight decay leaves of a row."""
    return (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
