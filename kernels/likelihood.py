"""Log-likelihoods of observations under a decoder's output, summed over features.

    log p(x_n | z_sn) = Σ_p [observed] log p(x_np; a_snp, b_snp),    x and b broadcast over samples s, rows n and features p

Bernoulli, logits l:           x l − max(l, 0) − log(1 + e^−|l|)                                   ∂l = x − sigmoid(l)
Gaussian, mean m, v = log σ²:  −½ (t² + v + log 2π), t = (x − m) / σ              ∂m = −∂x = t / σ, ∂v = ½ (t² − 1)
Discretised logistic (Kingma et al. 2016; Salimans et al. 2017, Eq. 2), 256 levels x = −1, −1 + 2/255, ..., 1, scale s:
    log [σ(u) − σ(l)], u = (x − m + 1/255) / s, l = (x − m − 1/255) / s, with u = ∞ at x = 1 and l = −∞ at x = −1. Taken as
    log σ(u) + log σ(−l) + log(1 − e^−w), w = u − l, an identity that no bin is too narrow for. With A = 1 − σ(u), B = σ(l):
    ∂m = (B − A) / s, ∂log s = l B − u A − w / (e^w − 1)
Negative binomial, mean μ, dispersion r (variance μ + μ²/r):
    log Γ(x + r) − log Γ(r) − log x! + r log(r / (r + μ)) + x log(μ / (r + μ))
    taken in deviances (Loader 2000) with u = (x − μ) / (μ + r), v = −r u / x, m(y) = log(1 + y) − y ≤ 0:
    r m(u) + x m(v) + Δ(x + r) − Δ(r) − Δ(x) + ½ log(r / (2π x (x + r))), Δ(z) = 1/(12 z) − ... the remainder of Stirling's
    formula: no term is large unless the result is. For x = 0: r m(u) + r u.
    ∂μ = r u / μ, ∂log r = r m(u) + x / (2 (x + r)) + r [κ(r) − κ(x + r)], κ = −Δ'

Sums Σ log(1 + e) are logarithms of products, by q ← q + e + q e and log(1 + q): one log for 64 features, to full relative
accuracy. Nothing of size S × N × P is written but gradients of that size; backward recomputes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, are_alike, check_data, checked_floats
from .library import Differentiable, Primitive, reference_gradients
from .reference import likelihood as reference

BERNOULLI, GAUSSIAN, DISCRETIZED_LOGISTIC, NEGATIVE_BINOMIAL = range(4)
PARAMETERS = ("logits",), ("mean", "log_var"), ("mean", "log_scale"), ("mean", "log_dispersion")


def bernoulli_log_prob(x: Tensor, logits: Tensor, *, mask: Tensor | None = None, event_dims: int = 1,
                       backend: str | None = None) -> Tensor:
    """Σ over features of log Bernoulli(x; sigmoid(logits)), in nats.

    Args:
        x: `[..., P]` in [0, 1]; values between 0 and 1 give the cross entropy −x log σ(l) − (1 − x) log σ(−l), negated.
        logits: `[..., P]`. Leading axes of `x` and `logits` are broadcast: a decoder's `[S, N, P]` against `[N, P]` gives
            `[S, N]`, and `x` is not copied.
        mask: boolean, broadcast against both; entries that are False are missing and count nothing, whatever they hold.
        event_dims: how many trailing axes are features, e.g. 3 for images `[N, C, H, W]`. The rest is broadcast and kept.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        The broadcast leading axes. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does
        everything under autocast.

    Differentiable, twice, in x and logits. Time O(S·N·P); extra memory of the order of the inputs, and nothing of size
    S·N·P but the gradients. The same inputs give the same bits, at any number of threads. Values of x outside [0, 1] are
    not looked for.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.
        BackendError: the backend asked for cannot serve the call.

    >>> bernoulli_log_prob(torch.tensor([1.0, 0.0]), torch.zeros(3, 2))
    tensor([-1.3863, -1.3863, -1.3863])
    """
    return _log_prob(BERNOULLI, x, logits, None, mask, event_dims, backend)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor, *, mask: Tensor | None = None, event_dims: int = 1,
                      backend: str | None = None) -> Tensor:
    """Σ over features of log N(x; mean, exp(log_var)), in nats.

    Args:
        x, mean: `[..., P]`, their leading axes broadcast, as in `bernoulli_log_prob`.
        log_var: log of the variance (not of the standard deviation), of any shape that broadcasts against them: `[]`
            shared, `[C, 1, 1]` a channel, `[P]` a feature, or as large as `mean`.
        mask, event_dims, backend, returns and errors: as in `bernoulli_log_prob`.

    Differentiable, twice, in x, mean and log_var. Values stay finite for variances whose inverse overflows, e.g. e^−100 in
    float32, where x = mean.

    >>> gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.0))
    tensor([-2.7568, -2.7568])
    """
    return _log_prob(GAUSSIAN, x, mean, log_var, mask, event_dims, backend)


def discretized_logistic_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, *, mask: Tensor | None = None,
                                  event_dims: int = 1, backend: str | None = None) -> Tensor:
    """Σ over features of the log-probability of 8-bit values under a logistic distribution cut into 256 bins, in nats.

    Args:
        x: `[..., P]`, the levels v = 0, ..., 255 as 2 v / 255 − 1, in [−1, 1] (the scale of PixelCNN++). The bins of the two
            outermost levels reach to ±∞, so that the 256 probabilities sum to one.
        mean, log_scale: of the logistic, in the units of x; `log_scale` of any shape that broadcasts, as `log_var` in
            `gaussian_log_prob`.
        mask, event_dims, backend, returns and errors: as in `bernoulli_log_prob`.

    Differentiable, twice, in mean and log_scale; x is data and gets no gradient: one that requires it is a ValueError. A
    value between two levels stands for the bin of width 2/255 around it, one nearer to −1 or 1 than to the next level for
    the open edge bin, as in `logistic_mixture_log_prob`; values outside [−1, 1] are not looked for.

    >>> x = torch.tensor([[-1.0, 1.0]])
    >>> discretized_logistic_log_prob(x, torch.zeros(1, 2), torch.tensor(0.0))
    tensor([-2.6208])
    """
    check_data("discretized_logistic_log_prob", "x", x)
    return _log_prob(DISCRETIZED_LOGISTIC, x, mean, log_scale, mask, event_dims, backend)


def negative_binomial_log_prob(x: Tensor, mean: Tensor, log_dispersion: Tensor, *, mask: Tensor | None = None,
                               event_dims: int = 1, backend: str | None = None) -> Tensor:
    """Σ over features of the log-probability of counts under negative binomials, in nats.

    Args:
        x: `[..., P]` counts ≥ 0, as floats.
        mean: μ ≥ 0, `[..., P]`; μ = 0 gives probability one to x = 0.
        log_dispersion: log r, of any shape that broadcasts: `[P]` for one a gene, as in scDGD and multiDGD. The variance
            is μ + μ²/r; r is SciPy's `n` and PyTorch's `total_count`, the success probability r / (r + μ), and large r is
            the Poisson distribution.
        mask, event_dims, backend, returns and errors: as in `bernoulli_log_prob`.

    Differentiable, twice, in mean and log_dispersion; x is data and gets no gradient: one that requires it is a ValueError.
    Accurate for large counts and large r, where log-Gamma functions cancel: in float32 at x = μ = 10⁵ off by 4e-7 nats, the
    formula in log-Gammas by 0.05. Negative counts are not looked for.

    >>> negative_binomial_log_prob(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor(0.0))
    tensor(-3.4657)
    """
    check_data("negative_binomial_log_prob", "x", x)
    return _log_prob(NEGATIVE_BINOMIAL, x, mean, log_dispersion, mask, event_dims, backend)


def gaussian_variance(x: Tensor, mean: Tensor, shape: tuple[int, ...] = (), *, mask: Tensor | None = None) -> Tensor:
    """The variance that maximises the sum of `gaussian_log_prob(x, mean, variance.log())`: the mean squared error.

    Args:
        x, mean: of shapes that broadcast.
        shape: of the variance, broadcast against them: `()` shared, `(C, 1, 1)` a channel, `(P,)` a feature.
        mask: as in `bernoulli_log_prob`; a value of `shape` without any entry is NaN.

    Returns a variance, γ where the papers write Σ = γ I (Dai & Wipf 2019); the γ of their published code is its root, a
    standard deviation. Of the dtype that `gaussian_log_prob` would give. Plain PyTorch on any device, differentiable,
    O(S·N·P) memory.

    >>> gaussian_variance(torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.zeros(2, 2), (2,))
    tensor([0., 5.])
    """
    mean, x = checked_floats("gaussian_variance", "x", mean=mean, x=x)
    if mask is not None:
        _check_mask("gaussian_variance", mask, x)
    try:
        full = torch.broadcast_shapes(x.shape, mean.shape)
        fits = torch.broadcast_shapes(full, shape, () if mask is None else mask.shape) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"gaussian_variance: x, mean, shape and mask must broadcast to the shape of x and mean, given "
                         f"{list(x.shape)}, {list(mean.shape)}, {list(shape)} and "
                         f"{None if mask is None else list(mask.shape)}.")
    return reference.gaussian_variance(x, mean, mask, shape)


def _log_prob(kind: int, x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, event_dims: int,
              backend: str | None) -> Tensor:
    op, tensors = OPS[kind], (a, x) if kind == BERNOULLI else (a, x, b)
    if not isinstance(event_dims, int):
        raise TypeError(f"{op.name}: event_dims must be an integer, given {event_dims!r}.")
    if not are_alike(tensors):
        first, *others = PARAMETERS[kind]
        a, x, *rest = checked_floats(op.name, "x", **dict(zip((first, "x", *others), tensors, strict=True)))
        b = rest[0] if rest else None
    if mask is not None:
        _check_mask(op.name, mask, x)
    name, batch = op.choose(a, backend), None
    if not _is_usual(x, a, b, mask, event_dims):
        x, a, b, mask, batch = _rows(op.name, kind, x, a, b, mask, event_dims)
        event_dims = 1
    arguments = x, a, b, mask, kind, event_dims
    log_prob = _reference(*arguments) if name == "reference" else _likelihood(name, *arguments)
    return log_prob if batch is None else log_prob.reshape(batch)


def _check_mask(op: str, mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a boolean tensor, given {given}.")
    if mask.device != x.device:
        raise ValueError(f"{op}: mask is on {mask.device} but x is on {x.device}; move one of them, "
                         f"e.g. mask.to({x.device}).")


def _rows(op: str, kind: int, x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, event_dims: int,
          ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """x, a, b and mask as [S, N, P], in which each size is that of all or 1, and the leading axes of the result."""
    names = ("x", *PARAMETERS[kind], "mask")
    given = {name: t for name, t in zip(names, (x, a, mask) if b is None else (x, a, b, mask), strict=True) if t is not None}
    shape = _common_shape(op, given, event_dims)
    batch = len(shape) - event_dims
    padded = [t[(None,) * (len(shape) - t.dim())] if t.dim() < len(shape) else t for t in given.values()]
    # The leading axes part into S and N where no tensor is broadcast in part only, if there is such a place.
    for cut in range(batch + 1):
        spans = (0, cut), (cut, batch), (batch, len(shape))
        if all(_is_whole(t, shape, span) for t in padded for span in spans[:2]):
            break
    folded = [_fold(t, shape, spans) for t in padded]
    mask = folded.pop() if mask is not None else None
    return folded[0], folded[1], folded[2] if len(folded) > 2 else None, mask, shape[:batch]


def _is_usual(x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, event_dims: int) -> bool:
    """Whether `a` has all axes, up to two of them leading, `x` its last ones, and each of the others its last ones or none.

    Such a call needs none of the general checks of shapes.
    """
    dim = a.dim()
    return (0 < event_dims <= x.dim() and dim - event_dims <= 2 and x.shape == a.shape[dim - x.dim():]
            and (b is None or _is_suffix(b, a, event_dims)) and (mask is None or _is_suffix(mask, a, event_dims)))


def _is_suffix(t: Tensor, a: Tensor, event_dims: int) -> bool:
    return t.dim() == 0 or (t.dim() >= event_dims and t.shape == a.shape[a.dim() - t.dim():])


def as_rows(tensors: Sequence[Tensor | None], event_dims: int) -> list[Tensor | None]:
    """The tensors of a primitive as [S, N, P]."""
    return [t if t is None else t.reshape(_row_shape(t.shape, event_dims)) for t in tensors]


def _row_shape(shape: torch.Size, event_dims: int) -> tuple[int, ...]:
    leading = shape[:max(len(shape) - event_dims, 0)]
    return (1,) * (2 - len(leading)) + leading + (shape[len(leading):].numel(),)


def _common_shape(op: str, tensors: dict[str, Tensor], event_dims: int) -> torch.Size:
    """The shape to which x and the first parameter broadcast, and all others too."""
    (x_name, x), (a_name, a), *_ = tensors.items()
    if not 0 <= event_dims <= min(x.dim(), a.dim()):
        raise ValueError(f"{op}: event_dims must lie between 0 and the dimensions of {x_name}{list(x.shape)} and "
                         f"{a_name}{list(a.shape)}, given {event_dims}.")
    shape, event = a.shape, a.shape[a.dim() - event_dims:]
    if x.shape != shape[max(a.dim() - x.dim(), 0):]:  # torch.broadcast_shapes takes 10 µs
        try:
            shape = torch.broadcast_shapes(x.shape, a.shape)
        except RuntimeError:
            event = None
    if x.shape[x.dim() - event_dims:] != event:
        raise ValueError(f"{op}: {x_name} and {a_name} must have the same {event_dims} trailing axes (event_dims) and leading "
                         f"axes that broadcast, given {list(x.shape)} and {list(a.shape)}.")
    for name, t in tensors.items():
        if t.dim() > len(shape) or any(n not in (1, full) for n, full in zip(t.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"{op}: {name} must broadcast against {x_name} and {a_name}, whose shape is {list(shape)}, "
                             f"given {list(t.shape)}.")
    return shape


def _is_whole(t: Tensor, shape: torch.Size, span: tuple[int, int]) -> bool:
    """Whether `t` has full size along all axes of the span, or is broadcast along all."""
    sizes = t.shape[slice(*span)]
    return sizes == shape[slice(*span)] or all(size == 1 for size in sizes)


def _fold(t: Tensor, shape: torch.Size, spans: Sequence[tuple[int, int]]) -> Tensor:
    """`t` with the axes of each span as one: a view, unless it is broadcast along some of them only."""
    sizes = [t.shape[slice(*span)] if _is_whole(t, shape, span) else shape[slice(*span)] for span in spans]
    expanded, folded = [n for part in sizes for n in part], [math.prod(part) for part in sizes]
    if list(t.shape) != expanded:
        t = t.expand(expanded)
    return t if list(t.shape) == folded else t.reshape(folded)


def _fake_fwd(x, a, b, mask, kind, event_dims):
    shape = torch.broadcast_shapes(x.shape, a.shape)
    return x.new_empty(shape[:len(shape) - event_dims])


def _fake_bwd(grad, x, a, b, mask, kind, event_dims, need_x, need_a, need_b):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
                 for t, need in ((x, need_x), (a, need_a), (b, need_b)))


# The last `event_dims` axes of x, a, b and mask are features [P]; up to two axes before them are samples and rows [S, N].
# Either all tensors are [S, N, P], with sizes of 1 where they are broadcast, or a has all axes, x its last ones, b and mask
# their last ones or none. x and a have all features; b is None for likelihoods of one parameter. `kind` is an index of OPS.
# Gradients not needed come back empty.
FWD = Primitive("likelihood", "likelihood_fwd", "(Tensor x, Tensor a, Tensor? b, Tensor? mask, int kind, int event_dims) -> "
                "Tensor", _fake_fwd)
BWD = Primitive("likelihood", "likelihood_bwd", "(Tensor grad, Tensor x, Tensor a, Tensor? b, Tensor? mask, int kind, "
                "int event_dims, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)", _fake_bwd)

# On CPU the half-precision arguments reach the kernels as float32.
SUPPORT = {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}
OPS = tuple(register(Op(f.__name__, "likelihood_fwd", SUPPORT)) for f in (
    bernoulli_log_prob, gaussian_log_prob, discretized_logistic_log_prob, negative_binomial_log_prob))


def _reference(x, a, b, mask, kind, event_dims):
    leading = max(x.dim(), a.dim()) - event_dims
    log_prob = reference.log_prob(*as_rows((x, a.to(x.dtype), b, mask), event_dims), kind)
    return log_prob.reshape(log_prob.shape[2 - leading:])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kind, ctx.event_dims = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, bwd, grad):
    (x, a, b, mask), (*needs, _, _, _) = ctx.saved_tensors, ctx.needs_input_grad
    if torch.is_grad_enabled():  # double backward
        def log_prob(*differentiable):
            return _reference(*differentiable, mask, ctx.kind, ctx.event_dims)

        return *reference_gradients(log_prob, (x, a, b), needs, (grad,)), None, None, None
    need_x, need_a, need_b = needs
    dx, da, db = bwd(grad, x, a, b, mask, ctx.kind, ctx.event_dims, need_x, need_a, need_b)
    return dx if need_x else None, da if need_a else None, db if need_b else None, None, None, None


def _vmap(call, info, in_dims, x, a, b, mask, kind, event_dims):
    """A batch axis joins the samples."""
    pairs = list(zip((x, a, b, mask), in_dims, strict=False))
    leading = max(t.dim() - (dim is not None) for t, dim in pairs[:2]) - event_dims

    def rows(t, dim):
        if t is not None:
            t = t[None] if dim is None else t.movedim(dim, 0)
            return t.reshape(len(t), *_row_shape(t.shape[1:], event_dims))

    folded = [rows(t, dim) for t, dim in pairs]
    S = max(t.shape[1] for t in folded[:2])

    def join(t, shared=True):
        if t is not None:
            is_one = shared and t.shape[:2] == (1, 1)
            return t[0] if is_one else t.expand(info.batch_size, S, *t.shape[2:]).flatten(0, 1)

    x, a, *others = folded  # the number of samples is that of x or a
    log_prob = call(join(x), join(a, shared=False), *map(join, others), kind, 1).unflatten(0, (info.batch_size, S))
    return log_prob.reshape(info.batch_size, *log_prob.shape[3 - leading:]), 0


_likelihood = Differentiable(FWD, BWD, _save, _gradients, _vmap)
