"""Importance-weighted autoencoders against VAEs on MNIST: 1, 5 and 50 samples, one and two stochastic layers.

    python scripts/experiments/iwae.py DATA

Burda et al. 2016, Table 1, at 20 passes over the 60,000 digits instead of 3,280, in batches of 100: a run of 50 samples
takes 15 to 20 minutes of one core, all ten an hour of two. Pixels are drawn anew at each step. Every tenth of the 10,000
test digits, drawn once, is evaluated with 5,000 samples.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from harness import main, markdown

from latent_engine import PRESETS, TrainConfig, fit, log_likelihood
from latent_engine.data import load
from latent_engine.diagnostics import active_dimensions, encode

TRAINING = TrainConfig(epochs=20, batch_size=100, lr_stage_epochs=5, lr_decay=0.5)
PUBLISHED = {  # −log p(x) of Burda et al. 2016, Table 1
    ("vae", 1, 1): 86.76, ("vae", 5, 1): 86.47, ("vae", 50, 1): 86.35, ("iwae", 5, 1): 85.54, ("iwae", 50, 1): 84.78,
    ("vae", 1, 2): 85.33, ("vae", 5, 2): 85.01, ("vae", 50, 2): 84.78, ("iwae", 5, 2): 83.89, ("iwae", 50, 2): 82.90}


@dataclass(frozen=True)
class Setting:
    system: str
    samples: int
    layers: int


def run(data: Path, setting: Setting) -> dict:
    torch.manual_seed(0)
    train, test = (load(data / "mnist", split).pixels("dynamic") for split in ("train", "test"))
    preset = PRESETS[setting.system + ("-2" if setting.layers == 2 else "")]
    config = preset.config.__class__(**vars(preset.config) | {"samples": setting.samples})
    system = preset.system.for_data(config, train)
    fit(system, train, TRAINING, progress=False)
    x = test.fixed().x[::10]
    torch.manual_seed(1)  # also of the upper layer
    found = log_likelihood(system, x, 5000)
    return {"log_px": [round(value, 2) for value in found.log_px.tolist()], "elbo": found.elbo.mean().item(),
            "pareto_k_high": (found.pareto_k > 0.7).double().mean().item(),
            "active": int(active_dimensions(encode(system, test.fixed().x).mean).sum())}


def table(results: dict[str, dict]) -> str:
    """A row a run; "less" is the paired difference to the VAE of one sample, with its 95 % interval over the images."""
    rows = []
    for key, setting in sorted(SETTINGS.items(), key=lambda item: (item[1].layers, item[1].system == "iwae", item[1].samples)):
        if key not in results:
            continue
        result = results[key]
        log_px = torch.tensor(result["log_px"], dtype=torch.float64)
        gain = log_px - torch.tensor(results[f"vae-1-layers-{setting.layers}"]["log_px"], dtype=torch.float64)
        less = f"{gain.mean():.2f} ± {1.96 * gain.std() / len(gain) ** 0.5:.2f}" if gain.any() else ""
        rows.append([setting.system.upper(), setting.layers, setting.samples, f"{-log_px.mean():.2f}", less,
                     result["active"], f"{PUBLISHED[setting.system, setting.samples, setting.layers]:.2f}"])
    return markdown(["", "layers", "samples", "−log p(x)", "less than VAE, 1 sample", "active", "Burda et al."], rows)


# The longest first, so that two processes end at about the same time.
SETTINGS = {f"{system}-{samples}-layers-{layers}": Setting(system, samples, layers)
            for samples in (50, 5, 1) for layers in (2, 1) for system in ("iwae", "vae") if system == "vae" or samples > 1}

if __name__ == "__main__":
    main("iwae", __doc__, run, SETTINGS, table)
