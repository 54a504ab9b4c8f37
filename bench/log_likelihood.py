"""log p(x) by 4,096 importance samples against the decoder's own forward time: `python -m latent_engine.bench.log_likelihood`.

The network is that of Burda et al. (2016), 784-200-200-50 and back, with its first weights: they do not change the work. Where
pythae is installed, its `get_nll` of the same network is timed too.
"""

import importlib.util
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from latent_engine import PRESETS, load_data, log_likelihood

from .suite import OURS
from .timing import Timing, peak_memory, time_calls

IMAGES, SAMPLES, ROWS = 20, 4096, 1024
PYTHAE_ROWS = 128  # samples that pythae decodes at a time: of the divisors of 4,096 the nearest to its default of 100


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


def pythae_log_likelihood(system: torch.nn.Module, x: torch.Tensor) -> Callable[[], float]:
    """The mean of log p(x) as pythae's VAE with the networks of `system` gives it; without gradients, which it would record."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def forward(self, x: torch.Tensor) -> ModelOutput:
            mean, log_var = system.encoder(x).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=system.decoder(z).sigmoid())

    config = VAEConfig(input_dim=tuple(x.shape[1:]), latent_dim=system.config.latent_dim, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder()).eval()
    return torch.no_grad()(lambda: model.get_nll(x, n_samples=SAMPLES, batch_size=PYTHAE_ROWS))


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
    estimate = log_likelihood(system, x, SAMPLES)
    difference = (estimate.log_px - plain(system, x)).abs().max().item()
    print(f"log p(x) of a digit by {SAMPLES} samples, decoder 50-200-200-784; values differ by at most {difference:.2f} nats")
    if importlib.util.find_spec("pythae"):
        calls["pythae"] = pythae_log_likelihood(system, x)
        print(f"  mean of {IMAGES} digits {estimate.mean:.3f}, standard error {estimate.monte_carlo_error:.3f}; "
              f"pythae {calls['pythae']():.3f}")
    timings = {name: Timing(t.median / IMAGES, t.low / IMAGES, t.high / IMAGES)
               for name, t in time_calls(calls, "cpu", rounds=15).items()}
    for name, t in timings.items():
        print(f"  {name:16} {t.median * 1e3:6.2f} ms   {t.low * 1e3:.2f} – {t.high * 1e3:.2f}   "
              f"{t.median / timings['decoder alone'].median:.2f}×   {(peak_memory(calls[name], 'cpu') or 0) / 1e6:.0f} MB")
    return timings


if __name__ == "__main__":
    run()
