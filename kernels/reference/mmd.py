"""Reference of `mmd2` and its relatives: the kernels and sums as formulas, with the N×M×D differences in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


def profile(squared: Tensor, kernel: str, scales: Sequence[float], unit: float) -> Tensor:
    """k of squared distances of any shape, summed over the scales."""
    if kernel in ("laplacian", "energy"):
        same = squared == 0  # √ has no slope there; that of the kernel counts as 0
        distance = squared.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
        if kernel == "energy":
            return -distance
        return torch.stack([torch.exp(-distance / (unit * s) ** 0.5) for s in scales]).sum(0)
    k = {"gaussian": lambda s: torch.exp(-squared / (unit * s)),
         "imq": lambda s: unit * s / (unit * s + squared),
         "rational_quadratic": lambda s: (1 + squared / (unit * s)) ** -s}[kernel]
    return torch.stack([k(s) for s in scales]).sum(0)


def kernel_matrix(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float], unit: float) -> Tensor:
    """x[N,D] y[M,D] -> k(x_i, y_j), [N,M]."""
    return profile((x[:, None] - y).square().sum(-1), kernel, scales, unit)


def mmd(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float], unit: float, estimator: str,
        sections: Sequence[float]) -> Tensor:
    """`sections` times the sums or means over the pairs of x, of y, and of x and y; "biased" keeps the pairs i = j."""
    total = x[:0].sum() + y[:0].sum()  # 0, and a gradient of 0 for a sample that counts for nothing
    for a, b, factor in zip((x, y, x), (x, y, y), sections, strict=True):
        if factor == 0:
            continue
        k, pairs = kernel_matrix(a, b, kernel, scales, unit), a.shape[0] * b.shape[0]
        if a is b and estimator != "biased":
            k = k.masked_fill(torch.eye(k.shape[0], dtype=torch.bool, device=k.device), 0.0)
            pairs -= k.shape[0]
        total = total + factor * (k.sum() if estimator == "sum" else k.sum() / pairs)
    return total
