"""What the verbs of the command line do; `cli` parses them."""

import argparse
import json
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
import tyro

from . import report
from .checkpoint import CheckpointError, read_description
from .cli import Evaluate, Explore, Represent, Sample, did_you_mean, fail
from .data import NAMES, SPLITS, Data, DataError, load
from .figures import image_grid
from .logs import JsonLines
from .systems import PRESETS, load_system
from .systems.dgd import DGD
from .trainer import TrainConfig, fit, identity

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Train(Generic[_Config]):
    """Train a system. A --config file has the flags' names as keys and tables (optim.decoder.lr); flags override it."""

    model: Annotated[_Config, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    data: str = "mnist5k"
    """Name or path of the training data."""
    binarize: bool = True
    """Threshold the pixels at 0.5."""
    run: Path | None = None
    """Run directory (default: the first free runs/PRESET-NUMBER)."""
    resume: bool = False
    """Continue the run in --run; its settings must be given again, but for the number of epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    config: Path | None = None
    """TOML or JSON file with settings."""


def train(rest: list[str]) -> int:
    """`latent-engine train PRESET [--config FILE] [flags]`."""
    names = "\n".join(f"  {name:<14}{preset.description}" for name, preset in PRESETS.items())
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: latent-engine train PRESET [OPTIONS]\n\n{names}\n\n"
              "latent-engine train PRESET --help for its options.")
        return 0 if rest else 2
    name, *flags = rest
    if name not in PRESETS:
        hint = did_you_mean(name, list(PRESETS))
        return fail(f"unknown preset {name!r}{hint}; the presets are {', '.join(PRESETS)}.")
    options = parse_train(name, flags)
    data = load(options.data).pixels(options.binarize)
    print(f"data: {data.name}, {len(data)} images of {'×'.join(map(str, data.x.shape[1:]))}, {data.source}")
    torch.manual_seed(options.train.seed)
    system = PRESETS[name].system.for_data(options.model, data).to(_device(options.device))
    run = options.run or next_run(name)
    try:
        fit(system, data, options.train, run_dir=run, resume=options.resume)
    except KeyboardInterrupt:
        again = [f for f in flags if f not in ("--resume", "--no-resume")]
        again += [] if options.run else ["--run", str(run)]
        print(f"\nInterrupted. The run is in {run}; all but its last unfinished epoch is kept. Continue it with\n"
              f"  latent-engine train {name} {shlex.join([*again, '--resume'])}", file=sys.stderr)
        return 130
    print(f"The run is in {run}. Look at it with: latent-engine explore {shlex.quote(str(run))}")
    return 0


def parse_train(preset: str, flags: list[str]) -> Train:
    """Settings in this order of precedence: flags, the --config file among them, the preset."""
    found = PRESETS[preset]
    kind, options = Train[found.system.config_type], Train(found.config, found.train)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file = parser.parse_known_args(flags)[0].config
    if file is not None:
        options = tyro.cli(kind, default=options, args=file_as_flags(file), prog=str(file))
    return tyro.cli(kind, default=options, args=flags, prog=f"latent-engine train {preset}")


def file_as_flags(path: Path) -> list[str]:
    """A TOML or JSON file as the flags that say the same, so that one parser checks both."""
    parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix)
    if parse is None:
        raise ValueError(f"--config takes a .toml or .json file, given {path}.")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config: there is no file {path}.") from None
    except ValueError as error:
        raise ValueError(f"--config: {path} cannot be read as {path.suffix[1:].upper()} ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold a table of settings, given {type(content).__name__}.")
    return _flags(content)


def _flags(table: dict[str, Any], prefix: str = "") -> list[str]:
    flags = []
    for key, value in table.items():
        if isinstance(value, dict):
            flags += _flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{key}" if value else f"--{prefix}no-{key}")
        else:
            flags += [f"--{prefix}{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def next_run(name: str, folder: Path = Path("runs")) -> Path:
    """The first `folder/name-NUMBER` after those that exist."""
    taken = [int(m[1]) for p in folder.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    return folder / f"{name}-{max(taken, default=0) + 1}"


def represent(options: Represent) -> int:
    system = _trained(options.run)
    data = load(options.data, options.split).pixels(_binarized(options.run))
    z = system.represent(data.x, steps=options.steps)
    arrays = {"z": z, "y": data.y, "component": report.components_of(system, z)}
    out = options.out or options.run / f"representations-{data.name}-{options.split}.npz"
    np.savez(out, **{key: value.numpy() for key, value in arrays.items() if value is not None})
    print(f"{out}: z {list(z.shape)} of {data.name}, {options.split} ({data.source})")
    return 0


def sample(options: Sample) -> int:
    out = options.out or options.run / "samples.png"
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out takes a .png or .npz file, given {out}.")
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, given {options.n}.")
    system = _trained(options.run)
    chosen = {"components": options.component, "labels": options.label}
    chosen = {key: torch.full((options.n,), value) for key, value in chosen.items() if value is not None}
    images = system.sample(options.n, torch.Generator().manual_seed(options.seed), noise=options.noise, **chosen)
    if out.suffix == ".png":
        image_grid(images).savefig(out, dpi=150)
    else:
        np.savez(out, x=images.numpy())
    print(f"{out}: {options.n} images")
    return 0


def evaluate(options: Evaluate) -> int:
    system, train = _trained(options.run), training_data(options.run, options.data)
    try:
        test = load(options.data or train.name, "test").pixels(_binarized(options.run))
    except DataError as error:
        print(f"No test images: {error}", file=sys.stderr)
        test = None
    scores = report.evaluate(system, train, test)
    report.write_scores(scores, options.run / "scores.json")
    print(report.format_scores(scores))
    return 0


def explore(options: Explore) -> int:
    system, data = _trained(options.run), training_data(options.run, options.data)
    records = JsonLines(options.run / "metrics.jsonl").read()
    paths = report.write_pictures(system, data, records, options.run, f"{system.name} on {data.name}")
    print("\n".join(str(path) for path in paths))
    return 0


def training_data(run: Path, given: str | None = None) -> Data:
    """The rows that the system in `run` was trained on, by the name that the run keeps or by `given`."""
    kept = read_description(run).get("data")
    if kept is None:
        raise CheckpointError(f"{run} is a saved system, which does not name its training data; give a run directory.")
    data = load(given or kept["name"], kept["split"]).pixels(_binarized(run))
    if identity(data)["crc32"] != kept["crc32"]:
        raise ValueError(f"{data.name} ({data.source}) does not hold the rows that {run} was trained on; "
                         "give their name or path with --data.")
    return data


def catalogue() -> str:
    """The text of `latent-engine list`."""
    from .kernels import backend_matrix

    lines = ["presets", *(f"  {name:<14}{preset.description}" for name, preset in PRESETS.items()), "", "data"]
    for name in NAMES:
        sets = [load(name, split) for split in SPLITS]
        lines.append(f"  {name:<14}{' + '.join(str(len(s)) for s in sets)} images of "
                     f"{'×'.join(map(str, sets[0].x.shape[1:]))}, {sets[0].source}")
    return "\n".join([*lines, "", "ops", *(f"  {op}" for op in backend_matrix())])


def _trained(run: Path) -> DGD:
    if not (run / "config.json").exists():
        raise CheckpointError(f"No trained system in {run}: it has no config.json. "
                              "Give a run directory, or a folder that System.save wrote.")
    return load_system(run)


def _binarized(run: Path) -> bool:
    """Whether the training images were thresholded."""
    return read_description(run).get("data", {}).get("binarized", True)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but torch sees no CUDA device; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
