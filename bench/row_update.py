"""Cases and peers of the row updates: a step on the rows of a batch, against dense optimizers, SparseAdam and indexing."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import _functional

from latent_engine.kernels import adam_history, row_adam_, row_catch_up_, row_sgd_
from latent_engine.kernels.row_update import catch_up_terms

from .suite import Suite
from .timing import Work

# name: (B, N, D), a batch of B rows of N
CASES = {"dgd-step": (32, 5000, 2), "table": (4096, 10**6, 64)}
RANGE = 2**19  # of the rows that batches are from
LR, BETAS, EPS, MOMENTUM = 1e-2, (0.9, 0.999), 1e-8, 0.9


def batch(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows without repetition, as of an epoch, in random order; and their gradients."""
    B, N, D = CASES[case]
    generator = torch.Generator().manual_seed(0)
    index, grad = torch.randperm(min(N, RANGE), generator=generator)[:B], torch.randn(B, D, generator=generator)
    return index.to(device), grad.to(device, dtype)


def next_batch(table: Tensor, index: Tensor) -> Tensor:
    """Other rows at each call, in place, where a table is larger than the cache: rows just stepped would be in it."""
    return index if len(table) < RANGE else index.add_(len(index)).bitwise_and_(RANGE - 1)


def state(case: str, dtype: torch.dtype, device: str, count: int) -> tuple[Tensor, ...]:
    """The table and its moments, of zeros: what is compared is how rows have moved."""
    _, N, D = CASES[case]
    return tuple(torch.zeros(N, D, dtype=dtype, device=device) for _ in range(count))


def sgd_inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return *state(case, dtype, device, 2), *batch(case, dtype, device)


def adam_inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    step = torch.zeros(CASES[case][1], dtype=torch.int32, device=device)
    return *state(case, dtype, device, 3), step, *batch(case, dtype, device)


def work(case: str, arrays: int, terms: int = 0) -> Work:
    """Every row of `arrays` arrays read and written, its gradient, index and step read; 2 multiplications a term of catching
    up."""
    B, _, D = CASES[case]
    return Work(B * (4 * D * (2 * arrays + 1) + 8 + (8 if arrays == 3 else 0)), 2 * terms * B * D, 0)


def sgd_step(table: Tensor, velocity: Tensor, index: Tensor, grad: Tensor, backend: str | None = None) -> Tensor:
    row_sgd_(table, velocity, next_batch(table, index), grad, lr=LR, momentum=MOMENTUM, backend=backend)
    return table


