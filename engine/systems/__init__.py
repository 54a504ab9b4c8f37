"""The published systems, one file a family, and their named presets."""

import math
import os
from dataclasses import dataclass
from typing import Any

from ..checkpoint import CheckpointError, read_description
from ..system import OptimizerConfig, System
from ..trainer import TrainConfig
from .ae import AE, AEConfig
from .dgd import DGD, DGDConfig, DGDOptim
from .hvae import HVAE, HVAEConfig
from .implicit import ImplicitConfig, ImplicitVAE
from .iwae import IWAE, IWAEConfig
from .two_stage import TwoStageConfig, TwoStageVAE, VAEPlus, VAEPlusConfig
from .vae import VAE, VAEConfig
from .vlae import VLAE, VLAEConfig

SYSTEMS: dict[str, type[System]] = {
    system.name: system for system in (DGD, AE, VAE, IWAE, HVAE, ImplicitVAE, TwoStageVAE, VAEPlus, VLAE)}


@dataclass(frozen=True)
class Preset:
    """A system with the settings of a paper."""

    system: type[System]
    config: Any
    train: TrainConfig
    description: str


# "MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders" (B.1.1) and its authors' code: 2,000 of 60,000
# rows are held out, and the learning rate is halved three times before training stops.
_VLAE_TRAIN = TrainConfig(epochs=1000, batch_size=100, clip_norm=5.0, ema_decay=0.999, validation=1 / 30, patience=80,
                          lr_patience=20, lr_decay=0.5)

