"""The training loop: phases, one optimizer a child, records, checkpoints and resume.

The order of the rows is a pure function of (seed, epoch), and the random generators are seeded anew at each optimizer
step: a run that was interrupted continues from its last checkpoint to the same bits as one that was not (on CPU, with
the same number of threads).
"""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import RunDirectory, describe
from .data import Data, batch_order
from .latents import LatentTable, RowAdam, RowSGD
from .logs import Progress
from .system import Batch, OptimizerConfig, Phase, System

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], OptimizerConfig], torch.optim.Optimizer]] = {
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True),
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True),
    "row_adam": lambda p, c: RowAdam(p, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay),
    "row_sgd": lambda p, c: RowSGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay),
}


@dataclass(frozen=True)
class TrainConfig:
    """Defaults: the MNIST training of Schuster & Krogh 2021 (A.7)."""

    epochs: int = 100
    batch_size: int = 32
    seed: int = 0
    checkpoint_every: int = 1  # epochs

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, given {getattr(self, name)}.")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2**64, given {self.seed}.")


def fit(system: System, data: Data, config: TrainConfig | None = None, *, run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False, progress: bool = True) -> list[dict]:
    """Trains `system` in place on `data`, on the device of the system, and leaves it in evaluation mode.

    Args:
        data: float32 rows, e.g. `load("mnist5k").pixels(binarize=True)`.
        config: epochs, batch size, seed; the paper's where it is left out.
        run_dir: where to keep config.json, env.json, metrics.jsonl and the latest checkpoint; None keeps none.
        resume: continue the run in `run_dir`, or start it if there is none; its configuration must be the same, but for
            the number of epochs. An interrupt costs at most the epochs since the last checkpoint.
        progress: show a bar, or plain lines where there is no terminal.

    Returns:
        A record an epoch: "epoch", "step", "seconds" (of the epoch), and each term of the loss as a mean over the rows.

    Raises:
        ValueError: the data do not fit the system, or a phase begins after the last epoch.
        CheckpointError: see `RunDirectory`; raised before training starts.
        FloatingPointError: the loss of an epoch is not finite. The last checkpoint is from before it.
    """
    config = config or TrainConfig()
    if not len(data):
        raise ValueError("There are no rows to train on.")
    system.check(data)
    if resume and run_dir is None:
        raise ValueError("resume=True needs run_dir, the folder of the run to continue.")
    phases = system.phases()
    _check_reached(phases, config.epochs)
    optimizers = make_optimizers(system, phases)
    run, records, step, done = None, [], 0, 0
    if run_dir is not None:
        run = RunDirectory(run_dir, {**describe(system), "train": config, "data": identity(data)}, resume)
        if run.has_checkpoint():
            step, done = run.restore(system, optimizers)
            records = run.metrics.read()
        else:
            run.save(step, done, system, optimizers)
    device = next(system.parameters()).device
    x, y = data.x.to(device), None if data.y is None else data.y.to(device)
    loop = _Loop(system, phases, optimizers, x, y, config)
    bar = Progress(config.epochs, loop.steps_per_epoch, done, progress)
    system.train()
    try:
        for epoch in range(done + 1, config.epochs + 1):
            start = time.perf_counter()
            terms = loop.epoch(epoch, step, bar.step)
            step += loop.steps_per_epoch
            record = {"epoch": epoch, "step": step, "seconds": round(time.perf_counter() - start, 3), **terms}
            if not all(math.isfinite(v) for v in terms.values()):
                raise FloatingPointError(f"The loss of epoch {epoch} is not finite ({terms}). "
                                         "Lower a learning rate, or look for NaN in the data.")
            records.append(record)
            bar.epoch(record)
            if run is not None:
                run.metrics.append(record)
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    run.save(step, epoch, system, optimizers)
    finally:
        bar.close()
        loop.free(optimizers)
        system.eval()
    return records


