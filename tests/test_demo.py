"""What `make demo` runs, in small."""

import json

import pytest

from latent_engine import demo

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_demo_trains_shows_its_numbers_and_names_its_files(tmp_path, capsys):
    (tmp_path / "dgd-1").mkdir()
    assert demo.main(["--epochs", "1", "--runs", str(tmp_path), "--no-bench"]) == 0
    text, run = capsys.readouterr().out, tmp_path / "dgd-2"
    assert text.rstrip().endswith(str(run))
    for expected in ("5000 + 1000 digits", "MNIST", "per_sample", "log_px_z", "purity", "Rand", "10-NN", "epoch time"):
        assert expected in text
    assert json.loads((run / "config.json").read_text())["arguments"]["config"]["prior_count"] == "per_sample"
    for name in ("sheet.png", "space.png", "samples.png", "components.png", "curves.png", "explorer.html"):
        assert (run / name).stat().st_size > 5000 and name in text
    scores = json.loads((run / "scores.json").read_text())
    assert scores["test_nll"] < 1.2 * scores["mean_image_nll"]
