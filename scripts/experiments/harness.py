"""What the experiments share: settings that run side by side, one JSON file of their results, and tables of these."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from latent_engine.bench.report import machine
from latent_engine.checkpoint import write_file

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "experiments"


def main(name: str, doc: str, run: Callable[[Path, Any], dict], settings: dict[str, Any],
         table: Callable[[dict[str, dict]], str]) -> None:
    """`run(data, setting)` of each of `settings`, in processes of one thread; prints the table of the results.

    They are written to `name`.json in the folder --out one by one. What is there is not run again.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with mnist, omniglot-small, cifar10 and freyfaces")
    parser.add_argument("--jobs", type=int, default=2, help="settings to run at a time, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} is no folder; give that of the data sets.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    results = read(path) if path.exists() else {}
    left = {key: setting for key, setting in settings.items() if key not in results}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(_timed, run, options.data, setting): key for key, setting in left.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            results = {key: results[key] for key in settings if key in results}
            _write(path, results)
            print(f"{futures[future]}: {results[futures[future]]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(results))


def read(path: Path) -> dict[str, dict]:
    """The results in a file that `main` wrote, by setting."""
    return json.loads(path.read_text())["results"]


def _write(path: Path, results: dict[str, dict]) -> None:
    """A line a result."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(result)}" for key, result in results.items())
    write_file(path, f'{{"machine": {json.dumps(machine("cpu"))},\n "results": {{\n{lines}\n }}\n}}\n'.encode())


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; numbers to the right, the first column to the left."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def over_seeds(values: Sequence[float], digits: str) -> str:
    """The mean and, of several values, the lowest and the highest, in the format `digits`."""
    mean = f"{sum(values) / len(values):{digits}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{digits}} to {max(values):{digits}})"


def _timed(run: Callable[[Path, Any], dict], data: Path, setting: Any) -> dict:
    start = time.perf_counter()
    return run(data, setting) | {"seconds": round(time.perf_counter() - start, 1)}
