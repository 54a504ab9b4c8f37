"""The benchmark: it measures what it says, refuses wrong values, and its JSON becomes the README's table."""

import json
from dataclasses import replace

import pytest
import torch

from latent_engine.bench import divergences, em, gmm, training_steps
from latent_engine.bench.__main__ import main
from latent_engine.bench.report import ratio, seconds
from latent_engine.bench.suite import OURS, run_case
from latent_engine.bench.table import markdown
from latent_engine.bench.timing import Ceilings, Probes, Work, peak_memory, time_calls
from latent_engine.system import Batch

CEILINGS = Ceilings(bytes=1e10, fmas=1e11, exps=1e9, operations=1.5e11, tape=1e-5)


def test_one_case_from_command_line_to_table(tmp_path, capsys):
    path, chart = tmp_path / "results" / "run.json", tmp_path / "chart.png"
    assert main(["gmm", "--case", "dgd-step", "--no-compile", "--json", str(path), "--plot", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    assert [r["backward"] for r in content["results"]] == [False, True, True]
    for result in content["results"]:
        assert {OURS, "plain", "gemm"} <= result["timings"].keys()
        assert max(result["errors"].values()) < 1e-4
    assert content["machine"]["versions"]["torch"] == torch.__version__
    table = markdown([content])
    assert table.count("| `dgd-step` |") == 2 and "Geometric means" in table
    assert "gmm_log_prob dgd-step N=32 K=20 D=2, forward + backward" in capsys.readouterr().out


def test_wrong_values_are_not_timed():
    wrong = replace(gmm.SUITES[0], formulas={"plain": gmm.plain, "wrong": lambda *args: gmm.plain(*args) + 0.1})
    result = run_case(wrong, "dgd-step", False, "cpu", CEILINGS, compiled=False)
    assert "wrong" not in result.timings and result.skipped["wrong"].startswith("wrong values: relative error")
    assert ratio(result) > 0


def test_a_ceiling_is_the_most_that_its_probes_reach():
    probes = Probes("cpu")
    assert "exp" in probes.of("exp") and all(probes.of(one).keys() == {one} for one in ("bytes", "FMA", "operations"))
    for fastest in probes.of("exp"):
        seconds = {name: 1e-3 if name == fastest else 1.0 for name in probes.calls}
        assert probes.rate("exp", seconds) == probes.amounts[fastest] / 1e-3
        assert Work(0, 0, 5).amount("exp") / probes.rate("exp", seconds) == pytest.approx(5e-3 / probes.amounts[fastest])


@pytest.mark.parametrize("preset", training_steps.OBJECTIVES)
def test_training_steps_have_the_loss_and_gradients_of_their_plain_objectives(preset):
    x = torch.rand(4, 1, 8, 8).round()
    batch = Batch(x, torch.arange(4))
    ours, plain = training_steps.systems(preset, batch)
    gradients = []
    for loss, system, given in ((training_steps.our_loss, ours, batch), (training_steps.OBJECTIVES[preset], plain, x)):
        torch.manual_seed(2)
        with training_steps.same_noise():
            gradients.append(torch.autograd.grad(loss(system, given), list(system.parameters()), materialize_grads=True))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_training_steps_measure_the_objective_alone():
    found = training_steps.measure("vr-max", torch.rand(4, 1, 8, 8).round(), pairs=2)
    assert found.steps.keys() == {OURS, "plain"} and found.ratio > 0
    assert 0 < found.share < 1


def test_divergences_measure_the_share_of_the_regularisers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(divergences, "BATCHES", (4,))
    monkeypatch.setattr(divergences, "ROUNDS", 2)
    path = tmp_path / "divergences.json"
    assert divergences.main(["mlp", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["divergences"]["mlp-4"]
    assert found.keys() == {"with", "without", "regularizers"} and found["regularizers"]["median"] > 0
    assert "mlp N=4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        divergences.main(["nothing"])
    assert "unknown network 'nothing'; they are mlp," in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["diagonal", "full", "tied", "spherical"])
def test_peers_of_an_em_iteration_find_the_same_mixture(kind, monkeypatch):
    for name, size in {"N": 700, "K": 5, "D": 4}.items():
        monkeypatch.setattr(em, name, size)
    x, start = em.problem(kind)
    means, covariances = em.gemm(x.double(), start)()
    for peer in (em.ours, em.gemm, em.scikit_learn):
        found = peer(x, start)()
        torch.testing.assert_close(found[0].double(), means, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1].double(), covariances, rtol=1e-4, atol=1e-4)


def test_bound_is_the_slowest_resource():
    assert CEILINGS.bound(Work(bytes=1e10, fmas=1e10, exps=1e7)) == (1.0, "bytes")
    assert CEILINGS.bound(Work(bytes=0, fmas=1e12, exps=1e9)) == (10.0, "FMA")
    assert CEILINGS.bound(Work(bytes=0, fmas=1e12, exps=1e9, additions=4e11)) == (10.0, "FMA")
    assert CEILINGS.bound(Work(bytes=0, fmas=1e12, exps=1e9, additions=2e12)) == (20.0, "operations")


def test_peak_memory_sees_what_a_call_allocates():
    size = 64 * 2**20
    peak = peak_memory(lambda: torch.ones(size // 4).sum(), "cpu")
    if peak is None:
        pytest.skip("this system does not tell")
    assert size * 0.9 <= peak <= size * 1.5


def test_timings_are_quantiles_of_every_call():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    timings = time_calls({name: lambda name=name: count(name) for name in calls}, "cpu", rounds=3)
    assert timings.keys() == calls.keys() and min(calls.values()) > 3
    assert all(0 < t.low <= t.median <= t.high for t in timings.values())


def test_seconds_have_units():
    assert [seconds(t) for t in (2.0, 0.0123, 4.56e-6, 7e-10)] == ["2 s", "12.3 ms", "4.56 µs", "0.0007 µs"]


def test_unknown_training_step(capsys):
    with pytest.raises(SystemExit):
        training_steps.main(["nothing"])
    assert "unknown preset 'nothing'; those with a plain objective are vae," in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], ["gmm", "--case", "nothing"], ["--json", "/proc/nothing/run.json"]])
def test_mistakes_are_one_clear_error_before_measuring(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err
