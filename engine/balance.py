"""Is an autoencoder over- or under-regularised? ("On the Regularization Balance in Autoencoder-Based Generative Models".)

    balanced            training data are reconstructed through as few dimensions that carry information as that takes
    over-regularised    many dimensions are unused or noise, or there are too few: the data are poorly reconstructed
    under-regularised   the data are well reconstructed, but through more dimensions than that takes: the aggregate
                        posterior lies near a surface in representation space, far from the prior (§1, §2, §6)

The paper gives no thresholds. Here reconstruction is poor where it leaves more than half of the variance of x, and the
aggregate posterior is far from the prior where the MMD² between them, mean over WAE's kernels, exceeds 0.05. (MLPs with 50
dimensions on MNIST: variational autoencoders 0.001 to 0.01, with a hundredth of the KL 0.1, plain autoencoders 0.3.)
"""

import torch
from torch import Generator, Tensor, nn

from .bounds import Posterior, kl_to_normal
from .diagnostics import active_dimensions, check_gaussian, evaluating, mmd2_to_prior
from .kernels import pairwise_kl
from .system import System

EXPLAINED = 0.5
FAR_FROM_PRIOR = 0.05
_GRADIENT_ROWS = 100  # at a time: of a deep decoder they take the memory of a batch


@torch.no_grad()
def balance(system: System, x: Tensor, generator: Generator | None = None, *,
            prior: nn.Module | None = None) -> dict[str, object]:
    """The state of the balance, from one pass over some hundred training rows `x` `[N, *shape]`: 20 ms for 500 digits.

    `prior` is the one that the aggregate posterior is compared with, that of the system if left out.

    Returns:
        "active" of "dimensions", those whose posterior mean varies over the rows (`active_dimensions`); "kl" `[D]` as a
        list, KL to N(0, 1) of each dimension, mean over the rows, in nats; "explained", the share of the variance of x that
        the decoded means reconstruct; "mmd2" of the aggregate posterior to the prior (`mmd2_to_prior`); "gradient", the mean
        norm of dL/dz for L = −log p(x, z), z a sample of each posterior; "mpd" and "mpd_std", mean and standard deviation of
        the KL divergences between pairs of posteriors (`pairwise_kl`); with a Gaussian likelihood "gamma", its variance,
        mean over features; and the "verdict", a sentence. A system whose decoder is `autoregressive` has no "explained" and
        no verdict: what z leaves open it takes from the pixels before.

    Raises:
        ValueError: fewer than two rows, or the posterior has a flow.
    """
    if len(x) < 2:
        raise ValueError(f"balance: needs two or more rows to compare, given {len(x)}.")
    check_gaussian("balance", system)
    with evaluating(system):
        posterior = system.encode(x)
        gradient = _gradient(system, posterior, x, generator)
    diversity = pairwise_kl(*(t.double() for t in posterior))
    state = {
        "active": int(active_dimensions(posterior.mean).sum()),
        "dimensions": posterior.mean.shape[1],
        "kl": kl_to_normal(posterior).mean(0).tolist(),
        "mmd2": mmd2_to_prior(posterior, prior or system.prior, generator),
        "gradient": torch.linalg.vector_norm(gradient, dim=1).mean().item(),
        "mpd": diversity.mpd.item(),
        "mpd_std": diversity.std.item(),
    }
    variance = getattr(system.likelihood, "variance", None)
    if variance is not None:
        state["gamma"] = float(torch.as_tensor(variance).mean())
    if getattr(system, "autoregressive", False):
        return state
    with evaluating(system):
        residual = x - system.decode(posterior.mean)
    state["explained"] = (1 - residual.square().sum() / (x - x.mean(0)).square().sum()).item()
    return state | {"verdict": verdict(state["active"], state["dimensions"], state["explained"], state["mmd2"])}


def verdict(active: int, dimensions: int, explained: float, mmd2: float) -> str:
    """The sentence for numbers of `balance`."""
    use = f"{active} of {dimensions} dimensions are active"
    if explained < EXPLAINED:
        cure = "more dimensions" if active == dimensions else "a learned variance, skip connections or a weaker KL term"
        return (f"over-regularised: {use} and reconstruct only {max(explained, 0):.0%} of the variance of x; "
                f"{cure} may help")
    good = f"{use} and reconstruct {explained:.0%} of the variance of x"
    if mmd2 > FAR_FROM_PRIOR:
        return (f"under-regularised: {good}, but the aggregate posterior is far from the prior (MMD² {mmd2:.2g}); "
                "a learned variance or a stronger KL term may help")
    return f"balanced: {good}, and the aggregate posterior is near the prior (MMD² {mmd2:.2g})"


def _gradient(system: System, posterior: Posterior, x: Tensor, generator: Generator | None) -> Tensor:
    """dL/dz `[N, D]` at one sample z of each posterior, L = −log p(x, z).

    With z = mean + σ ε, log q(z | x) does not depend on the mean: the gradient of a log-weight with respect to the mean is
    that of log p(x, z) with respect to z.
    """
    gradients = []
    for rows, mean, log_var in zip(*(t.split(_GRADIENT_ROWS) for t in (x, *posterior)), strict=True):
        with torch.enable_grad():
            mean = mean.detach().requires_grad_()
            log_w = system.log_weights(Posterior(mean, log_var), rows, 1, generator)
            gradients.append(torch.autograd.grad(-log_w.sum(), mean)[0])
    return torch.cat(gradients)
