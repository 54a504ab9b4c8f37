"""What a benchmark run prints and writes."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import exp, log
from pathlib import Path
from typing import Any

import torch

from latent_engine.kernels import native

from .suite import OURS, Result
from .timing import Ceilings


def seconds(t: float) -> str:
    """A time with three digits and its unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if t >= s), ("µs", 1e-6))
    return f"{t / scale:.3g} {unit}"


def sizes(named: dict[str, int]) -> str:
    """Sizes with their names: N=32 K=20 D=2."""
    return " ".join(f"{name}={size}" for name, size in named.items())


def ratio(result: Result) -> float | None:
    """Time of the best peer over ours: above one we are ahead."""
    if OURS not in result.timings or result.best_peer is None:
        return None
    return result.timings[result.best_peer].median / result.timings[OURS].median


def print_result(result: Result) -> None:
    """One case: every peer with its time, memory and error."""
    direction = "forward + backward" if result.backward else "forward"
    print(f"\n{result.op} {result.case} {sizes(result.sizes)}, {direction}; "
          f"bound {seconds(result.bound)} ({result.limit})")
    print(f"  {'':16} {'median':>9} {'20–80 %':>19} {'% of bound':>10} {'vs ours':>8} {'memory':>9} {'error':>8}")
    ours = result.timings.get(OURS)
    for name, t in sorted(result.timings.items(), key=lambda item: item[1].median):
        memory = result.memory.get(name)
        print(f"  {name:16} {seconds(t.median):>9} {seconds(t.low) + ' – ' + seconds(t.high):>19} "
              f"{100 * result.bound / t.median:9.0f}% {t.median / ours.median if ours else float('nan'):7.2f}× "
              f"{'' if memory is None else f'{memory / 2**20:.1f} MB':>9} {result.errors[name]:8.1e}")
    for name, reason in result.skipped.items():
        print(f"  {name:16} {reason}")


def print_summary(results: list[Result]) -> None:
    """The ratio to the best peer of every case, and its geometric mean."""
    ratios = [(r, ratio(r)) for r in results]
    known = [x for _, x in ratios if x]
    if not known:
        return
    print("\nbest peer / ours")
    for result, x in ratios:
        if x:
            print(f"  {result.case:10} {'fwd+bwd' if result.backward else 'fwd':8} {x:6.2f}×  against {result.best_peer}")
    print(f"  geometric mean {exp(sum(map(log, known)) / len(known)):.2f}× over {len(known)}, "
          f"ahead in {sum(x > 1 for x in known)}")


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "isa": native.cpp.cpu_isa() if native.cpp else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("latent-engine", "torch", "triton", "numpy", "jax", "pykeops")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: str, device: str, ceilings: Ceilings, results: list[Result], epoch: dict | None) -> None:
    """Everything measured, with the machine and the versions."""
    content = {"machine": machine(device), "ceilings": asdict(ceilings), "results": [r.as_json() for r in results],
               "dgd_epoch": epoch and {name: asdict(t) for name, t in epoch.items()}}
    Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_plot(path: str, results: list[Result]) -> None:
    """Bars of the ratio to the best peer."""
    from matplotlib.figure import Figure

    rows = [(r, ratio(r)) for r in results if ratio(r)]
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{r.case} {'fwd+bwd' if r.backward else 'fwd'}" for r, _ in rows], [x for _, x in rows],
              color=["#0072b2" if r.backward else "#56b4e9" for r, _ in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the best peer / time of latent-engine")
    figure.savefig(path, dpi=150)
    print(f"written: {path}")
