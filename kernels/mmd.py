"""Maximum mean discrepancy between two samples (Gretton et al. 2012, "A kernel two-sample test").

    MMD²(x, y) = mean k(x_i, x_j) + mean k(y_i, y_j) − 2 mean k(x_i, y_j)

with the means of one sample over i ≠ j (unbiased, Lemma 6) or over all i, j (biased, Eq. 5). Every kernel is a function of
the squared Euclidean distance u = |x − y|², summed over scales s, each with C = unit · s:

    gaussian            exp(−u / C)                imq (inverse multiquadric)    C / (C + u)
    laplacian           exp(−√u / √C)              rational_quadratic            (1 + u / (unit · s))^−s
    energy              −√u, no scales: MMD² is the energy distance (Sejdinovic et al. 2013)

Gradient: ∂/∂x_i of a weight a times k is 2 a k'(u) (x_i − y_j); where k has a cusp (u = 0) it counts as 0. Kernels take the
differences directly: the expanded square saves nothing in FMAs and cancels. They visit a pair of one sample once, and take
the gradients in the pass that takes the value; backward only scales them.

`inverse multiquadric` with `WAE_SCALES` and unit 2 D σ² is the penalty of Wasserstein auto-encoders (Tolstikhin et al. 2018)
for a prior N(0, σ² I): scales summed, unbiased, so it can be negative.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, checked_floats, is_positive
from .library import Differentiable, Primitive, reference_gradients
from .reference import mmd as reference

KERNELS = ("gaussian", "imq", "laplacian", "rational_quadratic", "energy")
ESTIMATORS = ("sum", "unbiased", "biased")
WAE_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RATIONAL_SCALES = (0.2, 0.5, 1.0, 2.0, 5.0)  # exponents of the mixture of Bińkowski et al. 2018


def mmd2(x: Tensor, y: Tensor, *, kernel: str = "imq", scales: Sequence[float] | None = None, unit: float | None = None,
         estimator: str = "unbiased", combine: str = "sum", backend: str | None = None) -> Tensor:
    """Squared maximum mean discrepancy between two samples.

    Args:
        x: `[N, D]`.
        y: `[M, D]`.
        kernel: "gaussian", exp(−r²/C); "imq", C/(C + r²); "laplacian", exp(−r/√C), of the Euclidean distance r and not of
            the ℓ1 norm; "rational_quadratic", (1 + r²/(unit·s))^−s, of which s is the exponent; "energy", −r.
        scales: positive numbers s, one kernel each, C = unit·s. Left out: WAE's seven, 0.1 to 10, and 0.2, 0.5, 1, 2, 5 for
            "rational_quadratic". "energy" takes none.
        unit: the squared distance that is scale 1. Left out, 2·D: the mean squared distance of two points of N(0, I), and
            WAE's choice. For a prior of standard deviation σ pass 2·D·σ²; for a Gaussian kernel of bandwidth b in the form
            exp(−r²/(2b²)) pass 2·b² and scales=[1], with b from `median_heuristic` for instance.
        estimator: "unbiased" leaves out the pairs i = j and can be negative; "biased" keeps them and cannot, but by
            rounding.
        combine: "sum" over the scales (WAE's convention) or their "mean".
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        A scalar tensor. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does everything
        under autocast.

    Differentiable, twice, in x and y; a frozen one costs nothing. Time O((N + M)²·D), extra memory of the order of the
    inputs. The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit; fewer than two points ("biased": one) of x or y.
        BackendError: the backend asked for cannot serve the call.

    >>> mmd2(torch.zeros(2, 1), torch.ones(2, 1), kernel="gaussian", scales=[0.5])
    tensor(1.2642)
    """
    _check_choice("mmd2", "estimator", estimator, ESTIMATORS[1:])
    _check_choice("mmd2", "combine", combine, ("sum", "mean"))
    x, y, kernel_options = check("mmd2", x, y, kernel, scales, unit, least=2 if estimator == "unbiased" else 1)
    factor = 1 / len(kernel_options[1]) if combine == "mean" and kernel != "energy" else 1.0
    return _run(OP.choose(x, backend, len(kernel_options[1])), x, y, kernel_options, estimator, [factor, factor, -2 * factor])


def kernel_sums(x: Tensor, y: Tensor, *, kernel: str = "imq", scales: Sequence[float] | None = None,
                unit: float | None = None, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that MMD statistics are made of: Σ_{i≠j} k(x_i, x_j), Σ_{i≠j} k(y_i, y_j) and Σ_{i,j} k(x_i, y_j).

    Arguments, dtypes, gradients, costs and errors as for `mmd2`; the scales are summed. Samples may be empty.

    >>> kernel_sums(torch.zeros(2, 1), torch.ones(3, 1), kernel="energy")
    (tensor(0.), tensor(0.), tensor(-6.))
    """
    x, y, kernel_options = check("kernel_sums", x, y, kernel, scales, unit, least=0)
    name = SUMS_OP.choose(x, backend, len(kernel_options[1]))
    xx, yy, xy = (_run(name, x, y, kernel_options, "sum", sections)
                  for sections in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    return xx, yy, xy


def check(op: str, x: Tensor, y: Tensor, kernel: str, scales: Sequence[float] | None, unit: float | None,
          least: int) -> tuple[Tensor, Tensor, tuple[str, list[float], float]]:
    """The samples in the precision of the kernels, and the kernel's name, scales and unit."""
    x, y = checked_floats(op, "y", x=x, y=y)
    of_x, of_y = x.shape, y.shape
    if len(of_x) != 2 or len(of_y) != 2 or of_x[1] != of_y[1] or of_x[1] == 0:
        raise ValueError(f"{op}: x and y must have shapes [N, D] and [M, D] with one D ≥ 1, given {list(of_x)} and "
                         f"{list(of_y)}.")
    if of_x[0] < least or of_y[0] < least:
        raise ValueError(f"{op}: needs {least} or more points in each sample, given N = {of_x[0]} and M = {of_y[0]}; "
                         f"use larger samples{' or the biased estimator' if least == 2 else ''}.")
    return x.float() if x.dtype in HALF else x, y, _kernel_options(op, of_x[1], kernel, scales, unit)


def _kernel_options(op: str, D: int, kernel: str, scales: Sequence[float] | None,
                    unit: float | None) -> tuple[str, list[float], float]:
    _check_choice(op, "kernel", kernel, KERNELS)
    if kernel == "energy":
        if scales is not None or unit is not None:
            raise ValueError(f"{op}: the energy kernel −r has no scale; leave scales and unit out.")
        return kernel, [], 1.0
    if scales is None:
        scales = RATIONAL_SCALES if kernel == "rational_quadratic" else WAE_SCALES
    elif not isinstance(scales, Sequence) or len(scales) == 0 or not all(is_positive(s) for s in scales):
        raise ValueError(f"{op}: scales must be a list of one or more positive numbers, given {scales!r}.")
    if unit is not None and not is_positive(unit):
        raise ValueError(f"{op}: unit must be a positive number, given {unit!r}; a tensor's value is unit.item().")
    return kernel, [float(s) for s in scales], 2.0 * D if unit is None else float(unit)


def _check_choice(op: str, name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, given {value!r}.")


def _run(name: str, x: Tensor, y: Tensor, kernel_options: tuple[str, list[float], float], estimator: str,
         sections: list[float]) -> Tensor:
    if name == "reference":
        return reference.mmd(x, y, *kernel_options, estimator, sections)
    kernel, scales, unit = kernel_options
    grad = torch.is_grad_enabled()
    return _mmd(name, x, y, KERNELS.index(kernel), scales, unit, ESTIMATORS.index(estimator), sections,
                grad and x.requires_grad, grad and y.requires_grad)[0]


def _fake_fwd(x, y, kernel, scales, unit, estimator, sections, need_x, need_y):
    return (x.new_empty(()), x.new_empty(x.shape if need_x else (0, 0)), x.new_empty(y.shape if need_y else (0, 0)))


# The value, and its gradients with respect to x and y, empty where not needed. `kernel` and `estimator` are indices into
# KERNELS and ESTIMATORS; `sections` are factors of the sums or means over the pairs of x, of y, and of x and y.
FWD = Primitive("mmd", "mmd_fwd", "(Tensor x, Tensor y, int kernel, float[] scales, float unit, int estimator, "
                "float[] sections, bool need_x, bool need_y) -> (Tensor, Tensor, Tensor)", _fake_fwd)
# k(x_i, y_j), [N, M].
MATRIX = Primitive("mmd", "mmd_kernel", "(Tensor x, Tensor y, int kernel, float[] scales, float unit) -> Tensor",
                   lambda x, y, kernel, scales, unit: x.new_empty(x.shape[0], y.shape[0]))

# Half-precision samples reach the kernels as float32.
SUPPORT = {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF), max_scales=64),  # they travel with the launch
}
OP = register(Op("mmd2", "mmd_fwd", SUPPORT))
SUMS_OP = register(Op("kernel_sums", "mmd_fwd", SUPPORT))


def _save(ctx, inputs, output) -> None:
    x, y, *ctx.options, _, _ = inputs
    ctx.save_for_backward(x, y, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, _bwd, grad, *_unused):
    x, y, *units = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # double backward
        kernel, scales, unit, estimator, sections = ctx.options

        def formula(x, y):
            return reference.mmd(x, y, KERNELS[kernel], scales, unit, ESTIMATORS[estimator], sections)

        found = reference_gradients(formula, (x, y), needs, (grad,))
    else:
        found = (grad * g if need else None for need, g in zip(needs, units, strict=True))
    return (*found, *(None,) * 7)


_mmd = Differentiable(FWD, None, _save, _gradients)
