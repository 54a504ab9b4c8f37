"""Does a VAE find how many dimensions the data need? Latent dimensions κ from 50 to 784, with and without skip connections.

    python scripts/experiments/kappa.py DATA

"On the Regularization Balance in Autoencoder-Based Generative Models", §6, Table 1, without its κ = 400: MNIST in gray, an
encoder of 6 layers, a decoder of 3 residual blocks of 2 layers, a Gaussian with a learned variance. The paper gives neither
widths nor training. Here 400 units, 20,000 digits, 15 and 45 passes in batches of 100. "Affine bridge" adds W z + b to the
decoder's output, "residual" is the same without it, "plain" a decoder (and encoder) of as many layers without skip connections.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from harness import main, markdown

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


def run(data: Path, setting: Setting) -> dict:
    torch.manual_seed(0)
    train, test = (load(data / "mnist", split).pixels("none") for split in ("train", "test"))
    train = train.take(torch.arange(20_000))
    config = VAEConfig(latent_dim=setting.kappa, activation="relu", likelihood="gaussian", **DECODERS[setting.decoder],
                       optim=VAEOptim(likelihood=OptimizerConfig("adam", lr=5e-3)))
    system = VAE.for_data(config, train)
    records = fit(system, train, TrainConfig(epochs=setting.passes, batch_size=100), progress=False)
    error = (test.x - system.reconstruct(test.x)).square().flatten(1).sum(1).mean()
    return {"error": error.item(), "nll": -log_likelihood(system, test.x[::50], 500).mean,
            "active": int(active_dimensions(encode(system, test.x).mean).sum()), "gamma": records[-1]["gamma"]}


def table(results: dict[str, dict]) -> str:
    """A row a run."""
    rows = []
    for key, r in results.items():
        setting = SETTINGS[key]
        error, nll, active = PUBLISHED[setting.kappa] if setting.decoder == "affine bridge" else ("", "", 0)
        rows.append([setting.decoder, setting.passes, setting.kappa, f"{r['error']:.2f}", f"{r['nll']:.0f}", r["active"],
                     f"{r['gamma']:.4f}", error, nll, active])
    return markdown(["decoder", "passes", "κ", "‖x − x̂‖², test", "−log p(x)", "active", "γ", "paper: error", "−log p(x)",
                     "active"], rows)


SETTINGS = {f"{decoder}-{kappa}": Setting(decoder, kappa) for decoder in DECODERS for kappa in KAPPAS
            if decoder == "affine bridge" or kappa in (50, 784)}
SETTINGS |= {f"affine bridge-{kappa}-longer": Setting("affine bridge", kappa, 45) for kappa in (784, 200, 50)}

if __name__ == "__main__":
    main("kappa", __doc__, run, SETTINGS, table)
