"""Learning rates that fall where the validation loss does not."""

import numpy as np
import pytest
import torch
from test_training_options import Centers, InTurn, points

from latent_engine import Data, TrainConfig, fit
from latent_engine.checkpoint import read_tensors
from latent_engine.validation import plateaus

ZEROS, ONES = Data(torch.zeros(2, 1, 1, 6)), Data(torch.ones(2, 1, 1, 6))
FALLING = {"batch_size": 2, "lr_patience": 2, "lr_decay": 0.5}


@pytest.mark.parametrize(("losses", "found"), [
    ([], 0), ([3, 2, 1, 0], 0), ([3, 3], 0), ([3, 3, 4], 1), ([3, 4, 2, 5, 1], 0), ([3, 4, 5, 6, 7], 2),
    ([3, 4, 5, 6, 2, 9], 1), ([3, 4, 5, 6, 2, 9, 2], 2)])
def test_a_plateau_is_two_losses_no_lower_than_the_lowest_before_them(losses, found):
    assert plateaus(losses, 2) == found


def run(kind, epochs, folder, resume=False):
    """Points that start at 1 are drawn to 0 and leave the rows to validate on behind; after each step, `[epochs, 2]`."""
    system = kind()
    with torch.no_grad():
        system.near.at.fill_(1)
        system.far.at.fill_(1)
    fit(system, ZEROS, TrainConfig(epochs=epochs, **FALLING), validation=ONES, run_dir=folder, resume=resume, progress=False)
    weights = read_tensors(folder / f"step_{epochs:06d}" / "model.safetensors")
    return [weights[f"{name}.at"].double().numpy() for name in ("near", "far")]


def test_every_learning_rate_falls_at_a_plateau_and_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    found = run(Centers, 8, tmp_path / "whole")
    for point, lr in zip(found, (0.1, 0.4), strict=True):
        assert np.allclose(point, np.prod(1 - lr * np.array([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125])), rtol=1e-5)
    run(Centers, 4, tmp_path / "cut")
    assert np.array_equal(run(Centers, 8, tmp_path / "cut", resume=True), found)


def test_a_phase_waits_for_plateaus_of_its_own(tmp_path):
    near, far = run(InTurn, 8, tmp_path)
    assert np.allclose(near, np.prod(1 - 0.1 * np.array([1, 1, 1])), rtol=1e-5)
    assert np.allclose(far, np.prod(1 - 0.4 * np.array([1, 1, 1, 0.5, 0.5])), rtol=1e-5)


def test_settings_that_contradict_each_other_are_refused():
    for options in ({"lr_patience": 3}, {"lr_patience": 3, "lr_decay": 0.5, "lr_stage_epochs": 2},
                    {"lr_patience": 3, "lr_decay": 0.5, "lr_stage_growth": 2}):
        with pytest.raises(ValueError, match="lr_patience needs an lr_decay other than 1, and takes the place of"):
            TrainConfig(**options)
    with pytest.raises(ValueError, match="lr_patience must be at least 1, given 0"):
        TrainConfig(lr_patience=0, lr_decay=0.5)
    system = Centers()
    with pytest.raises(ValueError, match="lr_patience needs rows to validate on"):
        fit(system, ZEROS, TrainConfig(**FALLING), progress=False)
    assert (points(system) == 0).all()
