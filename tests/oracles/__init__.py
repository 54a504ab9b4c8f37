"""The error budget, and what the independent implementations in this folder share: one file an op."""

import numpy as np
import torch
from torch import Tensor


def longdouble(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of a broadcast argument: sums of the full one."""
    lead = array.ndim - len(shape)
    axes = tuple(i for i in range(array.ndim) if i < lead or shape[i - lead] == 1)
    return array.sum(axes, keepdims=True).reshape(shape)


def assert_within_budget(name: str, actual: Tensor, direct: Tensor, exact: np.ndarray, scale: np.ndarray | None = None) -> None:
    """err(actual) ≤ 2·err(direct) + 4 eps·scale, in norm and in maximum, where `direct` is the plain PyTorch formula in the
    same dtype, `exact` the truth and `scale` its size, or the sum of the magnitudes of its terms."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {exact.shape}"
    finite = np.isfinite(exact)
    for t in (actual, direct):
        assert (longdouble(t)[~finite] == exact[~finite]).all(), f"{name}: {t} where {exact} is right"
    for measure in (np.linalg.norm, lambda e: np.abs(e).max(initial=0)):
        error, allowed, size = (float(measure(e.astype(float))) for e in (
            longdouble(actual)[finite] - exact[finite], longdouble(direct)[finite] - exact[finite],
            (exact if scale is None else scale)[finite]))
        budget = 2 * allowed + 4 * torch.finfo(direct.dtype).eps * size
        assert error <= budget, f"{name}: error {error:.3e}, direct formula {allowed:.3e}, scale {size:.3e}"
