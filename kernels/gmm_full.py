"""Log-density of a Gaussian mixture with full covariances, given by precision Cholesky factors, and its moments for EM.

    log p(z_n) = log Σ_k exp(log_weights_k) N(z_n; μ_k, Σ_k),    Σ_k⁻¹ = P_k P_kᵀ,    P_k upper triangular

with δ = z_n − μ_k the logarithm of a normal density is Σ_d log P_kdd − ½ D log 2π − ½ |δ P_k|²: no inverse and no determinant
is left (scikit-learn's `precisions_cholesky_`; Murphy 2012, §11.4.2, for EM). Of the terms l_nk of the sum and the
responsibilities r_nk = exp(l_nk − log p(z_n)) the moments are

    W_k = Σ_n a_nk        m_k = Σ_n a_nk δ_nk        S_k = Σ_n a_nk δ_nk δ_nkᵀ        a_nk = g_n r_nk

EM reads its next step off them: with g = 1 the weights are W / N, the means move by m / W, and the covariances are
S / W − (m / W)(m / W)ᵀ. They are taken about the current means, so nothing large cancels. With g the incoming gradient of the
log-density they are all that its gradients need:

    ∂z_n = −Σ_k a_nk P_k P_kᵀ δ_nk        ∂μ_k = P_k P_kᵀ m_k        ∂P_k = W_k diag(1 / P_kdd) − upper(S_k P_k)
    ∂log_weights_k = W_k

A gradient h of the responsibilities adds r_nk (h_nk − Σ_j h_nj r_nj) to a_nk. Backward saves log p only and recomputes r. Sums
over rows run in blocks that are added up in float64, and a pair with a = 0 is left out of them.
"""

import torch
from torch import Tensor

from .backends import Op, Support, register
from .checks import HALF, check_mixture, check_shape, checked_floats
from .gmm import GmmMoments, coefficients
from .library import Differentiable, Primitive, reference_gradients
from .reference import gmm_full as reference


