"""Log-density of a Gaussian mixture with diagonal covariances, over a batch of latent vectors.

    log p(z_n) = log Σ_k exp(log_weights_k) Π_d N(z_nd; means_kd, exp(log_vars_kd)),    k over the components allowed to n

with l_nk the logarithm of the k-th term and the responsibilities r_nk = exp(l_nk − log p(z_n)). Gradients, with
a_nk = g_n r_nk for an incoming gradient g of the log-density:

    ∂z_nd = −Σ_k a_nk δ_nkd / σ²_kd      ∂means_kd = Σ_n a_nk δ_nkd / σ²_kd             δ_nkd = z_nd − means_kd
    ∂log_vars_kd = ½ Σ_n a_nk (δ²_nkd / σ²_kd − 1)      ∂log_weights_k = Σ_n a_nk

A gradient h of the responsibilities adds r_nk (h_nk − Σ_j h_nj r_nj) to a_nk. Kernels take the direct form
Σ_d (δ² / σ²): the expanded one saves nothing in FMAs and cancels. Backward saves log p only and recomputes r.

The M-step of EM needs Σ_n r_nk, Σ_n r_nk δ_nkd and Σ_n r_nk δ²_nkd, which the gradients for g = 1 are made of (Fisher's
identity): about the present means, so that no moment cancels.

Uses: the prior of the Deep Generative Decoder (Schuster & Krogh 2021, §2.4), VampPrior (Tomczak & Welling 2018, Eq. 9),
kernel density estimates, aggregate posteriors and density estimation by EM.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, check_indices, check_mixture, check_shape, checked_floats
from .library import Differentiable, Primitive, reference_gradients
from .reference import gmm as reference


def gmm_log_prob(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, *, labels: Tensor | None = None,
                 allowed: Tensor | None = None, responsibilities: bool = False,
                 backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of `z` under a mixture of diagonal Gaussians, in nats.

    Args:
        z: `[..., D]` points.
        means: `[K, D]`.
        log_vars: log σ², `[K, D]` (diagonal), `[K, 1]` (isotropic), `[D]` or a scalar (shared by the components).
        log_weights: `[K]`, used as given: pass `logits.log_softmax(0)` for a normalised density; weights that do not sum
            to one give the logarithm of the unnormalised mixture. −inf removes a component.
        labels: integers `[...]`, one a point. Without `allowed`, a label is the index of the only component allowed to
            the point; with it, the row of `allowed` that holds. −1 allows every component.
        allowed: boolean. With `labels`, `[C, K]`: the components of each of C classes. Without, `[..., K]`: a mask per
            point. A point with no allowed component has log-density −inf and zero gradients.
        responsibilities: also return r = p(k | z), `[..., K]`.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[...]`, or `([...], [..., K])` with `responsibilities`. float64 inputs give float64; float32, and bfloat16 and
        float16, give float32, as does everything under autocast.

    Differentiable, twice, in z, means, log_vars and log_weights; frozen ones cost nothing. Time O(N·K·D); extra memory of
    the order of the inputs, and O(N·K) only if responsibilities are asked for. The same inputs give the same bits, at any
    number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a label is out of range.
        BackendError: the backend asked for cannot serve the call.

    >>> z, means = torch.zeros(3, 2), torch.zeros(1, 2)
    >>> gmm_log_prob(z, means, torch.tensor(0.0), torch.zeros(1))
    tensor([-1.8379, -1.8379, -1.8379])
    """
    op = "gmm_log_prob"
    z, means, log_vars, log_weights, labels, allowed = _arguments(op, z, means, log_vars, log_weights, labels, allowed)
    shape = z.shape
    if len(shape) != 2:
        z = z.reshape(shape[:-1].numel(), shape[-1])

    name = OP.choose(z, backend)
    if name == "reference":
        log_prob, resp = _reference(z, means, log_vars, log_weights, labels, allowed)
    else:
        log_prob, resp = _gmm(name, z, means, log_vars, log_weights, labels, allowed, responsibilities)
    if len(shape) != 2:
        log_prob = log_prob.reshape(shape[:-1])
    return (log_prob, resp.reshape(*shape[:-1], means.shape[0])) if responsibilities else log_prob


