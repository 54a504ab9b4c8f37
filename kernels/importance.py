"""Importance-weighted bounds on the log-likelihood of a latent-variable model with a diagonal Gaussian encoder.

For a data point n with S samples z_s ~ q(z | x_n) = N(mu_n, exp(log_var_n)),

    log w_sn = log p(x_n | z_sn) + log p(z_sn) − log q(z_sn | x_n)
             = log p(x_n | z_sn) + ½ Σ_d [(z − mu)² / σ² − z² + log_var]              (prior N(0, I): the 2π cancel)

Bounds, each a function of log w along s (Rényi: Li & Turner 2016):

    L_α = 1/(1 − α) · log (1/S Σ_s w_s^(1−α))        α = 1: ELBO, mean of log w;  α = 0: IWAE (Burda et al. 2016, Eq. 8);
                                                     α → −∞: max (VR-max);  α → ∞: min
    ∂L_α/∂log w_s = w̃_s = w_s^(1−α) / Σ_j w_j^(1−α)

    MIWAE(M, K): mean of M bounds of K = S/M consecutive samples      CIWAE(β): β ELBO + (1 − β) IWAE  (Rainforth et al. 2018)

so the gradient of IWAE is Σ_s w̃_s ∂log w_s (Burda et al.), with the normalised weights and of the whole
log-weight; the survey "Generative Models" (Zhang et al.) prints it in Eq. 22 without the weights, which is the ELBO's.
Estimators of the same gradient, or of one with a better ratio of signal to noise, for samples z = mu + σ ε; θ is the decoder,
φ the encoder, and ∂z log w counts every path through z, the decoder's too:

    iwae    θ: Σ w̃ ∂θ log w        φ: Σ w̃ (∂z log w · ∂φ z − ∂φ log q)                 the bound's own gradient
    stl     θ: Σ w̃ ∂θ log w        φ: Σ w̃ ∂z log w · ∂φ z                              Roeder et al. 2017; biased unless
                                                                                        α = 1 or S = 1
    dreg    θ: Σ w̃ ∂θ log w        φ: Σ (α w̃ + (1 − α) w̃²) ∂z log w · ∂φ z           Tucker et al. 2019 (α = 0);
                                                                                        Daudel et al. 2023 (any α)
    piwae   θ: IWAE of all S       φ: MIWAE of the groups                              Rainforth et al. 2018

Kernels read z once forward and once backward, and keep [S, N] only from one to the other: log w, or ∂L/∂log w where a
gradient will be needed.
"""

import math
import weakref
from functools import partial

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, are_alike, check_shape, checked_floats
from .library import Differentiable, Primitive, reference_gradients
from .reference import importance as reference

ESTIMATORS = ("iwae", "stl", "dreg", "piwae")


def importance_log_weights(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor, log_pz: Tensor | None = None, *,
                           backend: str | None = None) -> Tensor:
    """Log importance weights log p(x|z) + log p(z) − log q(z|x), in nats.

    Args:
        z: `[S, N, D]`, S samples of the posterior of each of N data points.
        mu, log_var: `[N, D]`, mean and log σ² of q(z|x).
        log_px: log p(x|z), `[S, N]`.
        log_pz: log-density of the prior at z, `[S, N]`; without it the prior is N(0, I).
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[S, N]`. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does everything under
        autocast.

    Differentiable, twice, in every argument; frozen ones cost nothing. One pass over z forward and one backward; extra memory
    O(S·N + N·D), and backward the gradients and at most min(S / 12, 32) times 2 N·D of sums. The same inputs give the same
    bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.
        BackendError: the backend asked for cannot serve the call.
    """
    op = "importance_log_weights"
    tensors = _check_samples(op, z, mu, log_var, log_px, log_pz)
    return _run(LOG_WEIGHTS.choose(tensors[0], backend), *tensors, 0.0, 0.0, 0)[1]


