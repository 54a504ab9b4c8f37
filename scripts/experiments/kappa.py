"""Does a VAE find how many dimensions the data need? Latent dimensions κ from 50 to 784, with and without skip connections.

    python scripts/experiments/kappa.py DATA

"On the Regularization Balance in Autoencoder-Based Generative Models", §6, Table 1, without its κ = 400: MNIST in gray, an
encoder of 6 layers, a decoder of 3 residual blocks of 2 layers, a Gaussian with a learned variance. The paper gives neither
widths nor training. Here 400 units, 20,000 digits, 15 and 45 passes in batches of 100. "Affine bridge" adds W z + b to the
decoder's output, "residual" is the same without it, "plain" a decoder (and encoder) of as many layers without skip connections.
Numbers of several seeds are their mean and, in brackets, the lowest and the highest.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import main, markdown, over_seeds

from latent_engine import VAE, OptimizerConfig, TrainConfig, VAEConfig, fit, log_likelihood
from latent_engine.data import load
from latent_engine.diagnostics import active_dimensions, encode
from latent_engine.systems.vae import VAEOptim

KAPPAS = (50, 100, 200, 784)
DECODERS = {"affine bridge": {"network": "residual", "affine_skip": True, "hidden": (400,) * 5},
            "residual": {"network": "residual", "hidden": (400,) * 5},
            "plain": {"network": "mlp", "hidden": (400,) * 7}}
PUBLISHED = {50: (4.98, -315, 10), 100: (3.42, -580, 15), 200: (2.74, -718, 20), 784: (2.78, -806, 22)}


@dataclass(frozen=True)
class Setting:
    decoder: str
    kappa: int
    passes: int = 15
    training: str = ""
    seed: int = 0


def run(data: Path, setting: Setting) -> dict:
    torch.manual_seed(setting.seed)
    train, test = (load(data / "mnist", split).pixels("none") for split in ("train", "test"))
    train = train.take(torch.arange(20_000))
    lr, gamma_lr, lr_decay = TRAINING[setting.training]
    network = OptimizerConfig("adam", lr=lr)
    config = VAEConfig(latent_dim=setting.kappa, activation="relu", likelihood="gaussian", **DECODERS[setting.decoder],
                       optim=VAEOptim(network, network, OptimizerConfig("adam", lr=gamma_lr)))
    system = VAE.for_data(config, train)
    stages = {} if lr_decay == 1 else {"lr_stage_epochs": (setting.passes + 1) // 2, "lr_decay": lr_decay}
    records = fit(system, train, TrainConfig(epochs=setting.passes, batch_size=100, seed=setting.seed, **stages),
                  progress=False)
    error = (test.x - system.reconstruct(test.x)).square().flatten(1).sum(1).mean()
    return {"error": error.item(), "nll": -log_likelihood(system, test.x[::50], 500).mean,
            "active": int(active_dimensions(encode(system, test.x).mean).sum()), "gamma": records[-1]["gamma"]}


def table(results: dict[str, dict]) -> str:
    """A row for the runs that differ by their seed only."""
    runs = defaultdict(list)
    for key, result in results.items():
        runs[replace(SETTINGS[key], seed=0)].append(result)
    rows = []
    for setting, found in runs.items():
        error, nll, active = PUBLISHED[setting.kappa] if setting.decoder == "affine bridge" else ("", "", 0)
        error_, nll_, active_, gamma = (
            over_seeds([r[name] for r in found], digits)
            for name, digits in (("error", ".2f"), ("nll", ".0f"), ("active", ".0f"), ("gamma", ".4f")))
        rows.append([setting.decoder, setting.passes, setting.training, setting.kappa, error_, nll_, active_, gamma, error, nll,
                     active])
    return markdown(["decoder", "passes", "training", "κ", "‖x − x̂‖², test", "−log p(x)", "active", "γ", "paper: error",
                     "−log p(x)", "active"], rows)


# learning rates of the networks and of log γ, and the factor of both in the second half
TRAINING = {"": (1e-3, 5e-3, 1.0), "γ ten times slower": (1e-3, 5e-4, 1.0), "networks three times faster": (3e-3, 5e-3, 1.0),
            "a tenth of the rates at the end": (1e-3, 5e-3, 0.1)}
SETTINGS = {f"{decoder}-{kappa}": Setting(decoder, kappa) for decoder in DECODERS for kappa in KAPPAS
            if decoder == "affine bridge" or kappa in (50, 784)}
SETTINGS |= {f"affine bridge-{kappa}-seed {seed}": Setting("affine bridge", kappa, seed=seed)
             for seed in (1, 2) for kappa in (50, 200, 784)}
SETTINGS |= {f"affine bridge-784-{training}": Setting("affine bridge", 784, training=training)
             for training in TRAINING if training}
SETTINGS |= {f"affine bridge-{kappa}-longer": Setting("affine bridge", kappa, 45) for kappa in (784, 200, 50)}

if __name__ == "__main__":
    main("kappa", __doc__, run, SETTINGS, table)
