"""The inverse multiquadric as a sum of Gaussian kernels."""

import functools
import math

import numpy as np

_TAIL = 2.0  # exponents up to which the tail of the smallest rates is compressed


def inverse_multiquadric(widths: tuple[float, ...], reach: float, tolerance: float) -> tuple[list[float], list[float]]:
    """Rates a and weights w > 0 with Σ_q w_q exp(−a_q r²) = (1 + ε) Σ_s C_s / (C_s + r²), |ε| ≤ `tolerance` for r² ≤ `reach`.

    `widths` are the C_s; one rule serves all of them. The kernel is ∫ τ Σ_s C_s exp(−(C_s + r²) τ) dξ over τ = e^ξ, of which
    the trapezoidal rule of step h makes the relative error 2 |Γ(1 + 2πi/h)| ≈ 2 √(4π²/h) exp(−π²/h) at every C and r²
    (Poisson summation). The infinitely many nodes with τ ≤ 2 / reach are then compressed into the few of a Gauss rule of
    their own measure (Golub & Welsch 1969). Beyond `reach` the sum decays faster than the kernel.
    """
    return _inverse_multiquadric(widths, reach, tolerance)


# A traced graph holds the numbers. `torch.compiler.assume_constant_result` sets this too, but takes a second to import dynamo.
inverse_multiquadric._dynamo_marked_constant = True


@functools.lru_cache(maxsize=64)
def _inverse_multiquadric(widths: tuple[float, ...], reach: float, tolerance: float) -> tuple[list[float], list[float]]:
    step = 1.0
    while 2 * math.sqrt(2 * math.pi * 2 * math.pi / step) * math.exp(-math.pi**2 / step) > tolerance / 2:
        step *= 0.98
    C = np.array(widths)
    last = math.log(_TAIL / reach)
    first, end = math.log(1e-3 * tolerance / (C.max() + reach)), math.log((-math.log(tolerance) + 6) / C.min())
    rates = np.exp(last + step * np.arange(math.floor((first - last) / step), math.ceil((end - last) / step)))
    weights = step * rates * (C * np.exp(-C * rates[:, None])).sum(1)
    keep = weights > 1e-2 * tolerance * C.size
    tail = rates <= _TAIL / reach * (1 + 1e-9)
    few_rates, few_weights = _gauss(rates[tail], weights[tail], _tail_nodes(tolerance))
    rest = keep & ~tail
    return [*few_rates.tolist(), *rates[rest].tolist()], [*few_weights.tolist(), *weights[rest].tolist()]


def _tail_nodes(tolerance: float) -> int:
    """Nodes with which Gauss-Legendre integrates exp(−x) over [0, 2] to `tolerance` / 4."""
    n = 1
    while _TAIL ** (2 * n + 1) * math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 3) > tolerance / 4:
        n += 1
    return n


def _gauss(x: np.ndarray, w: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the n-point Gauss rule of the measure Σ w_i δ(x_i)."""
    total = w.sum()
    diagonal, off, before, vector = [], [0.0], np.zeros_like(x), np.sqrt(w / total)
    for _ in range(n):  # Lanczos
        diagonal.append((vector * x * vector).sum())
        following = (x - diagonal[-1]) * vector - off[-1] * before
        off.append(math.sqrt((following**2).sum()))
        before, vector = vector, following / off[-1]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off[1:-1], 1) + np.diag(off[1:-1], -1))
    return nodes, total * vectors[0] ** 2