def importance_bound(log_w: Tensor, alpha: float = 0.0, *, groups: int = 1, elbo_weight: float = 0.0,
                     backend: str | None = None) -> Tensor:
    """Variational bound from log-weights, in nats; it is maximised.

    Args:
        log_w: `[S, ...]`, S samples of each data point.
        alpha: order of the Rényi bound: 0 is IWAE, 1 the ELBO, −∞ VR-max (the largest log-weight), ∞ the smallest.
        groups: M, the mean of M bounds over S/M consecutive samples each (MIWAE).
        elbo_weight: β in [0, 1], β · ELBO + (1 − β) · bound (CIWAE).
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[...]`. Weights of zero (−inf) count as such; a data point with no other has bound −inf and zero gradients. At ±∞ the
        samples that tie share the gradient.

    Differentiable, twice. O(S·N).

    Raises:
        ValueError, TypeError: no samples, `groups` does not divide them, or an option is out of range.
        BackendError: the backend asked for cannot serve the call.

    >>> importance_bound(torch.tensor([[0.0], [math.log(3.0)]]))
    tensor([0.6931])
    """
    log_w = check_log_weights("importance_bound", log_w)
    options = check_options("importance_bound", log_w.shape[0], alpha, groups, elbo_weight)
    name = BOUND.choose(log_w, backend)
    flat = log_w if log_w.dim() == 2 else log_w.reshape(log_w.shape[0], math.prod(log_w.shape[1:]))
    bound = _run(name, None, None, None, flat, None, *options)[0]
    return bound if log_w.dim() == 2 else bound.reshape(log_w.shape[1:])


def importance_objective(z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor, log_pz: Tensor | None = None, *,
                         estimator: str = "iwae", alpha: float = 0.0, groups: int = 1, elbo_weight: float = 0.0,
                         backend: str | None = None) -> Tensor:
    """Variational bound of each data point, with the gradient estimator of your choice: maximise its sum or mean.

    `importance_bound(importance_log_weights(...), ...)` in one pass over z.

    Args:
        z, mu, log_var, log_px, log_pz: as in `importance_log_weights`.
        estimator: "iwae", the gradient of the bound; "stl", "dreg" or "piwae" (module docstring). "dreg" and "piwae" weigh
            encoder and decoder differently: a hook on z multiplies the gradient that reaches it in a backward pass of this
            bound, so let this z, the tensor given here, enter the decoder and the prior, and no other term of the loss.
            torch.compile does not trace the hook: it leaves the call to eager mode, and with fullgraph=True raises.
        alpha, groups, elbo_weight: as in `importance_bound`. The value of "piwae" is the bound over all samples, `groups`
            are those of the encoder.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[N]`, as `importance_log_weights` and `importance_bound`.

    Differentiable in every tensor; twice with "iwae" (the other estimators hold the weights constant in a second derivative).
    "piwae" drops the part through z of the encoder's gradient where a weight is below e^-87 of the sum of all (float32).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or an option is unknown or out of range.
        BackendError: the backend asked for cannot serve the call.
    """
    op = "importance_objective"
    tensors = _check_samples(op, z, mu, log_var, log_px, log_pz)
    options = check_options(op, z.shape[0], alpha, groups, elbo_weight)
    name = OBJECTIVE.choose(tensors[0], backend)
    if estimator == "iwae":
        return _run(name, *tensors, *options)[0]
    if estimator not in ESTIMATORS:
        raise ValueError(f"{op}: estimator must be one of {', '.join(ESTIMATORS)}, given {estimator!r}.")
    alpha, elbo_weight, _ = options
    z_, mu_, log_var_, *densities = tensors
    path = (z_, mu_.detach(), log_var_.detach(), *densities)
    if estimator == "stl" or (estimator == "dreg" and elbo_weight == 1):  # of the ELBO they are the same
        return _run(name, *path, *options)[0]
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{op}: estimator={estimator!r} hooks the gradient of z, which torch.compile does not trace; "
                                  f"leave fullgraph out, or use 'iwae' or 'stl'.")
    if estimator == "dreg":
        if math.isinf(alpha):
            raise ValueError(f"{op}: estimator='dreg' needs a finite alpha, given {alpha}; use 'stl', its limit.")
        bound, _, weights = _run(name, *path, *options)
        factor = partial(reference.dreg_factor, alpha=alpha, elbo_weight=elbo_weight, groups=groups)
        _scale_gradient(z, bound, factor, weights)
        return bound
    bound, _, decoder = _run(name, *path, alpha, elbo_weight, 1)
    fixed = (t if t is None else t.detach() for t in densities)
    direct, _, encoder = _run(name, z_.detach(), mu_, log_var_, *fixed, *options, need_weights=z.requires_grad)
    _scale_gradient(z, bound, reference.piwae_factor, decoder, encoder)
    return bound + (direct - direct.detach()).nan_to_num()


