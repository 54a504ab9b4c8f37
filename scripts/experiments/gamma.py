"""A learned against a fixed variance γ of the decoder: the same reconstruction, another aggregate posterior.

    python scripts/experiments/gamma.py DATA

"On the Regularization Balance in Autoencoder-Based Generative Models", §6, Table 2 and Figure 1: a VAE with a learned
variance is trained; its last one, γ*, is then that of the same network trained anew with γ fixed. The paper has CelebA and
does not give its MMD; here MNIST in gray (20,000 digits, fully connected) and CIFAR-10 (5,000 images, convolutions), and the
mean over WAE's kernels of the closed form between 2,000 test images' posteriors and N(0, I). The gradient is ‖dL/dz‖, mean
over 500 training images, before the first step and after each epoch.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import main, markdown

from latent_engine import VAE, OptimizerConfig, TrainConfig, VAEConfig, fit
from latent_engine.balance import balance
from latent_engine.data import Data, load
from latent_engine.diagnostics import active_dimensions, encode, mmd2_to_prior
from latent_engine.systems.vae import VAEOptim

OPTIM = VAEOptim(likelihood=OptimizerConfig("adam", lr=5e-3))
MODELS = {"mnist": VAEConfig(latent_dim=64, hidden=(400, 400), activation="relu", likelihood="gaussian", optim=OPTIM),
          "cifar10": VAEConfig(latent_dim=128, network="conv", capacity=16, likelihood="gaussian", optim=OPTIM)}
EPOCHS = {"mnist": 30, "cifar10": 30}


@dataclass(frozen=True)
class Setting:
    data: str
    seed: int


def run(data: Path, setting: Setting) -> dict:
    train, test = (load(data / setting.data, split).pixels("none") for split in ("train", "test"))
    train, test = (part.take(torch.arange(min(len(part), rows))) for part, rows in ((train, 20_000), (test, 2000)))
    learned = _train(MODELS[setting.data], train, test, setting)
    fixed = replace(MODELS[setting.data], gamma="fixed", variance=learned["gamma"][-1])
    return {"learned": learned, "fixed": _train(fixed, train, test, setting)}


def _train(config: VAEConfig, train: Data, test: Data, setting: Setting) -> dict:
    torch.manual_seed(setting.seed)
    system = VAE.for_data(config, train)
    start = balance(system, train.x[:500])
    records = fit(system, train, TrainConfig(epochs=EPOCHS[setting.data], batch_size=100, seed=setting.seed), progress=False)
    posterior = encode(system, test.x)
    error = (test.x - system.reconstruct(test.x)).square().flatten(1).sum(1).mean()
    return {"error": error.item(), "mmd2": mmd2_to_prior(posterior, system.prior),
            "active": int(active_dimensions(posterior.mean).sum()),
            "gamma": [record.get("gamma", config.variance) for record in records],
            "gradient": [start["gradient"], *(record["balance/gradient"] for record in records)]}


def table(results: dict[str, dict]) -> str:
    """A row a run."""
    rows = []
    for key, result in results.items():
        for name in ("learned", "fixed"):
            r = result[name]
            rows.append([f"{SETTINGS[key].data}, seed {SETTINGS[key].seed}", name, f"{r['gamma'][-1]:.5f}", f"{r['error']:.2f}",
                         f"{r['mmd2']:.4f}", r["active"], f"{r['gradient'][0]:.0f}", f"{max(r['gradient']):.0f}",
                         f"{r['gradient'][-1]:.0f}"])
    return markdown(["", "γ", "at the end", "‖x − x̂‖², test", "MMD²", "active", "‖dL/dz‖ before training", "largest",
                     "at the end"], rows)


SETTINGS = {f"{data}-seed-{seed}": Setting(data, seed) for data in MODELS for seed in range(2)}

if __name__ == "__main__":
    main("gamma", __doc__, run, SETTINGS, table)
