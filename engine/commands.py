"""What the verbs of the command line do; `cli` parses them."""

import argparse
import io
import json
import os
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
from torch import Tensor

from . import report, representation
from .bounds import reparametrize
from .checkpoint import CheckpointError, read_description, weights_note, write_file
from .cli import Evaluate, Explore, Represent, Sample, did_you_mean, fail
from .data import NAMES, SPLITS, Binarization, Data, DataError, load
from .diagnostics import encode
from .figures import image_grid, write_png
from .logs import JsonLines
from .mixtures import GaussianMixture, fit_mixture
from .system import System
from .systems import PRESETS, load_system
from .systems.ae import AE
from .systems.dgd import DGD
from .systems.vae import VAE
from .trainer import TrainConfig, fit, identity

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Train(Generic[_Config]):
    """Train a system. A --config file has the flags' names as keys and tables (optim.decoder.lr); flags override it."""

    model: Annotated[_Config, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    data: str = "mnist5k"
    """Name or path of the training data."""
    binarize: Binarization = "threshold"
    """Pixels as they are; 1 above 0.5, else 0; zeros and ones drawn once, or anew at each step."""
    run: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: the first free runs/PRESET-NUMBER)")] = None
    """Run directory."""
    resume: bool = False
    """Continue the run in --run; its settings must be given again, but for the number of epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    config: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")] = None
    """TOML or JSON file with settings."""


def train(rest: list[str]) -> int:
    """`latent-engine train PRESET [--config FILE] [flags]`."""
    names = "\n".join(f"  {name:<14}{preset.description}" for name, preset in PRESETS.items())
    if rest[:1] in (["-h"], ["--help"]):
        print(f"usage: latent-engine train PRESET [OPTIONS]\n\n{names}\n\n"
              "latent-engine train PRESET --help for its options.")
        return 0
    if not rest or rest[0].startswith("-"):
        return fail(f"train needs a preset first; the presets are {', '.join(PRESETS)}.")
    name, *flags = rest
    if name not in PRESETS:
        hint = did_you_mean(name, list(PRESETS))
        return fail(f"unknown preset {name!r}{hint}; the presets are {', '.join(PRESETS)}.")
    options = parse_train(name, flags)
    if options.resume and options.run is None:
        raise ValueError("--resume needs --run, the run directory to continue.")
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
    prog = f"latent-engine train {preset}"
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file = parser.parse_known_args(flags)[0].config
    if file is not None:
        try:
            # Without the conversion of flags, a boolean takes a value, and one that is not boolean is named in the error.
            options = tyro.cli(tyro.conf.FlagConversionOff[kind], default=options, args=file_as_flags(file), prog=prog)
        except SystemExit:
            raise ValueError(f"--config: {file} has a setting that does not fit, see above.") from None
    return tyro.cli(kind, default=options, args=flags, prog=prog)


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
        else:
            flags += [f"--{prefix}{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def next_run(name: str, folder: Path = Path("runs")) -> Path:
    """The first `folder/name-NUMBER` after those that exist."""
    taken = [int(m[1]) for p in folder.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    return folder / f"{name}-{max(taken, default=0) + 1}"


def represent(options: Represent) -> int:
    system, data = _trained(options.run), _load(options.run, options.data, options.split)
    out = _writable(options.out or options.run / f"representations-{data.name}-{options.split}.npz", ".npz")
    if options.steps is not None and options.steps < 0:
        raise ValueError(f"--steps must be at least 0, given {options.steps}.")
    arrays = report.represent(system, data.x, options.steps)
    _write_npz(out, arrays if data.y is None else {**arrays, "y": data.y})
    print(f"{out}: z {list(arrays['z'].shape)} of {data.name}, {options.split} ({data.source})")
    return 0


def sample(options: Sample) -> int:
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, given {options.n}.")
    system = _trained(options.run)
    out = _writable(options.out or options.run / "samples.png", ".png", ".npz")
    chosen = {"components": options.component, "labels": options.label}
    chosen = {key: torch.full((options.n,), value) for key, value in chosen.items() if value is not None}
    if chosen and not isinstance(system, DGD):
        raise ValueError("--component and --label choose among the components of a DGD's prior; "
                         f"leave them out for a {type(system).__name__}.")
    generator = torch.Generator().manual_seed(options.seed)
    if options.mixture is not None:
        chosen["prior"] = _fitted_prior(system, options, generator)
    elif options.covariance is not None or options.data is not None:
        raise ValueError("--covariance and --data are of the mixture that --mixture asks for.")
    images = system.sample(options.n, generator, noise=options.noise, **chosen)
    if out.suffix == ".png":
        write_png(out, image_grid(images))
    else:
        _write_npz(out, {"x": images})
    print(f"{out}: {options.n} images")
    return 0


def _fitted_prior(system: System, options: Sample, generator: torch.Generator) -> GaussianMixture:
    """A mixture fitted to a representation of each training image: of a model with posteriors to one draw of each."""
    if not isinstance(system, AE):
        raise ValueError(f"--mixture is for models with an encoder; a {type(system).__name__} has a prior that was trained.")
    x = training_data(options.run, options.data).x
    if isinstance(system, VAE):
        z = reparametrize(encode(system, x), 1, generator)[0]
    else:
        z = torch.cat([system.represent(rows) for rows in x.split(1000)])
    fit = fit_mixture(z, options.mixture, options.covariance or "full", generator=generator)
    end = "converged" if fit.converged else "not converged"
    print(f"Mixture: {fit.log_likelihood:.4g} nats a representation after {fit.iterations} iterations, {end}", file=sys.stderr)
    return fit.mixture


def evaluate(options: Evaluate) -> int:
    if options.nll_samples is not None and options.nll_samples < 1:
        raise ValueError(f"--nll-samples must be at least 1, given {options.nll_samples}.")
    if options.representation and options.nll_samples is not None:
        raise ValueError("--representation asks for no log p(x): leave --nll-samples out.")
    if not options.representation and (options.clusters or options.labels):
        raise ValueError("--clusters and --labels are numbers for --representation: add it, or leave them out.")
    system, train = _trained(options.run), training_data(options.run, options.data)
    others = {str(run): _trained(run) for run in options.compare}
    for other in others.values():
        other.check_rows(train.x)
    try:
        test = _load(options.run, options.data, "test")
    except DataError as error:
        print(f"No test images: {error}", file=sys.stderr)
        test = None
    if options.representation:
        scores, z = representation.evaluate(system, train, test, clusters=options.clusters or representation.CLUSTERS,
                                            labels=options.labels or representation.LABELS)
        print(representation.format_scores(scores))
        paths = representation.write(scores, z, test, options.run)
    else:
        scores = report.evaluate(system, train, test, nll_samples=options.nll_samples)
        report.write_scores(scores, options.run / "scores.json")
        print(report.format_scores(scores))
        paths = report.write_evaluation(system, train, test, options.run)
    if others:
        paths.append(report.write_comparison({str(options.run): system, **others}, (test or train).x, options.run))
    for path in paths:
        print(path)
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
    data = _load(run, given, kept["split"])
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


def _trained(run: Path) -> System:
    if not (run / "config.json").exists():
        raise CheckpointError(f"No trained system in {run}: it has no config.json. "
                              "Give a run directory, or a folder that System.save wrote.")
    system, note = load_system(run), weights_note(run)
    if note:
        print(f"Weights: {note}", file=sys.stderr)
    return system


def _load(run: Path, given: str | None, split: str) -> Data:
    """Data by the name `given`, or that of the training data of `run`, binarised as they were; dynamically is by one draw."""
    kept = read_description(run).get("data", {"name": "mnist5k", "binarized": "threshold"})
    try:
        return load(given or kept["name"], split).pixels(kept["binarized"]).fixed()
    except DataError as error:
        if given is not None:
            raise
        raise DataError(f"{error} {run} keeps the name {kept['name']!r} only: give a path with --data.") from None


def _writable(out: Path, *suffixes: str) -> Path:
    """`out`, or an error before the work is done."""
    if out.suffix not in suffixes:
        raise ValueError(f"--out takes a {' or '.join(suffixes)} file, given {out}.")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written. Give a file in a folder that is there and not read-only.")
    return out


def _write_npz(path: Path, arrays: dict[str, Tensor]) -> None:
    file = io.BytesIO()
    np.savez(file, **{key: value.numpy() for key, value in arrays.items()})
    write_file(path, file.getvalue())


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but torch sees no CUDA device; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
