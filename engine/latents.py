"""Representations as parameters: one row a training sample, its optimizers, and MAP inference for new samples.

A step moves the rows of its mini-batch only, by the ops of `kernels.row_update`:

    RowSGD        SGD with momentum on those rows (Schuster & Krogh 2021, §2.1 and Table 4)
    RowAdam       Adam on those rows, each with a step count of its own: lazy Adam, as `torch.optim.SparseAdam` is in spirit
    CatchUpAdam   dense Adam (`torch.optim.Adam`): a row makes up for the steps it has missed when it is read
    EpochAdam     dense Adam once an epoch, on the gradients of all its batches (the published DGD packages)

`LatentTable` gathers with a sparse gradient, so that a step costs O(batch · D) whatever the table's size; in a memory-mapped
file (`mapped`) the table and what its optimizer keeps may be larger than memory. A table in such a file or in pinned memory
(`start.pin_memory()`) stays there when its module moves to a GPU: the rows of a batch go there, and their gradients come back.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions.transforms import SigmoidTransform, TanhTransform, Transform, identity_transform
from torch.nn import functional as F

from .kernels.row_update import history_entry, row_adam_, row_catch_up_, row_sgd_

TRANSFORMS: dict[str, Transform] = {
    "identity": identity_transform, "sigmoid": SigmoidTransform(), "tanh": TanhTransform()}


class _Behind:
    """Attribute of a parameter while its rows may be behind their optimizer. Pickles of the parameter are without it."""

    def __init__(self, optimizer: "CatchUpAdam") -> None:
        self.optimizer = optimizer

    def __reduce__(self) -> tuple:
        return type(None), ()


def catch_up(param: Tensor, index: Tensor | None = None) -> None:
    """Brings rows of a parameter, or all, to the step that its `CatchUpAdam` is at; without one there is nothing to do."""
    behind = getattr(param, "_behind", None)
    if behind is not None:
        behind.optimizer.catch_up(param, index)


def mapped(path: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype = torch.float32, *,
           room: int = 2) -> Tensor:
    """A tensor `[N, D]` of zeros in a memory-mapped file, made anew: fill it in place, and start a `LatentTable` from it.

    Args:
        room: so many rows more have room beside each row, in the same pages of the file. The first row optimizer of the table
            keeps its state there: `RowSGD` needs 1, `RowAdam` and `CatchUpAdam` 2, `EpochAdam` 3. What finds no room is in
            files of its own, `<path>.exp_avg` for instance, and costs reads of the disk of its own.

    The files are working memory: after a crash they hold rows of any age, and a checkpoint, which is a copy, is what a run
    continues from.

    Raises:
        ValueError: a shape other than [N, D], or a negative room.
        OSError: there is no room for the file, which is claimed at once (on Linux).
    """
    if len(shape) != 2:
        raise ValueError(f"A mapped table has a shape [N, D], given {list(shape)}.")
    if room < 0:
        raise ValueError(f"The room beside each row must be at least 0, given {room}.")
    rows, dim = shape
    table, *beside = _map_file(path, (rows, 1 + room, dim), dtype).unbind(1)
    table.beside = tuple(beside)
    return table


def _map_file(path: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    Path(path).unlink(missing_ok=True)  # what is mapped from a file of that name stays as it is
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, empty.nbytes)
        else:
            file.truncate(empty.nbytes)
    tensor = torch.from_file(os.fspath(path), shared=True, size=empty.numel(), dtype=dtype)
    if hasattr(mmap, "MADV_RANDOM"):
        # A row that is not in memory else brings its neighbours too: with 2 GB for 7.2 GB over 10 s a step, not 0.2 s.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), mmap.MADV_RANDOM)
    return tensor.view(empty.shape)


def _file(tensor: Tensor) -> str | None:
    return tensor.untyped_storage().filename if tensor.device.type == "cpu" else None


def _state_like(param: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Zeros like `param`, by name; of a mapped parameter in the room beside its rows, which it takes, else mapped too."""
    if _file(param) is None:
        return {name: torch.zeros_like(param) for name in names}
    beside, param.beside = getattr(param, "beside", ())[:len(names)], ()
    files = {name: _map_file(f"{_file(param)}.{name}", param.shape, param.dtype) for name in names[len(beside):]}
    return dict(zip(names, beside, strict=False)) | files


