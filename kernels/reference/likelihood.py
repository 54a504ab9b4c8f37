"""Reference of the likelihoods: log-densities of all features in memory, then their sum."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def gaussian(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    return -0.5 * (((x - mean) * torch.exp(-0.5 * log_var)).square() + log_var + math.log(2 * math.pi))


def discretized_logistic(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    inverse = torch.exp(-log_scale)
    plus, minus = (inverse * (x - mean + half_bin) for half_bin in (1 / 255, -1 / 255))
    inside = torch.log(-torch.expm1(-2 / 255 * inverse))
    lower, upper = F.logsigmoid(plus), F.logsigmoid(-minus)
    return torch.where(x < -254 / 255, lower, torch.where(x > 254 / 255, upper, lower + upper + inside))


def negative_binomial(x: Tensor, mean: Tensor, log_dispersion: Tensor) -> Tensor:
    r = torch.exp(log_dispersion)
    gammas = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    log_ratio = torch.log(torch.where(x > 0, mean, 1.0)) - torch.log(mean + r)  # at x = 0 it weighs nothing, mean = 0 or not
    return gammas - r * torch.log1p(mean / r) + torch.where(x > 0, x * log_ratio, 0.0)


LIKELIHOODS: tuple[Callable, ...] = (bernoulli, gaussian, discretized_logistic, negative_binomial)


def log_prob(x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, kind: int) -> Tensor:
    """x, a, b, mask [S, N, P], with sizes of 1 where they are broadcast -> [S, N]; `kind` is an index of LIKELIHOODS."""
    parameters = (a,) if b is None else (a, b)
    if mask is not None:  # a missing entry may hold anything, NaN too: one stands in for it and its parameters
        x, *parameters = (t.masked_fill(~mask, 1.0) for t in (x, *parameters))
    values = LIKELIHOODS[kind](*torch.broadcast_tensors(x, *parameters))
    return (values if mask is None else values.masked_fill(~mask, 0.0)).sum(-1)


def gaussian_variance(x: Tensor, mean: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Mean of (x − mean)² over the axes along which `shape` is broadcast; NaN where no entry counts."""
    difference = x - mean
    if mask is None:
        return difference.square().sum_to_size(shape) / (difference.numel() / max(torch.Size(shape).numel(), 1))
    observed = mask.expand_as(difference)
    squares = difference.where(observed, 0.0).square()  # squared after the mask: NaN reaches no gradient
    return squares.sum_to_size(shape) / observed.to(squares).sum_to_size(shape)