def gmm_full_log_prob(z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor, *,
                      responsibilities: bool = False, backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of `z` under a mixture of Gaussians with full covariances, in nats.

    Args:
        z: `[..., D]` points. One that is not finite has a log-density that is not, and its gradients may be NaN.
        means: `[K, D]`.
        precision_cholesky: `[K, D, D]`, the upper triangular P with Σ⁻¹ = P Pᵀ of each component, as scikit-learn's
            `precisions_cholesky_`. What lies below the diagonal is not read, and its gradient is zero. The diagonal must be
            positive, which is not checked: with a negative entry every log-density is NaN.
        log_weights: `[K]`, used as given: pass `logits.log_softmax(0)` for a normalised density; weights that do not sum
            to one give the logarithm of the unnormalised mixture. −inf removes a component.
        responsibilities: also return r = p(k | z), `[..., K]`.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        `[...]`, or `([...], [..., K])` with `responsibilities`. float64 inputs give float64; float32, and bfloat16 and
        float16, give float32, as does everything under autocast.

    Differentiable, twice, in z, means, precision_cholesky and log_weights; frozen ones cost nothing. Time O(N·K·D²); extra
    memory of the order of the inputs, and O(N·K) only if responsibilities are asked for. The same inputs give the same bits,
    at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.
        BackendError: the backend asked for cannot serve the call; "triton" serves up to 64 dimensions, "cuda" up to 128.

    >>> z, means = torch.zeros(3, 2), torch.zeros(1, 2)
    >>> gmm_full_log_prob(z, means, torch.eye(2)[None], torch.zeros(1))
    tensor([-1.8379, -1.8379, -1.8379])
    """
    z, means, precision_cholesky, log_weights = _arguments("gmm_full_log_prob", z, means, precision_cholesky, log_weights)
    lead = z.shape[:-1]
    rows = z if len(lead) == 1 else z.reshape(lead.numel(), z.shape[-1])
    name = OP.choose(z, backend)
    if name == "reference":
        log_prob, resp = _reference(rows, means, precision_cholesky, log_weights)
    else:
        log_prob, resp = _gmm_full(name, rows, means, precision_cholesky, log_weights, responsibilities)
    if len(lead) != 1:
        log_prob = log_prob.reshape(lead)
    return (log_prob, resp.reshape(*lead, means.shape[0])) if responsibilities else log_prob


def gmm_full_moments(z: Tensor, means: Tensor, precision_cholesky: Tensor, log_weights: Tensor,
                     weights: Tensor | None = None, *, backend: str | None = None) -> GmmMoments:
    """Log-densities, and the sums over rows that a step of expectation maximisation needs, in one pass over the data.

    With δ = z − means and a = weights · p(k | z) the sums are Σ a, Σ a δ and Σ a δ δᵀ. They are about the given means: where
    these are far from zero, uncentred second moments would lose the covariance to cancellation. The covariance of the next
    step is `second / weight − (first / weight)(first / weight)ᵀ`, its mean `means + first / weight`.

    Args:
        z, means, precision_cholesky, log_weights, backend: as in `gmm_full_log_prob`.
        weights: of the rows, `[...]`; ones if left out. They do not enter the log-densities.

    Returns:
        `GmmMoments(log_prob, weight, first, second)`, all in the dtype of the log-density, summed in float64 over blocks of
        rows. None of it is differentiable. Extra memory is of the order of the inputs and of 512·K.

    Raises:
        As `gmm_full_log_prob`.

    >>> z, means = torch.tensor([[0.0], [2.0]]), torch.zeros(1, 1)
    >>> gmm_full_moments(z, means, torch.ones(1, 1, 1), torch.zeros(1)).second
    tensor([[[4.]]])
    """
    op = "gmm_full_moments"
    z, means, precision_cholesky, log_weights = _arguments(op, z, means, precision_cholesky, log_weights)
    lead = z.shape[:-1]
    if weights is not None:
        means, weights = checked_floats(op, "means", means=means, weights=weights)
        check_shape(op, "weights", weights, tuple(lead), "[...] as in z[..., D]")
        weights = weights.reshape(-1)
    rows = z if len(lead) == 1 else z.reshape(lead.numel(), z.shape[-1])
    name = MOMENTS_OP.choose(z, backend)
    with torch.no_grad():
        if name == "reference":
            sums = reference.gmm_full_moments(rows.to(means.dtype), means, precision_cholesky, log_weights, weights)
        else:
            sums = MOMENTS(name, weights, rows, means, precision_cholesky, log_weights)
    log_prob, *sums = (t.to(means.dtype) for t in sums)
    return GmmMoments(log_prob.reshape(lead), *sums)


def _reference(z, means, *args):
    return reference.gmm_full_log_prob(z.to(means.dtype), means, *args)


def _arguments(op, z, means, precision_cholesky, log_weights):
    """The checked arguments, in working precision."""
    z, means, precision_cholesky, log_weights = checked_floats(
        op, "means", z=z, means=means, precision_cholesky=precision_cholesky, log_weights=log_weights)
    check_mixture(op, z, means, log_weights)
    K, D = means.shape
    check_shape(op, "precision_cholesky", precision_cholesky, (K, D, D), "[K, D, D]")
    return z, means, precision_cholesky, log_weights


def _fake_fwd(z, means, precision_cholesky, log_weights, responsibilities):
    N, K = z.shape[0], means.shape[0]
    return means.new_empty(N), means.new_empty(N, K) if responsibilities else None


def _fake_sums(means, K):
    D = means.shape[1] if K else 0
    return tuple(means.new_empty(shape, dtype=torch.float64) for shape in ((K,), (K, D), (K, D, D)))


def _fake_bwd(grad, z, means, precision_cholesky, log_weights, log_prob, coef, need_z, need_mixture):
    return (torch.empty_like(z, memory_format=torch.contiguous_format) if need_z else z.new_empty(0, 0),
            *_fake_sums(means, means.shape[0] if need_mixture else 0))


def _fake_moments(weights, z, means, precision_cholesky, log_weights):
    return means.new_empty(z.shape[0]), *_fake_sums(means, means.shape[0])


# `responsibilities` false returns None in their place. gmm_full_bwd gives dz and the moments W, m and S in float64, empty
# where not needed; `coef` is a_nk where the responsibilities have a gradient, else it is recomputed from grad and log_prob.
FWD = Primitive("gmm_full", "gmm_full_fwd", "(Tensor z, Tensor means, Tensor precision_cholesky, Tensor log_weights, "
                "bool responsibilities) -> (Tensor, Tensor?)", _fake_fwd)
BWD = Primitive("gmm_full", "gmm_full_bwd", "(Tensor grad, Tensor z, Tensor means, Tensor precision_cholesky, "
                "Tensor log_weights, Tensor log_prob, Tensor? coef, bool need_z, bool need_mixture) "
                "-> (Tensor, Tensor, Tensor, Tensor)", _fake_bwd)
MOMENTS = Primitive("gmm_full", "gmm_full_moments", "(Tensor? weights, Tensor z, Tensor means, Tensor precision_cholesky, "
                    "Tensor log_weights) -> (Tensor, Tensor, Tensor, Tensor)", _fake_moments)

# On CPU the half-precision arguments reach the kernels as float32. On GPU a factor must fit the registers of a block (Triton),
# or, beside a block of rows, its shared memory.
SUPPORT = {
    "cpp": Support(("cpu",), (torch.float32, torch.float64, *HALF)),
    "triton": Support(("cuda",), (torch.float32, *HALF), max_dim=64),
    "cuda": Support(("cuda",), (torch.float32, *HALF), max_dim=128),
}
OP = register(Op("gmm_full_log_prob", "gmm_full_fwd", SUPPORT))
MOMENTS_OP = register(Op("gmm_full_moments", "gmm_full_moments", SUPPORT))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, grad, grad_resp):
    *tensors, log_prob, resp = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if grad is None and grad_resp is None:
        return (None,) * 5
    if torch.is_grad_enabled():  # double backward
        return (*reference_gradients(_reference, tensors, needs, (grad, grad_resp)), None)
    coef = coefficients(resp, grad, grad_resp)
    if grad is None:
        grad = torch.zeros_like(log_prob)
    need_z, need_means, need_cholesky, need_weights = needs
    dz, weight, first, second = bwd(grad, *tensors, log_prob, coef, need_z, need_means or need_cholesky or need_weights)
    return (dz if need_z else None, *_mixture_gradients(*tensors[1:], weight, first, second, needs[1:]), None)


def _mixture_gradients(means, precision_cholesky, log_weights, weight, first, second, needs):
    """From the moments. The products are float64's: P may cancel what S holds."""
    need_means, need_cholesky, need_weights = needs
    chol = precision_cholesky.double().triu() if need_means or need_cholesky else None
    dmeans = chol @ (chol.mT @ first[..., None]) if need_means else None
    dcholesky = None
    if need_cholesky:
        dcholesky = torch.diag_embed(weight[:, None] / chol.diagonal(dim1=1, dim2=2)) - (second @ chol).triu()
    return (dmeans.squeeze(-1).to(means.dtype) if need_means else None, dcholesky.to(means.dtype) if need_cholesky else None,
            weight.to(means.dtype) if need_weights else None)


def _vmap(call, info, in_dims, z, means, precision_cholesky, log_weights, responsibilities):
    """Batches of points fold into rows; one mixture a call."""
    if any(d is not None for d in in_dims[1:4]):
        raise NotImplementedError("gmm_full_log_prob: vmap over the mixture is not supported; vmap over z, or loop over "
                                  "mixtures.")
    rows = z.movedim(in_dims[0], 0).flatten(0, 1)
    log_prob, resp = call(rows, means, precision_cholesky, log_weights, responsibilities)
    split = (info.batch_size, -1)
    return ((log_prob.unflatten(0, split), resp.unflatten(0, split) if responsibilities else resp),
            (0, 0 if responsibilities else None))


_gmm_full = Differentiable(FWD, BWD, _save, _gradients, _vmap)
