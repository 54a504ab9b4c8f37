"""Small autoencoders and what they should compute, in NumPy."""

import numpy as np
import torch
from scipy import stats

from latent_engine import VAE, Batch, VAEConfig
from latent_engine.bounds import reparametrize

SHAPE = (1, 3, 5)
NORMAL = stats.norm


def tiny(kind=VAE, config=VAEConfig, rows=6, **settings):
    """A system on small random binary images, in float64."""
    torch.manual_seed(0)
    settings = {"latent_dim": 4, "hidden": (7,)} | settings
    system = kind(config(**settings), SHAPE).double()
    x = torch.rand(rows, *SHAPE, dtype=torch.float64).round()
    return system, Batch(x, torch.arange(rows))


def seen(system, x, seed=0, samples=None):
    """Posterior mean and deviation, the z that the loss draws from `seed`, and the decoder's output, in NumPy."""
    with torch.no_grad():
        posterior = system.encode(x)
        torch.manual_seed(seed)
        z = reparametrize(posterior, samples or system.config.samples)
        output = torch.stack([system.decoder(part) for part in z])
    return posterior.mean.numpy(), np.exp(0.5 * posterior.log_var.numpy()), z.numpy(), output.numpy()


def loss(system, batch, seed=0):
    torch.manual_seed(seed)
    return {name: term.item() for name, term in system.loss(batch, "main").items()}


def log_bernoulli(logits, x):
    return np.log(np.where(x == 1, 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits)))).reshape(*logits.shape[:2], -1).sum(-1)


def kl(mean, std):
    return (np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5).sum(1)
