"""The Fréchet distance of 2,048 features from 10,000 rows each, as FID takes it: `python -m latent_engine.bench.frechet`.

The rows are made to have given moments with a common set of axes, so that the distance is known: |m|² + Σ (√a − √b)². The
peers are the formula of pytorch-fid, with SciPy's root of the product of the covariances, and that of torchmetrics, with the
eigenvalues of the product. SciPy's takes half a minute: each peer is run once.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from latent_engine import frechet_distance
from latent_engine.moments import Moments

from .suite import OURS
from .timing import peak_memory

FEATURES, ROWS, ROUNDS = 2048, 10_000, 2


def sqrtm(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """The distance of means and covariances as pytorch-fid 0.3 takes it."""
    (m1, s1), (m2, s2) = first, second
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular products
        root = scipy.linalg.sqrtm(s1 @ s2)
    return float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


def eigvals(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The distance of means and covariances as torchmetrics 1.9 takes it."""
    (m1, s1), (m2, s2) = first, second
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root).item()


# How each takes the moments of rows, the distance of two of them, and how often it is run.
PEERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Any], float], int]] = {
    OURS: (lambda x: Moments().add(x), frechet_distance, ROUNDS),
    "eigvals": (lambda x: (x.mean(0), x.T.cov()), eigvals, 1),
    "sqrtm": (lambda x: (x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)), sqrtm, 1),
}


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Least seconds a call, and what it returned."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), value


def run() -> dict[str, tuple[float, float]]:
    """Seconds of the moments of both sets and of their distance, by name; prints them with errors."""
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(1, FEATURES + 1, dtype=torch.float64)
    a, b = 10 * number**-1.5, 10 * number**-1.5 * (0.5 * number.sin()).exp()
    axes = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)).Q
    shift = 0.01 * axes[0]
    noise = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    scores = (ROWS - 1) ** 0.5 * torch.linalg.qr(noise - noise.mean(0)).Q
    x, y = (scores * a.sqrt() @ axes.T + shift + 0.5, scores * b.sqrt() @ axes.T + 0.5)
    exact = (shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    print(f"Fréchet distance of {FEATURES} features, {ROWS} rows each, float64, {torch.get_num_threads()} threads; "
          f"extra memory {(peak_memory(lambda: frechet_distance(x, y), 'cpu') or 0) / 1e6:.0f} MB")
    times: dict[str, tuple[float, float]] = {}
    for name, (moments, distance, rounds) in PEERS.items():
        first, of_x = timed(lambda: moments(x), rounds)  # noqa: B023
        second, of_y = timed(lambda: moments(y), rounds)  # noqa: B023
        third, value = timed(lambda: distance(of_x, of_y), rounds)  # noqa: B023
        times[name] = first + second, third
        ratios = [theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)]
        print(f"  {name:16} moments {times[name][0]:5.2f} s  {ratios[0]:5.2f}×   distance {third:6.2f} s  {ratios[1]:5.2f}×   "
              f"both {sum(times[name]) / sum(times[OURS]):5.2f}×   relative error {abs(value / exact - 1):.0e}", flush=True)
    return times


if __name__ == "__main__":
    run()
