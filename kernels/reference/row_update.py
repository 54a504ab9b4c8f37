"""Reference of the row updates: one gradient a row first, then gather, compute, scatter."""

import torch
from torch import Tensor


def summed(index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of `index` `[B]`, and the sums of their gradients `[B, D]`."""
    rows, position = torch.unique(index, return_inverse=True)
    return rows, grad.new_zeros(len(rows), grad.shape[1]).index_add_(0, position, grad)


def row_sgd_(table: Tensor, velocity: Tensor | None, index: Tensor, grad: Tensor, lr: float, momentum: float,
             weight_decay: float, decoupled: bool) -> None:
    rows, grad = summed(index, grad)
    z = table[rows]
    grad, z = (grad, z * (1 - lr * weight_decay)) if decoupled else (grad + weight_decay * z, z)
    move = -lr * grad
    if velocity is not None:
        move = move + momentum * velocity[rows]
        velocity[rows] = move
    table[rows] = z + move


def row_adam_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor, grad: Tensor, lr: float,
              beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool) -> None:
    rows, grad = summed(index, grad)
    step[rows] += 1
    z, t = table[rows], step[rows, None].double()
    grad, z = (grad, z * (1 - lr * weight_decay)) if decoupled else (grad + weight_decay * z, z)
    exp_avg[rows] = mean = beta1 * exp_avg[rows] + (1 - beta1) * grad
    exp_avg_sq[rows] = square = beta2 * exp_avg_sq[rows] + (1 - beta2) * grad * grad
    rate, root = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
    table[rows] = z - rate.to(z) * mean / (square.sqrt() / root.to(z) + eps)


def row_catch_up_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor | None, history: Tensor,
                  now: int, beta1: float, beta2: float, eps: float, terms: int) -> None:
    """One step after the other, each on the rows that it is new to; `terms` cuts nothing here."""
    rates, roots, _ = history.to(table.dtype)
    kept = torch.diff(history[2], prepend=history.new_zeros(1)).exp().to(table.dtype)
    chosen = torch.arange(len(table), device=table.device) if index is None else index.unique()
    for i, t in enumerate(range(now - len(rates) + 1, now + 1)):
        rows = chosen[step[chosen] == t - 1]
        exp_avg[rows] = mean = beta1 * exp_avg[rows]
        exp_avg_sq[rows] = square = beta2 * exp_avg_sq[rows]
        table[rows] = table[rows] * kept[i] - rates[i] * mean / (square.sqrt() * roots[i] + eps)
        step[rows] = t
