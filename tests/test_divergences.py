"""MAE's regularisers: their values by pairs in NumPy, in every model with posteriors, and over two processes (gloo)."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from latent_engine import (
    HVAE,
    IWAE,
    VAE,
    VLAE,
    Batch,
    Data,
    HVAEConfig,
    ImplicitConfig,
    ImplicitVAE,
    IWAEConfig,
    TrainConfig,
    TwoStageConfig,
    TwoStageVAE,
    VAEConfig,
    VAEPlus,
    VAEPlusConfig,
    VLAEConfig,
    fit,
)
from latent_engine.bounds import Posterior
from latent_engine.divergences import mutual_divergence

SHAPE = (1, 4, 8)
WEIGHTS = {"diversity": 2.0, "smoothness": 0.5}
SMALL = {"latent_dim": 4, "hidden": (7,), "top_dim": 3, "top_hidden": (5,), "code_dim": 6, "code_hidden": (7,)}
MODELS = {
    "vae": (VAE, VAEConfig, "main", {}),
    "mixture": (VAE, VAEConfig, "main", {"prior": "mixture", "samples": 2}),
    "conv": (VAE, VAEConfig, "main", {"network": "conv", "capacity": 2}),
    "iwae": (IWAE, IWAEConfig, "main", {"samples": 3}),
    "hvae": (HVAE, HVAEConfig, "main", {"lower_dim": 3}),
    "vae-iop": (ImplicitVAE, ImplicitConfig, "main", {"ratio_hidden": (5,)}),
    "vlae": (VLAE, VLAEConfig, "main", {"network": "mlp", "prior": "normal", "width": 4, "kernels": (3,), "features": 1}),
    "vr-max": (IWAE, IWAEConfig, "main", {"samples": 3, "alpha": -math.inf}),
    "iwae-2": (IWAE, IWAEConfig, "main", {"samples": 3, "prior": "hierarchical"}),
    "two-stage": (TwoStageVAE, TwoStageConfig, "first", {}),
    "vae-plus": (VAEPlus, VAEPlusConfig, "first", {}),
}


def model(name="vae", rows=6, **settings):
    """A model in float64, and random binary images for it."""
    kind, config, phase, own = MODELS[name]
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if hasattr(config, key)}
    system = kind(config(**sizes | own | settings), SHAPE).double()
    return system, Batch(torch.rand(rows, *SHAPE, dtype=torch.float64).round(), torch.arange(rows)), phase


def loss(system, batch, phase="main", seed=0):
    torch.manual_seed(seed)
    return system.loss(batch, phase)


def pairs(posterior):
    """KL_d(i‖j) of the ordered pairs i ≠ j, `[N (N − 1), D]`, one at a time."""
    mean, var = posterior.mean.detach().numpy(), np.exp(posterior.log_var.detach().numpy())
    return np.array([0.5 * (np.log(var[j] / var[i]) + (var[i] + (mean[i] - mean[j]) ** 2) / var[j] - 1)
                     for i in range(len(mean)) for j in range(len(mean)) if i != j])


def expected(posterior, form="paper"):
    kl = pairs(posterior)
    per_dimension = np.log1p(np.exp(-kl)).mean(0) if form == "paper" else np.log1p(np.exp(-kl.mean(0)))
    return {"diversity": per_dimension.sum(), "smoothness": kl.sum(1).std(ddof=1), "mpd": kl.sum(1).mean()}


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("rows", [2, 9])
def test_the_penalty_and_its_parts_are_those_of_the_pairs(form, rows):
    rng = np.random.default_rng(rows)
    posterior = Posterior(*(torch.from_numpy(rng.normal(size=(rows, 3))).requires_grad_() for _ in range(2)))
    penalty, parts = mutual_divergence(posterior, 2.0, 0.5, form=form)
    values = expected(posterior, form)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(values)
    assert penalty.item() == pytest.approx(2 * values["diversity"] + 0.5 * values["smoothness"])
    assert not any(part.requires_grad for part in parts.values())
    # A step along the gradient, by differences.
    gradients = torch.autograd.grad(penalty, posterior)
    step = 1e-6
    moved = Posterior(*(t + step * g for t, g in zip(posterior, gradients, strict=True)))
    slope = (mutual_divergence(moved, 2.0, 0.5, form=form)[0] - penalty).item() / step
    assert slope == pytest.approx(sum(g.square().sum().item() for g in gradients), rel=1e-4)


def test_a_regulariser_without_weight_takes_no_part():
    posterior = Posterior(*(torch.randn(5, 2, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(2)))
    both, diverse, smooth = (mutual_divergence(posterior, *weights)[0] for weights in ((2.0, 0.5), (2.0, 0.0), (0.0, 0.5)))
    parts = [torch.stack(torch.autograd.grad(t, posterior)) for t in (both, diverse, smooth)]
    torch.testing.assert_close(parts[0], parts[1] + parts[2])
    assert not mutual_divergence(posterior, 0.0, 0.0)[0].requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_every_model_with_posteriors_adds_them_to_its_loss_in_training(name):
    plain, batch, phase = model(name)
    regularized, _, _ = model(name, **WEIGHTS)
    before, after = loss(plain, batch, phase), loss(regularized, batch, phase)
    values = expected(plain.encode(batch.x))
    added = {term: after[term].item() for term in after.keys() - before.keys()}
    assert added == pytest.approx(values)
    assert after["total"].item() == pytest.approx(before["total"].item() + 2 * values["diversity"] + 0.5 * values["smoothness"])
    assert all(torch.equal(after[term], before[term]) for term in before if term != "total")
    after["total"].backward()
    plain.eval(), regularized.eval()
    torch.testing.assert_close(loss(regularized, batch, phase), loss(plain, batch, phase), rtol=0, atol=0)


def test_the_form_of_the_authors_code_is_another():
    terms = [loss(*model(**WEIGHTS, diversity_form=form)[:2]) for form in ("paper", "code")]
    assert terms[1]["diversity"] < terms[0]["diversity"] and terms[0]["smoothness"] == terms[1]["smoothness"]


def test_regularised_posteriors_are_more_diverse_and_more_even():
    """The weights do in training what the paper says that they do."""
    x = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(3)).round()
    states = {}
    for name, weights in (("plain", {}), ("diverse", {"diversity": 20.0}), ("smooth", {"smoothness": 20.0})):
        system = model(**weights)[0].float()
        states[name] = fit(system, Data(x), TrainConfig(epochs=30, batch_size=20), progress=False)[-1]
    assert states["diverse"]["balance/mpd"] > 2 * states["plain"]["balance/mpd"]
    assert states["smooth"]["balance/mpd_std"] < 0.5 * states["plain"]["balance/mpd_std"]
    assert {"diversity", "smoothness", "mpd"} <= states["diverse"].keys() and "mpd" not in states["plain"]


def test_the_monitor_sees_the_pairs_of_posteriors():
    system, batch, _ = model()
    state, values = system.eval().monitor(batch.x), expected(system.encode(batch.x))
    assert state["balance/mpd"] == pytest.approx(values["mpd"])
    assert state["balance/mpd_std"] == pytest.approx(values["smoothness"])


def test_batches_without_a_pair_are_refused_before_training_and_validated(tmp_path):
    system, batch, _ = model(rows=7, **WEIGHTS)
    system, data = system.float(), Data(batch.x.float())
    for batch_size in (1, 3):
        with pytest.raises(ValueError, match=rf"needs 2 of them, but of 7 rows in batches of {batch_size} the last has 1"):
            fit(system, data, TrainConfig(batch_size=batch_size), run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="needs N ≥ 2 posteriors to form a pair, given N = 1; use a larger batch"):
        system.train().loss(Batch(data.x[:1], batch.index[:1]), "main")
    records = fit(system, data, TrainConfig(epochs=1, batch_size=2, validation=1), progress=False)
    assert math.isfinite(records[0]["validation/total"]) and "validation/diversity" not in records[0]
    fit(model()[0].float(), data, TrainConfig(epochs=1, batch_size=3), progress=False)  # without pairs, one row will do


@pytest.mark.parametrize(("settings", "words"), [
    ({"diversity": 1.0, "posterior_flow": "iaf"}, "those of Gaussian posteriors; set them to 0 with posterior_flow='iaf'"),
    ({"diversity": -1.0}, "diversity must be at least 0 and finite, given -1.0"),
    ({"smoothness": math.nan}, "smoothness must be at least 0 and finite, given nan"),
    ({"diversity_form": "eq8"}, "diversity_form must be one of paper, code, given 'eq8'"),
])
@pytest.mark.parametrize("config", [VAEConfig, IWAEConfig])
def test_weights_that_are_none(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def gradients(total, system):
    return torch.autograd.grad(total, list(system.parameters()), materialize_grads=True)


def worker(rank: int, folder: str) -> None:
    """Half of the rows of each batch: the loss and its gradient, as a rank of data-parallel training finds them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for form in ("paper", "code"):
        system, batch, _ = model(rows=8, **WEIGHTS, diversity_form=form)
        half = slice(4 * rank, 4 * rank + 4)
        terms = loss(system, Batch(batch.x[half], batch.index[half]), seed=rank)
        results[form] = {name: term.detach() for name, term in terms.items()}, gradients(terms["total"], system)
        # A rank by itself, with nobody to exchange sums with.
        if rank == 0:
            system.eval().loss(batch, "main")
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_the_mean_over_two_processes_is_the_loss_of_one(tmp_path):
    """Whose noise is that of both: its ELBO is the mean of those of the halves, with the seed of each."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for form in ("paper", "code"):
        system, batch, _ = model(rows=8, **WEIGHTS, diversity_form=form)
        plain = copy.copy(system)
        plain.config = replace(system.config, diversity=0.0, smoothness=0.0)
        halves = [loss(plain, Batch(batch.x[half], batch.index[half]), seed=rank)["total"]
                  for rank, half in enumerate((slice(4), slice(4, 8)))]
        penalty, parts = mutual_divergence(system.encode(batch.x), **WEIGHTS, form=form)
        whole = sum(halves) / 2 + penalty
        (first, first_grads), (second, second_grads) = (ranks[form] for ranks in found)
        torch.testing.assert_close((first["total"] + second["total"]) / 2, whole.detach())
        for name, value in parts.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value)
        mean = [(a + b) / 2 for a, b in zip(first_grads, second_grads, strict=True)]
        torch.testing.assert_close(mean, list(gradients(whole, system)))


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
