"""The README's table from the JSON file of a benchmark run: `python -m latent_engine.bench.table FILE`."""

import json
import sys
from math import exp, log
from pathlib import Path

from .report import seconds
from .suite import OURS

HEADER = ("case", "N × K × D", "direction", "ours", "of the roofline", "extra memory", "best peer", "its time", "peer / ours")


def markdown(content: dict) -> str:
    """Machine and versions, a row a case with the best peer, and the training epoch."""
    lines = [_machine(content), *(_results(content["results"]) if content["results"] else [])]
    if content["dgd_epoch"]:
        times = {name: t["median"] for name, t in content["dgd_epoch"].items()}
        others = ", ".join(f"{name} {t:.2f} s ({t / times[OURS]:.2f}×)" for name, t in times.items() if name != OURS)
        lines += ["", f"DGD training epoch, 5,000 digits in batches of 32: {times[OURS]:.2f} s; {others}."]
    return "\n".join(lines)


def _results(results: list[dict]) -> list[str]:
    lines = ["", *(_row(cells) for cells in (HEADER, ["---"] * len(HEADER)))]
    ratios = []
    for r in results:
        ours, best, memory = r["timings"][OURS]["median"], r["timings"][r["best_peer"]]["median"], r["memory"][OURS]
        ratios.append(best / ours)
        lines.append(_row((f"`{r['case']}`", " × ".join(map(str, r["sizes"])),
                           "forward + backward" if r["backward"] else "forward", seconds(ours),
                           f"{100 * r['bound'] / ours:.0f} % ({r['limit']})",
                           "" if memory is None else f"{memory / 2**20:.1f} MB", r["best_peer"], seconds(best),
                           f"**{ratios[-1]:.2f}**")))
    mean = exp(sum(map(log, ratios)) / len(ratios))
    return [*lines, "", f"Geometric mean {mean:.2f}, ahead in {sum(x > 1 for x in ratios)} of {len(ratios)}."]


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
