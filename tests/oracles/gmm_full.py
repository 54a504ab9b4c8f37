"""The log-density of a Gaussian mixture with full covariances, its gradients and its moments, in 80-bit arithmetic."""

import numpy as np

from . import longdouble


def exact(z, means, precision_cholesky, log_weights, grad) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-density, responsibilities, the gradients of the four arguments for the incoming gradient `grad`, and the first and
    second moments with `grad` as the weights of the rows; the zeroth is the gradient of log_weights.

    The second list holds the scale of each: the sum of the magnitudes of its terms, of which those with a density carry the
    size of its logarithm, because an error of eps·size there is one of eps·size in the density.
    """
    z, means, chol, log_weights, g = (longdouble(t) for t in (z, means, precision_cholesky, log_weights, grad))
    chol, diagonal = np.triu(chol), np.diagonal(chol, axis1=1, axis2=2)
    delta = z[:, None, :] - means
    half_log_2pi = 0.5 * means.shape[1] * np.log(2 * np.pi * np.ones((), np.longdouble))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_det = np.log(diagonal)
    white, wide_white = np.einsum("nki,kij->nkj", delta, chol), np.einsum("nki,kij->nkj", np.abs(delta), np.abs(chol))
    logits = log_weights + log_det.sum(1) - half_log_2pi - 0.5 * (white**2).sum(-1)
    sizes = np.abs(log_weights) + np.abs(log_det).sum(1) + half_log_2pi + 0.5 * (wide_white**2).sum(-1)
    top = logits.max(1, keepdims=True, initial=-np.inf)
    top = np.where(np.isinf(top), 0, top)
    with np.errstate(divide="ignore"):
        log_prob = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    resp = np.exp(logits - np.where(np.isinf(log_prob), 0, log_prob)[:, None])
    sizes = np.where(resp > 0, sizes, 0)
    size = (resp * sizes).sum(1)
    wide = resp * (1 + sizes + size[:, None])

    def outputs(value, r, a, d, p, y, sign):
        dchol = sign * np.einsum("nk,nki,nkj->kij", a, d, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.einsum("kii->ki", dchol)[...] += a.sum(0)[:, None] / diagonal
        pulled = np.einsum("nk,kij,nkj->nki", a, p, y)
        return [value, r, sign * pulled.sum(1), pulled.sum(0), np.triu(dchol), a.sum(0),
                np.einsum("nk,nki->ki", a, d), np.einsum("nk,nki,nkj->kij", a, d, d)]

    return (outputs(log_prob, resp, g[:, None] * resp, delta, chol, white, -1),
            outputs(size, wide, np.abs(g)[:, None] * wide, np.abs(delta), np.abs(chol), wide_white, 1))
