"""Samples of a VAE and of a two-stage VAE of the same first stage, by Fréchet distance in the features of a digit classifier.

    python scripts/experiments/two_stage.py DATA

Dai & Wipf 2019 train 400 + 800 epochs and compare Inception features of images that they stretch to the whole range of
gray. Here 8 + 14 passes over the 60,000 digits of MNIST in gray; 64 features of a convolutional classifier that the script
trains for three; 10,000 decoded means against the 10,000 test digits. "VAE, learned γ" is the first stage with z ~ N(0, I).
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from harness import main, markdown
from torch import Tensor, nn
from torch.nn import functional as F

from latent_engine import VAE, OptimizerConfig, TrainConfig, TwoStageConfig, TwoStageVAE, VAEConfig, fit, frechet_distance
from latent_engine.data import Data, batch_order, load
from latent_engine.diagnostics import encode, mmd2_to_prior
from latent_engine.priors import StandardNormal
from latent_engine.systems.two_stage import TwoStageOptim

FAST, SLOW = OptimizerConfig("adam", lr=1e-3), OptimizerConfig("adam", lr=3e-4)
NETWORKS = {"latent_dim": 32, "network": "conv", "capacity": 16}
TWO_STAGE = TwoStageConfig(**NETWORKS, top_dim=32, top_hidden=(512, 512, 512), first_epochs=8,
                           optim=TwoStageOptim(FAST, FAST, FAST, SLOW))
BERNOULLI = VAEConfig(**NETWORKS)
FIXED = VAEConfig(**NETWORKS, likelihood="gaussian", gamma="fixed", variance=1.0, mean_activation="sigmoid")
PUBLISHED = {  # FID on MNIST in Inception features, as Prathosh's survey gives them (its Table 1)
    "VAE, cross-entropy": 16.6, "VAE, γ = 1": 52.0, "VAE, learned γ": 54.5, "two-stage VAE": 12.6}


@dataclass(frozen=True)
class Setting:
    system: str
    seed: int


def run(data: Path, setting: Setting) -> dict:
    train, test = (load(data / "mnist", split).pixels("none") for split in ("train", "test"))
    features = _Classifier(train)
    real = features(test.x)
    kind, config, epochs = {"cross-entropy": (VAE, BERNOULLI, 8), "fixed": (VAE, FIXED, 8),
                            "two-stage": (TwoStageVAE, TWO_STAGE, 22)}[setting.system]
    torch.manual_seed(setting.seed)
    system = kind.for_data(config, train)
    fit(system, train, TrainConfig(epochs=epochs, batch_size=100, seed=setting.seed), progress=False)
    generator = torch.Generator().manual_seed(0)
    normal = StandardNormal(config.latent_dim)
    samples = {"VAE": _decode(system, normal.sample(len(test), generator))}
    if setting.system == "two-stage":
        samples["two-stage"] = _decode(system, system.prior.sample(len(test), generator))
    return {"accuracy": features.accuracy(test), "real": frechet_distance(features(train.x[:len(test)]), real),
            "reconstructions": frechet_distance(features(_decode(system, system.represent(test.x))), real),
            "mmd2": mmd2_to_prior(encode(system, test.x[:2000]), normal),
            "samples": {name: frechet_distance(features(x), real) for name, x in samples.items()}}


def _decode(system: VAE, z: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([system.decode(rows) for rows in z.split(1000)])


class _Classifier:
    """Of digits, trained for three passes over `data`; a call gives the 64 features `[N, 64]` before its last layer."""

    def __init__(self, data: Data) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(32 * 7 * 7, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        optimizer = torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], lr=1e-3, fused=True)
        for epoch in range(3):
            for index in batch_order(len(data), 100, 0, epoch):
                optimizer.zero_grad()
                F.cross_entropy(self.head(self.body(data.x[index])), data.y[index]).backward()
                optimizer.step()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(rows) for rows in x.split(1000)])

    def accuracy(self, data: Data) -> float:
        return (self.head(self(data.x)).argmax(1) == data.y).double().mean().item()


def table(results: dict[str, dict]) -> str:
    """A row a model: mean and range over the seeds."""
    names = {"VAE, cross-entropy": ("cross-entropy", "VAE"), "VAE, γ = 1": ("fixed", "VAE"),
             "VAE, learned γ": ("two-stage", "VAE"), "two-stage VAE": ("two-stage", "two-stage")}
    rows = []
    for name, (system, part) in names.items():
        runs = [result for key, result in results.items() if SETTINGS[key].system == system]
        values = sorted(run["samples"][part] for run in runs)
        rows.append([name, f"{fmean(values):.1f}", f"{values[0]:.1f} – {values[-1]:.1f}",
                     f"{fmean(run['reconstructions'] for run in runs):.1f}", f"{fmean(run['mmd2'] for run in runs):.4f}",
                     PUBLISHED[name]])
    real = next(iter(results.values()))
    return markdown(["", "samples", "two seeds", "reconstructions", "MMD² of q(z) to N(0, I)", "published FID"],
                    [*rows, ["10,000 training digits", f"{real['real']:.1f}", *[""] * 4]])


SETTINGS = {f"{system}-seed-{seed}": Setting(system, seed) for system in ("two-stage", "fixed", "cross-entropy")
            for seed in range(2)}

if __name__ == "__main__":
    main("two_stage", __doc__, run, SETTINGS, table)
