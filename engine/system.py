"""The protocol of every model: which children step when (`phases`, data) and what is minimised (`loss`).

The trainer knows nothing else about a system, and a user with a training loop of their own calls `loss` and ignores the
rest:

    system.loss(batch, "main")["total"].backward()
"""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from torch import Generator, Tensor, nn

from . import checkpoint
from .data import Data


@dataclass(frozen=True)
class Batch:
    """Rows of a data set. `index` is each row's number in it, by which a latent table finds its representation."""

    x: Tensor
    index: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of one child: Adam or SGD of PyTorch, or their twins for the rows of a latent table (`latents`).

    row_sgd is that of the DGD's paper, row_adam is lazy, row_adam_catch_up is dense Adam at the cost of the rows that are
    read, and row_adam_epoch takes one step an epoch, as the published DGD packages do.
    """

    name: Literal["adam", "sgd", "row_adam", "row_adam_catch_up", "row_adam_epoch", "row_sgd"]
    lr: float
    weight_decay: float = 0.0  # added to the gradient; of row_adam_catch_up decoupled from it (AdamW)
    momentum: float = 0.0  # of sgd and row_sgd
    betas: tuple[float, float] = (0.9, 0.999)  # of the Adams
    eps: float = 1e-8  # of the Adams

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} of an optimizer must be at least 0 and finite, given {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas of an optimizer must lie in [0, 1), given {self.betas}.")


def check_choices(config: Any) -> None:
    """Raises ValueError if a field of `config` whose type is a Literal holds another value."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}, "
                             f"given {getattr(config, name)!r}.")


def check_sizes(**sizes: int | tuple[int, ...]) -> None:
    """Raises ValueError if one of `sizes` is, or has, a number less than 1."""
    for name, given in sizes.items():
        if any(size < 1 for size in (given if isinstance(given, tuple) else (given,))):
            raise ValueError(f"{name} must be at least 1, given {given}.")


def check_weights(**weights: float) -> None:
    """Raises ValueError if one of `weights` is negative or not finite."""
    for name, given in weights.items():
        if not 0 <= given < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, given {given}.")


@dataclass(frozen=True)
class Phase:
    """One player's turn."""

    name: str
    updates: tuple[str, ...]  # children whose parameters step in this phase
    every: int = 1  # run on each n-th step (lazy regularisation)
    repeat: int = 1  # optimiser steps with fresh batches (n_critic)
    first_epoch: int = 1  # of those in which it runs
    last_epoch: int | None = None  # None: to the end of training

    def runs_in(self, epoch: int) -> bool:
        return self.first_epoch <= epoch <= (self.last_epoch or epoch)


class System(nn.Module):
    """A model with its objective.

    Subclasses define `name`, `config_type`, `for_data`, `arguments`, `loss` and `sample`, and the rest as they need it.
    `config` is a frozen dataclass; its field `optim` has an `OptimizerConfig` for each child that a phase updates.
    """

    name: str
    config_type: type
    config: Any
    shape: tuple[int, ...]  # of an observation
    reduction: Literal["mean", "sum"] = "mean"  # of `loss` over the rows of a batch
    smallest_batch: int = 1  # rows that `loss` needs in training
    local: tuple[str, ...] = ()  # rank-local children (a latent table): never wrapped, gradients divided by world size

    @classmethod
    def for_data(cls, config: Any, data: Data) -> Self:
        """A new system for the rows and shape of `data`."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The arguments that build the system again, as JSON can hold them; modules given by the user are left out."""
        raise NotImplementedError

    def check(self, data: Data) -> None:
        """Raises ValueError if the system cannot be trained on `data`."""

    def check_rows(self, x: Tensor) -> None:
        """Raises ValueError if `x` are not observations of this system's shape."""
        if not x.is_floating_point() or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"This {type(self).__name__} takes floating-point x of shape "
                             f"[N, {', '.join(map(str, self.shape))}], given {x.dtype} {list(x.shape)}. "
                             "`Data.pixels` turns images of bytes into floats.")

    def phases(self) -> tuple[Phase, ...]:
        """Who steps when; by default one phase in which every child with trainable parameters steps."""
        trainable = (n for n, child in self.named_children() if any(p.requires_grad for p in child.parameters()))
        return (Phase("main", tuple(trainable)),)

    def loss(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Scalars by name: "total" is differentiated, the rest is logged."""
        raise NotImplementedError

    def validation_loss(self, batch: Batch) -> dict[str, Tensor]:
        """As `loss`, of rows that are held out: the lowest "total" chooses the best epoch. By default that of the first phase.

        Called without gradients and in evaluation mode. A loss that changes in the course of training (a warm-up) is
        compared at its end, so such a system has one of its own here.
        """
        return self.loss(batch, self.phases()[0].name)

    def summarize(self, means: dict[str, float], phase: str | None = None) -> dict[str, float]:
        """The terms of a record: the `means` of those of a loss over an epoch, and at its end what follows from them.

        `phase` is that of `loss`; None: of `validation_loss`.
        """
        return means

    def monitor(self, x: Tensor) -> dict[str, Any]:
        """What the record of an epoch says beside the losses, from some training rows `x`; texts are shown at the end."""
        return {}

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` new observations."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each step of the trainer."""

    def after_epoch(self, epoch: int) -> None:
        """Called after each pass over the data."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`."""
        checkpoint.save_system(folder, self)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **modules: nn.Module) -> Self:
        """A system from what `save` wrote, or from a run directory: its best step on validation, else its latest.

        Modules that were given by hand are given again.

        Raises:
            CheckpointError: a file is missing, damaged, or of another system.
        """
        description = checkpoint.read_description(folder)
        if description["system"] != cls.name:
            raise checkpoint.CheckpointError(f"{folder} holds a system {description['system']!r}, not {cls.name!r}.")
        try:
            arguments = dict(description["arguments"])
            config = checkpoint.from_dict(cls.config_type, arguments.pop("config"))
            system = cls(config, **arguments, **modules)
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"No system {cls.name!r} can be built from {folder}/config.json "
                                             f"({type(error).__name__}: {error}).") from error
        checkpoint.load_weights(folder, system)
        return system.eval()