def _scale_gradient(z: Tensor, bound: Tensor, factor, *weights: Tensor) -> None:
    """Multiplies whatever gradient reaches z [S,N,D] in a backward pass of `bound` by factor(*weights) [S,N]."""
    if z.requires_grad and torch.is_grad_enabled():
        scale = _GradientScale(factor(*(w.detach() for w in weights))[..., None])
        bound.register_hook(scale.enter)
        hook = z.register_hook(partial(_GradientScale.apply, weakref.ref(scale)))
        weakref.finalize(scale, hook.remove)


class _GradientScale:
    """Belongs to the graph of a bound and leaves z with it: a leaf serves many calls, and passes of others go by."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.task = None  # the backward pass that the bound is in

    def enter(self, _grad: Tensor) -> None:
        self.task = torch._C._current_graph_task_id()

    @staticmethod
    def apply(reference: weakref.ref, grad: Tensor) -> Tensor:
        own = reference()
        if own is None or own.task != torch._C._current_graph_task_id():
            return grad
        return (grad * own.scale).to(grad.dtype)


def _check_samples(op: str, z: Tensor, mu: Tensor, log_var: Tensor, log_px: Tensor,
                   log_pz: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in working precision; they fit together."""
    tensors = (z, mu, log_var, log_px) if log_pz is None else (z, mu, log_var, log_px, log_pz)
    if are_alike(tensors) and _fit_together(*tensors):
        return z, mu, log_var, log_px, log_pz
    given = {} if log_pz is None else {"log_pz": log_pz}
    z, mu, log_var, log_px, *rest = checked_floats(op, "mu", z=z, mu=mu, log_var=log_var, log_px=log_px, **given)
    log_pz = rest[0] if rest else None
    if z.dim() != 3:
        raise ValueError(f"{op}: z must have shape [S, N, D], given {list(z.shape)}.")
    S, N, D = z.shape
    check_shape(op, "mu", mu, (N, D), "[N, D] as in z[S, N, D]")
    check_shape(op, "log_var", log_var, (N, D), "[N, D] as in z[S, N, D]")
    check_shape(op, "log_px", log_px, (S, N), "[S, N] as in z[S, N, D]")
    if log_pz is not None:
        check_shape(op, "log_pz", log_pz, (S, N), "[S, N] as in z[S, N, D]")
    return z, mu, log_var, log_px, log_pz


def _fit_together(z: Tensor, mu: Tensor, log_var: Tensor, *densities: Tensor) -> bool:
    """z[S, N, D], mu and log_var [N, D] and densities [S, N]."""
    shape = z.shape
    return (len(shape) == 3 and mu.shape == log_var.shape == shape[1:]
            and [t.shape for t in densities] == [shape[:2]] * len(densities))


def check_log_weights(op: str, log_w: Tensor) -> Tensor:
    """`log_w[S, ...]` in working precision."""
    (log_w,) = checked_floats(op, "log_w", log_w=log_w)
    if log_w.dim() == 0:
        raise ValueError(f"{op}: log_w must have shape [S, ...], given a scalar.")
    return log_w.float() if log_w.dtype in HALF else log_w


def check_options(op: str, S: int, alpha: float, groups: int = 1, elbo_weight: float = 0.0) -> tuple[float, float, int]:
    """alpha, elbo_weight and groups for the primitive, which knows α = 1 as elbo_weight = 1."""
    if S == 0:
        raise ValueError(f"{op}: a bound needs at least one sample, given S = 0.")
    if not isinstance(alpha, (int, float)) or alpha != alpha:
        raise ValueError(f"{op}: alpha must be a number or ±inf, given {alpha!r}.")
    if not isinstance(groups, int) or groups < 1 or S % groups:
        raise ValueError(f"{op}: groups must divide the S = {S} samples, given {groups!r}.")
    if not isinstance(elbo_weight, (int, float)) or not 0 <= elbo_weight <= 1:
        raise ValueError(f"{op}: elbo_weight must lie in [0, 1], given {elbo_weight!r}.")
    return (0.0, 1.0, 1) if alpha == 1 else (float(alpha), float(elbo_weight), groups)


