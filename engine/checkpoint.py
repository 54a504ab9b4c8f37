"""Files of a trained system and of a training run: safetensors and JSON only, written so that a crash loses nothing.

    saved system     config.json  model.safetensors
    run directory    config.json  env.json  metrics.jsonl  latest  step_000157/{model,state}.safetensors, meta.json

`latest` names the newest complete step. A file appears under its name only when all of it is on disk; so does the
folder of a step, and only then `latest` moves on and the step before is deleted. The `meta.json` of a step says which
"weights" its model has: "trained", or their average "ema", beside which state.safetensors keeps the trained ones. Where
there is validation it also names the "best" step so far, whose folder stays and is what is loaded.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .logs import JsonLines, writing

FORMAT = 1


class CheckpointError(RuntimeError):
    """A saved system or a run directory cannot be read, or does not belong to the run that asks for it."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The epoch of the lowest validation loss."""

    step: int
    epoch: int
    score: float


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write what becomes `path` in one piece: whoever looks sees the old content or all of the new.

    Raises:
        OSError: it cannot be written, with the path and the reason as message; what was there is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """`content` as the file `path`, in one piece; errors as `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file, which must have `keys`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {' and no '.join(missing)}.")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """From where they are, without a copy in memory."""
    with replacing(path) as partial:
        try:
            safetensors.torch.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); expected a complete safetensors file.") from error


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from what `dataclasses.asdict` and JSON made of it: nested dataclasses, lists for tuples."""
    hints = typing.get_type_hints(cls)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise CheckpointError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(hints)}.")

    def convert(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: convert(hints[name], value) for name, value in values.items()})


def save_system(folder: str | os.PathLike[str], system: nn.Module) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", system.state_dict())
    write_json(folder / "config.json", {"format": FORMAT, **describe(system)})


def describe(system: nn.Module) -> dict:
    """What `config.json` says of a system: its name and the arguments that build it again."""
    return {"system": system.name, "arguments": plain(system.arguments())}


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: dataclasses as dicts, tuples as lists."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def read_description(folder: str | os.PathLike[str]) -> dict:
    """`config.json` of a saved system or a run directory."""
    path = Path(folder) / "config.json"
    config = read_json(path, "format", "system", "arguments")
    if config["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {config['format']}; this version of Latent Engine reads {FORMAT}.")
    return config


def load_weights(folder: str | os.PathLike[str], system: nn.Module) -> None:
    """Reads the weights of a saved system, or of the `chosen_step` of a run directory, into `system`."""
    folder = Path(folder)
    path = (chosen_step(folder) if "train" in read_description(folder) else folder) / "model.safetensors"
    load_state(system, read_tensors(path), path)


def weights_note(folder: str | os.PathLike[str]) -> str:
    """Which weights `load_weights` takes from a run directory that has more than one kind of them; else ""."""
    folder = Path(folder)
    if "train" not in read_description(folder):
        return ""
    meta, best = _read_meta(chosen_step(folder))
    notes = [f"the best on validation (loss {best.score:.6g})"] if best else []
    notes += ["averaged (EMA)"] if meta.get("weights") == "ema" else []
    return ", ".join([f"epoch {meta['epoch']}", *notes]) if notes else ""


