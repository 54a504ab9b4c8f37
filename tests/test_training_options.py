"""Options of the training loop: clipping, averaged weights, learning-rate stages, validation, dynamic binarisation."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn

from latent_engine import DGD, Data, DGDConfig, OptimizerConfig, Phase, System, TrainConfig, fit
from latent_engine import checkpoint as checkpoint_module
from latent_engine.checkpoint import CheckpointError, read_tensors, weights_note
from latent_engine.data import batch_order
from latent_engine.trainer import make_optimizers

SGD = OptimizerConfig("sgd", lr=0.1)


class Point(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(size))


@dataclass(frozen=True)
class CentersOptim:
    near: OptimizerConfig = SGD
    far: OptimizerConfig = SGD


@dataclass(frozen=True)
class CentersConfig:
    size: int = 6
    noise: float = 0.0
    optim: CentersOptim = field(default_factory=CentersOptim)


class Centers(System):
    """Two points drawn to the mean of the rows: ½ |x − near|² + 2 |x − far|², with noise on x where asked for."""

    name = "centers"
    config_type = CentersConfig

    def __init__(self, config=None):
        super().__init__()
        self.config = config or CentersConfig()
        self.near, self.far = Point(self.config.size), Point(self.config.size)
        self.seen = []

    def arguments(self):
        return {"config": self.config}

    def loss(self, batch, phase):
        x = batch.x.flatten(1)
        self.seen.append((self.training, torch.is_grad_enabled(), batch.index, x))
        x = x + self.config.noise * torch.randn_like(x)
        near, far = (x - self.near.at).square().sum(1).mean() / 2, 2 * (x - self.far.at).square().sum(1).mean()
        return {"total": near + far, "near": near, "far": far}


def rows(n, seed=0, size=6):
    return Data(torch.rand(n, 1, 1, size, generator=torch.Generator().manual_seed(seed)))


def by_hand(data, config, lr=0.1, numbers=None):
    """The path of both points under SGD, float64: after each step `[2, size]`."""
    x = data.x.flatten(1).double().numpy()
    numbers = np.arange(len(x)) if numbers is None else numbers
    points, path = np.zeros((2, x.shape[1])), []
    for epoch in range(1, config.epochs + 1):
        for batch in batch_order(len(numbers), config.batch_size, config.seed, epoch):
            grad = (points - x[numbers[batch]].mean(0)) * [[1], [4]]
            norm = np.sqrt((grad**2).sum())
            points = points - lr * grad * min(1, (config.clip_norm or np.inf) / norm)
            path.append(points)
    return np.array(path)


def points(system):
    return torch.stack([system.near.at, system.far.at]).detach().numpy()


def loss(x, points):
    return (np.square(x - points[0]).sum(1) / 2 + 2 * np.square(x - points[1]).sum(1)).mean()


def test_the_norm_of_all_gradients_of_a_phase_is_clipped():
    data, system = rows(23), Centers()
    config = TrainConfig(epochs=12, batch_size=5, clip_norm=2.0)
    fit(system, data, config, progress=False)
    assert np.allclose(points(system), by_hand(data, config)[-1], rtol=1e-5)
    lengths = np.sqrt(np.square(np.diff(by_hand(data, config), axis=0)).sum((1, 2)))
    assert lengths.max() == pytest.approx(0.2) and (lengths < 0.19).sum() > 10  # some steps are clipped, others are not


def test_clipping_counts_the_gradients_of_a_latent_table():
    """With one rate for all and no momentum, a clipped step is as long as the rate times the norm."""
    data = rows(20)
    optim = replace(DGDConfig().optim, decoder=OptimizerConfig("sgd", lr=0.5), prior=OptimizerConfig("sgd", lr=0.5),
                    latents=OptimizerConfig("row_sgd", lr=0.5))
    system = DGD.for_data(DGDConfig(components=3, optim=optim), data)
    before = [p.detach().clone().double() for p in system.parameters()]
    fit(system, data, TrainConfig(epochs=1, clip_norm=0.01), progress=False)
    moved = [(p.detach() - b).square().sum().item() for p, b in zip(system.parameters(), before, strict=True)]
    assert sum(moved) ** 0.5 == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert (system.latents.h.detach() - before[[n for n, _ in system.named_parameters()].index("latents.h")]).any(1).all()


def test_averaged_weights_are_validated_and_kept(tmp_path):
    data, validation, system = rows(23), rows(7, seed=1), Centers()
    config = TrainConfig(epochs=4, batch_size=5, ema_decay=0.7)
    records = fit(system, data, config, validation=validation, run_dir=tmp_path, progress=False)
    average, averages = np.zeros((2, 6)), []
    for point in by_hand(data, config):
        average = 0.7 * average + 0.3 * point
        averages.append(average)
    x = validation.x.flatten(1).double().numpy()
    losses = [loss(x, averages[epoch * 5 - 1]) for epoch in range(1, 5)]
    assert [r["validation/total"] for r in records] == pytest.approx(losses, rel=1e-5)
    best = int(np.argmin(losses))
    assert np.allclose(points(system), averages[best * 5 + 4], rtol=1e-5)
    stored = read_tensors(tmp_path / "step_000020" / "model.safetensors")
    assert np.allclose(stored["near.at"], averages[-1][0], rtol=1e-5)
    trained = read_tensors(tmp_path / "step_000020" / "state.safetensors")["trained.near.at"]
    assert np.allclose(trained, by_hand(data, config)[-1][0], rtol=1e-5)
    assert json.loads((tmp_path / "step_000020" / "meta.json").read_text())["weights"] == "ema"


def test_without_validation_the_last_average_is_what_is_left_and_loaded(tmp_path):
    data, system = rows(10), Centers()
    fit(system, data, TrainConfig(epochs=3, batch_size=5, ema_decay=0.9), run_dir=tmp_path, progress=False)
    assert not np.allclose(points(system), by_hand(data, TrainConfig(epochs=3, batch_size=5))[-1], rtol=0.1)
    assert np.array_equal(points(Centers.load(tmp_path)), points(system))
    assert weights_note(tmp_path) == "epoch 3, averaged (EMA)"


def test_stages_of_burda_and_step_decay():
    burda = TrainConfig(epochs=3280, lr_stage_epochs=1, lr_stage_growth=3, lr_decay=10 ** (-1 / 7))
    expected = np.concatenate([np.full(3**i, 10 ** (-i / 7)) for i in range(8)])
    assert len(expected) == 3280
    assert np.allclose([burda.lr_factor(epoch) for epoch in range(1, 3281)], expected, rtol=1e-12)
    steps = TrainConfig(lr_stage_epochs=30, lr_decay=0.1)
    assert np.allclose([steps.lr_factor(e) for e in (1, 30, 31, 60, 61)], [1, 1, 0.1, 0.1, 0.01], rtol=1e-12)
    assert {TrainConfig().lr_factor(e) for e in (1, 1000)} == {1}


def test_every_learning_rate_follows_the_stages():
    """Towards rows of zeros a point at 1 shrinks by 1 − lr · curvature a step."""
    system = Centers(CentersConfig(optim=CentersOptim(far=OptimizerConfig("sgd", lr=0.05))))
    with torch.no_grad():
        system.near.at.fill_(1)
        system.far.at.fill_(1)
    config = TrainConfig(epochs=5, batch_size=2, lr_stage_epochs=1, lr_stage_growth=2, lr_decay=0.5)
    fit(system, Data(torch.zeros(2, 1, 1, 6)), config, progress=False)
    factors = np.array([1, 0.5, 0.5, 0.25, 0.25])
    expected = np.prod(1 - np.outer([0.1, 4 * 0.05], factors), axis=1)
    assert np.allclose(points(system), expected[:, None], rtol=1e-5)


class InTurn(Centers):
    def phases(self):
        return Phase("first", ("near",), last_epoch=3), Phase("second", ("far",), first_epoch=4)


def test_a_phase_begins_with_its_first_stage():
    system = InTurn()
    with torch.no_grad():
        system.near.at.fill_(1)
        system.far.at.fill_(1)
    config = TrainConfig(epochs=7, batch_size=2, lr_stage_epochs=2, lr_decay=0.5)
    fit(system, Data(torch.zeros(2, 1, 1, 6)), config, progress=False)
    near, far = (np.prod(1 - 0.1 * np.array(lr)) for lr in ([1, 1, 0.5], [4, 4, 2, 2]))
    assert np.allclose(points(system), [[near], [far]], rtol=1e-5)


def test_children_share_an_optimizer_where_settings_and_phases_are_the_same():
    def sharing(near, far, phases):
        found = make_optimizers(Centers(CentersConfig(optim=CentersOptim(near, far))), phases)
        return found["near"] is found["far"]

    both, first, second = (Phase(name, children) for name, children in (
        ("both", ("near", "far")), ("first", ("near",)), ("second", ("far",))))
    assert sharing(SGD, SGD, (both,))
    assert not sharing(SGD, replace(SGD, lr=0.2), (both,))
    assert not sharing(SGD, SGD, (first, second)) and not sharing(SGD, SGD, (both, second))


def test_eps_of_adam():
    """The first step of Adam is lr · g / (|g| + eps)."""
    data, adam = rows(4), OptimizerConfig("adam", lr=0.1, eps=0.5)
    system = Centers(CentersConfig(optim=CentersOptim(near=adam)))
    fit(system, data, TrainConfig(epochs=1, batch_size=4), progress=False)
    g = -data.x.flatten(1).double().numpy().mean(0)
    assert np.allclose(points(system)[0], -0.1 * g / (np.abs(g) + 0.5), rtol=1e-5)
    optim = replace(DGDConfig().optim, latents=replace(adam, name="row_adam"))
    dgd = DGD.for_data(DGDConfig(optim=optim), data)
    assert make_optimizers(dgd, dgd.phases())["latents"].param_groups[0]["eps"] == 0.5


def test_held_out_rows_are_never_trained_on_and_depend_on_the_seed_alone():
    data, held = rows(40), {}
    for key, seed, amount in (("a", 3, 0.25), ("b", 3, 10), ("c", 4, 10)):
        system = Centers()
        config = TrainConfig(epochs=3, batch_size=7, seed=seed, validation=amount)
        records = fit(system, data, config, progress=False)
        trained = torch.cat([index for training, _, index, _ in system.seen if training])
        numbers, counts = np.unique(trained, return_counts=True)
        assert len(numbers) == 30 and set(counts) == {3}
        held[key] = sorted(set(range(40)) - set(numbers))
        assert all(torch.equal(x, data.x[index].flatten(1)) for training, _, index, x in system.seen if training)
        path = by_hand(data, config, numbers=numbers)
        x = data.x[held[key]].flatten(1).double().numpy()
        losses = [loss(x, path[5 * epoch - 1]) for epoch in (1, 2, 3)]
        assert [r["validation/total"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert held["a"] == held["b"] != held["c"]


def test_validation_takes_no_gradients_and_the_same_random_numbers_each_epoch():
    still = OptimizerConfig("sgd", lr=0.0)
    system = Centers(CentersConfig(noise=1.0, optim=CentersOptim(still, still)))
    records = fit(system, rows(20), TrainConfig(epochs=3, batch_size=4, validation=6), progress=False)
    assert len({r["validation/total"] for r in records}) == 1 and len({r["total"] for r in records}) == 3
    assert {(training, grad) for training, grad, *_ in system.seen} == {(True, True), (False, False)}


# Rows around 1 pull the points past those to validate on, around 0.3, on which the loss falls first and then rises.
TRAIN, VALIDATE = (Data(rows(n, seed).x * 0.1 + low) for n, seed, low in ((20, 0, 0.95), (9, 1, 0.25)))
STOPPING = TrainConfig(epochs=50, batch_size=10, patience=3)
SLOW = CentersConfig(optim=CentersOptim(*[OptimizerConfig("sgd", lr=0.01)] * 2))


def test_patience_begins_with_the_last_phase():
    still = OptimizerConfig("sgd", lr=0.0)
    system = InTurn(CentersConfig(optim=CentersOptim(still, still)))
    assert len(fit(system, rows(8), replace(STOPPING, patience=2), validation=rows(4), progress=False)) == 5


@pytest.mark.parametrize("every", [1, 7])
def test_training_stops_after_patience_and_returns_the_best_weights(tmp_path, every, capsys):
    system, config = Centers(SLOW), replace(STOPPING, checkpoint_every=every)
    records = fit(system, TRAIN, config, validation=VALIDATE, run_dir=tmp_path)
    path, x = by_hand(TRAIN, config, lr=0.01)[1::2], VALIDATE.x.flatten(1).double().numpy()
    losses = [loss(x, point) for point in path]
    best = int(np.argmin(losses))
    assert 0 < best < 10 and len(records) == best + 1 + 3
    assert np.allclose(points(system), path[best], rtol=1e-5) and not system.training
    assert f"Weights of epoch {best + 1}, the best on validation" in capsys.readouterr().err
    assert np.array_equal(points(Centers.load(tmp_path)), points(system))
    assert weights_note(tmp_path) == f"epoch {best + 1}, the best on validation (loss {losses[best]:.6g})"
    steps = sorted(p.name for p in tmp_path.glob("step_*"))
    assert steps == [f"step_{2 * epoch:06d}" for epoch in (best + 1, best + 4)]
    last = read_tensors(tmp_path / steps[1] / "model.safetensors")
    assert np.allclose(last["near.at"], path[best + 3][0], rtol=1e-5)
    in_memory = Centers(SLOW)
    fit(in_memory, TRAIN, config, validation=VALIDATE, progress=False)
    assert np.array_equal(points(in_memory), points(system))


def test_a_run_that_has_stopped_stays_so_when_it_is_resumed(tmp_path):
    first, again = Centers(SLOW), Centers(SLOW)
    records = fit(first, TRAIN, STOPPING, validation=VALIDATE, run_dir=tmp_path, progress=False)
    config = replace(STOPPING, epochs=60)
    assert fit(again, TRAIN, config, validation=VALIDATE, run_dir=tmp_path, resume=True, progress=False) == records
    assert np.array_equal(points(again), points(first)) and not again.seen
    with pytest.raises(CheckpointError, match=r"validation\.crc32"):
        fit(Centers(SLOW), TRAIN, STOPPING, validation=TRAIN, run_dir=tmp_path, resume=True, progress=False)


def all_options(run):
    """A run of six epochs with every option at once, started or continued."""
    adam = OptimizerConfig("adam", lr=0.05, eps=1e-4)
    system = Centers(CentersConfig(noise=0.3, optim=CentersOptim(adam, replace(SGD, momentum=0.9))))
    config = TrainConfig(6, 8, 5, clip_norm=0.9, ema_decay=0.8, lr_stage_epochs=1, lr_stage_growth=2, lr_decay=0.7,
                         validation=0.2, patience=2)
    fit(system, rows(30).pixels("dynamic"), config, run_dir=run, resume=True, progress=False)
    return system


def contents(run):
    tensors = {f"{p.parent.name}/{p.name}/{name}": tensor for p in run.glob("step_*/*.safetensors")
               for name, tensor in read_tensors(p).items()}
    meta = {p.parent.name: json.loads(p.read_text()) for p in run.glob("step_*/meta.json")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, meta, (run / "latest").read_text(), [{**record, "seconds": 0} for record in records]


def test_a_run_killed_at_any_write_ends_with_the_same_bits(tmp_path, monkeypatch):
    expected, (tensors, *rest) = all_options(tmp_path / "run"), contents(tmp_path / "run")
    assert rest[0]["step_000018"]["best"]["epoch"] < 6 and len(rest[0]) == 2
    for operation in ("replace", "rename"):
        moves, real = [0, 0], getattr(checkpoint_module.os, operation)

        def die(*args, moves=moves, real=real):
            moves[0] += 1
            if moves[0] == moves[1]:
                raise KeyboardInterrupt
            real(*args)

        for moves[1] in range(1, 1000):
            run, moves[0] = tmp_path / f"{operation}-{moves[1]}", 0
            monkeypatch.setattr(checkpoint_module.os, operation, die)
            try:
                all_options(run)
            except KeyboardInterrupt:
                monkeypatch.undo()
            else:
                break
            system = all_options(run)
            found, *others = contents(run)
            assert others == rest and found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
            assert np.array_equal(points(system), points(expected))
        monkeypatch.undo()
        assert moves[1] > 6


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1 is not finite .*'validation/total': inf"):
        fit(Centers(), TRAIN, validation=Data(torch.full((2, 1, 1, 6), 1e30)), run_dir=tmp_path, progress=False)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000000"]


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_damaged_best_weights_are_named_and_nothing_is_touched(tmp_path, damage):
    fit(Centers(SLOW), TRAIN, STOPPING, validation=VALIDATE, run_dir=tmp_path, progress=False)
    path = min(tmp_path.glob("step_*/model.safetensors"))
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=rf"{path.parent.name}.*model\.safetensors is"):
        Centers.load(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{path.parent.name}.*model\.safetensors is"):
        fit(Centers(SLOW), TRAIN, replace(STOPPING, epochs=60), validation=VALIDATE, run_dir=tmp_path, resume=True,
            progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_dynamic_pixels_are_drawn_anew_each_epoch_with_the_intensities_as_probabilities():
    data = rows(8).pixels("dynamic")
    systems = [Centers() for _ in range(3)]
    for system, seed in zip(systems, (0, 0, 1), strict=True):
        fit(system, data, TrainConfig(epochs=2000 if system is systems[0] else 2, batch_size=3, seed=seed), progress=False)
    draws = torch.zeros(3, 2000, 8, 6)
    for number, system in enumerate(systems):
        for step, (_, _, index, x) in enumerate(system.seen):
            draws[number, step // 3, index] = x
    assert set(draws.unique().tolist()) == {0, 1}
    p = data.x.flatten(1).double()
    error = (p * (1 - p) / 2000).sqrt()
    assert ((draws[0].double().mean(0) - p).abs() <= 4.5 * error).all()
    pairs = (draws[0, 1:] * draws[0, :-1]).double().mean(0)  # successive epochs are independent
    assert ((pairs - p * p).abs() <= 4.5 * 2 * error).all()
    assert torch.equal(draws[0, :2], draws[1, :2]) and not torch.equal(draws[0, :2], draws[2, :2])


def test_dynamic_rows_are_validated_on_one_draw():
    data, system = rows(20).pixels("dynamic"), Centers()
    fit(system, data, TrainConfig(epochs=3, batch_size=4, validation=4), validation=None, progress=False)
    first, *others = [x for training, *_, x in system.seen if not training]
    assert set(first.unique().tolist()) == {0, 1} and len(others) == 2
    assert all(torch.equal(first, x) for x in others)


@pytest.mark.parametrize(("settings", "words"), [
    ({"clip_norm": 0.0}, "clip_norm must lie between 0 and inf, given 0.0"), ({"clip_norm": float("nan")}, "clip_norm"),
    ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1, given 1.0"), ({"lr_decay": -0.1}, "lr_decay must lie"),
    ({"lr_decay": 0.1}, r"need both lr_stage_epochs, .* and an lr_decay other than 1; given None and 0\.1"),
    ({"lr_stage_epochs": 30}, r"given 30 and 1\.0"), ({"lr_stage_growth": 2}, "need both lr_stage_epochs"),
    ({"lr_stage_epochs": 0}, "lr_stage_epochs must be at least 1, given 0"),
    ({"lr_stage_epochs": 2, "lr_stage_growth": 0}, "lr_stage_growth must be at least 1"),
    ({"patience": 0}, "patience must be at least 1, given 0"), ({"validation": -0.1}, "fraction below 1 or a number"),
    ({"validation": 1.5}, "given 1.5"), ({"validation": float("nan")}, "given nan"),
])
def test_options_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


@pytest.mark.parametrize(("config", "validation", "words"), [
    (TrainConfig(patience=3), None, "patience needs rows to validate on"),
    (TrainConfig(validation=5), rows(4), "are given and to be held out .* choose one"),
    (TrainConfig(validation=20), None, "validation=20 holds out 20 of 20 rows"),
    (TrainConfig(validation=0.01), None, "holds out 0 of 20 rows; hold out at least one"),
    (TrainConfig(), rows(4, size=5), r"shape of the training rows, \[1, 1, 6\], given \[4, 1, 1, 5\]"),
    (TrainConfig(), rows(0), r"given \[0, 1, 1, 6\]"),
])
def test_validation_that_cannot_be_is_refused_before_training(config, validation, words, tmp_path):
    system = Centers()
    with pytest.raises(ValueError, match=words):
        fit(system, rows(20), config, validation=validation, run_dir=tmp_path / "run", progress=False)
    assert not system.seen and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"validation": rows(4)}, {"config": TrainConfig(validation=4, patience=2)}])
def test_a_dgd_has_no_validation_loss(options, tmp_path):
    data = rows(20)
    with pytest.raises(ValueError, match="DGD learns a representation of each training row, and other rows have none"):
        fit(DGD.for_data(DGDConfig(), data), data, **options, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_log_has_what_the_system_says_of_training_rows(tmp_path, capsys):
    class Watched(Centers):
        def monitor(self, x):
            self.watched = x
            return {"spread": torch.rand(()).item(), "seen": len(x), "remark": f"{len(x)} rows seen"}

    data, config = rows(1200), TrainConfig(epochs=3, batch_size=400, validation=100)
    system = Watched()
    records = fit(system, data, config, run_dir=tmp_path / "run")
    assert [record["seen"] for record in records] == [367] * 3  # every third of 1,100 rows
    train = {tuple(row) for step in system.seen if step[0] for row in step[3].tolist()}
    assert all(tuple(row) in train for row in system.watched.flatten(1).tolist())
    assert "367 rows seen" in capsys.readouterr().err
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == records
    again = fit(Watched(), data, config)
    assert [record["spread"] for record in again] == [record["spread"] for record in records]
