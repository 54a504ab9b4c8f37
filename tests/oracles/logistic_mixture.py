import numpy as np
from torch import Tensor

from . import longdouble

H = 1 / np.longdouble(255)


def _log_sigmoid(a: np.ndarray) -> np.ndarray:
    return np.where(a < 0, a, 0) - np.log1p(np.exp(-np.abs(a)))


def exact(x: Tensor, params: Tensor, grad: Tensor, mask: Tensor | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-likelihood and the gradient of the parameters, in 80-bit arithmetic, from derivatives written out in a and b.

    The second list holds the scale of each: the magnitudes of the terms, of which those that stand for an exponent carry its
    size, because an error of eps·size there is one of eps·size in the weight.
    """
    x, flat, g = longdouble(x), longdouble(params), longdouble(grad)[..., None, None, None]
    N, C, H_, W = x.shape
    rows = 10 if C == 3 else 3
    p = flat.reshape(*flat.shape[:-3], rows, flat.shape[-3] // rows, H_, W)
    logits, rest = p[..., 0, :, :, :], p[..., 1:, :, :, :].reshape(*p.shape[:-4], C, (rows - 1) // C, *p.shape[-3:])
    x = x[:, :, None]
    means, raw = rest[..., 0, :, :, :].copy(), rest[..., 1, :, :, :]
    if C == 3:
        coefs = np.tanh(rest[..., 2, :, :, :])
        means[..., 1, :, :, :] += coefs[..., 0, :, :, :] * x[:, 0]
        means[..., 2, :, :, :] += coefs[..., 1, :, :, :] * x[:, 0] + coefs[..., 2, :, :, :] * x[:, 1]
    inv = np.exp(-np.maximum(raw, -7))
    a, b, w = (x + H - means) * inv, (x - H - means) * inv, 2 * H * inv
    low, high = x < -1 + H, x > 1 - H
    log_bins = np.where(low, _log_sigmoid(a), np.where(high, _log_sigmoid(-b),
                                                      _log_sigmoid(a) + _log_sigmoid(-b) + np.log(-np.expm1(-w))))
    joint = logits + log_bins.sum(-4)

    def log_sum(terms):
        top = terms.max(-3, keepdims=True)
        return top + np.log(np.exp(terms - top).sum(-3, keepdims=True))

    pixel, prior = log_sum(joint), log_sum(logits)
    resp, share = np.exp(joint - pixel), np.exp(logits - prior)
    counts = np.ones((N, H_, W), bool) if mask is None else mask.cpu().numpy()
    value = np.where(counts, (pixel - prior)[..., 0, :, :], 0).sum((-2, -1))

    # d log(bin)/da and d log(bin)/d(−b): a sigmoid each, and the two ends of the width, whose difference is exact
    ends = w / np.expm1(w)
    da, db = np.exp(_log_sigmoid(-a)), -np.exp(_log_sigmoid(b))
    dmean = -inv * np.where(low, da, np.where(high, db, da + db))
    dlog_scale = np.where(low, -a * da, np.where(high, -b * db, -a * da - b * db - ends))
    moved = np.abs(x * inv) + np.abs(means * inv)
    size = np.where(low | high, 0, np.abs(np.log(w))) + np.abs(a) + np.abs(b) + np.abs(raw) + moved

    def gradients(weight, share, dmean, dlog_scale, slope, sign):
        out = np.zeros_like(p)
        out[..., 0, :, :, :] = weight - sign * share
        blocks = out[..., 1:, :, :, :].reshape(rest.shape)  # a view
        weight = weight[..., None, :, :, :]
        blocks[..., 0, :, :, :] = weight * dmean
        blocks[..., 1, :, :, :] = np.where(raw < -7, 0, weight * dlog_scale)
        if C == 3:
            for j, (of, given) in enumerate(((1, 0), (2, 0), (2, 1))):
                blocks[..., j, 2, :, :, :] = (weight * dmean)[..., of, :, :, :] * x[:, given] * slope[..., j, :, :, :]
        return (out * counts[:, None, None]).reshape(flat.shape)

    slope = 1 - coefs**2 if C == 3 else None
    total = np.where(resp > 0, size.sum(-4) + np.abs(logits), 0)  # −inf weighs nothing
    spread = 1 + total + (resp * total).sum(-3, keepdims=True)
    # a weight has the relative error `spread`; da and db have what the errors of a and b, of the size `moved`, make of them
    moved = moved + np.abs(a) + np.abs(b)
    bend, spread_ = np.abs(da) * (1 - np.abs(da)) + np.abs(db) * (1 - np.abs(db)), spread[..., None, :, :, :]
    steep = inv * ((np.abs(da) + np.abs(db)) * spread_ + bend * moved)
    wide = (np.abs(a * da) + np.abs(b * db) + ends) * spread_ + (np.abs(a) + np.abs(b)) * bend * moved
    weights = np.abs(g) * resp * spread, np.abs(g) * share * (1 + np.where(share > 0, np.abs(logits), 0))
    scales = [np.where(counts, (resp * total).sum(-3), 0).sum((-2, -1)),
              np.abs(gradients(*weights, steep / spread_, wide / spread_, slope if slope is None else slope + 1e-3, -1))]
    return [value, gradients(g * resp, g * share, dmean, dlog_scale, slope, 1)], scales
