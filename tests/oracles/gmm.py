"""The log-density of a Gaussian mixture in 80-bit arithmetic."""

import numpy as np

from . import longdouble, sum_to


def exact(z, means, log_vars, log_weights, mask=None, grad=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-density, responsibilities and the four gradients for the incoming gradient `grad`, in 80-bit arithmetic.

    The second list holds the scale of each: the sum of the magnitudes of its terms, of which those with a density carry the
    size of its logarithm, because an error of eps·size there is one of eps·size in the density.
    """
    z, means, log_vars, log_weights, g = (longdouble(t) for t in (z, means, log_vars, log_weights, grad))
    shape, log_vars = log_vars.shape, np.broadcast_to(log_vars, means.shape)
    delta, inverse = z[:, None, :] - means, np.exp(-log_vars)
    log_2pi = np.log(2 * np.pi * np.ones((), np.longdouble))
    logits = log_weights - 0.5 * (delta**2 * inverse + log_vars + log_2pi).sum(-1)
    sizes = np.abs(log_weights) + 0.5 * (delta**2 * inverse + np.abs(log_vars) + log_2pi).sum(-1)
    if mask is not None:
        logits = np.where(mask.cpu().numpy(), logits, -np.inf)
    top = logits.max(1, keepdims=True, initial=-np.inf)
    top = np.where(np.isinf(top), 0, top)
    with np.errstate(divide="ignore"):
        log_prob = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    resp = np.exp(logits - np.where(np.isinf(log_prob), 0, log_prob)[:, None])
    sizes = np.where(resp > 0, sizes, 0)
    size = (resp * sizes).sum(1)
    wide, a = resp * (1 + sizes + size[:, None]), np.abs(g)[:, None]

    def outputs(value, r, a, d, sign):
        dlog_vars = 0.5 * (np.einsum("nk,nkd,kd->kd", a, d**2, inverse) + sign * a.sum(0)[:, None])
        return [value, r, -np.einsum("nk,nkd,kd->nd", a, d, inverse), np.einsum("nk,nkd,kd->kd", a, d, inverse),
                sum_to(dlog_vars, shape), a.sum(0)]

    return outputs(log_prob, resp, g[:, None] * resp, delta, -1), outputs(size, wide, a * wide, np.abs(delta), 1)
