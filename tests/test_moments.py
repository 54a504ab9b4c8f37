"""Moments in any batches against NumPy's of all rows at once; factors of covariances; statistics files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from latent_engine.data import DataError
from latent_engine.metrics import frechet_distance
from latent_engine.moments import BLOCK, Moments, factor_covariance

SHARES = ((40, 3), (1, 7), (3 * BLOCK, 20))  # rows of the two ranks


def features(n, d, seed=0, offset=1e4):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset)


def assert_moments_of(moments, rows):
    rows = rows.double().numpy()
    assert moments.count == len(rows) and moments.dimensions == rows.shape[1]
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-14)
    expected = np.atleast_2d(np.cov(rows, rowvar=False))
    np.testing.assert_allclose(moments.covariance(), expected, atol=1e-11 * np.abs(expected).max())
    factor = moments.factor()
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [(7,), (2, 0, 5), (1, 1, 30), (BLOCK,), (BLOCK + 3, 1), (900, 900, 900), (1,) * 20])
@pytest.mark.parametrize("d", [1, 6, 23])
def test_any_batches_give_the_moments_of_all_rows(sizes, d):
    rows = features(sum(sizes), d)
    moments = Moments()
    for part in rows.split(sizes):
        assert moments.add(part) is moments
    assert_moments_of(moments, rows)


@pytest.mark.parametrize("sizes", [(3, 4), (5, 40), (40, 5), (0, 9), (BLOCK + 1, 2, 2 * BLOCK)])
def test_merged_moments_are_those_of_all_rows(sizes):
    rows = features(sum(sizes), 9)
    parts = [Moments().add(part) for part in rows.split(sizes)]
    merged = Moments()
    for part in parts:
        merged.merge(part)
    assert_moments_of(merged.merge(Moments()), rows)
    assert_moments_of(merged.add(rows[:1]), torch.cat((rows, rows[:1])))
    assert_moments_of(parts[-1], rows[-sizes[-1]:])  # what was merged stays as it was


def test_a_scatter_matrix_wider_than_a_strip():
    assert_moments_of(Moments().add(features(700, 600, offset=3.0)), features(700, 600, offset=3.0))


def test_float32_rows_lose_nothing():
    rows = features(400, 9, offset=10.0).float()
    assert_moments_of(Moments().add(rows[:100]).add(rows[100:]), rows)


def test_rows_may_be_changed_after_they_were_added():
    rows = features(20, 30)
    moments, expected = Moments().add(rows), rows.clone()
    rows.zero_()
    assert_moments_of(moments, expected)
    assert moments.factor().shape == (30, 20)


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_factors_of_singular_covariances_have_their_rank(rank):
    root = features(rank, 12, offset=0.0).T
    factor = factor_covariance(root @ root.T)
    assert factor.shape == (12, rank)
    torch.testing.assert_close(factor @ factor.T, root @ root.T, rtol=0, atol=1e-13 * float(root.square().sum()))


def test_features_that_never_vary_leave_the_factor():
    rows = features(50, 6)
    rows[:, 2] = 0.1
    assert Moments().add(rows).factor().shape == (6, 5)


@pytest.mark.parametrize("n", [5, 40])
def test_statistics_files_are_read_back_and_can_be_added_to(n, tmp_path):
    rows = features(n + 30, 8)
    Moments().add(rows[:n]).save(tmp_path / "saved.npz")
    loaded = Moments.load(tmp_path / "saved.npz")
    assert_moments_of(loaded, rows[:n])
    assert_moments_of(loaded.add(rows[n:]), rows)
    with np.load(tmp_path / "saved.npz") as file:  # as pytorch-fid reads it
        assert file["mu"].shape == (8,) and file["sigma"].shape == (8, 8) and file["sigma"].dtype == np.float64


def test_files_of_pytorch_fid_have_no_count(tmp_path):
    rows = features(40, 3)
    np.savez_compressed(tmp_path / "theirs.npz", mu=rows.numpy().mean(0), sigma=np.cov(rows, rowvar=False))
    loaded = Moments.load(tmp_path / "theirs.npz")
    assert loaded.count is None
    assert frechet_distance(loaded, rows) == pytest.approx(0, abs=1e-9 * float(rows.var(0).sum()))
    for call in (lambda: loaded.add(rows), lambda: loaded.merge(Moments()), lambda: Moments().merge(loaded)):
        with pytest.raises(ValueError, match="without the number of rows"):
            call()
    loaded.save(tmp_path / "again.npz")
    assert Moments.load(tmp_path / "again.npz").count is None
    np.savez(tmp_path / "one.npz", mu=np.float64(2.0), sigma=np.float64(3.0))  # np.cov of one feature is a number
    assert Moments.load(tmp_path / "one.npz").covariance().tolist() == [[3.0]]


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x": np.zeros(3)}, "it holds x; looked for mu and sigma"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"given \[3\] and \[4, 4\]"),
    ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"given \[3, 1\] and \[3, 3\]"),
    ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
    (None, "is not a readable .npz file"),
])
def test_files_that_are_no_statistics(arrays, message, tmp_path):
    path = tmp_path / "wrong.npz"
    path.write_bytes(b"nothing") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        Moments.load(path)


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \[N, D\], given \[2, 3, 4\]; flatten"):
        Moments().add(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"shape \[N, 3\], given \[2, 4\]"):
        Moments().add(torch.zeros(2, 3)).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 features here, 4 there"):
        Moments().add(torch.zeros(2, 3)).merge(Moments().add(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="finite; look for NaN"):
        Moments().add(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="at least 1 rows are needed, given 0"):
        Moments().mean()
    for method in (Moments.covariance, Moments.factor):
        with pytest.raises(ValueError, match="at least 2 rows are needed, given 1"):
            method(Moments().add(torch.zeros(1, 3)))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, share in enumerate(SHARES):
        moments = Moments().add(features(sum(share), 9).split(share)[rank]).all_reduce()
        moments.save(f"{folder}/{number}-{rank}.npz")
    with pytest.raises(ValueError, match="4 rows of 2, no rows of unknown"):
        (Moments() if rank else Moments().add(torch.zeros(4, 2))).all_reduce()
    with pytest.raises(ValueError, match="4 rows of 2, 4 rows of 3"):
        Moments().add(torch.zeros(4, 2 + rank)).all_reduce()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)
    for number, share in enumerate(SHARES):
        first, second = (Moments.load(tmp_path / f"{number}-{rank}.npz") for rank in range(2))
        assert_moments_of(first, features(sum(share), 9))
        assert torch.equal(first.covariance(), second.covariance()) and torch.equal(first.mean(), second.mean())


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
