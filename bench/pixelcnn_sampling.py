"""Samples of a PixelCNN, against a full pass for each pixel: `python -m latent_engine.bench.pixelcnn_sampling`.

The decoder of `vlae` at its full width, images of 28×28. Both take the same noise and must draw the same images. 784 full
passes of many images take minutes: from 16 images on one pass is timed, and counted 784 times.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from latent_engine.pixelcnn import Draw, PixelCNN

from .report import machine
from .suite import OURS
from .timing import Timing, time_calls

SHAPE, LATENT_DIM, BATCHES = (1, 28, 28), 32, (1, 16, 64)


@torch.no_grad()
def full_passes(decoder: PixelCNN, z: Tensor, noise: Tensor) -> Draw:
    """What `PixelCNN.draw` gives, by a pass over the whole image for each pixel."""
    x, logits = torch.zeros_like(noise), torch.empty_like(noise)
    for row in range(noise.shape[2]):
        for column in range(noise.shape[3]):
            logits[:, :, row, column] = decoder(z, x)[:, :, row, column]
            x[:, :, row, column] = (noise[:, :, row, column] < logits[:, :, row, column].sigmoid()).to(x.dtype)
    return Draw(x, logits)


@torch.no_grad()
def measure(decoder: PixelCNN, n: int, rounds: int = 3) -> dict[str, Timing]:
    """Seconds to draw `n` images, by name."""
    z, noise = torch.randn(n, LATENT_DIM), decoder.noise(n)
    whole = n < 16
    calls = {OURS: lambda: decoder.draw(z, noise),
             "full passes": lambda: full_passes(decoder, z, noise) if whole else decoder(z, noise.round())}
    drawn = {name: call() for name, call in calls.items()}
    if whole and not torch.equal(drawn[OURS].x, drawn["full passes"].x):
        raise ValueError(f"The images of {n} draws differ from those of full passes with the same noise.")
    times = time_calls(calls, "cpu", rounds=rounds)
    pixels = 1 if whole else noise[0, 0].numel()
    return times | {"full passes": Timing(*(pixels * t for t in asdict(times["full passes"]).values()))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench.pixelcnn_sampling", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    decoder, results = PixelCNN(LATENT_DIM, SHAPE).eval(), {}
    print(f"samples of a PixelCNN, {'×'.join(map(str, SHAPE))}, {torch.get_num_threads()} threads, medians")
    for n in BATCHES:
        results[n] = found = measure(decoder, n)
        ours, full = found[OURS].median, found["full passes"].median
        print(f"  {n:3} images  ours {ours:6.3f} s, full passes {full:7.2f} s, {full / ours:5.1f}×", flush=True)
    if options.json:
        content = {"machine": machine("cpu"),
                   "pixelcnn_sampling": {n: {name: asdict(t) for name, t in found.items()} for n, found in results.items()}}
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
