"""The training loop: phases, their optimizers, averaged weights, validation, records, checkpoints and resume.

The order of the rows is a pure function of (seed, epoch), and the random generators are seeded anew at each optimizer
step: a run that was interrupted continues from its last checkpoint to the same bits as one that was not (on CPU, with
the same number of threads).
"""

import contextlib
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import RunDirectory, describe
from .data import Data, batch_order
from .latents import CatchUpAdam, EpochAdam, LatentTable, RowAdam, RowOptimizer, RowSGD, catch_up
from .logs import Progress
from .system import Batch, OptimizerConfig, Phase, System
from .validation import Means, Validation, on_device, plateaus, reseed, validation_rows

WATCHED = 500  # training rows that `System.monitor` sees

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], OptimizerConfig], torch.optim.Optimizer]] = {
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True),
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True),
    "row_adam": lambda p, c: RowAdam(p, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay),
    "row_adam_catch_up": lambda p, c: CatchUpAdam(p, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay),
    "row_adam_epoch": lambda p, c: EpochAdam(p, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay),
    "row_sgd": lambda p, c: RowSGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay),
}


@dataclass(frozen=True)
class TrainConfig:
    """Defaults: the MNIST training of Schuster & Krogh 2021 (A.7).

    Step decay of the learning rates: lr_stage_epochs=30, lr_decay=0.1; halved at each plateau of the validation loss that
    lasts 20 epochs: lr_patience=20, lr_decay=0.5. The stages of Burda et al. 2016, 3^i passes at
    lr · 10^(−i/7) for i = 0, ..., 7: epochs=3280, lr_stage_epochs=1, lr_stage_growth=3, lr_decay=10 ** (-1 / 7).
    """

    epochs: int = 100
    batch_size: int = 32
    seed: int = 0
    checkpoint_every: int = 1  # epochs
    clip_norm: float | None = None  # largest Euclidean norm of the gradient of a loss, over all children that step
    ema_decay: float | None = None  # of a moving average of the weights, which is then what is validated and kept
    lr_stage_epochs: int | None = None  # length of the first stage of the learning rates, in each phase
    lr_stage_growth: int = 1  # a stage is so many times as long as the one before it
    lr_patience: int | None = None  # epochs without a lower validation loss that end a stage, in each phase, instead
    lr_decay: float = 1.0  # a stage has so many times the learning rates of the one before it
    validation: float = 0.0  # rows to hold out: a fraction if below 1, else their number
    patience: int | None = None  # stop after so many epochs of the last phase without a lower validation loss

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1), ("lr_stage_epochs", 1),
                          ("lr_stage_growth", 1), ("lr_patience", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, given {value}.")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2**64, given {self.seed}.")
        for name, high in (("clip_norm", math.inf), ("ema_decay", 1), ("lr_decay", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 < value < high:
                raise ValueError(f"{name} must lie between 0 and {high}, given {value}.")
        staged = self.lr_stage_epochs is not None or self.lr_stage_growth > 1
        if self.lr_patience is not None and (staged or self.lr_decay == 1):
            raise ValueError("lr_patience needs an lr_decay other than 1, and takes the place of lr_stage_epochs and "
                             f"lr_stage_growth; given {self.lr_decay}, {self.lr_stage_epochs} and {self.lr_stage_growth}.")
        if self.lr_patience is None and (staged if self.lr_decay == 1 else self.lr_stage_epochs is None):
            raise ValueError("Stages of the learning rates need both lr_stage_epochs, the length of the first, and an "
                             f"lr_decay other than 1; given {self.lr_stage_epochs} and {self.lr_decay}.")
        if not (0 <= self.validation < 1 or self.validation % 1 == 0 < self.validation):
            raise ValueError(f"validation must be a fraction below 1 or a number of rows, given {self.validation}.")

    def lr_factor(self, epoch: int, losses: Sequence[float] = ()) -> float:
        """What the learning rates of a phase are multiplied by in its `epoch`, from 1, after the validation `losses` before."""
        if self.lr_patience is not None:
            return self.lr_decay ** plateaus(losses, self.lr_patience)
        stage, last, length = 0, self.lr_stage_epochs or math.inf, self.lr_stage_epochs
        while epoch > last:
            stage, length = stage + 1, length * self.lr_stage_growth
            last += length
        return self.lr_decay**stage


def fit(system: System, data: Data, config: TrainConfig | None = None, *, validation: Data | None = None,
        run_dir: str | os.PathLike[str] | None = None, resume: bool = False, progress: bool = True) -> list[dict]:
    """Trains `system` in place on `data`, on the device of the system, and leaves it in evaluation mode.

    It ends with the weights of the lowest validation loss if there is validation, with those of the last epoch if there
    is none; with `ema_decay` they are averages: w̄ ← d w̄ + (1 − d) w after each step, from the initial weights.

    Args:
        data: float32 rows, e.g. `load("mnist5k").pixels("threshold")`.
        config: epochs, batch size, seed and options; the paper's where it is left out.
        validation: rows to validate on after each epoch, instead of those that the configuration holds out.
        run_dir: where to keep config.json, env.json, metrics.jsonl and the latest and the best checkpoint; None keeps none.
        resume: continue the run in `run_dir`, or start it if there is none; its configuration must be the same, but for
            the number of epochs. An interrupt costs at most the epochs since the last checkpoint.
        progress: show a bar, or plain lines where there is no terminal.

    Returns:
        A record an epoch: "epoch", "step", "seconds" (of the epoch), each term of the loss as a mean over the rows, and what
        `System.summarize` adds to them; those of the validation loss as "validation/total" and so on, with the same random
        numbers at every epoch; what `System.monitor` says of 500 training rows.

    Raises:
        ValueError: the data do not fit the system, a batch has too few rows for it, there is no validation loss, or a phase
            begins after the last epoch.
        CheckpointError: see `RunDirectory`; raised before training starts.
        FloatingPointError: the loss of an epoch is not finite. The last checkpoint is from before it.
    """
    config = config or TrainConfig()
    if not len(data):
        raise ValueError("There are no rows to train on.")
    system.check(data)
    if resume and run_dir is None:
        raise ValueError("resume=True needs run_dir, the folder of the run to continue.")
    rows, held_out = validation_rows(system, data, validation, config)
    _check_batches(system, len(data) if rows is None else len(rows), config.batch_size)
    phases = system.phases()
    _check_reached(phases, config.epochs)
    optimizers = make_optimizers(system, phases)
    average = _Average(system, config.ema_decay)
    check = None if held_out is None else Validation(system, held_out, config)
    watched = _watched(system, data, rows)
    run, step, done, records, state = None, 0, 0, [], {}
    if run_dir is not None:
        run = RunDirectory(run_dir, {**describe(system), "train": config, "data": identity(data),
                                     "validation": validation and identity(validation)}, resume)
        step, done, records = _continue(run, system, optimizers, average, check)
    loop = _Loop(system, phases, optimizers, average, data, rows, config)
    bar = Progress(config.epochs, loop.steps_per_epoch, done, progress)
    system.train()
    try:
        while done < config.epochs and not (check and check.exhausted(done)):
            done, start = done + 1, time.perf_counter()
            terms = loop.epoch(done, step, [r["validation/total"] for r in records] if check else [], bar.step)
            step += loop.steps_per_epoch
            with average.in_place():
                terms |= check.epoch(done, step) if check else {}
                state = _monitor(system, watched, config.seed)
            record = {"epoch": done, "step": step, "seconds": round(time.perf_counter() - start, 3), **terms}
            if not all(math.isfinite(v) for v in terms.values()):
                raise FloatingPointError(f"The loss of epoch {done} is not finite ({terms}). "
                                         "Lower a learning rate, or look for NaN in the data.")
            bar.epoch(record)
            record |= state
            records.append(record)
            if run is not None:
                run.metrics.append(record)
                if done % config.checkpoint_every == 0 or done == config.epochs or (check and check.is_due(done)):
                    run.save(step, done, system, optimizers, average.tensors, check and check.best)
        for text in (value for value in state.values() if isinstance(value, str)):
            bar.note(text)
        if check and check.best:
            system.load_state_dict(check.weights)
            bar.note(f"Weights of epoch {check.best.epoch}, the best on validation (loss {check.best.score:.6g}), "
                     f"after {done} epochs.")
        else:
            average.swap()
    finally:
        bar.close()
        loop.free(optimizers)
        system.eval()
    return records


def _watched(system: System, data: Data, rows: Tensor | None) -> Tensor:
    """Up to `WATCHED` training rows, spread over the data."""
    chosen = torch.arange(len(data)) if rows is None else rows
    return on_device(data.take(chosen[:: math.ceil(len(chosen) / WATCHED)]).fixed(), system)[0]


def _monitor(system: System, x: Tensor, seed: int) -> dict[str, Any]:
    reseed(x.device, seed, 0, -2, 0)
    system.eval()
    state = system.monitor(x)
    system.train()
    return state


def _check_batches(system: System, rows: int, batch_size: int) -> None:
    last = (rows - 1) % batch_size + 1
    if last < system.smallest_batch:
        raise ValueError(f"This {type(system).__name__} compares the rows of a batch with each other and needs "
                         f"{system.smallest_batch} of them, but of {rows} rows in batches of {batch_size} the last has {last}: "
                         "choose another batch_size.")


def _check_reached(phases: tuple[Phase, ...], epochs: int) -> None:
    for phase in phases:
        if 0 < epochs < phase.first_epoch:
            raise ValueError(f"Phase {phase.name!r} begins with epoch {phase.first_epoch}, and training has {epochs} epochs: "
                             "raise epochs, or lower the epochs of the phases before it.")


def _continue(run: RunDirectory, system: System, optimizers: dict[str, torch.optim.Optimizer], average: "_Average",
              check: Validation | None) -> tuple[int, int, list[dict]]:
    """Step, epoch and records of `run`, of which the rest take up the state; a new one keeps their start."""
    if not run.has_checkpoint():
        run.save(0, 0, system, optimizers, average.tensors)
        return 0, 0, []
    step, done, best, weights = run.restore(system, optimizers, average.tensors)
    if best is not None:
        check.best, check.weights = best, weights
    return step, done, run.metrics.read()


class _Average:
    """w̄ ← d w̄ + (1 − d) w of all parameters; without a decay d there are none. O(parameters) a step."""

    def __init__(self, system: System, decay: float | None) -> None:
        self.decay = decay
        self.params = dict(system.named_parameters()) if decay is not None else {}
        self.tensors = {name: param.detach().clone() for name, param in self.params.items()}

    @torch.no_grad()
    def update(self) -> None:
        if self.params:
            for param in self.params.values():
                catch_up(param)
            torch._foreach_lerp_(list(self.tensors.values()), list(self.params.values()), 1 - self.decay)

    def swap(self) -> None:
        """Exchanges the averages and the weights of the system."""
        for name, param in self.params.items():
            param.data, self.tensors[name] = self.tensors[name], param.data

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the system has the averages as weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class _Loop:
    """One pass over the data after another."""

    def __init__(self, system: System, phases: tuple[Phase, ...], optimizers: dict[str, torch.optim.Optimizer],
                 average: _Average, data: Data, rows: Tensor | None, config: TrainConfig) -> None:
        self.system, self.phases, self.optimizers, self.average = system, phases, optimizers, average
        self.x, self.y = on_device(data, system)
        self.rows, self.config, self.is_dynamic = rows, config, data.binarized == "dynamic"
        self.n = len(data) if rows is None else len(rows)
        self.batches_per_step = max(phase.repeat for phase in phases)
        self.steps_per_epoch = math.ceil(math.ceil(self.n / config.batch_size) / self.batches_per_step)
        self.has_players = len(phases) > 1
        self.trained = {child: [p for p in system.get_submodule(child).parameters() if p.requires_grad] for child in optimizers}

    def epoch(self, epoch: int, step: int, losses: list[float], tick: Callable[[], None]) -> dict[str, float]:
        """What `System.summarize` makes of the means of the loss terms over the rows that a phase has seen.

        `losses` are those of validation before.
        """
        self._set_learning_rates(epoch, losses)
        order = batch_order(self.n, self.config.batch_size, self.config.seed, epoch)
        means: dict[str, Means] = {}
        for first in range(0, len(order), self.batches_per_step):
            turn = order[first:first + self.batches_per_step]
            for number, phase in enumerate(self.phases):
                if step % phase.every or not phase.runs_in(epoch):
                    continue
                for repeat in range(phase.repeat):
                    index = turn[repeat % len(turn)]
                    index = (index if self.rows is None else self.rows[index]).to(self.x.device)
                    reseed(self.x.device, self.config.seed, step, number, repeat)
                    terms = self._step(phase, index)
                    means.setdefault(phase.name, Means(self.system.reduction)).add(terms, len(index))
            step += 1
            self.system.after_step(step)
            self.average.update()
            tick()
        for optimizer in distinct(self.optimizers, self.optimizers):
            if isinstance(optimizer, RowOptimizer):
                optimizer.end_epoch()
        self.system.after_epoch(epoch)
        return {f"{phase}/{name}" if self.has_players else name: value for phase, mean in means.items()
                for name, value in self.system.summarize(mean.read(), phase).items()}

    def _step(self, phase: Phase, index: Tensor) -> dict[str, Tensor]:
        if self.has_players:
            self.free(phase.updates)
        x = self.x[index]
        if self.is_dynamic:
            x = (torch.rand_like(x) < x).float()
        terms = self.system.loss(Batch(x, index, None if self.y is None else self.y[index]), phase.name)
        terms["total"].backward()
        if self.config.clip_norm is not None:
            self._clip(phase)
        for optimizer in distinct(self.optimizers, phase.updates):
            optimizer.step()
            optimizer.zero_grad()
        return terms

    def _clip(self, phase: Phase) -> None:
        """Scales the gradients of the children that step to a common norm of at most `clip_norm`."""
        grads = []
        for param in self._params(phase.updates):
            if param.grad is not None and param.grad.is_sparse:
                param.grad = param.grad.coalesce()  # a row that occurs twice has one gradient
                grads.append(param.grad.values())
            elif param.grad is not None:
                grads.append(param.grad)
        if grads:
            scale = (self.config.clip_norm / torch.nn.utils.get_total_norm(grads)).clamp(max=1)
            for device in {grad.device for grad in grads}:  # a latent table may stay on the host
                torch._foreach_mul_([grad for grad in grads if grad.device == device], scale.to(device))

    def _set_learning_rates(self, epoch: int, losses: list[float]) -> None:
        for phase in (phase for phase in self.phases if phase.runs_in(epoch)):
            factor = self.config.lr_factor(epoch - phase.first_epoch + 1, losses[phase.first_epoch - 1:])
            for child in phase.updates:
                for group in self.optimizers[child].param_groups:
                    group["lr"] = getattr(self.system.config.optim, child).lr * factor

    def _params(self, children: Iterable[str]) -> Iterator[Tensor]:
        return (param for child in children for param in self.trained[child])

    def free(self, children: Iterable[str]) -> None:
        """Lets gradients reach `children` and no other child that has an optimizer."""
        for child in self.optimizers:
            for param in self._params((child,)):
                param.requires_grad_(child in children)


def make_optimizers(system: System, phases: tuple[Phase, ...]) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each child that a phase updates, from `system.config.optim.<child>`.

    Children of equal settings that the same phases update share one: each further one adds some 100 µs to a step.
    """
    groups: dict[object, tuple[OptimizerConfig, list[str], list[Tensor]]] = {}
    for child in dict.fromkeys(name for phase in phases for name in phase.updates):
        settings = getattr(system.config.optim, child, None)
        if settings is None:
            raise ValueError(f"{type(system).__name__} updates {child!r}, but its configuration has no optim.{child}.")
        if settings.name not in OPTIMIZERS:
            raise ValueError(f"optim.{child}.name must be one of {', '.join(OPTIMIZERS)}, given {settings.name!r}.")
        module = system.get_submodule(child)
        in_rows = any(isinstance(m, LatentTable) or getattr(m, "sparse", False) for m in module.modules())
        if settings.name.startswith("row_") != in_rows:
            fitting = [name for name in OPTIMIZERS if name.startswith("row_") == in_rows]
            raise ValueError(f"optim.{child}.name must be {' or '.join(fitting)}, for the gradients of {child!r} are "
                             f"{'those of rows' if in_rows else 'dense'}; given {settings.name!r}.")
        kind = settings, tuple(child in phase.updates for phase in phases)
        _, children, params = groups.setdefault(kind, (settings, [], []))
        children.append(child)
        params.extend(p for p in module.parameters() if p.requires_grad)
    return {child: optimizer for settings, children, params in groups.values()
            for optimizer in [OPTIMIZERS[settings.name](params, settings)] for child in children}


def distinct(optimizers: dict[str, torch.optim.Optimizer], children: Iterable[str]) -> list[torch.optim.Optimizer]:
    """The optimizers of `children`, each once."""
    return list(dict.fromkeys(optimizers[child] for child in children))


def identity(data: Data) -> dict[str, object]:
    """What a resumed run must find again: a latent table belongs to these rows in this order.

    Rows that training draws dynamically are known by their `fixed` draw, so that those to evaluate on are the same.
    """
    crc = 0
    for tensor in (data.fixed().x, data.y):
        crc = crc if tensor is None else zlib.crc32(tensor.contiguous().cpu().numpy(), crc)
    return {"name": data.name, "split": data.split, "binarized": data.binarized, "shape": tuple(data.x.shape),
            "crc32": crc}