def _run(name: str, *args, need_weights: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    need = torch.is_grad_enabled() and (need_weights or any(t is not None and t.requires_grad for t in args[:5]))
    return _reference(*args, need) if name == "reference" else _importance(name, *args, need)


def _reference(z, mu, log_var, log_px, log_pz, alpha, elbo_weight, groups, need_weights):
    log_w = log_px if z is None else reference.log_weights(z.to(mu.dtype), mu, log_var, log_px, log_pz)
    if not groups:
        return log_px.new_empty(0), log_w, log_px.new_empty(0, 0)
    weights = log_px.new_empty(0, 0)
    if need_weights:
        weights = reference.normalised_weights(log_w.detach(), alpha, elbo_weight, groups)
    return reference.bound(log_w, alpha, elbo_weight, groups), log_w, weights


def _fake_fwd(z, mu, log_var, log_px, log_pz, alpha, elbo_weight, groups, need_weights):
    S, N = log_px.shape
    weights = (S, N) if need_weights and groups else (0, 0)
    return (log_px.new_empty(N if groups else 0), log_px.new_empty((0, 0) if z is None else (S, N)), log_px.new_empty(weights))


def _fake_bwd(grad, weights, z, mu, log_var, normal_prior, need_z, need_posterior):
    shape = mu.shape if need_posterior else (0, 0)
    return (torch.empty_like(z, memory_format=torch.contiguous_format) if need_z else z.new_empty(0, 0, 0), mu.new_empty(shape),
            mu.new_empty(shape), weights.new_empty((0, 0) if grad is None else weights.shape))


# Outputs: bound [N], log w [S, N], ∂bound / ∂log w [S, N]. Without z, `log_px` is log w and the second is empty; with `groups`
# 0 only log w is computed; the third is empty unless `need_weights`. importance_bwd takes `grad` [N] times `weights` [S, N], or
# `weights` alone, as the gradient of log w, and returns those of z, mu, log_var and, with `grad`, of log w itself.
FWD = Primitive("importance", "importance_fwd", "(Tensor? z, Tensor? mu, Tensor? log_var, Tensor log_px, Tensor? log_pz, "
                "float alpha, float elbo_weight, int groups, bool need_weights) -> (Tensor, Tensor, Tensor)", _fake_fwd)
BWD = Primitive("importance", "importance_bwd", "(Tensor? grad, Tensor weights, Tensor z, Tensor mu, Tensor log_var, "
                "bool normal_prior, bool need_z, bool need_posterior) -> (Tensor, Tensor, Tensor, Tensor)", _fake_bwd)

# On CPU the half-precision arguments reach the kernels as float32.
SUPPORT = {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}
LOG_WEIGHTS, BOUND, OBJECTIVE = (register(Op(name, "importance_fwd", SUPPORT)) for name in (
    "importance_log_weights", "importance_bound", "importance_objective"))


def _save(ctx, inputs, output) -> None:
    *tensors, alpha, elbo_weight, groups, _ = inputs
    ctx.options = alpha, elbo_weight, groups, False
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, grad, grad_log_w, _grad_weights):
    *tensors, weights = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if ctx.options[2] == 0:  # no bound
        grad = None
    if tensors[0] is None:  # no log w
        grad_log_w = None
    if grad is None and grad_log_w is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # double backward
        grads = reference_gradients(lambda *args: _reference(*args, *ctx.options), tensors, needs, (grad, grad_log_w, None))
        return (*grads, *(None,) * 4)
    if grad_log_w is not None:
        weights, grad = grad_log_w if grad is None else grad_log_w + weights * grad, None
    z, mu, log_var, _, log_pz = tensors
    if z is None:
        return (None, None, None, weights * grad, *(None,) * 5)
    need_z, need_mu, need_log_var, need_log_px, need_log_pz = needs
    dz, dmu, dlog_var, dlog_w = bwd(grad, weights, z, mu, log_var, log_pz is None, need_z, need_mu or need_log_var)
    if grad is None:
        dlog_w = weights
    return (dz if need_z else None, dmu if need_mu else None, dlog_var if need_log_var else None,
            dlog_w if need_log_px else None, dlog_w if need_log_pz else None, *(None,) * 4)


_importance = Differentiable(FWD, BWD, _save, _gradients)
