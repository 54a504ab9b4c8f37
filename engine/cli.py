"""usage: latent-engine VERB [OPTIONS]

  train PRESET       train a system; flags override a --config file, which overrides the preset
  represent RUN      representations of images under a trained model, to an .npz
  sample RUN         new images, to a .png or .npz
  evaluate RUN       likelihood, reconstruction, use of the representation space, k-NN accuracy; what representations tell
                     about labels (--representation); reconstructions beside those of other runs (--compare)
  explore RUN        pictures and an HTML page to look around in the representation space
  list               the presets, data sets and ops
  doctor             versions, native libraries, and which backend serves which op
  bench              time the ops against their peers

  latent-engine VERB --help for the options of a verb; --version for the version.
"""

# torch takes a second to import: this module, which parses verbs and their flags, does without it.
import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import __version__
from .extras import MissingExtraError


def _default(text: str) -> object:
    """What the help says in place of "(default: None)"."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


_TrainedOn = Annotated[str | None, _default("the name that the run keeps of its training data")]


@dataclass(frozen=True)
class Represent:
    """Representations of images under a trained model, written as an .npz with z, and y, component or log_var if known.

    They are MAP estimates, or the encoder's, with posteriors their means.
    """

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder written by System.save."""
    data: _TrainedOn = None
    """Name or path of the images."""
    split: Literal["train", "test"] = "test"
    steps: Annotated[int | None, _default("20")] = None
    """Gradient steps of the inference, for models without an encoder."""
    out: Annotated[Path | None, _default("RUN/representations-DATA-SPLIT.npz")] = None
    """The .npz file to write."""


@dataclass(frozen=True)
class Sample:
    """New images from a trained model, written as one picture (.png) or as arrays (.npz)."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder written by System.save."""
    n: int = 100
    component: Annotated[int | None, _default("any")] = None
    """Sample from this component of the prior only."""
    label: Annotated[int | None, _default("any")] = None
    """Sample from the components of this class only (labelled models)."""
    mixture: Annotated[int | None, _default("the model's own prior")] = None
    """Sample z from a mixture of this many Gaussians, fitted to the representations of the training images (autoencoders)."""
    covariance: Annotated[Literal["full", "diagonal", "tied", "spherical"] | None, _default("full")] = None
    """Covariances of the mixture."""
    data: _TrainedOn = None
    """Name or path of the data that the model was trained on, for the mixture."""
    noise: bool = False
    """Draw from p(x | z) instead of showing its mean."""
    seed: int = 0
    out: Annotated[Path | None, _default("RUN/samples.png")] = None
    """The .png or .npz file to write."""


@dataclass(frozen=True)
class Evaluate:
    """Likelihood, reconstruction, use of the representation space and k-NN accuracy of a trained model, on its test images.

    Printed, and written to RUN/scores.json and RUN/scores.csv; for models with an encoder also pictures into RUN. With
    --representation what representations tell about labels instead, into RUN/representation.json, .csv and .png.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: _TrainedOn = None
    """Name or path of the data that the model was trained on."""
    nll_samples: Annotated[int | None, _default("1000")] = None
    """Importance samples of log p(x) for each image, for models with an encoder that gives posteriors."""
    representation: bool = False
    """Clusters, k-NN and linear classifiers of representations, fitted to training images and judged on test images."""
    clusters: Annotated[tuple[int, ...] | None, _default("10 20 30")] = None
    """Numbers of clusters that k-means looks for, with --representation."""
    labels: Annotated[tuple[int, ...] | None, _default("100 1000")] = None
    """Numbers of labels that classifiers learn from before they are given all of them, with --representation."""
    compare: Annotated[tuple[Path, ...], _default("none")] = ()
    """Other runs: test images beside their reconstructions by RUN and these, into RUN/comparison.png."""


@dataclass(frozen=True)
class Explore:
    """Pictures of a trained model and an HTML page to look around in its representation space, written into RUN."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: _TrainedOn = None
    """Name or path of the data that the model was trained on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 for a mistake in it or in its files, 130 for Ctrl-C."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(__doc__.rstrip())
        return 0
    if verb == "--version":
        print(f"latent-engine {__version__}")
        return 0
    if verb not in VERBS:
        return fail(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; the verbs are {', '.join(VERBS)}.")
    try:
        return VERBS[verb](rest)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # --help, or flags that do not parse: the message is already out
        return stop.code if isinstance(stop.code, int) else 2
    except OSError as error:
        return fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))
    except (ValueError, FloatingPointError, MissingExtraError) as error:
        return fail(str(error))
    except RuntimeError as error:
        if type(error) is RuntimeError:
            raise
        return fail(str(error))  # CheckpointError, BackendError


def fail(message: str) -> int:
    print(f"latent-engine: {message}", file=sys.stderr)
    return 2


def did_you_mean(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _with_flags(command: type) -> Callable[[list[str]], int]:
    def run(rest: list[str]) -> int:
        options = tyro.cli(command, args=rest, prog=f"latent-engine {command.__name__.lower()}")
        from . import commands

        return getattr(commands, command.__name__.lower())(options)

    return run


def _train(rest: list[str]) -> int:
    from .commands import train

    return train(rest)


def _without_flags(verb: str, description: str) -> Callable[[list[str]], int]:
    def run(rest: list[str]) -> int:
        argparse.ArgumentParser(prog=f"latent-engine {verb}", description=description).parse_args(rest)
        if verb == "doctor":
            from .doctor import report

            print(report())
        else:
            from .commands import catalogue

            print(catalogue())
        return 0

    return run


def _bench(rest: list[str]) -> int:
    from .bench.__main__ import main as bench

    return bench(rest)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "represent": _with_flags(Represent),
    "sample": _with_flags(Sample),
    "evaluate": _with_flags(Evaluate),
    "explore": _with_flags(Explore),
    "list": _without_flags("list", "The presets, data sets and ops."),
    "doctor": _without_flags("doctor", "Versions, native libraries, and which backend serves which op."),
    "bench": _bench,
}
