"""What representations tell about labels, from the command line: tables, files, pictures, and what cannot be asked."""

import csv
import json

import numpy as np
import pytest

from latent_engine import load_data, load_system
from latent_engine.cli import main
from latent_engine.probes import representation_probe
from latent_engine.report import represent

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SIZES = ["--clusters", "2", "5", "--labels", "10", "20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty images of two classes, the left or the right half is bright; with labels, without them, and of another size."""
    folder, y = tmp_path_factory.mktemp("data"), np.arange(60) % 2
    x = np.random.default_rng(0).random((60, 8, 8)) * 0.6
    x[y == 0, :, :4] += 0.4
    x[y == 1, :, 4:] += 0.4
    np.savez(folder / "halves.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    np.savez(folder / "unlabelled.npz", x_train=x[:40], x_test=x[40:])
    np.savez(folder / "untested.npz", x=x[:40], y=y[:40])
    np.savez(folder / "small.npz", x_train=x[:40, 2:6, 2:6], y_train=y[:40], x_test=x[40:, 2:6, 2:6], y_test=y[40:])
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of each name."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--hidden", "8", "--latent-dim", "3"]
    for name, preset, file, flags in (("vae", "vae", "halves", few), ("mae", "mae-mlp", "halves", [*few, "--batch-size", "20"]),
                                      ("dgd", "dgd", "halves", ["--components", "4"]), ("small", "vae", "small", few),
                                      ("unlabelled", "vae", "unlabelled", few)):
        assert main(["train", preset, "--data", str(data / f"{file}.npz"), "--run", str(folder / name), "--epochs", "30",
                     *flags]) == 0
    return folder


@pytest.mark.parametrize("name", ["mae", "dgd"])
def test_from_a_run_to_tables_and_pictures(name, data, runs, capsys):
    run = runs / name
    assert main(["evaluate", str(run), "--data", str(data / "halves.npz"), "--representation", *SIZES]) == 0
    text = capsys.readouterr().out
    content = json.loads((run / "representation.json").read_text())
    assert content["test_images"] == 20
    scores = content["scores"]
    system, (train, test) = load_system(run), (load_data(data / "halves.npz", s).pixels("threshold") for s in ("train", "test"))
    z = system.latents.z if name == "dgd" else represent(system, train.x)["z"]
    expected = representation_probe(z, train.y, queries=represent(system, test.x)["z"], query_labels=test.y, clusters=(2, 5),
                                    counts=(10, 20))
    assert scores == [score._asdict() for score in expected]
    assert scores[-1]["mean"] > 0.8 and scores[-1] == {**scores[-1], "size": 40, "deviation": None, "runs": 1}
    rows = list(csv.DictReader((run / "representation.csv").open(encoding="utf-8")))
    assert [(row["measure"], int(row["size"]), float(row["mean"])) for row in rows] == [
        (s["measure"], s["size"], s["mean"]) for s in scores]
    first = scores[0]
    assert f"{first['mean']:.3f} ± {first['deviation']:.3f}" in text and "adjusted Rand" in text
    assert (run / "representation.png").stat().st_size > 1000 and str(run / "representation.png") in text
    assert not (run / "scores.json").exists()


def test_reconstructions_beside_those_of_other_runs(data, runs, capsys):
    run, given = runs / "vae", ["--data", str(data / "halves.npz")]
    others = ["--compare", str(runs / "mae"), str(runs / "dgd")]
    assert main(["evaluate", str(run), *given, "--nll-samples", "5", *others]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "comparison.png")
    assert (run / "comparison.png").stat().st_size > 1000 and (run / "scores.json").exists()


def test_what_cannot_be_asked_is_said_before_any_work(data, runs, capsys):
    def failure(*flags, file="halves", run="vae"):
        capsys.readouterr()
        assert main(["evaluate", str(runs / run), "--data", str(data / f"{file}.npz"), *flags]) == 2
        return capsys.readouterr().err

    assert "judged by labels, and unlabelled (train) has none" in failure(
        "--representation", *SIZES, file="unlabelled", run="unlabelled")
    assert "judged on test images, and untested has none" in failure("--representation", *SIZES, file="untested")
    assert "number of labels must lie between 10 and 40, the number of labelled training rows, given 100; choose others " in (
        failure("--representation", "--clusters", "2"))
    assert "clusters must lie between 1 and 40, the number of labelled training rows, given 50" in failure(
        "--representation", "--clusters", "50")
    assert "--clusters and --labels are numbers for --representation: add it" in failure("--labels", "10")
    assert "--representation asks for no log p(x): leave --nll-samples out" in failure("--representation", "--nll-samples", "9")
    assert "takes floating-point x of shape [N, 1, 4, 4], given" in failure("--compare", str(runs / "small"))
    assert "No trained system in" in failure("--compare", str(runs / "nothing"))
    assert not (runs / "vae" / "representation.json").exists()
