"""pairwise_kl and pairwise_kl_diversity: every implementation against an 80-bit oracle, the paper, and awkward inputs."""

import math

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn.functional import softplus

from latent_engine.kernels import BackendError, native, pairwise_kl, pairwise_kl_diversity

from oracles import assert_within_budget
from oracles import pairwise_kl as oracle

# N, D: one pair, ones, primes, whole and broken groups of rows, both ways to the deviation (N against 4 D + 8), splits
SIZES = [(2, 1), (3, 2), (5, 7), (16, 4), (17, 33), (64, 13), (70, 3), (130, 20), (300, 2), (10, 3001)]
# NumPy, on which Triton's interpreter stands, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
needs_cpp = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


def posteriors(N: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = torch.randn(N, D, generator=g), 0.7 * torch.randn(N, D, generator=g) - 0.5
    return [t.to(device, dtype) for t in tensors]


def run(inputs: list[Tensor], grad_mean: Tensor, backend: str | None) -> dict[str, Tensor]:
    """Values and gradients under the names of the oracle."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    stats = pairwise_kl(*leaves, backend=backend)
    outputs = {"mean_per_dim": stats.mean_per_dim, "std": stats.std,
               "diversity": pairwise_kl_diversity(*leaves, backend=backend)}
    results = {name: t.detach() for name, t in outputs.items()}
    for name, t in outputs.items():
        incoming = grad_mean if name == "mean_per_dim" else torch.ones_like(t)
        for part, g in zip(("mu", "log_var"), torch.autograd.grad(t, leaves, incoming, retain_graph=True), strict=True):
            results[f"{name} by {part}"] = g
    return results


def check(inputs: list[Tensor], backend: str) -> None:
    """Values and gradients of `backend` are within the error budget."""
    grad_mean = torch.randn(inputs[0].shape[1], generator=torch.Generator().manual_seed(1)).to(inputs[0])
    exact, scales = oracle.exact(*inputs, grad_mean)
    actual, direct = run(inputs, grad_mean, backend), run(inputs, grad_mean, "reference")
    for name in exact:
        assert_within_budget(name, actual[name], direct[name], exact[name], scales[name])


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-D{s[1]}")
def test_values_and_gradients(implementation, size):
    backend, device = implementation
    if backend == "triton" and device == "cpu" and size[0] > 20:
        pytest.skip("slow in the interpreter; test_gpu_pairwise_kl has its blocks and splits")
    for dtype in dtypes_of(backend):
        check(posteriors(*size, dtype, device), backend)


def test_reference_is_the_formula():
    for dtype in (torch.float32, torch.float64):
        check(posteriors(17, 5, dtype), "reference")


def test_agrees_with_torch_distributions():
    mu, log_var = posteriors(6, 3, torch.float64)
    q = Normal(mu[:, None], (0.5 * log_var[:, None]).exp())
    kl = kl_divergence(q, Normal(mu[None], (0.5 * log_var[None]).exp()))[~torch.eye(6, dtype=torch.bool)]
    stats = pairwise_kl(mu, log_var)
    torch.testing.assert_close(stats.mean_per_dim, kl.mean(0))
    torch.testing.assert_close(stats.mpd, kl.sum(1).mean())
    torch.testing.assert_close(stats.std, kl.sum(1).std())
    torch.testing.assert_close(pairwise_kl_diversity(mu, log_var), softplus(-kl).mean(0).sum())
    torch.testing.assert_close(pairwise_kl_diversity(mu, log_var, form="code"), softplus(-kl.mean(0)).sum())


def test_authors_estimate_of_the_deviation():
    """Their code fills the diagonal with the mean, takes the deviation of all N² and corrects it."""
    mu, log_var = posteriors(12, 4, torch.float64)
    N, q = 12, Independent(Normal(mu[:, None], (0.5 * log_var[:, None]).exp()), 1)
    kl = kl_divergence(q, Independent(Normal(mu[None], (0.5 * log_var[None]).exp()), 1))
    kl = torch.where(torch.eye(N, dtype=torch.bool), kl.sum() / (N * (N - 1)), kl)
    theirs = kl.std() * math.sqrt((N * N - 1) / (N * N - N - 1))
    torch.testing.assert_close(pairwise_kl(mu, log_var).std, theirs)


def test_theorem_1_by_monte_carlo():
    """MPD over independent x and x' is E[KL(q(z|x)‖q̄) + KL(q̄‖q(z|x))], with q̄ the mixture of the batch.

    Independent draws from a batch of N are the same posterior with probability 1/N, where KL is 0: (N − 1)/N of the mean
    over the pairs i ≠ j.
    """
    N, S = 5, 100_000
    mu, log_var = posteriors(N, 2, torch.float64, seed=3)
    scale = (0.5 * log_var).exp()
    each = Independent(Normal(mu, scale), 1)
    mixture = MixtureSameFamily(torch.distributions.Categorical(logits=torch.zeros(N, dtype=torch.float64)), each)
    noise = torch.randn(S, N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = mu + scale * noise  # of every posterior as often as of the others: a stratified sample of the mixture
    to_mixture = each.log_prob(z) - mixture.log_prob(z)
    from_mixture = mixture.log_prob(z)[..., None] - each.log_prob(z[:, :, None])
    symmetric = to_mixture.mean(1) + from_mixture.mean((1, 2))
    expected = pairwise_kl(mu, log_var, std=False).mpd * (N - 1) / N
    assert abs(symmetric.mean() - expected) <= 4 * symmetric.std() / math.sqrt(S)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "mixed"])
def test_strided_inputs(implementation, layout):
    backend, device = implementation
    make = {"sliced": lambda t, i: torch.stack((t, t + 9), -1)[..., 0], "transposed": lambda t, i: t.mT.contiguous().mT,
            "mixed": lambda t, i: t if i else t[:1].expand_as(t)}[layout]
    for size in ((19, 6),) if backend == "triton" else ((19, 6), (45, 6)):
        check([make(t, i) for i, t in enumerate(posteriors(*size, device=device))], backend)


@pytest.mark.parametrize("case", ["offset", "wide", "far clusters", "tiny", "huge", "nearly equal"])
@pytest.mark.parametrize("N", [12, 60], ids=lambda n: f"N{n}")
def test_extremes_keep_their_digits(implementation, case, N):
    backend, device = implementation
    if backend == "triton" and N == 60:
        pytest.skip("Triton has one way to the deviation")
    mu, log_var = posteriors(N, 3, device=device)
    if case == "offset":
        mu += 1e3
    elif case == "wide":
        mu, log_var = 1e3 + mu, 10 * torch.sign(log_var + 0.5)
    elif case == "far clusters":
        mu[::2] += 1e3
    elif case in ("tiny", "huge"):
        log_var = log_var + (-60 if case == "tiny" else 60)
        mu = mu * torch.exp(0.5 * log_var)
    else:
        mu, log_var = 1 + 1e-3 * mu, 1e-3 * log_var
    check([mu, log_var], backend)


@needs_cpp
@pytest.mark.parametrize("scale", [1e-1, 1e-2])
def test_close_posteriors_of_many_dimensions(scale):
    """Their divergences are far below the ones that σ²/σ² adds up to over the dimensions, which must not round them."""
    mu, log_var = (scale * t for t in posteriors(64, 1024))
    exact = pairwise_kl(mu.double(), log_var.double(), backend="reference").std
    assert abs(pairwise_kl(mu, log_var, backend="cpp").std.double() - exact) <= 2e-7 * exact


@pytest.mark.parametrize("log_var", [-40.0, -50.0, -80.0])
@pytest.mark.parametrize("N", [5, 18], ids=lambda n: f"N{n}")
@needs_cpp
def test_deviations_whose_squares_overflow(N, log_var):
    """The pair matrix of float32 passes 1.8e19 long before the deviation leaves the range."""
    mu, _ = posteriors(N, 3)
    leaves = [t.requires_grad_() for t in (mu, torch.full_like(mu, log_var))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found, expected = pairwise_kl(*leaves, backend="cpp").std, pairwise_kl(*wide, backend="reference").std
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for a, e in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, wide), strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_equal_posteriors(implementation):
    """No divergence: the deviation and all gradients are 0 within rounding, and L_diverse is D log 2."""
    backend, device = implementation
    for N in (9,) if backend == "triton" else (9, 50):
        inputs = [t[:1].repeat(N, 1) for t in posteriors(N, 4, device=device)]
        found = run(inputs, torch.ones(4, device=device), backend)
        assert found["diversity"].item() == pytest.approx(4 * math.log(2), rel=1e-6)
        for name, t in found.items():
            assert t.isfinite().all() and (name == "diversity" or t.abs().max() < 1e-5), name


def test_far_posteriors_have_no_diversity_loss(implementation):
    backend, device = implementation
    mu = 1e6 * torch.arange(20.0, device=device)[:, None].expand(20, 3)
    found = run([mu, torch.zeros(20, 3, device=device)], torch.ones(3, device=device), backend)
    assert found["diversity"] == 0 and (found["diversity by mu"] == 0).all() and (found["diversity by log_var"] == 0).all()
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("N", [5, 9, 12, 20])
def test_a_level_whose_square_overflows(implementation, N):
    backend, device = implementation
    _, log_var = posteriors(N, 20, device=device)
    weights = torch.ones(20, device=device)
    level, origin = (run([torch.full_like(log_var, mu), log_var], weights, backend) for mu in (3e19, 0.0))
    for name, t in level.items():
        torch.testing.assert_close(t, origin[name], msg=name)


def test_one_posterior_beyond_the_range_of_squares(implementation):
    backend, device = implementation
    for N in (5, 9, 12, 20):
        mu = torch.zeros(N, 3, device=device)
        mu[1] = 1e20
        value = pairwise_kl_diversity(mu, torch.zeros_like(mu), backend=backend)
        assert value.item() == pytest.approx(3 * math.log(2) * (N - 1) * (N - 2) / (N * (N - 1)), rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_reaches_only_its_dimension(implementation, value):
    backend, device = implementation
    for N in (12,) if backend == "triton" else (12, 60):
        inputs = posteriors(N, 4, device=device)
        inputs[0][7, 1] = value
        found = run(inputs, torch.ones(4, device=device), backend)
        others = torch.tensor([0, 2, 3], device=device)
        parts = [f"{name} by {part}" for name in ("mean_per_dim", "diversity") for part in ("mu", "log_var")]
        for name in ("mean_per_dim", *parts):
            assert found[name][..., others].isfinite().all(), name
        assert not found["mean_per_dim"][1].isfinite() and not found["std"].isfinite()
        if value != value:
            assert found["diversity"].isnan() and found["std by mu"].isnan().all()
            for name in ("mean_per_dim by mu", "diversity by mu", "diversity by log_var"):
                assert found[name][:, 1].isnan().all(), name


def test_only_what_is_asked_for(implementation):
    backend, device = implementation
    inputs = posteriors(30, 5, device=device)
    stats = pairwise_kl(*inputs, std=False, backend=backend)
    assert stats.std is None
    torch.testing.assert_close(stats.mean_per_dim, pairwise_kl(*inputs, backend=backend).mean_per_dim)
    full = run(inputs, torch.ones(5, device=device), backend)
    for i, name in enumerate(("mu", "log_var")):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        for output, loss in (("std", pairwise_kl(*leaves, backend=backend).std),
                             ("mean_per_dim", pairwise_kl(*leaves, std=False, backend=backend).mpd),
                             ("diversity", pairwise_kl_diversity(*leaves, backend=backend))):
            torch.testing.assert_close(torch.autograd.grad(loss, leaves[i])[0], full[f"{output} by {name}"])


def test_no_dimensions(implementation):
    backend, device = implementation
    found = run(posteriors(5, 0, device=device), torch.ones(0, device=device), backend)
    assert found["mean_per_dim"].shape == (0,) and found["std"] == 0 and found["diversity"] == 0


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter is too slow for sizes that need several blocks")
    sizes = (1100, 2), (90, 60), (300, 16), (700, 40), (300, 90), (10, 3001)
    same_at_any_threads(lambda: [t for size in sizes for t in run(
        posteriors(*size, device=device), torch.ones(size[1], device=device), backend).values()])


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    sizes = (*SIZES, (1100, 2), (300, 16), (300, 90), (300, 520), (40, 2100))
    same_at_avx2_and_avx512(lambda: [
        t for size in sizes for dtype in (torch.float32, torch.float64)
        for t in run(posteriors(*size, dtype), torch.ones(size[1], dtype=dtype), "cpp").values()])


def test_blocks_of_rows_and_splits_of_columns():
    """More rows than a block, few dimensions and not so few, whole cache lines of them or not: agrees with float64."""
    for N, D in ((1500, 1), (300, 16), (300, 90), (1001, 70), (300, 520), (40, 2100)):
        inputs = posteriors(N, D)
        found = run(inputs, torch.ones(D), None)
        for name, e in run([t.double() for t in inputs], torch.ones(D, dtype=torch.float64), "reference").items():
            assert (found[name] - e).norm() <= 2e-6 * e.norm(), (N, D, name)


def test_half_precision_and_autocast_compute_in_float32(implementation):
    backend, device = implementation
    inputs = posteriors(21, 5, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        half = [t.to(dtype).requires_grad_() for t in inputs]
        value = pairwise_kl_diversity(*half, backend=backend) + pairwise_kl(*half, backend=backend).std
        assert value.dtype == torch.float32
        grads = torch.autograd.grad(value, half)
        assert all(g.dtype == dtype for g in grads)
        exact = [t.detach().float() for t in half]
        expected = pairwise_kl_diversity(*exact, backend="reference") + pairwise_kl(*exact, backend="reference").std
        torch.testing.assert_close(value, expected)
    with torch.autocast(device, torch.bfloat16):
        assert pairwise_kl(*[t.bfloat16() for t in inputs], backend=backend).std.dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_once_and_twice(backend):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")

    def f(mu, log_var):
        stats = pairwise_kl(mu, log_var, backend=backend)
        return (stats.mean_per_dim, stats.std, pairwise_kl_diversity(mu, log_var, backend=backend),
                pairwise_kl_diversity(mu, log_var, form="code", backend=backend))

    for size in ((4, 2), (13, 1)):
        leaves = [t.requires_grad_() for t in posteriors(*size, torch.float64)]
        assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, [t.requires_grad_() for t in posteriors(4, 2, torch.float64)])


@needs_cpp
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
def test_opcheck(grad):
    ops = torch.ops.latent_engine
    mu, log_var = (t.requires_grad_(grad) for t in posteriors(6, 5))
    strided = mu.detach().T.contiguous().T.requires_grad_(grad)
    torch.library.opcheck(ops.pairwise_kl_fwd.default, (strided, log_var, grad, grad))
    torch.library.opcheck(ops.pairwise_kl_diversity_fwd.default, (mu, strided, grad))
    if grad:
        return
    _, _, moments, unit = ops.pairwise_kl_fwd(mu, log_var, True, True)
    for grad_std in (None, torch.ones(())):
        torch.library.opcheck(ops.pairwise_kl_bwd.default, (torch.ones(5), grad_std, mu, log_var, moments, unit))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def loss(mu, log_var):
        stats = pairwise_kl(mu.tanh(), log_var)
        return pairwise_kl_diversity(mu, log_var) + stats.mpd * stats.std + pairwise_kl_diversity(mu, log_var, form="code")

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (17, 18):
        leaves = [t.requires_grad_() for t in posteriors(N, 3)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, e)


@needs_cpp
def test_func_grad_and_no_vmap():
    mu, log_var = posteriors(7, 3)
    leaf = mu.clone().requires_grad_()
    pairwise_kl_diversity(leaf, log_var).backward()
    torch.testing.assert_close(torch.func.grad(lambda m: pairwise_kl_diversity(m, log_var))(mu), leaf.grad)
    with pytest.raises(NotImplementedError, match="vmap is not supported; loop over the batches"):
        torch.func.vmap(lambda m: pairwise_kl_diversity(m, log_var))(mu.expand(2, 7, 3))


def test_invariances():
    """KL is free of the order of rows and dimensions and of affine maps of the latent space."""
    mu, log_var = posteriors(40, 3, torch.float64)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    stats, dims = pairwise_kl(mu, log_var), [2, 0, 1]
    for other in ((mu[rows], log_var[rows]), (mu[:, dims], log_var[:, dims]), (3 * mu - 7, log_var + 2 * math.log(3))):
        torch.testing.assert_close(pairwise_kl(*other).mpd, stats.mpd)
        torch.testing.assert_close(pairwise_kl(*other).std, stats.std)
        torch.testing.assert_close(pairwise_kl_diversity(*other), pairwise_kl_diversity(mu, log_var))


def test_forms_of_the_diversity_loss():
    """softplus(−x) is convex: the paper's form, a mean of it, is never below the code's, which is that of a mean."""
    for seed in range(20):
        inputs = posteriors(9, 4, seed=seed)
        paper, code = (pairwise_kl_diversity(*inputs, form=form).item() for form in ("paper", "code"))
        assert 0 < code <= paper * (1 + 1e-6) <= 4 * math.log(2) * (1 + 1e-5)
    mu, log_var = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)), torch.full((100, 32), -2.0)
    assert pairwise_kl_diversity(mu, log_var) > 100 * pairwise_kl_diversity(mu, log_var, form="code")


GOOD = {"mu": torch.zeros(4, 3), "log_var": torch.zeros(4, 3)}


@pytest.mark.parametrize("op", [pairwise_kl, pairwise_kl_diversity], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"log_var": torch.zeros(3)}, ValueError, r"mu and log_var must have one shape \[N, D\], given \[4, 3\] and \[3\]"),
    ({"mu": torch.zeros(2, 4, 3), "log_var": torch.zeros(2, 4, 3)}, ValueError, r"must have one shape \[N, D\]"),
    ({"mu": torch.zeros(1, 3), "log_var": torch.zeros(1, 3)}, ValueError, "needs N ≥ 2 posteriors to form a pair, given N = 1"),
    ({"mu": torch.zeros(0, 3), "log_var": torch.zeros(0, 3)}, ValueError, "needs N ≥ 2 .* given N = 0; use a larger batch"),
    ({"mu": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "mu must be a floating-point tensor, given torch.int64"),
    ({"mu": [[0.0]]}, TypeError, "mu must be a tensor, given list"),
    ({"log_var": 0.0}, TypeError, "log_var must be a tensor, given float"),
    ({"log_var": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "log_var is torch.float64 but mu is torch.float32"),
    ({"log_var": torch.zeros(4, 3, device="meta")}, ValueError, "log_var is on meta but mu is on cpu"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
    ({"backend": "cuda"}, BackendError, "the backend 'cuda' was asked for, but it"),
])
def test_mistakes_get_one_clear_error(op, changes, error, message):
    with pytest.raises(error, match=message):
        op(**{**GOOD, **changes})


def test_unknown_form():
    with pytest.raises(ValueError, match=r"form must be 'paper' \(Eq. 8\) or 'code' \(the authors' code\), given 'eq8'"):
        pairwise_kl_diversity(**GOOD, form="eq8")


def test_both_forms_name_their_function():
    mu = torch.zeros(3, 2)
    for form in ("paper", "code"):
        with pytest.raises(ValueError, match=r"^pairwise_kl_diversity: mu and log_var must have one shape"):
            pairwise_kl_diversity(mu, mu[:2], form=form)
        with pytest.raises(BackendError, match=r"^pairwise_kl_diversity: the backend 'cuda'"):
            pairwise_kl_diversity(mu, mu, form=form, backend="cuda")


def test_numbers_by_hand():
    """Unit variances: KL is half the squared distance; 0.5, 4.5 and 2 for the means 0, 1, 3, each twice."""
    mu = torch.tensor([[0.0], [1.0], [3.0]])
    stats, kl = pairwise_kl(mu, torch.zeros(3, 1)), np.array([0.5, 4.5, 2, 0.5, 4.5, 2])
    assert stats.mpd.item() == pytest.approx(kl.mean()) and stats.std.item() == pytest.approx(kl.std(ddof=1))
    assert pairwise_kl_diversity(mu, torch.zeros(3, 1)).item() == pytest.approx(np.log1p(np.exp(-kl)).mean())