def _check_reached(phases: tuple[Phase, ...], epochs: int) -> None:
    for phase in phases:
        if 0 < epochs < phase.first_epoch:
            raise ValueError(f"Phase {phase.name!r} begins with epoch {phase.first_epoch}, and training has {epochs} epochs: "
                             "raise epochs, or lower the epochs of the phases before it.")


class _Loop:
    """One pass over the data after another."""

    def __init__(self, system: System, phases: tuple[Phase, ...], optimizers: dict[str, torch.optim.Optimizer],
                 x: Tensor, y: Tensor | None, config: TrainConfig) -> None:
        self.system, self.phases, self.optimizers = system, phases, optimizers
        self.x, self.y, self.config = x, y, config
        self.batches_per_step = max(phase.repeat for phase in phases)
        batches = math.ceil(len(x) / config.batch_size)
        self.steps_per_epoch = math.ceil(batches / self.batches_per_step)
        self.has_players = len(phases) > 1

    def epoch(self, epoch: int, step: int, tick: Callable[[], None]) -> dict[str, float]:
        """Mean of each loss term over the rows that its phase has seen."""
        order = batch_order(len(self.x), self.config.batch_size, self.config.seed, epoch)
        sums: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        names: dict[str, list[str]] = {}
        for first in range(0, len(order), self.batches_per_step):
            turn = order[first:first + self.batches_per_step]
            for number, phase in enumerate(self.phases):
                if step % phase.every or not phase.runs_in(epoch):
                    continue
                for repeat in range(phase.repeat):
                    index = turn[repeat % len(turn)].to(self.x.device)
                    self._seed(step, number, repeat)
                    terms = self._step(phase, index)
                    values = torch.stack([t.detach() for t in terms.values()])
                    if self.system.reduction == "mean":
                        values *= len(index)
                    sums[phase.name] = sums[phase.name] + values if phase.name in sums else values
                    rows[phase.name] = rows.get(phase.name, 0) + len(index)
                    names[phase.name] = list(terms)
            step += 1
            self.system.after_step(step)
            tick()
        self.system.after_epoch(epoch)
        prefix = (lambda phase: f"{phase}/") if self.has_players else (lambda phase: "")
        return {prefix(p) + name: value / rows[p] for p, total in sums.items()
                for name, value in zip(names[p], total.tolist(), strict=True)}

    def _step(self, phase: Phase, index: Tensor) -> dict[str, Tensor]:
        if self.has_players:
            self.free(phase.updates)
        terms = self.system.loss(Batch(self.x[index], index, None if self.y is None else self.y[index]), phase.name)
        terms["total"].backward()
        for child in phase.updates:
            self.optimizers[child].step()
            self.optimizers[child].zero_grad()
        return terms

    def free(self, children: Iterable[str]) -> None:
        """Lets gradients reach `children` and no other child that has an optimizer."""
        for child, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.requires_grad_(child in children)

    def _seed(self, step: int, phase: int, repeat: int) -> None:
        # Odd multipliers spread neighbours over the 32 bits that the CPU generator reads.
        seed = (self.config.seed * 0x9E3779B1 + step * 0x85EBCA6B + phase * 0xC2B2AE35 + repeat * 0x27D4EB2F) % 2**32
        if self.x.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 60 µs more
        else:
            torch.manual_seed(seed)


def make_optimizers(system: System, phases: tuple[Phase, ...]) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each child that a phase updates, from `system.config.optim.<child>`."""
    optimizers = {}
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
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizers[child] = OPTIMIZERS[settings.name](trainable, settings)
    return optimizers


def identity(data: Data) -> dict[str, object]:
    """What a resumed run must find again: a latent table belongs to these rows in this order."""
    crc = 0
    for tensor in (data.x, data.y):
        crc = crc if tensor is None else zlib.crc32(tensor.contiguous().cpu().numpy(), crc)
    return {"name": data.name, "split": data.split, "binarized": data.binarized, "shape": tuple(data.x.shape),
            "crc32": crc}
