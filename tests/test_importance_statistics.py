"""Statistics of importance weights: moments in chunks, effective sample size, Pareto k̂, intervals, processes."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from latent_engine.kernels import (
    BackendError,
    ImportanceAccumulator,
    effective_sample_size,
    importance_bound,
    importance_weights,
    pareto_k,
    use_backend,
)
from latent_engine.kernels.importance_statistics import OP

from oracles import importance as oracle


def draws(S: int, N: int, dtype: torch.dtype = torch.float32, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return (spread * torch.randn(S, N, generator=torch.Generator().manual_seed(seed)) - 90).to(dtype)


def summary(samples: ImportanceAccumulator) -> list[torch.Tensor]:
    return [samples.log_likelihood(), samples.elbo(), samples.effective_sample_size(), samples.standard_error(),
            *samples.interval()]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (50, 20), (513, 100), (129, 7), (33, 65), (1000, 1), (20, 9000)],
                         ids=lambda s: "S{}-N{}".format(*s))
def test_statistics_are_exact_in_float64(implementation, shape):
    backend, device = implementation
    if backend == "triton" and device == "cpu" and math.prod(shape) > 60_000:
        pytest.skip("the interpreter is too slow for large sizes")
    for dtype in (torch.float32, torch.float64) if backend == "cpp" else (torch.float32,):
        log_w = draws(*shape, dtype)
        x, S = log_w.double().numpy(), shape[0]
        samples = ImportanceAccumulator(backend=backend).add(log_w.to(device))
        w = np.exp(x - x.max(0))
        ess = w.sum(0) ** 2 / (w**2).sum(0)
        np.testing.assert_allclose(samples.log_likelihood().cpu(), logsumexp(x, axis=0) - math.log(S), rtol=1e-14)
        np.testing.assert_allclose(samples.elbo().cpu(), x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(samples.effective_sample_size().cpu(), ess, rtol=1e-12)
        if S > 1:
            np.testing.assert_allclose(samples.standard_error().cpu(), np.sqrt(np.maximum(1 / ess - 1 / S, 0) * S / (S - 1)),
                                       rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("chunks", [1, 2, 7, 100, 257])
def test_chunks_change_nothing(implementation, chunks):
    backend, device = implementation
    if (backend, device) == ("triton", "cpu") and chunks > 10:
        pytest.skip("the interpreter is slow")
    log_w = (draws(257, 11) * 3).to(device)
    whole = ImportanceAccumulator(backend="reference", max_samples=300).add(log_w)
    parts = ImportanceAccumulator(backend=backend, max_samples=300)
    for chunk in log_w.tensor_split(chunks):
        parts.add(chunk)
    for a, b in zip(summary(parts), summary(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert torch.equal(parts.pareto_k(), pareto_k(log_w))


def test_merged_accumulators_are_one():
    log_w = draws(300, 6, spread=5)
    whole = ImportanceAccumulator(max_samples=300).add(log_w)
    merged = ImportanceAccumulator(max_samples=300)
    for part in log_w.tensor_split(3):
        merged.merge(ImportanceAccumulator(max_samples=300).add(part[:50]).merge(
            ImportanceAccumulator(max_samples=300).add(part[50:])))
    merged.merge(ImportanceAccumulator())
    assert merged.samples == 300
    for a, b in zip(summary(merged), summary(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    assert torch.equal(merged.pareto_k(), whole.pareto_k())


def test_shapes_and_one_data_point():
    log_w = draws(40, 6)
    flat, deep, one = (ImportanceAccumulator(max_samples=40).add(t) for t in (log_w, log_w.reshape(40, 2, 3), log_w[:, 0]))
    for a, b, c in zip([*summary(flat), flat.pareto_k()], [*summary(deep), deep.pareto_k()], [*summary(one), one.pareto_k()],
                       strict=True):
        assert torch.equal(a.reshape(2, 3), b)
        torch.testing.assert_close(a[0], c, rtol=1e-13, atol=1e-14)
    assert effective_sample_size(log_w.reshape(40, 2, 3)).shape == pareto_k(log_w.reshape(40, 2, 3)).shape == (2, 3)


def test_zero_weights_and_nan(implementation):
    backend, device = implementation
    log_w = draws(30, 4).to(device)
    log_w[3, 0] = -torch.inf
    log_w[:, 1] = -torch.inf
    log_w[5, 2] = torch.nan
    samples = ImportanceAccumulator(backend=backend, max_samples=30).add(log_w[:10]).add(log_w[10:])
    likelihood = samples.log_likelihood()
    keep = [i for i in range(30) if i != 3]
    torch.testing.assert_close(likelihood[0], log_w[keep, 0].double().logsumexp(0) - math.log(30))
    assert likelihood[1] == -torch.inf and likelihood[2].isnan() and likelihood[3].isfinite()
    assert samples.effective_sample_size()[1].isnan() and samples.effective_sample_size()[3].isfinite()
    assert samples.pareto_k()[2].isnan() and samples.pareto_k()[3].isfinite()


def test_effective_sample_size_is_that_of_the_weights():
    log_w = draws(64, 5, torch.float64)
    torch.testing.assert_close(effective_sample_size(log_w), 1 / importance_weights(log_w).square().sum(0))
    torch.testing.assert_close(effective_sample_size(torch.zeros(64, 3)), torch.full((3,), 64.0, dtype=torch.float64))
    torch.testing.assert_close(ImportanceAccumulator().add(log_w).log_likelihood(), importance_bound(log_w))


@pytest.mark.parametrize("S", [2, 20, 25, 100, 1000, 4096])
def test_pareto_k_agrees_with_an_independent_implementation(S):
    g = np.random.default_rng(S)
    columns = [g.normal(0, 1, S), g.normal(0, 4, S), g.exponential(0.3, S), g.exponential(0.9, S), g.exponential(2.0, S) + 500,
               np.round(g.normal(0, 2, S), 1), np.where(g.random(S) < 0.3, -np.inf, g.normal(0, 1, S))]
    log_w = np.stack(columns, 1)
    expected = [oracle.pareto_k(column) for column in columns]
    np.testing.assert_allclose(pareto_k(torch.from_numpy(log_w)), expected, rtol=1e-8)
    single = log_w.astype(np.float32)
    np.testing.assert_allclose(pareto_k(torch.from_numpy(single)), [oracle.pareto_k(c) for c in single.T], rtol=1e-8)


def test_pareto_k_finds_the_shape_of_a_pareto_tail():
    """Weights exp(k·E), E exponential, have a tail of shape k."""
    for k in (0.3, 0.7, 1.2):
        log_w = k * torch.empty(20_000, 8, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
        assert pareto_k(log_w).mean().item() == pytest.approx(k, abs=0.08)


def test_constant_weights_have_no_tail():
    assert (pareto_k(torch.zeros(100, 3)) == torch.inf).all()


def test_interval_covers_the_truth():
    """log-normal weights of mean 1: the true log-likelihood is 0."""
    log_w = 0.7 * torch.randn(400, 5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.245
    low, high = ImportanceAccumulator().add(log_w).interval(0.9)
    covered = ((low <= 0) & (high >= 0)).double().mean().item()
    assert covered == pytest.approx(0.9, abs=0.02)


def test_mistakes_get_one_clear_error():
    for wrong in ("3", 0, -4):
        with pytest.raises(ValueError, match=rf"max_samples must be a positive integer or None, given {wrong!r}"):
            ImportanceAccumulator(max_samples=wrong)
    samples = ImportanceAccumulator(max_samples=10)
    with pytest.raises(ValueError, match="no samples have been added yet"):
        samples.log_likelihood()
    samples.add(torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"log_w must have shape \['S', 3\] as before, given \[8, 4\]"):
        samples.add(torch.zeros(8, 4))
    with pytest.raises(ValueError, match="log_w is on meta but the samples before it on cpu; move it there"):
        samples.add(torch.zeros(1, 3, device="meta"))
    with pytest.raises(ValueError, match="11 samples are more than max_samples = 10"):
        samples.add(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"the data points have shape \[3\] here and \[2\] there"):
        samples.merge(ImportanceAccumulator(max_samples=10).add(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="the largest log-weights were not kept; construct it with max_samples"):
        ImportanceAccumulator().add(torch.zeros(3, 2)).pareto_k()
    with pytest.raises(ValueError, match="kept too few of its largest log-weights; construct it with max_samples = 10 too"):
        samples.merge(ImportanceAccumulator().add(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), given 95"):
        samples.interval(95)
    with pytest.raises(TypeError, match=r"log_w must be a floating-point tensor, given torch.int64"):
        samples.add(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_w must have shape \[S, ...\], given a scalar"):
        samples.add(torch.zeros(()))
    with pytest.raises(BackendError), use_backend("cuda"):
        samples.add(torch.zeros(1, 3))
    assert samples.samples == 8 and OP.name == "effective_sample_size"
    assert (samples.log_likelihood() == 0).all()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_effective_sample_size_compiles_to_one_graph(dynamic):
    compiled = torch.compile(effective_sample_size, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for S in (30, 41):
        torch.testing.assert_close(compiled(draws(S, 3)), effective_sample_size(draws(S, 3)))
    with pytest.raises(ValueError, match="effective_sample_size: needs at least one sample, given S = 0"):
        effective_sample_size(torch.zeros(0, 3))


def test_refused_samples_leave_an_empty_accumulator_empty():
    samples = ImportanceAccumulator(max_samples=3)
    with pytest.raises(ValueError, match="5 samples are more than max_samples = 3"):
        samples.add(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="5 samples are more than max_samples = 3"):
        samples.merge(ImportanceAccumulator(max_samples=5).add(torch.zeros(5, 2)))
    assert samples.add(torch.zeros(2, 4)).log_likelihood().shape == (4,)


WORKER = """
import os, sys, torch
from torch import distributed
from latent_engine.kernels import ImportanceAccumulator
rank = int(sys.argv[1])
def refused(message, mine):
    before = mine.samples
    try:
        mine.all_reduce()
    except ValueError as error:
        assert message in str(error), error
        assert mine.samples == before
    else:
        raise AssertionError(message)
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
log_w = 2 * torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) - 90
mine = (log_w[:17], log_w[17:])[rank]  # fewer samples than the tail has, and the rest
refused("every process must have added samples, given [17, 0]",
        ImportanceAccumulator().add(mine) if rank == 0 else ImportanceAccumulator())
refused("one shape and one max_samples, given [[7], [7]] and [400, None]",
        ImportanceAccumulator(max_samples=(400, None)[rank]).add(mine))
refused("one shape and one max_samples, given [[6], [7]]", ImportanceAccumulator().add(mine[:, 1 - rank:]))
refused("300 samples are more than max_samples = 290", ImportanceAccumulator(max_samples=290).add(mine))
samples = ImportanceAccumulator(max_samples=300).add(mine).all_reduce()
torch.save([samples.log_likelihood(), samples.elbo(), samples.effective_sample_size(), samples.pareto_k()], sys.argv[3])
distributed.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}.pt")]
                for rank in range(2)]
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [w.returncode for w in workers] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    log_w = draws(300, 7)
    whole = ImportanceAccumulator(max_samples=300).add(log_w)
    expected = [whole.log_likelihood(), whole.elbo(), whole.effective_sample_size(), whole.pareto_k()]
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
