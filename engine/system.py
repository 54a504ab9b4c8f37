"""The protocol of every model: which children step when (`phases`, data) and what is minimised (`loss`).

The trainer knows nothing else about a system, and a user with a training loop of their own calls `loss` and ignores the
rest:

    system.loss(batch, "main")["total"].backward()
"""

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Rows of a data set. `index` is each row's number in it, by which a latent table finds its representation."""

    x: Tensor
    index: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """One player's turn."""

    name: str
    updates: tuple[str, ...]  # children whose parameters step in this phase
    every: int = 1  # run on each n-th step (lazy regularisation)
    repeat: int = 1  # optimiser steps with fresh batches (n_critic)


class System(nn.Module):
    """A model with its objective. Subclasses define `loss` and `sample`, and override the rest where they need it."""

    config: Any
    local: tuple[str, ...] = ()  # rank-local children (a latent table): never wrapped, gradients divided by world size

    def phases(self) -> tuple[Phase, ...]:
        """Who steps when; by default one phase in which every child with trainable parameters steps."""
        trainable = (n for n, child in self.named_children() if any(p.requires_grad for p in child.parameters()))
        return (Phase("main", tuple(trainable)),)

    def loss(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Scalars by name: "total" is differentiated, the rest is logged."""
        raise NotImplementedError

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """`n` new observations."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser step of the last phase."""

    def after_epoch(self, epoch: int) -> None:
        """Called after each pass over the data."""
