"""What MAE's regularisers cost in a training step: `python -m latent_engine.bench.divergences [NETWORK ...]`.

A VAE of MNIST digits with 32 latent dimensions, as in MAE's binary experiments, and batches of 100 (the paper's) and 1,000.
Steps with both regularisers and steps without are timed in turns with the regularisers alone: value and gradients for given
posteriors, of which the share is. The posteriors are those of the first weights: the work does not depend on them.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from latent_engine import VAE, Data, VAEConfig, load_data
from latent_engine.bounds import Posterior
from latent_engine.divergences import mutual_divergence
from latent_engine.system import Batch

from .report import machine
from .timing import Timing, time_calls
from .training_steps import milliseconds, our_loss, step

BATCHES, ROUNDS, LATENT_DIM = (100, 1000), 15, 32
WEIGHTS = {"diversity": 1.0, "smoothness": 0.5}
NETWORKS = get_args(get_type_hints(VAEConfig)["network"])


def regularizers(system: VAE, x: Tensor) -> Callable[[], None]:
    """Both regularisers of the posteriors of `x` and their gradients."""
    posterior = Posterior(*(t.detach().requires_grad_() for t in system.encode(x)))

    def run() -> None:
        mutual_divergence(posterior, **WEIGHTS)[0].backward()
        for leaf in posterior:
            leaf.grad = None

    return run


def measure(config: VAEConfig, data: Data, batch: int) -> dict[str, Timing]:
    """Seconds of a step "with" and "without" the regularisers, and of the "regularizers" alone."""
    torch.manual_seed(0)
    plain, regularized = VAE.for_data(config, data), VAE.for_data(replace(config, **WEIGHTS), data)
    rows = Batch(data.x[:batch], torch.arange(batch))
    calls = {"with": step(our_loss, regularized, rows), "without": step(our_loss, plain, rows),
             "regularizers": regularizers(regularized, rows.x)}
    for call in calls.values():
        call()
    return time_calls(calls, "cpu", rounds=ROUNDS)


def share(found: dict[str, Timing]) -> float:
    """Of the regularisers in a step with them."""
    return found["regularizers"].median / found["with"].median


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench.divergences", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"any of {', '.join(NETWORKS)} (default: conv)")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.networks if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown network {unknown[0]!r}; they are {', '.join(NETWORKS)}")
    data, results = load_data("mnist5k").pixels("threshold"), {}
    print(f"training steps of a VAE with MAE's regularisers, {LATENT_DIM} dimensions, median of {ROUNDS}")
    for network in options.networks or ["conv"]:
        for batch in BATCHES:
            results[f"{network}-{batch}"] = found = measure(VAEConfig(network=network, latent_dim=LATENT_DIM), data, batch)
            print(f"  {network} N={batch:<5} with {milliseconds(found['with'])}, without {milliseconds(found['without'])}; "
                  f"regularisers {milliseconds(found['regularizers'])}, {100 * share(found):.1f} %", flush=True)
    if options.json:
        content = {"machine": machine("cpu"), "divergences": {
            name: {call: asdict(timing) for call, timing in found.items()} for name, found in results.items()}}
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
