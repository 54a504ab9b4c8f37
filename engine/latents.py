"""Representations as parameters: one row a training sample, its optimizers, and MAP inference for new samples.

A step moves the rows of its mini-batch only (Schuster & Krogh 2021, §2.1 and Table 4):

    v_i ← μ v_i − η ∂L/∂z_i,    z_i ← z_i + v_i        for i in the batch

`LatentTable` gathers with a sparse gradient, so that a step costs O(batch · D) whatever the table's size. Other
optimizers that accept sparse gradients (`torch.optim.SparseAdam`) work on it too.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributions.transforms import SigmoidTransform, TanhTransform, Transform, identity_transform
from torch.nn import functional as F

TRANSFORMS: dict[str, Transform] = {
    "identity": identity_transform, "sigmoid": SigmoidTransform(), "tanh": TanhTransform()}


class LatentTable(nn.Module):
    """The representations z = g(h) `[N, D]` of N training samples; h is what is learned.

    Args:
        start: the initial h `[N, D]`.
        transform: g: "identity", or "sigmoid" or "tanh" for representations constrained to an interval (§2.1).
    """

    def __init__(self, start: Tensor, transform: str = "identity") -> None:
        super().__init__()
        if start.dim() != 2:
            raise ValueError(f"A latent table starts from a tensor [N, D], given {list(start.shape)}.")
        if transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, given {transform!r}.")
        self.transform = TRANSFORMS[transform]
        self.h = nn.Parameter(start)

    def forward(self, index: Tensor) -> Tensor:
        """z of the rows `index` `[B]` -> `[B, D]`; the gradient of h is sparse."""
        return self.transform(F.embedding(index, self.h, sparse=True))

    @property
    def z(self) -> Tensor:
        """All representations `[N, D]`, without gradient."""
        return self.transform(self.h.detach())

    @torch.no_grad()
    def normalize_(self) -> None:
        """Shifts and scales h to mean zero and variance one in each dimension (§2.3)."""
        self.h.sub_(self.h.mean(0)).div_(self.h.std(0, correction=0).clamp_min(torch.finfo(self.h.dtype).tiny))


class _RowOptimizer(torch.optim.Optimizer):
    """Steps the rows that have a gradient; the gradients of a row that occurs more than once are summed."""

    def __init__(self, params: Iterable[Tensor], **defaults: object) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure.")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not param.grad.is_sparse:
                    raise TypeError(f"{type(self).__name__} steps the rows of a sparse gradient, given a dense one; "
                                    "gather rows with LatentTable or with sparse=True.")
                grad = param.grad.coalesce()
                index, grad = grad.indices()[0], grad.values()
                if group["weight_decay"]:
                    grad = grad.add(param[index], alpha=group["weight_decay"])
                self._move(param, index, grad, self.state[param], group)


class RowSGD(_RowOptimizer):
    """SGD with momentum on the rows of the batch: the velocity of the other rows rests until they are seen again."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, momentum: float = 0.9,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["velocity"] = torch.zeros_like(param)
        velocity = state["velocity"][index].mul_(group["momentum"]).sub_(grad, alpha=group["lr"])
        state["velocity"][index] = velocity
        param.index_add_(0, index, velocity)


class RowAdam(_RowOptimizer):
    """Adam on the rows of the batch, each with a step count of its own (lazy: a row that rests keeps its moments)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _move(self, param: Tensor, index: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] = param.new_zeros(len(param), 1)
        (beta1, beta2), rows = group["betas"], {name: tensor[index] for name, tensor in state.items()}
        rows["step"] += 1
        rows["exp_avg"].lerp_(grad, 1 - beta1)
        rows["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        for name, tensor in rows.items():
            state[name][index] = tensor
        mean = rows["exp_avg"] / (1 - beta1 ** rows["step"])
        scale = (rows["exp_avg_sq"] / (1 - beta2 ** rows["step"])).sqrt_().add_(group["eps"])
        param.index_add_(0, index, mean / scale, alpha=-group["lr"])


def map_inference(log_joint: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 100,
                  lr: float = 0.05) -> Tensor:
    """Maximises `log_joint` over each row of `start` by Adam, everything else held fixed (§2.2); also under torch.no_grad.

    Args:
        log_joint: `[N, D]` -> `[N]`, each row's value depending on that row alone.
        start: `[N, D]`.
        steps, lr: of Adam; lr is about the distance that a row moves in its first steps.

    Returns:
        `[N, D]`: for each row the best point visited, so never a worse one than `start`.
    """
    h = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([h], lr=lr)
    best, best_value = h.detach().clone(), h.new_full((len(h),), -torch.inf)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            value = log_joint(h)
        better = value.detach() > best_value
        best_value = torch.where(better, value.detach(), best_value)
        best = torch.where(better[:, None], h.detach(), best)
        if step < steps:
            (h.grad,) = torch.autograd.grad(value, h, -torch.ones_like(value))
            optimizer.step()
    return best
