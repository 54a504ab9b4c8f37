"""Reference of `reparametrize`: the formulas as written."""

from torch import Tensor


def reparametrize(mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """mean[N,D], log_var[N,D], noise[N,D] or [S,N,D] -> z of noise's shape, KL[N,D]."""
    z = mean + (0.5 * log_var).exp() * noise
    kl = 0.5 * (mean.square() + log_var.expm1() - log_var)
    return z, kl
