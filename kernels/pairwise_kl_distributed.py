"""Pair statistics of a batch that lies on the ranks of a process group, equal to those of the concatenated batch.

With m and λ the means and log-variances centred over all rows, v = σ², w = 1 / σ² and the features a = (v + m², m),
b = (w, −2 m w), r = −Σ_d λ, c = Σ_d (λ + m² w) − D, twice the divergence is X_ij = a_i · b_j + r_i + c_j. Centred features
split X into orthogonal parts: its mean κ over the N² pairs, ρ_i, γ_j and ã_i · b̃_j. X is 0 on the diagonal and
T = κ N / (N − 1) in the mean of the pairs, so

    Σ_{i≠j} (X_ij − T)² = N Σ ρ² + N Σ γ² + ⟨Σ ã ãᵀ, Σ b̃ b̃ᵀ⟩ − N² κ² / (N − 1)

Every sum on the right is one over rows, made by a rank of its own and added up: 2 D + 1 numbers for the centre, 5 D + 2 for
the means of the features, and for the deviation two Gram matrices [2 D, 2 D]. The gradient of a rank's rows needs no more.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def pairwise_kl(mu: Tensor, log_var: Tensor, std: bool, group: "ProcessGroup") -> tuple[Tensor, Tensor | None]:
    """Mean of KL_d [D] and standard deviation of the total [] over the ordered pairs of all ranks' rows."""
    mean, deviation = _PairwiseKL.apply(mu, log_var, std, group)
    return mean, deviation if std else None


def gather(mu: Tensor, log_var: Tensor, group: "ProcessGroup") -> tuple[Tensor, Tensor]:
    """The rows of all ranks, in the order of the ranks; backward keeps the gradients of the rank's own."""
    return _Gather.apply(mu, group), _Gather.apply(log_var, group)


def _sum(group: "ProcessGroup", *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums over ranks, in one message."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    return tuple(part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: "ProcessGroup") -> Tensor:
        counts = rows.new_zeros(group.size(), dtype=torch.int64)
        counts[group.rank()] = rows.shape[0]
        dist.all_reduce(counts, group=group)
        sizes = counts.tolist()
        if sum(sizes) < 2:
            raise ValueError(f"pairwise_kl_diversity: needs N ≥ 2 posteriors on all ranks together, given {sum(sizes)}.")
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        ctx.own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own], None


class _PairwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu: Tensor, log_var: Tensor, std: bool, group: "ProcessGroup") -> tuple[Tensor, Tensor]:
        x, y = mu.double(), log_var.double()
        rows = x.new_tensor([len(x)])
        rows, centre, level = _sum(group, rows, x.sum(0), y.sum(0))
        N, D = rows.item(), x.shape[1]
        if N < 2:
            raise ValueError(f"pairwise_kl: needs N ≥ 2 posteriors on all ranks together, given {N:.0f}.")
        m, lam, v, w = x - centre / N, y - level / N, y.exp(), torch.exp(-y)
        a, b = torch.cat((v + m * m, m), 1), torch.cat((w, -2 * m * w), 1)
        r, c = -lam.sum(1), (lam + m * m * w).sum(1) - D
        a_mean, b_mean, r_mean, c_mean, mmw = _sum(group, a.sum(0), b.sum(0), r.sum(), c.sum(), (m * m * w).sum(0))
        a_mean, b_mean, r_mean, c_mean, mmw = a_mean / N, b_mean / N, r_mean / N, c_mean / N, mmw / N
        kappa = a_mean @ b_mean + r_mean + c_mean
        products = a_mean * b_mean
        mean = 0.5 * (products[:D] + products[D:] + mmw - 1) * N / (N - 1)
        ctx.save_for_backward(m, v, w, a_mean, b_mean)
        ctx.N, ctx.std = N, std
        ctx.set_materialize_grads(False)
        if not std:
            return mean.to(mu.dtype), mean.new_zeros(0)
        a, b = a - a_mean, b - b_mean
        rho, gamma = a @ b_mean + (r - r_mean), b @ a_mean + (c - c_mean)
        gram_a, gram_b, row_a, column_b, squares = _sum(group, a.T @ a, b.T @ b, rho @ a, gamma @ b, rho @ rho + gamma @ gamma)
        total = ((gram_a * gram_b).sum() + N * (squares - kappa * kappa * N / (N - 1))).clamp(min=0)
        pairs = N * (N - 1)
        of_r, of_c = N * (rho - kappa / (N - 1)), N * (gamma - kappa / (N - 1))
        by_a = of_r[:, None] * b_mean + column_b + a @ gram_b
        by_b = of_c[:, None] * a_mean + row_a + b @ gram_a
        unit = torch.where(total > 0, 0.5 * (total * (pairs - 1)).rsqrt(), 0.0)
        ctx.unit = tuple(unit * t for t in _to_inputs(m, v, w, by_a, by_b, of_r[:, None], of_c[:, None]))
        return mean.to(mu.dtype), (0.5 * (total / (pairs - 1)).sqrt()).to(mu.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean: Tensor | None, grad_std: Tensor | None) -> tuple[Tensor | None, ...]:
        m, v, w, a_mean, b_mean = ctx.saved_tensors
        grads, D = [torch.zeros_like(m), torch.zeros_like(m)], m.shape[1]
        dtype = next(g for g in (grad_mean, grad_std) if g is not None).dtype
        if grad_mean is not None:
            # The mean is ½ (ā · b̄ + mean of m² w − 1) N / (N − 1) in each dimension.
            g = 0.5 * grad_mean.double() / (ctx.N - 1)
            means = _to_inputs(m, v, w, torch.cat((g * b_mean[:D], g * b_mean[D:]), 0).expand(len(m), -1),
                               torch.cat((g * a_mean[:D], g * a_mean[D:]), 0).expand(len(m), -1), 0.0, g)
            # c holds λ beside m² w, and r takes it away again: both weigh g.
            grads = [x + y for x, y in zip(grads, (means[0], means[1] - g), strict=True)]
        if grad_std is not None and ctx.std:
            grads = [x + grad_std.double() * y for x, y in zip(grads, ctx.unit, strict=True)]
        return (*(g.to(dtype) if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True)), None, None)


def _to_inputs(m: Tensor, v: Tensor, w: Tensor, by_a: Tensor, by_b: Tensor, by_r: Tensor | float, by_c: Tensor
               ) -> tuple[Tensor, Tensor]:
    """Gradients of mu and log_var from those of the features a [N, 2D], b [N, 2D], r and c."""
    square, linear = by_a.chunk(2, 1)
    inverse, mixed = by_b.chunk(2, 1)
    of_mu = 2 * m * square + linear + 2 * w * (m * by_c - mixed)
    of_log_var = v * square - w * (inverse - 2 * m * mixed) - by_r + by_c * (1 - m * m * w)
    return of_mu, of_log_var
