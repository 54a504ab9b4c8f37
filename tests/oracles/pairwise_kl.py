"""KL divergences between all ordered pairs of diagonal Gaussians, in 80-bit arithmetic."""

import numpy as np
import torch

from . import longdouble


def exact(mu, log_var, grad_mean) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and gradients by name, and the scale of each: the size of the terms that it is the sum of.

    `grad_mean` [D] is the incoming gradient of the mean per dimension; those of the scalars are one.
    """
    info = torch.finfo(mu.dtype)
    mu, log_var, grad_mean = (longdouble(t) for t in (mu, log_var, grad_mean))
    N = len(mu)
    pairs = N * (N - 1)
    delta, inverse = mu[:, None] - mu[None], np.exp(-log_var)[None]
    v_ratio, ratio = np.exp(log_var)[:, None] * inverse, delta**2 * inverse
    off = ~np.eye(N, dtype=bool)[:, :, None]
    kl = np.where(off, 0.5 * (log_var[None] - log_var[:, None] + v_ratio + ratio - 1), 0)
    size = np.where(off, 0.5 * (np.abs(log_var[None] - log_var[:, None]) + v_ratio + ratio + 1), 0)
    total, mean = kl.sum(2), kl.sum() / pairs
    deviation = np.sqrt((np.where(off[:, :, 0], total - mean, 0) ** 2).sum() / (pairs - 1))
    by_std = np.where(off[:, :, 0], total - mean, 0) / ((pairs - 1) * deviation if deviation else np.inf)
    # An error of eps in each term of a divergence is one of eps·size in its weight.
    std_size = np.where(off[:, :, 0], size.sum(2) + mean, 0) / ((pairs - 1) * deviation if deviation else np.inf)
    e = np.where(off, np.exp(-kl), 0)
    lost = np.minimum(e, info.tiny) / (4 * info.eps)  # exp is 0 below the smallest normal number; the budget is 4 eps
    sigmoid = -e / (1 + e) / pairs

    def gradients(weights, sizes):
        """Of Σ weights KL_d, for weights that broadcast to [N, N, D], and of the magnitudes of its terms."""
        g, s = (np.where(off, np.broadcast_to(w, kl.shape), 0) for w in (weights, np.abs(sizes)))
        by_mu = g * delta * inverse
        by_log_var = 0.5 * (g * (v_ratio - 1)).sum(1) + 0.5 * (g * (1 - v_ratio - ratio)).sum(0)
        magnitude = s * np.abs(delta) * inverse
        magnitude_log_var = 0.5 * ((s * (v_ratio + 1)).sum(1) + (s * (1 + v_ratio + ratio)).sum(0))
        return (by_mu.sum(1) - by_mu.sum(0), by_log_var), (magnitude.sum(1) + magnitude.sum(0), magnitude_log_var)

    values = {"mean_per_dim": kl.sum((0, 1)) / pairs, "std": deviation, "diversity": np.log1p(e).sum() / pairs}
    scales = {"mean_per_dim": size.sum((0, 1)) / pairs, "std": np.sqrt((size.sum(2) ** 2).sum() / pairs),
              "diversity": (np.log1p(e) + e * size + lost).sum() / pairs}
    weights = {"mean_per_dim": (grad_mean / pairs, grad_mean / pairs), "std": (by_std[:, :, None], std_size[:, :, None]),
               "diversity": (sigmoid, sigmoid * (1 + size) - lost / pairs)}
    for name, (weight, weight_size) in weights.items():
        found, magnitudes = gradients(weight, weight_size)
        for part, g, m in zip(("mu", "log_var"), found, magnitudes, strict=True):
            values[f"{name} by {part}"], scales[f"{name} by {part}"] = g, m
    as_arrays = lambda d: {k: np.asarray(v, np.longdouble) for k, v in d.items()}  # noqa: E731
    return as_arrays(values), as_arrays(scales)