def load_state(system: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        system.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the system: {error}") from error


def latest_step(run: Path) -> Path:
    """The folder of the newest complete step of a run directory."""
    try:
        name = (run / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        steps = ", ".join(sorted(p.name for p in _steps(run))) or "none"
        raise CheckpointError(f"{run / 'latest'} cannot be read ({error}); expected the name of a step folder. "
                              f"Those that are there: {steps}.") from error
    if not name.startswith("step_") or not (run / name).is_dir():
        raise CheckpointError(f"{run / 'latest'} names {name!r}, which is not a step folder of {run}.")
    return run / name


def chosen_step(run: Path) -> Path:
    """The folder of the best step of a run directory on validation, or of the newest where there is none."""
    latest = latest_step(run)
    best = _read_meta(latest)[1]
    return latest if best is None else _step_folder(run, best.step)


class RunDirectory:
    """One training run on disk.

    Args:
        path: an empty or missing folder for a new run; the folder of the same run to resume it.
        config: what the run is made of; a resumed run must have the same, but for the number of epochs.
        resume: whether to continue the run that the folder holds.

    Raises:
        CheckpointError: the folder cannot be written, holds something else, holds a run and `resume` is false, or
            holds a run with another configuration. Nothing in it has been touched.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict, resume: bool = False) -> None:
        self.path = Path(path).absolute()
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        config = plain({"format": FORMAT, **config})
        if self._holds_run():
            if not resume:
                raise CheckpointError(f"{self.path} already holds a run. Resume it (resume=True, --resume), "
                                      "or choose another folder.")
            self._check_same(read_description(self.path), config)
        self._prepare()
        if not (self.path / "env.json").exists():
            write_json(self.path / "env.json", environment())
        self._config = config
        if not self.has_checkpoint():
            write_json(self.path / "config.json", config)

    def has_checkpoint(self) -> bool:
        """Whether a step has been saved: always, but for a run that was killed while it started."""
        return (self.path / "latest").exists() or any(p.name != "step_000000" for p in _steps(self.path))

    def save(self, step: int, epoch: int, system: nn.Module, optimizers: dict[str, torch.optim.Optimizer],
             average: dict[str, Tensor] | None = None, best: Best | None = None) -> None:
        """Writes the step and points `latest` to it; then the older steps are deleted, but for the best.

        `average` has the averages of parameters by name: they are what the model of the step holds.
        """
        folder = _step_folder(self.path, step)
        weights, average = system.state_dict(), average or {}
        state = optimizer_tensors(system, optimizers) | {f"trained.{name}": weights[name] for name in average}
        meta = {"format": FORMAT, "step": step, "epoch": epoch, "weights": "ema" if average else "trained"}
        if best is not None:
            meta["best"] = dataclasses.asdict(best)
        partial = folder.with_suffix(".partial")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir()
            write_tensors(partial / "model.safetensors", weights | average)
            write_tensors(partial / "state.safetensors", state)
            write_json(partial / "meta.json", meta)
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        write_file(self.path / "latest", f"{folder.name}\n".encode())
        kept = {folder} if best is None else {folder, _step_folder(self.path, best.step)}
        for old in self.path.glob("step_*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def restore(self, system: nn.Module, optimizers: dict[str, torch.optim.Optimizer],
                average: dict[str, Tensor] | None = None) -> tuple[int, int, Best | None, dict[str, Tensor]]:
        """Reads the latest step into all of them and returns its step and epoch, and the best one so far with its weights.

        Records of later epochs leave `metrics.jsonl`.
        """
        folder = latest_step(self.path)
        meta, best = _read_meta(folder)
        if self._config["train"]["epochs"] < meta["epoch"]:
            raise CheckpointError(f"{self.path} has {meta['epoch']} epochs already, and {self._config['train']['epochs']} in "
                                  "all were asked for. Resume with at least as many as it has.")
        weights, state = (read_tensors(folder / f"{kind}.safetensors") for kind in ("model", "state"))
        best_weights = read_tensors(_step_folder(self.path, best.step) / "model.safetensors") if best else {}
        trained = {name: state.pop(f"trained.{name}", None) for name in average or {}}
        if any(tensor is None for tensor in trained.values()):
            raise CheckpointError(f"{folder / 'state.safetensors'} is damaged: it lacks weights beside their average.")
        load_optimizer_tensors(system, optimizers, state, folder / "state.safetensors")
        load_state(system, weights, folder / "model.safetensors")
        for name in trained:
            average[name].copy_(weights[name])
        load_state(system, weights | trained, folder / "state.safetensors")
        kept = [r for r in self.metrics.read() if r["epoch"] <= meta["epoch"]]
        write_file(self.metrics.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        write_json(self.path / "config.json", self._config)
        return meta["step"], meta["epoch"], best, best_weights

    def _holds_run(self) -> bool:
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; a run needs a folder of its own.")
        if (self.path / "config.json").exists():
            read_description(self.path)
            return True
        found = sorted(p.name for p in self.path.iterdir() if not p.name.endswith(".partial") and p.name != "env.json")
        if found:
            raise CheckpointError(f"{self.path} is not a run directory: it holds {', '.join(found[:3])}"
                                  f"{', ...' if len(found) > 3 else ''} but no config.json. "
                                  "Choose an empty or new folder.")
        return False

    def _prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe.partial"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"The run directory {self.path} cannot be written ({error}). "
                                  "Choose another folder.") from error

    def _check_same(self, stored: dict, given: dict) -> None:
        stored, given = _flat(stored), _flat(given)
        keys = sorted((stored.keys() | given.keys()) - {"train.epochs"})
        pairs = [(key, stored.get(key, "absent"), given.get(key, "absent")) for key in keys]
        differ = [f"{key}: {there!r} there, {here!r} given" for key, there, here in pairs if there != here]
        if len(differ) > 5:
            differ[5:] = [f"and {len(differ) - 5} more"]
        if differ:
            raise CheckpointError(f"The run in {self.path} has another configuration ({'; '.join(differ)}). "
                                  "Resume it with the same, or choose another folder.")


def optimizer_tensors(system: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State of each child's optimizer as `optim.<child>.<parameter>:<key>`."""
    return {f"optim.{child}.{name}:{key}": value
            for child, optimizer in optimizers.items()
            for name, param in system.get_submodule(child).named_parameters()
            for key, value in optimizer.state.get(param, {}).items()}


def load_optimizer_tensors(system: nn.Module, optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor],
                           path: Path) -> None:
    """The inverse of `optimizer_tensors`; `path` is named in errors."""
    params = {f"optim.{child}.{name}": (optimizer, param) for child, optimizer in optimizers.items()
              for name, param in system.get_submodule(child).named_parameters()}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in params:
            raise CheckpointError(f"{path} holds {full_name}, which no optimizer of this system has.")
        optimizer, param = params[name]
        own = optimizer.state[param].get(key)
        if own is not None and own.numel() == value.numel():
            own.copy_(value.reshape(own.shape))
            continue
        # Fused optimizers read state and parameter by the same strides; a file has none.
        like = torch.empty_like(param) if value.shape == param.shape else torch.empty_like(value, device=param.device)
        optimizer.state[param][key] = like.copy_(value)


def environment() -> dict[str, object]:
    """Versions and machine, for `env.json`: the same bits are promised on the same of these."""
    from . import __version__

    return {"latent_engine": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(), "machine": platform.machine(),
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None}


def _read_meta(folder: Path) -> tuple[dict, Best | None]:
    meta = read_json(folder / "meta.json", "step", "epoch")
    try:
        return meta, Best(**meta["best"]) if "best" in meta else None
    except TypeError as error:
        raise CheckpointError(f"{folder / 'meta.json'} is damaged: its best step is {meta['best']!r}.") from error


def _step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def _steps(run: Path) -> list[Path]:
    """The folders of the complete steps of a run directory."""
    return [p for p in run.glob("step_*") if p.suffix != ".partial"]


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
