"""log p(x) by 4,096 importance samples against the decoder's own forward time: `python -m latent_engine.bench.log_likelihood`.

The network is that of Burda et al. (2016), 784-200-200-50 and back, with its first weights: they do not change the work.
"""

import math

import torch
from torch.nn import functional as F

from latent_engine import PRESETS, load_data, log_likelihood

from .suite import OURS
from .timing import Timing, peak_memory, time_calls

IMAGES, SAMPLES, ROWS = 20, 4096, 1024


@torch.no_grad()
def plain(system: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """log p(x) `[N]` as a PyTorch user writes it: image by image, all samples at once."""
    found = []
    for image in x:
        mean, log_var = system.encoder(image[None]).chunk(2, 1)
        noise = torch.randn(SAMPLES, mean.shape[1])
        z = mean + (0.5 * log_var).exp() * noise
        logits = system.decoder(z)
        log_px_z = -F.binary_cross_entropy_with_logits(logits, image.expand_as(logits), reduction="none").flatten(1).sum(1)
        log_w = log_px_z + 0.5 * (noise.square() + log_var - z.square()).sum(1)
        found.append(log_w.logsumexp(0) - math.log(SAMPLES))
    return torch.stack(found)


def run() -> dict[str, Timing]:
    """Seconds an image by name; prints them."""
    torch.manual_seed(0)
    x = load_data("mnist5k", "test").pixels(binarize=True).x[:IMAGES]
    system = PRESETS["vae"].system(PRESETS["vae"].config, x.shape[1:]).eval()
    z = torch.randn(ROWS, system.config.latent_dim)

    @torch.no_grad()
    def decoder() -> None:
        for _ in range(IMAGES * SAMPLES // ROWS):
            system.decoder(z)

    calls = {"decoder alone": decoder, OURS: lambda: log_likelihood(system, x, SAMPLES), "plain": lambda: plain(system, x)}
    for call in calls.values():
        call()
    difference = (log_likelihood(system, x, SAMPLES).log_px - plain(system, x)).abs().max().item()
    timings = {name: Timing(t.median / IMAGES, t.low / IMAGES, t.high / IMAGES)
               for name, t in time_calls(calls, "cpu", rounds=15).items()}
    print(f"log p(x) of a digit by {SAMPLES} samples, decoder 50-200-200-784; values differ by at most {difference:.2f} nats")
    for name, t in timings.items():
        print(f"  {name:16} {t.median * 1e3:6.2f} ms   {t.low * 1e3:.2f} – {t.high * 1e3:.2f}   "
              f"{t.median / timings['decoder alone'].median:.2f}×   {(peak_memory(calls[name], 'cpu') or 0) / 1e6:.0f} MB")
    return timings


if __name__ == "__main__":
    run()
