"""Rows that are held out from training, their loss after each epoch, and the weights with which it was lowest."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint import Best
from .data import Data, batch_order
from .system import Batch, System

if TYPE_CHECKING:
    from .trainer import TrainConfig


def validation_rows(system: System, data: Data, given: Data | None,
                     config: "TrainConfig") -> tuple[Tensor | None, Data | None]:
    """The row numbers to train on (None: all), and the rows to validate on (None: there is no validation)."""
    if given is None and not config.validation:
        waiting = [name for name in ("patience", "lr_patience") if getattr(config, name) is not None]
        if waiting:
            raise ValueError(f"{waiting[0]} needs rows to validate on: set validation, or give fit(validation=...).")
        return None, None
    if given is not None and config.validation:
        raise ValueError("Rows to validate on are given and to be held out (TrainConfig.validation): choose one.")
    if system.local:
        raise ValueError(f"{type(system).__name__} learns a representation of each training row, and other rows have none "
                         "without inference, so there is no validation loss: train it without validation and patience.")
    if given is not None:
        if not len(given) or given.x.shape[1:] != data.x.shape[1:]:
            raise ValueError(f"Validation needs rows of the shape of the training rows, {list(data.x.shape[1:])}, "
                             f"given {list(given.x.shape)}.")
        system.check(given)
        return None, given
    count = round(config.validation * len(data)) if config.validation < 1 else int(config.validation)
    if not 0 < count < len(data):
        raise ValueError(f"validation={config.validation:g} holds out {count} of {len(data)} rows; "
                         "hold out at least one, and leave at least one to train on.")
    order = torch.cat(batch_order(len(data), len(data), config.seed, 0))  # epochs of training start at 1
    return order[count:].sort().values, data.take(order[:count].sort().values)


def plateaus(losses: Sequence[float], patience: int) -> int:
    """How often `patience` of `losses` in a row were no lower than the lowest before them; each time the count starts again."""
    found, waited, best = 0, 0, math.inf
    for loss in losses:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited == patience:
            found, waited = found + 1, 0
    return found


class Means:
    """Means of the terms of a loss over rows."""

    def __init__(self, reduction: str) -> None:
        self.reduction, self.rows, self.sums, self.names = reduction, 0, 0.0, []

    def add(self, terms: dict[str, Tensor], rows: int) -> None:
        values = torch.stack([t.detach() for t in terms.values()])
        self.sums = self.sums + (values * rows if self.reduction == "mean" else values)
        self.rows, self.names = self.rows + rows, list(terms)

    def read(self) -> dict[str, float]:
        return {name: value / self.rows for name, value in zip(self.names, self.sums.tolist(), strict=True)}


class Validation:
    """The loss of held-out rows, and the weights of the epoch at which it was lowest."""

    def __init__(self, system: System, data: Data, config: "TrainConfig") -> None:
        self.system, self.config = system, config
        self.x, self.y = on_device(data.fixed(), system)
        self.best: Best | None = None
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def epoch(self, epoch: int, step: int) -> dict[str, float]:
        """What `System.summarize` makes of the means of the loss terms over the rows, in evaluation mode."""
        means = Means(self.system.reduction)
        self.system.eval()
        for number, index in enumerate(torch.arange(len(self.x), device=self.x.device).split(self.config.batch_size)):
            reseed(self.x.device, self.config.seed, number, -1, 0)
            batch = Batch(self.x[index], index, None if self.y is None else self.y[index])
            means.add(self.system.validation_loss(batch), len(index))
        self.system.train()
        terms = {f"validation/{name}": value for name, value in self.system.summarize(means.read()).items()}
        if self.best is None or terms["validation/total"] < self.best.score:
            self.best = Best(step, epoch, terms["validation/total"])
            self.weights = {name: tensor.clone() for name, tensor in self.system.state_dict().items()}
        return terms

    def exhausted(self, epoch: int) -> bool:
        """Whether patience, which begins with the last phase, ends with `epoch`."""
        if self.config.patience is None or self.best is None:
            return False
        last_start = max(phase.first_epoch for phase in self.system.phases()) - 1
        return epoch - max(self.best.epoch, last_start) >= self.config.patience

    def is_due(self, epoch: int) -> bool:
        """Whether `epoch` must be kept: it is the best, or the last."""
        return epoch == self.best.epoch or self.exhausted(epoch)


def on_device(data: Data, system: System) -> tuple[Tensor, Tensor | None]:
    """x and y where the system is."""
    device = next(system.parameters()).device
    return data.x.to(device), None if data.y is None else data.y.to(device)


def reseed(device: torch.device, seed: int, step: int, phase: int, repeat: int) -> None:
    """Seeds the random generator of `device` by the numbers of a step, which are mixed."""
    # Odd multipliers spread neighbours over the 32 bits that the CPU generator reads.
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA6B + phase * 0xC2B2AE35 + repeat * 0x27D4EB2F) % 2**32
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed costs 60 µs more
    else:
        torch.manual_seed(mixed)
