"""The Fréchet distance of 2,048 features from 10,000 rows each, as FID takes it: `python -m latent_engine.bench.frechet`.

The rows are made to have given moments with a common set of axes, so that the distance is known: |m|² + Σ (√a − √b)². The
peers are the formula of pytorch-fid, with SciPy's root of the product of the covariances, and that of torchmetrics, with the
eigenvalues of the product. SciPy's takes half a minute: it is run once.
"""

import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from latent_engine import frechet_distance

from .suite import OURS
from .timing import peak_memory

FEATURES, ROWS, ROUNDS = 2048, 10_000, 3


def rows_with(mean: Tensor, variances: Tensor, axes: Tensor, generator: torch.Generator) -> Tensor:
    """Rows `[ROWS, D]` of that mean whose covariance has these eigenvalues and eigenvectors, to rounding."""
    noise = torch.randn(ROWS, len(mean), generator=generator, dtype=torch.float64)
    scores = torch.linalg.qr(noise - noise.mean(0)).Q
    return (ROWS - 1) ** 0.5 * scores * variances.sqrt() @ axes.T + mean


def sqrtm(x: Tensor, y: Tensor) -> float:
    """As pytorch-fid 0.3 does it."""
    (m1, s1), (m2, s2) = ((a.mean(0), np.cov(a, rowvar=False)) for a in (x.numpy(), y.numpy()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular products
        root = scipy.linalg.sqrtm(s1 @ s2)
    return float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


def eigvals(x: Tensor, y: Tensor) -> float:
    """As torchmetrics 1.9 does it."""
    s1, s2 = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root).item()


def run() -> dict[str, float]:
    """Least seconds a call by name; prints them with errors and memory."""
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(1, FEATURES + 1, dtype=torch.float64)
    a, b = 10 * number**-1.5, 10 * number**-1.5 * (0.5 * number.sin()).exp()
    axes = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)).Q
    mean = 0.5 + 0.01 * axes[0]
    x = rows_with(mean, a, axes, generator)
    y = rows_with(torch.full_like(mean, 0.5), b, axes, generator)
    exact = ((mean - 0.5).square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    calls: dict[str, tuple[Callable[[Tensor, Tensor], float], int]] = {
        OURS: (frechet_distance, ROUNDS), "eigvals": (eigvals, 1), "sqrtm": (sqrtm, 1)}
    print(f"Fréchet distance of {FEATURES} features, {ROWS} rows each, float64; {torch.get_num_threads()} threads; d² = {exact:.6f}")
    least: dict[str, float] = {}
    for name, (call, rounds) in calls.items():
        for _ in range(rounds):
            begin = time.perf_counter()
            value = call(x, y)
            least[name] = min(least.get(name, float("inf")), time.perf_counter() - begin)
        memory = peak_memory(lambda: frechet_distance(x, y), "cpu") if name == OURS else None
        print(f"  {name:16} {least[name]:6.2f} s   {least[name] / least[OURS]:.1f}×   relative error {abs(value / exact - 1):.0e}"
              + ("" if memory is None else f"   {memory / 1e6:.0f} MB"), flush=True)
    return least


if __name__ == "__main__":
    run()
