"""Reparametrised samples and their KL divergence in 80-bit arithmetic."""

import numpy as np

from . import longdouble

NAMES = ("z", "kl", "mean", "log_var")


def exact(mean, log_var, noise, grad_z=None, grad_kl=None) -> tuple[list, list]:
    """z, KL and the gradients of mean and log_var; the second list holds the sums of the magnitudes of their terms.

    e^v − 1 − v is a series where the difference would cancel.
    """
    mean, v, noise = (longdouble(t) for t in (mean, log_var, noise))
    g = np.zeros_like(noise) if grad_z is None else longdouble(grad_z)
    k = np.zeros_like(mean) if grad_kl is None else longdouble(grad_kl)
    std, growth, samples = np.exp(v / 2), np.expm1(v), tuple(range(noise.ndim - mean.ndim))
    term, series = v**2 / 2, np.zeros_like(v)
    for i in range(3, 30):
        series, term = series + term, term * v / i
    kl = (mean**2 + np.where(abs(v) < 1, series, growth - v)) / 2

    def outputs(mean, noise, growth, kl, g, k):
        return [mean + std * noise, kl, g.sum(samples) + k * mean, (std * (g * noise).sum(samples) + k * growth) / 2]

    return (outputs(mean, noise, growth, kl, g, k),
            outputs(*(abs(t) for t in (mean, noise, growth, kl, g, k))))
