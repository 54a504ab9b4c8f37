"""Optimizer steps on some rows of a table: SGD with momentum, Adam, and the moves that dense Adam makes in between.

A table z `[N, D]` of representations gets the gradients g of the rows i of a mini-batch only, those of a row that occurs more
than once being summed. All ops write into their arguments, on those rows alone, in O(B·D) time and memory whatever N is.

`row_sgd_` (Schuster & Krogh 2021, Table 4, as in the authors' row-sparse code):

    v_i ← μ v_i − η g_i        z_i ← z_i + v_i

`row_adam_` (Kingma & Ba 2015, Alg. 1), with a step count t_i a row:

    t_i ← t_i + 1    m_i ← β1 m_i + (1 − β1) g_i    v_i ← β2 v_i + (1 − β2) g_i²
    z_i ← z_i − η m̂_i / (√v̂_i + ε),    m̂_i = m_i / (1 − β1^t_i),  v̂_i = v_i / (1 − β2^t_i)

Alone it is lazy Adam: a row that is not in the batch rests, and so do its moments. Dense Adam has a gradient of zero for such
a row, by which its moments decay and it moves on. `row_catch_up_` makes up for the n steps after t_i that it has missed:

    z_i ← z_i − m_i Σ_{j=1..n} η_{t_i+j} β1^j / (1 − β1^{t_i+j}) / (√v_i β2^{j/2} / √(1 − β2^{t_i+j}) + ε)
    m_i ← β1^n m_i        v_i ← β2^n v_i        t_i ← t_i + n

The weights of the sum are a row's, not an element's: a term costs one division. Terms fall at least as (β1 / √β2)^j, so the
sum ends where its rest is below the rounding of what it has: after 188 terms in float32 for betas of 0.9 and 0.999.

Weight decay λ is added to the gradient, g + λ z, or decoupled from it (Loshchilov & Hutter 2019): z ← (1 − η λ) z first. Under
catch-up only the latter has a closed form: by the products of 1 − η λ over the steps that a row has missed.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import FULL, check_floats, check_indices, check_shape
from .library import Primitive
from .reference import row_update as reference

SORTED = ("cuda", "triton")  # backends that take the index sorted; the C++ kernels sort for themselves


def row_sgd_(table: Tensor, velocity: Tensor | None, index: Tensor, grad: Tensor, *, lr: float, momentum: float = 0.0,
             weight_decay: float = 0.0, decoupled_weight_decay: bool = False, backend: str | None = None) -> None:
    """A step of SGD with momentum on some rows of `table`, in place.

    Args:
        table: `[N, D]`; the elements of a row next to one another, as of everything that is written to.
        velocity: `[N, D]`, zeros at the start, also written to; None for `momentum` 0.
        index: integers `[B]` in [0, N), in any order.
        grad: `[B, D]`; the gradients of a row that occurs more than once are summed.
        lr: η.
        momentum: μ.
        weight_decay: λ.
        decoupled_weight_decay: shrink the rows themselves instead of adding λ z to their gradients.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    No autograd: the step is not recorded. Time and memory O(B·D), whatever N is. A NaN spoils its row only. The same inputs
    give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or settings do not fit, or an index is out of range; nothing is written.
        BackendError: the backend asked for cannot serve the call.

    >>> table, velocity = torch.zeros(3, 1), torch.zeros(3, 1)
    >>> row_sgd_(table, velocity, torch.tensor([2, 0, 2]), torch.ones(3, 1), lr=0.5, momentum=0.9)
    >>> table.flatten()
    tensor([-0.5000,  0.0000, -1.0000])
    """
    op = "row_sgd_"
    _check_settings(op, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if velocity is None and momentum:
        raise ValueError(f"{op}: a momentum of {momentum} needs a velocity, e.g. torch.zeros_like(table).")
    _check_rows(op, table, velocity=velocity)
    index, grad = _check_gradient(op, table, index, grad)
    settings = lr, momentum, weight_decay, decoupled_weight_decay
    _step(SGD_OP, SGD, reference.row_sgd_, backend, (table, velocity), index, grad, settings)


def row_adam_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor, grad: Tensor, *, lr: float,
              betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
              decoupled_weight_decay: bool = False, backend: str | None = None) -> None:
    """A step of Adam on some rows of `table`, each with a step count of its own, in place.

    Args:
        table, index, grad, lr, weight_decay, decoupled_weight_decay, backend: as in `row_sgd_`.
        exp_avg, exp_avg_sq: `[N, D]`, the moments m and v; zeros at the start, also written to.
        step: int32 `[N]`, contiguous, the steps that each row has behind it; zeros at the start, also written to.
        betas, eps: β1, β2 and ε.

    Everything else as for `row_sgd_`.

    >>> table, mean, square, step = torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int32)
    >>> row_adam_(table, mean, square, step, torch.tensor([1]), torch.full((1, 1), 4.0), lr=0.5)
    >>> table.flatten(), step
    (tensor([ 0.0000, -0.5000,  0.0000]), tensor([0, 1, 0], dtype=torch.int32))
    """
    op = "row_adam_"
    _check_settings(op, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_betas(op, betas)
    _check_rows(op, table, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_step(op, table, step)
    index, grad = _check_gradient(op, table, index, grad)
    settings = lr, *betas, eps, weight_decay, decoupled_weight_decay
    _step(ADAM_OP, ADAM, reference.row_adam_, backend, (table, exp_avg, exp_avg_sq, step), index, grad, settings)


def row_catch_up_(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, index: Tensor | None, history: Tensor, *,
                  now: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, backend: str | None = None) -> None:
    """Brings some rows, or all, to where dense Adam would have them after step `now`, in place.

    Args:
        table, exp_avg, exp_avg_sq, step: as in `row_adam_`.
        index: integers `[B]` in [0, N); None for all rows.
        history: float64 `[3, H]`, what the steps now − H + 1, ..., now have in common: see `adam_history`. It must reach back
            to the oldest of the rows.
        now: the step that the table is at.
        betas, eps: of those steps.
        backend: as in `row_sgd_`.

    Rows that are at `now` already are left as they are. Time O(B·D·n) with n the missed steps of a row, at most
    `catch_up_terms` of them; memory O(B + H). No autograd. Errors as for `row_sgd_`.
    """
    op = "row_catch_up_"
    _check_settings(op, eps=eps)
    _check_betas(op, betas)
    _check_rows(op, table, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_step(op, table, step)
    if index is not None:
        index = _check_index(op, table, index)
    if history.dtype != torch.float64 or history.dim() != 2 or len(history) != 3 or history.device != table.device:
        raise ValueError(f"{op}: history must be float64 [3, H] on {table.device}, given {history.dtype} "
                         f"{list(history.shape)} on {history.device}.")

    name, written = CATCH_UP_OP.choose(table, backend), (table, exp_avg, exp_avg_sq, step)
    rows = index.sort().values if name in SORTED and index is not None else index
    args = rows, history, now, *betas, eps, catch_up_terms(betas, table.dtype)
    _run(CATCH_UP, reference.row_catch_up_, name, written, args, args, lambda: _check_ages(op, step, index, history, now))


def _check_ages(op: str, step: Tensor, index: Tensor | None, history: Tensor, now: int) -> None:
    if index is not None:
        check_indices(op, "index", index, 0, step.shape[0])
    check_indices(op, "step", step if index is None else step[index], now - history.shape[1], now + 1)


def adam_history(lrs: Sequence[float], first: int, betas: tuple[float, float] = (0.9, 0.999),
                 weight_decay: float = 0.0) -> Tensor:
    """What `row_catch_up_` needs of the steps first, first + 1, ... of dense Adam, of learning rates `lrs` `[H]` -> `[3, H]`.

    The rows are η_t / (1 − β1^t), 1 / √(1 − β2^t) and Σ log(1 − η_t λ) of decoupled weight decay λ, summed from `first` on.
    """
    entries, decayed = [], 0.0
    for t, lr in enumerate(lrs, first):
        entries.append(history_entry(t, lr, betas, weight_decay, decayed))
        decayed = entries[-1][2]
    return torch.tensor(entries, dtype=torch.float64).reshape(-1, 3).T.contiguous()


def history_entry(t: int, lr: float, betas: tuple[float, float], weight_decay: float,
                  decayed: float) -> tuple[float, float, float]:
    """Step t of `adam_history`; `decayed` is the sum of the step before it."""
    if lr * weight_decay >= 1:
        raise ValueError(f"lr · weight_decay must be below 1, given {lr} · {weight_decay}.")
    return lr / (1 - betas[0]**t), 1 / math.sqrt(1 - betas[1]**t), decayed + math.log1p(-lr * weight_decay)


def catch_up_terms(betas: tuple[float, float], dtype: torch.dtype) -> int:
    """How many of the moves of a row that rests change their sum in `dtype`; all of them if β1 ≥ √β2."""
    ratio = betas[0] / math.sqrt(betas[1]) if betas[1] else math.inf
    if not 0 < ratio < 1:
        return 0 if betas[0] == 0 else 2**31 - 1
    # A rest of ratio^n / (1 − ratio) beside a first term of one.
    return math.ceil(math.log(torch.finfo(dtype).eps / 4 * (1 - ratio)) / math.log(ratio))


def _check_settings(op: str, **settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: {name} must be at least 0 and finite, given {value}.")


def _check_betas(op: str, betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{op}: betas must be two numbers in [0, 1), given {betas}.")


def _check_rows(op: str, table: Tensor, **others: Tensor | None) -> None:
    """What is written to: float32 or float64 [N, D], all of one shape, the elements of a row next to one another."""
    if isinstance(table, Tensor) and table.dim() == 2 and table.dtype in FULL and table.is_contiguous():
        dtype, device, shape = table.dtype, table.device, table.shape
        for tensor in others.values():
            if tensor is not None and not (isinstance(tensor, Tensor) and tensor.dtype is dtype and tensor.shape == shape
                                           and tensor.is_contiguous() and tensor.device == device):
                break
        else:
            return
    written = {"table": table, **{name: tensor for name, tensor in others.items() if tensor is not None}}
    check_floats(op, "table", written)
    if table.dtype not in FULL:
        raise TypeError(f"{op}: table must be float32 or float64, given {table.dtype}.")
    if table.dim() != 2:
        raise ValueError(f"{op}: table must have shape [N, D], given {list(table.shape)}.")
    N, D = table.shape
    for name, tensor in written.items():
        check_shape(op, name, tensor, (N, D), "[N, D] as of table")
        if tensor.dtype != table.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but table is {table.dtype}; convert one of them.")
        row, column = tensor.stride()
        if (column != 1 and D > 1) or (row < D and N > 1):
            raise ValueError(f"{op}: the elements of a row of {name} must lie next to one another, given strides "
                             f"{(row, column)}; make it contiguous.")


def _check_step(op: str, table: Tensor, step: Tensor) -> None:
    N = table.shape[0]
    if step.dtype != torch.int32 or step.shape != (N,) or step.device != table.device or not step.is_contiguous():
        raise ValueError(f"{op}: step must be contiguous int32 [N] = [{N}] on {table.device}, given {step.dtype} "
                         f"{list(step.shape)} on {step.device}.")


def _check_gradient(op: str, table: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`index` and `grad` as the kernels read them."""
    index = _check_index(op, table, index)
    if not (isinstance(grad, Tensor) and grad.dtype is table.dtype and grad.device == table.device):
        check_floats(op, "table", {"table": table, "grad": grad})
        grad = grad.to(table.dtype)
    check_shape(op, "grad", grad, (index.shape[0], table.shape[1]), "[B, D] of index[B] and table[N, D]")
    return index, grad.contiguous()


