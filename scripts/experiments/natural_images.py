"""The CIFAR form of a variational lossy autoencoder, and of MAE: does it train, and to how many bits a dimension?

    python scripts/experiments/natural_images.py DATA

"MAE: Mutual Posterior-Divergence Regularization for Variational Autoencoders" (Ma, Zhou & Hovy 2019), Table 3: 16 latent maps
of 8×8, a flow of masked convolutions as prior, a PixelCNN++ as decoder, 512 samples. Here the preset `vlae-cifar` with 32
channels instead of 96 in the decoder and 16 instead of 32 in the encoder, 200 steps: 4 passes over 800 images in batches of 16;
an average of the weights over 20 steps; bits/dim of 32 test images with 64 samples.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import main, markdown

from latent_engine import VLAE, TrainConfig, fit, log_likelihood
from latent_engine.data import load
from latent_engine.systems import PRESETS


@dataclass(frozen=True)
class Setting:
    free_bits: float = 0.0
    diversity: float = 0.0
    smoothness: float = 0.0


def run(data: Path, setting: Setting) -> dict:
    train, test = (load(data / "cifar10", split).pixels("none") for split in ("train", "test"))
    train = train.take(torch.arange(800))
    torch.manual_seed(0)
    system = VLAE.for_data(replace(PRESETS["vlae-cifar"].config, width=32, capacity=16, **vars(setting)), train)
    records = fit(system, train, TrainConfig(epochs=4, batch_size=16, clip_norm=5.0, ema_decay=0.95), progress=False)
    torch.manual_seed(1)
    found = log_likelihood(system, test.x[:32], 64)
    dims = math.prod(system.shape) * math.log(2)
    return {"bits": -found.mean / dims, "interval": [-bound / dims for bound in reversed(found.interval())],
            "epochs": [record["bits_per_dim"] for record in records], "kl": records[-1]["kl"]}


def table(results: dict[str, dict]) -> str:
    """A row a model."""
    rows = []
    for key, r in results.items():
        low, high = r["interval"]
        rows.append([key, f"{r['bits']:.2f}", f"{low:.2f} – {high:.2f}", " ".join(f"{bits:.2f}" for bits in r["epochs"]),
                     f"{r['kl']:.0f}", PUBLISHED[key]])
    return markdown(["", "bits/dim, test", "95 %", "bound in training, each 50 steps", "KL, nats", "paper: bits/dim"], rows)


PUBLISHED = {"VLAE, free bits": 2.97, "MAE η = 0.5, γ = 1": 2.96}
SETTINGS = {"VLAE, free bits": Setting(free_bits=30.72), "MAE η = 0.5, γ = 1": Setting(diversity=0.5, smoothness=1.0)}

if __name__ == "__main__":
    main("natural_images", __doc__, run, SETTINGS, table)
