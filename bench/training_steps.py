"""Training steps against plain PyTorch objectives of the same networks: `python -m latent_engine.bench.training_steps`.

Batches of 100 digits and the networks of Burda et al. (2016). A step is the loss, its gradients, and those of the optimizers,
which are the same. The plain objectives give the loss only, the same one for the same noise, which is checked; a system's gives
the terms for the log too. Where they are timed each draws noise in its own way, a plain objective by `torch.randn`. The
objective's share of a step is the time that noise, loss and gradients take where the outputs of all networks are given.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_engine import PRESETS, load_data
from latent_engine.kernels import noise_keys, reparametrize
from latent_engine.system import Batch, System
from latent_engine.trainer import make_optimizers

from .report import machine
from .suite import OURS
from .timing import Timing, time_calls

BATCH, PAIRS = 100, 30
LOG_2PI = math.log(2 * math.pi)


def same_noise() -> AbstractContextManager[object]:
    """Within, `torch.randn` draws what a system does, `[N, D]` or `[S, N, D]`."""
    def draw(*shape: int) -> Tensor:
        zeros = torch.zeros(shape[-2:])
        return reparametrize(zeros, zeros, noise_keys(shape[0] if len(shape) == 3 else None))[0]

    return patch.object(torch, "randn", draw)


def sample(mean: Tensor, log_var: Tensor, samples: int) -> Tensor:
    """z `[S N, D]` of the posteriors, reparametrised."""
    if samples == 1:
        return mean + (0.5 * log_var).exp() * torch.randn(*mean.shape)
    return (mean + (0.5 * log_var).exp() * torch.randn(samples, *mean.shape)).flatten(0, 1)


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) `[S, N]` of logits `[S N, ...]`."""
    logits = logits.view(-1, *x.shape)
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").flatten(2).sum(-1)


def normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mean, exp(log_var)) over the last axis."""
    return -0.5 * ((z - mean).square() * (-log_var).exp() + log_var + LOG_2PI).sum(-1)


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) over the last axis."""
    return -0.5 * (z.square() + LOG_2PI).sum(-1)


def kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL to N(0, I), summed over rows."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()


def vae(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    logits = system.decoder(sample(mean, log_var, 1))
    return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + system.config.beta * kl(mean, log_var)) / len(x)


def mae(system: System, x: Tensor) -> Tensor:
    """The loss of `vae`, η Σ_d softplus(−KL_d) over pairs (MAE's Eq. 8) and γ times the deviation of their KL."""
    config, (mean, log_var) = system.config, system.encoder(x).chunk(2, 1)
    error = F.binary_cross_entropy_with_logits(system.decoder(sample(mean, log_var, 1)), x, reduction="sum")
    var = log_var.exp()
    ratio = (var[:, None] + (mean[:, None] - mean).square()) / var
    pairs = (0.5 * (log_var - log_var[:, None] + ratio - 1))[~torch.eye(len(x), dtype=torch.bool)]
    penalty = config.diversity * F.softplus(-pairs).mean(0).sum() + config.smoothness * pairs.sum(1).std()
    return (error + kl(mean, log_var)) / len(x) + penalty


