"""The training loop: interrupted runs end with the same bits, phases step whom they name, records say what happened."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from latent_engine import DGD, Data, DGDConfig, OptimizerConfig, Phase, System, TrainConfig, fit
from latent_engine.checkpoint import read_tensors


@pytest.fixture
def data():
    return Data(torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round())


def new(data):
    torch.manual_seed(0)
    return DGD.for_data(DGDConfig(components=3), data)


# A DGD whose decoder and pixels draw random numbers, with averaged weights, in short epochs: every kind of state there is.
RUN = """
    import sys
    import torch
    from torch import nn
    from latent_engine import DGD, Data, DGDConfig, TrainConfig, fit

    torch.set_num_threads(1)
    data = Data(torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))).pixels("dynamic")
    torch.manual_seed(int(sys.argv[2]))
    decoder = nn.Sequential(nn.Linear(2, 30), nn.Dropout(0.5), nn.Linear(30, 16), nn.Unflatten(1, (1, 4, 4)))
    system = DGD(DGDConfig(components=3), 50, (1, 4, 4), decoder)
    config = TrainConfig(epochs=12, batch_size=8, seed=5, clip_norm=100.0, ema_decay=0.9, lr_stage_epochs=4, lr_decay=0.5)
    fit(system, data, config, run_dir=sys.argv[1], resume=True, progress=False)
"""


def start(run, seed=0):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(RUN), str(run), str(seed)], stderr=subprocess.PIPE)


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(run).wait() == 0
    return run


def test_an_interrupted_run_ends_with_the_same_bits(uninterrupted, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    for attempt, kill in enumerate([signal.SIGKILL, signal.SIGINT]):
        process = start(run, seed=attempt)  # what is resumed starts from other weights, which must not matter
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3 * attempt + 3):
            time.sleep(0.001)
        process.send_signal(kill)
        assert process.wait() != 0, "the run ended before it was interrupted"
    assert len(records(run)) < 12
    assert start(run, seed=9).wait() == 0
    name = (run / "latest").read_text().strip()
    assert name == (uninterrupted / "latest").read_text().strip() == "step_000084"
    for file in ("model.safetensors", "state.safetensors"):
        found, expected = (read_tensors(r / name / file) for r in (run, uninterrupted))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert records(run) == records(uninterrupted)
    assert {"optim.latents.h:velocity", "optim.prior.means:exp_avg", "trained.latents.h"} < expected.keys()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(data):
    systems = [new(data) for _ in range(3)]
    for system, seed in zip(systems, (0, 0, 1), strict=True):
        fit(system, data, TrainConfig(epochs=2, seed=seed), progress=False)
    first, second, third = (system.latents.z for system in systems)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_records_are_means_over_the_rows(data):
    """With learning rates of zero every batch sees the same model, so the mean over batches is that over the data."""
    config = DGDConfig(components=3)
    still = {child: OptimizerConfig("sgd" if child != "latents" else "row_sgd", lr=0.0) for child in
             ("decoder", "latents", "prior")}
    system = DGD.for_data(DGDConfig(components=3, optim=type(config.optim)(**still)), data)
    (record,) = fit(system, data, TrainConfig(epochs=1, batch_size=7), progress=False)
    z = system.latents.z
    expected = system.log_joint(data.x, z).mean() + system.prior.log_prior() / 50
    assert record["total"] == pytest.approx(-expected.item(), rel=1e-5)
    assert (record["epoch"], record["step"]) == (1, 8)


class Optim:
    mover = OptimizerConfig("sgd", lr=0.1)
    chaser = OptimizerConfig("sgd", lr=0.5)


class Pursuit(System):
    """Two players with losses of their own: `mover` flees from `chaser`, which is called in both phases."""

    class config:
        optim = Optim

    def __init__(self):
        super().__init__()
        self.mover, self.chaser = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.seen = []

    def phases(self):
        return Phase("chase", ("chaser",), repeat=2), Phase("flee", ("mover",), every=3)

    def loss(self, batch, phase):
        self.seen.append((phase, [p.requires_grad for p in self.parameters()], batch.index.tolist()))
        distance = (self.mover.weight - self.chaser.weight).square().sum()
        return {"total": distance if phase == "chase" else -distance, "distance": distance}


def test_each_phase_steps_the_children_it_names_and_no_others(data):
    system = Pursuit()
    (record,) = fit(system, data, TrainConfig(epochs=1, batch_size=10), progress=False)
    # Five batches, two a step of the first phase, so three steps; the second phase runs on the first of them.
    assert [(phase, grads) for phase, grads, _ in system.seen] == [
        ("chase", [False, True]), ("chase", [False, True]), ("flee", [True, False]),
        *[("chase", [False, True])] * 4]
    rows = [row for phase, _, index in system.seen if phase == "chase" for row in index]
    assert set(rows) == set(range(50))
    assert {"chase/total", "chase/distance", "flee/total", "flee/distance"} < record.keys()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path):
    optim = type(DGDConfig().optim)(decoder=OptimizerConfig("sgd", lr=1e30))
    with pytest.raises(FloatingPointError, match=r"epoch 1 is not finite \(.*nan.*Lower a learning rate"):
        fit(DGD.for_data(DGDConfig(optim=optim), data), data, run_dir=tmp_path, progress=False)
    assert (tmp_path / "latest").read_text() == "step_000000\n"
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "step_000000" / "model.safetensors").values())


def test_without_a_terminal_progress_is_plain_lines(data, capsys):
    fit(new(data), data, TrainConfig(epochs=3))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("epoch 3/3 ") and "log_px_z" in lines[0]


@pytest.mark.parametrize(("settings", "words"), [
    ({"epochs": -1}, "epochs must be at least 0, given -1"), ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"seed": 2**64}, "seed must be less than"),
])
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


@pytest.mark.parametrize(("settings", "words"), [
    ({"lr": -1.0}, r"lr .* at least 0 and finite, given -1\.0"), ({"lr": float("nan")}, "lr .* given nan"),
    ({"lr": 0.1, "momentum": -0.5}, "momentum .* given -0.5"), ({"lr": 0.1, "betas": (0.9, 1.0)}, r"betas .* \[0, 1\)"),
])
def test_optimizer_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig("adam", **settings)


@pytest.mark.parametrize(("child", "given", "words"), [
    ("latents", "adam", "must be row_adam or .* or row_sgd, .* those of rows; given 'adam'"),
    ("decoder", "row_sgd", "must be adam or sgd, .* dense; given 'row_sgd'")])
def test_optimizers_that_do_not_fit_the_gradients_are_refused_before_training(child, given, words, data, tmp_path):
    optim = replace(DGDConfig().optim, **{child: OptimizerConfig(given, lr=0.1)})
    with pytest.raises(ValueError, match=rf"optim\.{child}\.name {words}"):
        fit(DGD.for_data(DGDConfig(optim=optim), data), data, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_run_and_an_optimizer_a_known_name(data):
    with pytest.raises(ValueError, match="resume=True needs run_dir"):
        fit(new(data), data, resume=True, progress=False)
    optim = type(DGDConfig().optim)(prior=OptimizerConfig("lion", lr=1.0))
    with pytest.raises(ValueError, match=r"optim\.prior\.name must be one of adam, .*given 'lion'"):
        fit(DGD.for_data(DGDConfig(optim=optim), data), data, progress=False)
