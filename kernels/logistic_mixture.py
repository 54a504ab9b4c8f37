"""Log-likelihood of images under a discretised mixture of logistics at every pixel, as PixelCNN++ has it.

With σ the logistic function, h = 1/255 half a bin and m, s = e^(log-scale) of a component and channel, a level x between
the edges has the probability (Salimans et al. 2017, "PixelCNN++", Eq. 1–3)

    P(x) = σ(a) − σ(b),   a = (x − m + h) / s,   b = (x − m − h) / s        −1 and 1 own the tails: P(−1) = σ(a), P(1) = σ(−b)

    log p(pixel) = log Σ_k π_k Π_c P_kc(x_c),      m_g = μ_g + tanh(c_0) x_r,      m_b = μ_b + tanh(c_1) x_r + tanh(c_2) x_g

Kernels never subtract the two σ. With t = (x − m) / s, y = h / s and u = e^(−|t|),

    P = sinh y / (cosh t + cosh y) = 2 u y S(y²) / (1 + u (u + 2 cosh y)),      S(y²) = sinh(y) / y

is exact for thin and wide bins alike, so that no switch to the density at the middle is needed; log y = log h − log s costs
no logarithm, and y ≤ e^7 / 255 = 4.3, where S and cosh are polynomials in y². Gradients:

    ∂log P/∂t = −sinh t / (cosh t + cosh y)         ∂log P/∂log s = −t ∂log P/∂t + y P − y coth y
"""

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, check_data, check_shape, checked_floats
from .library import Differentiable, Primitive, reference_gradients
from .reference import logistic_mixture as reference


def logistic_mixture_log_prob(x: Tensor, params: Tensor, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Log-likelihood in nats of images of 256 levels, summed over channels and pixels.

    Args:
        x: `[N, C, H, W]` with C = 3 or 1, the levels 0 ... 255 as 2·level/255 − 1 in [−1, 1]. A value between two levels
            stands for the bin of width 2/255 around it, one nearer to −1 or 1 than to the next level for the open edge bin.
        params: `[..., N, 10·K, H, W]` as a convolution gives them (`[..., N, 3·K, H, W]` if C = 1), with sample axes in
            front over which `x` is broadcast without a copy. In the order of PixelCNN++: K logits of the weights (used
            through softmax), then for each channel K means, K log-scales and, if C = 3, K coefficients (used through tanh):
            green on red, blue on red, blue on green. Log-scales below −7 count as −7 and have no gradient.
        mask: boolean `[N, H, W]`, the pixels that count; the others add nothing and have zero gradients.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[..., N]`. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does everything under
        autocast.

    Differentiable, twice, in `params`; `x` is data and gets no gradient. Time O(S·N·K·H·W); extra memory of three values a
    pixel, and the gradient. The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or `x` requires a gradient.
        BackendError: the backend asked for cannot serve the call.

    >>> x, params = torch.zeros(2, 1, 1, 1), torch.zeros(5, 2, 3, 1, 1)
    >>> logistic_mixture_log_prob(x, params).shape
    torch.Size([5, 2])
    """
    op = "logistic_mixture_log_prob"
    params, x = checked_floats(op, "x", params=params, x=x)
    _check(op, x, params, mask)
    lead, (N, C, H, W) = params.shape[:-3], x.shape
    x, params = x.reshape(N, C, H * W), params.reshape(lead.numel(), params.shape[-3], H * W)
    mask = None if mask is None else mask.reshape(N, H * W)
    name = OP.choose(params, backend)
    if name == "reference":
        log_prob = _reference(x, params, mask)
    else:
        save = torch.is_grad_enabled() and params.requires_grad
        log_prob, _ = _logistic_mixture(name, x, params, mask, save)
    return log_prob.reshape(lead)


def _reference(x, params, mask):
    return reference.logistic_mixture_log_prob(x, params.to(x.dtype), mask)


def _check(op: str, x: Tensor, params: Tensor, mask: Tensor | None) -> None:
    check_data(op, "x", x)
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{op}: x must have shape [N, C, H, W] with C = 3 or 1, given {list(x.shape)}.")
    (N, C, H, W), rows = x.shape, 10 if x.shape[1] == 3 else 3
    if params.dim() < 4 or params.shape[-4] != N or params.shape[-2:] != x.shape[2:] or params.shape[-3] % rows \
            or not params.shape[-3]:
        raise ValueError(f"{op}: params must have shape [..., N, {rows}·K, H, W] = [..., {N}, {rows}·K, {H}, {W}] "
                         f"for C = {C} and K components, given {list(params.shape)}.")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be a boolean tensor, given {getattr(mask, 'dtype', type(mask).__name__)}.")
    check_shape(op, "mask", mask, (N, H, W), "[N, H, W]")
    if mask.device != x.device:
        raise ValueError(f"{op}: mask is on {mask.device} but x is on {x.device}; move it, e.g. mask.to({x.device}).")


def _fake_fwd(x, params, mask, save):
    images, pixels = params.shape[0], x.shape[2]
    return x.new_empty(images), x.new_empty((images, 4, pixels) if save else (0, 4, 0))


def _fake_bwd(grad, x, params, mask, stats):
    return torch.empty_like(params, memory_format=torch.contiguous_format)


# x[N,C,P] params[S·N,R·K,P] mask[N,P]. With the largest logit m, l_k = (logit_k − m) + Σ_c log P_kc and `save`, forward also
# gives of every pixel m, a shift t near the largest l_k, Σ_k e^(l_k − t) and log Σ_k e^(logit_k − m), [S·N, 4, P]: backward
# then takes the components once, and a dominant one has the weight 1 to the bit.
FWD = Primitive("logistic_mixture", "logistic_mixture_fwd",
                "(Tensor x, Tensor params, Tensor? mask, bool save) -> (Tensor, Tensor)", _fake_fwd)
BWD = Primitive("logistic_mixture", "logistic_mixture_bwd",
                "(Tensor grad, Tensor x, Tensor params, Tensor? mask, Tensor stats) -> Tensor", _fake_bwd)

# On CPU the half-precision arguments reach the kernels as float32.
OP = register(Op("logistic_mixture_log_prob", "logistic_mixture_fwd", {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}))


def _save(ctx, inputs, output) -> None:
    x, params, mask, _ = inputs
    ctx.save_for_backward(x, params, mask, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, grad, _):
    x, params, mask, stats = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[1]:
        return (None,) * 4
    if torch.is_grad_enabled():  # double backward
        return (*reference_gradients(_reference, (x, params, mask), (False, True, False), (grad,)), None)
    return None, bwd(grad, x, params, mask, stats), None, None


_logistic_mixture = Differentiable(FWD, BWD, _save, _gradients)
