"""A training epoch of the DGD on the embedded digits, against the same model written in plain PyTorch."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from latent_engine.data import batch_order, load
from latent_engine.priors import normal_log_prob, soft_ball_log_prob, uniform_ball
from latent_engine.system import Batch
from latent_engine.systems.dgd import DGD, DGDConfig
from latent_engine.trainer import make_optimizers

from .suite import OURS
from .timing import Timing, time_calls

BATCH, COMPONENTS, STEPS = 32, 20, 40


def our_steps(x: torch.Tensor) -> Callable[[], None]:
    """STEPS optimizer steps of the engine's DGD, as its trainer takes them."""
    system = DGD(DGDConfig(components=COMPONENTS), len(x), x.shape[1:])
    optimizers = set(make_optimizers(system, system.phases()).values())
    order = batch_order(len(x), BATCH, 0, 1)[:STEPS]

    def run() -> None:
        for index in order:
            system.loss(Batch(x[index], index))["total"].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return run


def plain_decoder() -> nn.Sequential:
    """`networks.dgd_mnist_decoder` of PyTorch's own layers."""
    return nn.Sequential(
        nn.Linear(2, 30), nn.ReLU(),
        nn.Linear(30, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )


def plain_log_prob(z: torch.Tensor, means: torch.Tensor, log_vars: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Log-density `[N]` of a mixture of diagonal Gaussians."""
    squared = (z[:, None] - means).square() * torch.exp(-log_vars)
    return (logits.log_softmax(0) - 0.5 * (squared + log_vars + math.log(2 * math.pi)).sum(-1)).logsumexp(1)


def plain_steps(x: torch.Tensor, compiled: bool = False) -> Callable[[], None]:
    """The same steps as a PyTorch user writes them: rows gathered by index, momentum on those rows, fused Adam elsewhere."""
    decoder, z, velocity = plain_decoder(), torch.randn(len(x), 2), torch.zeros(len(x), 2)
    means = uniform_ball(COMPONENTS, 2).requires_grad_()
    log_vars = torch.full((COMPONENTS, 2), -2.0, requires_grad=True)
    logits = torch.zeros(COMPONENTS, requires_grad=True)
    optimizers = [torch.optim.Adam(decoder.parameters(), lr=1e-3, weight_decay=1e-5, fused=True),
                  torch.optim.Adam([means, log_vars, logits], lr=1e-1, fused=True)]
    order = batch_order(len(x), BATCH, 0, 1)[:STEPS]

    def loss(batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        log_px_z = -F.binary_cross_entropy_with_logits(decoder(rows), batch, reduction="sum")
        log_pz = plain_log_prob(rows, means, log_vars, logits).sum()
        log_prior = soft_ball_log_prob(means).sum() + normal_log_prob(-log_vars, 2.0, 2.0).sum()
        return -(log_px_z + log_pz + len(batch) / len(x) * log_prior)

    objective = torch.compile(loss, dynamic=False) if compiled else loss

    def run() -> None:
        for index in order:
            rows = z[index].requires_grad_()
            objective(x[index], rows).backward()
            velocity[index] = 0.9 * velocity[index] - 1e-2 * rows.grad
            z[index] += velocity[index]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return run


def run_epoch(compiled: bool) -> dict[str, Timing]:
    """Seconds an epoch of 5,000 digits by name, from the time of STEPS steps; prints them."""
    x = load("mnist5k").pixels(binarize=True).x
    torch.manual_seed(0)
    calls = {OURS: our_steps(x), "plain": plain_steps(x)}
    if compiled:
        calls["compiled plain"] = plain_steps(x, compiled=True)
    scale = len(x) / (STEPS * BATCH)
    timings = {name: Timing(scale * t.median, scale * t.low, scale * t.high)
               for name, t in time_calls(calls, "cpu", rounds=25).items()}
    print(f"\nDGD training epoch, {len(x)} digits in batches of {BATCH} (scaled from {STEPS} steps)")
    for name, t in sorted(timings.items(), key=lambda item: item[1].median):
        print(f"  {name:16} {t.median:6.3f} s   {t.low:.3f} – {t.high:.3f}   {t.median / timings[OURS].median:.2f}×")
    return timings
