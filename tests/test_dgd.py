"""The Deep Generative Decoder: its loss against Eq. 3, and what the paper claims, in small, on real digits."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA

from latent_engine import (
    DGD,
    Batch,
    CheckpointError,
    Data,
    DGDConfig,
    TrainConfig,
    fit,
    load_data,
    load_system,
)
from latent_engine.latents import LatentTable, RowAdam, RowSGD, map_inference
from latent_engine.networks import dgd_mnist_decoder


@pytest.fixture(scope="module")
def digits():
    """1,000 MNIST digits, 100 a class, thresholded."""
    data = load_data("mnist5k").pixels(binarize=True)
    rows = torch.cat([(data.y == c).nonzero()[:100, 0] for c in range(10)])
    return dataclasses.replace(data, x=data.x[rows], y=data.y[rows])


def tiny(rows=12, shape=(1, 4, 4), **config):
    """A system on small random binary images, in float64."""
    torch.manual_seed(0)
    x = torch.rand(rows, *shape).round().double()
    y = torch.arange(rows) % 3
    return DGD(DGDConfig(**config), rows, shape, labels=y).double(), Batch(x, torch.arange(rows), y)


def eq3(system, batch):
    """The terms of Eq. 3 over the whole data set, by SciPy."""
    z, prior = system.latents.z, system.prior
    p = system.decode(z).detach().numpy()
    log_px_z = stats.bernoulli(p).logpmf(batch.x.numpy()).sum()
    parts = [stats.multivariate_normal(m, np.diag(v)).logpdf(z) for m, v in
             zip(prior.means.detach().numpy(), prior.log_vars.detach().exp().numpy(), strict=True)]
    log_pz = (np.logaddexp.reduce(parts) - np.log(len(parts))).sum()
    return log_px_z, log_pz, prior.log_prior().item()


@pytest.mark.parametrize(("count", "times"), [("once", 1), ("per_sample", 12)])
def test_batches_of_an_epoch_sum_to_eq3(count, times):
    system, batch = tiny(prior_count=count, components=5)
    log_px_z, log_pz, log_prior = eq3(system, batch)
    total = sum(system.loss(Batch(batch.x[rows], rows), "main")["total"] for rows in torch.arange(12).split(5))
    assert total.item() == pytest.approx(-(log_px_z + log_pz + times * log_prior), rel=1e-9)


def test_row_gradients_do_not_depend_on_the_batch():
    system, batch = tiny()
    grads = []
    for rows in (torch.arange(12), torch.tensor([7])):
        system.zero_grad()
        system.loss(Batch(batch.x[rows], rows), "main")["total"].backward()
        grads.append(system.latents.h.grad.to_dense()[7])
    torch.testing.assert_close(*grads)


def test_log_joint_is_the_loss_of_a_row():
    system, batch = tiny()
    terms = system.loss(batch, "main")
    log_joint = system.log_joint(batch.x, system.latents.z).sum()
    torch.testing.assert_close(log_joint, terms["log_px_z"] + terms["log_pz"])


def test_the_decoder_of_the_paper_has_its_shapes():
    decoder = dgd_mnist_decoder(2)
    shapes = [tuple(p.shape) for p in decoder.parameters() if p.dim() > 1]
    assert shapes == [(30, 2), (3136, 30), (64, 32, 4, 4), (32, 1, 4, 4)]
    assert decoder(torch.zeros(3, 2)).shape == (3, 1, 28, 28)


def test_row_sgd_is_sgd_with_momentum_on_the_rows_it_sees():
    """v ← μ v − η g, z ← z + v, written out; a row outside the batch rests, a repeated row sums its gradients."""
    table = LatentTable(torch.zeros(5, 2))
    optimizer = RowSGD(table.parameters(), lr=0.1, momentum=0.5)
    z, v = np.zeros((5, 2)), np.zeros((5, 2))
    for rows in ([0, 3], [3, 3, 4], [0]):
        table(torch.tensor(rows)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for row, count in zip(*np.unique(rows, return_counts=True), strict=True):
            v[row] = 0.5 * v[row] - 0.1 * count
            z[row] += v[row]
    np.testing.assert_allclose(table.z, z, rtol=1e-6)


def test_row_adam_is_adam_for_each_row_alone():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    table, dense = LatentTable(start.clone()), [torch.nn.Parameter(row) for row in start.clone()]
    sparse_step = RowAdam(table.parameters(), lr=0.1, weight_decay=0.01)
    dense_steps = [torch.optim.Adam([row], lr=0.1, weight_decay=0.01) for row in dense]
    for rows in ([0, 1], [1, 3], [1], [0, 2]):
        table(torch.tensor(rows)).square().sum().backward()
        sparse_step.step()
        sparse_step.zero_grad()
        for row in rows:
            dense_steps[row].zero_grad()
            dense[row].square().sum().backward()
            dense_steps[row].step()
    torch.testing.assert_close(table.z, torch.stack([row.detach() for row in dense]))


def test_row_optimizers_refuse_a_dense_gradient():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.sum().backward()
    with pytest.raises(TypeError, match="given a dense one"):
        RowSGD([weight]).step()


def test_constrained_representations_stay_in_their_interval():
    """z = g(h), and the gradient is taken in h: for the sigmoid at h = 0, a quarter of that in z."""
    table = LatentTable(torch.tensor([[0.0], [50.0]]), "sigmoid")
    table(torch.tensor([0])).sum().backward()
    assert table.h.grad.to_dense()[0].item() == 0.25
    system, batch = tiny(latent_transform="sigmoid")
    z = system.represent(batch.x, lr=10.0)
    assert ((z >= 0) & (z <= 1)).all()


def test_normalize_gives_each_dimension_variance_one():
    system, _ = tiny(prior="normal", normalize=True)
    with torch.no_grad():
        system.latents.h.mul_(7).add_(3)
    system.after_epoch(1)
    np.testing.assert_allclose(system.latents.z.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(system.latents.z.var(0, correction=0), 1)


def test_map_inference_finds_the_maximum_of_each_row_and_never_loses_ground():
    target = torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 0.0]])
    start = torch.tensor([[0.0, 0.0], [3.0, 0.5], [5.0, 5.0]])
    found = map_inference(lambda z: -(z - target).square().sum(1), start, steps=300, lr=0.1)
    torch.testing.assert_close(found, target, atol=0.02, rtol=0)
    assert torch.equal(found[1], start[1])
    wild = map_inference(lambda z: -(z - target).square().sum(1), start, steps=3, lr=100.0)
    assert torch.equal(wild, start)


@pytest.mark.parametrize("labelled", [False, True], ids=["no-labels", "labels"])
@pytest.mark.parametrize("config", [{"components": 6, "classes": 3}, {"likelihood": "gaussian"}, {"prior": "normal"},
                                    {"latent_transform": "tanh"}], ids=["classes", "gaussian", "normal", "tanh"])
def test_inference_starts_at_the_best_candidate_of_a_plain_loop(config, labelled):
    """Component means, where g is the identity, and every third training representation; some labels unknown."""
    system, batch = tiny(rows=30, **config)
    system.decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4))).double()
    torch.nn.init.normal_(system.decoder[0].weight, std=3.0)
    x = system.decode(system.latents.z).detach()
    labels = torch.where(batch.y == 1, -1, batch.y) if labelled else None
    use_means = config.get("latent_transform") is None
    starts = torch.cat([system.prior.means.detach() if use_means else system.latents.z[:0], system.latents.z[::3]])
    best, highest = torch.zeros(30, 2, dtype=torch.float64), torch.full((30,), -torch.inf, dtype=torch.float64)
    for z in starts:
        value = system.log_joint(x, z.expand(30, -1), labels).detach()
        best[value > highest], highest = z, torch.maximum(highest, value)
    found = system.represent(x, labels, candidates=10, steps=0, batch_size=7)
    assert torch.equal(found, best) and len(best.unique(dim=0)) > 3


def test_labels_of_no_class_are_refused():
    system, batch = tiny(components=6, classes=3)
    for label in (3, -2):
        with pytest.raises(ValueError, match=rf"Labels must lie in \[−1, 3\), given from {label} to {label}"):
            system.represent(batch.x, torch.full((12,), label))


def test_representations_are_the_same_under_no_grad():
    system, batch = tiny()
    expected = system.represent(batch.x)
    with torch.no_grad():
        assert torch.equal(system.represent(batch.x), expected)


def test_unsupervised_training_separates_digits_and_reconstructs_new_ones(digits):
    torch.manual_seed(0)
    system = DGD.for_data(DGDConfig(prior_count="per_sample", components=20), digits)
    test = load_data("mnist5k", "test").pixels(binarize=True)
    before = system.log_joint(digits.x, system.latents.z).mean().item()
    records = fit(system, digits, TrainConfig(epochs=25), progress=False)
    assert records[-1]["total"] < records[0]["total"]
    assert system.log_joint(digits.x, system.latents.z).mean() > before + 100

    # 10 nearest neighbours in the plane, against a tenth by chance.
    distance = torch.cdist(system.latents.z, system.latents.z).fill_diagonal_(torch.inf)
    votes = digits.y[distance.topk(10, largest=False).indices].mode(1).values
    assert (votes == digits.y).float().mean() > 0.5

    # New digits: a smaller error than that of the best linear decoder of as many dimensions.
    x = test.x[:200]
    error = (system.reconstruct(x) - x).square().mean().item()
    pca = PCA(2).fit(digits.x.flatten(1).numpy())
    flat = x.flatten(1).numpy()
    assert error < np.square(pca.inverse_transform(pca.transform(flat)) - flat).mean()


def test_labelled_components_keep_their_digits(digits):
    torch.manual_seed(0)
    config = DGDConfig(components=20, classes=10, latent_init="prior", prior_count="per_sample")
    system = DGD.for_data(config, digits)
    fit(system, digits, TrainConfig(epochs=5), progress=False)
    own = system.prior.responsibilities(system.latents.z).unflatten(1, (10, 2)).sum(2).argmax(1)
    assert (own == digits.y).float().mean() > 0.95
    # Digits decoded from a class's own components are nearest to the mean image of that class.
    labels = torch.arange(10).repeat_interleave(20)
    samples = system.sample(200, torch.Generator().manual_seed(0), labels=labels)
    class_means = torch.stack([digits.x[digits.y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(samples.flatten(1), class_means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.35


def test_labels_of_some_rows_are_enough_to_tell_new_digits(digits):
    """Half of the labels are hidden. New digits are told by the component in which inference puts them."""
    y = torch.where(torch.arange(1000) % 2 == 0, digits.y, -1)
    data = dataclasses.replace(digits, y=y)
    torch.manual_seed(0)
    system = DGD.for_data(DGDConfig(components=10, classes=10, latent_init="prior", prior_count="per_sample"), data)
    fit(system, data, TrainConfig(epochs=10), progress=False)
    own = system.prior.responsibilities(system.latents.z).argmax(1) == digits.y
    assert own[::2].float().mean() > 0.9
    test = load_data("mnist5k", "test").pixels(binarize=True)
    told = system.prior.responsibilities(system.represent(test.x[::5])).argmax(1)
    assert (told == test.y[::5]).float().mean() > 0.4


@pytest.mark.parametrize("config", [
    {"prior": "normal", "normalize": True}, {"likelihood": "gaussian", "covariance": "isotropic"},
    {"latent_init": "zeros", "latent_transform": "tanh"}, {"components": 6, "classes": 3, "prior_count": "per_sample"},
], ids=["normal", "gaussian", "tanh", "classes"])
def test_every_kind_of_dgd_learns_and_comes_back_from_disk(config, tmp_path):
    system, batch = tiny(rows=40, **config)
    system, data = system.float(), Data(batch.x.float(), batch.y)
    records = fit(system, data, TrainConfig(epochs=30, batch_size=8), progress=False)
    assert records[-1]["total"] < records[0]["total"]
    system.save(tmp_path)
    again = load_system(tmp_path)
    assert again.config == system.config and again.state_dict().keys() == system.state_dict().keys()
    assert torch.equal(again.latents.z, system.latents.z)
    x = data.x[:5]
    assert torch.equal(again.reconstruct(x), system.reconstruct(x))
    assert again.sample(3, torch.Generator().manual_seed(0), noise=True).shape == (3, 1, 4, 4)


def test_a_decoder_of_ones_own_is_given_again_when_loading(tmp_path):
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4)))
    system = DGD(DGDConfig(), 3, (1, 4, 4), decoder)
    system.save(tmp_path)
    again = DGD.load(tmp_path, decoder=torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4))))
    assert torch.equal(again.decode(torch.ones(1, 2)), system.decode(torch.ones(1, 2)))
    with pytest.raises(CheckpointError, match="does not fit the system"):
        DGD.load(tmp_path)


@pytest.mark.parametrize(("config", "words"), [
    ({"prior": "normal", "classes": 3, "components": 3}, "no components to label"),
    ({"normalize": True}, "needs prior='normal'"),
    ({"latent_dim": 0}, "latent_dim must be at least 1, given 0"),
    ({"latent_init": "prior", "latent_transform": "tanh"}, "needs latent_transform='identity'"),
])
def test_settings_that_contradict_each_other_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        tiny(**config)


def test_data_that_do_not_fit_are_refused():
    system, batch = tiny(classes=3, components=3)
    x, y = batch.x.float(), batch.y
    for data, words in ((Data(x[:5], y[:5]), "12 training samples, given 5"),
                        (Data(x), "needs labels"),
                        (Data(x, y + 1), r"Labels must lie in \[−1, 3\), given from 1 to 3"),
                        (Data(2 * x, y), r"pixels in \[0, 1\]"),
                        (Data(x[:, :, :2], y), r"shape \[N, 1, 4, 4\], given torch.float32 \[12, 1, 2, 4\]"),
                        (Data((x * 255).byte(), y), r"given torch.uint8 .*Data\.pixels")):
        with pytest.raises(ValueError, match=words):
            fit(system, data, progress=False)
    with pytest.raises(ValueError, match="A normal prior has no components"):
        tiny(prior="normal")[0].sample(1, labels=torch.tensor([0]))