def _check_index(op: str, table: Tensor, index: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
        raise TypeError(f"{op}: index must be a tensor of integers, given {getattr(index, 'dtype', type(index).__name__)}.")
    if index.dim() != 1:
        raise ValueError(f"{op}: index must have shape [B], given {list(index.shape)}.")
    if index.device != table.device:
        raise ValueError(f"{op}: index is on {index.device} but table is on {table.device}; move one of them.")
    return index.long().contiguous()


def _step(op: Op, primitive: Primitive, formula: Callable, backend: str | None, written: tuple[Tensor | None, ...],
          index: Tensor, grad: Tensor, settings: tuple) -> None:
    name, rows, order = op.choose(written[0], backend), index, None
    if name in SORTED:
        rows, order = index.sort(stable=True)
    _run(primitive, formula, name, written, (rows, order, grad, *settings), (index, grad, *settings),
         lambda: check_indices(op.name, "index", index, 0, written[0].shape[0]))


def _run(primitive: Primitive, formula: Callable, name: str, written: tuple[Tensor | None, ...], args: tuple,
         formula_args: tuple, check_ranges: Callable[[], None]) -> None:
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _run(primitive, formula, name, written, args, formula_args, check_ranges)
    if name != "cpp":
        check_ranges()
    if name == "reference":
        return formula(*written, *formula_args)
    try:
        primitive(name, *written, *args)
    except RuntimeError:
        check_ranges()  # the C++ kernels look for themselves before they write, without words for what is wrong
        raise
    if not torch.compiler.is_compiling() and not written[0].is_inference():
        torch.autograd.graph.increment_version(written[0])


def _fake(*_args) -> None:
    return None


# On CUDA `index` is sorted and `order` has the positions of its gradients; on CPU `order` is None and `index` in any order.
SGD = Primitive("row_update", "row_sgd_", "(Tensor(a!) table, Tensor(b!)? velocity, Tensor index, Tensor? order, Tensor grad, "
                "float lr, float momentum, float weight_decay, bool decoupled) -> ()", _fake)
ADAM = Primitive("row_update", "row_adam_", "(Tensor(a!) table, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, "
                 "Tensor index, Tensor? order, Tensor grad, float lr, float beta1, float beta2, float eps, "
                 "float weight_decay, bool decoupled) -> ()", _fake)
# `terms` moves of a row at most; on CUDA `index` is sorted.
CATCH_UP = Primitive("row_update", "row_catch_up_", "(Tensor(a!) table, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
                     "Tensor(d!) step, Tensor? index, Tensor history, int now, float beta1, float beta2, float eps, "
                     "int terms) -> ()", _fake)

SUPPORT = {
    "cpp": Support(("cpu",), FULL),
    "triton": Support(("cuda",), (torch.float32,)),
    "cuda": Support(("cuda",), (torch.float32,)),
}
SGD_OP = register(Op("row_sgd_", "row_sgd_", SUPPORT))
ADAM_OP = register(Op("row_adam_", "row_adam_", SUPPORT))
CATCH_UP_OP = register(Op("row_catch_up_", "row_catch_up_", SUPPORT))
