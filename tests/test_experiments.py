"""The tables of docs/experiments.md are those of the committed results."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["iwae", "frey_faces", "gamma", "kappa", "two_stage", "mae", "natural_images", "vamp_prior"])
def test_the_page_shows_the_results(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "experiments")
    experiment, harness = importlib.import_module(name), importlib.import_module("harness")
    results = harness.read(ROOT / "docs" / "experiments" / f"{name}.json")
    assert results.keys() == experiment.SETTINGS.keys()
    assert experiment.table(results) in (ROOT / "docs" / "experiments.md").read_text()
