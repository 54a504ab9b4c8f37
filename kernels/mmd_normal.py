"""Squared maximum mean discrepancy between a batch and a normal prior, in closed form: no prior samples.

    MMD²(q, p) = E k(z, z') − 2 E k(z, y) + E k(y, y'),    z, z' ~ q,    y, y' ~ p = N(0, σ² I)

for the batch of points z_n, or for the mixture of the Gaussians N(μ_n, diag v_n). A kernel that is a positive sum of Gaussian
kernels, k(r²) = Σ_q w_q exp(−a_q r²), has each expectation in closed form: for u ~ N(δ, diag s)

    E exp(−a |u|²) = Π_d (1 + 2 a s_d)^−½ exp(−a δ_d² / (1 + 2 a s_d))

with s = v_n + v_m, v_n + σ² or 2σ² for the three terms (Rustamov 2019, "Closed-form expressions for maximum mean discrepancy
with applications to Wasserstein auto-encoders", gives the Gaussian kernel of points). The inverse multiquadric is an integral
of Gaussian kernels, C / (C + r²) = ∫ exp(−t (1 + r²/C)) dt, and `quadrature.py` makes a sum of them, one for all scales.

With t_d = s_d + 1/(2a) and E the logarithm of the expectation: ∂E/∂δ_d = −δ_d / t_d, ∂E/∂s_d = ½ (δ_d² / t_d² − 1 / t_d).
Kernels work in units of √D σ, where rates do not depend on D, and take the gradients in the pass that takes the value.
Backward only scales them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, check_shape, checked_floats, is_positive
from .library import Differentiable, Primitive, reference_gradients
from .mmd import WAE_SCALES
from .quadrature import inverse_multiquadric
from .reference import mmd_normal as reference

# Squared distances, in units of D σ², up to which the inverse multiquadric keeps its tolerance. Far points cost the cross
# term of points nothing; for posteriors every factor of ten costs four more nodes in all pairs.
POINTS_REACH, POSTERIORS_REACH = 1e6, 1e3


def mmd2_to_normal(x: Tensor, log_var: Tensor | None = None, *, kernel: str = "imq",
                   scales: Sequence[float] = WAE_SCALES, estimator: str = "unbiased", combine: str = "sum",
                   prior_std: float = 1.0, tolerance: float = 1e-6, backend: str | None = None) -> Tensor:
    """Squared MMD between a batch and N(0, prior_std² I), without sampling the prior.

    Args:
        x: `[N, D]` points, or with `log_var` the means of Gaussian posteriors.
        log_var: log σ² `[N, D]` of diagonal Gaussian posteriors, whose mixture is then compared with the prior.
        kernel: "imq", C / (C + r²), or "gaussian", exp(−r² / C), with C = 2 D prior_std² scale: at scale 1 the mean squared
            distance of two points of the prior.
        scales: positive; one kernel each. The default is that of Wasserstein auto-encoders (Tolstikhin et al. 2018).
        estimator: "unbiased" leaves out the pairs of a point or posterior with itself, and can be negative: it estimates the
            MMD² of the distribution that the points, or the data behind the posteriors, were drawn from. "biased" keeps them:
            the exact MMD² of this batch, never negative but by the `tolerance`.
        combine: "sum" over the scales (WAE's convention) or their "mean".
        prior_std: σ of the prior, a positive number.
        tolerance: relative error of the inverse multiquadric where it stands as a sum of Gaussian kernels, between 1e-12 and
            1e-2; holds for squared distances up to 10⁶ D σ² (points) or 10³ D σ² (posteriors), beyond which the sum falls off
            faster. "gaussian" is exact, and so is the kernel between points. The default takes 19 to 31 nodes for all seven
            scales together; 1e-12 about twice as many.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        A scalar tensor. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does everything
        under autocast.

    Differentiable, twice, in x and log_var; a frozen one gets no gradient. Time O(N²·D) for points and O(N²·D·nodes) for
    posteriors; extra memory of the order of the inputs. The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit; fewer than two rows (one, if "biased").
        BackendError: the backend asked for cannot serve the call.

    >>> z = torch.linspace(-1.5, 1.5, 64)[:, None].expand(64, 4)
    >>> mmd2_to_normal(z) > mmd2_to_normal(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    tensor(True)
    """
    if log_var is None:
        (x,) = checked_floats("mmd2_to_normal", "x", x=x)
    else:
        x, log_var = checked_floats("mmd2_to_normal", "log_var", x=x, log_var=log_var)
    _check_options(kernel, scales, estimator, combine, prior_std, tolerance)
    _check_shapes(x, log_var, estimator)
    widths, exact = tuple(2.0 * _constant(s) for s in scales), []
    if kernel == "gaussian":
        rates, weights = [1 / C for C in widths], [1.0] * len(widths)
    else:
        reach = _constant(POINTS_REACH if log_var is None else POSTERIORS_REACH)
        rates, weights = inverse_multiquadric(widths, reach, _constant(tolerance))
        exact = list(widths) if log_var is None else []

    options = (rates, weights, exact, float(prior_std), estimator == "biased")
    name = OP.choose(x, backend)
    if name == "reference":
        value = _reference(x, log_var, *options)
    else:
        grad = torch.is_grad_enabled()
        needs = grad and x.requires_grad, grad and log_var is not None and log_var.requires_grad
        value = _mmd_normal(name, x, log_var, *options, *needs)[0]
    return value / len(widths) if combine == "mean" else value


def _reference(x, log_var, *options):
    dtype = x.dtype if log_var is None else log_var.dtype
    return reference.mmd2_to_normal(x.float() if dtype in HALF else x.to(dtype), log_var, *options)


def _constant(number: float) -> float:
    """`number`, which a graph traced with dynamic=True takes as a constant: a symbol has no exponent."""
    return math.ldexp(*math.frexp(number))


def _check_options(kernel: str, scales: Sequence[float], estimator: str, combine: str, prior_std: float,
                   tolerance: float) -> None:
    for name, value, known in (("kernel", kernel, ("imq", "gaussian")), ("estimator", estimator, ("unbiased", "biased")),
                               ("combine", combine, ("sum", "mean"))):
        if value not in known:
            raise ValueError(f"mmd2_to_normal: {name} must be {known[0]!r} or {known[1]!r}, given {value!r}.")
    if not isinstance(scales, Sequence) or len(scales) == 0 or not all(is_positive(s) for s in scales):
        raise ValueError(f"mmd2_to_normal: scales must be one or more positive numbers, given {scales!r}.")
    if not is_positive(prior_std):
        raise ValueError(f"mmd2_to_normal: prior_std must be a positive number, given {prior_std!r}; a tensor's value is "
                         f"prior_std.item().")
    if not is_positive(tolerance) or not 1e-12 <= tolerance <= 1e-2:
        raise ValueError(f"mmd2_to_normal: tolerance must lie between 1e-12 and 1e-2, given {tolerance!r}.")


def _check_shapes(x: Tensor, log_var: Tensor | None, estimator: str) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"mmd2_to_normal: x must have shape [N, D] with D ≥ 1, given {list(x.shape)}.")
    least = 1 if estimator == "biased" else 2
    if x.shape[0] < least:
        raise ValueError(f"mmd2_to_normal: the {estimator} estimator needs at least {least} rows, given x{list(x.shape)}.")
    if log_var is not None:
        check_shape("mmd2_to_normal", "log_var", log_var, tuple(x.shape), "[N, D] as x")


def _fake(x, log_var, rates, weights, widths, prior_std, biased, need_x, need_log_var):
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape, none = x.shape, (0, 0)
    return (x.new_empty((), dtype=working), x.new_empty(shape if need_x else none, dtype=working),
            x.new_empty(shape if need_log_var else none, dtype=working))


# The value and its gradients, empty [0, 0] where not needed. `rates` and `widths` are in units of D σ²; `widths` are those of
# the inverse multiquadrics between points, empty where the sum of Gaussian kernels stands for the kernel.
FWD = Primitive("mmd_normal", "mmd_normal_fwd", "(Tensor x, Tensor? log_var, float[] rates, float[] weights, float[] widths, "
                "float prior_std, bool biased, bool need_x, bool need_log_var) -> (Tensor, Tensor, Tensor)", _fake)

# On CPU the half-precision arguments reach the kernels as float32.
OP = register(Op("mmd2_to_normal", "mmd_normal_fwd", {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}))


def _save(ctx, inputs, output) -> None:
    x, log_var, *ctx.options = inputs
    ctx.save_for_backward(x, log_var, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, _, grad, *_unused):
    x, log_var, dx, dlog_var = ctx.saved_tensors
    needs, rest = ctx.needs_input_grad[:2], (None,) * 7
    if grad is None:
        return (None, None, *rest)
    if torch.is_grad_enabled():  # double backward
        return (*reference_gradients(lambda *t: _reference(*t, *ctx.options[:5]), (x, log_var), needs, (grad,)), *rest)
    return ((grad * dx).to(x.dtype) if needs[0] else None, grad * dlog_var if needs[1] else None, *rest)


_mmd_normal = Differentiable(FWD, None, _save, _gradients)