PRESETS = {
    "dgd": Preset(DGD, DGDConfig(), TrainConfig(), "20 components, the paper's MNIST model (Fig. 3)"),
    "dgd-labelled": Preset(DGD, DGDConfig(components=10, classes=10, prior_count="per_sample", latent_init="prior",
                                          optim=DGDOptim(prior=OptimizerConfig("adam", lr=1e-2))),
                           TrainConfig(), "a component for each of 10 classes (Fig. 4)"),
    "dgd-normal": Preset(DGD, DGDConfig(prior="normal"), TrainConfig(), "a fixed standard normal prior"),
    "ae": Preset(AE, AEConfig(), TrainConfig(batch_size=100), "an autoencoder without prior"),
    "vae": Preset(VAE, VAEConfig(), TrainConfig(batch_size=100), "Burda et al.'s networks, Bernoulli pixels"),
    "vae-2": Preset(VAE, VAEConfig(latent_dim=100, prior="hierarchical"), TrainConfig(batch_size=100),
                    "the same with two stochastic layers"),
    "vae-mixture": Preset(VAE, VAEConfig(prior="mixture"), TrainConfig(batch_size=100), "the same with a mixture prior"),
    "vae-vamp": Preset(VAE, VAEConfig(latent_dim=40, hidden=(300, 300), prior="vamp", components=500, pseudo_inputs="data",
                                      warmup="linear", warmup_steps=1000), TrainConfig(batch_size=100),
                       "a VampPrior of 500 pseudo-inputs, and a warm-up; the length of it is our choice"),
    "vae-maf": Preset(VAE, VAEConfig(prior="maf"), TrainConfig(batch_size=100), "an autoregressive flow as prior"),
    "vae-realnvp": Preset(VAE, VAEConfig(prior="realnvp"), TrainConfig(batch_size=100), "coupling layers as prior"),
    "vae-iaf": Preset(VAE, VAEConfig(posterior_flow="iaf"), TrainConfig(batch_size=100),
                      "an autoregressive flow after the Gaussian posterior"),
    "vae-gaussian": Preset(VAE, VAEConfig(likelihood="gaussian"), TrainConfig(batch_size=100),
                           "Gaussian pixels of learned variance"),
    "vae-residual": Preset(VAE, VAEConfig(network="residual", affine_skip=True, hidden=(400,) * 5, activation="relu",
                                          likelihood="gaussian"), TrainConfig(batch_size=100),
                           "the same with a residual decoder and an affine skip; widths are our choice"),
    "beta-vae": Preset(VAE, VAEConfig(beta=4.0), TrainConfig(batch_size=100), "the KL divergence four times as heavy"),
    "robust-vae": Preset(VAE, VAEConfig(divergence_beta=0.005), TrainConfig(batch_size=100),
                         "outliers count less (β-divergence)"),
    "mae-mlp": Preset(VAE, VAEConfig(latent_dim=32, diversity=1.0, smoothness=0.5), TrainConfig(batch_size=100),
                      "Burda et al.'s networks with MAE's regularisers of posterior divergence"),
    "hvae-vamp": Preset(HVAE, HVAEConfig(prior="vamp", components=500, pseudo_inputs="data", warmup="linear",
                                         warmup_steps=1000), TrainConfig(batch_size=100),
                        "two layers, inferred downwards, with a VampPrior of 500 pseudo-inputs"),
    "vae-iop": Preset(ImplicitVAE, ImplicitConfig(), TrainConfig(epochs=1000, batch_size=100),
                      "the aggregate posterior as prior, by a density-ratio network; epochs are our choice"),
    "iwae": Preset(IWAE, IWAEConfig(), TrainConfig(batch_size=20), "Burda et al., 50 samples"),
    "iwae-2": Preset(IWAE, IWAEConfig(latent_dim=100, prior="hierarchical"), TrainConfig(batch_size=20),
                     "the same with two stochastic layers"),
    "iwae-dreg": Preset(IWAE, IWAEConfig(estimator="dreg"), TrainConfig(batch_size=20), "doubly reparametrised gradients"),
    "miwae": Preset(IWAE, IWAEConfig(samples=64, groups=8), TrainConfig(batch_size=20), "mean of 8 bounds of 8 samples"),
    "ciwae": Preset(IWAE, IWAEConfig(samples=64, elbo_weight=0.5), TrainConfig(batch_size=20), "half IWAE, half ELBO"),
    "piwae": Preset(IWAE, IWAEConfig(samples=64, groups=8, estimator="piwae"), TrainConfig(batch_size=20),
                    "decoder by IWAE, encoder by MIWAE"),
    "vr": Preset(IWAE, IWAEConfig(alpha=0.5), TrainConfig(batch_size=100), "Rényi bound of order 1/2"),
    "vr-max": Preset(IWAE, IWAEConfig(alpha=-math.inf), TrainConfig(batch_size=100), "the best of 50 samples"),
    "two-stage": Preset(TwoStageVAE, TwoStageConfig(network="conv"), TrainConfig(epochs=1200, batch_size=64),
                        "Dai & Wipf: a VAE of a VAE's representations; our networks in the first"),
    "vae-plus": Preset(VAEPlus, VAEPlusConfig(network="conv"), TrainConfig(epochs=1600, batch_size=64),
                       "two-stage VAE of an autoencoder's codes; networks and epochs are our choice"),
    "vlae": Preset(VLAE, VLAEConfig(free_bits=7.84), _VLAE_TRAIN,
                   "an autoregressive decoder of binary images and a flow prior, with free bits"),
    "mae": Preset(VLAE, VLAEConfig(diversity=1.0, smoothness=0.5), _VLAE_TRAIN,
                  "the same with regularisers of posterior divergence instead of the free bits"),
    "vlae-cifar": Preset(VLAE, VLAEConfig(latent_dim=1024, network="densenet", likelihood="logistic_mixture", prior="conv",
                                          flow_hidden=(128, 128), width=96, free_bits=30.72),
                         TrainConfig(epochs=1000, batch_size=64, clip_norm=5.0, ema_decay=0.9995, validation=0.1, patience=50),
                         "natural images of 256 levels, 16 latent maps; widths of the encoder are our choice"),
    "resnet-vae": Preset(VAE, VAEConfig(latent_dim=32, network="resnet", prior="maf", free_bits=7.84), _VLAE_TRAIN,
                         "its encoder, and a decoder whose pixels are independent"),
}


def load_system(folder: str | os.PathLike[str], **modules: Any) -> System:
    """The system that `System.save` wrote into `folder`, or that of the run directory `folder` (see `System.load`)."""
    name = read_description(folder)["system"]
    if name not in SYSTEMS:
        raise CheckpointError(f"{folder} holds a system {name!r}; this version knows {', '.join(SYSTEMS)}.")
    return SYSTEMS[name].load(folder, **modules)
