"""Latent Engine: fast, exact kernels for latent-variable generative models, and a thin model layer on top.

    from latent_engine import DGD, DGDConfig, fit, load_data

    data = load_data("mnist5k").pixels(binarize=True)
    system = DGD.for_data(DGDConfig(), data)
    fit(system, data, run_dir="runs/dgd")
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported at first use: `import latent_engine`, and so the help of the command line, does without torch's second.
_PUBLIC = {
    "AE": "systems.ae:AE",
    "AEConfig": "systems.ae:AEConfig",
    "Batch": "system:Batch",
    "CheckpointError": "checkpoint:CheckpointError",
    "DGD": "systems.dgd:DGD",
    "DGDConfig": "systems.dgd:DGDConfig",
    "Data": "data:Data",
    "FlowPrior": "priors:FlowPrior",
    "GaussianMixture": "mixtures:GaussianMixture",
    "GaussianMixturePrior": "priors:GaussianMixturePrior",
    "HVAE": "systems.hvae:HVAE",
    "HVAEConfig": "systems.hvae:HVAEConfig",
    "IWAE": "systems.iwae:IWAE",
    "IWAEConfig": "systems.iwae:IWAEConfig",
    "ImplicitConfig": "systems.implicit:ImplicitConfig",
    "ImplicitVAE": "systems.implicit:ImplicitVAE",
    "OptimizerConfig": "system:OptimizerConfig",
    "PRESETS": "systems:PRESETS",
    "Phase": "system:Phase",
    "StandardNormal": "priors:StandardNormal",
    "System": "system:System",
    "TrainConfig": "trainer:TrainConfig",
    "TwoStageConfig": "systems.two_stage:TwoStageConfig",
    "TwoStageVAE": "systems.two_stage:TwoStageVAE",
    "VAE": "systems.vae:VAE",
    "VAEConfig": "systems.vae:VAEConfig",
    "VAEPlus": "systems.two_stage:VAEPlus",
    "VAEPlusConfig": "systems.two_stage:VAEPlusConfig",
    "VLAE": "systems.vlae:VLAE",
    "VLAEConfig": "systems.vlae:VLAEConfig",
    "VampPrior": "priors:VampPrior",
    "fid": "metrics:fid",
    "fit": "trainer:fit",
    "fit_mixture": "mixtures:fit_mixture",
    "frechet_distance": "metrics:frechet_distance",
    "load_data": "data:load",
    "load_system": "systems:load_system",
    "log_likelihood": "diagnostics:log_likelihood",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