class LatentTable(nn.Module):
    """The representations z = g(h) `[N, D]` of N training samples; h is what is learned.

    Args:
        start: the initial h `[N, D]`.
        transform: g: "identity", or "sigmoid" or "tanh" for representations constrained to an interval (§2.1).
    """

    def __init__(self, start: Tensor, transform: str = "identity") -> None:
        super().__init__()
        if start.dim() != 2:
            raise ValueError(f"A latent table starts from a tensor [N, D], given {list(start.shape)}.")
        if transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, given {transform!r}.")
        self.transform = TRANSFORMS[transform]
        self.h = nn.Parameter(start)
        self.h.beside = getattr(start, "beside", ())  # tensors like h in the room beside its rows, of a `mapped` one

    def forward(self, index: Tensor) -> Tensor:
        """z of the rows `index` `[B]` -> `[B, D]`, on the device of `index`; the gradient of h is sparse."""
        rows = index.to(self.h.device)
        catch_up(self.h, rows)
        return self.transform(F.embedding(rows, self.h, sparse=True).to(index.device))

    @property
    def z(self) -> Tensor:
        """All representations `[N, D]`, without gradient."""
        return self.transform(self.learned)

    @property
    def learned(self) -> Tensor:
        """h of all rows `[N, D]`, without gradient."""
        catch_up(self.h)
        return self.h.detach()

    @torch.no_grad()
    def normalize_(self) -> None:
        """Shifts and scales h to mean zero and variance one in each dimension (§2.3)."""
        catch_up(self.h)
        self.h.sub_(self.h.mean(0)).div_(self.h.std(0, correction=0).clamp_min(torch.finfo(self.h.dtype).tiny))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LatentTable":
        stays = _file(self.h) is not None or (self.h.device.type == "cpu" and self.h.is_pinned())
        return self if stays else super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        catch_up(self.h)  # for copies and pickles
        return super().__getstate__()

    def _save_to_state_dict(self, *args) -> None:
        catch_up(self.h)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args) -> None:
        catch_up(self.h)  # what rows have missed must not move those that take their place
        super()._load_from_state_dict(*args)


class RowOptimizer(torch.optim.Optimizer):
    """Steps the rows that have a gradient; the gradients of a row that occurs more than once are summed.

    Parameters are tables `[N, D]` with sparse gradients. What is kept of them is there from the start, in files beside the
    table where that is `mapped`.
    """

    row_state: tuple[str, ...]  # what is kept of each element, by name

    def __init__(self, params: Iterable[Tensor], **defaults: object) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dim() != 2:
                raise ValueError(f"{type(self).__name__} steps the rows of tables [N, D], given a parameter "
                                 f"{list(param.shape)}.")
            self.state[param] = self._new_state(param)

    def load_state_dict(self, state_dict: dict) -> None:
        own = dict(self.state)
        super().load_state_dict(state_dict)
        for param, state in own.items():
            for name, tensor in state.items():
                tensor.copy_(self.state[param][name].reshape(tensor.shape))
            self.state[param] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure.")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not param.grad.is_sparse:
                    raise TypeError(f"{type(self).__name__} steps the rows of a sparse gradient, given a dense one; "
                                    "gather rows with LatentTable or with sparse=True.")
                self._move(param, param.grad._indices()[0], param.grad._values(), self.state[param], group)

    def end_epoch(self) -> None:
        """To be called after each pass over the data, before the table is read as a whole."""

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        return _state_like(param, self.row_state)

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        raise NotImplementedError


class RowSGD(RowOptimizer):
    """SGD with momentum on the rows of the batch: the velocity of the other rows rests until they are seen again.

        v_i ← μ v_i − η g_i,    z_i ← z_i + v_i

    `weight_decay` λ adds λ z_i to g_i.
    """

    row_state = ("velocity",)

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, momentum: float = 0.9,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        row_sgd_(param, state["velocity"], index, grad, lr=group["lr"], momentum=group["momentum"],
                 weight_decay=group["weight_decay"])


class RowAdam(RowOptimizer):
    """Adam on the rows of the batch, each with a step count of its own (lazy: a row that rests keeps its moments).

    Args:
        weight_decay: λ, added to the gradient as λ z (Adam), or with `decoupled_weight_decay` taken off the rows as η λ z
            (AdamW); either way when a row is in the batch.
    """

    row_state = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, decoupled_weight_decay: bool = False) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         decoupled_weight_decay=decoupled_weight_decay)

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        path, steps = _file(param), (len(param),)
        step = torch.zeros(steps, dtype=torch.int32, device=param.device) if path is None else _map_file(
            f"{path}.step", steps, torch.int32)
        return super()._new_state(param) | {"step": step}

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        row_adam_(param, state["exp_avg"], state["exp_avg_sq"], state["step"], index, grad, lr=group["lr"],
                  betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                  decoupled_weight_decay=group["decoupled_weight_decay"])


