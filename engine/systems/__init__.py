"""The published systems, one file a family, and their named presets."""

import os
from dataclasses import dataclass
from typing import Any

from ..checkpoint import CheckpointError, read_description
from ..system import System
from ..trainer import TrainConfig
from .dgd import DGD, DGDConfig

SYSTEMS: dict[str, type[System]] = {system.name: system for system in (DGD,)}


@dataclass(frozen=True)
class Preset:
    """A system with the settings of a paper."""

    system: type[System]
    config: Any
    train: TrainConfig
    description: str


PRESETS = {
    "dgd": Preset(DGD, DGDConfig(), TrainConfig(), "20 components, the paper's MNIST model (Fig. 3)"),
    "dgd-labelled": Preset(DGD, DGDConfig(components=10, classes=10, prior_count="per_sample", latent_init="prior"),
                           TrainConfig(), "a component for each of 10 classes (Fig. 4)"),
    "dgd-normal": Preset(DGD, DGDConfig(prior="normal"), TrainConfig(), "a fixed standard normal prior"),
}


def load_system(folder: str | os.PathLike[str], **modules: Any) -> System:
    """The system that `System.save` wrote into `folder`, or that of the run directory `folder` (see `System.load`)."""
    name = read_description(folder)["system"]
    if name not in SYSTEMS:
        raise CheckpointError(f"{folder} holds a system {name!r}; this version knows {', '.join(SYSTEMS)}.")
    return SYSTEMS[name].load(folder, **modules)
