"""Triton kernels of `logistic_mixture_log_prob`; formulas and notation are in kernels/logistic_mixture.py.

A program takes a block of pixels of one image and goes through the components, whose planes of parameters it reads in order
and once. As P = ratio · e^linear with the ratio between 2e-6 and 614, only the linear parts take part in the maximum of the
log-sum-exp, and no component costs a logarithm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # pixels of a program, one a thread: backward keeps 40 values of each in registers
NUM_WARPS = 4
HALF_BIN = tl.constexpr(1 / 255)
LOG_BIN = tl.constexpr(-4.8481163645984805)  # log(2/255)
LOWEST = tl.constexpr(-3.4028234e38)  # a finite first maximum spares −inf a case of its own; NaN lives in the sums


@triton.jit
def _exp(x):
    """e^x with its digits: `tl.exp` rounds x·log2(e), which for x = 7 costs 4e-7, and 4e-4 in a distance of 1000 scales."""
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    return tl.exp2(whole) * tl.exp((x - whole * 0.69287109375) - whole * 2.7608680954530943e-04)


@triton.jit
def _tanh(x):
    square = x * x
    small = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * -0.053968254)))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0225, small, tl.where(x < 0, -large, large))


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _side(x):
    """1 for the bin open to −∞, −1 for that open to ∞, else 0."""
    return tl.where(x < HALF_BIN - 1, 1.0, 0.0) - tl.where(x > 1 - HALF_BIN, 1.0, 0.0)


@triton.jit
def _bin(x, mean, log_scale):
    """A channel of a component: P = numerator / denominator · e^linear, and what its gradients need."""
    side = _side(x)
    clamped = tl.where(log_scale < -7.0, -7.0, log_scale)
    inv = _exp(-clamped)
    y2 = (HALF_BIN * inv) * (HALF_BIN * inv)
    sinh = 2.37777007232384583e-8 + y2 * 2.13218803419500071e-10
    sinh = 0.000198329133657527843 + y2 * (2.77039731952736165e-6 + y2 * sinh)
    sinh = 1.0 + y2 * (0.166666465932763654 + y2 * (0.00833355077003289257 + y2 * sinh))
    cosh = 5.53850517051110588e-7 + y2 * (3.97693134121339865e-9 + y2 * 3.01667045175190519e-11)
    cosh = 0.0833332089805364306 + y2 * (0.00277785058387191846 + y2 * (0.0000495836325305064173 + y2 * cosh))
    cosh = 2.0 + y2 * (1.00000007349960256 + y2 * cosh)
    t = (x + side * HALF_BIN - mean) * inv
    u = tl.exp(-tl.abs(t))
    den = 1.0 + u * tl.where(side != 0, 1.0, u + cosh)
    num = tl.where(side != 0, 1.0, sinh)
    towards = side * t
    linear = tl.where(side != 0, tl.where(towards > 0, 0.0, towards), LOG_BIN - clamped - tl.abs(t))
    return linear, num, den, inv, t, u, y2, sinh, cosh


@triton.jit
def _channels(at, row, inside, red, green, C: tl.constexpr):
    """Means given the channels before, and log-scales, of one component; `row` is the distance of rows of parameters."""
    mean_0, scale_0 = _load(at + row, inside), _load(at + 2 * row, inside)
    if C == 3:
        mean_1, scale_1 = _load(at + 4 * row, inside), _load(at + 5 * row, inside)
        mean_2, scale_2 = _load(at + 7 * row, inside), _load(at + 8 * row, inside)
        coef_0, coef_1, coef_2 = _load(at + 3 * row, inside), _load(at + 6 * row, inside), _load(at + 9 * row, inside)
        coef_0, coef_1, coef_2 = _tanh(coef_0), _tanh(coef_1), _tanh(coef_2)
        mean_1 += coef_0 * red
        mean_2 += coef_1 * red + coef_2 * green
        return mean_0, mean_1, mean_2, scale_0, scale_1, scale_2, coef_0, coef_1, coef_2
    else:
        return mean_0, mean_0, mean_0, scale_0, scale_0, scale_0, mean_0, mean_0, mean_0


@triton.jit
def _pixels(x, mask, images_of_x, P, C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Image, pixels, which of them count, and their channels."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_x = image % images_of_x
    counts = pixel < P
    if HAS_MASK:
        counts = tl.load(mask + of_x * P + pixel, mask=counts, other=0) != 0
    at = x + of_x * C * P + pixel
    red = _load(at, counts)
    green, blue = red, red
    if C == 3:
        green, blue = _load(at + P, counts), _load(at + 2 * P, counts)
    return image, pixel, counts, red, green, blue


@triton.jit
def _forward(x, params, mask, sums, stats, images_of_x, K, P, parts, C: tl.constexpr, ROWS: tl.constexpr,
             HAS_MASK: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr):
    """The log-likelihood of each block of pixels [images, parts], and the statistics [images, 4, P] if `SAVE`."""
    image, pixel, counts, red, green, blue = _pixels(x, mask, images_of_x, P, C, HAS_MASK, BLOCK)
    level, top = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], LOWEST, tl.float32)
    total, prior = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    row = tl.cast(K, tl.int64) * P
    for k in range(K):  # a level that all logits share costs no digits; the second time they come from the cache
        level = tl.maximum(level, _load(params + image * ROWS * row + tl.cast(k, tl.int64) * P + pixel, counts))
    for k in range(K):
        at = params + image * ROWS * row + tl.cast(k, tl.int64) * P + pixel
        logit = _load(at, counts) - level
        m0, m1, m2, s0, s1, s2, _, _, _ = _channels(at, row, counts, red, green, C)
        linear, num, den, _, _, _, _, _, _ = _bin(red, m0, s0)
        if C == 3:
            linear_1, num_1, den_1, _, _, _, _, _, _ = _bin(green, m1, s1)
            linear_2, num_2, den_2, _, _, _, _, _, _ = _bin(blue, m2, s2)
            linear, num, den = linear + linear_1 + linear_2, num * num_1 * num_2, den * den_1 * den_2
        prior += tl.exp(logit)
        linear += logit
        larger = linear > top
        smaller_term = tl.exp(-tl.abs(linear - top))
        total = tl.where(larger, total * smaller_term + num / den, total + smaller_term * (num / den))
        top = tl.where(larger, linear, top)
    prior = tl.log(prior)
    log_prob = top + (tl.log(total) - prior)
    tl.store(sums + image * parts + tl.program_id(1), tl.sum(tl.where(counts, log_prob, 0.0), 0))
    if SAVE:
        to = stats + image * 4 * P + pixel
        tl.store(to, level, mask=counts)
        tl.store(to + P, top, mask=counts)
        tl.store(to + 2 * P, total, mask=counts)
        tl.store(to + 3 * P, prior, mask=counts)


@triton.jit
def _store_bin(at, row, inside, counts, x, log_scale, weight, num, den, inv, t, u, y2, sinh, cosh):
    """Gradients of a mean and a log-scale; returns that of the mean."""
    side = _side(x)
    inside_slope = (1.0 - u * u) / den
    open_slope = side * tl.where(side * t < 0, 1.0, u) / den
    slope = tl.where(side != 0, open_slope, tl.where(t < 0, inside_slope, -inside_slope))
    width = tl.where(side != 0, 0.0, 2.0 * u * y2 * sinh / den - 0.5 * cosh / sinh)
    grad_mean = tl.where(counts, -weight * inv * slope, 0.0)
    grad_scale = tl.where(counts & (log_scale >= -7.0) | (log_scale != log_scale), weight * (width - t * slope), 0.0)
    tl.store(at, grad_mean.to(at.dtype.element_ty), mask=inside)
    tl.store(at + row, grad_scale.to(at.dtype.element_ty), mask=inside)
    return grad_mean


@triton.jit
def _backward(grad, x, params, mask, stats, grad_params, images_of_x, K, P, C: tl.constexpr, ROWS: tl.constexpr,
              HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the parameters; of pixels that do not count it is 0."""
    image, pixel, counts, red, green, blue = _pixels(x, mask, images_of_x, P, C, HAS_MASK, BLOCK)
    inside = pixel < P
    saved = stats + image * 4 * P + pixel
    level, top, prior = _load(saved, counts), _load(saved + P, counts), _load(saved + 3 * P, counts)
    image_grad = tl.load(grad + image)
    over_sum = image_grad / tl.load(saved + 2 * P, mask=counts, other=1.0)
    row = tl.cast(K, tl.int64) * P
    for k in range(K):
        offset = image * ROWS * row + tl.cast(k, tl.int64) * P + pixel
        at, to = params + offset, grad_params + offset
        logit = _load(at, counts) - level
        m0, m1, m2, s0, s1, s2, c0, c1, c2 = _channels(at, row, counts, red, green, C)
        linear, num, den, inv_0, t_0, u_0, y2_0, sinh_0, cosh_0 = _bin(red, m0, s0)
        num_0, den_0 = num, den
        if C == 3:
            linear_1, num_1, den_1, inv_1, t_1, u_1, y2_1, sinh_1, cosh_1 = _bin(green, m1, s1)
            linear_2, num_2, den_2, inv_2, t_2, u_2, y2_2, sinh_2, cosh_2 = _bin(blue, m2, s2)
            linear, num, den = linear + linear_1 + linear_2, num * num_1 * num_2, den * den_1 * den_2
        weight = over_sum * (num / den) * tl.exp(logit + linear - top)
        grad_logit = tl.where(counts, weight - image_grad * tl.exp(logit - prior), 0.0)
        tl.store(to, grad_logit.to(to.dtype.element_ty), mask=inside)
        _store_bin(to + row, row, inside, counts, red, s0, weight, num_0, den_0, inv_0, t_0, u_0, y2_0, sinh_0, cosh_0)
        if C == 3:
            g1 = _store_bin(to + 4 * row, row, inside, counts, green, s1, weight, num_1, den_1, inv_1, t_1, u_1, y2_1,
                            sinh_1, cosh_1)
            g2 = _store_bin(to + 7 * row, row, inside, counts, blue, s2, weight, num_2, den_2, inv_2, t_2, u_2, y2_2,
                            sinh_2, cosh_2)
            tl.store(to + 3 * row, (g1 * red * (1.0 - c0 * c0)).to(to.dtype.element_ty), mask=inside)
            tl.store(to + 6 * row, (g2 * red * (1.0 - c1 * c1)).to(to.dtype.element_ty), mask=inside)
            tl.store(to + 9 * row, (g2 * green * (1.0 - c2 * c2)).to(to.dtype.element_ty), mask=inside)


