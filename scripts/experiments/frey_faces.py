"""VAE, IWAE and VR-max on Frey Faces, with 5 samples of the representation.

    python scripts/experiments/frey_faces.py DATA

Li & Turner 2016 (§5.2): 20 dimensions, 200 softplus units, batches of 100, Adam of 5e-4, ten splits. They report densities
of gray values in [0, 1], without dequantisation, under Gaussians whose means and variances the decoder gives. Here one
split, 1,765 faces and 200 to test on, with two seeds; 100 of the training faces choose among 700 epochs; 5,000 samples of
each test face. A run takes three minutes of one core.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from harness import main, markdown

from latent_engine import IWAE, VAE, IWAEConfig, OptimizerConfig, TrainConfig, VAEConfig, fit, log_likelihood
from latent_engine.data import load
from latent_engine.systems.vae import VAEOptim

ADAM = OptimizerConfig("adam", lr=5e-4)
NETWORKS = {
    "latent_dim": 20, "hidden": (200,), "activation": "softplus", "likelihood": "gaussian", "gamma": "decoded",
    "mean_activation": "sigmoid", "variance": 0.05, "samples": 5, "optim": VAEOptim(ADAM, ADAM, ADAM, ADAM)}
SYSTEMS = {"VAE": (VAE, VAEConfig(**NETWORKS)), "IWAE": (IWAE, IWAEConfig(**NETWORKS)),
           "VR-max": (IWAE, IWAEConfig(**NETWORKS, alpha=-math.inf))}
PUBLISHED = {"VAE": "1323 ± 10", "IWAE": "1380 ± 5", "VR-max": "1377 ± 5"}  # Li & Turner 2016, Table 1


@dataclass(frozen=True)
class Setting:
    system: str
    seed: int


def run(data: Path, setting: Setting) -> dict:
    faces = load(data / "freyfaces").pixels("none")
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0))
    train, test = faces.take(order[200:]), faces.take(order[:200])
    torch.manual_seed(setting.seed)
    kind, config = SYSTEMS[setting.system]
    system = kind.for_data(config, train)
    records = fit(system, train, TrainConfig(epochs=700, batch_size=100, validation=100, seed=setting.seed), progress=False)
    best = min(records, key=lambda record: record["validation/total"])
    found = log_likelihood(system, test.x, 5000)
    return {"log_px": found.mean, "error": (found.log_px.std() / len(test) ** 0.5).item(), "elbo": found.elbo.mean().item(),
            "effective_samples": found.effective_samples.median().item(), "epoch": best["epoch"],
            "active": records[-1]["balance/active"]}


def table(results: dict[str, dict]) -> str:
    """A row a system: mean and range over the seeds."""
    rows = []
    for system in SYSTEMS:
        runs = [result for key, result in results.items() if SETTINGS[key].system == system]
        values = sorted(run["log_px"] for run in runs)
        rows.append([system, f"{fmean(values):.0f}", f"{values[0]:.0f} – {values[-1]:.0f}",
                     f"{fmean(run['elbo'] for run in runs):.0f}",
                     " ".join(str(run["epoch"]) for run in runs), PUBLISHED[system]])
    return markdown(["", "log p(x)", "two seeds", "ELBO", "best epochs", "Li & Turner"], rows)


SETTINGS = {f"{system}-seed-{seed}": Setting(system, seed) for seed in range(2) for system in SYSTEMS}

if __name__ == "__main__":
    main("frey_faces", __doc__, run, SETTINGS, table)
