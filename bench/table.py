"""The README's tables from the JSON files of benchmark runs on one machine: `python -m latent_engine.bench.table FILE...`."""

import argparse
import json
from math import exp, log
from pathlib import Path

from .report import seconds, sizes
from .suite import OURS

DIRECTIONS = {False: "forward", True: "forward + backward"}


def markdown(runs: list[dict]) -> str:
    """Machine and versions, a table an op with a row a case, and the training epoch."""
    machines = [run["machine"] for run in runs]
    if any(machine != machines[0] for machine in machines):
        raise SystemExit("bench.table: the files are of different machines or versions; make a table of each.")
    results = [result for run in runs for result in run["results"]]
    lines = [_machine(runs), *(_results(results) if results else [])]
    for epoch in filter(None, (run["dgd_epoch"] for run in runs)):
        times = {name: t["median"] for name, t in epoch.items()}
        others = ", ".join(f"{name} {t:.2f} s ({t / times[OURS]:.2f}×)" for name, t in times.items() if name != OURS)
        lines += ["", f"DGD training epoch, 5,000 digits in batches of 32: {times[OURS]:.2f} s; {others}."]
    return "\n".join(lines)


def _results(results: list[dict]) -> list[str]:
    columns = [name for direction in DIRECTIONS.values() for name in (direction, "roofline", "best peer", "peer / ours")]
    lines, means = [], []
    for op in dict.fromkeys(r["op"] for r in results):
        of_op = [r for r in results if r["op"] == op]
        header = (f"`{op}`", "sizes", *columns, "extra memory")
        lines += ["", _row(header), _row(["---"] * len(header))]
        lines += [_case([r for r in of_op if r["case"] == case]) for case in dict.fromkeys(r["case"] for r in of_op)]
        means.append(f"`{op}` {_mean(of_op):.2f}")
    return [*lines, "", f"Geometric means of peer / ours: {', '.join(means)}; {_mean(results):.2f} over all, ahead in "
                        f"{sum(_ratio(r) > 1 for r in results)} of {len(results)}."]


def _case(results: list[dict]) -> str:
    """One case in both directions; the extra memory is that of the last."""
    cells = [f"`{results[0]['case']}`", sizes(results[0]["sizes"])]
    for backward in DIRECTIONS:
        r = next((r for r in results if r["backward"] == backward), None)
        cells += [""] * 4 if r is None else [
            seconds(_median(r, OURS)), f"{100 * r['bound'] / _median(r, OURS):.0f} % {r['limit']}",
            f"{r['best_peer']} {seconds(_median(r, r['best_peer']))}", f"**{_ratio(r):.2f}**"]
    memory = results[-1]["memory"][OURS]
    return _row([*cells, "" if memory is None else f"{memory / 2**20:.1f} MB"])


def _mean(results: list[dict]) -> float:
    return exp(sum(log(_ratio(r)) for r in results) / len(results))


def _median(result: dict, name: str) -> float:
    return result["timings"][name]["median"]


def _ratio(result: dict) -> float:
    return _median(result, result["best_peer"]) / _median(result, OURS)


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(runs: list[dict]) -> str:
    machine = runs[0]["machine"]
    hardware = machine["device"]
    if hardware == "cpu":
        hardware = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v and name != "latent-engine")
    bytes_, fmas, exps = (_range([run["ceilings"][name] / 1e9 for run in runs]) for name in ("bytes", "fmas", "exps"))
    both = [run["ceilings"]["operations"] / 1e9 for run in runs if "operations" in run["ceilings"]]
    operations = f", {_range(both)} G operations/s of FMAs and additions in equal numbers" if both else ""
    tapes = _range([1e6 * run["ceilings"]["tape"] for run in runs if "tape" in run["ceilings"]])
    return (f"{hardware}; Python {machine['python']}, {versions}. Ceilings measured in the same runs: {bytes_} GB/s copied, "
            f"{fmas} GFMA/s, {exps} Gexp/s{operations}; the least that a gradient through PyTorch's autograd takes: {tapes} "
            f"µs.")


def _range(values: list[float]) -> str:
    low, high = (f"{f(values):.3g}" for f in (min, max))
    return low if low == high else f"{low}–{high}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench.table", description=__doc__.split(":")[0] + ".")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what `python -m latent_engine.bench --json` wrote")
    runs = []
    for path in parser.parse_args(arguments).files:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{path} is not a benchmark's JSON: {error}")
    print(markdown(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
