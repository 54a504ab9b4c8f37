"""Trains a latent table in a memory-mapped file, with its Adam state, by batches: memory stays at what the batches need.

    python scripts/mapped_table.py FOLDER [--rows 10000000] [--dim 64] [--steps 300] [--memory 1.5]

10⁷ rows of 64 dimensions and their state are 7.7 GB in FOLDER, which are deleted at the end. `--memory` is the limit in GB on
what the process may allocate (RLIMIT_DATA; pages of the files belong to the system, which writes them back to make room). A
limit that counts these pages too is that of a control group, e.g. by `systemd-run --scope -p MemoryMax=2G python scripts/...`.
The loss pulls each row to a point of its own, so that the result is checked too.
"""

import argparse
import resource
import shutil
import time
from pathlib import Path

import torch

from latent_engine.latents import LatentTable, RowAdam, mapped


def anonymous_memory() -> float:
    """GB that the process holds beside pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--memory", type=float, default=1.5)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 2**30),) * 2)
    folder = options.folder / "mapped_table"
    folder.mkdir(parents=True)
    try:
        table = LatentTable(mapped(folder / "h", (options.rows, options.dim)))
        optimizer = RowAdam(table.parameters(), lr=0.1)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
        print(f"{options.rows} rows of {options.dim}, with state {size:.2f} GB in {folder}; limit {options.memory} GB")
        generator, times = torch.Generator().manual_seed(0), []
        seen = torch.empty(options.steps, options.batch, dtype=torch.int64)
        for step in range(1, options.steps + 1):
            rows = torch.randint(options.rows, (options.batch,), generator=generator)
            begin = time.perf_counter()
            target = (rows % 7 - 3.0)[:, None]
            (table(rows) - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - begin)
            seen[step - 1] = rows
            if step % max(1, options.steps // 5) == 0:
                recent = sorted(times[-max(1, options.steps // 5):])
                print(f"step {step}: median {1e3 * recent[len(recent) // 2]:.1f} ms, slowest {1e3 * recent[-1]:.1f} ms, "
                      f"{anonymous_memory():.2f} GB allocated")
        rows, counts = seen.unique(return_counts=True)
        once = rows[counts == 1]  # the first step of Adam is lr · sign of the gradient
        for part in once.split(options.batch):
            expected = 0.1 * (part % 7 - 3.0).sign()[:, None].expand(-1, options.dim)
            torch.testing.assert_close(table(part).detach(), expected)
        print(f"{len(rows)} rows were stepped; the {len(once)} that were stepped once are where one step of Adam puts them")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