def gaussian_vae(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    output, log_gamma = system.decoder(sample(mean, log_var, 1)), system.likelihood.log_var
    error = F.mse_loss(output, x, reduction="sum")
    return (0.5 * (error * (-log_gamma).exp() + x.numel() * (log_gamma + LOG_2PI)) + kl(mean, log_var)) / len(x)


def mixture_vae(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    z, prior = sample(mean, log_var, 1), system.prior
    log_pz = (normal(z[:, None], prior.means, prior.log_vars) + prior.logits.log_softmax(0)).logsumexp(1)
    error = F.binary_cross_entropy_with_logits(system.decoder(z), x, reduction="sum")
    return (error - log_pz.sum() - 0.5 * (log_var + 1 + LOG_2PI).sum()) / len(x)


def log_weights(z: Tensor, mean: Tensor, log_var: Tensor, log_px_z: Tensor) -> Tensor:
    """log p(x, z) − log q(z | x) `[S, N]` under the prior N(0, I)."""
    z = z.view(-1, *mean.shape)
    return log_px_z + standard_normal(z) - normal(z, mean, log_var)


def iwae(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    z = sample(mean, log_var, system.config.samples)
    log_w = log_weights(z, mean, log_var, bernoulli(system.decoder(z), x))
    return -log_w.logsumexp(0).mean() + math.log(len(log_w))


def dreg(system: System, x: Tensor) -> Tensor:
    """Σ w̃ log w with weights and q held constant, and a hook that weighs what reaches the encoder by w̃ once more."""
    mean, log_var = system.encoder(x).chunk(2, 1)
    z = sample(mean, log_var, system.config.samples)
    log_w = log_weights(z, mean.detach(), log_var.detach(), bernoulli(system.decoder(z), x))
    weights = log_w.detach().softmax(0)
    z.register_hook(lambda grad: weights.view(-1, 1) * grad)
    surrogate = (weights * log_w).sum(0)  # the gradient; the value is that of the bound
    return (surrogate.detach() - surrogate - log_w.detach().logsumexp(0)).mean() + math.log(len(log_w))


def vr_max(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    z = sample(mean, log_var, system.config.samples)
    with torch.no_grad():
        best = log_weights(z, mean, log_var, bernoulli(system.decoder(z), x)).argmax(0)
    z = z.view(-1, *mean.shape)[best, torch.arange(len(x))]
    return -log_weights(z, mean, log_var, bernoulli(system.decoder(z), x)).mean()


def two_layer_iwae(system: System, x: Tensor) -> Tensor:
    mean, log_var = system.encoder(x).chunk(2, 1)
    z = sample(mean, log_var, system.config.samples)
    top_mean, top_log_var = system.prior.encoder(z).chunk(2, 1)
    u = sample(top_mean, top_log_var, 1)
    log_pz = standard_normal(u) + normal(z, *system.prior.decoder(u).chunk(2, 1)) - normal(u, top_mean, top_log_var)
    log_qz = normal(z.view(-1, *mean.shape), mean, log_var)
    log_w = bernoulli(system.decoder(z), x) + log_pz.view(-1, len(x)) - log_qz
    return -log_w.logsumexp(0).mean() + math.log(len(log_w))


# by name of the preset
OBJECTIVES: dict[str, Callable[[System, Tensor], Tensor]] = {
    "vae": vae, "beta-vae": vae, "vae-gaussian": gaussian_vae, "vae-mixture": mixture_vae, "iwae": iwae, "iwae-dreg": dreg,
    "vr-max": vr_max, "iwae-2": two_layer_iwae, "mae-mlp": mae,
}


class Given(nn.Module):
    """Stands for a network: for inputs of one shape the same output each time, that of the first ones, as a leaf."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.outputs = network, {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.outputs:
            self.outputs[x.shape] = self.network(x).detach().requires_grad_()
        return self.outputs[x.shape]


@dataclass(frozen=True)
class Steps:
    """Seconds a training step by name, and of our objective in it."""

    steps: dict[str, Timing]
    objective: Timing

    @property
    def ratio(self) -> float:
        """Time of the plain step over ours: above one we are ahead."""
        return self.steps["plain"].median / self.steps[OURS].median

    @property
    def share(self) -> float:
        """Of the objective in our step."""
        return self.objective.median / self.steps[OURS].median


def our_loss(system: System, batch: Batch) -> Tensor:
    return system.loss(batch, "main")["total"]


def step(loss: Callable[[System, Any], Tensor], system: System, batch: Batch | Tensor) -> Callable[[], None]:
    """A training step as the trainer takes it."""
    optimizers = set(make_optimizers(system, system.phases()).values())

    def run() -> None:
        loss(system, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return run


def objective(system: System, batch: Batch) -> Callable[[], None]:
    """Our loss and its gradients, from the outputs of all networks."""
    for module in (system, system.prior):
        for name in {"encoder", "decoder"} & dict(module.named_children()).keys():
            setattr(module, name, Given(getattr(module, name)))

    our_loss(system, batch)
    given = [output for module in system.modules() if isinstance(module, Given) for output in module.outputs.values()]
    leaves = [*given, *system.parameters()]

    def run() -> None:
        our_loss(system, batch).backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def systems(preset: str, batch: Batch) -> tuple[System, System]:
    """Twice the same system, whose loss is the plain objective's too."""
    torch.manual_seed(0)
    ours = PRESETS[preset].system(PRESETS[preset].config, batch.x.shape[1:])
    plain, losses = copy.deepcopy(ours), []
    for loss, system, given in ((our_loss, ours, batch), (OBJECTIVES[preset], plain, batch.x)):
        torch.manual_seed(1)
        with same_noise():
            losses.append(loss(system, given).item())
    if not math.isclose(*losses, rel_tol=1e-5):
        raise ValueError(f"{preset}: the loss is {losses[0]}, but that of the plain objective {losses[1]}.")
    return ours, plain


def measure(preset: str, x: Tensor, pairs: int = PAIRS) -> Steps:
    """Times the steps of a preset on the batch `x` and the objective in turns."""
    batch = Batch(x, torch.arange(len(x)))
    ours, plain = systems(preset, batch)
    calls = {OURS: step(our_loss, ours, batch), "plain": step(OBJECTIVES[preset], plain, x)}
    parts = {"objective": objective(copy.deepcopy(ours), batch)}
    for call in (*calls.values(), *parts.values()):
        call()
    timings = time_calls(calls, "cpu", rounds=pairs, beside=parts)
    return Steps(objective=timings.pop("objective"), steps=timings)


def milliseconds(t: Timing) -> str:
    """Median and quantiles as text."""
    return f"{t.median * 1e3:6.2f} ms ({t.low * 1e3:.2f} – {t.high * 1e3:.2f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench.training_steps", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"any of {', '.join(OBJECTIVES)} (default: all)")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.presets if name not in OBJECTIVES]
    if unknown:
        parser.error(f"unknown preset {unknown[0]!r}; those with a plain objective are {', '.join(OBJECTIVES)}")
    x = load_data("mnist5k").pixels(binarize=True).x[:BATCH]
    results = {}
    print(f"training steps with {BATCH} digits, median of {PAIRS} pairs; the objective's share")
    for name in options.presets or OBJECTIVES:
        results[name] = found = measure(name, x)
        print(f"  {name:13} ours {milliseconds(found.steps[OURS])}, plain {milliseconds(found.steps['plain'])}, "
              f"{found.ratio:.2f}×; objective {100 * found.share:.1f} %", flush=True)
    if options.json:
        content = {"machine": machine("cpu"), "training_steps": {name: asdict(found) for name, found in results.items()}}
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
