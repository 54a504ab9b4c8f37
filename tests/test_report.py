"""Evaluation of trained systems: every family has a table, files and pictures; the numbers are those of the diagnostics."""

import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latent_engine import PRESETS, TrainConfig, fit, load_data, report
from latent_engine.bounds import kl_to_normal
from latent_engine.cli import main
from latent_engine.diagnostics import log_likelihood
from latent_engine.systems.vae import VAE, VAEConfig

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SMALL = {"latent_dim": 2, "hidden": (16,), "top_dim": 3, "top_hidden": (8,), "components": 4, "capacity": 4, "samples": 8,
         "flow_blocks": 2, "flow_hidden": (16,), "ratio_hidden": (16,), "lower_dim": 3}


@pytest.fixture(scope="module")
def digits():
    """Training and test digits of 8×8 pixels, binary."""
    return tuple(dataclasses.replace(d, x=d.x[:n], y=d.y[:n]) for d, n in (
        (load_data("digits", "train").pixels(True), 120), (load_data("digits", "test").pixels(True), 60)))


def trained(preset, data, epochs=3, **settings):
    found = PRESETS[preset]
    sizes = {name: value for name, value in SMALL.items() if hasattr(found.config, name)} if preset != "dgd" else {}
    torch.manual_seed(0)
    system = found.system.for_data(dataclasses.replace(found.config, **{**sizes, **settings}), data)
    fit(system, data, TrainConfig(epochs=epochs, batch_size=20), progress=False)
    return system


def test_the_scores_are_those_of_the_diagnostics(digits):
    train, test = digits
    system = trained("vae", train, epochs=10)
    scores = report.evaluate(system, train, test, nll_samples=300)
    found = log_likelihood(system, test.x, 300, generator=torch.Generator().manual_seed(5))
    error = 3 * 2**0.5 * found.monte_carlo_error
    assert scores["nll"] == pytest.approx(-found.mean, abs=error) and scores["nll_low"] < scores["nll"] < scores["nll_high"]
    assert scores["negative_elbo"] == pytest.approx(scores["reconstruction"] + scores["kl"])
    assert scores["kl"] == pytest.approx(kl_to_normal(system.encode(test.x)).sum(1).mean().item(), rel=1e-5)
    assert scores["kl"] == pytest.approx(scores["mutual_information"] + scores["kl_aggregate"])
    assert scores["mutual_information"] <= scores["information_limit"] == pytest.approx(math.log(60))
    assert scores["mse"] == pytest.approx((test.x - system.reconstruct(test.x)).square().mean().item(), rel=1e-5)
    assert (scores["test_images"], scores["nll_samples"], scores["dimensions"]) == (60, 300, 2)
    assert "bits_per_dim" not in scores and scores["balance"]["verdict"] in report.format_scores(scores)


@pytest.mark.parametrize("preset", ["ae", "vae", "vae-2", "vae-mixture", "vae-gaussian", "vae-vamp", "vae-iaf", "hvae-vamp",
                                    "vae-iop", "iwae", "dgd"])
def test_every_family_has_a_table_and_pictures(preset, digits, tmp_path):
    train, test = digits
    system = trained(preset, train)
    scores = report.evaluate(system, train, test)
    assert 0 <= scores["test_knn"] <= 1 and ("nll" in scores) == (preset not in ("ae", "dgd"))
    assert all(math.isfinite(value) for name, value in scores.items() if name != "balance")
    report.write_scores(scores, tmp_path / "scores.json")
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept == scores
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8")))
    assert {row["score"]: float(row["value"]) for row in rows} == {k: v for k, v in scores.items() if k != "balance"}
    assert len(report.format_scores(scores).splitlines()) == len(scores)
    names = {path.name for path in report.write_evaluation(system, train, test, tmp_path)}
    expected = set() if preset == "dgd" else {"reconstructions.png", "traversals.png", "interpolations.png"}
    expected |= {"samples.png"} if "nll" in scores else set()
    expected |= {"manifold.png"} if preset in ("vae", "iwae", "vae-gaussian", "vae-iaf") else set()
    assert names == expected
    paths = report.write_pictures(system, train, [{"epoch": 1, "step": 6, "total": 2.0}], tmp_path, "title")
    assert {"space.png", "curves.png", "explorer.html"} <= {p.name for p in paths} and paths[-1].name == "explorer.html"
    assert all(path.stat().st_size > 500 for path in paths)


def test_a_posterior_with_a_flow_has_the_scores_that_need_no_gaussian(digits):
    system = trained("vae-iaf", digits[0])
    scores = report.evaluate(system, *digits, nll_samples=100)
    assert scores["nll"] < scores["negative_elbo"]
    assert not {"kl", "mutual_information", "mpd", "mmd2", "balance"} & scores.keys()
    assert set(report.represent(system, digits[0].x, None)) == {"z"}


