"""KL divergences between all ordered pairs of a batch of diagonal Gaussian posteriors.

    KL_d(i‖j) = ½ [log σ²_jd − log σ²_id + (σ²_id + δ²) / σ²_jd − 1],    δ = μ_id − μ_jd,    over the N (N − 1) pairs i ≠ j

These regularise MAE, whose objective is L_elbo + η L_diverse + γ L_smooth (Ma, Zhou & Hovy, "MAE: Mutual
Posterior-Divergence Regularization for Variational Autoencoders", ICLR 2019, Eq. 4–8):

    MPD       = mean over pairs of Σ_d KL_d                          mutual posterior diversity, Eq. 4
    L_smooth  = standard deviation over pairs of Σ_d KL_d            Eq. 6, unbiased
    L_diverse = Σ_d mean over pairs of softplus(−KL_d)               Eq. 5 and 8
    L_diverse = Σ_d softplus(−mean over pairs of KL_d)               as in the authors' code, which is not Eq. 8

Over all pairs the log-variances cancel, so a mean per dimension comes from five sums over the rows, O(N·D). The deviation
is that of a bilinear form of rank 2 D + 2: from Gram matrices of centred features, in float64, O(N·D²), or from the pair
matrix, O(N²·D), where N < 4 D + 8 and that matrix is not larger than a few times the inputs. Eq. 8 visits every pair and
dimension: one exp each, and one logarithm of a product Π (1 + exp(−KL_d)) for up to 120 of them. Kernels that know that
gradients are needed make those of the scalars in the same pass; backward multiplies them by the incoming gradient.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import pairwise_kl_distributed as distributed
from .backends import Op, Support, register
from .checks import HALF, checked_floats
from .library import Differentiable, Primitive, reference_gradients
from .reference import pairwise_kl as reference

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class PairwiseKL(NamedTuple):
    """Statistics of KL(i‖j) over ordered pairs, in nats: `mean_per_dim` [D], `std` of the total [] (None if not asked for)."""

    mean_per_dim: Tensor
    std: Tensor | None

    @property
    def mpd(self) -> Tensor:
        """Mutual posterior diversity, the mean of the total, []."""
        return self.mean_per_dim.sum()


def pairwise_kl(mu: Tensor, log_var: Tensor, *, std: bool = True, group: "ProcessGroup | None" = None,
                backend: str | None = None) -> PairwiseKL:
    """Mean and standard deviation of KL(q_i‖q_j) over the ordered pairs i ≠ j of posteriors q_i = N(mu_i, exp(log_var_i)).

    Args:
        mu: `[N, D]`, N ≥ 2; an infinite one makes the statistics of its dimension and the deviation NaN.
        log_var: log σ², `[N, D]`; σ² and 1 / σ² must be finite in the dtype.
        std: also the unbiased standard deviation of the total, MAE's L_smooth. Without it the cost is O(N·D).
        group: the batch is the concatenation of those of the ranks of this process group, of any sizes. Every rank gets
            the statistics of the whole, and their gradients with respect to its own rows: where gradients are averaged
            over ranks (DDP), multiply the term by the number of ranks. Only sums over rows cross ranks.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice; not with `group`.

    Returns:
        `PairwiseKL(mean_per_dim [D], std [])`, of which `.mpd` is the mean of the total. float64 inputs give float64;
        float32, and bfloat16 and float16, give float32, as does everything under autocast.

    Differentiable, twice, in mu and log_var (once with `group`); where the deviation is 0 its gradient is 0. Time
    O(N·min(D², N·D)) with `std`; extra memory of the order of the inputs. With `group` the sums are float64, in time O(N·D²)
    and memory O(N·D + D²). The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or there is no pair.
        BackendError: the backend asked for cannot serve the call.

    >>> mu = torch.tensor([[0.0], [1.0], [3.0]])
    >>> pairwise_kl(mu, torch.zeros(3, 1)).mpd
    tensor(2.3333)
    """
    return _pairwise_kl(OP, mu, log_var, std, group, backend)


def pairwise_kl_diversity(mu: Tensor, log_var: Tensor, *, form: str = "paper", group: "ProcessGroup | None" = None,
                          backend: str | None = None) -> Tensor:
    """MAE's L_diverse, which falls as posteriors move apart in every dimension: Σ_d log 2 if all are the same, 0 if far.

    Args:
        mu: `[N, D]`, N ≥ 2.
        log_var: log σ², `[N, D]`; σ² and 1 / σ² must be finite in the dtype.
        form: "paper" is Eq. 8, Σ_d mean over ordered pairs of softplus(−KL_d). "code" is what the authors' code computes,
            Σ_d softplus(−mean of KL_d): never larger, and next to nothing once a few pairs are far.
        group: as in `pairwise_kl`. "paper" gathers mu and log_var, and every rank visits all pairs; "code" exchanges sums
            over rows.
        backend: "cpp", "cuda", "triton" or "reference" instead of the automatic choice; for "code" with `group` not.

    Returns:
        `[]`, in nats. float64 inputs give float64; float32, and bfloat16 and float16, give float32, as does everything
        under autocast. Pairs whose exp(−KL_d) is below the smallest normal number may count as 0.

    Differentiable, twice, in mu and log_var (once with `group`). Time O(N²·D) for "paper", O(N·D) for "code"; extra memory
    of the order of the inputs. The same inputs give the same bits, at any number of threads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, there is no pair, or `form` is unknown.
        BackendError: the backend asked for cannot serve the call.

    >>> pairwise_kl_diversity(torch.zeros(3, 2), torch.zeros(3, 2))
    tensor(1.3863)
    """
    if form not in ("paper", "code"):
        raise ValueError(f"pairwise_kl_diversity: form must be 'paper' (Eq. 8) or 'code' (the authors' code), given {form!r}.")
    if form == "code":
        return softplus(-_pairwise_kl(CODE_OP, mu, log_var, False, group, backend).mean_per_dim).sum()
    mu, log_var = _check("pairwise_kl_diversity", mu, log_var, group)
    if group is not None:
        mu, log_var = distributed.gather(mu, log_var, group)
    name = DIVERSITY_OP.choose(mu, backend)
    if name == "reference":
        return reference.pairwise_kl_diversity(mu, log_var)
    return _diversity(name, mu, log_var, _needs_grad(mu, log_var))[0]


def _pairwise_kl(op: Op, mu: Tensor, log_var: Tensor, std: bool, group: "ProcessGroup | None",
                 backend: str | None) -> PairwiseKL:
    mu, log_var = _check(op.name, mu, log_var, group)
    if group is not None:
        _check_group(op.name, backend)
        return PairwiseKL(*distributed.pairwise_kl(mu, log_var, std, group))
    name = op.choose(mu, backend)
    if name == "reference":
        return PairwiseKL(*reference.pairwise_kl(mu, log_var, std))
    mean, deviation, _, _ = _statistics(name, mu, log_var, std, _needs_grad(mu, log_var))
    return PairwiseKL(mean, deviation if std else None)


def _check(op: str, mu: Tensor, log_var: Tensor, group: "ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """The posteriors in the precision of the kernels, after the checks."""
    mu, log_var = checked_floats(op, "mu", mu=mu, log_var=log_var)
    mu = mu.float() if mu.dtype in HALF else mu
    if mu.dim() != 2 or log_var.shape != mu.shape:
        raise ValueError(f"{op}: mu and log_var must have one shape [N, D], given {list(mu.shape)} and {list(log_var.shape)}.")
    if mu.shape[0] < 2 and group is None:
        raise ValueError(f"{op}: needs N ≥ 2 posteriors to form a pair, given N = {mu.shape[0]}; use a larger batch.")
    return mu, log_var


def _check_group(op: str, backend: str | None) -> None:
    if backend is not None:
        raise ValueError(f"{op}: with `group` the sums are made in PyTorch; leave `backend` out, given {backend!r}.")


def _needs_grad(mu: Tensor, log_var: Tensor) -> bool:
    return torch.is_grad_enabled() and (mu.requires_grad or log_var.requires_grad)


def _fake_fwd(mu, log_var, need_std, need_grad):
    N, D = mu.shape
    return (mu.new_empty(D), mu.new_empty(() if need_std else 0), mu.new_empty(MOMENTS, D),
            mu.new_empty(2 if need_std and need_grad else 0, N, D))


def _fake_bwd(grad_mean, grad_std, mu, log_var, moments, unit):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (mu, log_var))


def _fake_diversity(mu, log_var, need_grad):
    return mu.new_empty(()), mu.new_empty(2 if need_grad else 0, *mu.shape)


MOMENTS = 5  # sums over rows for each dimension, which the gradient of the means needs
# Without `need_std` the deviation comes back empty. The last output of both forwards is the gradient of the scalar with
# respect to mu and log_var, [2, N, D], or without `need_grad` [0, N, D].
FWD = Primitive("pairwise_kl", "pairwise_kl_fwd", "(Tensor mu, Tensor log_var, bool need_std, bool need_grad) "
                "-> (Tensor, Tensor, Tensor, Tensor)", _fake_fwd)
BWD = Primitive("pairwise_kl", "pairwise_kl_bwd", "(Tensor grad_mean, Tensor? grad_std, Tensor mu, Tensor log_var, "
                "Tensor moments, Tensor unit) -> (Tensor, Tensor)", _fake_bwd)
DIVERSITY_FWD = Primitive("pairwise_kl", "pairwise_kl_diversity_fwd", "(Tensor mu, Tensor log_var, bool need_grad) "
                          "-> (Tensor, Tensor)", _fake_diversity)

# Half-precision arguments reach the kernels as float32.
_CPP, _GPU = Support(("cpu",), (torch.float32, torch.float64, *HALF)), Support(("cuda",), (torch.float32, *HALF))
OP = register(Op("pairwise_kl", "pairwise_kl_fwd", {
    "cpp": _CPP,
    "triton": Support(("cuda",), (torch.float32, *HALF), max_dim=4096),  # a posterior stays in registers
    "cuda": _GPU,
}))
CODE_OP = Op("pairwise_kl_diversity", "pairwise_kl_fwd", OP.support)  # its form="code", made of the means
DIVERSITY_OP = register(Op("pairwise_kl_diversity", "pairwise_kl_diversity_fwd", {"cpp": _CPP, "triton": _GPU, "cuda": _GPU}))


def _save(ctx, inputs, output) -> None:
    mu, log_var, ctx.need_std, _ = inputs
    ctx.save_for_backward(mu, log_var, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, grad_mean, grad_std, *_):
    mu, log_var, moments, unit = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grad_std = grad_std if ctx.need_std else None
    if grad_mean is None and grad_std is None:
        return (None,) * 4
    if torch.is_grad_enabled() or (grad_std is not None and unit.shape[0] == 0):  # double backward, or of torch.func
        formula = partial(reference.pairwise_kl, std=ctx.need_std)
        return (*reference_gradients(formula, (mu, log_var), needs, (grad_mean, grad_std)), None, None)
    grads = (grad_std * unit).unbind() if grad_mean is None else bwd(grad_mean, grad_std, mu, log_var, moments, unit)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


def _save_diversity(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.set_materialize_grads(False)


def _diversity_gradients(ctx, _, grad, *__):
    mu, log_var, unit = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 3
    if torch.is_grad_enabled() or unit.shape[0] == 0:  # double backward, or of torch.func
        return (*reference_gradients(reference.pairwise_kl_diversity, (mu, log_var), needs, (grad,)), None)
    return (*(g if need else None for g, need in zip((grad * unit).unbind(), needs, strict=True)), None)


_statistics = Differentiable(FWD, BWD, _save, _gradients)
_diversity = Differentiable(DIVERSITY_FWD, None, _save_diversity, _diversity_gradients)
