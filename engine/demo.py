"""The tour that `make demo` gives: a Deep Generative Decoder on 5,000 real digits, from data to pictures, in minutes.

    python -m latent_engine.demo [--epochs 100] [--runs runs]
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from .bench.__main__ import main as bench
from .commands import next_run
from .data import load
from .probes import pca_baseline
from .report import evaluate, format_scores, write_pictures, write_scores
from .systems import PRESETS
from .trainer import fit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directory is made")
    parser.add_argument("--no-bench", action="store_true", help="leave out the micro-benchmark")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    train, test = (load("mnist5k", split).pixels(binarize=True) for split in ("train", "test"))
    preset = PRESETS["dgd"]
    # The settings of the authors' packages where the paper's text does not give its Figure 3. Counted once (Eq. 3), the
    # prior lets a few broad components take most digits; a start at N(0, I) scatters each digit over many places; and
    # from a start at zero, components that move at the paper's 0.1 can all run to the origin before the digits part.
    optim = replace(preset.config.optim, prior=replace(preset.config.optim.prior, lr=1e-2))
    config = replace(preset.config, prior_count="per_sample", latent_init="zeros", optim=optim)
    torch.manual_seed(preset.train.seed)
    system = preset.system.for_data(config, train)
    run = next_run("dgd", options.runs)
    print(f"Data: {len(train)} + {len(test)} digits, {train.source}.\n"
          f"Model: Deep Generative Decoder, {config.components} components over {config.latent_dim} dimensions, "
          "no labels used.\n"
          "Settings: prior_count=per_sample, which gives the clusters of the paper's Figure 3 (the default, once as\n"
          "in Eq. 3, lets a few broad components take most digits), latent_init=zeros, prior learning rate 0.01.\n"
          f"Training {options.epochs} epochs into {run}", flush=True)
    records = fit(system, train, replace(preset.train, epochs=options.epochs), run_dir=run)

    print("Evaluating: MAP representations of the test digits, then pictures", flush=True)
    scores = evaluate(system, train, test)
    write_scores(scores, run / "scores.json")
    pictures = write_pictures(system, train, records, run, "DGD on mnist5k")
    if not options.no_bench:
        print("\nMicro-benchmark: one training batch's prior, 32 × 20 × 2 (rows × components × dimensions)", flush=True)
        bench(["gmm", "--case", "dgd-step", "--no-compile"])

    last = records[-1]
    print("\nLast epoch, mean over the digits (nats): "
          + ", ".join(f"{name} {last[name]:.1f}" for name in ("total", "log_px_z", "log_pz", "log_prior")))
    print(format_scores(scores, {"2-D PCA": pca_baseline(train.x, train.y, config.components)}))
    print(f"epoch time: {statistics.median(r['seconds'] for r in records):.2f} s (median of {len(records)}); "
          f"all of the demo: {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads\n")
    print("Pictures:", *pictures[:-1], sep="\n  ")
    print(f"Open in a browser:\n  {pictures[-1]}\nRun directory:\n  {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
