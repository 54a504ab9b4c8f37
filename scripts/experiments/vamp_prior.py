"""A VampPrior against a standard normal one, in a VAE of one and of two stochastic layers.

    python scripts/experiments/vamp_prior.py DATA

"VAE with a VampPrior" (Tomczak & Welling 2018), Table 1: 40 dimensions a layer, layers of 300 gated units, 500 pseudo-inputs,
60,000 digits in one binarisation, a warm-up of 100 passes, early stopping after 50 passes without gain. Here the presets
`vae-vamp` and `hvae-vamp`, tanh instead of gated units, 10,000 digits whose pixels are drawn anew at each step, 30 passes in
batches of 100, the KL divergence warmed up over 1,000 steps under every prior. "mixture" has 500 Gaussians that are free.
−log p(x) of 500 test images with 1,000 samples; three seeds.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from harness import main, markdown, over_seeds

from latent_engine import TrainConfig, fit, log_likelihood
from latent_engine.data import load
from latent_engine.systems import PRESETS

PUBLISHED = {("vae", "vamp"): 85.57}


@dataclass(frozen=True)
class Setting:
    system: str
    prior: str
    seed: int


def run(data: Path, setting: Setting) -> dict:
    train, test = (load(data / "mnist", split).pixels("dynamic") for split in ("train", "test"))
    train = train.take(torch.arange(10_000))
    preset = PRESETS[f"{setting.system}-vamp"]
    torch.manual_seed(setting.seed)
    system = preset.system.for_data(replace(preset.config, prior=setting.prior), train)
    records = fit(system, train, TrainConfig(epochs=30, batch_size=100, seed=setting.seed), progress=False)
    torch.manual_seed(1)
    found = log_likelihood(system, test.fixed().x[:500], 1000)
    return {"log_px": [round(value, 2) for value in found.log_px.tolist()], "elbo": found.elbo.mean().item(),
            "train_elbo": records[-1]["elbo"]}


def table(results: dict[str, dict]) -> str:
    """A row a model, over seeds; "less" is the paired difference to the normal prior, with its 95 % interval over images."""
    rows = []
    for system, prior in dict.fromkeys((setting.system, setting.prior) for setting in SETTINGS.values()):
        found, normal = ([results[_key(system, name, seed)] for seed in SEEDS] for name in (prior, "normal"))
        gain = np.mean([r["log_px"] for r in found], axis=0) - np.mean([r["log_px"] for r in normal], axis=0)
        less = f"{gain.mean():.2f} ± {1.96 * gain.std(ddof=1) / len(gain) ** 0.5:.2f}" if gain.any() else ""
        rows.append([f"{system.upper()}, {prior}", over_seeds([-np.mean(r["log_px"]) for r in found], ".2f"), less,
                     over_seeds([-r["elbo"] for r in found], ".2f"), over_seeds([-r["train_elbo"] for r in found], ".2f"),
                     PUBLISHED.get((system, prior), "")])
    return markdown(["", "−log p(x)", "less than normal", "−ELBO", "−ELBO, training", "Tomczak & Welling"], rows)


def _key(system: str, prior: str, seed: int) -> str:
    return f"{system}-{prior}-seed-{seed}"


SEEDS = range(3)
SETTINGS = {_key(system, prior, seed): Setting(system, prior, seed) for seed in SEEDS
            for system, prior in (("vae", "normal"), ("vae", "mixture"), ("vae", "vamp"), ("hvae", "normal"), ("hvae", "vamp"))}

if __name__ == "__main__":
    main("vamp_prior", __doc__, run, SETTINGS, table)