class _Call:
    """The arguments that both kernels share."""

    def __init__(self, x: Tensor, params: Tensor, mask: Tensor | None) -> None:
        self.images, self.P, C = params.shape[0], x.shape[2], x.shape[1]
        rows = 10 if C == 3 else 3
        self.parts = triton.cdiv(self.P, BLOCK)
        self.tensors = (x.contiguous(), params.contiguous(), None if mask is None else mask.contiguous().view(torch.uint8))
        self.sizes = (x.shape[0], params.shape[1] // rows, self.P)
        self.options = {"C": C, "ROWS": rows, "HAS_MASK": mask is not None, "BLOCK": BLOCK, "num_warps": NUM_WARPS}


def logistic_mixture_fwd(x: Tensor, params: Tensor, mask: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    """The primitive `logistic_mixture_fwd` of kernels/logistic_mixture.py."""
    call = _Call(x, params, mask)
    sums = x.new_empty(call.images, call.parts)
    stats = x.new_empty((call.images, 4, call.P) if save else (0, 4, 0))
    if sums.numel():
        with torch.cuda.device_of(x):
            _forward[(call.images, call.parts)](*call.tensors, sums, stats, *call.sizes, call.parts, SAVE=save, **call.options)
    return sums.sum(1, dtype=torch.float64).to(x.dtype), stats


def logistic_mixture_bwd(grad: Tensor, x: Tensor, params: Tensor, mask: Tensor | None, stats: Tensor) -> Tensor:
    """The primitive `logistic_mixture_bwd` of kernels/logistic_mixture.py."""
    call = _Call(x, params, mask)
    grad_params = torch.empty_like(params, memory_format=torch.contiguous_format)
    if grad_params.numel():
        with torch.cuda.device_of(x):
            _backward[(call.images, call.parts)](grad.contiguous(), *call.tensors, stats.contiguous(), grad_params, *call.sizes,
                                                 **call.options)
    return grad_params
