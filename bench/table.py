"""The README's table from the JSON file of a benchmark run: `python -m latent_engine.bench.table FILE`."""

import json
import sys
from math import exp, log
from pathlib import Path

from .report import seconds, sizes
from .suite import OURS

DIRECTIONS = {False: "forward", True: "forward + backward"}


def markdown(content: dict) -> str:
    """Machine and versions, a table an op with a row a case, and the training epoch."""
    lines = [_machine(content), *(_results(content["results"]) if content["results"] else [])]
    if content["dgd_epoch"]:
        times = {name: t["median"] for name, t in content["dgd_epoch"].items()}
        others = ", ".join(f"{name} {t:.2f} s ({t / times[OURS]:.2f}×)" for name, t in times.items() if name != OURS)
        lines += ["", f"DGD training epoch, 5,000 digits in batches of 32: {times[OURS]:.2f} s; {others}."]
    return "\n".join(lines)


def _results(results: list[dict]) -> list[str]:
    lines = []
    for op in dict.fromkeys(r["op"] for r in results):
        cases = dict.fromkeys(r["case"] for r in results if r["op"] == op)
        header = (f"`{op}`", "sizes", *(cell for direction in DIRECTIONS.values() for cell in
                                       (direction, "roofline", "best peer", "peer / ours")), "extra memory")
        lines += ["", _row(header), _row(["---"] * len(header))]
        lines += [_case([r for r in results if (r["op"], r["case"]) == (op, case)]) for case in cases]
    ratios = [_ratio(r) for r in results]
    mean = exp(sum(map(log, ratios)) / len(ratios))
    return [*lines, "", f"Geometric mean {mean:.2f}, ahead in {sum(x > 1 for x in ratios)} of {len(ratios)}."]


def _case(results: list[dict]) -> str:
    """One case in both directions; the extra memory is that of the last."""
    cells = [f"`{results[0]['case']}`", sizes(results[0]["sizes"])]
    for backward in DIRECTIONS:
        r = next((r for r in results if r["backward"] == backward), None)
        cells += ["", "", "", ""] if r is None else [
            seconds(_median(r, OURS)), f"{100 * r['bound'] / _median(r, OURS):.0f} % {r['limit']}",
            f"{r['best_peer']} {seconds(_median(r, r['best_peer']))}", f"**{_ratio(r):.2f}**"]
    memory = results[-1]["memory"][OURS]
    return _row([*cells, "" if memory is None else f"{memory / 2**20:.1f} MB"])


def _median(result: dict, name: str) -> float:
    return result["timings"][name]["median"]


def _ratio(result: dict) -> float:
    return _median(result, result["best_peer"]) / _median(result, OURS)


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(content: dict) -> str:
    machine, ceilings = content["machine"], content["ceilings"]
    hardware = machine["device"]
    if hardware == "cpu":
        hardware = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v and name != "latent-engine")
    return (f"{hardware}; Python {machine['python']}, {versions}. Ceilings measured in the same run: "
            f"{ceilings['bytes'] / 1e9:.0f} GB/s copied, {ceilings['fmas'] / 1e9:.0f} GFMA/s, "
            f"{ceilings['exps'] / 1e9:.1f} Gexp/s.")


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