def plain_sgd(table: Tensor, velocity: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """As one writes it with indexing."""
    index = next_batch(table, index)
    velocity[index] = MOMENTUM * velocity[index] - LR * grad
    table[index] += velocity[index]
    return table


def scattered_sgd(table: Tensor, velocity: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """With as few passes as indexing has."""
    index = next_batch(table, index)
    move = velocity.index_select(0, index).mul_(MOMENTUM).sub_(grad, alpha=LR)
    velocity.index_copy_(0, index, move)
    return table.index_add_(0, index, move)


def adam_step(table: Tensor, mean: Tensor, square: Tensor, step: Tensor, index: Tensor, grad: Tensor,
              backend: str | None = None) -> Tensor:
    row_adam_(table, mean, square, step, next_batch(table, index), grad, lr=LR, betas=BETAS, eps=EPS, backend=backend)
    return table


def plain_adam(table: Tensor, mean: Tensor, square: Tensor, step: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """As one writes it with indexing."""
    beta1, beta2 = BETAS
    index = next_batch(table, index)
    step[index] += 1
    mean[index] = beta1 * mean[index] + (1 - beta1) * grad
    square[index] = beta2 * square[index] + (1 - beta2) * grad.square()
    t = step[index, None]
    table[index] -= LR * mean[index] / (1 - beta1**t) / ((square[index] / (1 - beta2**t)).sqrt() + EPS)
    return table


def scattered_adam(table: Tensor, mean: Tensor, square: Tensor, step: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """With as few passes as indexing has."""
    beta1, beta2 = BETAS
    index = next_batch(table, index)
    t = step.index_select(0, index).add_(1)
    m = mean.index_select(0, index).lerp_(grad, 1 - beta1)
    v = square.index_select(0, index).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    for array, rows in ((step, t), (mean, m), (square, v)):
        array.index_copy_(0, index, rows)
    scale = v.div(1 - beta2 ** t[:, None]).sqrt_().add_(EPS)
    return table.index_add_(0, index, m.div(1 - beta1 ** t[:, None]).div_(scale), alpha=-LR)


def dense_sgd(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], Tensor]:
    """`torch.optim.SGD` on the whole table."""
    table, _, index, grad = tensors
    return _dense_steps(torch.optim.SGD([table], lr=LR, momentum=MOMENTUM, fused=True), table, index, grad)


def dense_adam(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], Tensor]:
    """`torch.optim.Adam` on the whole table."""
    table, mean, square, step, index, grad = tensors
    optimizer = torch.optim.Adam([table], lr=LR, betas=BETAS, eps=EPS, fused=True)
    optimizer.state[table] = {"step": step[0].float(), "exp_avg": mean, "exp_avg_sq": square}
    return _dense_steps(optimizer, table, index, grad)


def _dense_steps(optimizer: torch.optim.Optimizer, table: Tensor, index: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Steps with the gradient of the whole table as the backward pass of indexing makes it."""
    def call() -> Tensor:
        table.grad = torch.zeros_like(table).index_add_(0, next_batch(table, index), grad)
        optimizer.step()
        return table

    return call


def sparse_adam(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], Tensor]:
    """What `torch.optim.SparseAdam` calls, with the gradient of an embedding."""
    table, mean, square, _, index, grad = tensors
    count = 0

    @torch.no_grad()
    def call() -> Tensor:
        nonlocal count
        count += 1
        sparse = torch.sparse_coo_tensor(next_batch(table, index)[None], grad, table.shape, check_invariants=False)
        _functional.sparse_adam([table], [sparse], [mean], [square], [count], eps=EPS, beta1=BETAS[0], beta2=BETAS[1], lr=LR,
                                maximize=False)
        return table

    return call


def missed_steps(case: str) -> int:
    """Steps from one visit of a row to the next."""
    B, N, _ = CASES[case]
    return N // B


def caught_up_adam_step(table: Tensor, mean: Tensor, square: Tensor, step: Tensor, index: Tensor, grad: Tensor,
                        history: Tensor, backend: str | None = None) -> Tensor:
    """A step of dense Adam on rows that were last seen an epoch ago."""
    index = next_batch(table, index)
    step.index_fill_(0, index, 0)
    row_catch_up_(table, mean, square, step, index, history, now=history.shape[1], betas=BETAS, eps=EPS, backend=backend)
    row_adam_(table, mean, square, step, index, grad, lr=LR, betas=BETAS, eps=EPS, backend=backend)
    return table


def caught_up_inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    table, mean, *rest = adam_inputs(case, dtype, device)
    mean.fill_(1e-30)  # moves nothing, but rows of zeros would have nothing to catch up with
    return table, mean, *rest, adam_history([LR] * missed_steps(case), 1, BETAS).to(device)


def later_dense_adam(tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], Tensor]:
    """`dense_adam` after the steps of the history."""
    *tensors, history = tensors
    tensors[3].fill_(history.shape[1])
    return dense_adam(tuple(tensors), backward)


def terms(case: str) -> int:
    return min(missed_steps(case), catch_up_terms(BETAS, torch.float32))


COMMON = {"sizes": ("B", "N", "D"), "plain_bytes": lambda case: 0, "directions": (False,), "in_place": True}

SUITES = (
    Suite(op=sgd_step, cases=CASES, inputs=sgd_inputs, work=lambda case, backward: work(case, 2), plain=plain_sgd,
          formulas={"plain": plain_sgd, "scatter": scattered_sgd}, builders={"dense SGD": dense_sgd}, **COMMON),
    Suite(op=adam_step, cases=CASES, inputs=adam_inputs, work=lambda case, backward: work(case, 3), plain=plain_adam,
          formulas={"plain": plain_adam, "scatter": scattered_adam},
          builders={"SparseAdam": sparse_adam, "dense Adam": dense_adam}, **COMMON),
    Suite(op=caught_up_adam_step, cases=CASES, inputs=caught_up_inputs,
          work=lambda case, backward: work(case, 3, terms(case)),
          plain=lambda *tensors: caught_up_adam_step(*tensors, backend="reference"), formulas={},
          builders={"dense Adam": later_dense_adam}, **COMMON),
)
