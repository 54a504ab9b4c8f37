"""Kernel sums and their gradients in 80-bit arithmetic."""

import numpy as np
import torch

from . import longdouble


def profile(u: np.ndarray, kernel: str, scales, unit, least: float = 0.0) -> tuple[np.ndarray, ...]:
    """k(u) and dk/du of squared distances, the slope at a cusp being 0, and the scales of both.

    A term e^−t has the scale (1 + t) e^−t: an error of eps·t in t is one of eps·t·e^−t in the term. To that comes `least`,
    the smallest normal number over eps: an exponential below the former may be 0.
    """
    unit, r = np.longdouble(unit), np.sqrt(u)
    half = np.divide(0.5, r, out=np.zeros_like(r), where=u > 0)
    if kernel == "energy":
        return -r, -half, r, half
    sums = [np.zeros_like(u) for _ in range(4)]
    for s in np.asarray(scales, np.longdouble):
        width = unit * s
        if kernel == "gaussian":
            t, slope = u / width, 1 / width
        elif kernel == "laplacian":
            t, slope = r / np.sqrt(width), half / np.sqrt(width)
        elif kernel == "imq":
            t, slope = np.log1p(u / width), 1 / (width + u)
        else:
            t, slope = s * np.log1p(u / width), 1 / (unit + u / s)
        k, condition = np.exp(-t), 1 if kernel == "imq" else 1 + t
        for total, term in zip(sums, (k, -slope * k, condition * k + least, slope * (condition * k + least)), strict=True):
            total += term
    return tuple(sums)


def exact(x, y, kernel, scales, unit, estimator, sections=(1, 1, -2)):
    """Value and gradients of x and y, and the scale of each: the sum of the magnitudes of its terms."""
    least = torch.finfo(x.dtype).tiny / torch.finfo(x.dtype).eps
    x, y = longdouble(x), longdouble(y)
    grads, sizes = [np.zeros_like(x), np.zeros_like(y)], [np.zeros_like(x), np.zeros_like(y)]
    value = size = np.zeros((), np.longdouble)
    for i, j, factor in ((0, 0, sections[0]), (1, 1, sections[1]), (0, 1, sections[2])):
        a, b = (x, y)[i], (x, y)[j]
        if factor == 0:
            continue
        delta = a[:, None] - b[None]
        k, slope, k_size, slope_size = profile((delta**2).sum(-1), kernel, scales, unit, least)
        pairs = a.shape[0] * b.shape[0]
        if i == j and estimator != "biased":
            np.fill_diagonal(k, 0)
            np.fill_diagonal(k_size, 0)
            pairs -= a.shape[0]
        weight = factor / np.longdouble(1 if estimator == "sum" else pairs)
        value, size = value + weight * k.sum(), size + np.abs(weight) * k_size.sum()
        pull, pull_size = 2 * weight * slope[..., None] * delta, 2 * np.abs(weight) * slope_size[..., None] * np.abs(delta)
        for end, axis, sign in ((i, 1, 1), (j, 0, -1)):
            grads[end] = grads[end] + sign * pull.sum(axis)
            sizes[end] = sizes[end] + pull_size.sum(axis)
    return [np.asarray(value), *grads], [np.asarray(size), *sizes]
