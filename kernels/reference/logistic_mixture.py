"""Reference of `logistic_mixture_log_prob`: the formula, with a value per image, channel, component and pixel in memory."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HALF_BIN = 1 / 255
MIN_LOG_SCALE = -7.0


def couple(means: Tensor, coefs: Tensor, x: Tensor) -> Tensor:
    """Means [..., 3, K, P] given the channels of x [N, 3, 1, P] that come before: PixelCNN++, Eq. 3."""
    c, (red, green) = coefs.tanh().unbind(-3), x.unbind(-3)[:2]
    return means + torch.stack((torch.zeros_like(c[0]), c[0] * red, c[1] * red + c[2] * green), -3)


def bin_log_prob(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b−a)) of logistic bins, those at ±1 open to ±∞."""
    inv = torch.exp(-log_scales.clamp(min=MIN_LOG_SCALE))
    upper, lower = (x + HALF_BIN - means) * inv, (x - HALF_BIN - means) * inv
    inside = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-2 * HALF_BIN * inv))
    return torch.where(x < -1 + HALF_BIN, logsigmoid(upper), torch.where(x > 1 - HALF_BIN, logsigmoid(-lower), inside))


def logistic_mixture_log_prob(x: Tensor, params: Tensor, mask: Tensor | None = None) -> Tensor:
    """x[N,C,P] params[S·N,R·K,P] mask[N,P] -> [S·N]: images in rows, R = 10 parameters a component (3 if C = 1)."""
    (N, C, P), rows = x.shape, 10 if x.shape[1] == 3 else 3
    params = params.reshape(params.shape[0] // N if N else 0, N, rows, params.shape[1] // rows, P)
    # [S, N, C, mean, log-scale (and coefficient), K, P]
    logits, rest = params[:, :, 0], params[:, :, 1:].unflatten(2, (C, -1))
    x = x[:, :, None]
    means = rest[:, :, :, 0]
    if C == 3:
        means = couple(means, rest[:, :, :, 2], x)
    log_prob = bin_log_prob(x, means, rest[:, :, :, 1]).sum(2)
    log_prob = (logits.log_softmax(2) + log_prob).logsumexp(2)
    if mask is not None:
        log_prob = log_prob.masked_fill(~mask, 0.0)
    return log_prob.sum(2).reshape(-1)