def gmm_log_prob_and_grad(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, grad: Tensor | None = None, *,
                          labels: Tensor | None = None, allowed: Tensor | None = None,
                          backend: str | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`gmm_log_prob` and its gradients in one call without autograd, for steps and samplers written by hand.

    On CPU the logits are computed once, not twice: 5/7 of the multiplications of forward and backward. On small batches,
    where autograd's own steps take most of the time, it takes a third of it.

    Args:
        z, means, log_vars, log_weights, labels, allowed, backend: as in `gmm_log_prob`.
        grad: gradient of the log-densities, `[...]`; ones if left out.

    Returns:
        The log-density `[...]` and the gradients of z, means, log_vars and log_weights in their shapes, all in the dtype
        of the log-density. None of it is differentiable. Extra memory is of the order of the inputs and of 512·K.

    Raises:
        As `gmm_log_prob`.

    >>> _, (score, *_) = gmm_log_prob_and_grad(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor(0.0), torch.zeros(1))
    >>> score
    tensor([[-1., -1.]])
    """
    shape = log_vars.shape if isinstance(log_vars, Tensor) else ()
    op = "gmm_log_prob_and_grad"
    z, means, log_vars, log_weights, labels, allowed = _arguments(op, z, means, log_vars, log_weights, labels, allowed)
    lead = z.shape[:-1]
    if grad is None:
        grad = means.new_ones(lead)
    means, grad = checked_floats(op, "means", means=means, grad=grad)
    check_shape(op, "grad", grad, tuple(lead), "[...] as in z[..., D]")

    name = BOTH.choose(z, backend)
    rows = z if len(lead) == 1 else z.reshape(lead.numel(), z.shape[-1])
    arguments = grad.reshape(-1), rows, means, log_vars, log_weights, labels, allowed
    if name == "reference":
        log_prob, dz, dmeans, dlog_vars, dlog_weights = _reference_and_grad(*arguments)
    else:
        with torch.no_grad():
            log_prob, dz, dmeans, dlog_vars, dlog_weights = FWD_BWD(name, *arguments)
    if dlog_vars.shape != shape:
        dlog_vars = dlog_vars.sum_to_size(shape)
    return log_prob.reshape(lead), (dz.to(means.dtype).reshape(z.shape), dmeans, dlog_vars, dlog_weights)


class GmmMoments(NamedTuple):
    """About the means given, with a = weights · p(k | z): `log_prob` `[...]`, `weight` Σ a `[K]`, `first` Σ a δ `[K, D]` and
    `second`, of `gmm_moments` Σ a δ² `[K, D]`, of `gmm_full_moments` Σ a δ δᵀ `[K, D, D]`."""

    log_prob: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor


def gmm_moments(z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor, weights: Tensor | None = None, *,
                backend: str | None = None) -> GmmMoments:
    """The sums of an EM step over `z`, with nothing of size N×K in memory: the E-step and what the M-step takes from it.

    Args:
        z, means, log_vars, log_weights, backend: as in `gmm_log_prob`.
        weights: of the points, `[...]`; ones if left out.

    Returns:
        `GmmMoments(log_prob, weight, first, second)`, about the means given, all in the dtype of the log-density: with
        a = weights · p(k | z) the sums Σ a `[K]`, Σ a (z − means) `[K, D]` and Σ a (z − means)² `[K, D]`, whatever the shape of
        `log_vars`. None of it is differentiable. A point so far that its log-density is −inf adds to no sum. Time O(N·K·D),
        four fifths of that of `gmm_log_prob_and_grad` on CPU; extra memory is of the order of the inputs and of 512·K.

    Raises:
        As `gmm_log_prob`.

    >>> moments = gmm_moments(torch.ones(3, 2), torch.zeros(1, 2), torch.tensor(0.0), torch.zeros(1))
    >>> moments.weight, moments.second
    (tensor([3.]), tensor([[3., 3.]]))
    """
    op = "gmm_moments"
    z, means, log_vars, log_weights, _, _ = _arguments(op, z, means, log_vars, log_weights, None, None)
    lead = z.shape[:-1]
    if weights is None:
        weights = means.new_ones(lead)
    means, weights = checked_floats(op, "means", means=means, weights=weights)
    check_shape(op, "weights", weights, tuple(lead), "[...] as in z[..., D]")

    name = MOMENTS_OP.choose(z, backend)
    arguments = weights.reshape(-1), z.reshape(lead.numel(), z.shape[-1]), means, log_vars, log_weights
    with torch.no_grad():
        if name == "reference":
            rows = arguments[1].to(means.dtype)
            log_prob, *moments = reference.gmm_moments(arguments[0], rows, *arguments[2:])
        else:
            log_prob, *moments = MOMENTS(name, *arguments)
    return GmmMoments(log_prob.reshape(lead), *moments)


def _reference(z, means, *args):
    return reference.gmm_log_prob(z.to(means.dtype), means, *args)


def _reference_and_grad(grad, z, means, log_vars, log_weights, labels, allowed):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (z.to(means.dtype), means, log_vars, log_weights)]
        log_prob = _reference(*leaves, labels, allowed)[0]
        return log_prob.detach(), *torch.autograd.grad(log_prob, leaves, grad)


def _arguments(op, z, means, log_vars, log_weights, labels, allowed):
    """The checked arguments: floats in working precision, log_vars as [K, D], labels and allowed over N rows."""
    z, means, log_vars, log_weights = checked_floats(op, "means", z=z, means=means, log_vars=log_vars, log_weights=log_weights)
    log_vars = _check_mixture(op, z, means, log_vars, log_weights)
    if labels is not None or allowed is not None:
        labels, allowed = _check_allowed(op, labels, allowed, z.shape[:-1], means)
    return z, means, log_vars, log_weights, labels, allowed


def _check_mixture(op: str, z: Tensor, means: Tensor, log_vars: Tensor, log_weights: Tensor) -> Tensor:
    """Shapes of the mixture against z[..., D]; returns log_vars as [K, D]."""
    check_mixture(op, z, means, log_weights)
    K, D = means.shape
    if log_vars.shape == (K, D):
        return log_vars
    if tuple(log_vars.shape) not in ((K, 1), (1, D), (1, 1), (D,), (1,), ()):
        raise ValueError(f"{op}: log_vars must have shape [K, D] = {[K, D]}, [K, 1] (isotropic), [D] or [] (shared), "
                         f"given {list(log_vars.shape)}.")
    return log_vars.expand(K, D)


def _check_allowed(op: str, labels: Tensor | None, allowed: Tensor | None, lead: torch.Size,
                   means: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """labels as int64 [N] and allowed as bool [C, K] or [N, K], on the device of the mixture."""
    K = means.shape[0]
    for name, tensor in (("labels", labels), ("allowed", allowed)):
        if tensor is not None and tensor.device != means.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but means is on {means.device}; "
                             f"move one of them, e.g. {name}.to({means.device}).")
    if allowed is not None:
        if allowed.dtype != torch.bool:
            raise TypeError(f"{op}: allowed must be a boolean tensor, given {allowed.dtype}.")
        if labels is None:
            check_shape(op, "allowed", allowed, (*lead, K), "[..., K]")
            allowed = allowed.reshape(-1, K)
        elif allowed.dim() != 2 or allowed.shape[1] != K:
            raise ValueError(f"{op}: with labels, allowed must have shape [C, K] with K = {K}, given {list(allowed.shape)}.")
    if labels is not None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{op}: labels must be integers, given {labels.dtype}.")
        check_shape(op, "labels", labels, tuple(lead), "[...] as in z[..., D]")
        check_indices(op, "labels", labels, -1, K if allowed is None else allowed.shape[0])
        labels = labels.reshape(-1).long()
    return labels, allowed


def _fake_fwd(z, means, log_vars, log_weights, labels, allowed, responsibilities):
    N, K = z.shape[0], means.shape[0]
    return means.new_empty(N), means.new_empty(N, K) if responsibilities else None


def _fake_bwd(grad, z, means, log_vars, log_weights, log_prob, labels, allowed, coef, need_z, need_mixture):
    K, D = means.shape if need_mixture else (0, 0)
    return (torch.empty_like(z, memory_format=torch.contiguous_format) if need_z else z.new_empty(0, 0),
            means.new_empty(K, D), means.new_empty(K, D), means.new_empty(K))


def _fake_fwd_bwd(grad, z, means, log_vars, log_weights, labels, allowed):
    return means.new_empty(z.shape[0]), *(torch.empty_like(t, memory_format=torch.contiguous_format)
                                          for t in (z, means, log_vars, log_weights))


def _fake_moments(weights, z, means, log_vars, log_weights):
    K, D = means.shape
    return means.new_empty(z.shape[0]), means.new_empty(K), means.new_empty(K, D), means.new_empty(K, D)


# `responsibilities` false returns None in their place. In gmm_bwd, `coef` is a_nk where the forward pass returned
# responsibilities; otherwise it is recomputed from grad and log_prob. Gradients not needed come back empty.
FWD = Primitive("gmm", "gmm_fwd", "(Tensor z, Tensor means, Tensor log_vars, Tensor log_weights, Tensor? labels, "
                "Tensor? allowed, bool responsibilities) -> (Tensor, Tensor?)", _fake_fwd)
BWD = Primitive("gmm", "gmm_bwd", "(Tensor grad, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights, "
                "Tensor log_prob, Tensor? labels, Tensor? allowed, Tensor? coef, bool need_z, bool need_mixture) "
                "-> (Tensor, Tensor, Tensor, Tensor)", _fake_bwd)
FWD_BWD = Primitive("gmm", "gmm_fwd_bwd", "(Tensor grad, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights, "
                    "Tensor? labels, Tensor? allowed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_fwd_bwd)
MOMENTS = Primitive("gmm", "gmm_moments", "(Tensor weights, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights) "
                    "-> (Tensor, Tensor, Tensor, Tensor)", _fake_moments)

# On CPU the half-precision arguments reach the kernels as float32.
SUPPORT = {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF)),
    "cuda": Support(("cuda",), (torch.float32, *HALF)),
}
OP = register(Op("gmm_log_prob", "gmm_fwd", SUPPORT))
BOTH = register(Op("gmm_log_prob_and_grad", "gmm_fwd_bwd", SUPPORT))
MOMENTS_OP = register(Op("gmm_moments", "gmm_moments", SUPPORT))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, grad, grad_resp):
    *tensors, log_prob, resp = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if grad is None and grad_resp is None:
        return (None,) * 7
    if torch.is_grad_enabled():  # double backward
        return (*reference_gradients(_reference, tensors, needs, (grad, grad_resp)), None, None, None)
    coef = coefficients(resp, grad, grad_resp)
    if grad is None:
        grad = torch.zeros_like(log_prob)
    need_z, need_means, need_log_vars, need_log_weights = needs
    z, means, log_vars, log_weights, labels, allowed = tensors
    dz, dmeans, dlog_vars, dlog_weights = bwd(grad, z, means, log_vars, log_weights, log_prob, labels, allowed, coef, need_z,
                                              need_means or need_log_vars or need_log_weights)
    return (dz if need_z else None, dmeans if need_means else None, dlog_vars if need_log_vars else None,
            dlog_weights if need_log_weights else None, None, None, None)


def coefficients(resp: Tensor, grad: Tensor | None, grad_resp: Tensor | None) -> Tensor | None:
    """a_nk for gradients of the log-density, which may be None, and of the responsibilities; None without the latter."""
    if grad_resp is None:
        return None
    coef = resp * (grad_resp - (grad_resp * resp).sum(1, keepdim=True))
    if grad is not None:
        coef += resp * grad[:, None]
    return coef


def _vmap(call, info, in_dims, z, means, log_vars, log_weights, labels, allowed, responsibilities):
    """Batches of points fold into rows; one mixture a call."""
    if any(d is not None for d in in_dims[1:4]) or (labels is not None and in_dims[5] is not None):
        raise NotImplementedError("gmm_log_prob: vmap over the mixture is not supported; vmap over z, or loop over mixtures.")

    def fold(tensor, dim):
        tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.reshape(-1, *tensor.shape[2:])

    rows = fold(z, in_dims[0])
    labels_ = None
    if labels is not None:
        labels_ = fold(labels, in_dims[4])
        check_indices("gmm_log_prob", "labels", labels_, -1, means.shape[0] if allowed is None else allowed.shape[0])
    allowed_ = fold(allowed, in_dims[5]) if allowed is not None and labels is None else allowed
    log_prob, resp = call(rows, means, log_vars, log_weights, labels_, allowed_, responsibilities)
    return ((log_prob.unflatten(0, (info.batch_size, -1)),
             resp.unflatten(0, (info.batch_size, -1)) if responsibilities else resp),
            (0, 0 if responsibilities else None))


_gmm = Differentiable(FWD, BWD, _save, _gradients, _vmap)
