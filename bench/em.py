"""One iteration of EM for 50 components over 100,000 points of 32 dimensions: `python -m latent_engine.bench.em [KIND ...]`.

The kinds are diagonal (by default), full, tied and spherical covariances. The peers are scikit-learn, its E-step and M-step
without what else its `fit` does, and the fastest formula in PyTorch, the squares expanded into matrix products, as it is and
compiled. All start from the same mixture, in float32; errors are those of the new means and covariances against the formula in
float64.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from latent_engine import GaussianMixture
from latent_engine.mixtures import Covariance, _Batches, _expectation, _maximisation, _survey

from .suite import OURS
from .timing import Work, measure_ceilings, peak_memory, time_calls

N, K, D, REG = 100_000, 50, 32, 1e-6
Parameters = tuple[Tensor, Tensor]  # the new means and covariances


def problem(kind: Covariance) -> tuple[Tensor, GaussianMixture]:
    """Points near the means of a random mixture, and one to start from, a little off."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=generator)
    std = (0.25 * torch.randn(K, D, generator=generator)).exp()
    own = torch.randint(K, (N,), generator=generator)
    x = means[own] + std[own] * torch.randn(N, D, generator=generator)
    variances = std.square()
    covariances = {"diagonal": variances, "spherical": variances.mean(1), "full": variances.diag_embed(),
                   "tied": variances.mean(0).diag()}[kind]
    start = means + 0.1 * torch.randn(K, D, generator=generator)
    return x, GaussianMixture(torch.ones(K), start, covariances, kind)


def ours(x: Tensor, start: GaussianMixture) -> Callable[[], Parameters]:
    """The iteration of `fit_mixture`."""
    batches = _Batches(x, None, None)
    points = _survey(batches, 0, start.covariance == "tied", None)

    def iterate() -> Parameters:
        mixture = _maximisation(start, points, _expectation(start, batches)[1:], REG).to(x)
        return mixture.means, mixture.covariances

    return iterate


def gemm(x: Tensor, start: GaussianMixture, compiled: bool = False) -> Callable[[], Parameters]:
    """Log-densities and moments as products with x and its squares, of full and tied ones with all products of dimensions."""
    kind, means, log_weights = start.covariance, start.means.to(x), start.log_weights.to(x)
    matrices = kind in ("full", "tied")
    upper = torch.triu_indices(D, D, device=x.device)
    covariances = start.covariances.to(x)

    def formula(x: Tensor) -> Parameters:
        if matrices:
            factor = torch.linalg.cholesky(covariances)
            precisions = torch.cholesky_inverse(factor).expand(K, D, D)
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            scaled = (precisions @ means[..., None]).squeeze(-1)
            squares = x[:, upper[0]] * x[:, upper[1]]
            twice = torch.where(upper[0] == upper[1], 1.0, 2.0).to(x)
            quadratic = precisions[:, upper[0], upper[1]] * twice
        else:
            variances = covariances if kind == "diagonal" else covariances[:, None].expand(K, D)
            quadratic, log_det = 1 / variances, variances.log().sum(1)
            scaled, squares = means * quadratic, x.square()
        constant = log_weights - 0.5 * ((means * scaled).sum(1) + log_det + D * math.log(2 * math.pi))
        logits = torch.addmm(torch.addmm(constant, x, scaled.T), squares, quadratic.T, alpha=-0.5)
        r = (logits - logits.logsumexp(1, keepdim=True)).exp()
        counts = r.sum(0)
        new, second = r.T @ x / counts[:, None], r.T @ squares
        if not matrices:
            variances = second / counts[:, None] - new.square()
            return new, REG + (variances if kind == "diagonal" else variances.mean(1))
        if kind == "tied":
            second, total = second.sum(0) / N, (new.T * counts) @ new / N
        else:
            second, total = second / counts[:, None], new[:, :, None] * new[:, None]
        full = second.new_zeros(*second.shape[:-1], D, D)
        full[..., upper[0], upper[1]] = second
        full = full + full.triu(1).mT
        return new, full - total + REG * torch.eye(D).to(x)

    call = torch.compile(formula, dynamic=False) if compiled else formula
    return lambda: call(x)


def scikit_learn(x: Tensor, start: GaussianMixture) -> Callable[[], Parameters]:
    """`GaussianMixture._e_step` and `_m_step` of scikit-learn, in float32."""
    from sklearn.mixture import GaussianMixture as Peer

    kind = start.covariance
    points, covariances = x.numpy(), start.covariances
    precisions = torch.linalg.inv(covariances) if kind in ("full", "tied") else 1 / covariances
    peer = Peer(K, covariance_type={"diagonal": "diag"}.get(kind, kind), max_iter=1, reg_covar=REG,
                weights_init=start.log_weights.exp().numpy(), means_init=start.means.numpy(),
                precisions_init=precisions.numpy(), init_params="random_from_data", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration does not converge
        peer.fit(points[:10 * K])  # makes the attributes, which the call sets to the start
    cholesky = start.precision_cholesky if kind in ("full", "tied") else precisions.sqrt()

    def iterate() -> Parameters:
        peer.weights_, peer.means_ = start.log_weights.exp().numpy(), start.means.numpy()
        peer.precisions_cholesky_ = cholesky.numpy()
        peer._m_step(points, peer._e_step(points)[1])
        return torch.from_numpy(peer.means_), torch.from_numpy(peer.covariances_)

    return iterate


def work(kind: Covariance) -> Work:
    """As in `bench.gmm`: two FMAs a pair and dimension for the log-densities, two for the moments; triangles of full ones."""
    each = D * (D + 1) + 2 * D if kind == "full" else 4 * D
    return Work(4 * N * D, N * K * each + (N * D * D if kind == "tied" else 0), N * K)


@torch.no_grad()
def run(kind: Covariance) -> dict[str, float]:
    """Median seconds of an iteration by name; prints them."""
    x, start = problem(kind)
    calls = {OURS: ours(x, start), "scikit-learn": scikit_learn(x, start), "gemm": gemm(x, start),
             "compiled gemm": gemm(x, start, compiled=True)}
    exact = gemm(x.double(), start)()
    errors = {}
    for name, call in calls.items():
        errors[name] = max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(call(), exact, strict=True))
    memory = {name: peak_memory(call, "cpu") for name, call in calls.items()}
    times = {name: timing.median for name, timing in time_calls(calls, "cpu").items()}
    bound, limit = measure_ceilings("cpu").bound(work(kind))
    print(f"EM, {kind} covariances, {N} × {K} × {D}, {torch.get_num_threads()} threads; bound by {limit}: "
          f"{1e3 * bound:.1f} ms, {100 * bound / times[OURS]:.0f} % of the time of ours")
    for name, seconds in times.items():
        extra = "" if memory[name] is None else f"   extra memory {memory[name] / 1e6:4.0f} MB"
        print(f"  {name:14} {1e3 * seconds:7.1f} ms  {seconds / times[OURS]:6.2f}×{extra}   relative error {errors[name]:.0e}",
              flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench.em", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of {', '.join(get_args(Covariance))}")
    options = parser.parse_args()
    unknown = [kind for kind in options.kinds if kind not in get_args(Covariance)]
    if unknown:
        parser.error(f"unknown kind {unknown[0]!r}; the kinds are {', '.join(get_args(Covariance))}")
    for kind in options.kinds or ["diagonal"]:
        run(kind)


if __name__ == "__main__":
    main()
