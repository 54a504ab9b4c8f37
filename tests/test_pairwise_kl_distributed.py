"""Pair statistics over two processes (gloo) equal those of the concatenated batch on one, values and gradients."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from latent_engine.kernels import pairwise_kl, pairwise_kl_diversity

SHARES = ((20, 33), (6, 1), (5, 0))  # rows of the two ranks
NAMES = ("mean_per_dim", "std", "paper", "code")


def batch(N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(N)
    return [(1e3 + torch.randn(N, 3, generator=g)).to(dtype), (0.7 * torch.randn(N, 3, generator=g)).to(dtype)]


def compute(inputs: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Values and gradients; the incoming gradient of the means differs between dimensions."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    stats = pairwise_kl(*leaves, **options)
    values = dict(zip(NAMES, (stats.mean_per_dim, stats.std, pairwise_kl_diversity(*leaves, **options),
                              pairwise_kl_diversity(*leaves, form="code", **options)), strict=True))
    torch.testing.assert_close(pairwise_kl(*leaves, std=False, **options).mean_per_dim, stats.mean_per_dim)
    results = {name: t.detach() for name, t in values.items()}
    for name, t in values.items():
        incoming = torch.arange(1.0, 1 + t.numel(), dtype=t.dtype).view_as(t)
        grads = torch.autograd.grad(t, leaves, incoming, retain_graph=True)
        for part, grad in zip(("mu", "log_var"), grads, strict=True):
            results[f"{name} by {part}"] = grad
    return results


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for share in SHARES:
        for dtype in (torch.float32, torch.float64):
            first = sum(share[:rank])
            own = [t[first : first + share[rank]] for t in batch(sum(share), dtype)]
            results[share, dtype] = compute(own, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="needs N ≥ 2 posteriors on all ranks together, given 0"):
        pairwise_kl(torch.zeros(0, 3), torch.zeros(0, 3), group=dist.group.WORLD)
    with pytest.raises(ValueError, match="leave `backend` out, given 'cpp'"):
        pairwise_kl(torch.zeros(4, 3), torch.zeros(4, 3), group=dist.group.WORLD, backend="cpp")
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (share, dtype), first in found[0].items():
        whole = compute(batch(sum(share), dtype))
        for name, expected in whole.items():
            second = found[1][share, dtype][name]
            if " by " in name:
                torch.testing.assert_close(torch.cat((first[name], second)), expected)
            else:
                assert torch.equal(first[name], second)
                torch.testing.assert_close(first[name], expected)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