@dataclass
class _Clock:
    """The step that a table is at, and those that some rows may have missed."""

    now: int
    betas: tuple[float, float]
    eps: float
    missed: int = 0
    decayed: float = 0.0  # Σ log(1 − η λ) over the missed steps
    history: Tensor = field(default_factory=lambda: torch.empty(3, 64, dtype=torch.float64))  # see `adam_history`

    def tick(self, lr: float, weight_decay: float) -> None:
        if self.missed == self.history.shape[1]:
            self.history = torch.cat([self.history, torch.empty_like(self.history)], 1)
        self.now += 1
        entry = history_entry(self.now, lr, self.betas, weight_decay, self.decayed)
        self.history[:, self.missed] = torch.tensor(entry, dtype=torch.float64)
        self.missed, self.decayed = self.missed + 1, entry[2]


class CatchUpAdam(RowAdam):
    """Dense Adam, `torch.optim.Adam` and with weight decay `torch.optim.AdamW`, at the cost of the rows that are read.

    The moments of a row outside the batch decay and move it, as a gradient of zero does in dense Adam. A row makes up for that
    when it is next read through `LatentTable` or stepped; `LatentTable.z`, `state_dict` and `end_epoch` bring all rows to the
    present. Learning rates and weight decay may change at every step. A table has one such optimizer; whoever reads the
    parameter itself calls `catch_up` first.

    Weight decay is decoupled: one that is added to the gradient has no closed form over the steps that a row has missed.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, decoupled_weight_decay: bool = True) -> None:
        self._clocks: dict[Tensor, _Clock] = {}
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError("CatchUpAdam: weight decay that is added to the gradient has no closed form over the steps that "
                             "a row has missed; pass decoupled_weight_decay=True, or use RowAdam.")
        for param in group["params"]:
            catch_up(param)  # with an optimizer before this one

    @torch.no_grad()
    def catch_up(self, param: Tensor, index: Tensor | None = None) -> None:
        """Brings the rows `index` `[B]`, or all, to the step that the optimizer is at."""
        clock, state = self._clocks.get(param), self.state[param]
        if clock is None or clock.missed == 0:
            return
        row_catch_up_(param, state["exp_avg"], state["exp_avg_sq"], state["step"], index,
                      clock.history[:, :clock.missed].to(param.device), now=clock.now, betas=clock.betas, eps=clock.eps)
        if index is None:
            clock.missed, clock.decayed, param._behind = 0, 0.0, None

    def end_epoch(self) -> None:
        for param in self._clocks:
            self.catch_up(param)

    def state_dict(self) -> dict:
        self.end_epoch()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._clocks.clear()

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        clock = self._clocks.get(param)
        if clock is None:
            clock = self._clocks[param] = _Clock(int(state["step"].max()), group["betas"], group["eps"])
        if (clock.betas, clock.eps) != (group["betas"], group["eps"]):
            self.catch_up(param)
            clock.betas, clock.eps = group["betas"], group["eps"]
        self.catch_up(param, index)
        super()._move(param, index, grad, state, group)
        clock.tick(group["lr"], group["weight_decay"])
        param._behind = _Behind(self)


class EpochAdam(RowAdam):
    """Dense Adam once an epoch: `step` adds up the gradients of the batches, `end_epoch` moves every row by their sum.

    So do the published DGD packages (dgd, scDGD, multiDGD, bulkDGD), with betas of 0.5 and 0.7 (bulkDGD: 0.9). A row is
    seen once an epoch, so their sum is that row's one gradient.
    """

    row_state = ("exp_avg", "exp_avg_sq", "grad_sum")

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, decoupled_weight_decay: bool = False) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay)
        self._summed: set[Tensor] = set()  # those with gradients in this epoch

    @torch.no_grad()
    def end_epoch(self) -> None:
        for group in self.param_groups:
            for param in self._summed.intersection(group["params"]):
                state = self.state[param]
                super()._move(param, torch.arange(len(param), device=param.device), state["grad_sum"], state, group)
                state["grad_sum"].zero_()
        self._summed.clear()

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        row_sgd_(state["grad_sum"], None, index, -grad, lr=1.0)
        self._summed.add(param)


def map_inference(log_joint: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 100,
                  lr: float = 0.05) -> Tensor:
    """Maximises `log_joint` over each row of `start` by Adam, everything else held fixed (§2.2); also under torch.no_grad.

    Args:
        log_joint: `[N, D]` -> `[N]`, each row's value depending on that row alone.
        start: `[N, D]`.
        steps, lr: of Adam; lr is about the distance that a row moves in its first steps.

    Returns:
        `[N, D]`: for each row the best point visited, so never a worse one than `start`.
    """
    h = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([h], lr=lr)
    best, best_value = h.detach().clone(), h.new_full((len(h),), -torch.inf)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            value = log_joint(h)
        better = value.detach() > best_value
        best_value = torch.where(better, value.detach(), best_value)
        best = torch.where(better[:, None], h.detach(), best)
        if step < steps:
            (h.grad,) = torch.autograd.grad(value, h, -torch.ones_like(value))
            optimizer.step()
    return best