def test_the_score_of_an_implicit_prior_says_what_is_missing_from_it(digits):
    system = trained("vae-iop", digits[0])
    with torch.no_grad():
        system.ratio[-1].bias += 3
    scores = report.evaluate(system, *digits, nll_samples=20)
    assert scores["log_mass"] == pytest.approx(3, abs=0.5)
    assert "too low by it, and no bounds" in report.format_scores(scores)


def test_bits_per_dimension_only_of_continuous_pixels_of_256_levels(digits):
    train, _ = digits
    x = (torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    levels = dataclasses.replace(train, x=x, y=None)
    torch.manual_seed(0)
    system = VAE.for_data(VAEConfig(latent_dim=2, hidden=(4,), likelihood="gaussian", gamma="fixed", variance=1 / 12), levels)
    scores = report.evaluate(system, levels, nll_samples=50)
    assert 8 < scores["bits_per_dim"] < 9 and scores["train_images"] == 40  # uniform noise has 8 bits, its Gaussian more
    assert "knn" not in scores
    between = dataclasses.replace(levels, x=levels.x * 0.99)
    assert "bits_per_dim" not in report.evaluate(system, between, nll_samples=50)


def test_few_rows_give_what_they_can(digits):
    train, test = digits
    system = trained("vae", train, latent_dim=3)
    one = dataclasses.replace(test, x=test.x[:1], y=test.y[:1])
    scores = report.evaluate(system, one)
    assert set(scores) == {"train_images", "mse", "dimensions"} and report.format_scores(scores)


def test_systems_without_a_family_or_a_likelihood(digits):
    train, _ = digits
    with pytest.raises(ValueError, match=r"no evaluation of a SimpleNamespace; there is of DGD, AE"):
        report.evaluate(SimpleNamespace(), train)
    with pytest.raises(ValueError, match=r"without posteriors has no log p\(x\): leave --nll-samples out"):
        report.evaluate(trained("ae", train, epochs=0), train, nll_samples=10)
    with pytest.raises(ValueError, match="A DGD has no encoder to draw importance samples from"):
        report.evaluate(trained("dgd", train, epochs=0), train, nll_samples=10)


def test_a_variational_autoencoder_from_training_to_pictures(tmp_path, capsys):
    data, run = tmp_path / "squares.npz", tmp_path / "run"
    x = np.random.default_rng(0).random((40, 6, 6)).astype(np.float32)
    np.savez(data, x_train=x, y_train=np.arange(40) % 2, x_test=x[:20], y_test=np.arange(20) % 2)
    given = ["--data", str(data)]
    assert main(["train", "vae", *given, "--run", str(run), "--latent-dim", "2", "--hidden", "8", "--epochs", "2"]) == 0
    assert main(["evaluate", str(run), *given, "--nll-samples", "30"]) == 0
    text = capsys.readouterr().out
    assert "−log p(x), importance-weighted" in text and "regularised: " in text and str(run / "manifold.png") in text
    assert json.loads((run / "scores.json").read_text())["nll_samples"] == 30
    assert (run / "scores.csv").read_text().startswith("score,value,text\ntest_images,20,")
    assert main(["represent", str(run), *given, "--out", str(run / "z.npz")]) == 0
    with np.load(run / "z.npz") as arrays:
        assert arrays["z"].shape == arrays["log_var"].shape == (20, 2) and arrays["y"].shape == (20,)
    assert main(["sample", str(run), "--n", "3", "--noise", "--out", str(run / "x.npz")]) == 0
    assert np.unique(np.load(run / "x.npz")["x"]).tolist() == [0, 1]
    assert main(["explore", str(run), *given]) == 0 and (run / "explorer.html").exists()
    capsys.readouterr()
    for arguments, message in ((["represent", *given, "--steps", "3"], "leave --steps out"),
                               (["sample", "--label", "1"], "leave them out for a VAE"),
                               (["evaluate", *given, "--nll-samples", "0"], "--nll-samples must be at least 1, given 0")):
        assert main([arguments[0], str(run), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err


def test_one_dimension_has_no_plane_to_explore(digits, tmp_path):
    train, test = digits
    system = trained("vae", train, latent_dim=1)
    assert {"reconstructions.png", "traversals.png"} <= {
        path.name for path in report.write_evaluation(system, train, test, tmp_path)}
    with pytest.raises(ValueError, match="D of at least 2"):
        report.write_pictures(system, train, [], tmp_path, "title")
