"""Witness function, median heuristic and permutation test."""

import itertools

import numpy as np
import pytest
import torch

from latent_engine.kernels import BackendError, median_heuristic, mmd2, mmd_two_sample, mmd_witness, two_sample_test
from latent_engine.kernels.mmd import KERNELS, WAE_SCALES

from oracles import assert_within_budget, longdouble
from oracles import mmd as oracle


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[1 << 22, 500], ids=["one-block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(mmd_two_sample, "BLOCK", request.param)


def test_witness(implementation, blocks):
    backend, device = implementation
    points, x, y = (t.to(device) for t in (draws(11, 4), draws(33, 4, seed=1), draws(70, 4, seed=2)))
    for kernel in ("imq", "laplacian"):
        exact = sum(sign * oracle.profile(((longdouble(points)[:, None] - longdouble(s)) ** 2).sum(-1), kernel, WAE_SCALES,
                                          8.0)[0].mean(1) for sign, s in ((1, x), (-1, y)))
        actual = mmd_witness(points, x, y, kernel=kernel, backend=backend)
        direct = mmd_witness(points, x, y, kernel=kernel, backend="reference")
        assert_within_budget("witness", actual, direct, exact, np.full_like(exact, 7))


def test_witness_gradients(blocks):
    leaves = [draws(5, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(3)]
    for kernel in KERNELS:
        for a, b in zip(*(torch.autograd.grad(mmd_witness(*leaves, kernel=kernel, backend=backend).square().sum(), leaves)
                          for backend in (None, "reference")), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(mmd_witness, leaves) and torch.autograd.gradgradcheck(mmd_witness, leaves)


def test_mean_of_the_witness_is_the_biased_statistic():
    """MMD² = E_x f(x) − E_y f(y)."""
    x, y = draws(20, 3, dtype=torch.float64), 1 + draws(31, 3, seed=1, dtype=torch.float64)
    found = mmd_witness(x, x, y).mean() - mmd_witness(y, x, y).mean()
    torch.testing.assert_close(found, mmd2(x, y, estimator="biased"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [2, 3, 4, 57, 90])
def test_median_is_exact(N, dtype, blocks):
    def median(points):
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        return distances[torch.ones_like(distances).triu(1) > 0].median()

    x, y = draws(N, 3, dtype=dtype), draws(7, 3, seed=1, dtype=dtype)
    assert torch.equal(median_heuristic(x), median(x))
    assert torch.equal(median_heuristic(x, y), median(torch.cat((x, y))))


def test_median_of_odd_inputs():
    assert median_heuristic(torch.zeros(9, 2)) == 0
    x = draws(9, 2)
    x[4] = torch.inf
    assert median_heuristic(x).isfinite()
    x[3] = torch.nan
    assert median_heuristic(x).isnan()
    assert median_heuristic(torch.full((2, 1), torch.inf)).isnan()
    assert median_heuristic(torch.tensor([[torch.inf]] * 4 + [[0.0]])).isnan()
    for scale in (1e-38, 1e-25, 1e20, 3e37):
        found = median_heuristic(torch.tensor([[0.0], [1.0], [3.0]]) * scale)
        assert found.item() == pytest.approx(2 * scale, rel=1e-6)
    half, single = draws(9, 2).half(), draws(9, 2).half().float()
    torch.testing.assert_close(median_heuristic(half), median_heuristic(single), rtol=0, atol=0)
    torch.testing.assert_close(median_heuristic(half, half), median_heuristic(single, single.clone()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs two or more points, given 1"):
        median_heuristic(torch.zeros(1, 2))


def test_statistic_and_p_value_by_enumeration(implementation, blocks):
    """Every relabelling of 4 + 4 points, with its own call of mmd2: the share that reaches the statistic is the p-value that
    random relabellings estimate."""
    backend, device = implementation
    x, y = draws(4, 2).to(device), 0.8 + draws(4, 2, seed=1).to(device)
    pool = torch.cat((x, y))
    statistics = []
    for chosen in itertools.combinations(range(8), 4):
        rest = [i for i in range(8) if i not in chosen]
        statistics.append(mmd2(pool[list(chosen)], pool[rest], backend="reference").item())
    exact = np.mean(np.array(statistics) >= statistics[0] - 1e-6)
    found = two_sample_test(x, y, permutations=4000, generator=torch.Generator().manual_seed(0), backend=backend)
    torch.testing.assert_close(found.statistic, mmd2(x, y, backend="reference"), atol=1e-6, rtol=1e-5)
    assert abs(found.p_value - exact) < 4 * (exact * (1 - exact) / 4000) ** 0.5 + 1e-3


def test_p_values_are_uniform_under_the_null():
    """Kolmogorov–Smirnov distance of 300 p-values from the uniform law, below its 0.1 % point 1.95 / √300."""
    generator = torch.Generator().manual_seed(3)
    draws = (torch.randn(2, 12, 2, generator=generator) for _ in range(300))
    p = sorted(two_sample_test(x, y, permutations=99, generator=generator).p_value for x, y in draws)
    assert np.abs(np.array(p) - (np.arange(300) + 0.5) / 300).max() < 1.95 / 300**0.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_power_under_an_alternative(kernel):
    x, y, spread = draws(60, 3), 1 + draws(50, 3, seed=1), 3 * draws(50, 3, seed=2)
    for other in (y, spread):
        assert two_sample_test(x, other, kernel=kernel, permutations=199).p_value == 1 / 200


def test_same_generator_same_result():
    x, y = draws(40, 3), draws(30, 3, seed=1)
    first, second, other = (two_sample_test(x, y, permutations=999, generator=torch.Generator().manual_seed(seed))
                            for seed in (0, 0, 1))
    assert first == second and first.p_value != other.p_value


def test_equal_points_have_p_value_one():
    assert two_sample_test(torch.zeros(5, 2), torch.zeros(6, 2), permutations=50).p_value == 1


def test_nan_gives_nan():
    x, y = draws(10, 3), draws(10, 3)
    x[3] = torch.nan
    found = two_sample_test(x, y, permutations=9)
    assert found.statistic.isnan() and found.p_value != found.p_value
    assert mmd_witness(draws(4, 3), x, y).isnan().all()


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: two_sample_test(torch.zeros(1, 2), torch.zeros(3, 2)), ValueError, "needs 2 or more points in each sample"),
    (lambda: two_sample_test(torch.zeros(3, 2), torch.zeros(3, 2), permutations=0), ValueError,
     "permutations must be a positive integer, given 0"),
    (lambda: mmd_witness(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 2)), ValueError,
     r"points must have shape \[P, D\] with D = 2 as in x and y, given \[2, 3\]"),
    (lambda: mmd_witness(torch.zeros(2, 2), torch.zeros(0, 2), torch.zeros(2, 2)), ValueError, "needs 1 or more points"),
    (lambda: mmd_witness(0.0, torch.zeros(2, 2), torch.zeros(2, 2)), TypeError, "points must be a tensor, given float"),
    (lambda: mmd_witness(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), backend="fast"), BackendError, "Unknown"),
])
def test_mistakes_get_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
